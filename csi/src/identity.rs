// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who the driver is, and what it can do.

use std::collections::BTreeMap;

use tonic::Status;

use crate::messages::*;
use crate::{Driver, NAME, TOPOLOGY};

/// PluginCapability.Service.Type
const CONTROLLER_SERVICE: i32 = 1;
const VOLUME_ACCESSIBILITY_CONSTRAINTS: i32 = 2;
/// PluginCapability.VolumeExpansion.Type
const ONLINE: i32 = 1;
/// ControllerServiceCapability.RPC.Type
const EXPAND_VOLUME: i32 = 9;
const CONTROLLER: [i32; 9] = [
    1,  // CREATE_DELETE_VOLUME
    3,  // LIST_VOLUMES
    4,  // GET_CAPACITY
    5,  // CREATE_DELETE_SNAPSHOT
    6,  // LIST_SNAPSHOTS
    7,  // CLONE_VOLUME
    11, // VOLUME_CONDITION
    12, // GET_VOLUME
    13, // SINGLE_NODE_MULTI_WRITER
];
/// NodeServiceCapability.RPC.Type
const NODE: [i32; 6] = [
    1, // STAGE_UNSTAGE_VOLUME
    2, // GET_VOLUME_STATS
    3, // EXPAND_VOLUME
    4, // VOLUME_CONDITION
    5, // SINGLE_NODE_MULTI_WRITER
    6, // VOLUME_MOUNT_GROUP
];

impl Driver {
    pub(crate) fn plugin_info(&self, _: Empty) -> Result<PluginInfo, Status> {
        let (name, vendor_version) = (NAME.to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(PluginInfo { name, vendor_version, manifest: BTreeMap::new() })
    }

    pub(crate) fn plugin_capabilities(&self, _: Empty) -> Result<PluginCapabilities, Status> {
        let service =
            |kind| PluginCapability { service: Some(CapabilityType { kind }), volume_expansion: None };
        let online = Some(CapabilityType { kind: ONLINE });
        Ok(PluginCapabilities {
            capabilities: vec![
                service(CONTROLLER_SERVICE),
                service(VOLUME_ACCESSIBILITY_CONSTRAINTS),
                PluginCapability { service: None, volume_expansion: online },
            ],
        })
    }

    /// Ready once the engine answers.
    pub(crate) fn probe(&self, _: Empty) -> Result<ProbeResponse, Status> {
        Ok(ProbeResponse { ready: Some(BoolValue { value: self.engine.answers() }) })
    }

    pub(crate) fn controller_capabilities(&self, _: Empty) -> Result<ServiceCapabilities, Status> {
        let expand = (!self.node_expansion).then_some(EXPAND_VOLUME);
        Ok(capabilities(CONTROLLER.into_iter().chain(expand)))
    }

    pub(crate) fn node_capabilities(&self, _: Empty) -> Result<ServiceCapabilities, Status> {
        Ok(capabilities(NODE.into_iter()))
    }

    pub(crate) fn node_info(&self, _: Empty) -> Result<NodeGetInfoResponse, Status> {
        Ok(NodeGetInfoResponse {
            node_id: self.node.clone(),
            max_volumes_per_node: self.engine.max_devices.into(),
            accessible_topology: Some(self.topology()),
        })
    }

    /// Where the volumes of this node are.
    pub(crate) fn topology(&self) -> Topology {
        Topology { segments: BTreeMap::from([(TOPOLOGY.to_owned(), self.node.clone())]) }
    }

    /// True if a volume of this node can be used there.
    pub(crate) fn is_here(&self, topology: &Topology) -> bool {
        topology.segments.iter().all(|(key, value)| key.eq_ignore_ascii_case(TOPOLOGY) && *value == self.node)
    }
}

fn capabilities(kinds: impl Iterator<Item = i32>) -> ServiceCapabilities {
    let each = kinds.map(|kind| ServiceCapability { rpc: Some(CapabilityType { kind }) });
    ServiceCapabilities { capabilities: each.collect() }
}
