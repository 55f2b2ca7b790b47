// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile kinds that send descriptors to the daemon. Each runs until it is killed.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, mkfifoat};
use rustix::net::sockopt::set_socket_linger;
use serde_json::json;

use super::fuse;
use super::kinds::Scene;
use super::wire::{FDS_MAX, Peer, call};

const PRIVATE: &str = "io.loopengine.Private";

/// A pool over the socket; dropping this ends the pool.
pub(super) struct Pool {
    pub(super) peer: Peer,
    pub(super) name: String,
    pub(super) mounts: Vec<OwnedFd>,
}

impl Pool {
    /// Opens a pool; retries while the daemon refuses.
    pub(super) fn open(scene: &mut Scene) -> Pool {
        loop {
            let peer = scene.connect();
            let spec =
                json!({ "spec": { "max": scene.random.u32(1..=4), "devAndSys": scene.random.bool() } });
            if let Ok((reply, mounts)) = peer.call(&format!("{PRIVATE}.Open"), &spec, &[])
                && let Some(name) = reply["name"].as_str()
            {
                return Pool { name: name.to_owned(), peer, mounts };
            }
            scene.rest(500);
        }
    }
}

/// Sends descriptors with a call that takes none, one or several, with an unknown call, or with an
/// incomplete call.
fn throw(scene: &mut Scene, pool: &Pool, what: &str, fds: &[OwnedFd]) {
    let name = &pool.name;
    let info = json!({ "offsetBytes": 0, "sizeLimitBytes": 0, "flags": 0, "fileName": [] });
    let request = json!({ "operation": "configure", "number": 0, "value": 0, "info": info });
    let (how, bytes) = match scene.random.u8(..6) {
        0 => ("List", call(&format!("{PRIVATE}.List"), &json!({}))),
        1 => ("an unknown call", call(&format!("{PRIVATE}.Nonsense"), &json!({}))),
        2 => ("Operate", call(&format!("{PRIVATE}.Operate"), &json!({ "name": name, "request": request }))),
        3 => ("Supervise", call(&format!("{PRIVATE}.Supervise"), &json!({ "name": name }))),
        4 => ("half a call", b"{\"method\":".to_vec()),
        _ => ("no JSON", b"]\0".to_vec()),
    };
    scene.say(format!("sends {} descriptors ({what}) with {how}", fds.len()));
    let peer = scene.connect();
    let fds: Vec<_> = fds.iter().take(FDS_MAX).map(AsFd::as_fd).collect();
    let _ = peer.send(&bytes, &fds);
    if scene.random.bool() {
        let _ = peer.reply();
    }
    scene.rest(50);
}

/// Sends many descriptors with each byte of an endless message.
pub(super) fn flood(scene: &mut Scene) -> Result<()> {
    let null = File::open("/dev/null")?;
    loop {
        let fds = vec![null.as_fd(); scene.random.usize(1..=FDS_MAX)];
        let peer = scene.connect();
        scene.say(format!("sends {} descriptors with each byte", fds.len()));
        let sent = (0..10_000).take_while(|_| peer.send(b"a", &fds).is_ok()).count();
        scene.say(format!("the daemon accepted {sent} messages with {} descriptors each", fds.len()));
        scene.rest(500);
    }
}

/// Sends descriptors with messages that are refused.
pub(super) fn refused(scene: &mut Scene) -> Result<()> {
    let null = File::open("/dev/null")?;
    let methods = ["List", "ListLimits", "Nonsense", "Close", "SetLimit"];
    loop {
        let fds = vec![null.as_fd(); scene.random.usize(1..=FDS_MAX)];
        let method = methods[scene.random.usize(..methods.len())];
        let bytes = call(&format!("{PRIVATE}.{method}"), &json!({}));
        scene.say(format!("sends {} descriptors with {method}", fds.len()));
        let peer = scene.connect();
        let _ = peer.send(&bytes, &fds);
        let _ = peer.reply();
    }
}

