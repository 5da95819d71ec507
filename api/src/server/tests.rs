//! The server against clients that follow the rules, and ones that do not.

use std::{
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    sync::Mutex,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use serde_json::{Value, json};

mod hostile;

use super::*;
use crate::{
    client::{Client, ClientError},
    error::ErrorKind,
    methods::{self, METHODS},
    types::{EventName, NoParams, Subscribe},
};

/// Answers `vm.power_button` at once and `console.attach` with a descriptor. Keeps the replies of `vm.wait` for the
/// test, and drops all others.
#[derive(Default)]
struct Example {
    waiting: Mutex<Vec<Reply>>,
    fds: Mutex<Vec<usize>>,
}

impl Handler for Example {
    fn status(&self, _: StatusCall, _: Reply) {}

    fn display(&self, _: DisplayCall, _: Reply) {}

    fn machine(&self, call: MachineCall, descriptors: Descriptors, reply: Reply) {
        match call {
            MachineCall::VmPowerButton(_) => {
                reply.send::<methods::VmPowerButton>(Ok(Default::default()));
            }
            MachineCall::ConsoleAttach(_) => {
                let file = std::fs::File::open("/dev/null").unwrap();
                reply.send_with::<methods::ConsoleAttach>(
                    Ok(crate::types::Attached { fd: 0 }),
                    vec![file.into()],
                );
            }
            MachineCall::VmWait(_) => self.waiting.lock().unwrap().push(reply),
            MachineCall::DeviceAdd(add) => {
                let disk = add.disk.map(|disk| descriptors.take_of(&disk.path));
                match disk {
                    Some(Err(error)) => reply.refuse(error),
                    _ => self.fds.lock().unwrap().push(1),
                }
            }
            _ => {}
        }
    }
}

struct Setup {
    server: Option<Server>,
    handler: Arc<Example>,
    events: Events,
    dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let (handler, events) = (Arc::new(Example::default()), Events::default());
    let settings = Settings {
        path: dir.path().join("api"),
        allow_uids: vec![],
    };
    let server = Server::start(&settings, events.clone(), handler.clone()).unwrap();
    Setup {
        server: Some(server),
        handler,
        events,
        dir,
    }
}

impl Setup {
    fn path(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap()
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }

    /// The server's messages after `bytes`, until it closes.
    fn say(&self, bytes: &[u8]) -> Vec<Value> {
        let mut stream = self.stream();
        // The server may close before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn alive(&self) {
        let version = self
            .client()
            .call::<methods::ApiVersion>(&NoParams {})
            .unwrap();
        assert_eq!(version.api, crate::API_VERSION);
    }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_socket_is_private_and_goes_with_the_server() {
    let mut setup = setup();
    let mode = std::fs::metadata(setup.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    setup.alive();
    setup.server = None;
    assert!(!setup.path().exists());
}

#[test]
fn a_live_socket_is_refused_a_stale_one_replaced_a_file_kept() {
    let setup = setup();
    let start = |path: PathBuf| {
        let settings = Settings {
            path,
            allow_uids: vec![],
        };
        Server::start(&settings, Events::default(), Arc::new(Example::default()))
    };
    assert!(matches!(start(setup.path()), Err(ServerError::InUse(_))));
    setup.alive();
    let stale = setup.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(start(stale).is_ok());
    let file = setup.dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    assert!(matches!(
        start(file.clone()),
        Err(ServerError::NotASocket(_))
    ));
    assert_eq!(std::fs::read(file).unwrap(), b"mine");
}

#[test]
fn requests_are_answered_in_batches_and_notifications_not_at_all() {
    let setup = setup();
    let answers = setup.say(
        b"{\"jsonrpc\":\"2.0\",\"method\":\"vm.power_button\"}\n\n\
          [{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.power_button\"},\
           {\"jsonrpc\":\"2.0\",\"method\":\"vm.power_button\"},1,\
           {\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"console.attach\"}]\n\
          {\"jsonrpc\":\"2.0\",\"id\":\"x\",\"method\":\"vm.pwr_button\"}\n",
    );
    assert_eq!(answers.len(), 2, "{answers:?}");
    let batch = answers[0].as_array().unwrap();
    assert_eq!(batch.len(), 3);
    assert_eq!(batch[0]["result"], json!({}));
    assert_eq!(batch[1]["error"]["code"], -32600);
    assert_eq!(batch[2]["error"]["data"]["kind"], "bad_descriptor");
    assert_eq!(answers[1]["error"]["data"]["suggestion"], "vm.power_button");
}

#[test]
fn what_the_handler_forgets_is_answered_with_an_error() {
    let setup = setup();
    let error = setup
        .client()
        .call::<methods::VmBoot>(&NoParams {})
        .unwrap_err();
    assert!(
        matches!(error, ClientError::Refused(error) if error.data.kind == ErrorKind::WrongState)
    );
}

#[test]
fn descriptors_pass_both_ways() {
    let setup = setup();
    let mut client = setup.client();
    let (_, fds) = client
        .call_with::<methods::ConsoleAttach>(&Default::default(), &[])
        .unwrap();
    assert_eq!(fds.len(), 1);
    let file = tempfile::tempfile().unwrap();
    let add = json!({"disk": {"path": {"fd": 1}}});
    let error = client
        .call_json("device.add", &add, &[file.as_fd()])
        .unwrap_err();
    assert!(error.to_string().contains("brought 1"), "{error}");
}

#[test]
fn a_long_line_ends_the_connection_and_only_that() {
    let setup = setup();
    let answers = setup.say(&vec![b'x'; MAX_LINE + 2]);
    assert!(
        answers.is_empty() || answers[0]["error"]["message"].to_string().contains("1 MiB"),
        "{answers:?}"
    );
    // As long as allowed: not JSON, but answered.
    let mut line = vec![b' '; MAX_LINE - 2];
    line.extend(b"x\n");
    assert_eq!(setup.say(&line)[0]["error"]["code"], -32700);
    setup.alive();
}

#[test]
fn a_client_that_does_not_read_is_disconnected() {
    let setup = setup();
    let mut stream = setup.stream();
    let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"api.schema\"}\n";
    stream
        .set_write_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut refused = false;
    for _ in 0..100_000 {
        if stream.write_all(line).is_err() {
            refused = true;
            break;
        }
    }
    assert!(refused);
    setup.alive();
}

#[test]
fn waiting_requests_are_bounded_and_answered_later() {
    let setup = setup();
    let mut stream = setup.stream();
    let count = MAX_PENDING + 50;
    for id in 0..count {
        writeln!(
            stream,
            r#"{{"jsonrpc":"2.0","id":{id},"method":"vm.wait"}}"#
        )
        .unwrap();
    }
    let waiting = || setup.handler.waiting.lock().unwrap().len();
    wait_until("all room is taken", || waiting() == MAX_PENDING);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(waiting(), MAX_PENDING);
    setup.handler.waiting.lock().unwrap().clear();
    wait_until("the rest follows", || waiting() == 50);
    setup.handler.waiting.lock().unwrap().clear();
    let mut reader = crate::socket::LineReader::default();
    let mut answers = 0;
    while answers < count {
        while reader.next_line().is_some() {
            answers += 1;
        }
        if answers < count {
            reader.receive(&stream).unwrap();
        }
    }
}

#[test]
fn events_are_numbered_and_losses_told() {
    let setup = setup();
    setup.events.publish(EventName::Booted);
    let mut client = setup.client();
    let all = Subscribe::default();
    assert_eq!(
        client
            .call::<methods::EventsSubscribe>(&all)
            .unwrap()
            .sequence,
        1
    );
    let mut picky = setup.client();
    let only = Subscribe {
        events: Some(vec![EventName::Reset]),
    };
    picky.call::<methods::EventsSubscribe>(&only).unwrap();
    setup.events.publish_device(EventName::DeviceAdded, "disk0");
    setup.events.publish(EventName::Reset);
    let event = client.next_event().unwrap();
    assert_eq!((event.sequence, event.lost), (2, 0));
    assert_eq!(event.device.as_deref(), Some("disk0"));
    assert_eq!(picky.next_event().unwrap().sequence, 3);
    // More than the queue and the socket hold.
    let many = 20_000;
    for _ in 0..many {
        setup.events.publish(EventName::Paused);
    }
    let mut seen = 1;
    let mut lost = 0;
    let mut last = 2;
    while seen + lost <= many {
        let event = client.next_event().unwrap();
        assert_eq!(event.sequence, last + 1 + event.lost);
        last = event.sequence;
        lost += event.lost;
        seen += 1;
        if last == many + 3 {
            break;
        }
        if seen % 1000 == 0 {
            setup.events.publish(EventName::Reset);
        }
    }
    assert!(lost > 0);
}

#[test]
fn half_a_line_and_death_cost_nobody() {
    let setup = setup();
    let mut half = setup.stream();
    half.write_all(b"{\"jsonrpc\":").unwrap();
    for _ in 0..100 {
        let mut dead = setup.stream();
        dead.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.wait\"}\n{")
            .unwrap();
    }
    setup.alive();
    half.write_all(b"\"2.0\",\"id\":1,\"method\":\"api.version\"}\n")
        .unwrap();
    assert!(half.read(&mut [0; 1]).unwrap() == 1);
}

#[test]
fn the_end_of_the_server_answers_what_waits() {
    let mut setup = setup();
    let mut stream = setup.stream();
    stream
        .write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.wait\"}\n")
        .unwrap();
    wait_until("the request arrives", || {
        !setup.handler.waiting.lock().unwrap().is_empty()
    });
    setup.handler.waiting.lock().unwrap().clear();
    setup.server = None;
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("wrong_state"), "{text}");
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// JSON that is likely to be nearly right.
fn parameters() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9:]{0,8}".prop_map(Value::from),
        (0u32..4).prop_map(|fd| json!({"fd": fd})),
    ];
    let key = prop_oneof![
        Just("disk"),
        Just("net"),
        Just("path"),
        Just("tap"),
        Just("id"),
        Just("size"),
        Just("console"),
        Just("level"),
        Just("events"),
        Just("fd"),
        Just("cpus"),
        Just("x"),
    ];
    leaf.prop_recursive(4, 32, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone().prop_map(str::to_owned), inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn request() -> impl Strategy<Value = Value> {
    let method = (0..METHODS.len()).prop_map(|at| METHODS[at].name.to_owned());
    let method = prop_oneof![9 => method, 1 => "[a-z.]{0,12}"];
    (method, parameters(), any::<Option<u8>>()).prop_map(|(method, params, id)| {
        let mut request = json!({"jsonrpc": "2.0", "method": method, "params": params});
        if let Some(id) = id {
            request["id"] = id.into();
        }
        request
    })
}

/// Whether the test may count or limit descriptors. `cargo test` runs other tests as threads of the same process. So
/// this runs the test again in its own process, and returns false.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "FANLIGHT_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("server::tests::{test}")])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
    false
}

