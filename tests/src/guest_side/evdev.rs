//! Events of the guest's input devices (Linux `include/uapi/linux/input.h`).

use std::{
    fs::{self, File},
    io::Read,
    thread,
};

use crate::{Context, Failure, Result};

/// `struct input_event`: 16 bytes of time, then type, code and value.
const EVENT: usize = 24;

/// Prints `heard: DEVICE TYPE CODE VALUE` for every event of every Fanlight input device, until the devices go. The
/// name is without the prefix "Fanlight", and without spaces.
pub fn listen() -> Result<String> {
    let mut listeners = Vec::new();
    for entry in fs::read_dir("/sys/class/input").context("cannot list input devices")? {
        let entry = entry.context("cannot list input devices")?;
        let node = entry.file_name().to_string_lossy().into_owned();
        let Ok(name) = fs::read_to_string(entry.path().join("device/name")) else {
            continue;
        };
        let Some(name) = name.trim().strip_prefix("Fanlight ") else {
            continue;
        };
        if !node.starts_with("event") {
            continue;
        }
        let file =
            File::open(format!("/dev/input/{node}")).context(format!("cannot open {node}"))?;
        let name = name.replace(' ', "-");
        listeners.push(thread::spawn(move || repeat(file, &name)));
    }
    let count = listeners.len();
    if count == 0 {
        return Err(Failure("Fanlight has no input device here".into()));
    }
    println!("agent: listens to {count} devices.");
    for listener in listeners {
        let _ = listener.join();
    }
    Ok("heard all".into())
}

fn repeat(mut device: File, name: &str) {
    let mut event = [0; EVENT];
    while device.read_exact(&mut event).is_ok() {
        let [.., t0, t1, c0, c1, v0, v1, v2, v3] = event;
        let (type_, code) = (u16::from_ne_bytes([t0, t1]), u16::from_ne_bytes([c0, c1]));
        let value = i32::from_ne_bytes([v0, v1, v2, v3]);
        println!("heard: {name} {type_} {code} {value}.");
    }
}
