// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine list --all`, `find` and `detach IMAGE`: the real program and both sockets, over a
//! fake engine and fake pools. Needs root; is skipped elsewhere.

#[path = "list/images.rs"]
mod images;
mod support;
#[path = "list/users.rs"]
mod users;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use loopengine::Result;
use loopengine::control::{EngineApi, rundir::RunDir, server};
use loopengine::instance::activity::DeviceActivity;
use loopengine::loops::{Bound, DeviceEntry, PoolSpec, Quotas, flag};
use loopengine::private::{
    ContainerSession, Defaults, DeviceStatus, LoopInfo64, Mounter, Operation, OperationRequest,
    OperationResult, PoolHandle, PoolSource, Registry, TenantEvents,
};
use rustix::mount::*;
use serde_json::Value;
use support::{Fake, Ran};
use tokio::sync::watch;

const PLAIN: u32 = 65534;

/// Every pool has loop0, bound to a file, and an unbound loop1.
#[derive(Clone, Default)]
struct Bindings(Arc<Mutex<Option<(PathBuf, u64)>>>);

impl Bindings {
    fn to(&self, image: &Path, rdev: u64) {
        *self.0.lock().unwrap() = Some((image.to_owned(), rdev));
    }

    fn image(&self) -> PathBuf {
        self.0.lock().unwrap().as_ref().map(|(image, _)| image.clone()).unwrap_or_default()
    }
}

impl PoolSource for Bindings {
    fn quotas(&self) -> Quotas {
        Quotas::default()
    }

    fn open(&self, spec: &PoolSpec, events: TenantEvents) -> Result<(Arc<dyn PoolHandle>, OwnedFd)> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_create(&context).unwrap();
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        Ok((Arc::new(BoundPool(self.clone(), events, spec.clone())), mount))
    }
}

struct BoundPool(Bindings, TenantEvents, PoolSpec);

impl PoolHandle for BoundPool {
    fn supervise(&self, _: OwnedFd, _: OwnedFd, _: Option<Mounter>) -> Result<()> {
        Ok(())
    }

    fn admit(&self, _: ContainerSession) -> Result<()> {
        Ok(())
    }

    fn reset(&self) {}

    fn device_numbers(&self) -> Vec<u64> {
        Vec::new()
    }

    fn entries(&self) -> Vec<DeviceEntry> {
        let bound = self.0.0.lock().unwrap().clone().map(|(backing_file, rdev)| {
            let stat = rustix::fs::stat(&backing_file);
            let (image_device, image_inode) = stat.map_or((0, 0), |stat| (stat.st_dev, stat.st_ino));
            let flags = flag::READ_ONLY;
            (Bound { backing_file, image_device, image_inode, offset: 512, size_limit: 0, flags }, rdev)
        });
        let entry = |number, rdev, bound| DeviceEntry {
            number,
            rdev,
            generation: 1,
            size: 8 << 20,
            block_size: 512,
            bound,
            partitions: Vec::new(),
        };
        let free = entry(1, rustix::fs::makedev(259, 7001), None);
        bound.map(|(bound, rdev)| entry(0, rdev, Some(bound))).into_iter().chain([free]).collect()
    }

    fn activity(&self) -> Vec<DeviceActivity> {
        let PoolSpec { name, uid, .. } = self.2.clone();
        vec![DeviceActivity { owner: name, uid, ..DeviceActivity::default() }]
    }

    fn operate(&self, asked: &OperationRequest, _: Option<OwnedFd>) -> OperationResult {
        match (asked.operation, asked.number) {
            (Operation::List, _) => {
                OperationResult { devices: Some(self.entries()), ..OperationResult::default() }
            }
            (Operation::Status, Some(0)) => {
                let meta = fs::metadata(self.0.image()).unwrap();
                let info = LoopInfo64 { offset: 512, size_limit: 0, flags: 1, file_name: Vec::new() };
                let (device, inode) = (meta.dev(), meta.ino());
                let status = DeviceStatus { number: 0, device, inode, rdevice: 0, info };
                OperationResult { status: Some(status), ..OperationResult::default() }
            }
            _ => OperationResult { errno: Some(libc::ENXIO), ..OperationResult::default() },
        }
    }

    fn end(&self, _: bool) {
        self.1.ended();
    }
}

