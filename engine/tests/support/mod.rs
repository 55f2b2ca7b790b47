// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon without ublk: the real control server over a fake engine.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use loopengine::control::{EngineApi, rundir::RunDir, server};
use loopengine::instance::Selector;
use loopengine::instance::activity::DeviceActivity;
use loopengine::instance::spec::*;
use loopengine::{Error, Kind, Result};
use tokio::sync::watch;

/// All kinds of errors.
pub const KINDS: [Kind; 11] = [
    Kind::Invalid,
    Kind::NotFound,
    Kind::Exists,
    Kind::Busy,
    Kind::Quota,
    Kind::Denied,
    Kind::Unsupported,
    Kind::Unavailable,
    Kind::Deadline,
    Kind::Io,
    Kind::Internal,
];

/// A fake engine that records calls. Some names have a meaning: the instance `error-Busy` fails
/// with that kind, the instance `panic` panics, the instance `slow` waits for [`Fake::release`], a
/// device of an image named `busy.img` is in use.
#[derive(Default)]
pub struct Fake {
    state: Mutex<State>,
    released: (Mutex<bool>, Condvar),
}

#[derive(Default)]
struct State {
    instances: BTreeMap<String, InstanceSpec>,
    devices: Vec<Served>,
    at_ns: u64,
}

struct Served {
    info: DeviceInfo,
    /// Device and inode numbers of the received files.
    file: (u64, u64),
    writable: bool,
}

impl Fake {
    pub fn new() -> Arc<Fake> {
        let fake = Fake::default();
        fake.create_instance(&instance("default", 4)).unwrap();
        Arc::new(fake)
    }

    /// Lets calls on the instance `slow` continue.
    pub fn release(&self) {
        *self.released.0.lock().unwrap() = true;
        self.released.1.notify_all();
    }

    /// Whether the file received with the attach of `path` is the one at `path`, and writable.
    pub fn received(&self, path: &Path) -> Option<bool> {
        let meta = std::fs::metadata(path).unwrap();
        let state = self.state.lock().unwrap();
        let served = state.devices.iter().find(|d| d.info.image == path.to_str().unwrap())?;
        assert_eq!(served.file, (meta.dev(), meta.ino()));
        Some(served.writable)
    }
}

pub fn instance(name: &str, max_devices: u32) -> InstanceSpec {
    InstanceSpec { name: name.to_owned(), max_devices, workers: 2, cpus: None, backend: None }
}

pub fn attach(instance: &str, path: &Path) -> AttachSpec {
    AttachSpec {
        instance: instance.to_owned(),
        path: path.to_str().unwrap().to_owned(),
        ..AttachSpec::default()
    }
}

fn error(kind: Kind, text: String) -> Error {
    Error::new(kind, text).hint("do something else")
}

fn info(state: &State, spec: &InstanceSpec) -> InstanceInfo {
    let devices = state.devices.iter().filter(|d| d.info.instance == spec.name).count();
    InstanceInfo {
        name: spec.name.clone(),
        max_devices: spec.max_devices,
        devices: u32::try_from(devices).unwrap(),
        backend: BackendKind::Ublk,
        workers: spec.workers,
        cpus: spec.cpus.clone(),
        directory: format!("/run/fake/{}", spec.name),
    }
}

fn is(which: &Selector, device: &DeviceInfo) -> bool {
    match which {
        Selector::All => true,
        Selector::Instance(name) => device.instance == *name,
        Selector::Device(name) => {
            device.path == *name || format!("{}/loop{}", device.instance, device.number) == *name
        }
    }
}

impl EngineApi for Fake {
    fn features(&self) -> Result<Features> {
        Ok(Features {
            kernel: "0.0-fake".into(),
            backends: vec![BackendKind::Ublk],
            flags: vec!["FAKE".into()],
            io_modes: vec![IoMode::Batch, IoMode::Copy],
            recovery: true,
            resize: true,
            driver_fault: None,
        })
    }

    fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        let mut state = self.state.lock().unwrap();
        if state.instances.contains_key(&spec.name) {
            return Err(error(Kind::Exists, format!("instance '{}' exists", spec.name)));
        }
        state.instances.insert(spec.name.clone(), spec.clone());
        Ok(info(&state, spec))
    }

    fn instances(&self) -> Vec<InstanceInfo> {
        let state = self.state.lock().unwrap();
        state.instances.values().map(|spec| info(&state, spec)).collect()
    }

    fn set_max_devices(&self, name: &str, max_devices: u32) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        match state.instances.get_mut(name) {
            Some(spec) => spec.max_devices = max_devices,
            None => return Err(error(Kind::NotFound, format!("no instance '{name}'"))),
        }
        Ok(())
    }

    fn remove_instance(&self, name: &str, force: bool) -> Result<()> {
        self.detach(&Selector::Instance(name.to_owned()), force)?;
        let mut state = self.state.lock().unwrap();
        let removed = state.instances.remove(name).map(drop);
        removed.ok_or_else(|| error(Kind::NotFound, format!("no instance '{name}'")))
    }

    fn attach(&self, spec: &AttachSpec, _: bool, image: OwnedFd) -> Result<DeviceInfo> {
        match spec.instance.as_str() {
            "panic" => panic!("requested by the test"),
            "slow" => {
                let released = self.released.0.lock().unwrap();
                drop(self.released.1.wait_while(released, |released| !*released).unwrap());
            }
            name => {
                for kind in KINDS {
                    if name == format!("error-{kind:?}") {
                        return Err(error(kind, format!("{kind:?} happened")));
                    }
                }
            }
        }
        let flags = rustix::fs::fcntl_getfl(&image).unwrap();
        let meta = File::from(image).metadata().unwrap();
        let mut state = self.state.lock().unwrap();
        let Some(instance) = state.instances.get(&spec.instance).cloned() else {
            return Err(error(Kind::NotFound, format!("no instance '{}'", spec.instance)));
        };
        let numbers = state.devices.iter().filter(|d| d.info.instance == spec.instance);
        let numbers: Vec<u32> = numbers.map(|d| d.info.number).collect();
        if numbers.len() >= instance.max_devices as usize {
            return Err(error(Kind::Quota, format!("instance '{}' is full", spec.instance)));
        }
        let number = (0..).find(|n| !numbers.contains(n)).unwrap();
        let device = DeviceInfo {
            instance: spec.instance.clone(),
            number,
            path: format!("/run/fake/{}/loop{number}", spec.instance),
            node: format!("/dev/fake{number}"),
            image: spec.path.clone(),
            state: DeviceState::Live,
            reason: None,
            size: meta.len() - spec.offset,
            offset: spec.offset,
            size_limit: spec.size_limit,
            block_size: spec.block_size.max(512),
            read_only: spec.read_only,
            buffered: spec.buffered,
            durable: spec.durable,
            iops: spec.iops,
            bytes_per_second: spec.bytes_per_second,
            queues: spec.queues.max(2),
            depth: spec.depth.max(1),
            io_mode: spec.io_mode.unwrap_or(IoMode::Batch),
            shared_with: Vec::new(),
            since_unix_seconds: Some(1),
            image_device: meta.dev(),
            image_inode: meta.ino(),
        };
        state.devices.push(Served {
            info: device.clone(),
            file: (meta.dev(), meta.ino()),
            writable: flags.contains(rustix::fs::OFlags::RDWR),
        });
        Ok(device)
    }

    fn detach(&self, which: &Selector, force: bool) -> Result<Vec<String>> {
        let mut state = self.state.lock().unwrap();
        let found: Vec<_> = state.devices.extract_if(.., |d| is(which, &d.info)).collect();
        if found.is_empty() && matches!(which, Selector::Device(_)) {
            return Err(error(Kind::NotFound, format!("no such device: {which:?}")));
        }
        let (busy, gone): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|d| !force && d.info.image.ends_with("busy.img"));
        let paths = gone.into_iter().map(|d| d.info.path).collect();
        let in_use = busy.first().map(|d| d.info.path.clone());
        state.devices.extend(busy);
        match in_use {
            Some(path) => Err(error(Kind::Busy, format!("{path} is in use"))),
            None => Ok(paths),
        }
    }

    fn set_io_limits(&self, spec: &IoLimitsSpec) -> Result<DeviceInfo> {
        let which = Selector::Device(spec.device.clone());
        let mut state = self.state.lock().unwrap();
        let found = state.devices.iter_mut().find(|d| is(&which, &d.info));
        let info =
            &mut found.ok_or_else(|| error(Kind::NotFound, format!("no device {}", spec.device)))?.info;
        info.iops = spec.iops.unwrap_or(info.iops);
        info.bytes_per_second = spec.bytes_per_second.unwrap_or(info.bytes_per_second);
        Ok(info.clone())
    }

    fn resize(&self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        let which = Selector::Device(spec.device.clone());
        let mut state = self.state.lock().unwrap();
        let found = state.devices.iter_mut().find(|d| is(&which, &d.info));
        let found = found.ok_or_else(|| error(Kind::NotFound, format!("no device {}", spec.device)))?;
        let size = spec.size.unwrap_or_else(|| std::fs::metadata(&found.info.image).unwrap().len());
        if size < found.info.size && !(spec.shrink && spec.force) {
            return Err(error(Kind::Invalid, format!("{} of {}", size, found.info.size)));
        }
        found.info.size = size;
        Ok(found.info.clone())
    }

    fn recover(&self, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let which = Selector::Device(spec.device.clone());
        let mut state = self.state.lock().unwrap();
        let found = state.devices.iter_mut().find(|d| is(&which, &d.info));
        let found = found.ok_or_else(|| error(Kind::NotFound, format!("no device {}", spec.device)))?;
        let flags = rustix::fs::fcntl_getfl(&image).unwrap();
        found.writable = flags.contains(rustix::fs::OFlags::RDWR);
        found.info.image.clone_from(&spec.path);
        found.info.offset = spec.offset.unwrap_or(found.info.offset);
        Ok(found.info.clone())
    }

    fn devices(&self, which: &Selector) -> Result<Vec<DeviceInfo>> {
        let state = self.state.lock().unwrap();
        let found = state.devices.iter().filter(|d| is(which, &d.info));
        Ok(found.map(|d| d.info.clone()).collect())
    }

    fn stats(&self, which: &Selector) -> Result<Vec<DeviceStats>> {
        let mut state = self.state.lock().unwrap();
        state.at_ns += 1_000_000_000;
        let at_ns = state.at_ns;
        let reads = at_ns / 1_000_000;
        let found = state.devices.iter().filter(|d| is(which, &d.info));
        let stats = found.map(|d| DeviceStats {
            path: d.info.path.clone(),
            image: d.info.image.clone(),
            at_ns,
            reads,
            read_bytes: reads * 4096,
            requests: reads,
            batches: reads / 4,
            in_flight: 3,
            latency: LatencySummary {
                samples: 9,
                p50_ns: 10_000,
                p90_ns: 20_000,
                p99_ns: 30_000,
                p999_ns: 40_000,
                max_ns: 50_000,
                sum_ns: 90_000,
                buckets: [(10_000, 5), (50_000, 9)]
                    .map(|(up_to_ns, samples)| LatencyBucket { up_to_ns, samples })
                    .into(),
            },
            ..DeviceStats::default()
        });
        Ok(stats.collect())
    }

    fn activity(&self) -> Result<Vec<DeviceActivity>> {
        let (devices, stats) = (self.devices(&Selector::All)?, self.stats(&Selector::All)?);
        let activity = devices.into_iter().zip(stats).map(|(device, stats)| DeviceActivity {
            owner: device.instance,
            number: device.number,
            state: Some(device.state),
            has_workers: true,
            stats: Some(stats),
            ..DeviceActivity::default()
        });
        Ok(activity.collect())
    }
}

/// A control server on a run directory, which ends when it is dropped.
pub struct Daemon {
    pub fake: Arc<Fake>,
    dir: tempfile::TempDir,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    pub fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::take(&dir.path().join("run")).unwrap();
        let listener = run_dir.bind().unwrap();
        let fake = Fake::new();
        let backend = Arc::clone(&fake);
        let (stop, stopping) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                server::serve(listener, backend, stopping).await;
            });
            run_dir.unbind();
        });
        Daemon { fake, dir, stop, thread: Some(thread) }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A file of `bytes` bytes.
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// Stops accepting connections; running calls can finish.
    pub fn stop(&self) {
        let _ = self.stop.send(true);
    }

    /// The program, with this daemon's run directory.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopengine"));
        command.args(words).env("LOOPENGINE_RUN_DIR", self.run_dir());
        command.current_dir(self.dir.path());
        command
    }

    /// Runs the program.
    pub fn run(&self, words: &[&str]) -> Ran {
        Ran::from(self.command(words).output().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.fake.release();
        self.stop();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// Results of the program.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs `work` on a client's runtime, with a timeout.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let limit = Duration::from_secs(30);
        tokio::time::timeout(limit, work).await.expect("the test hangs")
    })
}
