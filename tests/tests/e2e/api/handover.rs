//! Resources that a privileged launcher opens and hands over.

use std::{
    fs::{self, File, OpenOptions},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Command,
    thread,
};

use fanlight_tests::{
    Context, Failure, Result,
    common::echo::{self, Address},
    ensure,
    host_side::{device_nodes, guest::Assets, test_case::TestCase},
};
use serde_json::{Value, json};

use super::{Console, Served, machine, serve};
pub const TESTS: &[TestCase] = &[TestCase::new(
    "api::a_launcher_hands_over_descriptors",
    descriptors,
)];

/// An unprivileged user, who runs Fanlight with descriptors that root opened.
const NOBODY: u32 = 65534;

/// The guest's context id.
const CID: u32 = 66;
/// Bytes sent through sockets between guest and host, and back.
const BYTES: u64 = 1 << 20;

fn descriptors(assets: &Assets) -> Result<()> {
    let dir = tempfile::tempdir().context("a directory")?;
    device_nodes::leave_to_root(&["/dev/kvm", "/dev/net/tun", "/dev/vhost-vsock"])?;
    let Served { guest, mut api, .. } = serve(assets, Some(NOBODY))?;
    let script = format!(
        "ip addr add 10.0.66.2/24 dev eth0; ip link set eth0 up
        echo disk: $(dd if=/dev/vda bs=9 count=1 2>/dev/null)
        guest-agent call vsock:2:6002 {BYTES}
        ping -c 1 -w 20 10.0.66.1 > /dev/null && echo pinged; echo end"
    );
    let mut config = machine(assets, dir.path(), &script)?;
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
    let disk = open(&image)?;
    let tap = tap("tapl")?;
    run("ip addr add 10.0.66.1/24 dev tapl && ip link set tapl up")?;
    let read = |path: &Value| File::open(path.as_str().unwrap_or_default()).context(path);
    let kernel = read(&config["kernel"])?;
    let initrd = read(&config["initrd"])?;
    let kvm = open(Path::new("/dev/kvm"))?;
    let vsock = open(Path::new("/dev/vhost-vsock"))?;
    api.refused("vm.create", config.clone(), "bad_input")
        .map(drop)
        .or_else(|_| {
            // All users may read the files, but this one may not open /dev/kvm.
            api.refused("vm.boot", json!({}), "bad_input").map(drop)
        })?;
    config["kernel"] = json!({"fd": 0});
    config["initrd"] = json!({"fd": 1});
    config["kvm"] = json!({"fd": 2});
    config["disk"] = json!([{"path": {"fd": 3}}]);
    config["net"] = json!([{"tap": {"fd": 4}, "vhost": false}]);
    config["vsock"] = json!({"cid": CID, "device": {"fd": 5}});
    let fds = [
        kernel.as_fd(),
        initrd.as_fd(),
        kvm.as_fd(),
        disk.as_fd(),
        tap.as_fd(),
        vsock.as_fd(),
    ];
    api.call_with("vm.create", config.clone(), &fds[..5])
        .err()
        .filter(|error| error.to_string().contains("brought 5"))
        .ok_or_else(|| Failure("a missing descriptor was accepted".into()))?;
    let mut by_path = config.clone();
    by_path["vsock"] = json!({"cid": CID});
    api.call_with("vm.create", by_path, &fds)
        .err()
        .filter(|error| error.to_string().contains("cannot open /dev/vhost-vsock"))
        .ok_or_else(|| Failure("the user could open /dev/vhost-vsock".into()))?;
    api.call_with("vm.create", config, &fds)
        .context("vm.create")?;
    drop((kernel, initrd, kvm, disk, tap, vsock));
    let server = thread::spawn(|| echo::serve(&Address::Vsock(u32::MAX, 6002)));
    let mut console = Console::attach(&mut api)?;
    api.call("vm.boot", json!({}))?;
    console.wait_for("end")?;
    ensure(console.1.contains("disk: root-only"), &console.1)?;
    ensure(console.1.contains("pinged"), &console.1)?;
    let served = server.join().map_err(|_| Failure("panicked".into()))??;
    ensure(served == BYTES, format!("{served} bytes came"))?;
    let called = format!("agent: called with {BYTES} bytes");
    ensure(console.1.contains(&called), &console.1)?;
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
