//! Machines driven over the control API. Every reply is checked against the server's own schema.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
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
    Context, Failure, Result,
    guest::{Assets, Guest, GuestBuilder, ensure, make_image, value},
};
use jsonschema::Validator;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::Test;

pub const TESTS: &[(&str, Test)] = &[
    ("api::a_whole_life", whole_life),
    ("api::a_paused_clock_stands_still", |assets| {
        pause(assets, "")
    }),
    ("api::a_paused_time_stamp_counter_stands_still", |assets| {
        pause(assets, "clocksource=tsc tsc=reliable")
    }),
    ("api::a_disk_comes_and_goes", hotplug_disk),
    ("api::a_disk_added_stays_over_a_reset", hotplug_reset),
    ("api::an_interface_comes_and_goes", hotplug_net),
    ("api::a_disk_grows", resize),
    ("api::sixty_four_clients", many_clients),
    ("api::a_launcher_hands_over_descriptors", descriptors),
    ("api::the_documented_session_with_socat", |assets| {
        session(assets, "sh", "sh")
    }),
    ("api::the_documented_session_with_python", |assets| {
        session(assets, "python", "python3")
    }),
    ("api::ctl_prints_results_and_errors", ctl),
];

/// A server or a guest that says nothing for so long hangs. Not a measure of speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection whose replies must be what the schema says.
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
            .context("a time limit")?;
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
        let (result, _) = self.call_with(method, params, &[]).context(method)?;
        Ok(result)
    }

    /// The kind of error that a call is refused with, and its message.
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
            let event = self.client.next_event().context("an event")?;
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

/// `fanlight serve` on its own.
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

/// A console that a test reads and types on.
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
            .context("a time limit")?;
        Ok(Self(stream, String::new()))
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let mut bytes = [0; 4096];
        while !self.1.contains(text) {
            let read = self.0.read(&mut bytes).context(format!(
                "waiting for {text:?} on the console, which said:\n{}",
                self.1
            ))?;
            ensure(read > 0, format!("the console ended:\n{}", self.1))?;
            self.1 += &String::from_utf8_lossy(&bytes[..read]).replace('\r', "");
        }
        Ok(())
    }
}

/// Waits for a press of the power button.
const LISTEN: &str = "for event in /dev/input/event*; do
        dd if=$event bs=24 count=1 of=/dev/null 2>/dev/null && touch /tmp/pressed &
    done; sleep 1; echo ready
    while [ ! -e /tmp/pressed ]; do sleep 0.1; done; echo pressed";

fn machine(assets: &Assets, dir: &Path, script: &str) -> Result<Value> {
    let initrd = dir.join("initrd");
    fs::write(&initrd, assets.initrd(script)?).context("cannot write the guest's root")?;
    Ok(json!({
        "kernel": assets.stock.image, "initrd": initrd, "memory": {"size": "256M"}, "serial": "null",
        "cmdline": "console=ttyS0 panic=-1 loglevel=4",
    }))
}

