//! The mounter: mounts file systems for a command with loop devices of its own, by programs of FUSE, or
//! has the daemon have the kernel mount them.
//!
//! A process in the command's namespaces, outside its filter, with exactly its rights; it takes the
//! stopped calls of mount(2) from the daemon, and starts a program for each that is of one of the
//! pool's devices, or attaches what it gets. It ends when the daemon says so, after the programs that it
//! started: they are its children also when they have left their parent, and have what is not written yet.
//!
//! It also keeps out of the command's mount namespace what is mounted elsewhere under the name of one of the
//! pool's devices, and tells the command's terminal when the pool ends before the command (`notice`).
//!
//! Knows how a program is started in the caller's place. Does not know who may mount, nor which program
//! mounts what (`fuse`).

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
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::notice::Notice;
use super::parse_fuse;
use crate::cli::fuse;
use crate::error::{Error, Result};
use crate::image::{Region, fs as file_system};
use crate::intercept::mounts::{MountRequest, MounterRequest, pair};
use crate::loops::Answer;
use crate::private::LOOPFS;
use crate::sys;

/// How long programs may take to write and end; the daemon waits a little longer.
const END_MAX: Duration = Duration::from_secs(3);
/// Mounts at a time.
const AT_ONCE: usize = 4;

/// Options of file systems that say nothing that a program needs to know.
const HARMLESS: [&str; 3] = ["errors=remount-ro", "relatime", "rw"];

/// A file system, and the program that mounts it.
pub(crate) type Way = (String, String);

/// What is mounted how.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Ways {
    /// By programs of FUSE.
    #[arg(value_name = "FS=PROGRAM", value_parser = parse_fuse)]
    pub(super) fuse: Vec<Way>,

    /// By the kernel.
    #[arg(long, value_name = "FS")]
    pub(super) kernel: Vec<String>,

    /// The command is root of the machine: the kernel mounts for it without us.
    #[arg(long)]
    pub(super) root: bool,
}

/// Takes calls of mount(2) on its standard input. For `loopengine run` only.
#[derive(Clone, Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct Args {
    /// Be the process that stays; otherwise start it, so that it is nobody's child.
    #[arg(long)]
    stay: bool,

    /// Numbers of loop devices that the pool does not use.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    reserved: Vec<u32>,

    #[command(flatten)]
    notice: Notice,

    #[command(flatten)]
    ways: Ways,
}

/// Starts a mounter in the namespaces of this process, which becomes the command; answers the daemon's end
/// of its socket.
pub(super) fn start(ways: Ways, pool: &str, reserved: BTreeSet<u32>) -> Result<OwnedFd> {
    let cannot = |error| Error::os(error, "cannot start a process that mounts for the command");
    let (ours, theirs) = pair().map_err(|error| cannot(error.into()))?;
    let notice = Notice::to_this_process(pool);
    let args = Args { stay: false, reserved: reserved.into_iter().collect(), notice, ways };
    let status = args.command().stdin(theirs).status().map_err(cannot)?;
    match status.success() {
        true => Ok(ours),
        false => Err(cannot(std::io::ErrorKind::Other.into())),
    }
}

impl Args {
    /// This program with these arguments. Nothing of the terminal or of a pipe is kept open by a process
    /// that stays.
    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("mounter").stdout(Stdio::null()).stderr(Stdio::null());
        command.args(self.reserved.iter().map(|number| format!("--reserved={number}")));
        command.args(self.notice.words());
        command.args(self.ways.kernel.iter().map(|kind| format!("--kernel={kind}")));
        command.args(self.ways.root.then_some("--root"));
        command.args(self.ways.fuse.iter().map(|(kind, program)| format!("{kind}={program}")));
        command
    }

    pub(crate) fn run(self) -> Result<()> {
        let cannot = |error| Error::os(error, "cannot mount for a command");
        if !self.stay {
            // Ctrl-C is for the command.
            rustix::process::setsid().map_err(|error| cannot(error.into()))?;
            self.command().arg("--stay").spawn().map_err(cannot)?;
            return Ok(());
        }
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| cannot(error.into()))?;
        let command = self.notice.watch();
        let known = self.reserved.into_iter().collect();
        // Without the thread names may mislead; that is no reason to mount nothing.
        let _ = std::thread::Builder::new().spawn(move || sys::loop_names::keep_out(&known));
        let pool = rustix::fs::stat(Path::new("/dev").join(LOOPFS)).map_err(|error| cannot(error.into()))?;
        let mounter = Arc::new(Mounter {
            pool: pool.st_dev,
            ways: self.ways,
            running: Mutex::default(),
            attached: Mutex::default(),
        });
        let socket = rustix::stdio::stdin();
        while let Some(request) = MounterRequest::next(socket).map_err(|error| cannot(error.into()))? {
            mounter.reap();
            // Each counts itself until its thread has ended.
            if Arc::strong_count(&mounter) > AT_ONCE {
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
        self.notice.tell(command);
        mounter.detach();
        end();
        Ok(())
    }
}

