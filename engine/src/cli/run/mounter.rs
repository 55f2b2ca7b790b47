// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The mounter: mounts file systems for a command with private loop devices, with FUSE drivers or
//! through the kernel.
//!
//! It runs in the command's namespaces with the command's privileges, but outside its filter. It
//! receives intercepted mount(2) calls from the daemon. For a device of the pool it starts a FUSE
//! driver, or attaches the mount that the daemon returns; in place of devtmpfs it binds the
//! command's /dev (`devtmpfs`). It ends when the daemon closes the
//! socket, after its drivers: as subreaper it is the parent of daemonized drivers too, which may
//! hold unwritten data.
//!
//! It also keeps mounts of other devices under names of the pool out of the mount namespace, makes
//! nodes for bind mounts of /dev (`covered_nodes`), and reports to the command's terminal if the
//! pool ends before the command (`end_notice`).
//!
//! Knows how to start a driver in place of the caller. Does not know who may mount, or which driver
//! mounts a file system (`fuse_drivers`).

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait, waitpid};

use super::caller_root::{enter_caller_namespace, in_root_of_caller, needs_device};
use super::covered_nodes::CoveredNodes;
use super::devtmpfs::OwnDev;
use super::end_notice::EndNotice;
use super::parse_fuse;
use crate::cli::fuse_drivers;
use crate::error::{Error, Result};
use crate::image::{Region, fs as file_system};
use crate::intercept::devtmpfs::DEVTMPFS;
use crate::intercept::mounts::{MountRequest, MounterRequest, pair};
use crate::loops::Answer;
use crate::private::LOOPFS;
use crate::sys;

/// Time for drivers to write back and end; the daemon waits a little longer.
const END_MAX: Duration = Duration::from_secs(3);
/// Maximum number of concurrent mounts.
const CONCURRENT_MAX: usize = 4;

/// Mount options that drivers need not know.
const IGNORED_OPTIONS: [&str; 3] = ["errors=remount-ro", "relatime", "rw"];

/// A file system and its FUSE driver.
pub(crate) type FuseRule = (String, String);

/// How file systems are mounted.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct MountRules {
    /// Mounted by FUSE drivers.
    #[arg(value_name = "FS=PROGRAM", value_parser = parse_fuse)]
    pub(super) fuse: Vec<FuseRule>,

    /// Mounted by the kernel.
    #[arg(long, value_name = "FS")]
    pub(super) kernel: Vec<String>,

    /// The command is root of the host: the kernel mounts without the mounter, except devtmpfs.
    #[arg(long)]
    pub(super) root: bool,
}

/// Serves calls of mount(2) on standard input. For `loopengine run` only.
#[derive(Clone, Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct MounterArgs {
    /// Be the resident process; without it, start one that has no parent.
    #[arg(long)]
    stay: bool,

    /// Device numbers that the pool omits.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    reserved: Vec<u32>,

    #[command(flatten)]
    notice: EndNotice,

    #[command(flatten)]
    rules: MountRules,
}

/// Starts a mounter in the namespaces of this process, which later executes the command. Returns
/// the daemon's end of the socket.
pub(super) fn start(rules: MountRules, pool: &str, reserved: BTreeSet<u32>) -> Result<OwnedFd> {
    let cannot = |error| Error::os(error, "cannot start the mounter of the command");
    let (ours, theirs) = pair().map_err(|error| cannot(error.into()))?;
    let notice = EndNotice::for_this_process(pool);
    let args = MounterArgs { stay: false, reserved: reserved.into_iter().collect(), notice, rules };
    let status = args.command().stdin(theirs).status().map_err(cannot)?;
    match status.success() {
        true => Ok(ours),
        false => Err(cannot(std::io::ErrorKind::Other.into())),
    }
}

