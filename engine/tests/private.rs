// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine run` and the private socket: the real program, the real registry, and fake pools,
//! whose nodes have no device. Needs root; is skipped elsewhere.

#[path = "private/limits.rs"]
mod limits;
#[path = "private/socket.rs"]
mod socket;
#[path = "private/tree.rs"]
mod tree;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loopengine::control::{PrivateClient, rundir::RunDir, server};
use loopengine::loops::{Bound, DeviceEntry, PartitionEntry, PoolSpec, Quotas, flag};
use loopengine::private::{
    ContainerSession, Defaults, Mounter, OpenSpec, Operation, OperationRequest, OperationResult, PoolHandle,
    PoolSource, Registry, TenantEvents,
};
use loopengine::{Kind, Result};
use rustix::fs::{FileType, Mode, makedev, mknodat};
use rustix::mount::*;
use tokio::sync::watch;

/// A user that is not root.
const PLAIN: u32 = 65534;

/// Major 259, as for ublk; the minors have no device.
fn rdev(minor: u32) -> u64 {
    makedev(259, 7000 + minor)
}

fn entry(number: u32) -> DeviceEntry {
    DeviceEntry {
        number,
        rdev: rdev(16 * number),
        generation: 1,
        size: 8 << 20,
        block_size: 512,
        bound: None,
        partitions: Vec::new(),
    }
}

/// A source of fake pools.
#[derive(Clone, Default)]
struct Fake {
    pools: Arc<Mutex<Vec<Arc<FakePool>>>>,
}

struct FakePool {
    events: TenantEvents,
    entries: Mutex<Vec<DeviceEntry>>,
    ended: Mutex<Option<(bool, Instant)>>,
    listener: Mutex<Option<OwnedFd>>,
}

impl PoolSource for Fake {
    fn quotas(&self) -> Quotas {
        Quotas::default()
    }

    fn open(&self, _spec: &PoolSpec, events: TenantEvents) -> Result<(Arc<dyn PoolHandle>, OwnedFd)> {
        let pool = Arc::new(FakePool {
            events,
            entries: Mutex::default(),
            ended: Mutex::default(),
            listener: Mutex::default(),
        });
        self.pools.lock().unwrap().push(pool.clone());
        Ok((pool, nodes()))
    }
}

/// Like loopfs: loop-control and some loopN.
fn nodes() -> OwnedFd {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&context).unwrap();
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let mode = Mode::from_raw_mode(0o666);
    mknodat(&mount, "loop-control", FileType::CharacterDevice, mode, makedev(1, 3)).unwrap();
    for number in 0..4 {
        let node = format!("loop{number}");
        mknodat(&mount, &node, FileType::BlockDevice, mode, rdev(16 * number)).unwrap();
        for partition in 1..3 {
            let node = format!("loop{number}p{partition}");
            mknodat(&mount, &node, FileType::BlockDevice, mode, rdev(16 * number + partition)).unwrap();
        }
    }
    mount
}

impl PoolHandle for FakePool {
    fn supervise(&self, listener: OwnedFd, _: OwnedFd, _: Option<Mounter>) -> Result<()> {
        let served = listener.try_clone().unwrap();
        std::thread::spawn(move || refuse(&served));
        *self.listener.lock().unwrap() = Some(listener);
        Ok(())
    }

    fn admit(&self, session: ContainerSession) -> Result<()> {
        self.supervise(session.listener, session.namespace.unwrap(), None)
    }

    fn reset(&self) {}

    fn device_numbers(&self) -> Vec<u64> {
        Vec::new()
    }

    fn entries(&self) -> Vec<DeviceEntry> {
        self.entries.lock().unwrap().clone()
    }

    /// Supports lists, and binds one device after the other.
    fn operate(&self, asked: &OperationRequest, file: Option<OwnedFd>) -> OperationResult {
        let mut outcome = OperationResult::default();
        match (asked.operation, file) {
            (Operation::List, None) => outcome.devices = Some(self.entries()),
            (Operation::GetFree, None) => outcome.number = Some(self.entries().len() as u32),
            (Operation::Configure, Some(file)) => {
                let backing_file = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
                let info = asked.info.clone().unwrap();
                let bound = Bound {
                    backing_file,
                    image_device: 1,
                    image_inode: 2,
                    offset: info.offset,
                    size_limit: info.size_limit,
                    flags: info.flags,
                };
                let block_size = asked.value.unwrap() as u32;
                self.put(DeviceEntry { block_size, bound: Some(bound), ..entry(asked.number.unwrap()) });
            }
            _ => outcome.errno = Some(libc::EBUSY),
        }
        outcome
    }

    fn end(&self, force: bool) {
        *self.ended.lock().unwrap() = Some((force, Instant::now()));
        self.events.ended();
    }
}

impl FakePool {
    fn put(&self, entry: DeviceEntry) {
        let mut entries = self.entries.lock().unwrap();
        entries.retain(|known| known.number != entry.number);
        entries.push(entry.clone());
        self.events.changed(entry.number, || Some(entry));
    }
}

/// Fails every call with ENXIO, as an unbound device does, until the last caller is gone.
fn refuse(listener: &OwnedFd) {
    const RECEIVE: libc::Ioctl = 0xc050_2100;
    const SEND: libc::Ioctl = 0xc018_2101;
    loop {
        let mut call = [0u64; 10];
        // SAFETY: writes one struct seccomp_notif, of 80 bytes, all zero before.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, call.as_mut_ptr()) } != 0 {
            let error = std::io::Error::last_os_error().raw_os_error();
            if error == Some(libc::EINTR) {
                continue;
            }
            return;
        }
        let error = u64::from((-libc::ENXIO).cast_unsigned());
        let mut answer = [call[0], 0, error];
        // SAFETY: reads one struct seccomp_notif_resp, of 24 bytes.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND, answer.as_mut_ptr()) };
    }
}

