//! Clients that mean harm, or do it.

use std::sync::Condvar;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use crate::{
    server::{clients::Clients, listener::Peer},
    socket::{MAX_FDS, send},
};

/// Notes calls. `vm.boot` keeps the server's thread until the gate is open.
#[derive(Default)]
struct Gate {
    calls: Mutex<Vec<&'static str>>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Handler for Gate {
    fn status(&self, call: StatusCall, _reply: Reply) {
        self.calls.lock().unwrap().push(call.name());
    }

    fn display(&self, call: DisplayCall, _reply: Reply) {
        self.calls.lock().unwrap().push(call.name());
    }

    fn machine(&self, call: MachineCall, _: Descriptors, _reply: Reply) {
        self.calls.lock().unwrap().push(call.name());
        if let MachineCall::VmBoot(_) = call {
            let open = self.open.lock().unwrap();
            drop(self.opened.wait_while(open, |open| !*open).unwrap());
        }
    }
}

impl Gate {
    fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().unwrap().clone()
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

fn notification(method: &str) -> String {
    format!("{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\"}}\n")
}

/// A server with its thread blocked at the gate.
fn gated() -> (Server, Arc<Gate>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        path: dir.path().join("api"),
        allow_uids: vec![],
    };
    let gate = Arc::new(Gate::default());
    let server = Server::start(&settings, Events::default(), gate.clone()).unwrap();
    let mut keeper = UnixStream::connect(server.path()).unwrap();
    keeper
        .write_all(notification("vm.boot").as_bytes())
        .unwrap();
    wait_until("the thread is kept", || gate.calls() == ["vm.boot"]);
    (server, gate, dir)
}

#[test]
fn what_was_sent_before_the_end_is_done() {
    let (server, gate, _dir) = gated();
    const COUNT: usize = 300;
    let mut client = UnixStream::connect(server.path()).unwrap();
    let text = notification("vm.power_button").repeat(COUNT);
    client.write_all(text.as_bytes()).unwrap();
    drop(client);
    gate.open();
    wait_until("all is done", || gate.calls().len() == 1 + COUNT);
}

#[test]
fn a_flood_leaves_the_others_their_turn() {
    let (server, gate, _dir) = gated();
    const COUNT: usize = 1000;
    let connect = || UnixStream::connect(server.path()).unwrap();
    let (mut flood, mut other) = (connect(), connect());
    let text = notification("vm.power_button").repeat(COUNT);
    flood.write_all(text.as_bytes()).unwrap();
    other.write_all(notification("vm.stop").as_bytes()).unwrap();
    gate.open();
    wait_until("all is done", || gate.calls().len() == 2 + COUNT);
    let before = gate.calls().iter().position(|&name| name == "vm.stop");
    assert!(before.unwrap() < COUNT / 2, "{before:?}");
}

#[test]
fn errors_do_not_repeat_a_megabyte() {
    let setup = setup();
    let long = "\u{7f}".repeat(900_000);
    for text in [
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{long}"}}"#),
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"vm.info","params":{{"{long}":1}}}}"#),
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"vm.info","{long}":1}}"#),
    ] {
        let answers = setup.say(format!("{text}\n").as_bytes());
        assert!(answers[0]["error"]["code"].is_number());
        assert!(answers[0].to_string().len() < 64 << 10);
    }
}

/// The server's messages to a client, until it closes.
fn told(mut client: &UnixStream) -> String {
    let mut text = String::new();
    client
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let _ = client.read_to_string(&mut text);
    text
}

#[test]
fn a_client_that_is_disconnected_is_told_why() {
    let setup = setup();
    let long = json!({"id": "x".repeat(2 * MAX_LINE)});
    let error = setup.client().call_json("device.remove", &long, &[]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("sent a line of more than 1 MiB"), "{error}");
}

#[test]
fn descriptors_that_nobody_names_are_bounded_over_all_clients() {
    let setup = setup();
    let file = tempfile::tempfile().unwrap();
    let fds = vec![file.as_fd(); MAX_FDS];
    let most = MAX_HELD_FDS / MAX_FDS;
    let clients: Vec<_> = (0..2 * most).map(|_| setup.stream()).collect();
    for client in &clients {
        send(client, b"{", &fds).unwrap();
    }
    setup.alive();
    let told: Vec<_> = clients.iter().map(told).collect();
    let count = |why| told.iter().filter(|text| text.contains(why)).count();
    assert_eq!(count("all clients together"), most, "{told:?}");
    // The others were given up for their half lines.
    assert_eq!(count("without the end of their line"), most, "{told:?}");
    let client = setup.stream();
    let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"vm.power_button\"}\n";
    send(&client, line, &fds).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(self::told(&client).contains("result"));
}

#[test]
fn one_that_sends_its_own_end_is_seen_to_go() {
    let setup = setup();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = setup.stream();
    send(&client, b"{", &[client.as_fd(), theirs.as_fd()]).unwrap();
    drop((client, theirs));
    // The server has the only other end, until it gives up the half line.
    assert_eq!(told(&ours), "");
    ours.set_nonblocking(true).unwrap();
    assert_eq!((&ours).read(&mut [0; 1]).unwrap(), 0);
    setup.alive();
}

#[test]
fn other_users_leave_room_for_the_owner() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        path: dir.path().join("api"),
        allow_uids: vec![1],
    };
    let listener = Listener::bind(&settings).unwrap();
    let mode = std::fs::metadata(&settings.path).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o666);
    let wake = Arc::new(Wake::new().unwrap());
    let handler = Arc::new(Example::default());
    let mut clients = Clients::new(listener, wake, Events::default(), handler).unwrap();
    let mut admit = |own| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let name = String::from("a client");
        clients.admit(
            ours,
            Peer {
                name,
                allowed: true,
                own,
            },
        );
        theirs.set_nonblocking(true).unwrap();
        let mut text = [0; 1];
        let admitted = (&theirs).read(&mut text).is_err();
        (admitted, theirs)
    };
    let others: Vec<_> = (0..MAX_OTHERS).map(|_| admit(false)).collect();
    assert!(others.iter().all(|(admitted, _)| *admitted));
    assert!(!admit(false).0);
    let own: Vec<_> = (MAX_OTHERS..MAX_CLIENTS).map(|_| admit(true)).collect();
    assert!(own.iter().all(|(admitted, _)| *admitted));
    assert!(!admit(true).0, "the owner has a limit too");
}

#[test]
fn a_process_without_descriptors_refuses_and_goes_on() {
    if !is_alone("hostile::a_process_without_descriptors_refuses_and_goes_on") {
        return;
    }
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let setup = setup();
    let address = SocketAddrUnix::new(setup.path()).unwrap();
    // Every number below the limit is taken, so that it is the server that finds none.
    let clients: Vec<_> = (0..4)
        .map(|_| socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap())
        .map(UnixStream::from)
        .collect();
    let before = getrlimit(Resource::Nofile);
    let most = 64;
    let limit = |current| Rlimit {
        current: Some(current),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, limit(most)).unwrap();
    let mut fill = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        fill.push(file);
    }
    for client in &clients {
        connect(client, &address).unwrap();
        assert!(told(client).contains("out of descriptors"));
    }
    drop((fill, clients));
    setrlimit(Resource::Nofile, before).unwrap();
    setup.alive();
}
