//! Machines driven over the control API. Every reply is checked against the server's own schema.

pub mod clients;
pub mod ctl;
pub mod events;
pub mod handover;
pub mod hotplug;
pub mod life;

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs,
    io::{self, Read},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fanlight_api::{
    client::{Client, ClientError},
    schema::standalone,
    types::EventName,
};
use fanlight_tests::{
    Context, Failure, HANG, Result, ensure,
    host_side::guest::{Assets, Guest, GuestBuilder, nested_host_clock},
};
use jsonschema::Validator;
use serde_json::{Value, json};

/// A server or guest that is silent for this long hangs; speed does not matter.
const PATIENCE: Duration = Duration::from_secs(120);

/// Reports a read that timed out while the guest was expected to act as a hang.
fn hang(error: &io::Error, what: impl Display) -> Failure {
    match error.kind() {
        io::ErrorKind::WouldBlock => Failure(format!("{HANG}: {what}")),
        _ => Failure::new(what, error),
    }
}

/// A connection that checks each reply against the schema.
struct Api {
    client: Client,
    results: BTreeMap<String, Validator>,
}

impl Api {
    fn connect(path: &Path) -> Result<Self> {
        let start = Instant::now();
        let mut client = loop {
            match Client::connect(path) {
                Ok(client) => break client,
                Err(error) if start.elapsed() > Duration::from_secs(60) => {
                    return Err(Failure(error.to_string()));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        client
            .socket()
            .set_read_timeout(Some(PATIENCE))
            .context("cannot set a time limit")?;
        let (schema, _) = client
            .call_json("api.schema", &json!({}), &[])
            .context("api.schema")?;
        let mut results = BTreeMap::new();
        for method in schema["methods"].as_array().into_iter().flatten() {
            let result = standalone(&schema, &method["result"]["schema"]);
            let validator = jsonschema::validator_for(&result).context("a schema")?;
            let name = method["name"].as_str().unwrap_or_default();
            results.insert(name.to_owned(), validator);
        }
        Ok(Self { client, results })
    }

    fn call_with(
        &mut self,
        method: &str,
        params: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Value, Vec<OwnedFd>), ClientError> {
        let (result, fds) = self.client.call_json(method, &params, fds)?;
        if let Some(validator) = self.results.get(method)
            && let Err(error) = validator.validate(&result)
        {
            panic!("{method} gave {result}, which its schema forbids: {error}");
        }
        Ok((result, fds))
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        match self.call_with(method, params, &[]) {
            Ok((result, _)) => Ok(result),
            // Only vm.wait waits for the guest.
            Err(ClientError::Io { source, .. }) if method == "vm.wait" => {
                Err(hang(&source, "vm.wait has no answer"))
            }
            Err(error) => Err(Failure::new(method, error)),
        }
    }

    /// The error kind and message of a call that must be refused.
    fn refused(&mut self, method: &str, params: Value, kind: &str) -> Result<String> {
        match self.call_with(method, params, &[]) {
            Err(ClientError::Refused(error)) => {
                let is = serde_json::to_value(error.data.kind).unwrap_or_default();
                ensure(is == kind, format!("{method}: {error:?}, not {kind}"))?;
                Ok(error.message)
            }
            other => Err(Failure(format!("{method} is not refused: {other:?}"))),
        }
    }

    /// Waits for an event.
    fn event(&mut self, name: EventName) -> Result<fanlight_api::types::Event> {
        loop {
            let event = match self.client.next_event() {
                Err(ClientError::Io { source, .. }) => {
                    return Err(hang(&source, format!("no event {name:?}")));
                }
                event => event.context("an event")?,
            };
            if event.event == name {
                return Ok(event);
            }
        }
    }
}

/// Starts a guest that serves its API.
fn start(guest: GuestBuilder) -> Result<(Guest, Api)> {
    let socket = guest.path("api");
    let guest = guest.option("--api-socket", &socket).start()?;
    let api = Api::connect(&socket)?;
    Ok((guest, api))
}

/// `fanlight serve` without an initial machine.
struct Served {
    guest: Guest,
    socket: PathBuf,
    api: Api,
}

fn serve(assets: &Assets, user: Option<u32>) -> Result<Served> {
    let dir = tempfile::tempdir().context("a directory")?;
    let socket = dir.path().join("api");
    if let Some(user) = user {
        std::os::unix::fs::chown(dir.path(), Some(user), None).context("cannot chown")?;
    }
    let mut command = Command::new(&assets.fanlight);
    command.arg("serve").arg("--api-socket").arg(&socket);
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let guest = Guest::spawn(command, dir)?;
    let api = Api::connect(&socket)?;
    Ok(Served { guest, socket, api })
}

/// A console that a test reads and writes.
struct Console(UnixStream, String);

impl Console {
    fn attach(api: &mut Api) -> Result<Self> {
        let (_, fds) = api
            .call_with("console.attach", json!({}), &[])
            .context("console.attach")?;
        let fd = fds.into_iter().next();
        let stream = UnixStream::from(fd.ok_or_else(|| Failure("no descriptor".into()))?);
        stream
            .set_read_timeout(Some(PATIENCE))
            .context("cannot set a time limit")?;
        Ok(Self(stream, String::new()))
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut bytes = [0; 4096];
        while !self.1.contains(text) {
            let read = self.0.read(&mut bytes).map_err(|error| {
                let said = format!("no {text:?} on the console, which said:\n{}", self.1);
                hang(&error, said)
            })?;
            ensure(read > 0, format!("the console ended:\n{}", self.1))?;
            self.1 += &String::from_utf8_lossy(&bytes[..read]).replace('\r', "");
        }
        Ok(())
    }
}

fn machine(assets: &Assets, dir: &Path, script: &str) -> Result<Value> {
    let initrd = dir.join("initrd");
    fs::write(&initrd, assets.initrd(script)?).context("cannot write the guest's root")?;
    Ok(json!({
        "kernel": assets.stock.image, "initrd": initrd, "memory": {"size": "256M"}, "serial": "null",
        "cmdline": format!("console=ttyS0 panic=-1 loglevel=4{}", nested_host_clock()),
    }))
}
