//! Orders to a confined process, and what comes of them: the daemon's side.
//!
//! An order is a packet: JSON, and descriptors, the first of which is where the answer goes. An answer is
//! an errno or 0, a number, and perhaps a descriptor. Does not know what is ordered.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::loops::Answer;
use crate::sys::packet;

/// How long an order may take: a file system may have a journal to write back first.
const PATIENCE: Duration = Duration::from_secs(25);
/// How often whoever waits for it is asked meanwhile whether he still does.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// What an order comes to, beside an errno.
#[derive(Debug, Default)]
pub struct Done {
    /// What the order asks for.
    pub number: u64,
    /// The same.
    pub fd: Option<OwnedFd>,
}

/// A process that takes orders until this is dropped.
#[derive(Debug)]
pub struct Process {
    socket: OwnedFd,
    name: &'static str,
}

impl Process {
    /// Starts this program with this hidden command, its orders on standard input.
    pub fn start(name: &'static str) -> Result<Process> {
        let cannot = |error| Error::os(error, format!("cannot start the {name}"));
        let (socket, theirs) = packet::pair().map_err(|error| cannot(error.into()))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("loopengine").arg(name).stdin(theirs).stdout(Stdio::null());
        command.spawn().map_err(cannot)?;
        Ok(Process { socket, name })
    }

    /// Has an order done. `waits` is asked now and then: does whoever wants it still wait?
    pub fn ask(
        &self,
        order: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        waits: &dyn Fn() -> bool,
    ) -> Answer<Done> {
        let order = serde_json::to_vec(order).map_err(|_| Errno::INVAL)?;
        let (reply, theirs) = packet::pair()?;
        let fds: Vec<_> = std::iter::once(theirs.as_fd()).chain(fds.iter().copied()).collect();
        packet::send(self.socket.as_fd(), &order, &fds).map_err(|error| {
            tracing::error!(%error, "the {} does not answer; restart the daemon", self.name);
            Errno::IO
        })?;
        drop(theirs);
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until && waits() {
            match poll(&mut [PollFd::new(&reply, PollFlags::IN)], Some(&LOOK)) {
                Ok(0) | Err(Errno::INTR) => {}
                _ => return read(reply.as_fd()),
            }
        }
        Err(Errno::TIMEDOUT)
    }

    #[cfg(test)]
    pub fn of(socket: OwnedFd) -> Process {
        Process { socket, name: "process" }
    }
}

/// Answers an order. Nobody may wait any more: then its descriptor is closed.
pub fn answer(reply: BorrowedFd<'_>, done: Answer<Done>) {
    let (errno, Done { number, fd }) = match done {
        Ok(done) => (0, done),
        Err(errno) => (errno.raw_os_error(), Done::default()),
    };
    let bytes = [&errno.to_ne_bytes()[..], &number.to_ne_bytes()].concat();
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    let _ = packet::send(reply, &bytes, &fds);
}

fn read(reply: BorrowedFd<'_>) -> Answer<Done> {
    let packet = packet::receive(reply, 16)?.filter(|packet| packet.whole).ok_or(Errno::IO)?;
    let (errno, number) = packet.bytes.split_at_checked(4).ok_or(Errno::IO)?;
    let errno = errno.try_into().map(i32::from_ne_bytes).map_err(|_| Errno::IO)?;
    let number = number.try_into().map(u64::from_ne_bytes).map_err(|_| Errno::IO)?;
    match errno {
        0 => Ok(Done { number, fd: packet.fds.into_iter().next() }),
        1..4096 => Err(Errno::from_raw_os_error(errno)),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let said = |done: Answer<Done>| {
            let (ours, theirs) = packet::pair().unwrap();
            answer(theirs.as_fd(), done);
            read(ours.as_fd()).map(|done| (done.number, done.fd.is_some()))
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(said(Ok(Done { number: 7, fd: Some(file.into()) })), Ok((7, true)));
        assert_eq!(said(Ok(Done::default())), Ok((0, false)));
        assert_eq!(said(Err(Errno::INVAL)), Err(Errno::INVAL));
        let wrong = |bytes: &[u8]| {
            let (ours, theirs) = packet::pair().unwrap();
            packet::send(theirs.as_fd(), bytes, &[]).unwrap();
            read(ours.as_fd()).map(drop)
        };
        for bytes in [&[1][..], &[0; 4], &[0; 11], &[0; 13], &[0; 16], &[0xff; 12]] {
            assert_eq!(wrong(bytes), Err(Errno::IO), "{bytes:?}");
        }
        // The child died.
        let (ours, theirs) = packet::pair().unwrap();
        drop(theirs);
        assert_eq!(read(ours.as_fd()).map(drop), Err(Errno::IO));
    }
}
