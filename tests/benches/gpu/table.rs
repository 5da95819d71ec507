//! What the benchmark prints.

use fanlight_tests::host_side::bench::median;

use super::{BLOBS, DEFAULT_LIMIT, Figures, LIMITED, PIECES, SIZES, WATCHED};

/// The median of a figure, if every run has it.
fn figure(runs: &[Figures], name: &str) -> Option<f64> {
    let all = runs.iter().all(|run| run.contains_key(name));
    all.then(|| median(runs, |run| run.get(name).copied().unwrap_or(f64::NAN)))
}

/// Prints all of it.
pub fn print(figures: &[Vec<Figures>; 2], limited: &[Figures], merged: &[bool]) {
    let [ours, qemus] = figures;
    let row = |what: &str, unit: &str, ours: Option<f64>, qemus: Option<f64>| {
        let text = |value: Option<f64>| match value {
            Some(value) if unit == "s" => format!("{value:.2} {unit}"),
            Some(value) => format!("{value:.0} {unit}").trim_end().to_owned(),
            None => "refused".into(),
        };
        let ratio = match (ours, qemus) {
            (Some(ours), Some(qemus)) => format!("{:.2}", ours / qemus),
            _ => "–".into(),
        };
        println!("| {what} | {} | {} | {ratio} |", text(ours), text(qemus));
    };
    println!("| | Fanlight | QEMU | of QEMU's |");
    println!("|---|---|---|---|");
    let both = |name: &str| (figure(ours, name), figure(qemus, name));
    let (our, qemu) = both("first frame");
    row("exec to the first frame on the host", "s", our, qemu);
    for (size, ..) in SIZES {
        let qemu = figure(qemus, &format!("{size}: flushes"));
        let watched = WATCHED.map(|(how, _)| how);
        for how in [""].into_iter().chain(watched) {
            let our = figure(ours, &format!("{size}{how}: flushes"));
            row(&format!("flushes a second, {size}{how}"), "", our, qemu);
        }
    }
    for (name, _) in BLOBS {
        let pieces = figure(ours, &format!("{name}: pieces")).unwrap_or(f64::NAN);
        let theirs = figure(qemus, &format!("{name}: pieces")).unwrap_or(f64::NAN);
        let (our, qemu) = both(&format!("{name}: descriptor"));
        let what = format!("4K blob to a descriptor, {name} ({pieces:.0}, {theirs:.0})");
        row(&what, "µs", our, qemu);
        let our = figure(ours, &format!("{name}: passed on"));
        row(&format!("{what}, in another process"), "µs", our, qemu);
    }
    for (name, _) in LIMITED {
        let of =
            |run: usize, what: &str| limited.get(run)?.get(&format!("{name}: {what}")).copied();
        let pieces = [0, 1].map(|run| of(run, "pieces").unwrap_or(f64::NAN));
        let what = format!(
            "with list_limit={DEFAULT_LIMIT}: {name} ({:.0}, {:.0})",
            pieces[0], pieces[1]
        );
        row(&what, "µs", of(0, "descriptor"), of(1, "descriptor"));
    }
    let made = |run: usize| match merged.get(run) {
        Some(true) => "made",
        _ => "refused",
    };
    println!(
        "| with list_limit={DEFAULT_LIMIT}: {PIECES} neighbours, each an entry | {} | {} | – |",
        made(0),
        made(1)
    );
    let (our, qemu) = both("transfer");
    let mega = |value: Option<f64>| value.map(|value| value / 1e6);
    row(
        "TRANSFER_TO_HOST_2D a second, 1080p",
        "MB",
        mega(our),
        mega(qemu),
    );
    let copy = figure(ours, "memcpy").unwrap_or(f64::NAN);
    println!();
    println!(
        "memcpy: {:.0} MB a second; a transfer is {:.2} of it.",
        copy / 1e6,
        our.unwrap_or(f64::NAN) / copy
    );
    for (size, ..) in SIZES {
        let of = |what: &str| figure(ours, &format!("{size}, watched: {what}")).unwrap_or(f64::NAN);
        println!(
            "A {size} frame, watched: {:.0} bytes copied, {:.1} page faults, {:.0} µs of processor time with the \
             guest's own.",
            of("copied"),
            of("faults"),
            of("processor")
        );
    }
}
