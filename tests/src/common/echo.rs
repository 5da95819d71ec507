//! A conversation over TCP or vsock in which every byte is checked, between guest and host. Both sides
//! use this module.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

use rustix::net::sockopt::{Timeout, set_socket_linger, set_socket_timeout};

use crate::{Context, Failure, HANG, Result};

/// Bytes sent at a time.
const CHUNK: usize = 64 << 10;
/// How long a caller tries while the other side is not there yet, and one that talks waits for the other.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where somebody listens: `tcp:ADDRESS:PORT` or `vsock:CID:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Internet address.
    Tcp(String),
    /// Context id and port.
    Vsock(u32, u32),
}

impl std::str::FromStr for Address {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Failure(format!(
                "{text:?} is not tcp:ADDRESS:PORT or vsock:CID:PORT"
            ))
        };
        match text.split_once(':').ok_or_else(bad)? {
            ("tcp", address) => Ok(Self::Tcp(address.to_owned())),
            ("vsock", rest) => {
                let (cid, port) = rest.split_once(':').ok_or_else(bad)?;
                let number = |text: &str| text.parse().map_err(|_| bad());
                Ok(Self::Vsock(number(cid)?, number(port)?))
            }
            _ => Err(bad()),
        }
    }
}

/// Has a socket give up a peer that does nothing for so long. Closing it waits until the peer has everything: a
/// guest that says goodbye and is off takes along what is still in its buffers.
fn limit(socket: impl AsFd) -> Result<()> {
    set_socket_linger(&socket, Some(PATIENCE)).context("cannot have a socket linger")?;
    for direction in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, direction, Some(PATIENCE))
            .context("cannot set a time limit")?;
    }
    Ok(())
}

/// What tells a lost interrupt from a lost timer or packet.
fn state() -> String {
    let mut text = String::new();
    for path in [
        "/proc/uptime",
        "/proc/net/tcp",
        "/proc/net/dev",
        "/proc/net/snmp",
    ] {
        text += &std::fs::read_to_string(path).unwrap_or_default();
    }
    for _ in 0..2 {
        text += &std::fs::read_to_string("/proc/interrupts").unwrap_or_default();
        thread::sleep(Duration::from_secs(1));
    }
    text
}

fn waited<T>(result: std::io::Result<T>, what: &str) -> Result<T> {
    result.map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => Failure(format!(
            "{HANG}: nothing to {what} for {PATIENCE:?}\n{}",
            state()
        )),
        _ => Failure::new(format!("cannot {what}"), error),
    })
}

/// Accepts one caller and sends everything back. Returns how many bytes there were.
pub fn serve(address: &Address) -> Result<u64> {
    let (mut stream, _keep): (File, Option<OwnedFd>) = match address {
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address).context("cannot listen")?;
            limit(&listener)?;
            let (stream, _) = waited(listener.accept(), "accept")?;
            (OwnedFd::from(stream).into(), None)
        }
        Address::Vsock(cid, port) => {
            let socket = vsock_socket()?;
            let name = vsock_name(*cid, *port);
            // SAFETY: `name` is a `sockaddr_vm` of the length given, and outlives the calls.
            let listening = unsafe {
                libc::bind(socket.as_raw_fd(), (&raw const name).cast(), NAME_LEN) == 0
                    && libc::listen(socket.as_raw_fd(), 1) == 0
            };
            if !listening {
                return Err(os_failure("cannot listen"));
            }
            limit(&socket)?;
            // SAFETY: null pointers ask for no address.
            let fd = unsafe {
                libc::accept(
                    socket.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                )
            };
            if fd < 0 {
                return waited(Err(std::io::Error::last_os_error()), "accept");
            }
            // SAFETY: `fd` was just made by accept and belongs to nobody else.
            (unsafe { File::from_raw_fd(fd) }, Some(socket))
        }
    };
    limit(&stream)?;
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let read = waited(stream.read(&mut buffer), "read")?;
        if read == 0 {
            return Ok(total);
        }
        waited(stream.write_all(&buffer[..read]), "write")?;
        total += read as u64;
    }
}

/// Calls, sends `total` bytes of a pattern, and checks each that comes back.
pub fn call(address: &Address, total: u64) -> Result<()> {
    let start = std::time::Instant::now();
    let stream = loop {
        match connect(address) {
            Ok(stream) => break stream,
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    };
    limit(&stream)?;
    let mut writer = stream.try_clone().context("cannot duplicate a socket")?;
    let sender = thread::spawn(move || {
        let mut pattern = Pattern::new();
        let mut left = total;
        let mut buffer = vec![0; CHUNK];
        while left > 0 {
            let part = left.min(CHUNK as u64) as usize;
            pattern.fill(&mut buffer[..part]);
            waited(writer.write_all(&buffer[..part]), "write")?;
            left -= part as u64;
        }
        // SAFETY: the descriptor is open; shutting its writing half down has no other effect.
        unsafe { libc::shutdown(writer.as_raw_fd(), libc::SHUT_WR) };
        Ok::<_, Failure>(())
    });
    let mut reader = stream;
    let (mut expected, mut buffer) = (Pattern::new(), vec![0; CHUNK]);
    let mut got = 0;
    loop {
        let read = waited(reader.read(&mut buffer), "read")?;
        if read == 0 {
            break;
        }
        let mut wanted = vec![0; read];
        expected.fill(&mut wanted);
        if wanted != buffer[..read] {
            return Err(Failure(format!("wrong bytes after {got}")));
        }
        got += read as u64;
    }
    sender
        .join()
        .map_err(|_| Failure("the sender panicked".into()))??;
    if got == total {
        Ok(())
    } else {
        Err(Failure(format!("{got} of {total} bytes came back")))
    }
}

fn connect(address: &Address) -> Result<File> {
    match address {
        Address::Tcp(address) => {
            Ok(OwnedFd::from(TcpStream::connect(address).context("cannot connect")?).into())
        }
        Address::Vsock(cid, port) => {
            let socket = vsock_socket()?;
            let name = vsock_name(*cid, *port);
            // SAFETY: `name` is a `sockaddr_vm` of the length given, and outlives the call.
            let result =
                unsafe { libc::connect(socket.as_raw_fd(), (&raw const name).cast(), NAME_LEN) };
            if result == 0 {
                Ok(socket.into())
            } else {
                Err(os_failure("cannot connect"))
            }
        }
    }
}

const NAME_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn vsock_name(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero bytes are a valid `sockaddr_vm`: it holds integers.
    let mut name: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    name.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    name.svm_cid = cid;
    name.svm_port = port;
    name
}

fn vsock_socket() -> Result<OwnedFd> {
    // SAFETY: socket takes plain values.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(os_failure("cannot make a vsock socket"));
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn os_failure(what: &str) -> Failure {
    Failure::new(what, std::io::Error::last_os_error())
}

/// Bytes that do not repeat soon (xorshift64).
struct Pattern(u64);

impl Pattern {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0 as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_on_loopback() {
        let address: Address = "tcp:127.0.0.1:47611".parse().unwrap();
        let server = thread::spawn({
            let address = address.clone();
            move || serve(&address)
        });
        call(&address, 1_000_000).unwrap();
        assert_eq!(server.join().unwrap().unwrap(), 1_000_000);
    }
}
