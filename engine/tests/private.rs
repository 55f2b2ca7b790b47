// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine run` and the private socket: the real program, the real registry, and fake pools,
//! whose nodes have no device. Needs root; is skipped elsewhere.

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
fn names_follow_the_pool() {
    let Some(daemon) = Daemon::start() else { return };
    let script = "echo ready; read go; readlink /dev/loop0 /dev/loop1 /dev/loop1p2; cat /sys/block/loop1/size \
                  /sys/block/loop1/loop1p2/start; echo ready; read go; ls -d /dev/loop[0-9]* /sys/class/block/loop*";
    for uid in [0, PLAIN] {
        let mut child = daemon
            .program(uid)
            .args(["run", "--", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut go = child.stdin.take().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let mut next = || lines.next().unwrap().unwrap();
        assert_eq!(next(), "ready");
        let pool = daemon.pool();
        pool.put(entry(0));
        let partition = |number| PartitionEntry {
            number,
            rdev: rdev(16 + number),
            generation: 1,
            start: 2048 * u64::from(number),
            size: 1 << 20,
        };
        pool.put(DeviceEntry { partitions: vec![partition(1), partition(2)], ..entry(1) });
        writeln!(go).unwrap();
        for want in ["loopfs/loop0", "loopfs/loop1", "loopfs/loop1p2", "16384", "4096", "ready"] {
            assert_eq!(next(), want);
        }
        pool.put(entry(1));
        pool.events.changed(0, || None);
        writeln!(go).unwrap();
        assert_eq!([next(), next()], ["/dev/loop1", "/sys/class/block/loop1"]);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn util_linux_reads_the_tree() {
    let Some(daemon) = Daemon::start() else { return };
    let script = "echo ready; read go; losetup -l -J -O NAME,SIZELIMIT,OFFSET,AUTOCLEAR,RO,BACK-FILE,DIO,LOG-SEC,PARTSCAN; \
                  echo; losetup -j /images/a.img; losetup -a; lsblk -J -b -o NAME,TYPE,SIZE,RO,MAJ:MIN,LOG-SEC,PKNAME,START";
    let mut child = daemon
        .program(0)
        .args(["run", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the command runs", || {
        daemon.fake.pools.lock().unwrap().last().is_some_and(|p| p.listener.lock().unwrap().is_some())
    });
    let pool = daemon.pool();
    let bound = Bound {
        backing_file: "/images/a.img".into(),
        image_device: 1,
        image_inode: 2,
        offset: 512,
        size_limit: 1 << 20,
        flags: flag::READ_ONLY | flag::AUTOCLEAR | flag::PARTSCAN,
    };
    let partition = PartitionEntry { number: 1, rdev: rdev(17), generation: 1, start: 2048, size: 1 << 20 };
    pool.put(entry(0));
    pool.put(DeviceEntry { block_size: 4096, bound: Some(bound), partitions: vec![partition], ..entry(1) });
    writeln!(child.stdin.take().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    eprintln!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let dense: String = text.split_whitespace().collect();
    for want in [
        r#""name":"/dev/loop1","sizelimit":1048576,"offset":512,"autoclear":true,"ro":true,"back-file":"/images/a.img","dio":false,"log-sec":4096,"partscan":true"#,
        r#""name":"loop1p1","type":"part","size":1048576"#,
        r#""name":"loop1","type":"loop","size":8388608,"ro":true,"maj:min":"259:7016","log-sec":4096"#,
    ] {
        assert!(dense.contains(want), "{want}\n{text}");
    }
    assert_eq!(text.matches("(/images/a.img), offset 512, sizelimit 1048576").count(), 2, "{text}");
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

#[test]
fn enforces_limits_that_root_changes() {
    let Some(daemon) = Daemon::start() else { return };
    let run = |max: &str| daemon.program(PLAIN).args(["run", "--max", max, "--", "true"]).output().unwrap();
    assert_eq!(run("12").status.code(), Some(0));
    eventually("the pool has ended", || {
        daemon.registry.limits(loopengine::private::Caller { uid: 0, gid: 0, pid: None }).len() == 1
    });
    let refused = run("13");
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    let user = PLAIN.to_string();
    let by_user = daemon.program(PLAIN).args(["limit", &user, "100"]).output().unwrap();
    assert_eq!(by_user.status.code(), Some(6), "{by_user:?}");
    out(&daemon.program(0).args(["limit", &user, "100"]).output().unwrap());
    assert_eq!(run("13").status.code(), Some(0));
    let shown = daemon.program(0).args(["limit", "--json"]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_str(&out(&shown)).unwrap();
    assert_eq!((&shown[0]["maxDevices"], &shown[1]["maxDevices"]), (&12.into(), &100.into()));
    out(&daemon.program(0).args(["limit", &user, "default"]).output().unwrap());
    assert_eq!(run("13").status.code(), Some(125));
}

/// The output of 'loopengine limit', by name and number.
#[test]
fn applies_limits_of_the_configuration() {
    let Some(daemon) = Daemon::start() else { return };
    let limit = |uid, words: &[&str]| daemon.program(uid).arg("limit").args(words).output().unwrap();
    let row = |user: &str| {
        let shown = out(&limit(0, &[user]));
        shown.lines().nth(1).unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    assert_eq!((row("65534"), row("root")), ("nobody 12 0 0 3".to_owned(), "root none 0 0 none".to_owned()));
    let text = "[[private.user]]\nuser = 'nobody'\nmax_devices = 20\nmax_pools = 1\n";
    let (users, unknown) = loopengine::config::Config::parse(text, "x.toml").unwrap().users();
    assert!(unknown.is_empty());
    daemon.registry.configure(&users);
    assert_eq!((row("nobody"), row("65534")), ("nobody 20 0 0 1".to_owned(), "nobody 20 0 0 1".to_owned()));
    out(&limit(0, &["nobody", "30"]));
    assert_eq!(row("nobody"), "nobody 30 0 0 1");
    out(&limit(0, &["nobody", "default"]));
    assert_eq!(row("nobody"), "nobody 20 0 0 1");
    assert_eq!(out(&limit(PLAIN, &["nobody"])), out(&limit(0, &["nobody"])));
    assert_eq!(limit(PLAIN, &["root"]).status.code(), Some(6));
    let unknown = limit(0, &["no-such-user"]);
    let said = String::from_utf8_lossy(&unknown.stderr);
    assert!(unknown.status.code() == Some(2) && said.contains("is in /etc/passwd"), "{unknown:?}");
}

#[test]
fn completes_pool_names() {
    let Some(daemon) = Daemon::start() else { return };
    let root = loopengine::private::Caller { uid: 0, gid: 0, pid: None };
    let _pool =
        daemon.registry.open(&OpenSpec { name: Some("ci".into()), ..OpenSpec::default() }, root).unwrap();
    let mut asking = daemon.program(0);
    asking.envs([("LOOPENGINE_COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", "3"), ("_CLAP_IFS", "\u{b}")]);
    let offered = asking.args(["--", "loopengine", "losetup", "--pool", ""]).output().unwrap();
    assert_eq!(out(&offered).split('\u{b}').next(), Some("ci"));
}

#[test]
fn users_access_only_their_own_pools() {
    let Some(daemon) = Daemon::start() else { return };
    let (root, plain) = (
        loopengine::private::Caller { uid: 0, gid: 0, pid: None },
        loopengine::private::Caller { uid: PLAIN, gid: PLAIN, pid: None },
    );
    let named = |name: &str| OpenSpec { name: Some(name.into()), ..OpenSpec::default() };
    let registry = &daemon.registry;
    assert_eq!(registry.open(&named("a"), root).unwrap().name, "a");
    assert_eq!(registry.open(&named("a"), plain).unwrap().name, "65534.a");
    assert_eq!(registry.open(&named("a"), root).unwrap_err().kind(), Kind::Exists);
    assert_eq!(registry.open(&named("../a"), plain).unwrap_err().kind(), Kind::Invalid);
    let for_others = OpenSpec { uid: Some(0), ..named("b") };
    assert_eq!(registry.open(&for_others, plain).unwrap_err().kind(), Kind::Denied);
    let for_plain = OpenSpec { uid: Some(PLAIN), gid: Some(PLAIN), ..named("c") };
    registry.open(&for_plain, root).unwrap();
    let names = |caller| registry.list(caller).into_iter().map(|pool| pool.name).collect::<Vec<_>>();
    assert_eq!(names(root), ["a", "65534.a", "c"]);
    assert_eq!(names(plain), ["65534.a", "c"]);
    assert_eq!(registry.close("a", true, plain).unwrap_err().kind(), Kind::NotFound);
    // A file that is not a listener never reaches a supervisor.
    let file: OwnedFd = File::open("/dev/null").unwrap().into();
    let namespace: OwnedFd = File::open("/proc/self/ns/user").unwrap().into();
    let refused = registry.supervise("a", file, namespace, None, root).unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
    // Only pools for containers have hooks, and only root owns such pools: users cannot write to
    // the daemon's log.
    let report = |name, caller| registry.report_container(name, "c1", "no disk", caller);
    assert_eq!(report("65534.a", plain).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(report("a", plain).unwrap_err().kind(), Kind::NotFound);
    let dev = || OwnedFd::from(File::open("/dev/null").unwrap());
    let set_dev = |name, caller| registry.set_container_dev(name, "c1", dev(), caller);
    assert!(set_dev("65534.a", plain).unwrap_err().message().contains("not for containers"));
    registry.close("65534.a", false, plain).unwrap();
    eventually("the pool is gone", || names(plain) == ["c"]);
    registry.shutdown();
    assert!(names(root).is_empty());
    assert_eq!(registry.open(&named("d"), root).unwrap_err().kind(), Kind::Unavailable);
}

#[test]
fn losetup_works_over_the_socket() {
    let Some(daemon) = Daemon::start() else { return };
    let image = daemon.dir.path().join("a.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let image = image.to_str().unwrap();
    let losetup = |uid, words: &[&str]| daemon.program(uid).arg("losetup").args(words).output().unwrap();
    let fails = |output: Output, code, says: &str| {
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(err.contains(says) && err.matches('\n').count() == 1, "{err}");
    };
    fails(losetup(PLAIN, &["-a"]), 3, "run -- CMD'");
    fails(losetup(0, &["-a"]), 3, "instance mount DIR'");
    let open = |uid, name: &str| {
        let spec = OpenSpec { name: Some(name.into()), ..OpenSpec::default() };
        daemon.registry.open(&spec, loopengine::private::Caller { uid, gid: uid, pid: None }).unwrap()
    };
    let _root = open(0, "r");
    fails(losetup(PLAIN, &["-a"]), 3, "run -- CMD'");
    let _plain = open(PLAIN, "p");
    let bound = losetup(PLAIN, &["-f", "--show", "-b", "4096", "-o", "512", image]);
    assert_eq!(out(&bound), "65534.p/loop0\n");
    assert_eq!(out(&losetup(PLAIN, &["-f"])), "65534.p/loop1\n");
    let line = format!("65534.p/loop0: []: ({image}), offset 512\n");
    assert_eq!(out(&losetup(PLAIN, &["-a"])), line);
    assert_eq!(out(&losetup(0, &["-a"])), "", "root's own pool is used");
    assert_eq!(out(&losetup(0, &["--pool", "65534.p", "-a"])), line);
    let table = losetup(PLAIN, &["-n", "-O", "NAME,LOG-SEC,BACK-FILE"]);
    assert_eq!(out(&table), format!("65534.p/loop0    4096 {image}\n"));
    // Errnos and wrong options are reported as by losetup.
    let says = "losetup: 65534.p/loop0: detach failed: Device or resource busy";
    fails(losetup(PLAIN, &["-d", "loop0"]), 1, says);
    let wrong = losetup(PLAIN, &["--nothing"]);
    assert_eq!(wrong.status.code(), Some(1));
    let text = "losetup: unrecognized option '--nothing'\nTry 'losetup --help' for more information.\n";
    assert_eq!(String::from_utf8_lossy(&wrong.stderr), text);
    // Pools of others are invisible.
    for name in ["r", "none"] {
        fails(losetup(PLAIN, &["--pool", name, "-a"]), 3, &format!("no private pool \"{name}\""));
    }
    let _second = open(PLAIN, "q");
    fails(losetup(PLAIN, &["-a"]), 2, "65534.p, 65534.q");
    let chosen = daemon.program(PLAIN).args(["losetup", "-a"]).env("LOOPENGINE_POOL", "65534.p").output();
    assert_eq!(out(&chosen.unwrap()), line);
    // At most one descriptor.
    block_on(async {
        let mut client = PrivateClient::connect(&daemon.run_dir()).await.unwrap();
        let list = OperationRequest::of(Operation::List);
        let devices = client.operate("r", &list, None).await.unwrap().devices;
        assert_eq!(devices, Some(Vec::new()));
    });
}

#[test]
fn limits_hostile_clients() {
    let Some(daemon) = Daemon::start() else { return };
    let socket = daemon.run_dir().join("private");
    let mut flood = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    flood.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let chunk = [b'x'; 4096];
    assert!((0..1000).any(|_| flood.write_all(&chunk).is_err()), "4 MB without an end were accepted");
    block_on(async {
        let mut client = PrivateClient::connect(&daemon.run_dir()).await.unwrap();
        assert!(client.list().await.unwrap().is_empty(), "others are served");
    });
}
