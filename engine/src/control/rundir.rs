// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The run directory: checked, locked by one daemon, with its sockets, which the service manager
//! may have created.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

use super::{OCI_SOCKET, PRIVATE_SOCKET, SOCKET, reason};
use crate::error::{Error, Kind, Result};
use crate::limits::BACKLOG;

/// Names of all sockets.
const SOCKETS: [&str; 3] = [SOCKET, PRIVATE_SOCKET, OCI_SOCKET];

/// A run directory, locked while this lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
    /// Sockets of the service manager, by name.
    kept: BTreeMap<&'static str, UnixListener>,
}

impl RunDir {
    /// Creates `path` if it is missing, rejects it if others may write to it, locks it.
    pub fn take(path: &Path) -> Result<RunDir> {
        let shown = path.display();
        if path.exists() && !path.is_dir() {
            let message = format!("cannot use {shown} as the run directory: it is not a directory");
            return Err(Error::new(Kind::Invalid, message).hint("give another with --run-dir"));
        }
        let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
        made.map_err(|error| Error::os(error, format!("cannot create the run directory {shown}")))?;
        // Absolute, because device names in it are links that others follow.
        let path = fs::canonicalize(path)
            .map_err(|error| Error::os(error, format!("cannot use the run directory {shown}")))?;
        check_private(&path)?;
        let lock = lock(&path)?;
        Ok(RunDir { path, _lock: lock, kept: BTreeMap::new() })
    }

    /// Uses these sockets of the service manager instead of creating them. They stay when the
    /// daemon ends, and new connections wait for the next one.
    pub fn adopt(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        for socket in sockets {
            let listens = socket_acceptconn(&socket).unwrap_or(false)
                && socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
            let socket = UnixListener::from(socket);
            let path = socket.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
            let shown = path.as_deref().unwrap_or(Path::new("without a path")).display();
            let directory = path.as_deref().and_then(Path::parent).and_then(|dir| fs::canonicalize(dir).ok());
            let name = path.as_deref().and_then(Path::file_name);
            let name = SOCKETS.into_iter().find(|known| name.is_some_and(|name| name == *known));
            match name.filter(|_| listens && directory.as_ref() == Some(&self.path)) {
                Some(name) => {
                    // New connections see this process as the listener, not the manager.
                    rustix::net::listen(&socket, BACKLOG)
                        .map_err(|error| Error::os(error, format!("cannot listen on the socket {shown}")))?;
                    self.kept.insert(name, socket);
                }
                None => {
                    let message = format!(
                        "the service manager passed the socket {shown}, which this daemon does not use"
                    );
                    let ours = format!("{}/{}", self.path.display(), SOCKETS.join(", "));
                    return Err(Error::new(Kind::Invalid, message)
                        .hint(format!("have ListenStream= name some of {ours}, as loopengine.socket does")));
                }
            }
        }
        Ok(())
    }

    /// The absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Binds the control socket, for root and the daemon's user only. Replaces the socket of a dead
    /// daemon.
    pub fn bind(&self) -> Result<UnixListener> {
        self.bind_as(SOCKET, 0o600)
    }

    /// Binds the socket for private pools, open to everybody. Makes this directory searchable, but
    /// not readable, for others: names in it can be guessed anyway.
    pub fn bind_private(&self) -> Result<UnixListener> {
        let mode = fs::metadata(&self.path).map(|meta| meta.mode() & 0o7777);
        mode.and_then(|mode| fs::set_permissions(&self.path, Permissions::from_mode(mode | 0o011))).map_err(
            |error| Error::os(error, format!("cannot make {} searchable for others", self.path.display())),
        )?;
        self.bind_as(PRIVATE_SOCKET, 0o666)
    }

    /// Binds the socket for container runtimes, for root only.
    pub fn bind_oci(&self) -> Result<UnixListener> {
        self.bind_as(OCI_SOCKET, 0o600)
    }

    fn bind_as(&self, name: &str, mode: u32) -> Result<UnixListener> {
        let socket = self.path.join(name);
        let context = || format!("cannot create the socket {}", socket.display());
        if let Some(kept) = self.kept.get(name) {
            let listener = kept.try_clone().map_err(|error| Error::os(error, context()))?;
            fs::set_permissions(&socket, Permissions::from_mode(mode))
                .and_then(|()| listener.set_nonblocking(true))
                .map_err(|error| Error::os(error, format!("cannot use the socket {}", socket.display())))?;
            return Ok(listener);
        }
        // Binds under another name until its mode is set, so that it never appears with a wrong
        // one.
        let fresh = self.path.join(format!(".{name}.new"));
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).map_err(|e| Error::os(e, context()))?;
        rustix::net::listen(&listener, BACKLOG).map_err(|error| Error::os(error, context()))?;
        fs::set_permissions(&fresh, Permissions::from_mode(mode))
            .and_then(|()| fs::rename(&fresh, &socket))
            .and_then(|()| listener.set_nonblocking(true))
            .map_err(|error| Error::os(error, context()))?;
        Ok(listener)
    }

    /// Removes the sockets, so that clients fail immediately; not those of the service manager.
    pub fn unbind(&self) {
        for name in SOCKETS.into_iter().filter(|name| !self.kept.contains_key(name)) {
            let _ = fs::remove_file(self.path.join(name));
        }
    }
}

