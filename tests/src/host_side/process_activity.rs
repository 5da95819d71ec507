//! Current activity of a machine and its processes. It distinguishes waiting from spinning, and a guest that hangs from
//! a renderer that still works.

use std::fs;

/// The threads of the Fanlight process `pid` and of its descendants, and KVM's statistics.
pub fn of(pid: u32) -> String {
    let threads = family(pid).into_iter().map(threads).collect::<String>();
    threads + &exits(pid)
}

/// The name of each thread of the process `pid`, with how often it has waited. The host's kernel has some of them: one
/// of KVM, and those of vhost.
pub fn waits(pid: u32) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let waits = tasks.into_iter().flatten().flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some((name.trim().to_owned(), count.trim().parse().ok()?))
    });
    waits.collect()
}

/// The process, followed by all its descendants.
pub fn family(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let parents: Vec<(u32, u32)> = processes
        .filter_map(|process| {
            let child = process.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(process.path().join("stat")).ok()?;
            let parent = fields(&stat).nth(1)?.parse().ok()?;
            Some((child, parent))
        })
        .collect();
    let mut family = vec![pid];
    let mut at = 0;
    while let Some(&parent) = family.get(at) {
        let children = parents.iter().filter(|(_, of)| *of == parent);
        family.extend(children.map(|(child, _)| *child));
        at += 1;
    }
    family
}

/// Fields of `/proc/PID/stat` from the third one, the state, on: the name before may contain any character.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    let rest = stat.rsplit(')').next();
    rest.into_iter().flat_map(str::split_whitespace)
}

/// A line for each thread: name, state, ticks (user, kernel and guest), wait channel, and context switches.
fn threads(pid: u32) -> String {
    let mut text = String::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (stat, status) = (read("stat"), read("status"));
        let times: Vec<_> = fields(&stat)
            .enumerate()
            .filter(|(field, _)| matches!(field, 0 | 11 | 12 | 40))
            .map(|(_, value)| value)
            .collect();
        let switches: Vec<_> = status
            .lines()
            .filter_map(|line| line.split_once("_switches:"))
            .map(|(_, count)| count.trim())
            .collect();
        let (name, waits) = (read("comm"), read("wchan"));
        text += &format!(
            "{pid} {} state and ticks {times:?} in {waits:?}, switches {switches:?}\n",
            name.trim()
        );
    }
    text
}

/// KVM's statistics of the machine (`/sys/kernel/debug/kvm/PID-FD`), where they are readable.
fn exits(pid: u32) -> String {
    let machines = fs::read_dir("/sys/kernel/debug/kvm");
    let mut text = String::new();
    for machine in machines.into_iter().flatten().flatten() {
        let name = machine.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&format!("{pid}-")) {
            continue;
        }
        for file in fs::read_dir(machine.path()).into_iter().flatten().flatten() {
            let value = fs::read_to_string(file.path()).unwrap_or_default();
            if !matches!(value.trim(), "" | "0") {
                text += &format!("{}={} ", file.file_name().display(), value.trim());
            }
        }
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_told_with_what_it_started() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let told = of(std::process::id());
        let family = family(std::process::id());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(family.contains(&child.id()), "{family:?}");
        let line = |pid: u32| {
            told.lines()
                .any(|line| line.starts_with(&format!("{pid} ")))
        };
        assert!(line(std::process::id()) && line(child.id()), "{told}");
    }
}