fn whole_life(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("a directory")?;
    let Served {
        mut guest,
        socket,
        mut api,
    } = serve(assets, None)?;
    let config = machine(assets, dir.path(), LISTEN)?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "none",
        "a machine",
    )?;
    let text = api.refused("vm.boot", json!({}), "wrong_state")?;
    ensure(
        text == "vm.boot: there is no machine; it must be created",
        text,
    )?;
    let mut misspelt = config.clone();
    misspelt["mmory"] = json!({"size": "1G"});
    let text = api.refused("vm.create", misspelt, "invalid_params")?;
    ensure(text.contains("did you mean memory?"), text)?;
    api.refused("vm.create", json!({"kernel": "/nowhere"}), "bad_input")?;

    let mut watcher = Api::connect(&socket)?;
    watcher.call("events.subscribe", json!({}))?;
    let mut waiter = Api::connect(&socket)?;
    let created = api.call("vm.create", config.clone())?;
    ensure(created["state"] == "created", created)?;
    api.refused("vm.create", config.clone(), "wrong_state")?;
    let mut console = Console::attach(&mut api)?;
    api.refused("console.attach", json!({}), "busy")?;
    api.call("vm.boot", json!({}))?;
    let waiting = thread::spawn(move || waiter.call("vm.wait", json!({})));
    console.wait_for("ready")?;
    let text = api.refused("vm.resume", json!({}), "wrong_state")?;
    ensure(
        text == "vm.resume: the machine is running; it must be paused",
        text,
    )?;
    api.call("vm.pause", json!({}))?;
    api.refused("vm.pause", json!({}), "wrong_state")?;
    api.refused("vm.power_button", json!({}), "wrong_state")?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "paused",
        "not paused",
    )?;
    api.call("vm.reset", json!({}))?;
    ensure(api.call("vm.info", json!({}))?["resets"] == 1, "no reset")?;
    console.1.clear();
    console.wait_for("ready")?;
    ensure(
        api.call("vm.config", json!({}))?["initrd"] == config["initrd"],
        "another machine",
    )?;
    let stats = api.call("vm.stats", json!({}))?;
    ensure(stats["vcpus"][0]["io_out"].as_u64() > Some(100), &stats)?;
    ensure(
        stats["memory"]["guest_allocated"].as_u64() > Some(20 << 20),
        &stats,
    )?;
    api.call("vm.power_button", json!({}))?;
    let ended = waiting.join().map_err(|_| Failure("panicked".into()))??;
    ensure(
        ended == json!({"ending": "power_off", "exit_status": 0}),
        ended,
    )?;
    let info = api.call("vm.info", json!({}))?;
    ensure(
        info["state"] == "stopped" && info["ending"] == "power_off",
        info,
    )?;
    api.refused("vm.resume", json!({}), "wrong_state")?;
    let mut names = Vec::new();
    let mut last = 0;
    while names.last() != Some(&EventName::Shutdown) {
        let event = watcher.client.next_event().context("an event")?;
        ensure(
            event.sequence == last + 1 && event.lost == 0,
            format!("{event:?}"),
        )?;
        last = event.sequence;
        names.push(event.event);
    }
    let expected = [
        EventName::Booted,
        EventName::Paused,
        EventName::Reset,
        EventName::Shutdown,
    ];
    ensure(names == expected, format!("{names:?}"))?;

    // Another machine, stopped.
    api.call("vm.create", config)?;
    api.call("vm.boot", json!({}))?;
    ensure(
        api.call("vm.stop", json!({}))?["state"] == "stopped",
        "not stopped",
    )?;
    ensure(
        api.call("vm.wait", json!({}))?["exit_status"] == 34,
        "not 34",
    )?;
    guest.signal(Signal::TERM)?;
    guest.expect_exit(0)?;
    ensure(!socket.exists(), "the socket is left over")
}

/// Tells the guest's clock when asked.
const TELL: &str =
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; echo ready
    while read line; do echo at $line: $(cut -d' ' -f1 /proc/uptime); done";

