// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's proxy of the interface.

use std::os::fd::OwnedFd;

use super::Fault;
use super::reply::*;
use crate::instance::spec::{AttachSpec, InstanceSpec, RecoverSpec};

#[zlink::proxy(interface = "io.loopengine")]
pub(super) trait ControlCalls {
    async fn get_features(&mut self) -> zlink::Result<Result<FeaturesReply, Fault>>;
    async fn create_instance(&mut self, spec: &InstanceSpec) -> zlink::Result<Result<InstanceReply, Fault>>;
    async fn list_instances(&mut self) -> zlink::Result<Result<InstancesReply, Fault>>;
    async fn remove_instance(&mut self, name: &str, force: bool) -> zlink::Result<Result<(), Fault>>;
    async fn attach(
        &mut self,
        spec: &AttachSpec,
        force: bool,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<DeviceReply, Fault>>;
    async fn detach(
        &mut self,
        device: Option<&str>,
        instance: Option<&str>,
        all: bool,
        force: bool,
    ) -> zlink::Result<Result<DetachReply, Fault>>;
    async fn resize(
        &mut self,
        device: &str,
        size: Option<u64>,
        shrink: bool,
        force: bool,
    ) -> zlink::Result<Result<DeviceReply, Fault>>;
    async fn set_io_limits(
        &mut self,
        device: &str,
        iops: Option<u64>,
        bytes_per_second: Option<u64>,
    ) -> zlink::Result<Result<DeviceReply, Fault>>;
    async fn recover(
        &mut self,
        spec: &RecoverSpec,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<DeviceReply, Fault>>;
    async fn list_devices(
        &mut self,
        device: Option<&str>,
        instance: Option<&str>,
    ) -> zlink::Result<Result<DevicesReply, Fault>>;
    async fn get_stats(
        &mut self,
        device: Option<&str>,
        instance: Option<&str>,
    ) -> zlink::Result<Result<StatsReply, Fault>>;
    async fn get_activity(&mut self) -> zlink::Result<Result<ActivityReply, Fault>>;
    async fn get_counters(&mut self) -> zlink::Result<Result<CountersReply, Fault>>;
}
