//! Display of a picture in a passed-through device's memory by a guest. The guest draws the picture there, exports it
//! as a dma-buf, imports that into the stock virtio-gpu driver, and shows it.

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

/// Shows the memory at `offset` of BAR `bar` of the function with these ids, through the guest's own vfio-pci. Then
/// follows the lines of standard input.
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
            // With the drivers informed: they withdraw the memory from the GPU.
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
            // Without the drivers' knowledge.
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
                // 0 means not to draw: the addresses may have no memory.
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