impl MounterArgs {
    /// This program with these arguments. The resident process keeps no terminal or pipe open.
    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("mounter").stdout(Stdio::null()).stderr(Stdio::null());
        command.args(self.reserved.iter().map(|number| format!("--reserved={number}")));
        command.args(self.notice.words());
        command.args(self.rules.kernel.iter().map(|kind| format!("--kernel={kind}")));
        command.args(self.rules.root.then_some("--root"));
        command.args(self.rules.fuse.iter().map(|(kind, program)| format!("{kind}={program}")));
        command
    }

    pub(crate) fn run(self) -> Result<()> {
        let cannot = |error| Error::os(error, "the mounter failed");
        if !self.stay {
            // The terminal sends Ctrl-C to the command only.
            rustix::process::setsid().map_err(|error| cannot(error.into()))?;
            self.command().arg("--stay").spawn().map_err(cannot)?;
            return Ok(());
        }
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| cannot(error.into()))?;
        let command = self.notice.watch();
        let known = self.reserved.into_iter().collect();
        // Optional: without the thread, only names may mislead.
        let _ = std::thread::Builder::new().spawn(move || sys::loop_names::keep_out(&known));
        let nodes = self.rules.root.then(CoveredNodes::start).flatten();
        let pool = rustix::fs::stat(Path::new("/dev").join(LOOPFS)).map_err(|error| cannot(error.into()))?;
        let mounter = Arc::new(Mounter {
            pool: pool.st_dev,
            dev: self.rules.root.then(OwnDev::open).and_then(rustix::io::Result::ok),
            rules: self.rules,
            running: Mutex::default(),
            attached: Mutex::default(),
        });
        let socket = rustix::stdio::stdin();
        while let Some(request) = MounterRequest::next(socket).map_err(|error| cannot(error.into()))? {
            mounter.reap();
            // Each thread holds a reference until it ends.
            if Arc::strong_count(&mounter) > CONCURRENT_MAX {
                request.answer(Err(Errno::AGAIN));
                continue;
            }
            let its = Arc::clone(&mounter);
            // Without a thread the request is dropped, and the call fails.
            let _ = std::thread::Builder::new().spawn(move || {
                let done = its.mount(&request);
                request.answer(done);
            });
        }
        nodes.iter().for_each(|nodes| nodes.remove());
        self.notice.write(command);
        mounter.detach();
        end();
        Ok(())
    }
}

struct Mounter {
    /// Device number of the pool's file system.
    pool: u64,
    /// For root of the host: in place of devtmpfs.
    dev: Option<OwnDev>,
    rules: MountRules,
    /// Drivers that a thread waits for.
    running: Mutex<HashSet<u32>>,
    /// Kernel mounts by device number; they may be unmounted already.
    attached: Mutex<HashSet<u64>>,
}

impl Mounter {
    /// Handles one call. `Ok(false)`: not a device of this pool. Runs on a thread of its own, whose
    /// namespace it changes.
    fn mount(&self, request: &MounterRequest) -> Answer<bool> {
        let asked = &request.mount;
        if let Some(dev) = self.dev.as_ref().filter(|_| asked.kind == DEVTMPFS) {
            return dev.bind(request);
        }
        let Some((device, target)) = self.find(request)? else { return Ok(false) };
        let target = target?;
        if self.rules.kernel.contains(&asked.kind) {
            return self.attach(request, &device, &target);
        }
        let program =
            self.rules.fuse.iter().find(|(kind, _)| *kind == asked.kind).map(|(_, program)| program);
        // mount(8) reports an unknown file system. It tries all known ones, in silence, on a device
        // without a signature, and reports the last error.
        let missing = if asked.flags & libc::MS_SILENT == 0 { Errno::NODEV } else { Errno::INVAL };
        let program = program.ok_or(missing)?;
        let read_only = is_read_only(&device)? || !fuse_drivers::driver(program).writes;
        let options = options(asked, read_only)?;
        if asked.kind.starts_with("ext") {
            check_journal(&device)?;
        }
        enter_caller_namespace(request)?;
        // The path in the caller's mount namespace; an unlinked node has none.
        let path = link(&device)?;
        let user = rustix::process::geteuid().as_raw();
        if sys::mntns::fuse_mounts(user).iter().any(|(_, source)| *source == path) {
            return Err(Errno::BUSY);
        }
        rustix::process::fchdir(&target)?;
        let run = |options: &str| {
            self.run(fuse_drivers::command(program).arg(&path).arg(".").args(["-o", options]))
        };
        // libfuse 2 needs the option `nonempty` for a directory with entries; libfuse 3 does not
        // know it.
        let mut done = match has_entries() {
            true => run(&format!("{options},nonempty")),
            false => Err(Errno::INVAL),
        };
        // Never start a second driver while the first has mounted.
        if done == Err(Errno::INVAL) && check_mounted(&target).is_err() {
            done = run(&options);
        }
        if done == Err(Errno::TIMEDOUT) {
            // The driver may have mounted before it was killed.
            let _ = check_mounted(&target);
        }
        done?;
        check_mounted(&target)?;
        Ok(true)
    }

