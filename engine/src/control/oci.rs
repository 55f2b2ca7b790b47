// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Receives the message that container runtimes send to a seccomp listener socket: the container,
//! and the listener.
//!
//! Implements the message `containerProcessState` of the OCI runtime specification: one per
//! connection, as JSON, with descriptors. Does not know how a listener is used.
//!
//! A message is only as trusted as its runtime, and the annotations come from the container's
//! creator: they can tighten limits, never loosen them. Process ids are of the runtime's PID
//! namespace, and used in messages only.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg, sockopt::socket_peercred,
};
use serde::Deserialize;

use crate::error::{Error, Kind, Result};
use crate::private::{Caller, ContainerSession, Registry};

/// Bytes of a message at most.
pub const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors beside a message at most.
const FDS_MAX: usize = 8;
/// Deadline for a runtime's message: long, since a runtime is root's and machines are busy.
const DEADLINE: Duration = Duration::from_secs(30);
/// The listener's name in the specification.
const LISTENER: &str = "seccompFd";
/// The supported annotations: the pool, the number of devices, the file systems.
const POOL: &str = "io.loopengine.pool";
const MAX: &str = "io.loopengine.max";
const MOUNT: &str = "io.loopengine.mount";

/// A container whose system calls are supervised.
#[derive(Debug)]
pub struct Container {
    /// Its name with the runtime.
    pub id: String,
    /// The container's first process, and the one of the listener, in the runtime's PID namespace.
    pub pids: [i32; 2],
    /// The profile's metadata for us.
    pub metadata: String,
    /// The container's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The seccomp listener.
    pub listener: OwnedFd,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProcessStateMessage {
    oci_version: String,
    fds: Vec<String>,
    #[serde(default)]
    pid: i32,
    #[serde(default)]
    metadata: String,
    state: ContainerState,
}

#[derive(Deserialize)]
struct ContainerState {
    id: String,
    status: String,
    #[serde(default)]
    pid: i32,
    annotations: Option<BTreeMap<String, String>>,
}

/// Receives a container's message on `stream`. Runtimes run as root, or as one of `users`.
pub fn receive(stream: &UnixStream, users: &[u32]) -> Result<Container> {
    receive_until(stream, users, Instant::now() + DEADLINE)
}

fn receive_until(stream: &UnixStream, users: &[u32], deadline: Instant) -> Result<Container> {
    let peer = socket_peercred(stream)
        .map_err(|error| Error::os(error, "cannot get the credentials of a client"))?;
    let user = peer.uid.as_raw();
    if user != 0 && !users.contains(&user) {
        let message = format!("user {user} may not register containers");
        return Err(Error::new(Kind::Denied, message).hint("run the runtime as root"));
    }
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    loop {
        wait(stream, deadline)?;
        let more = read(stream, &mut bytes, &mut fds)?;
        match serde_json::from_slice(&bytes) {
            Ok(message) => return container(message, fds),
            // Some runtimes keep the connection open, so this does not wait for its end.
            Err(error) if error.is_eof() && more => {}
            Err(error) => return Err(refused(format!("it is not a containerProcessState: {error}"))),
        }
    }
}

fn wait(stream: &UnixStream, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let ready = match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => continue,
            other => other.map_err(|error| Error::os(error, "cannot wait for a runtime's message"))?,
        };
        return match ready {
            0 => Err(Error::new(Kind::Deadline, "a runtime did not send its message in time")),
            _ => Ok(()),
        };
    }
}

/// Reads available data. False: the end.
fn read(stream: &UnixStream, bytes: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> Result<bool> {
    // The kernel closes excess descriptors and reports that.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut part = [0; 4096];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = match recvmsg(stream, &mut [IoSliceMut::new(&mut part)], &mut ancillary, flags) {
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        other => other.map_err(|error| Error::os(error, "cannot receive a runtime's message"))?,
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
        return Err(refused("it carries too many file descriptors"));
    }
    bytes.extend_from_slice(part.get(..got.bytes).unwrap_or_default());
    if bytes.len() > MESSAGE_MAX {
        return Err(refused("it is too long"));
    }
    Ok(got.bytes > 0)
}

fn container(message: ProcessStateMessage, fds: Vec<OwnedFd>) -> Result<Container> {
    // crun sends 0.2.0 for the same format.
    let major = message.oci_version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_none_or(|major| major > 1) {
        return Err(refused("its version of the OCI specification is not supported"));
    }
    if message.fds.len() != fds.len() {
        let (named, received) = (message.fds.len(), fds.len());
        return Err(refused(format!("it names {named} file descriptors, but carries {received}")));
    }
    let ContainerState { id, status, pid, annotations } = message.state;
    let printable = |text: &str| !text.chars().any(char::is_control);
    if id.is_empty() || id.len() > 1024 || !printable(&id) {
        return Err(refused("the container has no usable name"));
    }
    if status == "stopped" {
        return Err(refused(format!("the container {id} has stopped")));
    }
    // Closes the other descriptors of the message.
    let mut listeners = message.fds.iter().zip(fds).filter(|(name, _)| *name == LISTENER);
    match (listeners.next(), listeners.next()) {
        (Some((_, listener)), None) => Ok(Container {
            id,
            pids: [pid, message.pid],
            metadata: message.metadata,
            annotations: annotations.unwrap_or_default(),
            listener,
        }),
        _ => Err(refused(format!("it does not carry exactly one {LISTENER}"))),
    }
}

