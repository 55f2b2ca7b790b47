// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Volumes as the provisioner sees them.

use std::collections::BTreeMap;
use std::fs;

use loopengine_csi::messages::*;
use tonic::Code::{
    self, Aborted, AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound, OutOfRange,
    ResourceExhausted, Unimplemented,
};

use crate::client::{block, call, capability, create, ext4};
use crate::fixture::Node;
use crate::{Res, ensure};

const CREATE: &str = "Controller/CreateVolume";
const DELETE: &str = "Controller/DeleteVolume";

pub fn identity(node: &mut Node) -> Res {
    let info: PluginInfo = node.ok("Identity/GetPluginInfo", &Empty {})?;
    ensure!(info.name == "csi.loopengine.io" && !info.vendor_version.is_empty(), "{info:?}");
    let able: PluginCapabilities = node.ok("Identity/GetPluginCapabilities", &Empty {})?;
    ensure!(able.capabilities.len() == 3, "{able:?}");
    let probe: ProbeResponse = node.ok("Identity/Probe", &Empty {})?;
    ensure!(probe.ready.is_some_and(|ready| ready.value), "{probe:?}");
    let here: NodeGetInfoResponse = node.ok("Node/NodeGetInfo", &Empty {})?;
    let segments = here.accessible_topology.unwrap_or_default().segments;
    ensure!(here.node_id == "node-1" && segments["csi.loopengine.io/node"] == "node-1", "{segments:?}");
    node.refuses(Unimplemented, "no such call", "Controller/ControllerPublishVolume", &Empty {})
}

pub fn idempotent(node: &mut Node) -> Res {
    let request = create("one", 16, ext4());
    let first: CreateVolumeResponse = node.ok(CREATE, &request)?;
    let again: CreateVolumeResponse = node.ok(CREATE, &request)?;
    ensure!(first == again, "{first:?} and {again:?}");
    let volume = first.volume.unwrap_or_default();
    ensure!(volume.capacity_bytes == 16 << 20 && volume.volume_id == "one", "{volume:?}");
    node.refuses(AlreadyExists, "capacity_range", CREATE, &create("one", 17, ext4()))?;
    let parameters = BTreeMap::from([("iops".to_owned(), "9".to_owned())]);
    node.refuses(
        AlreadyExists,
        "parameters",
        CREATE,
        &CreateVolumeRequest { parameters, ..request.clone() },
    )?;
    let away = Topology { segments: [("csi.loopengine.io/node".to_owned(), "other".to_owned())].into() };
    let away = TopologyRequirement { requisite: vec![away], preferred: vec![] };
    let away = CreateVolumeRequest { accessibility_requirements: Some(away), ..create("two", 16, ext4()) };
    node.refuses(ResourceExhausted, "accessibility_requirements", CREATE, &away)?;
    let before: GetCapacityResponse = node.ok("Controller/GetCapacity", &GetCapacityRequest::default())?;
    node.delete("one")?;
    node.delete("one")?;
    let after: GetCapacityResponse = node.ok("Controller/GetCapacity", &GetCapacityRequest::default())?;
    let gained = after.available_capacity - before.available_capacity;
    ensure!(gained >= 15 << 20, "{gained} bytes are free again");
    Ok(())
}

