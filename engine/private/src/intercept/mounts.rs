//! One stopped mount(2) or umount2(2): copied once, and carried to who can do it ([`Mounts`]).
//!
//! In containers that is the daemon (`private::attached`). Elsewhere it is a *mounter*: a plain user's mount of a loop device is done by a program of FUSE, which runs as the caller. The
//! mounter starts it: a process of the caller's own user namespace that `loopengine run` leaves
//! outside the filter. Since it has no more rights than the caller, and the caller may do with it as
//! he likes, it may decide all: whether the source is a loop device of the pool, what the paths mean,
//! which errno it is. The daemon looks at no path of the tenant's, and believes the mounter only what
//! the caller could do by himself: to get an errno, or to have the call served by the kernel.
//!
//! Where the tenant may have mounts by the kernel, the mounter may ask for one instead of answering: it
//! names a device by its number, gets a mount that is mounted nowhere, and attaches it where the path
//! leads, by its own rights. File system, flags and options are those of the call, as it was copied.
//!
//! Knows the arguments of mount(2) and the messages to the mounter. Does not know file systems.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use serde::{Deserialize, Serialize};

use super::caller::{Administrators, Thread};
use super::calls::Verdict;
use super::filter::Abi;
use crate::error::{Error, Kind, Result};
use crate::loops::Answer;
use crate::sys::descriptor::is_packet_socket;
use crate::sys::packet;
pub use crate::sys::packet::pair;
use crate::sys::process::Place;

/// How long a mounter may take; shorter than a call may.
const PATIENCE: Duration = Duration::from_secs(40);
/// How often it is asked meanwhile whether the caller still waits.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// Of a path and of a page of options, as with the kernel's.
const TEXT_MAX: usize = 4096;
const TYPE_MAX: usize = 64;
/// Of a message: three texts, every byte written as up to four characters.
const MESSAGE_MAX: usize = 3 * 4 * TEXT_MAX + 4096;

/// What the kernel, not a mounter, does: bind, remount, move, and change propagation.
const NOT_NEW: u64 = libc::MS_BIND
    | libc::MS_REMOUNT
    | libc::MS_MOVE
    | libc::MS_UNBINDABLE
    | libc::MS_PRIVATE
    | libc::MS_SLAVE
    | libc::MS_SHARED;
const MAGIC: u64 = libc::MS_MGC_VAL;
const MAGIC_MASK: u64 = libc::MS_MGC_MSK;

/// The mounter's answer for what is not of the pool.
const NOT_OURS: i32 = -1;
/// The same for a mount by the kernel: behind it comes the device number, as eight bytes.
const BY_KERNEL: i32 = -2;

/// The arguments of a mount(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Path of what is mounted.
    pub source: Vec<u8>,
    /// Path of where.
    pub target: Vec<u8>,
    /// The file system.
    pub kind: String,
    /// `MS_*`.
    pub flags: u64,
    /// Options of the file system.
    pub data: String,
}

/// A call as it comes to the mounter.
#[derive(Debug)]
pub struct Request {
    /// What is to be done.
    pub asked: Asked,
    /// The caller's root directory.
    pub root: OwnedFd,
    /// Its working directory.
    pub cwd: OwnedFd,
    /// Its mount namespace.
    pub namespace: OwnedFd,
    reply: OwnedFd,
}

/// Who mounts for the callers of a filter. Of administrators only; others get what the kernel says.
pub trait Mounts: Send + Sync {
    /// Does it. None: it is not ours, and the kernel may serve it. `waits`: somebody still waits for it.
    fn mount(&self, asked: &Asked, place: Place, waits: &dyn Fn() -> bool) -> Answer<Option<()>>;

    /// The same for umount2(2).
    fn umount(&self, _asked: &Unmount, _place: Place, _waits: &dyn Fn() -> bool) -> Answer<Option<()>> {
        Ok(None)
    }
}

/// The arguments of an umount2(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmount {
    /// Path of a mount.
    pub path: Vec<u8>,
    /// `MNT_*` and `UMOUNT_NOFOLLOW`.
    pub flags: u32,
}

/// Serves a stopped mount(2).
pub(super) fn mount(
    mounts: &dyn Mounts,
    thread: &Thread<'_>,
    abi: Abi,
    args: &[u64; 6],
    administrators: Administrators,
) -> Verdict {
    let Some(asked) = copy(thread, abi, args) else { return Verdict::Pass };
    verdict(thread, administrators, |place| mounts.mount(&asked, place, &|| thread.waits()))
}

/// Serves a stopped umount2(2).
pub(super) fn umount(
    mounts: &dyn Mounts,
    thread: &Thread<'_>,
    abi: Abi,
    args: &[u64; 6],
    administrators: Administrators,
) -> Verdict {
    let Some(path) = text(thread, address(abi, args, 0), TEXT_MAX) else { return Verdict::Pass };
    // The kernel takes 32 bits.
    let asked = Unmount { path, flags: args[1] as u32 };
    verdict(thread, administrators, |place| mounts.umount(&asked, place, &|| thread.waits()))
}