struct Mounter {
    /// Device number of the pool's file system.
    pool: u64,
    ways: Ways,
    /// Programs that a thread waits for.
    running: Mutex<HashSet<u32>>,
    /// What the kernel has mounted, by device number; it may have been unmounted since.
    attached: Mutex<HashSet<u64>>,
}

impl Mounter {
    /// `Ok(false)`: it is not of this pool. Called on a thread of its own, which it moves.
    fn mount(&self, request: &MounterRequest) -> Answer<bool> {
        let asked = &request.mount;
        let Some((device, target)) = self.find(request)? else { return Ok(false) };
        let target = target?;
        if self.ways.kernel.contains(&asked.kind) {
            return self.attach(request, &device, &target);
        }
        let program = self.ways.fuse.iter().find(|(kind, _)| *kind == asked.kind).map(|(_, program)| program);
        // mount(8) calls it an unknown file system.
        let program = program.ok_or(Errno::NODEV)?;
        let read_only = is_read_only(&device)? || !fuse::known(program).writes;
        let options = options(asked, read_only)?;
        if asked.kind.starts_with("ext") {
            check_journal(&device)?;
        }
        step_into(request)?;
        // Its name in the caller's mount namespace; an unlinked one has none.
        let path = link(&device)?;
        rustix::process::fchdir(&target)?;
        let run = |options: &str| self.run(fuse::command(program).arg(&path).arg(".").args(["-o", options]));
        // With libfuse 2 a directory that is not empty is covered only on demand, as mount(2) does always;
        // libfuse 3 does it always, and does not know the option.
        let mut done = match has_entries() {
            true => run(&format!("{options},nonempty")),
            false => Err(Errno::INVAL),
        };
        // Never twice on the same image, whatever a program says of the first.
        if done == Err(Errno::INVAL) && check_covered(&target).is_err() {
            done = run(&options);
        }
        if done == Err(Errno::TIMEDOUT) {
            // Killed, perhaps when it had mounted.
            let _ = check_covered(&target);
        }
        done?;
        check_covered(&target)?;
        Ok(true)
    }

    /// Attaches what the kernel mounts of the device.
    fn attach(&self, request: &MounterRequest, device: &OwnedFd, target: &OwnedFd) -> Answer<bool> {
        if self.ways.root {
            return Ok(false);
        }
        let mount = request.request_kernel_mount(rustix::fs::fstat(device)?.st_rdev)?;
        let number = rustix::fs::fstat(&mount)?.st_dev;
        step_into(request)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", target, "", flags)?;
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).insert(number);
        Ok(true)
    }

    /// Takes what the kernel has mounted off, with everything written. What is in use still, or mounted
    /// elsewhere, is written at least.
    fn detach(&self) {
        let attached = std::mem::take(&mut *self.attached.lock().unwrap_or_else(PoisonError::into_inner));
        for path in attached.into_iter().flat_map(sys::mntns::mounted_of) {
            if let Ok(root) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                let _ = rustix::fs::syncfs(&root);
            }
            let _ = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }

    /// The device, and the directory, as the caller sees them. None: not ours.
    fn find(&self, request: &MounterRequest) -> Answer<Option<(OwnedFd, Answer<OwnedFd>)>> {
        // A thread of its own: it stays where the caller is, and programs are not looked for there.
        let found = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || {
                step_into(request)?;
                rustix::process::fchdir(&request.root)?;
                rustix::process::chroot(".")?;
                rustix::process::fchdir(&request.cwd)?;
                let open = |path: &[u8], flags| {
                    rustix::fs::open(path, flags | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                };
                let Ok(source) = open(&request.mount.source, OFlags::empty()) else { return Ok(None) };
                Ok(Some((source, open(&request.mount.target, OFlags::DIRECTORY))))
            });
            thread.map_err(|_| Errno::AGAIN)?.join().unwrap_or(Err(Errno::IO))
        })?;
        let Some((source, target)) = found else { return Ok(None) };
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
        let done = fuse::finish(&mut child);
        self.running().remove(&child.id());
        done
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of programs that have ended since, after an unmount.
    fn reap(&self) {
        let running = self.running();
        for pid in children().into_iter().filter(|pid| !running.contains(&pid.as_raw_pid().cast_unsigned())) {
            let _ = waitpid(Some(pid), WaitOptions::NOHANG);
        }
    }
}

