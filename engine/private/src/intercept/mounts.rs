// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One intercepted mount(2) or umount2(2): copied once, and passed to a [`MountHandler`].
//!
//! In containers the handler is the daemon (`private::container_mounts`). Elsewhere it is a
//! *mounter*: a FUSE driver, run as the caller, mounts a loop device. The mounter starts the
//! driver. It is a process in the caller's own user namespace, which `loopengine run` starts
//! outside of the filter. It has no more rights than the caller, and the caller controls it, so it
//! may decide everything: whether the source is a loop device of the pool, how paths resolve, which
//! errno the call gets. The daemon resolves no path of the tenant. It accepts from the mounter only
//! what the caller could do itself: an errno, or that the kernel serves the call.
//!
//! Where the tenant may have mounts by the kernel, the mounter may request one instead of a result.
//! It sends a device number, gets a detached mount, and attaches it at the path, by its own rights.
//! File system, flags and options are those of the copied call.
//!
//! Knows the arguments of mount(2) and the messages to the mounter. Does not know file systems.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use serde::{Deserialize, Serialize};

use super::caller::{Administrators, CallerThread};
use super::calls::CallAction;
use super::devtmpfs::DEVTMPFS;
use super::filter::Abi;
use crate::error::{Error, Kind, Result};
use crate::loops::Answer;
use crate::sys::descriptor::is_packet_socket;
use crate::sys::packet;
pub use crate::sys::packet::pair;
use crate::sys::process::ProcFds;

/// Timeout of a mounter; shorter than that of a call.
const MOUNTER_TIMEOUT: Duration = Duration::from_secs(40);
/// Interval of checks whether the caller still waits.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Maximum bytes of a path and of the options, as in the kernel.
const TEXT_MAX: usize = 4096;
const TYPE_MAX: usize = 64;
/// Maximum bytes of a message: three texts, with up to four characters per byte.
const MESSAGE_MAX: usize = 3 * 4 * TEXT_MAX + 4096;

/// Flags of calls that the kernel serves: bind, remount, move, and change of propagation.
const NO_NEW_MOUNT: u64 = libc::MS_BIND
    | libc::MS_REMOUNT
    | libc::MS_MOVE
    | libc::MS_UNBINDABLE
    | libc::MS_PRIVATE
    | libc::MS_SLAVE
    | libc::MS_SHARED;
const MAGIC: u64 = libc::MS_MGC_VAL;
const MAGIC_MASK: u64 = libc::MS_MGC_MSK;

/// The mounter's result for a source that is no device of the pool.
const PASS: i32 = -1;
/// The mounter's request of a mount by the kernel, followed by the device number, eight bytes.
const MOUNT_BY_KERNEL: i32 = -2;

/// The arguments of a mount(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// Path of the device.
    pub source: Vec<u8>,
    /// Path of the mount point.
    pub target: Vec<u8>,
    /// The file system.
    pub kind: String,
    /// `MS_*`.
    pub flags: u64,
    /// Options of the file system.
    pub data: String,
}

impl MountRequest {
    /// The result for a caller that tries all file systems in silence, as mount(8) does on a device
    /// without a signature: a failed attempt may have let the driver unbind the device.
    pub fn attempted<T>(&self, result: Answer<T>) -> Answer<T> {
        let unbound = self.flags & libc::MS_SILENT != 0 && matches!(result, Err(Errno::NXIO));
        if unbound { Err(Errno::INVAL) } else { result }
    }
}

/// A call, as the mounter gets it.
#[derive(Debug)]
pub struct MounterRequest {
    /// Its arguments.
    pub mount: MountRequest,
    /// The caller's root directory.
    pub root: OwnedFd,
    /// Its working directory.
    pub cwd: OwnedFd,
    /// Its mount namespace.
    pub namespace: OwnedFd,
    reply: OwnedFd,
}

/// Serves mounts of the administrators under a filter. The kernel serves other callers.
pub trait MountHandler: Send + Sync {
    /// Whether it serves mounts such as this one; false: the kernel does.
    fn serves(&self, _request: &MountRequest) -> bool {
        true
    }

    /// Serves a mount. None: the kernel serves it. `is_waiting`: whether the caller still waits.
    fn mount(
        &self,
        request: &MountRequest,
        proc_fds: ProcFds,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<()>>;

    /// The same for umount2(2).
    fn umount(
        &self,
        _asked: &UnmountRequest,
        _proc_fds: ProcFds,
        _waits: &dyn Fn() -> bool,
    ) -> Answer<Option<()>> {
        Ok(None)
    }
}

/// The arguments of an umount2(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmountRequest {
    /// Path of a mount.
    pub path: Vec<u8>,
    /// `MNT_*` and `UMOUNT_NOFOLLOW`.
    pub flags: u32,
}