fn refused(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, format!("a runtime's message is invalid: {why}"))
}

impl Container {
    /// The pool whose directory the container has, from the profile or else an annotation.
    pub fn pool(&self) -> Result<&str> {
        let named = self.metadata.strip_prefix("pool=").or(self.annotations.get(POOL).map(String::as_str));
        named.ok_or_else(|| {
            let message = format!("container {} names no private pool", self.id);
            Error::new(Kind::Invalid, message).hint(format!("give it the annotation {POOL}=NAME"))
        })
    }
}

impl Container {
    /// Its user namespace. crun sends no usable pid for an additional process.
    fn namespace(&self) -> Option<OwnedFd> {
        let mut pids = self.pids.iter().filter(|pid| **pid > 0);
        pids.find_map(|pid| std::fs::File::open(format!("/proc/{pid}/ns/user")).ok()).map(OwnedFd::from)
    }

    /// The annotated maximum number of devices.
    pub fn max(&self) -> Result<Option<u32>> {
        let Some(text) = self.annotations.get(MAX) else { return Ok(None) };
        let max = text.trim().parse().map_err(|_| {
            let message = format!("container {} has the annotation {MAX}={text:?}", self.id);
            Error::new(Kind::Invalid, message).hint("give it a number of devices")
        });
        max.map(Some)
    }

    /// The annotated file systems that the kernel may mount: comma-separated names, or empty.
    pub fn mounts(&self) -> Option<Vec<String>> {
        let names = self.annotations.get(MOUNT)?.split(',').map(str::trim);
        Some(names.filter(|name| !name.is_empty()).map(str::to_owned).collect())
    }
}

/// Receives a container, and starts to supervise it for the pool that it names: one that root has
/// opened and whose directory the container has. Returns the container and the pool.
pub fn take(stream: &UnixStream, registry: &Registry) -> Result<(String, String)> {
    let container = receive(stream, &[])?;
    let pool = container.pool()?.to_owned();
    let namespace = container.namespace();
    let (max, mounts) = (container.max()?, container.mounts());
    let Container { id, listener, .. } = container;
    let guest = ContainerSession { id: id.clone(), listener, namespace, max, mounts };
    registry.admit(&pool, guest, Caller { uid: 0, gid: 0, pid: None })?;
    Ok((id, pool))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::fs::File;
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsFd;

    /// As runc sends it.
    const RUNC: &str = r#"{"ociVersion":"1.0.2-dev","fds":["seccompFd"],"pid":4422,"metadata":"pool=ci",
        "state":{"ociVersion":"1.0.2-dev","id":"4f3a","status":"creating","pid":4422,
        "bundle":"/run/containerd/io.containerd.runtime.v2.task/default/4f3a",
        "annotations":{"io.loopengine.max":"4","io.loopengine.mount":"ext4, xfs,","other":"x"}}}"#;
    /// As crun sends it: without what is empty.
    const CRUN: &str = r#"{
        "ociVersion": "0.2.0", "fds": [ "seccompFd" ], "pid": 77,
        "state": { "ociVersion": "1.0", "id": "web", "pid": 77, "root": "/r", "bundle": "/b",
                   "status": "created", "created": "2024-01-01T00:00:00Z" } }