/// Moves this thread, and nothing else, into the caller's mount namespace.
fn step_into(request: &MounterRequest) -> Answer<()> {
    sys::userns::own_directories()?;
    move_into_link_name_space(request.namespace.as_fd(), Some(LinkNameSpaceType::Mount))
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

/// Whether there is anything in the working directory that can be seen.
fn has_entries() -> bool {
    fs::read_dir(".").is_ok_and(|mut entries| entries.next().is_some())
}

/// Some programs end well although they have mounted nothing (fuse2fs, where it may not open /dev/fuse), or
/// die when they have mounted: what does not answer is taken off again.
fn check_covered(target: &OwnedFd) -> Answer<()> {
    let path =
        PathBuf::from(std::ffi::OsStr::from_bytes(rustix::fs::readlink(own(target), Vec::new())?.as_bytes()));
    let below = rustix::fs::fstat(target)?.st_dev;
    match fuse::answers(&path) {
        Ok(number) if number != below => return Ok(()),
        Ok(_) => {}
        Err(_) => {
            let _ = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            return Err(Errno::IO);
        }
    }
    let fuse = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    Err(fuse.err().unwrap_or(Errno::IO))
}

/// No program of FUSE mounts an ext4 whose journal must be replayed: "Structure needs cleaning".
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

/// What the program is told. An option that it might take for another is refused, as the kernel
/// refuses one that it does not know.
fn options(asked: &MountRequest, read_only_device: bool) -> Answer<String> {
    let flag = |bit: u64| asked.flags & bit != 0;
    if read_only_device && !flag(libc::MS_RDONLY) {
        return Err(Errno::ACCESS);
    }
    let mut data = asked.data.split(',').filter(|option| !option.is_empty());
    if data.any(|option| !HARMLESS.contains(&option)) {
        return Err(Errno::INVAL);
    }
    let mut options = vec![if flag(libc::MS_RDONLY) { "ro" } else { "rw" }, "nosuid", "nodev"];
    let more = [(libc::MS_NOEXEC, "noexec"), (libc::MS_NOATIME, "noatime"), (libc::MS_SYNCHRONOUS, "sync")];
    options.extend(more.into_iter().filter(|(bit, _)| flag(*bit)).map(|(_, name)| name));
    Ok(options.join(","))
}

/// All children, also those that others left behind.
fn children() -> Vec<Pid> {
    let parent = rustix::process::getpid().as_raw_pid();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name may have anything in it; behind it are the state and the parent.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
        let its = fields.and_then(|fields| fields.split_ascii_whitespace().nth(1)?.parse().ok());
        its == Some(parent)
    };
    pids.filter(ours).filter_map(Pid::from_raw).collect()
}

/// Has all programs unmount, write and end.
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

    fn told(flags: u64, data: &str, read_only_device: bool) -> Answer<String> {
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
    fn what_a_program_is_told() {
        assert_eq!(told(0, "", false).as_deref(), Ok("rw,nosuid,nodev"));
        assert_eq!(told(1 | 8, "errors=remount-ro", true).as_deref(), Ok("ro,nosuid,nodev,noexec"));
        assert_eq!(told(0, "", true), Err(Errno::ACCESS));
        for bad in ["suid", "dev", "allow_other", "errors=remount-ro,dev", "fsname=x", "user_id=0"] {
            assert_eq!(told(0, bad, false), Err(Errno::INVAL), "{bad}");
        }
    }

    #[test]
    fn children_are_found() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let found = children().iter().any(|pid| pid.as_raw_pid().cast_unsigned() == child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
    }
}