fn pause(assets: &Assets, cmdline: &str) -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(6);
    let guest = assets.guest(TELL).option("--cpus", "2").cmdline(cmdline);
    let (mut guest, mut api) = start(guest)?;
    guest.wait_for("ready")?;
    let begun = Instant::now();
    guest.send("before\n")?;
    guest.wait_for("at before: ")?;
    for round in 1..=2 {
        api.call("vm.pause", json!({}))?;
        guest.send("paused\n")?;
        thread::sleep(PAUSE / 2);
        let seen = guest.transcript().matches("at paused: ").count();
        ensure(seen == round - 1, "it runs while it is paused")?;
        api.call("vm.resume", json!({}))?;
        guest.wait_for_times("at paused: ", round)?;
        guest.send("after\n")?;
        guest.wait_for_times("at after: ", round)?;
    }
    thread::sleep(Duration::from_millis(300));
    let host = begun.elapsed().as_secs_f64();
    let said = guest.transcript();
    let at = |mark: &str| -> Result<f64> {
        let line = said.lines().rfind(|line| line.starts_with(mark));
        let line = line.ok_or_else(|| Failure(said.clone()))?;
        value(line, mark)?.parse().context("a time")
    };
    let guest_time = at("at after:")? - at("at before:")?;
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = fs::read_to_string(source).context("cannot read the host's clock source")?;
    // The guest's clock has run as long as the host's, less the pauses.
    ensure(
        guest_time >= 0.0 && guest_time < host - PAUSE.as_secs_f64() + 0.5,
        format!(
            "the guest's clock went on by {guest_time} s, the host's ({}) by {host} s:\n{said}",
            source.trim()
        ),
    )?;
    ensure(
        api.call("vm.info", json!({}))?["state"] == "running",
        "not running",
    )
}

/// Says what happens to the disk vda, and does what it is told.
const WATCH_DISK: &str = "echo ready; while read line; do case $line in
        come) while [ ! -b /dev/vda ]; do sleep 0.1; done; echo came $(cat /sys/block/vda/serial);;
        write) printf written-by-the-guest | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null; echo wrote;;
        mount) mke2fs -q /dev/vda && mount -t ext4 /dev/vda /mnt && echo x > /mnt/x && sync; echo mounted;;
        gone) while [ -e /sys/block/vda ]; do sleep 0.1; done; echo gone; umount -l /mnt 2>/dev/null;;
    esac; echo done $line; done";

fn hotplug_disk(assets: &Assets) -> Result<()> {
    let builder = assets.guest(WATCH_DISK);
    let image = builder.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let (mut guest, mut api) = start(builder)?;
    guest.wait_for("ready")?;
    let mut watcher = Api::connect(&guest.path("api"))?;
    watcher.call(
        "events.subscribe",
        json!({"events": ["device_added", "device_removed"]}),
    )?;
    let ask = |guest: &mut Guest, what: &str, count| {
        guest.send(&format!("{what}\n"))?;
        guest.wait_for_times(&format!("done {what}"), count)
    };
    ensure(
        api.call("device.list", json!({}))?["free_ports"] == json!([1, 2, 3, 4]),
        "other ports",
    )?;
    let disk = json!({"disk": {"path": image, "serial": "hot", "port": 2}});
    for (round, use_it) in [(1, "write"), (2, "mount")] {
        let added = api.call("device.add", disk.clone())?;
        ensure(added == json!({"id": "disk0", "port": 2}), added)?;
        watcher.event(EventName::DeviceAdded)?;
        api.refused("device.add", disk.clone(), "exists")?;
        ask(&mut guest, "come", round)?;
        ask(&mut guest, use_it, 1)?;
        let list = api.call("device.list", json!({}))?;
        let device = list["devices"]
            .as_array()
            .and_then(|list| list.last())
            .cloned();
        let device = device.unwrap_or_default();
        ensure(device["active"] == true && device["port"] == 2, &device)?;
        ensure(device["bars"][0]["address"].as_u64() > Some(0), &device)?;
        let stats = api.call("vm.stats", json!({}))?;
        let queue = &stats["devices"]
            .as_array()
            .and_then(|all| all.last())
            .cloned();
        let queue = &queue.clone().unwrap_or_default()["queues"][0];
        ensure(queue["bytes_from_guest"].as_u64() > Some(100), queue)?;
        api.call("device.remove", json!({"id": "disk0"}))?;
        api.refused("device.remove", json!({"id": "disk0"}), "busy")?;
        let event = watcher.event(EventName::DeviceRemoved)?;
        ensure(event.device.as_deref() == Some("disk0"), "another device")?;
        ask(&mut guest, "gone", round)?;
        ensure(
            api.call("vm.config", json!({}))?["disk"] == json!([]),
            "still there",
        )?;
        // Nobody holds it any more.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&image)
            .context("the image")?;
        if round == 1 {
            let mut start = [0; 20];
            file.read_exact_at(&mut start, 0).context("the image")?;
            ensure(&start == b"written-by-the-guest", format!("{start:?}"))?;
        }
    }
    api.refused("device.remove", json!({"id": "disk0"}), "not_found")?;
    api.refused("device.remove", json!({"id": "rng"}), "bad_input")?;
    let said = guest.transcript();
    ensure(said.contains("came hot"), &said)
}