#[test]
fn random_input_neither_ends_the_server_nor_leaks() {
    if !is_alone("random_input_neither_ends_the_server_nor_leaks") {
        return;
    }
    let setup = setup();
    setup.alive();
    let mut runner = proptest::test_runner::TestRunner::default();
    // The connection of `alive` is closed on both ends when the server has seen so.
    std::thread::sleep(Duration::from_millis(200));
    let before = open_descriptors();
    let settled = || {
        // The server reads earlier input before it answers this.
        setup.alive();
        setup.handler.waiting.lock().unwrap().clear();
        wait_until("descriptors are closed", || open_descriptors() <= before);
    };
    let bytes = prop::collection::vec(any::<u8>(), 0..300);
    runner
        .run(&(bytes, 0usize..3), |(bytes, fds)| {
            let stream = setup.stream();
            let file = std::fs::File::open("/dev/null").unwrap();
            let fds = vec![file.as_fd(); fds];
            if !bytes.is_empty() {
                let _ = crate::socket::send(&stream, &bytes, &fds);
            }
            drop((stream, file));
            settled();
            Ok(())
        })
        .unwrap();
    runner
        .run(
            &(
                prop::collection::vec(request(), 1..6),
                0usize..4,
                any::<bool>(),
            ),
            |(requests, fds, batch)| {
                let stream = setup.stream();
                let file = std::fs::File::open("/dev/null").unwrap();
                let fds = vec![file.as_fd(); fds];
                if batch {
                    let _ = crate::socket::send(&stream, &crate::message::line(&requests), &fds);
                } else {
                    for request in &requests {
                        let _ = crate::socket::send(&stream, &crate::message::line(request), &fds);
                    }
                }
                drop((stream, file));
                settled();
                Ok(())
            },
        )
        .unwrap();
    setup.alive();
}
