//! The thread that waits for an answer: its descriptors, its memory, its rights.
//!
//! Knows what of /proc, pidfds and remote memory is safe with a hostile thread, and how to be sure
//! that what it looked at was that thread's. Does not know what an ioctl means.
//!
//! - `pid` of a notification is a *thread* id: descriptors may be a thread's own (CLONE_FILES is
//!   unshared one by one), so only pidfds of threads will do. Thread ids are used again: everything
//!   found by one counts only if the call still waits afterwards.
//! - The descriptor that an ioctl is for is looked at, not taken. Taking it would keep a device open
//!   behind its last close; and giving back one of a tenant's own FUSE file system asks its server,
//!   which may never answer. Nothing here makes a file system ask anybody (AT_STATX_DONT_SYNC).
//! - What kind of file it is and how it was opened are told by two files of /proc. Another thread may
//!   change the table in between: both must have seen the same inode on the same mount, so whoever
//!   cheats has opened this very node as he claims.
//! - /proc/TID and the second of these files are kept open for the next call of the same thread. They
//!   are the thread's, not its number's: once it is gone they tell nothing, whoever has the number now.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::loops::{Answer, Caller};
use crate::sys::mntns;
use crate::sys::process::Place;
use crate::sys::remote;
use crate::sys::seccomp::Listener;

/// Linux 6.9: a pidfd of a thread.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

/// Looks at a descriptor that changes all the time.
const LOOKS_MAX: usize = 3;

/// linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;

/// A user namespace, by the device and inode number of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// That of a process or thread.
    pub fn of(tid: Pid) -> std::io::Result<Namespace> {
        let stat = rustix::fs::stat(format!("/proc/{}/ns/user", tid.as_raw_nonzero()))?;
        Ok(Namespace { device: stat.st_dev, inode: stat.st_ino })
    }

    /// That of a file of /proc/PID/ns, opened.
    pub fn of_file(file: impl AsFd) -> std::io::Result<Namespace> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Namespace { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// Which callers are administrators of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Administrators {
    namespace: Namespace,
    root: bool,
}

impl Administrators {
    /// Who has CAP_SYS_ADMIN in this namespace.
    pub fn capable(namespace: Namespace) -> Administrators {
        Administrators { namespace, root: false }
    }

    /// They, and its root, who has not many capabilities in a container.
    pub fn root(namespace: Namespace) -> Administrators {
        Administrators { namespace, root: true }
    }
}

/// What a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// A block device.
    pub block: bool,
    /// Device number of the file system that it lies on.
    pub device: u64,
    /// Its inode number there.
    pub inode: u64,
    /// Which device it is, if it is one.
    pub rdev: u64,
    mount: u64,
}

/// What has been found at a descriptor.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// Nothing, something else, or never twice the same.
    Other,
    /// This, opened like that.
    This(T, OFlags),
}

/// Makes sure that pidfds can name threads here.
pub fn check_kernel() -> std::io::Result<()> {
    pidfd_open(rustix::thread::gettid(), PIDFD_THREAD)?;
    Ok(())
}

/// What is open of the thread that called last, if it is not being served.
#[derive(Debug, Default)]
pub struct Known(Mutex<Option<Proc>>);

/// What is open of one thread.
#[derive(Debug)]
struct Proc {
    tid: Pid,
    /// /proc/TID.
    directory: OwnedFd,
    /// Opened for this call: nothing here can be of another thread that had the number before.
    fresh: bool,
    /// /proc/TID/fdinfo of this descriptor.
    info: Option<(u32, OwnedFd)>,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Option<Proc>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread behind one notification.
#[derive(Debug)]
pub struct Thread<'a> {
    listener: &'a Listener,
    id: u64,
    tid: Pid,
    known: &'a Known,
    proc: RefCell<Option<Proc>>,
}

impl Drop for Thread<'_> {
    fn drop(&mut self) {
        if let Some(proc) = self.proc.take() {
            *self.known.lock() = Some(Proc { fresh: false, ..proc });
        }
    }
}