fn hotplug_reset(assets: &Assets) -> Result<()> {
    let builder = assets.guest(WATCH_DISK);
    let image = builder.path("disk");
    make_image(assets, &image, "raw", "16M")?;
    let (mut guest, mut api) = start(builder)?;
    guest.wait_for("ready")?;
    api.call("device.add", json!({"disk": {"path": image}}))?;
    api.call("vm.reset", json!({}))?;
    guest.wait_for_times("ready", 2)?;
    guest.send("come\nwrite\n")?;
    guest.wait_for("done write")?;
    let list = api.call("device.list", json!({}))?;
    ensure(list["devices"][0]["id"] == "disk0", &list)?;
    ensure(list["devices"][0]["port"] == 1, &list)
}

fn hotplug_net(assets: &Assets) -> Result<()> {
    let script = "echo ready; while [ ! -e /sys/class/net/eth0 ]; do sleep 0.1; done
        echo mac: $(cat /sys/class/net/eth0/address)
        while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; echo gone";
    let (mut guest, mut api) = start(assets.guest(script))?;
    guest.wait_for("ready")?;
    let net = json!({"net": {"tap": "taph", "mac": "52:54:00:00:00:42", "id": "lan"}});
    api.call("device.add", net)?;
    guest.wait_for("mac: 52:54:00:00:00:42")?;
    api.call("device.remove", json!({"id": "lan"}))?;
    guest.wait_for("gone")?;
    guest.expect_exit(0)
}

fn resize(assets: &Assets) -> Result<()> {
    let script = "echo size: $(cat /sys/block/vda/size)
        while [ $(cat /sys/block/vda/size) = 2048 ]; do sleep 0.1; done
        echo new: $(cat /sys/block/vda/size)
        printf end | dd of=/dev/vda bs=512 seek=8191 conv=fsync,notrunc 2>/dev/null; echo wrote";
    let builder = assets.guest(script);
    let image = builder.path("disk");
    make_image(assets, &image, "qcow2", "1M")?;
    let disk = format!("path={},format=qcow2,id=data", image.display());
    let (mut guest, mut api) = start(builder.option("--disk", disk))?;
    guest.wait_for("size: 2048")?;
    api.refused(
        "disk.resize",
        json!({"id": "data", "size": "512K"}),
        "bad_input",
    )?;
    api.refused(
        "disk.resize",
        json!({"id": "dat", "size": "4M"}),
        "not_found",
    )?;
    let size = api.call("disk.resize", json!({"id": "data", "size": "4M"}))?;
    ensure(size["size"] == 4 << 20, size)?;
    guest.wait_for("new: 8192")?;
    guest.wait_for("wrote")?;
    guest.expect_exit(0)
}

