//! The file system of one instance: mounted on its directory, served by threads of its own, gone
//! with it.
//!
//! Knows mounts and sessions; what is asked of the files is the handler's business. Mounts and
//! unmounts by itself rather than with fuser, which would not end a file system in use.

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
use super::node::Nodes;
use crate::error::{Error, Kind, Result};
use crate::sandbox;
use crate::sys::{self, mntns};

/// What mount(8) shows as the source; by it stale mounts are known.
const SOURCE: &str = "loopengine";
const TYPE: &str = "fuse";
/// How long the threads of a file system may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Device numbers of all file systems of this engine: where images must not lie.
#[derive(Clone, Debug, Default)]
pub struct Mounts(Arc<Mutex<BTreeSet<u64>>>);

impl Mounts {
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one of them has this number.
    pub fn contains(&self, device_number: u64) -> bool {
        self.numbers().contains(&device_number)
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct FileSystem {
    nodes: Arc<Nodes>,
    notifier: Notifier,
    session: Mutex<Option<BackgroundSession>>,
    mounts: Mounts,
    device_number: u64,
}

impl FileSystem {
    /// Mounts one on `directory`, served by so many threads on these CPUs (all for none).
    pub(in crate::frontend) fn mount(
        directory: &Path,
        threads: usize,
        cpus: &[usize],
        mounts: &Mounts,
    ) -> Result<FileSystem> {
        let shown = directory.display();
        let device: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(NODE)
            .map_err(|error| Error::os(error, format!("cannot open {NODE}")))?
            .into();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        // The kernel checks modes and owners, for all users alike.
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
        let nodes = Arc::new(Nodes::new(directory.to_owned()));
        let started =
            start(nodes.clone(), device, threads, cpus.to_owned()).and_then(|(session, notifier)| {
                let stat = rustix::fs::stat(directory).map_err(|error| {
                    Error::os(error, format!("the file system on {shown} does not answer"))
                })?;
                let session = Mutex::new(Some(session));
                let device_number = stat.st_dev;
                Ok(FileSystem { nodes, notifier, session, mounts: mounts.clone(), device_number })
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

    pub(super) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    pub(super) fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    /// Refuses to go on when somebody has unmounted it.
    pub(super) fn check_mounted(&self) -> Result<()> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.as_ref().is_some_and(|session| !session.guard.is_finished()) {
            return Ok(());
        }
        let context = format!("the file system on {} was unmounted", self.nodes.directory.display());
        Err(Error::new(Kind::Unavailable, context).hint("restart the daemon"))
    }

    /// Unmounts it. What is still open fails from now on.
    pub(in crate::frontend) fn end(&self) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(session) = session else { return };
        let shown = self.nodes.directory.display();
        self.mounts.numbers().remove(&self.device_number);
        match abort(&self.nodes.directory) {
            // Somebody was faster.
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

impl Drop for FileSystem {
    fn drop(&mut self) {
        self.end();
    }
}

/// Ends the kernel's side at once, and takes the mount away whoever uses it.
fn abort(directory: &Path) -> rustix::io::Result<()> {
    unmount(directory, UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

/// Starts the threads. They inherit what is set for the one that starts them, so that is one made
/// for it.
fn start(
    nodes: Arc<Nodes>,
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
        // Nobody was asked anything yet, so that it is the first.
        let _ = nodes.notifier.set(notifier.clone());
        Ok((session.spawn().map_err(failed)?, notifier))
    });
    let starter = starter.map_err(|error| Error::os(error, "cannot start a thread"))?;
    starter.join().unwrap_or_else(|_| Err(Error::new(Kind::Internal, "starting a FUSE session panicked")))
}

/// Where file systems of this or a dead daemon are mounted below a run directory, youngest first.
pub fn mounted_below(run_dir: &Path) -> Vec<PathBuf> {
    mntns::mounted(TYPE, SOURCE).into_iter().filter(|target| target.parent() == Some(run_dir)).collect()
}

/// Takes away what a daemon that was killed has left mounted below its run directory, which must
/// be locked. Returns notes.
pub fn clear_stale(run_dir: &Path) -> Vec<String> {
    let unmounted = |target: PathBuf| match unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => format!("unmounted {}, which a daemon before this one left", target.display()),
        Err(error) => format!("cannot unmount {}: {error}", target.display()),
    };
    mounted_below(run_dir).into_iter().map(unmounted).collect()
}
