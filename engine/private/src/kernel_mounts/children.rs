//! How a confined process does orders: each in a child, so that none holds up the next.
//!
//! A child that takes too long is killed; one that cannot be, since it waits for a file that hangs, counts
//! until it can. Does not know what is ordered, nor how the process is confined.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use serde::de::DeserializeOwned;

use super::orders::{Done, answer};
use crate::loops::Answer;
use crate::sys::packet;
use crate::sys::process::Alone;

/// How long one may take; the daemon gives up a little earlier.
const CHILD_MAX: Duration = Duration::from_secs(30);
/// How often children are looked after while there are any.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

struct Child {
    pid: Pid,
    until: Instant,
}

/// Takes orders of so many bytes at the most from this socket until it is closed. `act` is called in a
/// child, of which there are so many `at_once`, with the descriptors that came.
pub fn serve<O: DeserializeOwned>(
    alone: &Alone,
    socket: BorrowedFd<'_>,
    order_max: usize,
    at_once: usize,
    act: fn(&O, Vec<OwnedFd>) -> Answer<Done>,
) -> rustix::io::Result<()> {
    let mut children: Vec<Child> = Vec::new();
    loop {
        let timeout = (!children.is_empty()).then_some(&LOOK);
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        let ready = match poll(&mut fds, timeout) {
            Err(Errno::INTR) => 0,
            polled => polled?,
        };
        look_after(&mut children);
        if ready == 0 {
            continue;
        }
        let Some(packet) = packet::receive(socket, order_max)? else { break };
        let mut fds = packet.fds.into_iter();
        let Some(reply) = fds.next() else { continue };
        let order = serde_json::from_slice::<O>(&packet.bytes).ok().filter(|_| packet.whole);
        let pid = match order {
            None => Err(Errno::INVAL),
            Some(_) if children.len() >= at_once => Err(Errno::AGAIN),
            Some(order) => {
                let work = || answer(reply.as_fd(), act(&order, fds.collect()));
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

fn look_after(children: &mut Vec<Child>) {
    children.retain(|child| {
        if Instant::now() >= child.until {
            let _ = kill_process(child.pid, Signal::KILL);
        }
        matches!(waitpid(Some(child.pid), WaitOptions::NOHANG), Ok(None) | Err(Errno::INTR))
    });
}
