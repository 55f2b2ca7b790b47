// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs each request of a confined process in a child, so that none blocks the next.
//!
//! A child that takes too long is killed. One that cannot be killed, because its file hangs, counts
//! against the limit until it ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::de::DeserializeOwned;

use super::helper::{HelperReply, answer};
use crate::loops::Answer;
use crate::sys::packet;
use crate::sys::process::Alone;

/// Deadline of a child; the daemon's is a little shorter.
const CHILD_MAX: Duration = Duration::from_secs(30);
/// Interval of checks while there are children.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

struct Child {
    pid: Pid,
    until: Instant,
}

/// Serves requests of at most `request_max` bytes from this socket until it is closed. `act` runs
/// in a child, of which there are at most `children_max`, with the received descriptors.
pub fn serve<O: DeserializeOwned>(
    alone: &Alone,
    socket: BorrowedFd<'_>,
    request_max: usize,
    children_max: usize,
    act: fn(&O, Vec<OwnedFd>) -> Answer<HelperReply>,
) -> rustix::io::Result<()> {
    let mut children: Vec<Child> = Vec::new();
    loop {
        let timeout = (!children.is_empty()).then_some(&POLL_INTERVAL);
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        let ready = match poll(&mut fds, timeout) {
            Err(Errno::INTR) => 0,
            polled => polled?,
        };
        reap(&mut children);
        if ready == 0 {
            continue;
        }
        let Some(packet) = packet::receive(socket, request_max)? else { break };
        let mut fds = packet.fds.into_iter();
        let Some(reply) = fds.next() else { continue };
        let request = serde_json::from_slice::<O>(&packet.bytes).ok().filter(|_| packet.whole);
        let pid = match request {
            None => Err(Errno::INVAL),
            Some(_) if children.len() >= children_max => Err(Errno::AGAIN),
            Some(request) => {
                let work = || answer(reply.as_fd(), act(&request, fds.collect()));
                alone.fork(work).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
            }
        };
        match pid {
            Ok(pid) => children.push(Child { pid, until: Instant::now() + CHILD_MAX }),
            Err(errno) => answer(reply.as_fd(), Err(errno)),
        }
    }
    for child in &children {
        let _ = kill_process(child.pid, Signal::KILL);
    }
    Ok(())
}

fn reap(children: &mut Vec<Child>) {
    children.retain(|child| {
        if Instant::now() >= child.until {
            let _ = kill_process(child.pid, Signal::KILL);
        }
        matches!(waitpid(Some(child.pid), WaitOptions::NOHANG), Ok(None) | Err(Errno::INTR))
    });
}