pub fn fields(node: &mut Node) -> Res {
    let bad =
        |code: Code, word: &str, request: CreateVolumeRequest| node.refuses(code, word, CREATE, &request);
    bad(InvalidArgument, "name", create("", 16, ext4()))?;
    bad(InvalidArgument, "volume_capabilities", create("a", 16, None))?;
    bad(InvalidArgument, "access_mode", create("a", 16, capability(Some("ext4"), Mode::Unknown)))?;
    bad(
        InvalidArgument,
        "access_mode",
        create("a", 16, capability(Some("ext4"), Mode::MultiNodeMultiWriter)),
    )?;
    bad(InvalidArgument, "fs_type", create("a", 16, capability(Some("btrfs"), Mode::SingleNodeWriter)))?;
    for (key, value) in [("backend", "fuse"), ("unknown", "x"), ("blockSize", "3")] {
        let parameters = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        bad(InvalidArgument, key, CreateVolumeRequest { parameters, ..create("a", 16, ext4()) })?;
    }
    let range = |required_bytes, limit_bytes| Some(CapacityRange { required_bytes, limit_bytes });
    for (range, code) in
        [(range(2 << 30, 1 << 30), OutOfRange), (range(0, 1), OutOfRange), (range(-1, 0), InvalidArgument)]
    {
        bad(
            code,
            "capacity_range",
            CreateVolumeRequest { capacity_range: range, ..create("a", 16, ext4()) },
        )?;
    }
    bad(ResourceExhausted, "free", create("a", 1 << 20, ext4()))?;
    node.refuses(InvalidArgument, "volume_id", DELETE, &DeleteVolumeRequest::default())?;
    node.refuses(InvalidArgument, "name", "Controller/CreateSnapshot", &CreateSnapshotRequest::default())?;
    node.refuses(
        InvalidArgument,
        "snapshot_id",
        "Controller/DeleteSnapshot",
        &DeleteSnapshotRequest::default(),
    )?;
    node.refuses(InvalidArgument, "volume_id", "Node/NodeStageVolume", &node.stage_request("", ext4()))?;
    node.refuses(
        InvalidArgument,
        "volume_capability",
        "Node/NodeStageVolume",
        &node.stage_request("a", None),
    )?;
    let nowhere =
        NodeStageVolumeRequest { staging_target_path: String::new(), ..node.stage_request("a", ext4()) };
    node.refuses(InvalidArgument, "staging_target_path", "Node/NodeStageVolume", &nowhere)?;
    let nowhere =
        NodePublishVolumeRequest { target_path: "x".into(), ..node.publish_request("a", "p", ext4()) };
    node.refuses(InvalidArgument, "target_path", "Node/NodePublishVolume", &nowhere)?;
    let expand = ControllerExpandVolumeRequest { volume_id: "a".into(), ..Default::default() };
    node.refuses(InvalidArgument, "capacity_range", "Controller/ControllerExpandVolume", &expand)
}

pub fn unknown(node: &mut Node) -> Res {
    let capacity_range = Some(CapacityRange { required_bytes: 1 << 30, limit_bytes: 0 });
    let long = "x".repeat(300);
    for id in ["unknown", "../etc/passwd", "a/b", "-", &long] {
        let volume_id = id.to_owned();
        let get = ControllerGetVolumeRequest { volume_id: volume_id.clone() };
        node.refuses(NotFound, "", "Controller/ControllerGetVolume", &get)?;
        let expand = ControllerExpandVolumeRequest { volume_id, capacity_range, volume_capability: None };
        node.refuses(NotFound, "", "Controller/ControllerExpandVolume", &expand)?;
        node.refuses(NotFound, "", "Node/NodeStageVolume", &node.stage_request(id, ext4()))?;
        node.refuses(NotFound, "", "Node/NodePublishVolume", &node.publish_request(id, "p", ext4()))?;
        let source_volume_id = id.to_owned();
        let snapshot = CreateSnapshotRequest { source_volume_id, name: "s".into(), ..Default::default() };
        node.refuses(NotFound, "", "Controller/CreateSnapshot", &snapshot)?;
        node.delete(id)?;
        node.ok::<Empty>("Controller/DeleteSnapshot", &DeleteSnapshotRequest { snapshot_id: id.into() })?;
    }
    Ok(())
}

pub fn names(node: &mut Node) -> Res {
    let names = ["a/b", "../../x", "ü".repeat(64).as_str(), " ", "a\tb\n", "*?$(id)", "A", "a", "Z'\""]
        .map(String::from);
    let mut ids = Vec::new();
    for name in &names {
        ids.push(node.volume(name, 8)?);
        ensure!(node.volume(name, 8)? == *ids.last().unwrap_or(name), "{name:?} has two volumes");
    }
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() == names.len(), "{ids:?}");
    for name in ["x".repeat(129), "a\0b".into(), "\u{85}".into()] {
        node.refuses(InvalidArgument, "name", CREATE, &create(&name, 8, ext4()))?;
    }
    ids.iter().try_for_each(|id| node.delete(id))
}

pub fn pages(node: &mut Node) -> Res {
    let list = |max_entries, starting_token: &str| ListVolumesRequest {
        max_entries,
        starting_token: starting_token.into(),
    };
    for name in ["c", "a", "b"] {
        node.volume(name, 8)?;
    }
    let first: ListVolumesResponse = node.ok("Controller/ListVolumes", &list(2, ""))?;
    let second: ListVolumesResponse = node.ok("Controller/ListVolumes", &list(2, &first.next_token))?;
    let entries = first.entries.iter().chain(&second.entries);
    let ids: Vec<String> =
        entries.filter_map(|entry| Some(entry.volume.as_ref()?.volume_id.clone())).collect();
    ensure!(ids == ["a", "b", "c"] && second.next_token.is_empty(), "{ids:?}");
    node.refuses(Aborted, "starting_token", "Controller/ListVolumes", &list(0, "wrong"))?;
    node.refuses(InvalidArgument, "max_entries", "Controller/ListVolumes", &list(-1, ""))?;
    ids.iter().try_for_each(|id| node.delete(id))
}