struct Daemon {
    bindings: Bindings,
    dir: tempfile::TempDir,
    registry: Arc<Registry>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    children: Vec<Child>,
}

impl Daemon {
    fn start() -> Option<Daemon> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        // Plain users must be able to run the program.
        fs::copy(env!("CARGO_BIN_EXE_loopengine"), dir.path().join("loopengine")).unwrap();
        let run_dir = RunDir::take(&dir.path().join("run")).unwrap();
        let (control, private) = (run_dir.bind().unwrap(), run_dir.bind_private().unwrap());
        let bindings = Bindings::default();
        let defaults = Defaults { devices: 64, pools: 8 };
        let registry = Arc::new(Registry::start(bindings.clone(), defaults).unwrap());
        let (stop, stopping) = watch::channel(false);
        let (served, backend): (_, Arc<dyn EngineApi>) = (registry.clone(), Fake::new());
        let thread = std::thread::spawn(move || {
            let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
            runtime.block_on(async {
                let [control, private] =
                    [control, private].map(|one| tokio::net::UnixListener::from_std(one).unwrap());
                let also = server::serve_private(private, served, stopping.clone());
                tokio::join!(server::serve(control, backend, stopping), also);
            });
            run_dir.unbind();
        });
        Some(Daemon { bindings, dir, registry, stop, thread: Some(thread), children: Vec::new() })
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    }

    fn program(&self, uid: u32, words: &[&str]) -> Command {
        let mut command = Command::new(self.dir.path().join("loopengine"));
        command.env("LOOPENGINE_RUN_DIR", self.dir.path().join("run")).args(words);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn run(&self, uid: u32, words: &[&str]) -> Ran {
        let done = self.program(uid, words).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Ran { code: done.status.code().unwrap(), out: text(&done.stdout), err: text(&done.stderr) }
    }

    fn json(&self, uid: u32, words: &[&str]) -> Value {
        let words: Vec<&str> = words.iter().chain(&["--json"]).copied().collect();
        serde_json::from_str(ok(&self.run(uid, &words))).unwrap()
    }

    /// A tenant: a pool and its process.
    fn tenant(&mut self, uid: u32, name: &str) -> u32 {
        let script = ["sh", "-c", "echo up; exec sleep 1000"];
        let words: Vec<&str> = ["instance", "open", "--name", name, "--"].into_iter().chain(script).collect();
        let child = self.program(uid, &words).stdout(Stdio::piped()).spawn().unwrap();
        self.up(child)
    }

    /// Waits for the first line of a child, which is killed when the daemon is dropped.
    fn up(&mut self, mut child: Child) -> u32 {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        let pid = child.id();
        self.children.push(child);
        // The child prints the line before it executes sleep.
        let is_there = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "sleep\n";
        while !is_there() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        pid
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.registry.shutdown();
    }
}

fn ok(ran: &Ran) -> &str {
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    &ran.out
}

fn fails(ran: &Ran, code: i32, says: &str) {
    assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{ran:?}");
    assert!(ran.err.contains(says), "{says}: {ran:?}");
    assert_eq!(ran.err.matches('\n').count(), 1, "one line: {ran:?}");
}

/// The cells of the row with this prefix, without its age.
fn row(table: &str, start: &str) -> Vec<String> {
    let line =
        table.lines().find(|line| line.split_whitespace().collect::<Vec<_>>().join(" ").starts_with(start));
    let line = line.unwrap_or_else(|| panic!("no row {start}:\n{table}"));
    let cells: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let age = &cells[8];
    assert!(age.ends_with('s') || age.ends_with('d'), "{cells:?}");
    [&cells[..8], &cells[9..]].concat()
}

