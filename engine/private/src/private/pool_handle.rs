// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the registry needs of pools: the engine provides it, or a fake in tests.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Caller, ContainerSession, OperationRequest, OperationResult, TenantEvents};
use crate::error::{Error, Kind, Result};
use crate::instance::activity::DeviceActivity;
use crate::kernel_mounts::FileSystem;
use crate::loops::{DeviceEntry, PoolSpec, Quotas};

/// Creates pools.
pub trait PoolSource: Send + Sync + 'static {
    /// The counts of devices.
    fn quotas(&self) -> Quotas;

    /// Opens a pool and a file system with its nodes; returns its mount. Reports every change and
    /// the end to `events`, and also the devices that exist from the start.
    fn open(&self, spec: &PoolSpec, events: TenantEvents) -> Result<(Arc<dyn PoolHandle>, OwnedFd)>;

    /// Looks up these file systems, if the kernel may mount them for `caller`.
    fn kernel_mounts(&self, names: &[String], _caller: Caller) -> Result<Vec<&'static FileSystem>> {
        match names {
            [] => Ok(Vec::new()),
            _ => Err(Error::new(Kind::Unsupported, "mounts by the kernel are not available here")),
        }
    }
}

/// The daemon's end of the socket of a mounter.
#[derive(Debug)]
pub struct Mounter {
    /// The socket.
    pub socket: OwnedFd,
    /// It receives the calls of mount(2). Otherwise only those of devtmpfs; the kernel serves the
    /// others.
    pub serves_mounts: bool,
}

/// A pool with its file system.
pub trait PoolHandle: Send + Sync {
    /// Serves the calls of the filter with this listener. At most once. Administrators of the user
    /// namespace administrate the pool. `mounter` ends before the devices do.
    fn supervise(&self, listener: OwnedFd, namespace: OwnedFd, mounter: Option<Mounter>) -> Result<()>;
    /// Allows the kernel to mount these file systems for the tenant. Called before its calls are
    /// served.
    fn allow_kernel_mounts(&self, _kinds: Vec<&'static FileSystem>) {}
    /// The allowed file systems.
    fn kernel_mounts(&self) -> Vec<&'static FileSystem> {
        Vec::new()
    }
    /// The same as `supervise` for a process of a container, once per process with a filter.
    fn admit(&self, session: ContainerSession) -> Result<()>;
    /// Unbinds all devices, for the next container.
    fn reset(&self);
    /// What serves its disks: ublk or loop.
    fn backend(&self) -> Option<&'static str> {
        None
    }
    /// Device numbers of all its disks, if they must not change.
    fn device_numbers(&self) -> Vec<u64>;
    /// All devices.
    fn entries(&self) -> Vec<DeviceEntry>;
    /// What its bound devices do.
    fn activity(&self) -> Vec<DeviceActivity> {
        Vec::new()
    }
    /// Runs an operation for the pool's owner or root. May block on the file of the request.
    fn operate(&self, request: &OperationRequest, file: Option<OwnedFd>) -> OperationResult;
    /// See [`crate::loops::Pool::end`].
    fn end(&self, force: bool);
}