fn many_clients(assets: &Assets) -> Result<()> {
    const CLIENTS: usize = 64;
    const CALLS: usize = 40;
    let script =
        "echo ready; while :; do dd if=/dev/hwrng of=/dev/null bs=1k count=8 2>/dev/null; done";
    let (mut guest, mut api) = start(assets.guest(script))?;
    guest.wait_for("ready")?;
    let socket = guest.path("api");
    // One that says half a line, and one that does not read, for all the while.
    let mut half = UnixStream::connect(&socket).context("cannot connect")?;
    half.write_all(b"{\"jsonrpc\"").context("half a line")?;
    let deaf = UnixStream::connect(&socket).context("cannot connect")?;
    let flood = thread::spawn(move || {
        let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"api.schema\"}\n";
        while (&deaf).write_all(line).is_ok() {}
    });
    let calls: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let socket = socket.clone();
            thread::spawn(move || -> Result<()> {
                let mut client = Client::connect(&socket).context("cannot connect")?;
                for _ in 0..CALLS {
                    for method in ["vm.info", "vm.stats"] {
                        client.call_json(method, &json!({}), &[]).context(method)?;
                    }
                }
                Ok(())
            })
        })
        .collect();
    for call in calls {
        call.join().map_err(|_| Failure("panicked".into()))??;
    }
    flood.join().map_err(|_| Failure("panicked".into()))?;
    guest.wait_for("does not read its answers: disconnected")?;
    drop(half);
    ensure(
        api.call("vm.info", json!({}))?["state"] == "running",
        "not running",
    )
}

/// A user without any rights, who runs Fanlight on what root opened.
const NOBODY: u32 = 65534;

fn descriptors(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("a directory")?;
    let Served { guest, mut api, .. } = serve(assets, Some(NOBODY))?;
    let script = "ip addr add 10.0.66.2/24 dev eth0; ip link set eth0 up
        echo disk: $(dd if=/dev/vda bs=9 count=1 2>/dev/null)
        ping -c 1 -w 20 10.0.66.1 > /dev/null && echo pinged; echo end";
    let mut config = machine(assets, dir.path(), script)?;
    let image = dir.path().join("disk");
    fs::write(&image, [&b"root-only"[..], &[0; 1015]].concat()).context("an image")?;
    let open = |path: &Path| {
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.context(path.display())
    };
    let run = |line: &str| -> Result<()> {
        let status = Command::new("sh")
            .args(["-c", line])
            .status()
            .context(line)?;
        ensure(status.success(), line)
    };
    run("chmod 600 /dev/kvm /dev/net/tun")?;
    let disk = open(&image)?;
    let tap = tap("tapl")?;
    run("ip addr add 10.0.66.1/24 dev tapl && ip link set tapl up")?;
    let read = |path: &Value| File::open(path.as_str().unwrap_or_default()).context(path);
    let kernel = read(&config["kernel"])?;
    let initrd = read(&config["initrd"])?;
    let kvm = open(Path::new("/dev/kvm"))?;
    api.refused("vm.create", config.clone(), "bad_input")
        .map(drop)
        .or_else(|_| {
            // The files may be readable by all; the hypervisor is not.
            api.refused("vm.boot", json!({}), "bad_input").map(drop)
        })?;
    config["kernel"] = json!({"fd": 0});
    config["initrd"] = json!({"fd": 1});
    config["kvm"] = json!({"fd": 2});
    config["disk"] = json!([{"path": {"fd": 3}}]);
    config["net"] = json!([{"tap": {"fd": 4}, "vhost": false}]);
    let fds = [
        kernel.as_fd(),
        initrd.as_fd(),
        kvm.as_fd(),
        disk.as_fd(),
        tap.as_fd(),
    ];
    api.call_with("vm.create", config.clone(), &fds[..4])
        .err()
        .filter(|error| error.to_string().contains("brought 4"))
        .ok_or_else(|| Failure("a descriptor that is missing is not missed".into()))?;
    api.call_with("vm.create", config, &fds)
        .context("vm.create")?;
    drop((kernel, initrd, kvm, disk, tap));
    let mut console = Console::attach(&mut api)?;
    api.call("vm.boot", json!({}))?;
    console.wait_for("end")?;
    ensure(console.1.contains("disk: root-only"), &console.1)?;
    ensure(console.1.contains("pinged"), &console.1)?;
    drop(guest);
    Ok(())
}

