// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The FUSE session of a directory: a detached mount, and the threads that serve it.
//!
//! Knows mounts and /dev/fuse. The session ends with the last mount and descriptor, which the
//! kernel reports, or on request. In either case the last thread closes /dev/fuse, and the kernel
//! fails all pending requests. That works for detached mounts, and for mounts in other namespaces,
//! and needs no fusectl.
//!
//! The daemon sends replies only, and no notifications. To drop a cached name
//! (FUSE_NOTIFY_INVAL_ENTRY, _DELETE), the kernel takes the lock of the directory, without a
//! timeout. A tenant can hold that lock for ever: it lists the directory into memory whose page
//! fault never completes. No notification is needed: every reply is valid only once.

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

use super::request_handler::RequestHandler;
use super::wire::{BUFFER_BYTES, LoopfsRequest};
use crate::error::{Error, Result};

/// The FUSE device.
const NODE: &str = "/dev/fuse";
/// While one waits for the pool, the other serves requests.
const THREADS: usize = 2;

/// Requests the end of a session.
#[derive(Debug)]
pub(super) struct StopRequest {
    eventfd_: OwnedFd,
    requested: AtomicBool,
}

impl StopRequest {
    pub(super) fn new() -> Result<StopRequest> {
        let eventfd_ = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::os(error, "cannot create an eventfd"))?;
        Ok(StopRequest { eventfd_, requested: AtomicBool::new(false) })
    }

    /// Ends the session after the requests in progress.
    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        self.wake();
    }

    /// Wakes the threads. Nobody reads the eventfd, so that it stays readable.
    fn wake(&self) {
        let _ = rustix::io::write(&self.eventfd_, &1u64.to_ne_bytes());
    }

    fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}

/// The state of the threads. Only they refer to it: the last one closes /dev/fuse.
struct FuseSession {
    fuse: OwnedFd,
    handler: RequestHandler,
    stop: Arc<StopRequest>,
    on_end: Box<dyn FnOnce() + Send + Sync>,
}

/// Starts a session. Returns its detached mount, and the device number of its file system.
pub(super) fn start(
    source: &str,
    handler: RequestHandler,
    stop: Arc<StopRequest>,
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
        Error::os(error, "cannot create a FUSE file system").hint("the daemon needs root (CAP_SYS_ADMIN)")
    })?;
    // The kernel answers this itself: no thread serves requests yet.
    let stat = statx(&mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)
        .map_err(|error| Error::os(error, "cannot read the device number of a FUSE file system"))?;
    let session = Arc::new(FuseSession { fuse, handler, stop: stop.clone(), on_end });
    for _ in 0..THREADS {
        let session = session.clone();
        let started = std::thread::Builder::new().name("loopfs".to_owned()).spawn(move || serve(session));
        if let Err(error) = started {
            stop.request();
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
    // Any user has access, and the kernel checks permissions. It reads the attributes of an inode
    // at every open, which refuses inodes of removed devices.
    for flag in ["allow_other", "default_permissions"] {
        fsconfig_set_flag(&fs, flag)?;
    }
    fsconfig_create(&fs)?;
    // Not nodev: its nodes are devices.
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The loop of a thread.
fn serve(session: Arc<FuseSession>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Some(len) = next(&session, &mut buffer) {
        match LoopfsRequest::parse(&buffer[..len]) {
            Some(request) => session.handler.handle(&request, session.fuse.as_fd()),
            // It cannot be answered, and its caller would wait for ever.
            None => break,
        }
    }
    session.stop.wake();
    if let Some(FuseSession { fuse, handler, stop, on_end }) = Arc::into_inner(session) {
        drop(fuse);
        drop(handler);
        if !stop.is_requested() {
            on_end();
        }
    }
}

/// The length of the next request; none at the end of the session.
fn next(session: &FuseSession, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut waits = [&session.fuse, &session.stop.eventfd_].map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut waits, None) {
            Ok(_) if !waits[1].revents().is_empty() => return None,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return log_read_error(error),
        }
        match rustix::io::read(&session.fuse, &mut *buffer) {
            Ok(len) => return Some(len),
            // The other thread has read it, or its caller does not wait any more.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOENT) => {}
            // The last mount and descriptor are gone.
            Err(Errno::NODEV) => return None,
            Err(error) => return log_read_error(error),
        }
    }
}

fn log_read_error(error: Errno) -> Option<usize> {
    tracing::error!(%error, "cannot read /dev/fuse: a directory of loop devices ends");
    None
}
