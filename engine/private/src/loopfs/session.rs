//! The kernel's side of a directory: a detached mount, and the threads that answer for it.
//!
//! Knows mounts and /dev/fuse. The session ends when the last mount or descriptor of it is gone,
//! for the kernel then says so, or when it is told to. Told or not, the last thread closes
//! /dev/fuse, and with that the kernel fails whatever is still asked: that works for a mount which
//! is attached nowhere, or where the daemon cannot see it, and needs no fusectl.
//!
//! Nothing is ever told to the kernel but answers. To drop a name from its cache
//! (FUSE_NOTIFY_INVAL_ENTRY, _DELETE) it takes the lock of the directory, without a way to give up;
//! a tenant can hold that lock as long as he likes, by listing the directory into memory that does
//! not come. There is no need either: what was answered holds for that once.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{AtFlags, StatxFlags, makedev, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::answers::Answers;
use super::wire::{BUFFER_BYTES, Request};
use crate::error::{Error, Result};

/// Where the kernel's side is.
const NODE: &str = "/dev/fuse";
/// While one waits for the pool, the other goes on answering.
const THREADS: usize = 2;

/// Says that a session is to end.
#[derive(Debug)]
pub(super) struct Stop {
    bell: OwnedFd,
    asked: AtomicBool,
}

impl Stop {
    pub(super) fn new() -> Result<Stop> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::os(error, "cannot make an eventfd"))?;
        Ok(Stop { bell, asked: AtomicBool::new(false) })
    }

    /// Ends the session, soon: what is being answered is answered first.
    pub(super) fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.ring();
    }

    /// Wakes the threads, for good: nobody reads it.
    fn ring(&self) {
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }
}

/// What the threads share. Nobody else has a part in it, for the last to leave closes /dev/fuse.
struct Session {
    fuse: OwnedFd,
    answers: Answers,
    stop: Arc<Stop>,
    on_end: Box<dyn FnOnce() + Send + Sync>,
}

/// Starts a session. Answers its mount, attached nowhere, and the number of its file system.
pub(super) fn start(
    source: &str,
    answers: Answers,
    stop: Arc<Stop>,
    on_end: Box<dyn FnOnce() + Send + Sync>,
) -> Result<(OwnedFd, u64)> {
    let fuse: OwnedFd = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(NODE)
        .map_err(|error| Error::os(error, format!("cannot open {NODE}")))?
        .into();
    let mount = mount(source, fuse.as_fd()).map_err(|error| {
        Error::os(error, "cannot make a FUSE file system").hint("the daemon needs root (CAP_SYS_ADMIN)")
    })?;
    // Told by the kernel alone: no thread answers yet.
    let stat = statx(&mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)
        .map_err(|error| Error::os(error, "cannot tell the number of a FUSE file system"))?;
    let session = Arc::new(Session { fuse, answers, stop: stop.clone(), on_end });
    for _ in 0..THREADS {
        let session = session.clone();
        let started = std::thread::Builder::new().name("loopfs".to_owned()).spawn(move || serve(session));
        if let Err(error) = started {
            stop.ask();
            return Err(Error::os(error, "cannot start a thread"));
        }
    }
    Ok((mount, makedev(stat.stx_dev_major, stat.stx_dev_minor)))
}

fn mount(source: &str, fuse: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let number = fuse.as_raw_fd().to_string();
    let options = [
        ("source", source),
        ("subtype", "loop"),
        ("fd", &number),
        ("rootmode", "40000"),
        ("user_id", "0"),
        ("group_id", "0"),
    ];
    for (option, value) in options {
        fsconfig_set_string(&fs, option, value)?;
    }
    // Everybody may come in, and the kernel decides who may do what. For that it asks for the
    // attributes of an inode at every open, so that one of a device that is gone is refused.
    for flag in ["allow_other", "default_permissions"] {
        fsconfig_set_flag(&fs, flag)?;
    }
    fsconfig_create(&fs)?;
    // Not nodev: the nodes are what it is for.
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// One thread.
fn serve(session: Arc<Session>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Some(len) = next(&session, &mut buffer) {
        match Request::parse(&buffer[..len]) {
            Some(request) => session.answers.answer(&request, session.fuse.as_fd()),
            // Not to be answered, so that whoever asked would wait for ever.
            None => break,
        }
    }
    session.stop.ring();
    if let Some(Session { fuse, answers, stop, on_end }) = Arc::into_inner(session) {
        drop(fuse);
        drop(answers);
        if !stop.is_asked() {
            on_end();
        }
    }
}

/// The length of the next request; none at the end of the session.
fn next(session: &Session, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut waits = [&session.fuse, &session.stop.bell].map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut waits, None) {
            Ok(_) if !waits[1].revents().is_empty() => return None,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return lost(error),
        }
        match rustix::io::read(&session.fuse, &mut *buffer) {
            Ok(len) => return Some(len),
            // The other thread was faster, or nobody waits for this one any more.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOENT) => {}
            // The last mount is gone.
            Err(Errno::NODEV) => return None,
            Err(error) => return lost(error),
        }
    }
}

fn lost(error: Errno) -> Option<usize> {
    tracing::error!(%error, "a directory of loop devices ends: /dev/fuse cannot be read");
    None
}
