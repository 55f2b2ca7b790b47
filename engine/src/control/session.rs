// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client's connection: calls with a deadline, repeated if the daemon cannot have begun them.
//!
//! The daemon ends idle connections, and refuses those beyond a user's limit. In both cases the
//! client reconnects within the call's deadline. A call that the daemon may have begun is never
//! repeated. Every connection error names the socket and the next step.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use zlink::tokio::unix::{Connection, Stream};
use zlink::varlink_service::Error as Refusal;

use super::{Fault, PRIVATE_SOCKET, reason};
use crate::error::{Error, Kind, Result};
use crate::kernels;

/// Deadline of a call for one device: the daemon's own waits are a few seconds each.
pub(super) const ONE_MAX: Duration = Duration::from_secs(60);
/// How often a connection may end before a call was read, other than by a refusal.
const CUTS_MAX: u32 = 8;
/// Maximum pause before the client reconnects; pauses double up to this.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Pause before the next attempt while the daemon's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);
/// The daemon's error for a connection over the limit.
const TOO_MANY: &str = "io.loopengine.TooManyConnections";

pub(super) type CallResult<T> = zlink::Result<std::result::Result<T, Fault>>;

/// A client's connection.
#[derive(Debug)]
pub(super) struct ClientSession {
    connection: Connection,
    socket: PathBuf,
    daemon: Option<i32>,
}

/// Why a call was not executed.
enum NotExecuted {
    Refused,
    Cut,
}

impl ClientSession {
    /// Connects, or fails with a hint how to start the daemon.
    pub(super) async fn connect(socket: PathBuf) -> Result<ClientSession> {
        let (connection, daemon) = connect(&socket).await?;
        Ok(ClientSession { connection, socket, daemon })
    }

    pub(super) fn daemon_pid(&self) -> Option<i32> {
        self.daemon
    }

    /// Makes a call; repeats it on a new connection as long as the daemon has not read it.
    pub(super) async fn call<T>(
        &mut self,
        limit: Duration,
        mut call: impl AsyncFnMut(&mut Connection) -> CallResult<T>,
    ) -> Result<T> {
        let until = Instant::now() + limit;
        let (mut cuts, mut pause) = (0, Duration::from_millis(10));
        loop {
            let error = match timeout_at(until, call(&mut self.connection)).await {
                Ok(Ok(answer)) => return answer.map_err(Error::from),
                Ok(Err(error)) => error,
                Err(_) => return Err(timeout_error(&self.socket, limit)),
            };
            let (error, not_executed) = self.not_executed(error).await;
            match not_executed {
                Some(NotExecuted::Refused) if Instant::now() + pause < until => {}
                Some(NotExecuted::Cut) if cuts < CUTS_MAX && Instant::now() + pause < until => cuts += 1,
                _ => return Err(connection_error(&self.socket, error)),
            }
            sleep(pause).await;
            pause = (2 * pause).min(PAUSE_MAX);
            (self.connection, self.daemon) = connect(&self.socket).await?;
        }
    }

    /// Whether the daemon has certainly not read the failed call; and the error, which is the
    /// daemon's if it sent one before it closed the connection.
    async fn not_executed(&mut self, error: zlink::Error) -> (zlink::Error, Option<NotExecuted>) {
        // It was not sent: the connection was closed before, or with the call unread.
        let closed = matches!(&error, zlink::Error::Io(error)
            if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
        if !closed {
            let refused = is_refusal(&error).then_some(NotExecuted::Refused);
            return (error, refused);
        }
        let said = timeout(Duration::from_secs(1), self.connection.receive_reply::<(), Fault>()).await;
        match said.map(|said| said.map(drop)) {
            Ok(Err(said)) if is_refusal(&said) => (said, Some(NotExecuted::Refused)),
            Ok(Err(said @ zlink::Error::VarlinkService(_))) => (said, None),
            _ => (error, Some(NotExecuted::Cut)),
        }
    }
}

fn is_refusal(error: &zlink::Error) -> bool {
    matches!(error, zlink::Error::UnknownErrorReply(name) if name == TOO_MANY)
}

/// Connects once the daemon's backlog has room.
async fn wait_and_connect(socket: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(BACKLOG_PAUSE).await,
            connected => return connected,
        }
    }
}

async fn connect(socket: &Path) -> Result<(Connection, Option<i32>)> {
    let stream = match timeout(ONE_MAX, wait_and_connect(socket)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(unreachable(socket, &error)),
        Err(_) => return Err(timeout_error(socket, ONE_MAX)),
    };
    // 0 stands for a process of another PID namespace.
    let daemon = stream.peer_cred().ok().and_then(|peer| peer.pid()).filter(|pid| *pid != 0);
    let stream = Stream::try_from(stream).map_err(|error| connection_error(socket, error))?;
    Ok((Connection::new(stream), daemon))
}

