// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A node: a file system for images, an engine, a driver, and the directory of a kubelet.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use loopengine_csi::messages::*;
use prost::Message;

use crate::client::{Answer, call, create, ext4};
use crate::{Res, ensure};

const SCRATCH: &str = "/run/loopengine-csi-cases";
const READY: Duration = Duration::from_secs(30);

/// The file system for images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Files can share blocks.
    Xfs,
    /// They cannot.
    Ext4,
    /// 64 MiB.
    Small,
}

pub struct Node {
    pub root: PathBuf,
    engine: Option<Child>,
    driver: Option<Child>,
}

/// What a case left.
pub struct Left {
    pub what: Vec<String>,
    pub log: String,
}

/// Why cases cannot run here; none: they can.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("no /dev/loop-control".into());
    }
    if !loopengine().exists() {
        return Some(format!("no program {}", loopengine().display()));
    }
    let tools = ["mkfs.ext4", "mkfs.xfs", "blkid", "e2fsck", "resize2fs", "xfs_growfs", "mount"];
    let lacks = tools.into_iter().find(|tool| {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        !places.iter().any(|place| Path::new(place).join(tool).exists())
    });
    lacks.map(|tool| format!("no program {tool}"))
}

/// True with CAP_SYS_RESOURCE.
pub fn may_grow_ext4() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & 1 << 24 != 0)
}

fn loopengine() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_loopengine-csi")).with_file_name("loopengine");
    std::env::var_os("LOOPENGINE").map_or(beside, PathBuf::from)
}