struct Daemon {
    fake: Fake,
    dir: tempfile::TempDir,
    registry: Arc<Registry>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start() -> Option<Daemon> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        // Plain users must be able to search the directory.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let run_dir = RunDir::take(&dir.path().join("run")).unwrap();
        let listener = run_dir.bind_private().unwrap();
        let fake = Fake::default();
        let defaults = Defaults { devices: 12, pools: 3 };
        let registry = Arc::new(Registry::start(fake.clone(), defaults).unwrap());
        let (stop, stopping) = watch::channel(false);
        let served = registry.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                server::serve_private(listener, served, stopping).await;
            });
            run_dir.unbind();
        });
        Some(Daemon { fake, dir, registry, stop, thread: Some(thread) })
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A copy of the program that a plain user can run.
    fn program(&self, uid: u32) -> Command {
        let copy = self.dir.path().join("loopengine");
        if !copy.exists() {
            // By another process: a concurrent fork of this one would inherit the file open for
            // writing.
            let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_loopengine")).arg(&copy).status();
            assert!(copied.unwrap().success());
        }
        let mut command = Command::new(copy);
        command.arg("--run-dir").arg(self.run_dir()).current_dir("/").stdin(Stdio::null());
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn run(&self, uid: u32, script: &str) -> Output {
        self.program(uid).args(["run", "--", "sh", "-c", script]).output().unwrap()
    }

    fn pool(&self) -> Arc<FakePool> {
        self.fake.pools.lock().unwrap().last().unwrap().clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.registry.shutdown();
    }
}

fn out(output: &Output) -> String {
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(err, "");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < until, "not within 5 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_command_sees_only_its_own_devices() {
    let Some(daemon) = Daemon::start() else { return };
    // Other tests mount elsewhere concurrently.
    let mounts = || -> Vec<String> {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let is_there = |line: &&str| {
            let point = line.split(' ').nth(4).unwrap();
            ["/dev", "/sys", "/proc"].iter().any(|dir| point.starts_with(dir))
        };
        all.lines().filter(is_there).map(str::to_owned).collect()
    };
    let before = mounts();
    let outside =
        Command::new("sh").args(["-c", "ls -A /proc/self/fd | wc -l"]).stdin(Stdio::null()).output();
    let descriptors = out(&outside.unwrap());
    for (uid, user) in [(0, false), (0, true), (PLAIN, false)] {
        let script = "id -u; readlink /dev/loop-control; stat -c %F /dev/loopfs/loop0; echo x >/dev/null; \
                      head -c 1 /dev/zero | wc -c; ls -d /dev/loop[0-9]* /sys/block/loop* /sys/block/ublk* 2>/dev/null; \
                      test -d /dev/pts && test -e /dev/tty && grep -c ' /dev/loopfs ' /proc/self/mountinfo; ls -A /proc/self/fd | wc -l";
        let mut program = daemon.program(uid);
        program.arg("run").args(user.then_some("--user")).args(["--", "sh", "-c", script]);
        let text = out(&program.output().unwrap());
        assert_eq!(
            text,
            format!("0\nloopfs/loop-control\nblock special file\n1\n1\n{descriptors}"),
            "{uid} {user}"
        );
    }
    assert_eq!(before, mounts(), "no mounts are visible outside");
}

#[test]
fn returns_the_exit_status_of_the_command() {
    let Some(daemon) = Daemon::start() else { return };
    for uid in [0, PLAIN] {
        assert_eq!(daemon.run(uid, "exit 7").status.code(), Some(7));
        assert_eq!(daemon.run(uid, "kill -9 $$").status.signal(), Some(9));
        let missing = daemon.program(uid).args(["run", "--", "no-such-program"]).output().unwrap();
        let err = String::from_utf8_lossy(&missing.stderr);
        assert_eq!(missing.status.code(), Some(127));
        assert!(
            err.starts_with("loopengine: cannot run no-such-program: ") && err.matches('\n').count() == 1,
            "{err}"
        );
    }
}

#[test]
fn a_pool_ends_with_its_last_process() {
    let Some(daemon) = Daemon::start() else { return };
    let output = daemon.run(PLAIN, "sleep 0.3 >/dev/null 2>&1 </dev/null & echo started");
    assert_eq!(out(&output), "started\n");
    let pool = daemon.pool();
    assert!(pool.ended.lock().unwrap().is_none(), "a child still runs");
    eventually("the pool ends", || pool.ended.lock().unwrap().is_some());
    assert!(pool.ended.lock().unwrap().unwrap().0, "by force");
    eventually("no pool is listed", || {
        daemon.registry.list(loopengine::private::Caller { uid: 0, gid: 0, pid: None }).is_empty()
    });
    // After SIGKILL: within a second.
    let mut child = daemon.program(0).args(["run", "--", "sleep", "60"]).spawn().unwrap();
    eventually("the command runs", || daemon.pool().listener.lock().unwrap().is_some());
    child.kill().unwrap();
    let killed = Instant::now();
    eventually("the pool ends", || daemon.pool().ended.lock().unwrap().is_some());
    assert!(daemon.pool().ended.lock().unwrap().unwrap().1 - killed < Duration::from_secs(1));
    child.wait().unwrap();
}