fn verdict(
    thread: &Thread<'_>,
    administrators: Administrators,
    act: impl FnOnce(Place) -> Answer<Option<()>>,
) -> Verdict {
    // Others get EPERM from the kernel; nobody must lend them his rights.
    if !thread.is_admin(administrators) {
        return Verdict::Pass;
    }
    match thread.place().and_then(act) {
        Ok(None) => Verdict::Pass,
        Ok(Some(())) => Verdict::Answer(Ok(0)),
        Err(errno) => Verdict::Answer(Err(errno)),
    }
}

/// Has the kernel mount what a mounter names.
pub trait Kernel: Send + Sync {
    /// A mount of the device with this number, mounted nowhere yet. Which devices and file systems may
    /// be mounted is to be checked: who asks is not trusted. `waits`: somebody still waits for it.
    fn mount(&self, asked: &Asked, device: u64, waits: &dyn Fn() -> bool) -> Answer<OwnedFd>;
}

/// The daemon's end of the socket to a mounter. It may come from anybody.
pub struct Mounter {
    socket: OwnedFd,
    kernel: Option<Box<dyn Kernel>>,
}

impl std::fmt::Debug for Mounter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounter").field("kernel", &self.kernel.is_some()).finish_non_exhaustive()
    }
}

/// What a mounter says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Done,
    NotOurs,
    ByKernel(u64),
}

/// Refuses what cannot be a mounter's socket, without a question to whoever serves its file.
pub fn check_socket(socket: &OwnedFd) -> Result<()> {
    match is_packet_socket(socket) {
        true => Ok(()),
        false => Err(Error::new(Kind::Invalid, "what came with the call is no socket of a mounter")
            .hint("pass one of a pair of sockets of the type SOCK_SEQPACKET")),
    }
}

impl Mounter {
    /// Takes a socket over, if it is such a one. `kernel`: if the tenant may have mounts by it.
    pub fn new(socket: OwnedFd, kernel: Option<Box<dyn Kernel>>) -> Result<Mounter> {
        check_socket(&socket)?;
        Ok(Mounter { socket, kernel })
    }

