// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread behind an intercepted call: its descriptors, memory and rights.
//!
//! Knows which uses of /proc, pidfds and remote memory are safe with a hostile thread, and how to
//! verify that they concerned that thread. Does not know what an ioctl does.
//!
//! - `pid` of a notification is a *thread* id. A thread may have a descriptor table of its own
//!   (without CLONE_FILES), so only pidfds of threads are used. Thread ids are reused: a result
//!   counts only if the call still waits afterwards.
//! - The descriptor of an ioctl is examined, not duplicated. A duplicate would keep the device open
//!   beyond its last close. To close a duplicate of a tenant's FUSE file sends FLUSH to its server,
//!   which may never answer. No check makes a file system send a request (AT_STATX_DONT_SYNC).
//! - The file type and the open flags come from two files of /proc. Another thread may change the
//!   table in between. Both must report the same inode on the same mount, so a racing caller has
//!   opened this very node with these flags.
//! - /proc/TID and the second file are kept open for the thread's next call. They belong to the
//!   thread, not to its id: after its end they report nothing, also if the id is reused.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::loops::{Answer, LoopCaller};
use crate::sys::mntns;
use crate::sys::process::ProcFds;
use crate::sys::remote;
use crate::sys::seccomp::Listener;

/// Linux 6.9: a pidfd of a thread.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

/// Attempts to examine a descriptor that changes concurrently.
const ATTEMPTS_MAX: usize = 3;

/// linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;

/// A user namespace, by the device and inode number of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// The namespace of a process or thread.
    pub fn of(tid: Pid) -> std::io::Result<Namespace> {
        let stat = rustix::fs::stat(format!("/proc/{}/ns/user", tid.as_raw_nonzero()))?;
        Ok(Namespace { device: stat.st_dev, inode: stat.st_ino })
    }

    /// The namespace of an open file of /proc/PID/ns.
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
    /// Callers with CAP_SYS_ADMIN in this namespace.
    pub fn capable(namespace: Namespace) -> Administrators {
        Administrators { namespace, root: false }
    }

    /// These, and root of the namespace, which has few capabilities in a container.
    pub fn root(namespace: Namespace) -> Administrators {
        Administrators { namespace, root: true }
    }
}

/// The inode of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdNode {
    /// A block device.
    pub block: bool,
    /// Device number of its file system.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Its device number, if it is a device.
    pub rdev: u64,
    mount: u64,
}

/// The result of examining a descriptor.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup<T> {
    /// No file, another file, or a file that changes concurrently.
    NoMatch,
    /// A match, with its open flags.
    Match(T, OFlags),
}

/// Checks that the kernel has pidfds of threads.
pub fn check_kernel() -> std::io::Result<()> {
    pidfd_open(rustix::thread::gettid(), PIDFD_THREAD)?;
    Ok(())
}

/// The open files of the last caller, while none of its calls is being served.
#[derive(Debug, Default)]
pub struct ProcCache(Mutex<Option<Proc>>);

/// The open files of a thread.
#[derive(Debug)]
struct Proc {
    tid: Pid,
    /// /proc/TID.
    directory: OwnedFd,
    /// Opened for this call, so that it cannot belong to an earlier thread with this id.
    fresh: bool,
    /// /proc/TID/fdinfo of this descriptor.
    info: Option<(u32, OwnedFd)>,
}

impl ProcCache {
    fn lock(&self) -> MutexGuard<'_, Option<Proc>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread of a notification.
#[derive(Debug)]
pub struct CallerThread<'a> {
    listener: &'a Listener,
    id: u64,
    tid: Pid,
    proc_cache: &'a ProcCache,
    proc: RefCell<Option<Proc>>,
}

impl Drop for CallerThread<'_> {
    fn drop(&mut self) {
        if let Some(proc) = self.proc.take() {
            *self.proc_cache.lock() = Some(Proc { fresh: false, ..proc });
        }
    }
}