impl<'a> Thread<'a> {
    /// None: a thread that this process cannot see.
    pub fn new(listener: &'a Listener, id: u64, pid: u32, known: &'a Known) -> Option<Thread<'a>> {
        let tid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let proc = RefCell::new(known.lock().take_if(|proc| proc.tid == tid));
        Some(Thread { listener, id, tid, known, proc })
    }

    /// Looks at the thread's part of /proc; where that fails because it was another's, anew.
    fn look<T>(&self, mut at: impl FnMut(&mut Proc) -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        let mut proc = self.proc.borrow_mut();
        if let Some(proc) = &mut *proc {
            let seen = at(proc);
            if seen.is_ok() || proc.fresh {
                return seen;
            }
        }
        let path = format!("/proc/{}", self.tid.as_raw_nonzero());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        at(proc.insert(Proc { tid: self.tid, directory, fresh: true, info: None }))
    }

    /// Still waits for the answer.
    pub fn waits(&self) -> bool {
        self.listener.waits(self.id)
    }

    /// Asks `matters` about what the descriptor is of.
    pub fn find<T>(&self, fd: u32, matters: impl Fn(&Node) -> Option<T>) -> Found<T> {
        for _ in 0..LOOKS_MAX {
            let Ok(node) = self.node(fd) else { break };
            let Some(this) = matters(&node) else { break };
            match self.opened(fd) {
                Some((flags, inode, mount)) if (inode, mount) == (node.inode, node.mount) => {
                    return Found::This(this, flags);
                }
                Some(_) => {}
                None => break,
            }
        }
        Found::Other
    }

    fn node(&self, fd: u32) -> rustix::io::Result<Node> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
        let path = format!("fd/{fd}");
        let stat =
            self.look(|proc| rustix::fs::statx(&proc.directory, &*path, AtFlags::STATX_DONT_SYNC, wanted))?;
        Ok(Node {
            block: FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice,
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
            mount: stat.stx_mnt_id,
        })
    }

    /// How the descriptor was opened (with close-on-exec, which is its own), of which inode on which
    /// mount.
    fn opened(&self, fd: u32) -> Option<(OFlags, u64, u64)> {
        // These lines come first; behind them the driver may say what it likes.
        let mut bytes = [0; 512];
        let len = self.look(|proc| proc.read_info(fd, &mut bytes)).ok()?;
        let text = String::from_utf8_lossy(&bytes[..len]);
        let value = |name| field(&text, name);
        let flags = u32::from_str_radix(value("flags")?, 8).ok()?;
        Some((OFlags::from_bits_retain(flags), value("ino")?.parse().ok()?, value("mnt_id")?.parse().ok()?))
    }

    /// A duplicate of a descriptor; BADF for one that does not let files be read, as everywhere.
    pub fn take(&self, fd: u32) -> Answer<OwnedFd> {
        let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
        let thread = pidfd_open(self.tid, PIDFD_THREAD)?;
        self.check()?;
        let file = pidfd_getfd(&thread, fd, PidfdGetfdFlags::empty())?;
        if rustix::fs::fcntl_getfl(&file)?.contains(OFlags::PATH) {
            return Err(Errno::BADF);
        }
        Ok(file)
    }

    /// A copy of its memory.
    pub fn read<const N: usize>(&self, address: u64) -> Answer<[u8; N]> {
        let mut bytes = [0; N];
        self.read_into(address, &mut bytes)?;
        Ok(bytes)
    }

    /// The same into a buffer.
    pub fn read_into(&self, address: u64, into: &mut [u8]) -> Answer<()> {
        remote::read(self.tid, address, into).map_err(|_| Errno::FAULT)?;
        self.check()
    }

    /// Writes into its memory.
    pub fn write(&self, address: u64, from: &[u8]) -> Answer<()> {
        let memory = self.look(|proc| remote::Writable::open(&proc.directory)).map_err(|_| Errno::FAULT)?;
        self.check()?;
        memory.write(address, from).map_err(|_| Errno::FAULT)
    }

    /// Its root and working directories, and its mount namespace. They are not looked into.
    pub fn place(&self) -> Answer<Place> {
        let open = |name: &str, flags| {
            let path = format!("/proc/{}/{name}", self.tid.as_raw_nonzero());
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        let place =
            [open("root", OFlags::PATH)?, open("cwd", OFlags::PATH)?, open("ns/mnt", OFlags::RDONLY)?];
        self.check()?;
        Ok(place)
    }

    /// Is one of these, and so in their namespace rather than in one of its own.
    pub fn is_admin(&self, administrators: Administrators) -> bool {
        let Administrators { namespace, root } = administrators;
        let read = |name| std::fs::read_to_string(format!("/proc/{}/{name}", self.tid.as_raw_nonzero()));
        let status = read("status").unwrap_or_default();
        let effective = field(&status, "CapEff").and_then(|bits| u64::from_str_radix(bits, 16).ok());
        let capable = effective.is_some_and(|effective| effective & (1 << CAP_SYS_ADMIN) != 0);
        // The second of four is the effective one.
        let user = field(&status, "Uid").and_then(|uids| uids.split_ascii_whitespace().nth(1)?.parse().ok());
        let is_root = || root && user.is_some() && user == root_of(&read("uid_map").unwrap_or_default());
        (capable || is_root()) && Namespace::of(self.tid).is_ok_and(|its| its == namespace) && self.waits()
    }

    /// Sees a file system that is mounted from the disk with this device number.
    fn has_mounted(&self, rdev: u64) -> bool {
        let table = std::fs::File::open(format!("/proc/{}/mountinfo", self.tid.as_raw_nonzero()));
        table.is_ok_and(|table| mntns::is_mounted(std::io::BufReader::new(table), rdev)) && self.waits()
    }

    fn check(&self) -> Answer<()> {
        // Whatever this errno, there is nobody to see it.
        if self.waits() { Ok(()) } else { Err(Errno::SRCH) }
    }
}

