//! Connects a console of the guest to the terminal.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
};

use fanlight::{
    host::console::{Escape, Received},
    host::terminal::RawTerminal,
};

/// Connects a console to standard input and output until either ends. A terminal is raw meanwhile, and
/// Ctrl-A x leaves.
pub fn connect(mut console: UnixStream) -> io::Result<()> {
    let terminal = RawTerminal::enter()?;
    let is_terminal = terminal.is_some();
    let keys = console.try_clone()?;
    // Nothing joins the thread, because its read may never return.
    thread::Builder::new()
        .name("keys".into())
        .spawn(move || type_keys(io::stdin(), keys, is_terminal))?;
    let mut bytes = [0; 4096];
    loop {
        let read = match console.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The machine ended before it had read all input.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            read => read?,
        };
        let mut stdout = io::stdout();
        stdout.write_all(&bytes[..read])?;
        stdout.flush()?;
    }
}

/// Sends input to the console until it ends or the user leaves.
fn type_keys(mut input: impl Read, mut console: UnixStream, is_terminal: bool) {
    let mut escape = Escape::default();
    let mut bytes = [0; 1024];
    let end = loop {
        let typed = match input.read(&mut bytes) {
            // The machine sees the end of input; its output continues.
            Ok(0) => break Shutdown::Write,
            Ok(read) => &bytes[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break Shutdown::Write,
        };
        // Escape sequences are for users of a terminal, not for programs.
        let sent = if is_terminal {
            match escape.filter(typed) {
                Received::Bytes(bytes) => console.write_all(&bytes),
                Received::End | Received::Quit => break Shutdown::Both,
            }
        } else {
            console.write_all(typed)
        };
        if sent.is_err() {
            break Shutdown::Both;
        }
    };
    let _ = console.shutdown(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(input: impl Read, is_terminal: bool) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        type_keys(input, ours, is_terminal);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).unwrap();
        sent
    }

    #[test]
    fn ctrl_a_x_is_a_command_on_a_terminal_only() {
        let input = b"a\x01\x01b".chain(&b"\x01xc"[..]);
        assert_eq!(typed(input, true), b"a\x01b");
        assert_eq!(typed(&b"a\x01xc"[..], false), b"a\x01xc");
    }
}
