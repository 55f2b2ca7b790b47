// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The FUSE session of a directory: a detached mount, and how its requests are served.
//!
//! Knows mounts and /dev/fuse. The session ends with the last mount and descriptor, which the
//! kernel reports, or on request. In either case the last thread that serves a request closes
//! /dev/fuse, and the kernel fails all pending requests. That works for detached mounts, and for mounts in other namespaces,
//! and needs no fusectl.
//!
//! The daemon sends replies only, and no notifications. To drop a cached name
//! (FUSE_NOTIFY_INVAL_ENTRY, _DELETE), the kernel takes the lock of the directory, without a
//! timeout. A tenant can hold that lock for ever: it lists the directory into memory whose page
//! fault never completes. No notification is needed: every reply on a device is valid only once.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::EventFlags;
use rustix::fs::{AtFlags, StatxFlags, makedev, statx};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::request_handler::RequestHandler;
use super::wire::{BUFFER_BYTES, LoopfsRequest};
use crate::error::{Error, Result};
use crate::event_threads::{EventSource, EventThreads, Next, Ready, SourceHandle, Turn};

/// The FUSE device.
const NODE: &str = "/dev/fuse";
/// Requests at a time: while one waits for the pool, the other is served.
const CONCURRENCY: usize = 2;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER_BYTES]);
}

/// Requests the end of a session.
#[derive(Debug, Default)]
pub(super) struct StopRequest(Mutex<StopState>);

#[derive(Debug, Default)]
struct StopState {
    requested: bool,
    /// None before the start.
    session: Option<SourceHandle>,
}

impl StopRequest {
    /// Ends the session after the requests in progress.
    pub(super) fn request(&self) {
        let mut state = self.state();
        state.requested = true;
        if let Some(session) = &state.session {
            session.remove();
        }
    }

    fn started(&self, session: SourceHandle) {
        let mut state = self.state();
        if state.requested {
            session.remove();
        }
        state.session = Some(session);
    }

    fn is_requested(&self) -> bool {
        self.state().requested
    }

    fn state(&self) -> MutexGuard<'_, StopState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session. Only the threads that serve it refer to it: the last one closes /dev/fuse.
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
    let session = FuseSession { fuse, handler, stop: stop.clone(), on_end };
    stop.started(EventThreads::shared()?.add(Arc::new(session))?);
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

impl EventSource for FuseSession {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fuse.as_fd())
    }

    fn concurrency(&self) -> usize {
        CONCURRENCY
    }

    /// ERR: the last mount and descriptor are gone, or the connection was aborted.
    fn interpret(&self, events: EventFlags) -> Ready {
        match events {
            events if events.intersects(EventFlags::ERR | EventFlags::HUP) => Ready::Over,
            events if events.contains(EventFlags::IN) => Ready::Request,
            _ => Ready::Nothing,
        }
    }

    fn serve(&self, turn: &Turn<'_>) -> Next {
        BUFFER.with_borrow_mut(|buffer| {
            let len = match rustix::io::read(&self.fuse, &mut buffer[..]) {
                Ok(len) => len,
                // Another thread has read it, or its caller does not wait any more.
                Err(Errno::AGAIN | Errno::INTR | Errno::NOENT) => return Next::Continue(None),
                Err(error) => {
                    log_read_error(error);
                    return Next::End;
                }
            };
            turn.received(None);
            match LoopfsRequest::parse(&buffer[..len]) {
                Some(request) => self.handler.handle(&request, self.fuse.as_fd()),
                // It cannot be answered. With the session its caller's wait ends.
                None => return Next::End,
            }
            Next::Continue(None)
        })
    }

    fn over(&self) {
        BUFFER.with_borrow_mut(|buffer| {
            if let Err(error) = rustix::io::read(&self.fuse, &mut buffer[..]) {
                log_read_error(error);
            }
        });
    }

    fn removed(self: Arc<Self>) {
        if let Some(FuseSession { fuse, handler, stop, on_end }) = Arc::into_inner(self) {
            drop(fuse);
            drop(handler);
            if !stop.is_requested() {
                on_end();
            }
        }
    }
}

fn log_read_error(error: Errno) {
    // NODEV: the last mount and descriptor are gone.
    if error != Errno::NODEV {
        tracing::error!(%error, "cannot read /dev/fuse: a directory of loop devices ends");
    }
}