impl Proc {
    /// What the kernel says about a descriptor at this moment, whenever the file was opened.
    fn read_info(&mut self, fd: u32, into: &mut [u8]) -> rustix::io::Result<usize> {
        let info = match self.info.take() {
            Some((known, info)) if known == fd => info,
            _ => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&self.directory, format!("fdinfo/{fd}"), flags, Mode::empty())?
            }
        };
        let len = rustix::io::pread(&info, into, 0)?;
        self.info = Some((fd, info));
        Ok(len)
    }
}

/// The value of a line `NAME:<blanks>VALUE`.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Who is user 0 of a user namespace, out here.
fn root_of(uid_map: &str) -> Option<u32> {
    uid_map.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        (fields.next()? == "0").then(|| fields.next()?.parse().ok())?
    })
}

/// A thread that asks through this descriptor of a device.
#[derive(Debug)]
pub struct Opener<'a> {
    pub thread: &'a Thread<'a>,
    pub fd: u32,
    pub flags: OFlags,
    /// Who may change it without having it open for writing.
    pub administrators: Administrators,
}

impl Caller for Opener<'_> {
    fn writes(&self) -> bool {
        // Both bits: a descriptor for ioctls only.
        let access = self.flags & OFlags::RWMODE;
        access == OFlags::WRONLY || access == OFlags::RDWR
    }

    fn is_admin(&self) -> bool {
        self.thread.is_admin(self.administrators)
    }

    fn waits(&self) -> bool {
        self.thread.waits()
    }

    /// The table is the caller's own, and so is the harm if he has put something else there. Whoever
    /// shares the table sees the new file; duplicates elsewhere stay what they were.
    fn replace(&self, file: OwnedFd) -> Answer<()> {
        let cloexec = self.flags.contains(OFlags::CLOEXEC);
        let put = self.thread.listener.put_descriptor(self.thread.id, file.as_fd(), self.fd, cloexec);
        put.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    fn has_descriptor(&self) -> bool {
        true
    }

    fn has_mounted(&self, rdev: u64) -> bool {
        self.thread.has_mounted(rdev)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let text = "pos:\t0\nflags:\t02100002\nmnt_id:\t15\nino:\t9\nflags2:\t1\n";
        assert_eq!(field(text, "flags"), Some("02100002"));
        assert_eq!(field(text, "ino"), Some("9"));
        assert_eq!(field(text, "mnt"), None);
        assert_eq!(field("", "ino"), None);
        assert_eq!(root_of("         0          0 4294967295\n"), Some(0));
        assert_eq!(root_of("      1000       7 1\n         0     100000      65536\n"), Some(100_000));
        assert_eq!(root_of("         1     100000      65536\n"), None);
    }
}