/// Duplicates descriptors for one attempt: zlink closes those that it has sent.
pub(super) fn copies(files: &[OwnedFd]) -> zlink::Result<Vec<OwnedFd>> {
    files.iter().map(|file| file.try_clone().map_err(zlink::Error::Io)).collect()
}

/// zlink does not set it.
pub(super) fn close_on_exec(fds: &[OwnedFd]) -> zlink::Result<()> {
    for fd in fds {
        fcntl_setfd(fd, FdFlags::CLOEXEC).map_err(|error| zlink::Error::Io(error.into()))?;
    }
    Ok(())
}

fn unreachable(socket: &Path, error: &std::io::Error) -> Error {
    let shown = socket.display();
    let denied = error.kind() == ErrorKind::PermissionDenied;
    let message = format!("cannot reach the daemon at {shown}: {}", reason(error));
    if error.kind() == ErrorKind::NotADirectory {
        return Error::new(Kind::Invalid, message).hint("give the daemon's run directory with --run-dir");
    }
    if denied {
        return Error::new(Kind::Denied, message).hint(match socket.ends_with(PRIVATE_SOCKET) {
            true => "have root make the directories above it searchable ('chmod a+x')".to_owned(),
            false => kernels::without_root(),
        });
    }
    Error::new(Kind::Unavailable, message).hint(match rustix::process::geteuid().is_root() {
        true => "start it with 'loopengine serve'",
        false => "have root start it ('systemctl start loopengine', or 'loopengine serve')",
    })
}

fn timeout_error(socket: &Path, limit: Duration) -> Error {
    let (shown, seconds) = (socket.display(), limit.as_secs());
    let message = format!("the daemon at {shown} did not answer within {seconds} s");
    Error::new(Kind::Deadline, message).hint("look at its log")
}

/// The error of a failed connection.
fn connection_error(socket: &Path, error: zlink::Error) -> Error {
    let shown = socket.display();
    match error {
        zlink::Error::VarlinkService(error) if *error.inner() == Refusal::PermissionDenied => {
            let message = format!("the daemon at {shown} denies access to this user");
            Error::new(Kind::Denied, message).hint(kernels::without_root())
        }
        zlink::Error::VarlinkService(error) => {
            let message = format!("the daemon at {shown} does not know this call: {error}");
            Error::new(Kind::Unsupported, message)
                .hint("restart the daemon so that its version matches this program")
        }
        zlink::Error::UnknownErrorReply(name) if name == TOO_MANY => {
            let message = format!("this user has reached the limit of connections to the daemon at {shown}");
            Error::new(Kind::Quota, message).hint("end other calls of this user first, or try again")
        }
        zlink::Error::Io(error)
            if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
        {
            let message =
                format!("the daemon at {shown} closed {CUTS_MAX} connections without reading the call");
            Error::new(Kind::Unavailable, message).hint("look at its log")
        }
        zlink::Error::Io(error) => unreachable(socket, &error),
        zlink::Error::UnexpectedEof => {
            let message = format!("the daemon at {shown} closed the connection");
            Error::new(Kind::Unavailable, message).hint("see whether it is still running")
        }
        error => {
            let message = format!("cannot talk to the daemon at {shown}: {error}");
            Error::new(Kind::Io, message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::SOCKET;
    use crate::control::rundir::RunDir;
    use crate::limits;

    #[test]
    fn a_client_waits_for_room_in_a_short_backlog() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::take(dir.path()).unwrap();
        let listener = run.bind().unwrap();
        let socket = dir.path().join(SOCKET);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut waiting = Vec::new();
            let full = loop {
                match UnixStream::connect(&socket).await {
                    Ok(stream) => waiting.push(stream),
                    Err(error) => break error,
                }
                assert!(waiting.len() <= 100, "a flood of connections delays the others");
            };
            assert_eq!(full.kind(), ErrorKind::WouldBlock);
            // The kernel queues one more than it was asked for.
            assert_eq!(waiting.len(), limits::BACKLOG as usize + 1);
            let accepting = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                (listener.accept().unwrap(), listener)
            });
            let connected = timeout(Duration::from_secs(10), wait_and_connect(&socket)).await;
            assert!(connected.unwrap().is_ok());
            accepting.join().unwrap();
        });
    }
}