pub fn run(program: &str, words: &[&str]) -> Res<String> {
    let output = Command::new(program).args(words).output().map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(output.status.success(), "{program} {words:?}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

impl Node {
    pub fn start(disk: Disk) -> Res<Node> {
        let root = PathBuf::from(SCRATCH);
        let mut node = Node { root, engine: None, driver: None };
        // Of a run that was killed.
        node.clean();
        for name in ["disk", "kubelet", "run"] {
            fs::create_dir_all(node.root.join(name)).map_err(|error| error.to_string())?;
        }
        node.mount_disk(disk)?;
        node.start_engine()?;
        node.start_driver()?;
        Ok(node)
    }

    fn mount_disk(&self, disk: Disk) -> Res {
        let (file, directory) = (self.path("disk.img"), self.path("disk"));
        let (size, make): (u64, &[&str]) = match disk {
            Disk::Xfs => (4 << 30, &["mkfs.xfs", "-q", "-m", "reflink=1"]),
            Disk::Ext4 => (4 << 30, &["mkfs.ext4", "-q"]),
            Disk::Small => (64 << 20, &["mkfs.ext4", "-q"]),
        };
        File::create(&file).and_then(|image| image.set_len(size)).map_err(|error| error.to_string())?;
        run(make[0], &[&make[1..], &[&file]].concat())?;
        run("mount", &["-o", "loop", &file, &directory]).map(drop)
    }

    pub fn path(&self, name: &str) -> String {
        self.root.join(name).display().to_string()
    }

    /// A file of the directory of volumes.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join("disk/csi").join(name)
    }

    pub fn start_engine(&mut self) -> Res {
        self.start_engine_with("loop")
    }

    pub fn start_engine_with(&mut self, backend: &str) -> Res {
        let log = File::options().create(true).append(true).open(self.path("engine.log"));
        let log = log.map_err(|error| error.to_string())?;
        let mut command = Command::new(loopengine());
        command.args(["serve", "--backend", backend, "--run-dir", &self.path("run")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.engine = Some(command.spawn().map_err(|error| error.to_string())?);
        self.wait(&self.root.join("run/control"))
    }

    /// A command for another driver of this node's volumes.
    pub fn driver_command(&self, socket: &str) -> Res<Command> {
        let log = File::options().create(true).append(true).open(self.path("driver.log"));
        let log = log.map_err(|error| error.to_string())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopengine-csi"));
        command.args(["--node", "node-1", "--endpoint", &format!("unix://{}", self.path(socket))]);
        command.args(["--directory", &self.path("disk/csi"), "--run-dir", &self.path("run")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Ok(command)
    }

    pub fn start_driver(&mut self) -> Res {
        let mut command = self.driver_command("csi.sock")?;
        self.driver = Some(command.spawn().map_err(|error| error.to_string())?);
        self.wait(&self.root.join("csi.sock"))
    }

    fn wait(&self, socket: &Path) -> Res {
        let until = Instant::now() + READY;
        while UnixStream::connect(socket).is_err() {
            ensure!(Instant::now() < until, "nobody listens on {}: {}", socket.display(), self.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub fn kill_driver(&mut self) {
        kill(self.driver.take());
    }

    pub fn kill_engine(&mut self) {
        kill(self.engine.take());
    }

    pub fn call<R: Message + Default>(&self, method: &str, request: &impl Message) -> Answer<R> {
        call(&self.root.join("csi.sock"), method, request)
    }

    /// A call that must succeed.
    pub fn ok<R: Message + Default>(&self, method: &str, request: &impl Message) -> Res<R> {
        self.call(method, request).map_err(|(code, message)| format!("{method}: {code:?}: {message}"))
    }

    /// A call that must fail with `code` and a message that contains `word`.
    pub fn refuses(&self, code: tonic::Code, word: &str, method: &str, request: &impl Message) -> Res {
        match self.call::<Empty>(method, request) {
            Ok(_) => Err(format!("{method} did not fail with {code:?}")),
            Err((got, message)) => {
                ensure!(got == code, "{method}: {got:?} instead of {code:?}: {message}");
                ensure!(message.contains(word), "{method}: the message lacks {word:?}: {message}");
                Ok(())
            }
        }
    }

    /// Makes a volume with ext4, and returns its identifier.
    pub fn volume(&self, name: &str, mib: i64) -> Res<String> {
        let made: CreateVolumeResponse = self.ok("Controller/CreateVolume", &create(name, mib, ext4()))?;
        Ok(made.volume.unwrap_or_default().volume_id)
    }

    pub fn delete(&self, id: &str) -> Res {
        let request = DeleteVolumeRequest { volume_id: id.into() };
        self.ok::<Empty>("Controller/DeleteVolume", &request).map(drop)
    }

    pub fn stage_request(&self, id: &str, capability: Option<VolumeCapability>) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: self.path(&format!("kubelet/stage-{id}")),
            volume_capability: capability,
            ..NodeStageVolumeRequest::default()
        }
    }

    pub fn publish_request(
        &self,
        id: &str,
        pod: &str,
        capability: Option<VolumeCapability>,
    ) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: id.into(),
            staging_target_path: self.path(&format!("kubelet/stage-{id}")),
            target_path: self.path(&format!("kubelet/{pod}")),
            volume_capability: capability,
            ..NodePublishVolumeRequest::default()
        }
    }

    pub fn stage(&self, id: &str, capability: Option<VolumeCapability>) -> Res {
        self.ok::<Empty>("Node/NodeStageVolume", &self.stage_request(id, capability)).map(drop)
    }

    /// Publishes to a pod, and returns the path that it gets.
    pub fn publish(&self, id: &str, pod: &str, capability: Option<VolumeCapability>) -> Res<PathBuf> {
        let request = self.publish_request(id, pod, capability);
        self.ok::<Empty>("Node/NodePublishVolume", &request)?;
        Ok(PathBuf::from(request.target_path))
    }

    pub fn unpublish(&self, id: &str, pod: &str) -> Res {
        let target_path = self.path(&format!("kubelet/{pod}"));
        let request = NodeUnpublishVolumeRequest { volume_id: id.into(), target_path };
        self.ok::<Empty>("Node/NodeUnpublishVolume", &request).map(drop)
    }

    pub fn unstage(&self, id: &str) -> Res {
        let staging_target_path = self.path(&format!("kubelet/stage-{id}"));
        let request = NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path };
        self.ok::<Empty>("Node/NodeUnstageVolume", &request).map(drop)
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        read("engine.log") + &read("driver.log")
    }

    /// What the driver should have removed; then removes it.
    pub fn end(mut self) -> Left {
        let (mut what, log) = (Vec::new(), self.logs());
        let devices =
            Command::new(loopengine()).args(["list", "--json", "--run-dir", &self.path("run")]).output();
        let devices =
            devices.map(|done| String::from_utf8_lossy(&done.stdout).into_owned()).unwrap_or_default();
        if devices.contains("disk/csi") {
            what.push(devices);
        }
        what.extend(self.mounts().into_iter().filter(|path| path.contains("/kubelet/")));
        for path in [self.file(""), self.file("snapshots"), self.root.join("kubelet")] {
            let names = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
            let extra = |path: &PathBuf| !path.ends_with(".lock") && !path.ends_with("snapshots");
            what.extend(names.filter(extra).map(|path| path.display().to_string()));
        }
        what.retain(|path| !path.contains("/stage-"));
        self.clean();
        Left { what, log }
    }

    /// Mounts below the scratch directory, the last first.
    fn mounts(&self) -> Vec<String> {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let paths = text.lines().filter_map(|line| line.split(' ').nth(4));
        paths.filter(|path| path.starts_with(SCRATCH)).map(str::to_owned).rev().collect()
    }

    fn clean(&mut self) {
        self.kill_driver();
        for path in self.mounts().iter().filter(|path| !path.ends_with("/disk")) {
            let _ = run("umount", &[path]);
        }
        if self.root.join("disk.img").exists() {
            if self.engine.is_none() {
                let _ = self.start_engine();
            }
            let program = loopengine().display().to_string();
            let _ = run(&program, &["detach", "--all", "--force", "--run-dir", &self.path("run")]);
        }
        self.kill_engine();
        for path in self.mounts() {
            let _ = run("umount", &[&path]);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.clean();
    }
}

fn kill(child: Option<Child>) {
    if let Some(mut child) = child {
        let _ = child.kill();
        let _ = child.wait();
    }
}