"#;

    fn own() -> Vec<u32> {
        vec![rustix::process::geteuid().as_raw()]
    }

    fn send(to: &UnixStream, text: &[u8], count: usize) {
        send_file(to, text, count, File::open("/dev/null").unwrap());
    }

    fn send_file(to: &UnixStream, text: &[u8], count: usize, file: impl AsFd) {
        let fds = vec![file.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if count > 0 {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(to, &[IoSlice::new(text)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    fn sent(text: &str, count: usize) -> Result<Container> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, text.as_bytes(), count);
        drop(theirs);
        receive(&ours, &own())
    }

    fn with(from: &str, to: &str) -> String {
        assert!(RUNC.contains(from), "{from}");
        RUNC.replacen(from, to, 1)
    }

    #[test]
    fn accepts_messages_of_runc_and_crun() {
        let runc = sent(RUNC, 1).unwrap();
        assert_eq!((runc.id.as_str(), runc.pids, runc.metadata.as_str()), ("4f3a", [4422; 2], "pool=ci"));
        assert_eq!(runc.annotations["other"], "x");
        assert_eq!(runc.pool().unwrap(), "ci");
        assert_eq!(runc.max().unwrap(), Some(4));
        assert_eq!(runc.mounts().unwrap(), ["ext4", "xfs"]);
        for wrong in ["", "-1", "4 devices", "99999999999"] {
            let more = sent(&with("\"4\"", &format!("{wrong:?}")), 1).unwrap();
            assert_eq!(more.max().unwrap_err().kind(), Kind::Invalid, "{wrong:?}");
        }
        let crun = sent(CRUN, 1).unwrap();
        assert_eq!((crun.id.as_str(), crun.pids, crun.metadata.as_str()), ("web", [77; 2], ""));
        assert_eq!(crun.pool().unwrap_err().kind(), Kind::Invalid);
        assert_eq!((crun.max().unwrap(), crun.mounts()), (None, None));
        let more = with(r#"["seccompFd"]"#, r#"["pidFd","seccompFd"]"#);
        sent(&more, 2).unwrap();
    }

    #[test]
    fn accepts_a_message_in_pieces_without_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            let (first, rest) = RUNC.split_at(30);
            send(&theirs, first.as_bytes(), 1);
            for piece in rest.as_bytes().chunks(100) {
                std::thread::sleep(Duration::from_millis(1));
                (&theirs).write_all(piece).unwrap();
            }
            theirs
        });
        assert_eq!(receive(&ours, &own()).unwrap().id, "4f3a");
        drop(sender.join().unwrap());
    }

    #[test]
    fn rejects_descriptors_that_do_not_match_their_names() {
        for (text, count) in [
            (RUNC.to_owned(), 0),
            (RUNC.to_owned(), 2),
            (RUNC.to_owned(), FDS_MAX),
            (RUNC.to_owned(), FDS_MAX + 1),
            (RUNC.to_owned(), 64),
            (with(r#"["seccompFd"]"#, "[]"), 0),
            (with(r#"["seccompFd"]"#, r#"["other"]"#), 1),
            (with(r#"["seccompFd"]"#, r#"["seccompFd","seccompFd"]"#), 2),
        ] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (mut reader, writer) = std::io::pipe().unwrap();
            send_file(&theirs, text.as_bytes(), count, &writer);
            drop((theirs, writer));
            assert_eq!(receive(&ours, &own()).unwrap_err().kind(), Kind::Invalid, "{count} {text}");
            drop(ours);
            // The end comes when nobody has the other side any more.
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn rejects_hostile_messages() {
        let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
        let long = format!(r#"{{"ociVersion":"{}"#, "x".repeat(MESSAGE_MAX));
        let cases = [
            String::new(),
            "null".to_owned(),
            "{}".to_owned(),
            "{".to_owned(),
            "GET / HTTP/1.1\r\n\r\n".to_owned(),
            "\u{0}".to_owned(),
            deep.clone(),
            with("\"4f3a\"", &deep),
            RUNC[..RUNC.len() - 1].to_owned(),
            format!("{RUNC}{RUNC}"),
            with("1.0.2-dev", "2.0.0"),
            with("1.0.2-dev", ""),
            with("4f3a", ""),
            with("4f3a", "a\\u001b[31m"),
            with("4f3a", &"x".repeat(1025)),
            with("creating", "stopped"),
            with("4422", "99999999999"),
            with("4422", "\"4422\""),
            with(r#""pid":4422,"#, r#""pid":1,"pid":2,"#),
            with(r#""x""#, "1"),
        ];
        for text in &cases {
            let (ours, theirs) = UnixStream::pair().unwrap();
            if text.is_empty() {
                drop(theirs);
            } else {
                send(&theirs, text.as_bytes(), 1);
                drop(theirs);
            }
            assert_eq!(receive(&ours, &own()).unwrap_err().kind(), Kind::Invalid, "{text:.100}");
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || (&theirs).write_all(long.as_bytes()));
        assert!(receive(&ours, &own()).unwrap_err().message().contains("too long"));
        drop(ours);
        let _ = writer.join().unwrap();
    }

    #[test]
    fn times_out_without_a_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let soon = Instant::now() + Duration::from_millis(50);
        assert_eq!(receive_until(&ours, &own(), soon).unwrap_err().kind(), Kind::Deadline);
        send(&theirs, b"{", 0);
        let soon = Instant::now() + Duration::from_millis(50);
        assert_eq!(receive_until(&ours, &own(), soon).unwrap_err().kind(), Kind::Deadline);
    }

    #[test]
    fn rejects_other_users() {
        if own() == [0] {
            println!("skipped: root is never a stranger");
            return;
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(receive(&ours, &[]).unwrap_err().kind(), Kind::Denied);
    }

    proptest! {
        #[test]
        fn nothing_panics(at in 0..RUNC.len(), byte: u8) {
            let mut text = RUNC.as_bytes().to_vec();
            text[at] = byte;
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&theirs, &text, 1);
            drop(theirs);
            if let Ok(container) = receive(&ours, &own()) {
                let _ = container.pool();
            }
        }
    }
}
