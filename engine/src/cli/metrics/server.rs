// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves metrics over HTTP, on a Unix socket or a loopback address.
//!
//! Clients are strangers: they are few at a time, each has a deadline, and one scrape asks the daemon
//! at a time. hyper parses what they send.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::Snapshot;
use super::text::TextFormat;
use crate::error::{Error, Kind, Result};

/// Connections at a time; more wait in the socket's backlog.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may last.
const CONNECTION_MAX: Duration = Duration::from_secs(30);
/// How long a client may take for a request's head, and its bytes.
const HEAD_MAX: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 << 10;
/// After a failure to accept: out of descriptors, for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ListenAddress {
    Unix(PathBuf),
    Loopback(SocketAddr),
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return match path.is_absolute() {
                true => Ok(ListenAddress::Unix(path)),
                false => Err("give an absolute path after 'unix:'".to_owned()),
            };
        }
        let address: SocketAddr = text
            .parse()
            .map_err(|_| "give unix:PATH, or an address and a port, such as 127.0.0.1:9753".to_owned())?;
        match address.ip().is_loopback() {
            true => Ok(ListenAddress::Loopback(address)),
            false => Err("not a loopback address: metrics name users and their files, and there is no \
                          password; let a proxy serve them to other machines"
                .to_owned()),
        }
    }
}

/// Serves until SIGINT or SIGTERM.
pub(super) async fn serve(address: &ListenAddress, run_dir: &Path) -> Result<()> {
    let failed = |error| Error::os(error, "cannot wait for signals");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let run_dir = Arc::new(Mutex::new(run_dir.to_owned()));
    let tasks = LocalSet::new();
    let listener = Listener::bind(address).await?;
    ready();
    tokio::select! {
        () = tasks.run_until(accept(&listener, run_dir)) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    if let ListenAddress::Unix(path) = address {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

enum Listener {
    Unix(UnixListener),
    Loopback(TcpListener),
}

impl Listener {
    async fn bind(address: &ListenAddress) -> Result<Listener> {
        match address {
            ListenAddress::Unix(path) => bind(path).map(Listener::Unix),
            ListenAddress::Loopback(address) => match TcpListener::bind(address).await {
                Ok(listener) => Ok(Listener::Loopback(listener)),
                Err(error) => Err(Error::os(error, format!("cannot listen on {address}"))),
            },
        }
    }
}

/// The run directory, locked by the scrape that asks its daemon.
type RunDir = Arc<Mutex<PathBuf>>;

/// Serves connections. Never returns.
async fn accept(listener: &Listener, run_dir: RunDir) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.ok();
        let accepted = match listener {
            Listener::Unix(listener) => {
                listener.accept().await.map(|(stream, _)| start(stream, slot, &run_dir))
            }
            Listener::Loopback(listener) => {
                listener.accept().await.map(|(stream, _)| start(stream, slot, &run_dir))
            }
        };
        if accepted.is_err() {
            sleep(ACCEPT_PAUSE).await;
        }
    }
}

/// Tells the service manager.
fn ready() {
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
}

/// A socket for root only. One that nobody serves any more is replaced.
fn bind(path: &Path) -> Result<UnixListener> {
    let cannot = |error| Error::os(error, format!("cannot listen on {}", path.display()));
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                let message = format!("another process listens on {}", path.display());
                return Err(Error::new(Kind::Exists, message).hint("stop it, or choose another path"));
            }
            Err(_) => std::fs::remove_file(path).map_err(cannot)?,
        }
    }
    let listener = UnixListener::bind(path).map_err(cannot)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(cannot)?;
    Ok(listener)
}

/// Serves one connection, which holds its slot.
fn start(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    slot: Option<OwnedSemaphorePermit>,
    run_dir: &RunDir,
) {
    let run_dir = Arc::clone(run_dir);
    tokio::task::spawn_local(async move {
        let answer = service_fn(move |request| answer(request, Arc::clone(&run_dir)));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), answer);
        // A client that goes away, or sends garbage, has its answer or needs none.
        let _ = timeout(CONNECTION_MAX, connection).await;
        drop(slot);
    });
}

async fn answer(
    request: Request<Incoming>,
    run_dir: RunDir,
) -> std::result::Result<Response<Full<Bytes>>, Infallible> {
    let reply = |status, kind: &'static str, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        Ok(response)
    };
    let plain = "text/plain; charset=utf-8";
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let format = TextFormat::accepted(accept.unwrap_or_default());
    if request.uri().path() != "/metrics" {
        return reply(StatusCode::NOT_FOUND, plain, "see /metrics\n".to_owned());
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, plain, "use GET\n".to_owned());
    }
    let snapshot = Snapshot::take(&run_dir.lock().await).await;
    // A daemon that restarts is no failure of the scrape.
    if let Err(error) = &snapshot {
        tracing::warn!("{error}");
    }
    match format.render(snapshot.ok().as_ref()) {
        Ok(text) => reply(StatusCode::OK, format.content_type(), text),
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, plain, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listens_on_this_machine_only() {
        let parsed = |text: &str| text.parse::<ListenAddress>();
        assert_eq!(parsed("unix:/run/x"), Ok(ListenAddress::Unix("/run/x".into())));
        assert!(matches!(parsed("127.0.0.1:9753"), Ok(ListenAddress::Loopback(_))));
        assert!(matches!(parsed("[::1]:9753"), Ok(ListenAddress::Loopback(_))));
        for (text, says) in [
            ("unix:x", "absolute"),
            ("0.0.0.0:9753", "not a loopback address"),
            ("[::]:9753", "not a loopback address"),
            ("192.168.1.1:80", "not a loopback address"),
            ("127.0.0.1", "a port"),
            ("/run/x", "unix:PATH"),
        ] {
            assert!(parsed(text).unwrap_err().contains(says), "{text}");
        }
    }
}
