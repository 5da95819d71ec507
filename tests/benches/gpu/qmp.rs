//! QEMU's way to a picture of its guest: lines of JSON.

use std::{
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

    /// Saves what the screen shows as PNG.
    pub fn save_picture(&mut self, file: &Path) -> Result<()> {
        self.call("screendump", json!({"filename": file, "format": "png"}))
    }
}