    /// Has it end what it has started, and waits for that. True: it has.
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

impl Mounts for Mounter {
    fn mount(&self, asked: &Asked, place: Place, waits: &dyn Fn() -> bool) -> Answer<Option<()>> {
        let [root, cwd, namespace] = place;
        let (reply, theirs) = pair()?;
        let message = serde_json::to_vec(asked).map_err(|_| Errno::INVAL)?;
        let fds = [theirs.as_fd(), root.as_fd(), cwd.as_fd(), namespace.as_fd()];
        // Whoever is not there to take it, or takes nothing: the mount fails, and nothing else does.
        packet::send(self.socket.as_fd(), &message, &fds).map_err(|_| Errno::IO)?;
        drop(theirs);
        let until = Instant::now() + PATIENCE;
        match said(&reply, until, waits)? {
            Said::Done => Ok(Some(())),
            Said::NotOurs => Ok(None),
            Said::ByKernel(device) => {
                let kernel = self.kernel.as_ref().ok_or(Errno::NODEV);
                // Once: whatever the mounter says next is the end.
                match kernel.and_then(|kernel| kernel.mount(asked, device, waits)) {
                    Ok(mount) => packet::send(reply.as_fd(), &0_i32.to_ne_bytes(), &[mount.as_fd()])?,
                    Err(errno) => packet::send(reply.as_fd(), &errno.raw_os_error().to_ne_bytes(), &[])?,
                }
                match said(&reply, until, waits)? {
                    Said::Done => Ok(Some(())),
                    _ => Err(Errno::IO),
                }
            }
        }
    }
}

/// Waits for what the mounter says.
fn said(reply: &OwnedFd, until: Instant, waits: &dyn Fn() -> bool) -> Answer<Said> {
    while Instant::now() < until && waits() {
        match poll(&mut [PollFd::new(reply, PollFlags::IN)], Some(&LOOK)) {
            Ok(0) | Err(Errno::INTR) => {}
            _ => return read(reply),
        }
    }
    Err(Errno::TIMEDOUT)
}

fn read(reply: &OwnedFd) -> Answer<Said> {
    // One more than an answer has, so that a longer one shows.
    let mut bytes = [0; 13];
    let (_, len) = recv(reply, &mut bytes[..], RecvFlags::DONTWAIT)?;
    let code = |bytes: [u8; 4]| i32::from_ne_bytes(bytes);
    match (len, bytes) {
        (4, [a, b, c, d, ..]) => match code([a, b, c, d]) {
            NOT_OURS => Ok(Said::NotOurs),
            0 => Ok(Said::Done),
            errno if (1..4096).contains(&errno) => Err(Errno::from_raw_os_error(errno)),
            _ => Err(Errno::IO),
        },
        (12, [a, b, c, d, device @ .., _]) if code([a, b, c, d]) == BY_KERNEL => {
            Ok(Said::ByKernel(u64::from_ne_bytes(device)))
        }
        _ => Err(Errno::IO),
    }
}

/// The call, if it makes a mount that could be ours.
fn copy(thread: &Thread<'_>, abi: Abi, args: &[u64; 6]) -> Option<Asked> {
    let address = |at| address(abi, args, at);
    let flags = flags(address(3))?;
    let kind = String::from_utf8(text(thread, address(2), TYPE_MAX)?).ok()?;
    // What programs of FUSE mount in their turn, also under the filter, must not wait for anybody.
    if kind.is_empty() || kind == "fuse" || kind.starts_with("fuse.") || kind == "fuseblk" {
        return None;
    }
    let source = text(thread, address(0), TEXT_MAX)?;
    let target = text(thread, address(1), TEXT_MAX)?;
    let data = match address(4) {
        0 => String::new(),
        at => String::from_utf8(text(thread, at, TEXT_MAX)?).ok()?,
    };
    (!source.is_empty()).then_some(Asked { source, target, kind, flags, data })
}

pub(super) fn address(abi: Abi, args: &[u64; 6], at: usize) -> u64 {
    if abi.is_compat() { args[at] & u64::from(u32::MAX) } else { args[at] }
}

/// None: nothing new is mounted.
fn flags(raw: u64) -> Option<u64> {
    let flags = if raw & MAGIC_MASK == MAGIC { raw & !MAGIC_MASK } else { raw };
    (flags & NOT_NEW == 0).then_some(flags)
}

/// A string of the caller's, up to its zero. None: it has none, or is too long; the kernel says what is
/// wrong with it.
pub(super) fn text(thread: &Thread<'_>, address: u64, max: usize) -> Option<Vec<u8>> {
    /// No page is smaller, so what is read at once is there or not.
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

impl Request {
    /// The next one; none: it is over. What is no request is left out.
    pub fn next(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<Request>> {
        while let Some(packet) = packet::receive(socket, MESSAGE_MAX)? {
            if let (true, Ok(asked), Ok([reply, root, cwd, namespace])) =
                (packet.whole, serde_json::from_slice(&packet.bytes), <[OwnedFd; 4]>::try_from(packet.fds))
            {
                return Ok(Some(Request { asked, root, cwd, namespace, reply }));
            }
        }
        Ok(None)
    }

    /// Asks for a mount by the kernel of the device with this number; it is mounted nowhere yet.
    pub fn by_kernel(&self, device: u64) -> Answer<OwnedFd> {
        let mut question = BY_KERNEL.to_ne_bytes().to_vec();
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

    /// Answers the caller. `Ok(false)`: it is not ours.
    pub fn answer(self, done: Answer<bool>) {
        let code = match done {
            Ok(true) => 0,
            Ok(false) => NOT_OURS,
            Err(errno) => errno.raw_os_error(),
        };
        // Nobody waits any more: killed, or overdue.
        let _ = send(&self.reply, &code.to_ne_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_a_mount() {
        assert_eq!(flags(libc::MS_RDONLY), Some(1));
        assert_eq!(flags(MAGIC | libc::MS_NOSUID), Some(2));
        for other in [libc::MS_BIND, libc::MS_REMOUNT, libc::MS_MOVE, libc::MS_SLAVE, MAGIC | libc::MS_SHARED]
        {
            assert_eq!(flags(other), None, "{other:x}");
        }
    }

    #[test]
    fn a_mounter_is_a_socket_of_its_kind_and_ends_when_it_is_gone() {
        let (ours, theirs) = pair().unwrap();
        let mounter = Mounter::new(ours, None).unwrap();
        assert!(!mounter.end(Duration::from_millis(10)));
        assert!(Request::next(theirs.as_fd()).unwrap().is_none());
        drop(theirs);
        assert!(mounter.end(Duration::from_secs(5)));
        assert!(Mounter::new(std::fs::File::open("/dev/null").unwrap().into(), None).is_err());
    }

    #[test]
    fn answers_of_a_mounter_are_not_believed_blindly() {
        let said = |bytes: &[u8]| {
            let (ours, theirs) = pair().unwrap();
            send(&theirs, bytes, SendFlags::empty()).unwrap();
            read(&ours)
        };
        assert_eq!(said(&0_i32.to_ne_bytes()), Ok(Said::Done));
        assert_eq!(said(&(-1_i32).to_ne_bytes()), Ok(Said::NotOurs));
        assert_eq!(said(&libc::ENODEV.to_ne_bytes()), Err(Errno::NODEV));
        let asks = |code: i32| [&code.to_ne_bytes()[..], &259_u64.to_ne_bytes()].concat();
        assert_eq!(said(&asks(-2)), Ok(Said::ByKernel(259)));
        let wrong =
            [&(-2_i32).to_ne_bytes()[..], &5000_i32.to_ne_bytes(), &[0; 5], &[0; 1], &[0; 13], &asks(0)];
        for wrong in wrong {
            assert_eq!(said(wrong), Err(Errno::IO), "{wrong:?}");
        }
    }
}
