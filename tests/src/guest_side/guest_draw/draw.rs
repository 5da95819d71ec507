//! A program that draws in a guest as its standard input says, and measures display commands from the guest's side.

use std::{
    io::BufRead,
    time::{Duration, Instant},
};

use super::{pages::Scattered, virtgpu::CommandTrace};
use crate::{
    Context, Failure, Result,
    common::pci::Mmio,
    guest_side::drm::{Card, Shown},
};

/// A flush that takes this long ended by the time limit: no viewer released the frame.
const LATE: Duration = Duration::from_millis(30);
/// Width and height of every cursor of a virtio GPU (Virtio 1.4, 5.7.6.10).
const CURSOR_SIDE: u16 = 64;

/// A picture on the screen.
struct Picture {
    shown: Shown,
    memory: Mmio,
    width: u16,
    height: u16,
}

impl Picture {
    fn new(card: &Card, width: u16, height: u16) -> Result<Self> {
        let shown = card.create(width.into(), height.into())?;
        Ok(Self {
            memory: card.map(&shown, width.into(), height.into())?,
            shown,
            width,
            height,
        })
    }

    /// Each pixel has its own colour, and each number its own picture.
    fn draw(&self, number: u32) {
        let pixels = u32::from(self.width) * u32::from(self.height);
        for (place, at) in (0..pixels).zip((0..).step_by(4)) {
            let colour = (place ^ number.wrapping_mul(0x0075_bcd1)).wrapping_mul(0x00e3_779b);
            self.memory.write(at, colour & 0x00ff_ffff);
        }
    }

    fn fill(&self, colour: u32) {
        let pixels = usize::from(self.width) * usize::from(self.height);
        for at in (0..pixels * 4).step_by(4) {
            self.memory.write(at, colour);
        }
    }
}

/// The screen, and state of the other requests.
struct Screen {
    card: Card,
    picture: Picture,
    /// Duration of a frame in microseconds.
    frame: u32,
    trace: Option<CommandTrace>,
    blob: Option<Shown>,
}

/// Shows a picture of one colour (hexadecimal, 0xRRGGBB) in a mode whose frames last `frame` microseconds, and then
/// follows the lines of standard input. Each line is answered by `agent: did NUMBER: …`, counted from 1.
pub fn draw(width: u16, height: u16, frame: u32, colour: &str) -> Result<String> {
    let card = Card::open()?;
    let picture = Picture::new(&card, width, height)?;
    picture.fill(parse_colour(colour)?);
    card.show_fast(&picture.shown, width, height, frame)?;
    card.dirty(&picture.shown)?;
    println!("agent: shows");
    let mut screen = Screen {
        card,
        picture,
        frame,
        trace: None,
        blob: None,
    };
    for (line, number) in std::io::stdin().lock().lines().zip(1..) {
        let line = line.context("cannot read a line")?;
        let words: Vec<_> = line.split_whitespace().collect();
        if words == ["end"] {
            break;
        }
        let said = screen.obey(&words)?;
        println!("agent: did {number}: {said}.");
    }
    Ok("painted".into())
}

fn parse_colour(text: &str) -> Result<u32> {
    u32::from_str_radix(text, 16).context(format!("{text:?} is no colour"))
}

fn number<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T> {
    text.parse().context(format!("{text:?} is not a number"))
}

impl Screen {
    fn obey(&mut self, words: &[&str]) -> Result<String> {
        match *words {
            ["size", width, height] => self.size(number(width)?, number(height)?),
            ["draw", what] => {
                self.picture.draw(number(what)?);
                self.flush(1)
            }
            ["flush", count] => self.flush(number(count)?),
            ["cursor", x, y] => self.cursor([number(x)?, number(y)?]),
            ["blob", "contiguous"] => self.blob(Scattered::contiguous(self.bytes())?),
            ["blob", run] => self.blob(Scattered::in_pieces(self.bytes(), number(run)?)?),
            ["drop"] => {
                if let Some(blob) = self.blob.take() {
                    self.card.forget(blob)?;
                }
                self.flush(1)
            }
            ["transfer", width, height, count] => {
                self.transfer(number(width)?, number(height)?, number(count)?)
            }
            _ => Err(Failure(format!("{words:?}?"))),
        }
    }

    /// Size of the picture in bytes.
    fn bytes(&self) -> u64 {
        u64::from(self.picture.width) * u64::from(self.picture.height) * 4
    }

    fn size(&mut self, width: u16, height: u16) -> Result<String> {
        let picture = Picture::new(&self.card, width, height)?;
        self.card
            .show_fast(&picture.shown, width, height, self.frame)?;
        let old = std::mem::replace(&mut self.picture, picture);
        self.card.forget(old.shown)?;
        self.flush(1)
    }

    /// Flushes the whole picture `count` times, and waits for each flush.
    fn flush(&self, count: u32) -> Result<String> {
        let (mut slowest, mut late) = (Duration::ZERO, 0);
        let start = Instant::now();
        for _ in 0..count {
            let begun = Instant::now();
            self.card.dirty(&self.picture.shown)?;
            let took = begun.elapsed();
            slowest = slowest.max(took);
            late += u32::from(took >= LATE);
        }
        Ok(format!(
            "flushed {count} in {} us, slowest {} us, late {late}",
            start.elapsed().as_micros(),
            slowest.as_micros()
        ))
    }

    /// Sets a white cursor. `hot` is the pixel that points, from the left and from the top.
    fn cursor(&self, hot: [i32; 2]) -> Result<String> {
        let cursor = Picture::new(&self.card, CURSOR_SIDE, CURSOR_SIDE)?;
        cursor.fill(0xffff_ffff);
        self.card
            .set_cursor(&cursor.shown, CURSOR_SIDE.into(), hot)?;
        self.card.forget(cursor.shown)?;
        Ok("set a cursor".into())
    }

    /// Creates a blob of this memory, whose resource id the host can use.
    fn blob(&mut self, memory: Scattered) -> Result<String> {
        let trace = match self.trace.take() {
            Some(trace) => trace,
            None => CommandTrace::start()?,
        };
        trace.clear()?;
        let (width, height) = (self.picture.width.into(), self.picture.height.into());
        let blob = self
            .card
            .import(&memory.dmabuf, width, height)
            .context(format!("cannot import {} pieces", memory.pieces))?;
        // The reply comes after the reply to the measured command.
        self.card.dirty(&self.picture.shown)?;
        let took = trace.create_blob()?;
        self.trace = Some(trace);
        let id = self.card.resource_id(&blob)?;
        self.blob = Some(blob);
        Ok(format!(
            "blob {id}, pieces {}, created in {took:.0} us",
            memory.pieces
        ))
    }

    /// Has the device transfer a 2D resource `count` times.
    fn transfer(&self, width: u32, height: u32, count: u32) -> Result<String> {
        let resource = self.card.create_2d(width, height)?;
        let round = |count| {
            for _ in 0..count {
                self.card.transfer(&resource)?;
            }
            // The reply comes after the replies to all transfers.
            self.card.dirty(&self.picture.shown)
        };
        // The first transfer touches the resource's memory.
        round(1)?;
        let start = Instant::now();
        round(count)?;
        let took = start.elapsed().as_micros();
        self.card.forget_2d(resource)?;
        let bytes = u64::from(width) * u64::from(height) * 4 * u64::from(count);
        Ok(format!("transferred {bytes} in {took} us"))
    }
}
