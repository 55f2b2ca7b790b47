// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes as the kubelet sees them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use loopengine_csi::messages::*;
use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound};

use crate::client::{block, call, capability, create, ext4};
use crate::fixture::{Node, may_grow_ext4, run};
use crate::{Res, SKIP, ensure};

const PUBLISH: &str = "Node/NodePublishVolume";
const STAGE: &str = "Node/NodeStageVolume";

fn text<T, E: std::fmt::Display>(done: Result<T, E>) -> Res<T> {
    done.map_err(|error| error.to_string())
}

pub fn pods(node: &mut Node) -> Res {
    let id = node.volume("web", 32)?;
    node.refuses(
        FailedPrecondition,
        "staging_target_path",
        PUBLISH,
        &node.publish_request(&id, "a", ext4()),
    )?;
    for _ in 0..2 {
        node.stage(&id, ext4())?;
    }
    for _ in 0..2 {
        let path = node.publish(&id, "a", ext4())?;
        text(fs::write(path.join("file"), "content"))?;
    }
    let readonly = NodePublishVolumeRequest { readonly: true, ..node.publish_request(&id, "b", ext4()) };
    for _ in 0..2 {
        node.ok::<Empty>(PUBLISH, &readonly)?;
    }
    let other = NodePublishVolumeRequest { readonly: true, ..node.publish_request(&id, "a", ext4()) };
    node.refuses(AlreadyExists, "mode", PUBLISH, &other)?;
    let path = node.root.join("kubelet/b/file");
    ensure!(text(fs::read_to_string(&path))? == "content", "another content");
    ensure!(fs::write(&path, "x").is_err(), "a read-only pod writes");
    let stats = NodeGetVolumeStatsRequest {
        volume_id: id.clone(),
        volume_path: node.path("kubelet/a"),
        staging_target_path: String::new(),
    };
    let stats: NodeGetVolumeStatsResponse = node.ok("Node/NodeGetVolumeStats", &stats)?;
    let bytes = stats.usage.first().cloned().unwrap_or_default();
    ensure!(bytes.total > 20 << 20 && bytes.available > 0 && bytes.used >= 0, "{bytes:?}");
    ensure!(stats.volume_condition.is_some_and(|condition| !condition.abnormal), "abnormal");
    let elsewhere = NodeGetVolumeStatsRequest {
        volume_id: id.clone(),
        volume_path: "/proc".into(),
        ..Default::default()
    };
    node.refuses(NotFound, "/proc", "Node/NodeGetVolumeStats", &elsewhere)?;
    node.refuses(
        FailedPrecondition,
        "mounted",
        "Controller/DeleteVolume",
        &DeleteVolumeRequest { volume_id: id.clone() },
    )?;
    let staging_target_path = node.path("kubelet/stage-web");
    let unstage = NodeUnstageVolumeRequest { volume_id: id.clone(), staging_target_path };
    node.refuses(FailedPrecondition, "still mounted", "Node/NodeUnstageVolume", &unstage)?;
    for pod in ["a", "b", "a"] {
        node.unpublish(&id, pod)?;
    }
    for _ in 0..2 {
        node.unstage(&id)?;
    }
    node.stage(&id, ext4())?;
    let path = node.publish(&id, "c", ext4())?;
    ensure!(text(fs::read_to_string(path.join("file")))? == "content", "another content");
    node.unpublish(&id, "c")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn block_volume(node: &mut Node) -> Res {
    let made: CreateVolumeResponse = node.ok("Controller/CreateVolume", &create("raw", 16, block()))?;
    let id = made.volume.unwrap_or_default().volume_id;
    node.stage(&id, block())?;
    let target = node.publish(&id, "disk", block())?;
    node.publish(&id, "disk", block())?;
    ensure!(text(fs::metadata(&target))?.file_type().is_block_device(), "no block device");
    let mut device = text(File::options().write(true).open(&target))?;
    text(device.write_all(&[7; 4096]))?;
    text(device.sync_all())?;
    drop(device);
    let readonly = NodePublishVolumeRequest { readonly: true, ..node.publish_request(&id, "other", block()) };
    node.refuses(InvalidArgument, "readonly", PUBLISH, &readonly)?;
    let range = Some(CapacityRange { required_bytes: 24 << 20, limit_bytes: 0 });
    let expand = ControllerExpandVolumeRequest {
        volume_id: id.clone(),
        capacity_range: range,
        volume_capability: None,
    };
    let grown: ControllerExpandVolumeResponse = node.ok("Controller/ControllerExpandVolume", &expand)?;
    ensure!(grown.capacity_bytes == 24 << 20 && !grown.node_expansion_required, "{grown:?}");
    let size = run("blockdev", &["--getsize64", &target.display().to_string()])?;
    ensure!(size == (24 << 20).to_string(), "{size} bytes");
    let staging_target_path = node.path("kubelet/stage-raw");
    let unstage = NodeUnstageVolumeRequest { volume_id: id.clone(), staging_target_path };
    node.refuses(FailedPrecondition, "still mounted", "Node/NodeUnstageVolume", &unstage)?;
    node.unpublish(&id, "disk")?;
    node.unpublish(&id, "disk")?;
    node.unstage(&id)?;
    // Raw data looks like nothing to blkid.
    node.refuses(FailedPrecondition, "block device", STAGE, &node.stage_request(&id, ext4()))?;
    let mut head = [0; 4096];
    text(text(File::open(node.file("raw.img")))?.read_exact(&mut head))?;
    ensure!(head == [7; 4096], "the data has changed");
    let reader = capability(None, Mode::SingleNodeReaderOnly);
    node.stage(&id, reader.clone())?;
    let target = node.publish(&id, "reader", reader)?;
    let mut device = text(File::options().write(true).open(&target));
    let wrote = device
        .as_mut()
        .is_ok_and(|device| device.write_all(&[8; 4096]).and_then(|()| device.sync_all()).is_ok());
    ensure!(!wrote, "a reader writes");
    drop(device);
    node.unpublish(&id, "reader")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn single_writer(node: &mut Node) -> Res {
    let single = || capability(Some("ext4"), Mode::SingleNodeSingleWriter);
    let id = node.volume("single", 16)?;
    node.stage(&id, single())?;
    node.publish(&id, "a", single())?;
    node.publish(&id, "a", single())?;
    node.refuses(FailedPrecondition, "single writer", PUBLISH, &node.publish_request(&id, "b", single()))?;
    node.unpublish(&id, "a")?;
    node.publish(&id, "b", single())?;
    node.unpublish(&id, "b")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn content(node: &mut Node) -> Res {
    let image = |name: &str| node.file(name).display().to_string();
    for (name, make) in
        [("xfs", &["mkfs.xfs", "-q", "-f"][..]), ("ext2", &["mkfs.ext2", "-q", "-F"]), ("swap", &["mkswap"])]
    {
        let id = node.volume(name, 320)?;
        run(make[0], &[&make[1..], &[&image(&format!("{name}.img"))]].concat())?;
        node.refuses(FailedPrecondition, name, STAGE, &node.stage_request(&id, ext4()))?;
        node.delete(&id)?;
    }
    let id = node.volume("table", 16)?;
    let mut table = vec![0u8; 512];
    table[446..462].copy_from_slice(&[0x80, 1, 1, 0, 0x83, 1, 1, 1, 0, 8, 0, 0, 0, 8, 0, 0]);
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut file = text(File::options().write(true).open(node.file("table.img")))?;
    text(file.write_all(&table))?;
    node.refuses(FailedPrecondition, "partition table", STAGE, &node.stage_request(&id, ext4()))?;
    node.delete(&id)?;
    // A file system that is lost is not replaced.
    let id = node.volume("lost", 16)?;
    node.stage(&id, ext4())?;
    node.unstage(&id)?;
    let mut file = text(File::options().write(true).open(node.file("lost.img")))?;
    text(file.write_all(&vec![0; 1 << 20]))?;
    node.refuses(FailedPrecondition, "had ext4", STAGE, &node.stage_request(&id, ext4()))?;
    node.delete(&id)
}

pub fn xfs_grows(node: &mut Node) -> Res {
    grows(node, "xfs")
}

/// The kernel grows a mounted ext4 only with CAP_SYS_RESOURCE.
pub fn ext4_grows(node: &mut Node) -> Res {
    match may_grow_ext4() {
        true => grows(node, "ext4"),
        false => Err(format!("{SKIP}no CAP_SYS_RESOURCE")),
    }
}

fn grows(node: &mut Node, fs_type: &str) -> Res {
    let wanted = || capability(Some(fs_type), Mode::SingleNodeMultiWriter);
    let made: CreateVolumeResponse = node.ok("Controller/CreateVolume", &create("grows", 320, wanted()))?;
    let id = made.volume.unwrap_or_default().volume_id;
    node.stage(&id, wanted())?;
    let path = node.publish(&id, "pod", wanted())?;
    let total = || text(rustix::fs::statvfs(&path)).map(|vfs| vfs.f_blocks * vfs.f_frsize);
    let before = total()?;
    let capacity_range = Some(CapacityRange { required_bytes: 448 << 20, limit_bytes: 0 });
    let expand =
        ControllerExpandVolumeRequest { volume_id: id.clone(), capacity_range, volume_capability: None };
    for _ in 0..2 {
        let grown: ControllerExpandVolumeResponse = node.ok("Controller/ControllerExpandVolume", &expand)?;
        ensure!(grown.capacity_bytes == 448 << 20 && grown.node_expansion_required, "{grown:?}");
    }
    let volume_path = path.display().to_string();
    let expand =
        NodeExpandVolumeRequest { volume_id: id.clone(), volume_path, capacity_range, ..Default::default() };
    for _ in 0..2 {
        node.ok::<NodeExpandVolumeResponse>("Node/NodeExpandVolume", &expand)?;
    }
    let gained = total()? - before;
    ensure!(gained > 100 << 20, "{fs_type} gained {gained} bytes");
    node.unpublish(&id, "pod")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn group(node: &mut Node) -> Res {
    let id = node.volume("group", 16)?;
    let mut wanted = ext4().unwrap_or_default();
    if let Some(mount) = &mut wanted.mount {
        mount.volume_mount_group = "4321".into();
        mount.mount_flags = vec!["noatime".into()];
    }
    node.stage(&id, Some(wanted.clone()))?;
    let path = node.publish(&id, "pod", Some(wanted))?;
    let meta = text(fs::metadata(&path))?;
    ensure!(meta.gid() == 4321 && meta.mode() & 0o2070 == 0o2070, "{:o} of {}", meta.mode(), meta.gid());
    let mounts = text(fs::read_to_string("/proc/self/mountinfo"))?;
    let line = mounts.lines().find(|line| line.contains("stage-group")).unwrap_or_default().to_owned();
    ensure!(line.contains("noatime"), "{line}");
    node.unpublish(&id, "pod")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn fuse(node: &mut Node) -> Res {
    if !std::path::Path::new("/dev/fuse").exists() {
        return Err(format!("{SKIP}no /dev/fuse"));
    }
    let id = node.volume("file", 16)?;
    node.kill_engine();
    node.start_engine_with("fuse")?;
    node.refuses(FailedPrecondition, "FUSE", STAGE, &node.stage_request(&id, ext4()))?;
    node.refuses(FailedPrecondition, "FUSE", STAGE, &node.stage_request(&id, block()))?;
    node.delete(&id)
}

pub fn inline(node: &mut Node) -> Res {
    let id = format!("csi-{}", "ab".repeat(32));
    let mut request = node.publish_request(&id, "pod", ext4());
    request.staging_target_path = String::new();
    let pairs =
        [("csi.storage.k8s.io/ephemeral", "true"), ("csi.storage.k8s.io/pod.name", "x"), ("size", "16Mi")];
    request.volume_context = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    for _ in 0..2 {
        node.ok::<Empty>(PUBLISH, &request)?;
        text(fs::write(node.root.join("kubelet/pod/file"), "content"))?;
    }
    for _ in 0..2 {
        node.unpublish(&id, "pod")?;
    }
    request.volume_context.insert("size".into(), "much".into());
    node.refuses(InvalidArgument, "size", PUBLISH, &request)
}

pub fn ten(node: &mut Node) -> Res {
    let socket = node.root.join("csi.sock");
    let one = &|n: usize| -> Res {
        let name = format!("v{n}");
        let done = |answer: Result<Empty, (tonic::Code, String)>| {
            answer.map(drop).map_err(|error| format!("{name}: {error:?}"))
        };
        node.volume(&name, 16)?;
        done(call(&socket, STAGE, &node.stage_request(&name, ext4())))?;
        let path = node.publish(&name, &format!("pod{n}"), ext4())?;
        text(fs::write(path.join("file"), &name))?;
        ensure!(text(fs::read_to_string(path.join("file")))? == name, "another content");
        node.unpublish(&name, &format!("pod{n}"))?;
        node.unstage(&name)?;
        node.delete(&name)
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..10).map(|n| scope.spawn(move || one(n))).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| "a thread failed".to_owned())?)
    })
}
