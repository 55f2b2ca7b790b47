// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What private pools take from their engine: its claims, the driver, and workers.

use std::path::Path;

use super::claims::ExcludedFileSystem;
use super::engine::{Engine, Tuning};
use super::instance::EngineContext;
use super::served::Workers;
use crate::error::Result;
use crate::frontend::{Backend, BackendKind};
use crate::ring::RingSizes;
use crate::worker::WorkerHandle;

/// Workers of a private pool: two queues per device, so that the kernel gives it no scheduler.
const POOL_WORKERS: u32 = 2;

/// What private pools take from their engine.
#[derive(Clone, Debug)]
pub struct PoolResources {
    context: EngineContext,
    tuning: Tuning,
}

impl Engine {
    /// What private pools are made of.
    pub fn pool_resources(&self) -> PoolResources {
        PoolResources { context: self.context.clone(), tuning: self.tuning }
    }
}

impl PoolResources {
    /// Starts the workers of a pool, with space for so many disks. By default, pools use ublk if the
    /// instances do and the driver has all that pools need; otherwise the kernel's loop driver,
    /// without workers.
    pub fn start(
        &self,
        name: &str,
        uid: u32,
        disks: u32,
        backend: Option<BackendKind>,
    ) -> Result<(EngineContext, Backend, Workers)> {
        let claims = self.context.claims.of_pool(name, uid);
        let context = EngineContext { claims, ..self.context.clone() };
        let backend = context.frontends.of_pool(backend)?.backend(Path::new("/"), 0, &[])?;
        if !backend.uses_workers() {
            return Ok((context, backend, Vec::new().into()));
        }
        let (sizes, options) = (RingSizes::for_devices(disks), self.tuning.options(false));
        let workers = (0..POOL_WORKERS)
            .map(|queue| WorkerHandle::start(format!("{name}/{queue}"), sizes, options, Vec::new()))
            .collect::<Result<Vec<_>>>()?;
        Ok((context, backend, workers.into()))
    }

    /// Forbids images on the file system with this device number while the result lives.
    pub fn exclude_images_on(&self, dev: u64) -> ExcludedFileSystem {
        self.context.claims.exclude_file_system(dev)
    }
}
