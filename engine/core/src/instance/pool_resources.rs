// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What private pools take from their engine: its claims, the driver, and workers.

use std::path::Path;
use std::sync::Arc;

use super::claims::ExcludedFileSystem;
use super::engine::{Engine, Tuning};
use super::instance::EngineContext;
use super::pool_workers::{PoolWorkers, SharedWorkers};
use crate::error::Result;
use crate::frontend::{Backend, BackendKind};

/// What private pools take from their engine.
#[derive(Clone, Debug)]
pub struct PoolResources {
    context: EngineContext,
    tuning: Tuning,
    workers: Arc<SharedWorkers>,
}

impl Engine {
    /// What private pools are made of.
    pub fn pool_resources(&self) -> PoolResources {
        PoolResources { context: self.context.clone(), tuning: self.tuning, workers: Arc::default() }
    }
}

impl PoolResources {
    /// Starts the workers of a pool, with space for so many disks. By default, pools use ublk if the
    /// instances do and the driver has all that pools need; otherwise the kernel's loop driver,
    /// without workers. `share`: with other pools of the user.
    pub fn start(
        &self,
        name: &str,
        uid: u32,
        disks: u32,
        share: bool,
        backend: Option<BackendKind>,
    ) -> Result<(EngineContext, Backend, PoolWorkers)> {
        let claims = self.context.claims.of_pool(name, uid);
        let context = EngineContext { claims, ..self.context.clone() };
        let backend = context.frontends.of_pool(backend)?.backend(Path::new("/"), 0, &[])?;
        let options = self.tuning.options(false);
        let workers = match (backend.uses_workers(), share) {
            (false, _) => PoolWorkers::none(name, options),
            (true, false) => PoolWorkers::start(name, disks, options)?,
            (true, true) => self.workers.join(uid, name, disks, options)?,
        };
        Ok((context, backend, workers))
    }

    /// Forbids images on the file system with this device number while the result lives.
    pub fn exclude_images_on(&self, dev: u64) -> ExcludedFileSystem {
        self.context.claims.exclude_file_system(dev)
    }
}