/// Makes a tap and attaches to it, as a privileged launcher does.
fn tap(name: &str) -> Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid `ifreq`: it holds integers and arrays of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure(result == 0, "TUNSETIFF")?;
    Ok(file.into())
}

fn ctl(assets: &Assets) -> Result<()> {
    let (mut guest, _api) = start(assets.guest("echo ready; sleep 1000"))?;
    guest.wait_for("ready")?;
    let socket = guest.path("api");
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let output = Command::new(&assets.fanlight)
            .arg("ctl")
            .args(arguments)
            .output()
            .context("cannot run ctl")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        ))
    };
    let socket = socket.to_string_lossy();
    let (code, out, err) = run(&[&socket, "vm.info"])?;
    let info: Value = serde_json::from_str(&out).context(format!("{out}{err}"))?;
    ensure(code == Some(0) && info["state"] == "running", &out)?;
    let (code, out, err) = run(&[&socket, "disk.resize", "id=disk7", "size=1M"])?;
    ensure(
        code == Some(1) && out.is_empty() && err.contains("no disk \"disk7\""),
        &err,
    )?;
    let (code, _, err) = run(&[&socket, "vm.resme"])?;
    ensure(
        code == Some(1) && err.contains("did you mean vm.resume?"),
        &err,
    )?;
    let (code, out, _) = run(&[&socket, "--help"])?;
    ensure(
        code == Some(0) && out.contains("device.remove") && out.contains("Asks the guest"),
        &out,
    )?;
    let (code, out, _) = run(&[&socket, "device.add", "--help"])?;
    ensure(
        code == Some(0) && out.contains("disk") && out.contains("first free"),
        &out,
    )?;
    let (code, _, err) = run(&["/nowhere/api", "vm.info"])?;
    ensure(
        code == Some(1) && err.contains("/nowhere/api: cannot connect"),
        &err,
    )?;
    let (code, ..) = run(&[&socket, "vm.stop"])?;
    ensure(code == Some(0), "vm.stop")?;
    guest.expect_exit(34)
}

/// The page for those who speak the protocol themselves.
const PROTOCOL: &str = include_str!("../../../api/PROTOCOL.md");

/// Runs the page's block of code in `language` with `program`.
fn session(assets: &Assets, language: &str, program: &str) -> Result<()> {
    let (_, code) = PROTOCOL
        .split_once(&format!("```{language}\n"))
        .ok_or_else(|| Failure(format!("no block of {language}")))?;
    let (code, _) = code.split_once("```").unwrap_or((code, ""));
    let dir = tempfile::tempdir().context("a directory")?;
    assets.clients.scripts(dir.path())?;
    let script = dir.path().join("session");
    fs::write(&script, code).context("cannot write the session")?;
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, assets.initrd("")?).context("cannot write the guest's root")?;
    let Served {
        mut guest, socket, ..
    } = serve(assets, None)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", dir.path().display());
    let output = Command::new("sh")
        .args(["-c", &format!("exec {program} {}", script.display())])
        .env("PATH", &path)
        .env("S", &socket)
        .env("KERNEL", &assets.stock.image)
        .env("INITRD", &initrd)
        .output();
    let output = output.context(program)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), format!("{said}{errors}"))?;
    if language == "sh" {
        let answers: Vec<Value> = said
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context(&said)?;
        let result = |id: u64| {
            let answer = answers.iter().find(|answer| answer["id"] == id);
            answer
                .map(|answer| answer["result"].clone())
                .unwrap_or_default()
        };
        ensure(result(1)["api"] == "1.0", &said)?;
        ensure(result(3)["state"] == "running", &said)?;
        ensure(result(4)["ending"] == "power_off", &said)?;
    } else {
        let expected = "version 1.0\nevent booted\nevent shutdown\nending power_off\n";
        ensure(said == expected, format!("{said}{errors}"))?;
    }
    guest.signal(Signal::TERM)?;
    guest.expect_exit(0)
}