/// Serves an intercepted mount(2).
pub(super) fn mount(
    mounts: &dyn MountHandler,
    thread: &CallerThread<'_>,
    abi: Abi,
    args: &[u64; 6],
    administrators: Administrators,
) -> CallAction {
    let Some(request) = copy_mount(thread, abi, args).filter(|request| mounts.serves(request)) else {
        return CallAction::Pass;
    };
    act_as_admin(thread, administrators, |proc_fds| mounts.mount(&request, proc_fds, &|| thread.is_waiting()))
}

/// Serves an intercepted umount2(2).
pub(super) fn umount(
    mounts: &dyn MountHandler,
    thread: &CallerThread<'_>,
    abi: Abi,
    args: &[u64; 6],
    administrators: Administrators,
) -> CallAction {
    let Some(path) = read_c_string(thread, address(abi, args, 0), TEXT_MAX) else { return CallAction::Pass };
    // The kernel uses 32 bits.
    let request = UnmountRequest { path, flags: args[1] as u32 };
    act_as_admin(thread, administrators, |proc_fds| {
        mounts.umount(&request, proc_fds, &|| thread.is_waiting())
    })
}

fn act_as_admin(
    thread: &CallerThread<'_>,
    administrators: Administrators,
    act: impl FnOnce(ProcFds) -> Answer<Option<()>>,
) -> CallAction {
    // Others get EPERM from the kernel, and must not use the daemon's rights.
    if !thread.is_admin(administrators) {
        return CallAction::Pass;
    }
    match thread.proc_fds().and_then(act) {
        Ok(None) => CallAction::Pass,
        Ok(Some(())) => CallAction::Answer(Ok(0)),
        Err(errno) => CallAction::Answer(Err(errno)),
    }
}

/// Mounts by the kernel for a mounter.
pub trait KernelMounter: Send + Sync {
    /// Returns a detached mount of the device with this number. Must check device and file system:
    /// the mounter is not trusted. `is_waiting`: whether the caller still waits.
    fn mount(&self, request: &MountRequest, device: u64, is_waiting: &dyn Fn() -> bool) -> Answer<OwnedFd>;
}

/// The daemon's end of the socket to a mounter. It is not trusted.
pub struct MounterSocket {
    socket: OwnedFd,
    kernel: Option<Box<dyn KernelMounter>>,
}

impl std::fmt::Debug for MounterSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MounterSocket").field("kernel", &self.kernel.is_some()).finish_non_exhaustive()
    }
}

/// A reply of a mounter.
#[derive(Debug, PartialEq, Eq)]
enum MounterReply {
    Done,
    Pass,
    ByKernel(u64),
}

/// Refuses a descriptor that is no packet socket, without a request to its file system.
pub fn check_socket(socket: &OwnedFd) -> Result<()> {
    match is_packet_socket(socket) {
        true => Ok(()),
        false => Err(Error::new(Kind::Invalid, "the file descriptor of the mounter is not a packet socket")
            .hint("pass one end of a socketpair(2) of the type SOCK_SEQPACKET")),
    }
}

impl MounterSocket {
    /// Takes over a packet socket. `kernel`: if the tenant may have mounts by the kernel.
    pub fn new(socket: OwnedFd, kernel: Option<Box<dyn KernelMounter>>) -> Result<MounterSocket> {
        check_socket(&socket)?;
        Ok(MounterSocket { socket, kernel })
    }