pub fn full(node: &mut Node) -> Res {
    node.refuses(ResourceExhausted, "free", CREATE, &create("large", 100, ext4()))?;
    let free: GetCapacityResponse = node.ok("Controller/GetCapacity", &GetCapacityRequest::default())?;
    let free = free.available_capacity >> 20;
    // What is promised is not promised again.
    let id = node.volume("most", free - 8)?;
    node.refuses(ResourceExhausted, "free", CREATE, &create("more", 16, ext4()))?;
    // The disk is full without a volume's doing.
    let parameters = BTreeMap::from([("preallocate".to_owned(), "true".to_owned())]);
    node.delete(&id)?;
    fs::write(node.root.join("disk/other"), vec![1; 30 << 20]).map_err(|error| error.to_string())?;
    let request = CreateVolumeRequest { parameters, ..create("most", free - 8, block()) };
    node.refuses(ResourceExhausted, "", CREATE, &request)?;
    ensure!(!node.file("most.json").exists() && !node.file("most.img.new").exists(), "files are left");
    Ok(())
}

pub fn foreign(node: &mut Node) -> Res {
    let write = |name: &str, text: &str| fs::write(node.file(name), text).map_err(|error| error.to_string());
    for name in ["foreign.img", "foreign.txt", "broken.img"] {
        write(name, "data")?;
    }
    write("broken.json", "{\"version\": 1, \"na")?;
    node.refuses(AlreadyExists, "no record", CREATE, &create("foreign", 8, ext4()))?;
    node.refuses(Internal, "broken.json", CREATE, &create("broken", 8, ext4()))?;
    node.refuses(Internal, "broken.json", DELETE, &DeleteVolumeRequest { volume_id: "broken".into() })?;
    node.delete("foreign")?;
    let id = node.volume("shrunk", 8)?;
    write("shrunk.img", "other")?;
    node.refuses(FailedPrecondition, "5 bytes", DELETE, &DeleteVolumeRequest { volume_id: id.clone() })?;
    node.refuses(FailedPrecondition, "5 bytes", "Node/NodeStageVolume", &node.stage_request(&id, ext4()))?;
    let gone = node.volume("gone", 8)?;
    fs::remove_file(node.file("gone.img")).map_err(|error| error.to_string())?;
    let list: ListVolumesResponse = node.ok("Controller/ListVolumes", &ListVolumesRequest::default())?;
    for (id, word) in [("broken", "broken.json"), ("gone", "gone"), ("shrunk", "5 bytes")] {
        let entry =
            list.entries.iter().find(|entry| entry.volume.as_ref().is_some_and(|one| one.volume_id == id));
        let condition = entry.and_then(|entry| entry.status.clone()?.volume_condition).unwrap_or_default();
        ensure!(condition.abnormal && condition.message.contains(word), "{id}: {condition:?}");
    }
    node.delete(&gone)?;
    for (name, text) in
        [("foreign.img", "data"), ("foreign.txt", "data"), ("broken.img", "data"), ("shrunk.img", "other")]
    {
        ensure!(fs::read(node.file(name)).is_ok_and(|found| found == text.as_bytes()), "{name} has changed");
    }
    for name in ["foreign.img", "foreign.txt", "broken.img", "broken.json", "shrunk.img", "shrunk.json"] {
        fs::remove_file(node.file(name)).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

pub fn one_driver(node: &mut Node) -> Res {
    let mut second = node.driver_command("second.sock")?.spawn().map_err(|error| error.to_string())?;
    let ended = second.wait().map_err(|error| error.to_string())?;
    ensure!(!ended.success() && !node.root.join("second.sock").exists(), "{ended}");
    // Calls for one volume: each succeeds or is aborted, and there is one volume.
    let socket = node.root.join("csi.sock");
    let answers: Vec<_> = std::thread::scope(|scope| {
        let create = || call::<CreateVolumeResponse>(&socket, CREATE, &create("one", 64, ext4()));
        let calls: Vec<_> = (0..8).map(|_| scope.spawn(create)).collect();
        calls.into_iter().filter_map(|call| call.join().ok()).collect()
    });
    let aborted = |answer: &Result<_, (Code, String)>| matches!(answer, Err((Aborted, _)));
    ensure!(answers.iter().all(|one| one.is_ok() || aborted(one)), "{answers:?}");
    ensure!(answers.iter().any(Result::is_ok), "{answers:?}");
    node.delete("one")
}