impl<'a> CallerThread<'a> {
    /// None: the thread is not in this pid namespace.
    pub fn new(
        listener: &'a Listener,
        id: u64,
        pid: u32,
        proc_cache: &'a ProcCache,
    ) -> Option<CallerThread<'a>> {
        let tid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let proc = RefCell::new(proc_cache.lock().take_if(|proc| proc.tid == tid));
        Some(CallerThread { listener, id, tid, proc_cache, proc })
    }

    /// Accesses the thread's /proc directory. Reopens it if a cached one belongs to an earlier
    /// thread.
    fn with_proc<T>(&self, mut at: impl FnMut(&mut Proc) -> rustix::io::Result<T>) -> rustix::io::Result<T> {
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

    /// Whether it still waits for the result.
    pub fn is_waiting(&self) -> bool {
        self.listener.waits(self.id)
    }

    /// Examines a descriptor. `matters` selects the inodes of interest.
    pub fn find<T>(&self, fd: u32, matters: impl Fn(&FdNode) -> Option<T>) -> Lookup<T> {
        for _ in 0..ATTEMPTS_MAX {
            let Ok(node) = self.node(fd) else { break };
            let Some(this) = matters(&node) else { break };
            match self.opened(fd) {
                Some((flags, inode, mount)) if (inode, mount) == (node.inode, node.mount) => {
                    return Lookup::Match(this, flags);
                }
                Some(_) => {}
                None => break,
            }
        }
        Lookup::NoMatch
    }

    fn node(&self, fd: u32) -> rustix::io::Result<FdNode> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
        let path = format!("fd/{fd}");
        let stat = self
            .with_proc(|proc| rustix::fs::statx(&proc.directory, &*path, AtFlags::STATX_DONT_SYNC, wanted))?;
        Ok(FdNode {
            block: FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice,
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
            mount: stat.stx_mnt_id,
        })
    }

    /// The open flags of the descriptor (with its close-on-exec), its inode and its mount.
    fn opened(&self, fd: u32) -> Option<(OFlags, u64, u64)> {
        // These lines come first; the driver's own lines follow.
        let mut bytes = [0; 512];
        let len = self.with_proc(|proc| proc.read_info(fd, &mut bytes)).ok()?;
        let text = String::from_utf8_lossy(&bytes[..len]);
        let value = |name| field(&text, name);
        let flags = u32::from_str_radix(value("flags")?, 8).ok()?;
        Some((OFlags::from_bits_retain(flags), value("ino")?.parse().ok()?, value("mnt_id")?.parse().ok()?))
    }

    /// Duplicates a descriptor. EBADF for one with O_PATH, as everywhere.
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

    /// Copies its memory.
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
        let memory =
            self.with_proc(|proc| remote::Writable::open(&proc.directory)).map_err(|_| Errno::FAULT)?;
        self.check()?;
        memory.write(address, from).map_err(|_| Errno::FAULT)
    }

    /// Opens its root and working directories, and its mount namespace, without a path lookup in
    /// them.
    pub fn proc_fds(&self) -> Answer<ProcFds> {
        let open = |name: &str, flags| {
            let path = format!("/proc/{}/{name}", self.tid.as_raw_nonzero());
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        let proc_fds =
            [open("root", OFlags::PATH)?, open("cwd", OFlags::PATH)?, open("ns/mnt", OFlags::RDONLY)?];
        self.check()?;
        Ok(proc_fds)
    }

    fn mount_namespace(&self) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let open = |proc: &mut Proc| rustix::fs::openat(&proc.directory, "ns/mnt", flags, Mode::empty());
        let namespace = self.with_proc(open).ok()?;
        self.is_waiting().then_some(namespace)
    }

    /// Whether it is an administrator, and in their user namespace itself.
    pub fn is_admin(&self, administrators: Administrators) -> bool {
        let Administrators { namespace, root } = administrators;
        let read = |name| std::fs::read_to_string(format!("/proc/{}/{name}", self.tid.as_raw_nonzero()));
        let status = read("status").unwrap_or_default();
        let effective = field(&status, "CapEff").and_then(|bits| u64::from_str_radix(bits, 16).ok());
        let capable = effective.is_some_and(|effective| effective & (1 << CAP_SYS_ADMIN) != 0);
        // The second of four ids is the effective one.
        let user = field(&status, "Uid").and_then(|uids| uids.split_ascii_whitespace().nth(1)?.parse().ok());
        let is_root = || root && user.is_some() && user == root_of(&read("uid_map").unwrap_or_default());
        (capable || is_root())
            && Namespace::of(self.tid).is_ok_and(|its| its == namespace)
            && self.is_waiting()
    }

    /// Whether a file system of the disk with this number is mounted in its namespace.
    fn has_mounted(&self, rdev: u64) -> bool {
        let table = std::fs::File::open(format!("/proc/{}/mountinfo", self.tid.as_raw_nonzero()));
        table.is_ok_and(|table| mntns::is_mounted(std::io::BufReader::new(table), rdev)) && self.is_waiting()
    }

    fn check(&self) -> Answer<()> {
        // Nobody receives this errno.
        if self.is_waiting() { Ok(()) } else { Err(Errno::SRCH) }
    }
}

impl Proc {
    /// The present content of the descriptor's fdinfo, also if the file was opened earlier.
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

/// The user id, in this namespace, of user 0 of a user namespace.
fn root_of(uid_map: &str) -> Option<u32> {
    uid_map.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        (fields.next()? == "0").then(|| fields.next()?.parse().ok())?
    })
}

/// A caller through a descriptor of a device.
#[derive(Debug)]
pub struct DeviceFd<'a> {
    /// The calling thread.
    pub thread: &'a CallerThread<'a>,
    /// Its descriptor.
    pub fd: u32,
    /// The flags that the descriptor was opened with.
    pub flags: OFlags,
    /// Callers that may change the device without write access.
    pub administrators: Administrators,
}

impl LoopCaller for DeviceFd<'_> {
    fn can_write(&self) -> bool {
        // With both bits the descriptor is for ioctls only.
        let access = self.flags & OFlags::RWMODE;
        access == OFlags::WRONLY || access == OFlags::RDWR
    }

    fn is_admin(&self) -> bool {
        self.thread.is_admin(self.administrators)
    }

    fn is_waiting(&self) -> bool {
        self.thread.is_waiting()
    }

    /// If the caller has put another file into its table meanwhile, the harm is its own. All
    /// threads that share the table get the new file; duplicates elsewhere keep the old one.
    fn replace_descriptor(&self, file: OwnedFd) -> Answer<()> {
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

    fn mount_namespace(&self) -> Option<OwnedFd> {
        self.thread.mount_namespace()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_files_of_proc() {
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
