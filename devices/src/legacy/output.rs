//! Output of a console: a bounded queue and a thread that writes it out, so that a slow reader never blocks a vCPU.

use std::{
    io::{self, Write},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::sync::{Condvar, Mutex};

/// What a console keeps for a reader that has fallen behind: several times a kernel's boot log.
const CAPACITY: usize = 1 << 20;
/// How long the end of the process waits for the reader to take the rest.
const DRAIN: Duration = Duration::from_secs(1);

/// The writing end. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Bytes that found the queue full.
    lost: u64,
    closed: bool,
    /// The thread is between taking bytes and having written them.
    writing: bool,
}

/// Owns the writing thread. Dropping it waits a bounded time for the rest to be written.
#[derive(Debug)]
pub struct OutputThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Starts a thread of the given name that writes to `sink`.
    pub fn spawn(
        name: &str,
        mut sink: impl Write + Send + 'static,
    ) -> io::Result<(Self, OutputThread)> {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name(name.into()).spawn({
            let shared = shared.clone();
            move || shared.run(&mut sink)
        })?;
        Ok((
            Self {
                shared: shared.clone(),
            },
            OutputThread {
                shared,
                thread: Some(thread),
            },
        ))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.shared.lock();
        let room = CAPACITY - queue.bytes.len();
        let taken = bytes.len().min(room);
        let was_empty = queue.bytes.is_empty();
        queue.bytes.extend_from_slice(&bytes[..taken]);
        queue.lost += (bytes.len() - taken) as u64;
        drop(queue);
        if was_empty {
            self.shared.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    fn run(&self, sink: &mut impl Write) {
        let mut taken = Vec::new();
        loop {
            {
                let mut queue = self.lock();
                queue.writing = false;
                self.changed.notify_all();
                while queue.bytes.is_empty() {
                    if queue.closed {
                        return;
                    }
                    queue = self.changed.wait(queue);
                }
                std::mem::swap(&mut taken, &mut queue.bytes);
                queue.writing = true;
                if queue.lost != 0 {
                    tracing::warn!(
                        bytes = queue.lost,
                        "console output was lost: its reader is too slow"
                    );
                    queue.lost = 0;
                }
            }
            // A reader that went away is no reason to stop the guest.
            let _ = sink.write_all(&taken).and_then(|()| sink.flush());
            taken.clear();
        }
    }
}

impl Drop for OutputThread {
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN;
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.changed.notify_all();
        while queue.writing || !queue.bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The reader is stuck: leave the thread to end with the process.
                return;
            }
            queue = self.shared.changed.wait_timeout(queue, left);
        }
        drop(queue);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<u8>>>);

    impl Write for Collect {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_arrives_before_the_thread_is_dropped() {
        let sink = Collect::default();
        let (mut output, thread) = Output::spawn("test", sink.clone()).unwrap();
        for byte in 0..=255u8 {
            output.write_all(&[byte]).unwrap();
        }
        drop(thread);
        assert_eq!(*sink.0.lock(), (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn a_reader_that_never_reads_holds_nobody_up() {
        struct Stuck(std::sync::mpsc::Receiver<()>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = std::sync::mpsc::channel();
        let (mut output, thread) = Output::spawn("test", Stuck(stuck)).unwrap();
        for _ in 0..4 {
            output.write_all(&vec![0; CAPACITY]).unwrap();
        }
        assert!(output.shared.lock().bytes.len() <= CAPACITY);
        drop(release);
        drop(thread);
    }
}
