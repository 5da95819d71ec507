//! What the benchmark prints.

use fanlight_tests::host_side::bench::{Cell, Rounds, Table};

use super::{BLOBS, CONTROL, DEFAULT_LIMIT, Figures, LIMITED, NAMES, PIECES, SIZES, WATCHED};

/// What has a figure in the rounds that came to their end; `missing` if none has it.
fn cell(rounds: &Rounds<Figures>, name: &str, missing: Cell) -> Cell {
    match Cell::of(rounds, |figures| figures.get(name).copied()) {
        Cell::None => missing,
        cell => cell,
    }
}

/// The table of all figures.
pub fn of(all: &[Rounds<Figures>], limited: &[Rounds<Figures>], merged: &[Rounds<bool>]) -> Table {
    let mut table = Table::new(&NAMES, [0, 1]);
    let both = |rounds: &[Rounds<Figures>], name: &str, missing: Cell| -> Vec<Cell> {
        let cells = rounds.iter().map(|of| cell(of, name, missing.clone()));
        cells.collect()
    };
    table.row(
        "exec to a PNG of the first frame",
        "s",
        2,
        both(all, "first frame", Cell::None),
    );
    table.row(
        "that frame's dma-buf, mapped and read by another process",
        "µs",
        0,
        both(all, "first frame exported", Cell::None),
    );
    for (size, ..) in SIZES {
        let watched = WATCHED.map(|(how, _)| how);
        for how in [""].into_iter().chain(watched) {
            let ours = cell(&all[0], &format!("{size}{how}: flushes"), Cell::None);
            // Nobody can watch QEMU's frames: what it does unwatched stands beside.
            let qemus = cell(&all[1], &format!("{size}: flushes"), Cell::None);
            table.row(
                &format!("flushes a second, {size}{how}"),
                "",
                0,
                vec![ours, qemus],
            );
        }
    }
    let copies = SIZES.map(|(size, ..)| format!("{size}, watched"));
    for how in copies.iter().map(String::as_str).chain([CONTROL]) {
        for (what, unit, decimals) in [
            ("copied", "bytes", 0),
            ("faults", "", 1),
            ("processor", "µs", 0),
        ] {
            let name = match what {
                "copied" => "copied for",
                "faults" => "page faults of",
                _ => "processor time of",
            };
            table.row(
                &format!("{name} a frame, {how}"),
                unit,
                decimals,
                both(all, &format!("{how}: {what}"), Cell::None),
            );
        }
    }
    for (name, _) in BLOBS {
        blob_rows(&mut table, name, all, "");
    }
    let limit = format!("with `list_limit={DEFAULT_LIMIT}`: ");
    for (name, _) in LIMITED {
        blob_rows(&mut table, name, limited, &limit);
    }
    table.row(
        &format!("{limit}{PIECES} neighbours, each an entry: dma-bufs made"),
        "",
        0,
        merged
            .iter()
            .map(
                |rounds| match Cell::of(rounds, |made| made.then_some(1.0)) {
                    Cell::None => Cell::Refused,
                    cell => cell,
                },
            )
            .collect(),
    );
    let mega = |rounds: &Rounds<Figures>, name: &str| {
        Cell::of(rounds, |figures| Some(figures.get(name)? / 1e6))
    };
    table.row(
        "TRANSFER_TO_HOST_2D, 1080p, a second",
        "MB",
        0,
        all.iter().map(|rounds| mega(rounds, "transfer")).collect(),
    );
    table.row(
        "memcpy of the same rows in the benchmark, a second",
        "MB",
        0,
        vec![mega(&all[0], "memcpy"), Cell::None],
    );
    table
}

/// A 4K blob, from the guest's command on.
fn blob_rows(table: &mut Table, name: &str, rounds: &[Rounds<Figures>], limit: &str) {
    let pieces = rounds.iter().map(|rounds| {
        let pieces = cell(rounds, &format!("{name}: pieces"), Cell::None).median();
        pieces.map_or("–".into(), |pieces| format!("{pieces:.0}"))
    });
    let pieces = pieces.collect::<Vec<_>>().join(" and ");
    let made = rounds
        .iter()
        .map(|of| cell(of, &format!("{name}: made"), Cell::Refused));
    table.row(
        &format!("{limit}4K blob, {name} ({pieces} entries): its dma-buf exists (1)"),
        "µs",
        0,
        made.collect(),
    );
    let ours = cell(&rounds[0], &format!("{name}: passed on"), Cell::Refused);
    table.row(
        &format!("{limit}the same: its descriptor is in another process (2)"),
        "µs",
        0,
        vec![ours, Cell::None],
    );
}