    /// Attaches the kernel mount of the device.
    fn attach(&self, request: &MounterRequest, device: &OwnedFd, target: &OwnedFd) -> Answer<bool> {
        if self.rules.root {
            return Ok(false);
        }
        let mount = request.request_kernel_mount(rustix::fs::fstat(device)?.st_rdev)?;
        let number = rustix::fs::fstat(&mount)?.st_dev;
        enter_caller_namespace(request)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", target, "", flags)?;
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
        Ok(true)
    }

    /// Flushes and unmounts kernel mounts. A mount that is still in use is flushed at least.
    fn detach(&self) {
        let attached = std::mem::take(&mut *self.attached.lock().unwrap_or_else(PoisonError::into_inner));
        for path in attached.into_iter().flat_map(sys::mntns::mounted_of) {
            if let Ok(root) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                let _ = rustix::fs::syncfs(&root);
            }
            let _ = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }

    /// The device and the mount point as the caller sees them. None if the device is not of this
    /// pool.
    fn find(&self, request: &MounterRequest) -> Answer<Option<(OwnedFd, Answer<OwnedFd>)>> {
        let (source, target) = in_root_of_caller(request, || {
            let open = |path: &[u8], flags| {
                rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            };
            let source = open(&request.mount.source, OFlags::empty());
            Ok((source, open(&request.mount.target, OFlags::DIRECTORY)))
        })?;
        let source = match source {
            Ok(source) => source,
            // In a user namespace the kernel refuses with EPERM before it looks for the device.
            Err(Errno::NOENT) if needs_device(&request.mount) => return Err(Errno::NOENT),
            Err(_) => return Ok(None),
        };
        let stat = rustix::fs::fstat(&source)?;
        let block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        Ok((block && stat.st_dev == self.pool).then_some((source, target)))
    }

