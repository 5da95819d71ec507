//! What a guest's GPU driver and programs do with a passed-through device's memory: a picture is drawn there,
//! exported as a dma-buf, imported into the stock virtio-gpu driver and shown.

mod exporter;

use std::{io::BufRead, os::fd::OwnedFd};

pub use exporter::Buffer;

use crate::{
    Context, Failure, Result,
    common::{
        pci::{Function, Mmio},
        test_pattern::{HEIGHT, SIZE, WIDTH, pixel, places},
    },
    guest_side::{
        drm::{Card, Shown},
        noiommu::NoIommu,
    },
};

/// Memory to draw into.
fn draw(memory: &Mmio, number: u32) {
    for ((x, y), at) in places().zip((0..).step_by(4)) {
        memory.write(at, pixel(number, x, y));
    }
}

/// Shows what lies at `offset` of BAR `bar` of the function with these ids, through the guest's own vfio-pci, and
/// does what the lines of standard input say.
pub fn show_bar(ids: &str, bar: u32, offset: u64) -> Result<String> {
    let function = Function::only(ids)?;
    let device = NoIommu::open(&function)?;
    let memory = device.map(bar, offset, SIZE)?;
    let dmabuf: OwnedFd = device.export(bar, &[(offset, SIZE)])?;
    let card = Card::open()?;
    draw(&memory, 1);
    let shown = card.import(&dmabuf, WIDTH, HEIGHT)?;
    card.show(&shown, WIDTH, HEIGHT)?;
    println!("agent: shows");
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read a line")?;
        let words: Vec<_> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["draw", number] => {
                draw(&memory, number.parse().context("not a number")?);
                card.dirty(&shown)?;
            }
            // With the knowledge of the drivers, who take the memory from the GPU.
            ["memory", "off"] => device.enable(false)?,
            ["memory", "on"] => {
                device.enable(true)?;
                card.dirty(&shown)?;
            }
            ["reset"] => {
                device.reset()?;
                device.enable(true)?;
                card.dirty(&shown)?;
            }
            // Behind their backs.
            ["force", "off"] => function.enable(false)?,
            ["force", "on"] => function.enable(true)?,
            ["end"] => break,
            _ => return Err(Failure(format!("{line:?}?"))),
        }
        println!("agent: did {}", words.join("-"));
    }
    card.forget(shown)?;
    Ok("showed".into())
}

/// Shows buffers of the guest's kernel module, as the lines of standard input say.
pub fn show_buffers() -> Result<String> {
    let card = Card::open()?;
    let mut screen: Option<(Buffer, Shown)> = None;
    println!("agent: shows");
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read a line")?;
        let words: Vec<_> = line.split_whitespace().collect();
        match (&*words, &screen) {
            (["show", number, ranges @ ..], _) => {
                let ranges = exporter::parse(ranges)?;
                if let Some((_, shown)) = screen.take() {
                    card.forget(shown)?;
                }
                let buffer = Buffer::create(&ranges)?;
                // Nothing can be drawn into addresses of which nobody knows what they are.
                if *number != "0" {
                    draw(&buffer.map(SIZE)?, number.parse().context("not a number")?);
                }
                let shown = card.import(&buffer, WIDTH, HEIGHT)?;
                card.show(&shown, WIDTH, HEIGHT)?;
                screen = Some((buffer, shown));
            }
            (["move", ranges @ ..], Some((buffer, shown))) => {
                buffer.move_to(&exporter::parse(ranges)?)?;
                card.dirty(shown)?;
            }
            (["draw", number], Some((buffer, shown))) => {
                draw(&buffer.map(SIZE)?, number.parse().context("not a number")?);
                card.dirty(shown)?;
            }
            (["where"], Some((buffer, _))) => {
                let (in_bars, distance) = buffer.whereabouts()?;
                println!("agent: {in_bars} ranges in BARs at distance {distance}");
            }
            (["end"], _) => break,
            _ => return Err(Failure(format!("{line:?}?"))),
        }
        println!("agent: did {}", words.join("-"));
    }
    Ok("showed".into())
}