fn check_private(path: &Path) -> Result<()> {
    let shown = path.display();
    let meta = fs::metadata(path)
        .map_err(|error| Error::os(error, format!("cannot use the run directory {shown}")))?;
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own {
        let message = format!("the run directory {shown} belongs to user {}", meta.uid());
        return Err(Error::new(Kind::Denied, message).hint("give a directory of your own with --run-dir"));
    }
    if meta.mode() & 0o022 != 0 {
        let message = format!("others may write to the run directory {shown}");
        return Err(Error::new(Kind::Denied, message)
            .hint(format!("run 'chmod go-w {shown}', or give another with --run-dir")));
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File> {
    let file = path.join("lock");
    let context = || format!("cannot lock {}", file.display());
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&file)
        .map_err(|error| Error::os(error, context()))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut owner = String::new();
            let _ = (&lock).take(20).read_to_string(&mut owner);
            let shown = path.display();
            let message = match owner.trim() {
                "" => format!("another daemon uses {shown}"),
                owner => format!("another daemon (process {owner}) uses {shown}"),
            };
            return Err(Error::new(Kind::Busy, message)
                .hint("stop it first, or give another directory with --run-dir"));
        }
        Err(error) => {
            let text = format!("{}: {}", context(), reason(&error.into()));
            return Err(Error::new(Kind::Io, text));
        }
    }
    // For the message above only.
    let _ = lock.set_len(0);
    let _ = writeln!(lock, "{}", std::process::id());
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_a_directory_for_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/run");
        let first = RunDir::take(&path).unwrap();
        let second = RunDir::take(&path).unwrap_err();
        assert_eq!(second.kind(), Kind::Busy);
        assert!(second.message().contains(&std::process::id().to_string()));
        drop(first);
        RunDir::take(&path).unwrap();
    }

    #[test]
    fn rejects_a_directory_that_others_may_write_to() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o775, 0o757, 0o1777] {
            fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(RunDir::take(dir.path()).unwrap_err().kind(), Kind::Denied);
        }
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        RunDir::take(dir.path()).unwrap();
    }

    #[test]
    fn rejects_a_file_as_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = RunDir::take(file.path()).unwrap_err();
        assert!(error.message().contains("run directory"), "{error}");
    }

    #[test]
    fn the_socket_is_private_and_replaces_a_stale_one() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::take(dir.path()).unwrap();
        drop(run.bind().unwrap());
        let listener = run.bind().unwrap();
        let socket = dir.path().join(SOCKET);
        assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(&socket).unwrap();
        drop(listener);
        run.unbind();
        assert!(!socket.exists());
    }

    #[test]
    fn sockets_of_the_service_manager_are_used_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = RunDir::take(dir.path()).unwrap();
        let sockets = [SOCKET, PRIVATE_SOCKET].map(|name| dir.path().join(name));
        let listen = |path: &Path| OwnedFd::from(UnixListener::bind(path).unwrap());
        let theirs: Vec<OwnedFd> = sockets.iter().map(|path| listen(path)).collect();
        run.adopt(theirs).unwrap();
        let own = (run.bind().unwrap(), run.bind_private().unwrap(), run.bind_oci().unwrap());
        let client = std::os::unix::net::UnixStream::connect(&sockets[0]).unwrap();
        own.0.accept().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(sockets.each_ref().map(|path| mode(path)), [0o600, 0o666]);
        run.unbind();
        assert!(sockets.iter().all(|path| path.exists()) && !dir.path().join(OCI_SOCKET).exists());
        drop(client);

        let elsewhere = tempfile::tempdir().unwrap();
        let stranger = |name: &str| listen(&elsewhere.path().join(name));
        let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let wrong = [
            stranger(SOCKET),
            listen(&dir.path().join("other")),
            connected.into(),
            File::open("/").unwrap().into(),
        ];
        for socket in wrong {
            let error = run.adopt(vec![socket]).unwrap_err();
            assert!(error.kind() == Kind::Invalid && error.to_string().contains("ListenStream="), "{error}");
        }
    }

    #[test]
    fn everybody_reaches_only_the_private_socket() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        let run = RunDir::take(dir.path()).unwrap();
        let _control = run.bind().unwrap();
        let _private = run.bind_private().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(dir.path()), 0o711, "of a directory that was 0700");
        assert_eq!(mode(&dir.path().join(PRIVATE_SOCKET)), 0o666);
        for private in [SOCKET, "lock"] {
            assert_eq!(mode(&dir.path().join(private)), 0o600);
        }
        run.unbind();
        assert!(!dir.path().join(PRIVATE_SOCKET).exists());
    }
}
