// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests to a confined process, and its replies: the daemon's side.
//!
//! A request is a packet: JSON and descriptors, the first of which is the reply socket. A reply is
//! an errno or 0, a number, and possibly a descriptor.

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

/// Deadline of a request: a file system may have to replay a journal first.
const TIMEOUT: Duration = Duration::from_secs(25);
/// How often `still_waiting` is polled.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// How long a child may take to end after its reply.
const CHILD_END_MAX: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The reply to a request, except its errno.
#[derive(Debug, Default)]
pub struct HelperReply {
    /// A result that depends on the request.
    pub number: u64,
    /// A result that depends on the request.
    pub fd: Option<OwnedFd>,
}

/// A process that serves requests until this is dropped.
#[derive(Debug)]
pub struct HelperProcess {
    socket: OwnedFd,
    name: &'static str,
}

impl HelperProcess {
    /// Starts this program with this hidden command, with the request socket on standard input.
    pub fn start(name: &'static str) -> Result<HelperProcess> {
        let cannot = |error| Error::os(error, format!("cannot start the {name}"));
        let (socket, theirs) = packet::pair().map_err(|error| cannot(error.into()))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("loopengine").arg(name).stdin(theirs).stdout(Stdio::null());
        command.spawn().map_err(cannot)?;
        Ok(HelperProcess { socket, name })
    }

    /// Sends a request and waits for its reply. `still_waiting` is polled: whether the requester
    /// still waits.
    pub fn ask(
        &self,
        request: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        still_waiting: &dyn Fn() -> bool,
    ) -> Answer<HelperReply> {
        let request = serde_json::to_vec(request).map_err(|_| Errno::INVAL)?;
        let (reply, theirs) = packet::pair()?;
        let fds: Vec<_> = std::iter::once(theirs.as_fd()).chain(fds.iter().copied()).collect();
        packet::send(self.socket.as_fd(), &request, &fds).map_err(|error| {
            tracing::error!(%error, "the {} does not answer; restart the daemon", self.name);
            Errno::IO
        })?;
        drop(theirs);
        let until = Instant::now() + TIMEOUT;
        while Instant::now() < until && still_waiting() {
            match poll(&mut [PollFd::new(&reply, PollFlags::IN)], Some(&POLL_INTERVAL)) {
                Ok(0) | Err(Errno::INTR) => {}
                _ => {
                    let read = read(reply.as_fd());
                    // Its child still has the mount that it has made: umount(2) would fail with
                    // EBUSY. The child closes the socket last, at its end.
                    let _ = poll(&mut [PollFd::new(&reply, PollFlags::empty())], Some(&CHILD_END_MAX));
                    return read;
                }
            }
        }
        Err(Errno::TIMEDOUT)
    }

    #[cfg(test)]
    pub fn of(socket: OwnedFd) -> HelperProcess {
        HelperProcess { socket, name: "process" }
    }
}

/// Replies to a request. The receiver may be gone.
pub fn answer(socket: BorrowedFd<'_>, reply: Answer<HelperReply>) {
    let (errno, HelperReply { number, fd }) = match reply {
        Ok(reply) => (0, reply),
        Err(errno) => (errno.raw_os_error(), HelperReply::default()),
    };
    let bytes = [&errno.to_ne_bytes()[..], &number.to_ne_bytes()].concat();
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    let _ = packet::send(socket, &bytes, &fds);
}

fn read(reply: BorrowedFd<'_>) -> Answer<HelperReply> {
    let packet = packet::receive(reply, 16)?.filter(|packet| packet.whole).ok_or(Errno::IO)?;
    let (errno, number) = packet.bytes.split_at_checked(4).ok_or(Errno::IO)?;
    let errno = errno.try_into().map(i32::from_ne_bytes).map_err(|_| Errno::IO)?;
    let number = number.try_into().map(u64::from_ne_bytes).map_err(|_| Errno::IO)?;
    match errno {
        0 => Ok(HelperReply { number, fd: packet.fds.into_iter().next() }),
        1..4096 => Err(Errno::from_raw_os_error(errno)),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let said = |reply: Answer<HelperReply>| {
            let (ours, theirs) = packet::pair().unwrap();
            answer(theirs.as_fd(), reply);
            read(ours.as_fd()).map(|reply| (reply.number, reply.fd.is_some()))
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(said(Ok(HelperReply { number: 7, fd: Some(file.into()) })), Ok((7, true)));
        assert_eq!(said(Ok(HelperReply::default())), Ok((0, false)));
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