    fn run(&self, command: &mut Command) -> Answer<()> {
        let mut running = self.running();
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut child = spawned.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Errno::NODEV,
            _ => Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        running.insert(child.id());
        drop(running);
        let done = fuse_drivers::wait_mounted(&mut child);
        self.running().remove(&child.id());
        done
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps drivers that ended after an unmount.
    fn reap(&self) {
        let running = self.running();
        for pid in children().into_iter().filter(|pid| !running.contains(&pid.as_raw_pid().cast_unsigned())) {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

fn link(file: &OwnedFd) -> Answer<PathBuf> {
    let link = rustix::fs::readlink(own(file), Vec::new())?;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(link.as_bytes()));
    let (named, meant) = (rustix::fs::stat(&path)?, rustix::fs::fstat(file)?);
    match (named.st_dev, named.st_ino) == (meant.st_dev, meant.st_ino) {
        true => Ok(path),
        false => Err(Errno::NOENT),
    }
}

/// True if the working directory has visible entries.
fn has_entries() -> bool {
    fs::read_dir(".").is_ok_and(|mut entries| entries.next().is_some())
}

/// Checks the mount: a driver may exit with 0 without mounting (fuse2fs that cannot open
/// /dev/fuse), or die afterwards. Unmounts a dead mount.
fn check_mounted(target: &OwnedFd) -> Answer<()> {
    let path =
        PathBuf::from(std::ffi::OsStr::from_bytes(rustix::fs::readlink(own(target), Vec::new())?.as_bytes()));
    let below = rustix::fs::fstat(target)?.st_dev;
    match fuse_drivers::probe(&path) {
        Ok(number) if number != below => return Ok(()),
        Ok(_) => {}
        Err(_) => {
            let _ = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            return Err(Errno::IO);
        }
    }
    let fuse = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    // mount(8) takes EACCES for a device that cannot be written.
    Err(fuse.err().map_or(Errno::IO, |error| if error == Errno::ACCESS { Errno::PERM } else { error }))
}

/// No FUSE driver mounts an ext4 whose journal needs a replay: "Structure needs cleaning".
fn check_journal(device: &OwnedFd) -> Answer<()> {
    let opened = rustix::fs::open(own(device), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let needs = file_system::needs_recovery(&mut Region::new(opened.as_fd(), 0, 1 << 20));
    if needs { Err(Errno::UCLEAN) } else { Ok(()) }
}

fn own(file: &OwnedFd) -> String {
    format!("/proc/thread-self/fd/{}", file.as_raw_fd())
}

fn is_read_only(device: &OwnedFd) -> Answer<bool> {
    let opened = rustix::fs::open(own(device), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    sys::block::is_read_only(opened.as_fd())
}

/// The mount options for the driver. Refuses options that a driver could misinterpret, as the
/// kernel refuses unknown options.
fn options(asked: &MountRequest, read_only_device: bool) -> Answer<String> {
    let flag = |bit: u64| asked.flags & bit != 0;
    if read_only_device && !flag(libc::MS_RDONLY) {
        return Err(Errno::ACCESS);
    }
    let mut data = asked.data.split(',').filter(|option| !option.is_empty());
    if data.any(|option| !IGNORED_OPTIONS.contains(&option)) {
        return Err(Errno::INVAL);
    }
    let mut options = vec![if flag(libc::MS_RDONLY) { "ro" } else { "rw" }, "nosuid", "nodev"];
    let more = [(libc::MS_NOEXEC, "noexec"), (libc::MS_NOATIME, "noatime"), (libc::MS_SYNCHRONOUS, "sync")];
    options.extend(more.into_iter().filter(|(bit, _)| flag(*bit)).map(|(_, name)| name));
    Ok(options.join(","))
}

/// All children, including adopted ones.
fn children() -> Vec<Pid> {
    let parent = rustix::process::getpid().as_raw_pid();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The command name may contain any character; state and parent follow it.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
        let its = fields.and_then(|fields| fields.split_ascii_whitespace().nth(1)?.parse().ok());
        its == Some(parent)
    };
    pids.filter(ours).filter_map(Pid::from_raw).collect()
}

/// Ends all drivers: they unmount and write back.
fn end() {
    let mut signal = Signal::TERM;
    for within in [END_MAX, Duration::from_millis(500)] {
        let until = Instant::now() + within;
        for pid in children() {
            let _ = kill_process(pid, signal);
        }
        while !matches!(wait(WaitOptions::NOHANG), Err(Errno::CHILD)) {
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        signal = Signal::KILL;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver_options(flags: u64, data: &str, read_only_device: bool) -> Answer<String> {
        let asked = MountRequest {
            source: b"/dev/loop0".to_vec(),
            target: b"/mnt".to_vec(),
            kind: "ext4".to_owned(),
            flags,
            data: data.to_owned(),
        };
        options(&asked, read_only_device)
    }

    #[test]
    fn passes_safe_options() {
        assert_eq!(driver_options(0, "", false).as_deref(), Ok("rw,nosuid,nodev"));
        assert_eq!(driver_options(1 | 8, "errors=remount-ro", true).as_deref(), Ok("ro,nosuid,nodev,noexec"));
        assert_eq!(driver_options(0, "", true), Err(Errno::ACCESS));
        for bad in ["suid", "dev", "allow_other", "errors=remount-ro,dev", "fsname=x", "user_id=0"] {
            assert_eq!(driver_options(0, bad, false), Err(Errno::INVAL), "{bad}");
        }
    }

    #[test]
    fn finds_children() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let found = children().iter().any(|pid| pid.as_raw_pid().cast_unsigned() == child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
    }
}