    /// Ends the mounter, and waits until it has unmounted. False: timeout.
    pub fn end(&self, within: Duration) -> bool {
        let _ = shutdown(&self.socket, Shutdown::Write);
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
            match poll(&mut fds, Some(&left)) {
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

impl MountHandler for MounterSocket {
    fn mount(
        &self,
        request: &MountRequest,
        proc_fds: ProcFds,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<()>> {
        let [root, cwd, namespace] = proc_fds;
        let (reply, theirs) = pair()?;
        let message = serde_json::to_vec(request).map_err(|_| Errno::INVAL)?;
        let fds = [theirs.as_fd(), root.as_fd(), cwd.as_fd(), namespace.as_fd()];
        // If the mounter is gone, or receives nothing, only the mount fails.
        packet::send(self.socket.as_fd(), &message, &fds).map_err(|_| Errno::IO)?;
        drop(theirs);
        let until = Instant::now() + MOUNTER_TIMEOUT;
        match wait_for_reply(&reply, until, is_waiting)? {
            MounterReply::Done => Ok(Some(())),
            MounterReply::Pass => Ok(None),
            MounterReply::ByKernel(device) => {
                let kernel = self.kernel.as_ref().ok_or(Errno::NODEV);
                // Only once: the next reply must be final.
                match kernel.and_then(|kernel| kernel.mount(request, device, is_waiting)) {
                    Ok(mount) => packet::send(reply.as_fd(), &0_i32.to_ne_bytes(), &[mount.as_fd()])?,
                    Err(errno) => packet::send(reply.as_fd(), &errno.raw_os_error().to_ne_bytes(), &[])?,
                }
                match wait_for_reply(&reply, until, is_waiting)? {
                    MounterReply::Done => Ok(Some(())),
                    _ => Err(Errno::IO),
                }
            }
        }
    }
}

/// Waits for a reply of the mounter.
fn wait_for_reply(reply: &OwnedFd, until: Instant, is_waiting: &dyn Fn() -> bool) -> Answer<MounterReply> {
    while Instant::now() < until && is_waiting() {
        match poll(&mut [PollFd::new(reply, PollFlags::IN)], Some(&POLL_INTERVAL)) {
            Ok(0) | Err(Errno::INTR) => {}
            _ => return read(reply),
        }
    }
    Err(Errno::TIMEDOUT)
}

fn read(reply: &OwnedFd) -> Answer<MounterReply> {
    // One byte more than a reply has, to detect longer ones.
    let mut bytes = [0; 13];
    let (_, len) = recv(reply, &mut bytes[..], RecvFlags::DONTWAIT)?;
    let code = |bytes: [u8; 4]| i32::from_ne_bytes(bytes);
    match (len, bytes) {
        (4, [a, b, c, d, ..]) => match code([a, b, c, d]) {
            PASS => Ok(MounterReply::Pass),
            0 => Ok(MounterReply::Done),
            errno if (1..4096).contains(&errno) => Err(Errno::from_raw_os_error(errno)),
            _ => Err(Errno::IO),
        },
        (12, [a, b, c, d, device @ .., _]) if code([a, b, c, d]) == MOUNT_BY_KERNEL => {
            Ok(MounterReply::ByKernel(u64::from_ne_bytes(device)))
        }
        _ => Err(Errno::IO),
    }
}

/// Copies the call, if it is a new mount that may concern the pool.
fn copy_mount(thread: &CallerThread<'_>, abi: Abi, args: &[u64; 6]) -> Option<MountRequest> {
    let address = |at| address(abi, args, at);
    let flags = flags(address(3))?;
    let kind = String::from_utf8(read_c_string(thread, address(2), TYPE_MAX)?).ok()?;
    let source = match address(0) {
        // The kernel ignores the source of this file system.
        0 if kind == DEVTMPFS => DEVTMPFS.into(),
        at => read_c_string(thread, at, TEXT_MAX)?,
    };
    let target = read_c_string(thread, address(1), TEXT_MAX)?;
    let data = match address(4) {
        0 => String::new(),
        at => String::from_utf8(read_c_string(thread, at, TEXT_MAX)?).ok()?,
    };
    // A FUSE driver mounts too, also under the filter, and must not wait for the mounter.
    let is_fuse = kind == "fuse" || kind.starts_with("fuse.") || kind == "fuseblk";
    if is_fuse && data.split(',').any(|option| option.starts_with("fd=")) {
        return None;
    }
    (!source.is_empty() && !kind.is_empty()).then_some(MountRequest { source, target, kind, flags, data })
}

pub(super) fn address(abi: Abi, args: &[u64; 6], at: usize) -> u64 {
    if abi.is_compat() { args[at] & u64::from(u32::MAX) } else { args[at] }
}

/// Whether a call with these flags creates a new mount.
pub(super) fn is_new_mount(raw: u64) -> bool {
    flags(raw).is_some()
}

/// None: the call creates no new mount.
fn flags(raw: u64) -> Option<u64> {
    let flags = if raw & MAGIC_MASK == MAGIC { raw & !MAGIC_MASK } else { raw };
    (flags & NO_NEW_MOUNT == 0).then_some(flags)
}

/// Reads a string of the caller, up to its NUL. None: it is unreadable or too long; the kernel then
/// refuses it.
pub(super) fn read_c_string(thread: &CallerThread<'_>, address: u64, max: usize) -> Option<Vec<u8>> {
    /// The smallest page size: a read within it succeeds or fails as a whole.
    const PAGE: u64 = 4096;
    let mut text = Vec::new();
    let mut at = address;
    while text.len() < max {
        let len = (PAGE - at % PAGE).min(256 - at % 256);
        let mut bytes = [0; 256];
        let bytes = &mut bytes[..usize::try_from(len).ok()?];
        thread.read_into(at, bytes).ok()?;
        if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
            text.extend_from_slice(&bytes[..end]);
            return (text.len() < max).then_some(text);
        }
        text.extend_from_slice(bytes);
        at = at.checked_add(len)?;
    }
    None
}

impl MounterRequest {
    /// Receives the next request. None: the daemon has closed the socket. Skips invalid messages.
    pub fn next(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<MounterRequest>> {
        while let Some(packet) = packet::receive(socket, MESSAGE_MAX)? {
            if let (true, Ok(request), Ok([reply, root, cwd, namespace])) =
                (packet.whole, serde_json::from_slice(&packet.bytes), <[OwnedFd; 4]>::try_from(packet.fds))
            {
                return Ok(Some(MounterRequest { mount: request, root, cwd, namespace, reply }));
            }
        }
        Ok(None)
    }

    /// Requests a mount by the kernel of the device with this number; returns it detached.
    pub fn request_kernel_mount(&self, device: u64) -> Answer<OwnedFd> {
        let mut question = MOUNT_BY_KERNEL.to_ne_bytes().to_vec();
        question.extend(device.to_ne_bytes());
        packet::send(self.reply.as_fd(), &question, &[])?;
        let packet = packet::receive(self.reply.as_fd(), 16)?.ok_or(Errno::IO)?;
        let code = packet.bytes.try_into().map(i32::from_ne_bytes);
        match (code, packet.fds.into_iter().next()) {
            (Ok(0), Some(mount)) => Ok(mount),
            (Ok(errno @ 1..4096), _) => Err(Errno::from_raw_os_error(errno)),
            _ => Err(Errno::IO),
        }
    }

    /// Replies. `Ok(false)`: the kernel serves the call.
    pub fn answer(self, done: Answer<bool>) {
        let code = match done {
            Ok(true) => 0,
            Ok(false) => PASS,
            Err(errno) => errno.raw_os_error(),
        };
        // The caller may have been killed, or failed at its deadline.
        let _ = send(&self.reply, &code.to_ne_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognises_new_mounts() {
        assert_eq!(flags(libc::MS_RDONLY), Some(1));
        assert_eq!(flags(MAGIC | libc::MS_NOSUID), Some(2));
        for other in [libc::MS_BIND, libc::MS_REMOUNT, libc::MS_MOVE, libc::MS_SLAVE, MAGIC | libc::MS_SHARED]
        {
            assert_eq!(flags(other), None, "{other:x}");
        }
    }

    #[test]
    fn accepts_a_packet_socket_and_detects_its_end() {
        let (ours, theirs) = pair().unwrap();
        let mounter = MounterSocket::new(ours, None).unwrap();
        assert!(!mounter.end(Duration::from_millis(10)));
        assert!(MounterRequest::next(theirs.as_fd()).unwrap().is_none());
        drop(theirs);
        assert!(mounter.end(Duration::from_secs(5)));
        assert!(MounterSocket::new(std::fs::File::open("/dev/null").unwrap().into(), None).is_err());
    }

    #[test]
    fn refuses_invalid_replies_of_a_mounter() {
        let parse = |bytes: &[u8]| {
            let (ours, theirs) = pair().unwrap();
            send(&theirs, bytes, SendFlags::empty()).unwrap();
            read(&ours)
        };
        assert_eq!(parse(&0_i32.to_ne_bytes()), Ok(MounterReply::Done));
        assert_eq!(parse(&(-1_i32).to_ne_bytes()), Ok(MounterReply::Pass));
        assert_eq!(parse(&libc::ENODEV.to_ne_bytes()), Err(Errno::NODEV));
        let asks = |code: i32| [&code.to_ne_bytes()[..], &259_u64.to_ne_bytes()].concat();
        assert_eq!(parse(&asks(-2)), Ok(MounterReply::ByKernel(259)));
        let wrong =
            [&(-2_i32).to_ne_bytes()[..], &5000_i32.to_ne_bytes(), &[0; 5], &[0; 1], &[0; 13], &asks(0)];
        for wrong in wrong {
            assert_eq!(parse(wrong), Err(Errno::IO), "{wrong:?}");
        }
    }
}
