// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver and engine are killed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use loopengine_csi::messages::*;

use crate::client::{create, ext4};
use crate::fixture::Node;
use crate::{Res, ensure};

pub fn kills(node: &mut Node) -> Res {
    let id = node.volume("v", 16)?;
    node.stage(&id, ext4())?;
    node.kill_driver();
    node.start_driver()?;
    let path = node.publish(&id, "pod", ext4())?;
    fs::write(path.join("file"), "content").map_err(|error| error.to_string())?;
    node.kill_engine();
    node.refuses(
        tonic::Code::Unavailable,
        "",
        "Node/NodePublishVolume",
        &node.publish_request(&id, "second", ext4()),
    )?;
    let probe: ProbeResponse = node.ok("Identity/Probe", &Empty {})?;
    ensure!(probe.ready.is_some_and(|ready| !ready.value), "{probe:?}");
    let kept = fs::read_to_string(path.join("file")).map_err(|error| error.to_string())?;
    ensure!(kept == "content", "{kept:?}");
    node.start_engine()?;
    node.stage(&id, ext4())?;
    node.publish(&id, "second", ext4())?;
    node.kill_engine();
    node.kill_driver();
    node.start_engine()?;
    node.start_driver()?;
    node.unpublish(&id, "second")?;
    node.unpublish(&id, "pod")?;
    node.unstage(&id)?;
    node.delete(&id)
}

pub fn half_made(node: &mut Node) -> Res {
    let id = node.volume("v", 16)?;
    node.kill_driver();
    let text = fs::read_to_string(node.file("v.json")).map_err(|error| error.to_string())?;
    let begun = text.replace("\"ready\"", "\"creating\"");
    ensure!(begun != text, "{text}");
    // The image has not got its name, or the record has not got its state.
    for whole in [false, true] {
        let image = node.file(if whole { "v.img" } else { "v.img.new" });
        let _ = fs::remove_file(node.file("v.img"));
        let file =
            File::create(&image).and_then(|file| file.set_len(16 << 20).and_then(|()| file.metadata()));
        let inode = file.map_err(|error| error.to_string())?.ino();
        let record = begun.replace("\"inode\": 0", &format!("\"inode\": {inode}"));
        fs::write(node.file("v.json"), record).map_err(|error| error.to_string())?;
        node.start_driver()?;
        let made: CreateVolumeResponse = node.ok("Controller/CreateVolume", &create("v", 16, ext4()))?;
        ensure!(made.volume.is_some_and(|volume| volume.capacity_bytes == 16 << 20), "another size");
        let same = fs::metadata(node.file("v.img")).is_ok_and(|meta| meta.ino() == inode);
        ensure!(same || !whole, "a whole image was made again");
        ensure!(!node.file("v.img.new").exists(), "a part is left");
        node.stage(&id, ext4())?;
        node.unstage(&id)?;
        node.kill_driver();
        // Back to a new volume.
        fs::write(node.file("v.json"), &text).map_err(|error| error.to_string())?;
    }
    let deleting = text.replace("\"ready\"", "\"deleting\"");
    fs::write(node.file("v.json"), deleting).map_err(|error| error.to_string())?;
    node.start_driver()?;
    node.delete(&id)
}

pub fn damaged(node: &mut Node) -> Res {
    let id = node.volume("v", 16)?;
    // A mount option of the class makes it read-only, whatever the mode.
    node.stage(&id, ext4())?;
    node.unstage(&id)?;
    let mut wanted = ext4().unwrap_or_default();
    if let Some(mount) = &mut wanted.mount {
        mount.mount_flags = vec!["noatime,ro".into()];
    }
    for _ in 0..2 {
        node.stage(&id, Some(wanted.clone()))?;
        let path = node.publish(&id, "pod", Some(wanted.clone()))?;
        ensure!(fs::write(path.join("file"), "x").is_err(), "a read-only volume is written");
    }
    let text = fs::read_to_string(node.file("v.json")).map_err(|error| error.to_string())?;
    fs::write(node.file("v.json"), "{").map_err(|error| error.to_string())?;
    let again = node.stage_request(&id, ext4());
    node.refuses(tonic::Code::Internal, "v.json", "Node/NodeStageVolume", &again)?;
    node.unpublish(&id, "pod")?;
    node.unstage(&id)?;
    fs::write(node.file("v.json"), text).map_err(|error| error.to_string())?;
    node.delete(&id)
}
