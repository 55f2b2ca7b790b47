// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file system of one instance: mounted on its directory, served by its own threads, unmounted
//! with it.
//!
//! Knows mounts and sessions; the handler implements the operations. Mounts and unmounts by itself
//! rather than with fuser, which would not end a file system in use.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Notifier, Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::NODE;
use super::handler::Handler;
use super::node::NodeTable;
use crate::error::{Error, Kind, Result};
use crate::sandbox;
use crate::sys::{self, mntns};

/// Source in the mount table; identifies stale mounts.
const SOURCE: &str = "loopengine";
const TYPE: &str = "fuse";
/// How long the threads of a file system may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Device numbers of all file systems of this engine, where no image may be.
#[derive(Clone, Debug, Default)]
pub struct FuseMounts(Arc<Mutex<BTreeSet<u64>>>);

impl FuseMounts {
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one of them has this device number.
    pub fn contains(&self, device_number: u64) -> bool {
        self.numbers().contains(&device_number)
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct FuseFileSystem {
    nodes: Arc<NodeTable>,
    notifier: Notifier,
    session: Mutex<Option<BackgroundSession>>,
    mounts: FuseMounts,
    device_number: u64,
}

impl FuseFileSystem {
    /// Mounts a file system on `directory`, served by this many threads on these CPUs (all if
    /// empty).
    pub(in crate::frontend) fn mount(
        directory: &Path,
        threads: usize,
        cpus: &[usize],
        mounts: &FuseMounts,
    ) -> Result<FuseFileSystem> {
        let shown = directory.display();
        let device: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(NODE)
            .map_err(|error| Error::os(error, format!("cannot open {NODE}")))?
            .into();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        // The kernel checks modes and owners, for all users.
        let options = format!(
            "fd={},rootmode=40755,user_id={uid},group_id={gid},default_permissions,allow_other",
            device.as_raw_fd()
        );
        let options = CString::new(options)
            .map_err(|error| Error::new(Kind::Internal, format!("mount options: {error}")))?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
        mount(SOURCE, directory, TYPE, flags, Some(&*options)).map_err(|error| {
            Error::os(error, format!("cannot mount a FUSE file system on {shown}"))
                .hint("the daemon needs root (CAP_SYS_ADMIN)")
        })?;
        let nodes = Arc::new(NodeTable::new(directory.to_owned()));
        let started =
            start(nodes.clone(), device, threads, cpus.to_owned()).and_then(|(session, notifier)| {
                let stat = rustix::fs::stat(directory).map_err(|error| {
                    Error::os(error, format!("the file system on {shown} does not answer"))
                })?;
                let session = Mutex::new(Some(session));
                let device_number = stat.st_dev;
                Ok(FuseFileSystem { nodes, notifier, session, mounts: mounts.clone(), device_number })
            });
        match started {
            Ok(files) => {
                mounts.numbers().insert(files.device_number);
                Ok(files)
            }
            Err(error) => {
                let _ = abort(directory);
                Err(error)
            }
        }
    }

    pub(super) fn nodes(&self) -> &NodeTable {
        &self.nodes
    }

    pub(super) fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Fails if the file system was unmounted.
    pub(super) fn check_mounted(&self) -> Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.as_ref().is_some_and(|session| !session.guard.is_finished()) {
            return Ok(());
        }
        let context = format!("the file system on {} was unmounted", self.nodes.directory.display());
        Err(Error::new(Kind::Unavailable, context).hint("restart the daemon"))
    }

    /// Unmounts it. Open files fail from now on.
    pub(in crate::frontend) fn end(&self) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(session) = session else { return };
        let shown = self.nodes.directory.display();
        self.mounts.numbers().remove(&self.device_number);
        match abort(&self.nodes.directory) {
            // It is unmounted already.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => tracing::error!(%error, "cannot unmount {shown}"),
        }
        let deadline = Instant::now() + END_LIMIT;
        while !session.guard.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        match session.guard.is_finished() {
            true => drop(session.join()),
            false => tracing::error!("the threads that serve {shown} did not end in time"),
        }
    }
}

impl Drop for FuseFileSystem {
    fn drop(&mut self) {
        self.end();
    }
}

/// Aborts the connection and unmounts it, even if in use.
fn abort(directory: &Path) -> rustix::io::Result<()> {
    unmount(directory, UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

/// Starts the threads. They inherit their starter's settings, so a new thread starts them.
fn start(
    nodes: Arc<NodeTable>,
    device: OwnedFd,
    threads: usize,
    cpus: Vec<usize>,
) -> Result<(BackgroundSession, Notifier)> {
    let starter = std::thread::Builder::new().name("fuse start".to_owned()).spawn(move || {
        sys::run_on(&cpus)?;
        sys::declare_io_flusher();
        sandbox::enter_io_thread();
        let mut config = Config::default();
        config.n_threads = Some(threads.max(1));
        // Each thread has a queue of its own in the kernel.
        config.clone_fd = true;
        let failed = |error| Error::os(error, "cannot start a FUSE session");
        let session =
            Session::from_fd(Handler::new(nodes.clone()), device, SessionACL::All, config).map_err(failed)?;
        let notifier = session.notifier();
        // Always the first: no request has arrived yet.
        let _ = nodes.notifier.set(notifier.clone());
        Ok((session.spawn().map_err(failed)?, notifier))
    });
    let starter = starter.map_err(|error| Error::os(error, "cannot start a thread"))?;
    starter.join().unwrap_or_else(|_| Err(Error::new(Kind::Internal, "starting a FUSE session panicked")))
}

/// Mount points of file systems of this or a dead daemon below a run directory, newest first.
pub fn mounted_below(run_dir: &Path) -> Vec<PathBuf> {
    mntns::mounted(TYPE, SOURCE).into_iter().filter(|target| target.parent() == Some(run_dir)).collect()
}

/// Unmounts what a killed daemon left below its run directory, which must be locked. Returns notes.
pub fn clear_stale(run_dir: &Path) -> Vec<String> {
    let unmounted = |target: PathBuf| match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => format!("unmounted {}, left by a previous daemon", target.display()),
        Err(error) => format!("cannot unmount {}: {error}", target.display()),
    };
    mounted_below(run_dir).into_iter().map(unmounted).collect()
}
