//! A display subscriber that behaves like a viewer, in its own thread, over the API.

use std::{
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::{Context, Failure, Result};
use fanlight_api::{
    client::Client,
    display::{DisplayUpdate, SubscribeDisplay, ViewerMessage},
    methods::DisplaySubscribe,
    stream::MessageStream,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A display subscriber, until it is stopped.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Watcher {
    /// Subscribes. With `paces` the guest waits until the subscriber reports that a frame was shown.
    pub fn start(client: &mut Client, paces: bool) -> Result<Self> {
        let watch = SubscribeDisplay {
            pace: paces,
            ..SubscribeDisplay::default()
        };
        let (_, fds) = client
            .call_with::<DisplaySubscribe>(&watch, &[])
            .context("display.subscribe")?;
        let fd = fds.into_iter().next().ok_or(Failure("no stream".into()))?;
        let stream = MessageStream::new(UnixStream::from(fd)).context("a stream")?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = stop.clone();
            move || watch_until(&stop, stream)
        });
        Ok(Self { stop, thread })
    }

    /// Stops it. Returns the number of damage updates.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        let heard = self.thread.join();
        heard.map_err(|_| Failure("the watcher panicked".into()))?
    }
}

fn watch_until(stop: &AtomicBool, mut stream: MessageStream) -> Result<u64> {
    let mut heard = 0;
    let mut shown = Vec::new();
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    while !stop.load(Ordering::Acquire) {
        let mut fds = [PollFd::new(&stream, PollFlags::IN)];
        if poll(&mut fds, Some(&pause)).context("cannot wait")? == 0 {
            continue;
        }
        for (news, fds) in stream.receive::<DisplayUpdate>().context("the stream")? {
            match news {
                DisplayUpdate::Damage { serial, .. } => {
                    heard += 1;
                    let release = ViewerMessage::Release { serial };
                    stream.send(&release, vec![]).context("cannot release")?;
                }
                // The descriptors of the shown frame stay open.
                DisplayUpdate::Scanout { .. } => shown = fds,
                _ => {}
            }
        }
    }
    drop(shown);
    Ok(heard)
}
