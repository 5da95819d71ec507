//! QEMU's way to a picture of its guest: lines of JSON.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use fanlight_tests::{Context, Failure, Result};
use serde_json::{Value, json};

/// A connection to QEMU's monitor.
pub struct Qmp {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and ends the negotiation.
    pub fn connect(socket: &Path) -> Result<Self> {
        let writer = UnixStream::connect(socket).context("cannot connect to QEMU")?;
        let reader = BufReader::new(writer.try_clone().context("cannot duplicate a socket")?);
        let mut qmp = Self { writer, reader };
        qmp.read()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("cannot read")?;
        serde_json::from_str(&line).context("QEMU's answer is not JSON")
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<()> {
        let call = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{call}").context("cannot write to QEMU")?;
        loop {
            // Events come in between.
            let answer = self.read()?;
            if answer.get("error").is_some() {
                return Err(Failure(answer.to_string()));
            }
            if answer.get("return").is_some() {
                return Ok(());
            }
        }
    }

    /// The first pixel of the screen. `file` is for the whole picture.
    pub fn first_pixel(&mut self, file: &Path) -> Result<u32> {
        self.call("screendump", json!({"filename": file}))?;
        let picture = fs::read(file).context("QEMU dumped no screen")?;
        // A header of three lines: P6, the size, 255.
        let pixel = picture
            .split(|&byte| byte == b'\n')
            .take(3)
            .map(|line| line.len() + 1)
            .sum::<usize>();
        match picture.get(pixel..pixel + 3) {
            Some(&[red, green, blue]) => Ok(u32::from_be_bytes([0, red, green, blue])),
            _ => Err(Failure("QEMU's picture is empty".into())),
        }
    }
}
