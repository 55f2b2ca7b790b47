// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots and clones.

use std::fs;

use loopengine_csi::messages::*;
use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OutOfRange};

use crate::client::{create, ext4};
use crate::fixture::{Node, may_grow_ext4};
use crate::{Res, ensure};

const CREATE: &str = "Controller/CreateVolume";
const SNAPSHOT: &str = "Controller/CreateSnapshot";

fn snapshot(volume: &str, name: &str) -> CreateSnapshotRequest {
    CreateSnapshotRequest { source_volume_id: volume.into(), name: name.into(), ..Default::default() }
}

fn from_snapshot(id: &str) -> Option<ContentSource> {
    Some(ContentSource { snapshot: Some(SnapshotSource { snapshot_id: id.into() }), volume: None })
}

fn from_volume(id: &str) -> Option<ContentSource> {
    Some(ContentSource { volume: Some(VolumeSource { volume_id: id.into() }), snapshot: None })
}

pub fn restore(node: &mut Node) -> Res {
    let bytes: Vec<u8> = (0..5 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let id = node.volume("origin", 32)?;
    node.stage(&id, ext4())?;
    let path = node.publish(&id, "pod", ext4())?;
    fs::write(path.join("file"), &bytes).map_err(|error| error.to_string())?;
    let first: CreateSnapshotResponse = node.ok(SNAPSHOT, &snapshot(&id, "monday"))?;
    let again: CreateSnapshotResponse = node.ok(SNAPSHOT, &snapshot(&id, "monday"))?;
    ensure!(first == again, "{first:?} and {again:?}");
    let taken = first.snapshot.unwrap_or_default();
    ensure!(taken.ready_to_use && taken.size_bytes == 32 << 20 && taken.source_volume_id == id, "{taken:?}");
    fs::write(path.join("file"), "later").map_err(|error| error.to_string())?;
    let other = node.volume("other", 32)?;
    node.refuses(AlreadyExists, "source_volume_id", SNAPSHOT, &snapshot(&other, "monday"))?;
    node.delete(&other)?;
    let list = ListSnapshotsRequest { source_volume_id: id.clone(), ..Default::default() };
    let list: ListSnapshotsResponse = node.ok("Controller/ListSnapshots", &list)?;
    ensure!(list.entries.len() == 1, "{list:?}");
    // ext4 grows when it is staged, where it may.
    let size = if may_grow_ext4() { 48 } else { 32 };
    // A volume of the snapshot, and a clone of the volume, which is in use.
    for (name, source, expected) in
        [("restored", from_snapshot("monday"), &bytes[..]), ("cloned", from_volume(&id), &b"later"[..])]
    {
        let request =
            CreateVolumeRequest { volume_content_source: source.clone(), ..create(name, size, ext4()) };
        let made: CreateVolumeResponse = node.ok(CREATE, &request)?;
        ensure!(made.volume.is_some_and(|volume| volume.content_source == source), "no source");
        node.ok::<CreateVolumeResponse>(CREATE, &request)?;
        node.refuses(AlreadyExists, "volume_content_source", CREATE, &create(name, size, ext4()))?;
        node.stage(name, ext4())?;
        let path = node.publish(name, name, ext4())?;
        let found = fs::read(path.join("file")).map_err(|error| error.to_string())?;
        ensure!(found == expected, "{name} has other bytes");
        let vfs = rustix::fs::statvfs(&path).map_err(|error| error.to_string())?;
        ensure!(size == 32 || vfs.f_blocks * vfs.f_frsize > 36 << 20, "{name} has {} blocks", vfs.f_blocks);
        node.unpublish(name, name)?;
        node.unstage(name)?;
        node.delete(name)?;
    }
    let small =
        CreateVolumeRequest { volume_content_source: from_snapshot("monday"), ..create("small", 16, ext4()) };
    node.refuses(OutOfRange, "volume_content_source", CREATE, &small)?;
    let nothing =
        CreateVolumeRequest { volume_content_source: from_snapshot("no"), ..create("no", 16, ext4()) };
    node.refuses(NotFound, "no", CREATE, &nothing)?;
    node.unpublish(&id, "pod")?;
    node.unstage(&id)?;
    // Its blocks are shared now, and it is used again.
    node.stage(&id, ext4())?;
    let found = fs::read(node.root.join("kubelet/stage-origin/file"));
    ensure!(found.is_ok_and(|found| found == b"later"), "the origin has other bytes");
    node.unstage(&id)?;
    node.delete(&id)?;
    let delete = DeleteSnapshotRequest { snapshot_id: "monday".into() };
    node.ok::<Empty>("Controller/DeleteSnapshot", &delete)?;
    node.ok::<Empty>("Controller/DeleteSnapshot", &delete).map(drop)
}

pub fn torn(node: &mut Node) -> Res {
    let id = node.volume("used", 16)?;
    node.stage(&id, ext4())?;
    node.refuses(FailedPrecondition, "torn", SNAPSHOT, &snapshot(&id, "s"))?;
    ensure!(!node.file("snapshots/s.json").exists(), "a record is left");
    node.unstage(&id)?;
    node.ok::<CreateSnapshotResponse>(SNAPSHOT, &snapshot(&id, "s"))?;
    let (image, copy) = (fs::read(node.file("used.img")), fs::read(node.file("snapshots/s.img")));
    ensure!(image.is_ok_and(|image| copy.is_ok_and(|copy| image == copy)), "the copy differs");
    node.delete(&id)?;
    let delete = DeleteSnapshotRequest { snapshot_id: "s".into() };
    node.ok::<Empty>("Controller/DeleteSnapshot", &delete).map(drop)
}

pub fn small_blocks(node: &mut Node) -> Res {
    let parameters = [("blockSize".to_owned(), "512".to_owned())].into();
    let request = CreateVolumeRequest { parameters, ..create("small", 32, ext4()) };
    node.ok::<CreateVolumeResponse>(CREATE, &request)?;
    let file = node.root.join("kubelet/stage-small/file");
    node.stage("small", ext4())?;
    fs::write(&file, vec![5; 1 << 20]).map_err(|error| error.to_string())?;
    node.ok::<CreateSnapshotResponse>(SNAPSHOT, &snapshot("small", "s"))?;
    fs::write(&file, vec![6; 1 << 20]).map_err(|error| error.to_string())?;
    node.unstage("small")?;
    node.stage("small", ext4())?;
    ensure!(fs::read(&file).is_ok_and(|found| found == [6; 1 << 20]), "other bytes");
    node.unstage("small")?;
    let parameters = [("blockSize".to_owned(), "4096".to_owned())].into();
    let volume_content_source = from_snapshot("s");
    let large = CreateVolumeRequest { parameters, volume_content_source, ..create("large", 32, ext4()) };
    node.refuses(InvalidArgument, "blockSize", CREATE, &large)?;
    let same = CreateVolumeRequest { parameters: Default::default(), ..large };
    node.ok::<CreateVolumeResponse>(CREATE, &same)?;
    node.stage("large", ext4())?;
    let found = fs::read(node.root.join("kubelet/stage-large/file"));
    ensure!(found.is_ok_and(|found| found == [5; 1 << 20]), "other bytes");
    node.unstage("large")?;
    node.delete("large")?;
    node.delete("small")?;
    let delete = DeleteSnapshotRequest { snapshot_id: "s".into() };
    node.ok::<Empty>("Controller/DeleteSnapshot", &delete).map(drop)
}