/// Sends descriptors that are no images.
pub(super) fn strange(scene: &mut Scene) -> Result<()> {
    let _ = mkfifoat(CWD, "fifo", Mode::RUSR | Mode::WUSR);
    let pool = Pool::open(scene);
    loop {
        let path = |path: &str, flags: OFlags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
        let (what, fd) = match scene.random.u8(..12) {
            0 => ("a FIFO", path("fifo", OFlags::RDWR)?),
            1 => ("a path of a FIFO", path("fifo", OFlags::PATH)?),
            2 => ("/dev/zero", path("/dev/zero", OFlags::RDWR)?),
            3 => ("a directory", path(".", OFlags::RDONLY)?),
            4 => ("a memfd", memfd_create("image", MemfdFlags::CLOEXEC)?),
            5 => ("a memfd with size", {
                let fd = memfd_create("image", MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&fd, 1 << 40)?;
                fd
            }),
            6 => ("a socket", UnixStream::pair()?.0.into()),
            7 => ("an eventfd", eventfd(1, EventfdFlags::CLOEXEC)?),
            8 => ("an epoll descriptor", epoll::create(epoll::CreateFlags::CLOEXEC)?),
            9 => ("a file of /proc", path("/proc/self/mem", OFlags::RDWR)?),
            10 => ("a user namespace", path("/proc/self/ns/user", OFlags::RDONLY)?),
            _ => ("a directory of the pool", pool.mounts[0].try_clone()?),
        };
        let count = scene.random.usize(1..=3);
        let fds: Vec<OwnedFd> = (0..count).map(|_| fd.try_clone()).collect::<Result<_, _>>()?;
        throw(scene, &pool, what, &fds);
    }
}

/// Sends files whose last close waits for a FUSE server that never answers. The server is a process
/// of its own; its death releases all waiters.
pub(super) fn hung_close(scene: &mut Scene) -> Result<()> {
    if !scene.inner {
        let server = fuse::Server::mount(&scene.home.join("fuse"), 0, fuse::Hang::Flush)?;
        // It waits forever, until it is killed like this process.
        let _inner = scene.start_inner()?;
        return server.serve();
    }
    let pool = Pool::open(scene);
    let path = scene.home.join("fuse/image");
    // The close in this process must not wait.
    let mut kept = Vec::new();
    loop {
        let count = scene.random.usize(1..=3);
        let fds: Vec<OwnedFd> = (0..count)
            .map(|_| OpenOptions::new().read(true).write(true).open(&path).map(OwnedFd::from))
            .collect::<Result<_, _>>()?;
        throw(scene, &pool, "files whose close hangs", &fds);
        kept.extend(fds);
        scene.rest(500);
    }
}

/// Sends TCP sockets whose last close waits for data that nobody reads.
pub(super) fn linger(scene: &mut Scene) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("the loopback interface is down")?;
    let address = listener.local_addr()?;
    let pool = Pool::open(scene);
    let mut unread = Vec::new();
    for _ in 0..500 {
        let mut stream = TcpStream::connect(address)?;
        unread.push(listener.accept()?.0);
        set_socket_linger(&stream, Some(Duration::from_secs(3600)))?;
        stream.set_nonblocking(true)?;
        let piece = vec![0; 1 << 16];
        while stream.write(&piece).is_ok() {}
        throw(scene, &pool, "a socket with SO_LINGER and unread data", &[stream.into()]);
    }
    scene.say("holds the other ends of these sockets");
    std::thread::sleep(Duration::from_secs(3600));
    Ok(())
}

/// Sends sockets that are in flight inside themselves.
pub(super) fn cycle(scene: &mut Scene) -> Result<()> {
    let pool = Pool::open(scene);
    loop {
        let (a, b) = UnixStream::pair()?;
        let (a, b) = (Peer(a), Peer(b));
        for _ in 0..scene.random.usize(1..=20) {
            a.send(b"x", &[b.0.as_fd(), a.0.as_fd()])?;
            b.send(b"x", &[a.0.as_fd()])?;
        }
        throw(scene, &pool, "sockets in flight in themselves", &[a.0.into(), b.0.into()]);
    }
}

/// Sends everything but the listener of a seccomp filter to supervise.
pub(super) fn supervise(scene: &mut Scene) -> Result<()> {
    let method = format!("{PRIVATE}.Supervise");
    loop {
        let pool = Pool::open(scene);
        for _ in 0..scene.random.u32(1..=20) {
            let count = scene.random.usize(..=6);
            let fds: Vec<OwnedFd> = (0..count).map(|_| odd(scene)).collect::<Result<_>>()?;
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            scene.say(format!("calls Supervise for {} with {count} wrong descriptors", pool.name));
            // A refused call may close the connection.
            if pool.peer.call(&method, &json!({ "name": pool.name }), &fds).is_err() {
                let peer = scene.connect();
                let _ = peer.call(&method, &json!({ "name": pool.name }), &fds);
            }
        }
    }
}

fn odd(scene: &mut Scene) -> Result<OwnedFd> {
    Ok(match scene.random.u8(..6) {
        0 => File::open("/proc/self/ns/user")?.into(),
        1 => File::open("/proc/self/ns/net")?.into(),
        2 => UnixStream::pair()?.0.into(),
        3 => File::open("/dev/null")?.into(),
        4 => eventfd(0, EventfdFlags::CLOEXEC)?,
        _ => OpenOptions::new().read(true).custom_flags(OFlags::PATH.bits() as i32).open("/")?.into(),
    })
}