#[test]
fn root_sees_every_device_pool_and_tenant() {
    let Some(mut daemon) = Daemon::start() else { return };
    let image = daemon.image("a.img");
    ok(&daemon.run(0, &["attach", "a.img"]));
    let (own, plain) = (daemon.tenant(0, "ci"), daemon.tenant(PLAIN, "p"));
    // The disk of loop0 is mounted in another namespace.
    let dir = daemon.dir.path().join("mnt");
    fs::create_dir(&dir).unwrap();
    let script = "mount -t tmpfs x mnt && stat -c %d mnt >number && echo up && exec sleep 1000";
    let mut elsewhere = Command::new("unshare");
    elsewhere.args(["-m", "sh", "-c", script]).current_dir(daemon.dir.path()).stdout(Stdio::piped());
    daemon.up(elsewhere.spawn().unwrap());
    let number = fs::read_to_string(daemon.dir.path().join("number")).unwrap();
    let bound = daemon.image("b.img");
    daemon.bindings.to(&bound, number.trim().parse().unwrap());

    let all = daemon.run(0, &["list", "--all"]);
    let table = ok(&all);
    assert_eq!(
        table.lines().next().unwrap().split_whitespace().collect::<Vec<_>>().join(" "),
        "KIND NAME DEVICE SIZE USER PID COMMAND CONTAINER AGE MOUNTED ON IMAGE"
    );
    let (dir, bound) = (dir.to_str().unwrap(), bound.to_str().unwrap());
    let instance =
        ["instance", "default", "loop0", "1M", "root", "-", "-", "-", "-", image.to_str().unwrap()];
    assert_eq!(row(table, "instance"), instance);
    let (own, other) = (own.to_string(), plain.to_string());
    let want = ["pool", "ci", "loop0", "8M", "root", &own, "sleep", "-", dir, bound];
    assert_eq!(row(table, "pool ci"), want);
    let want = ["pool", "65534.p", "loop0", "8M", "nobody", &other, "sleep", "-", dir, bound];
    assert_eq!(row(table, "pool 65534.p"), want);

    let json = daemon.json(0, &["list", "--all"]);
    let pool = &json["pools"][1];
    assert_eq!((&pool["process"]["pid"], &pool["process"]["command"]), (&plain.into(), &"sleep".into()));
    assert_eq!(
        (&pool["uid"], &pool["user"], &pool["maxDevices"]),
        (&PLAIN.into(), &"nobody".into(), &8.into())
    );
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let since = pool["sinceUnixSeconds"].as_u64().unwrap();
    assert!(since <= now && now - since < 60, "{since} of {now}");
    let [first, second] = &pool["devices"].as_array().unwrap()[..] else { panic!("{pool}") };
    assert_eq!((&first["image"], &first["mountedOn"]), (&bound.into(), &serde_json::json!([dir])));
    assert_eq!((&first["offsetBytes"], &first["readOnly"]), (&512.into(), &true.into()));
    assert_eq!(second["image"], Value::Null);

    // An ended tenant is not listed.
    let mut child = daemon.children.remove(1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(daemon.json(0, &["list", "--all"])["pools"][1]["process"], Value::Null);
}

/// The keys of the '--json' output, which scripts depend on.
#[test]
fn json_has_a_schema() {
    let Some(mut daemon) = Daemon::start() else { return };
    let image = daemon.image("a.img");
    ok(&daemon.run(0, &["attach", "a.img"]));
    daemon.tenant(0, "ci");
    daemon.bindings.to(&image, rustix::fs::makedev(259, 7000));
    for words in [&["list", "--all"][..], &["find", "a.img"]] {
        let json = daemon.json(0, words);
        let keys = |value: &Value| {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort_unstable();
            keys.join(" ")
        };
        assert_eq!(keys(&json), "devices pools");
        assert_eq!(keys(&json["devices"][0]), "device mountedOn openIn");
        let pool = &json["pools"][0];
        let want = "backend container devices ending maxDevices name process sinceUnixSeconds uid user";
        assert_eq!(keys(pool), want);
        assert_eq!(keys(&pool["process"]), "command pid");
        let want =
            "blockSizeBytes image mountedOn number offsetBytes openIn readOnly sizeBytes sizeLimitBytes";
        assert_eq!(keys(&pool["devices"][0]), want);
    }
}

#[test]
fn instance_list_counts_pools() {
    let Some(mut daemon) = Daemon::start() else { return };
    let before = daemon.run(0, &["instance", "list"]);
    assert_eq!(ok(&before).lines().count(), 2, "{before:?}");
    daemon.tenant(PLAIN, "p");
    let after = daemon.run(0, &["instance", "list"]);
    let footer = "\n1 private pool with 1 device: 'loopengine list --all' lists them\n";
    assert_eq!(ok(&after), before.out + footer);
}
