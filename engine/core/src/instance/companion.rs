// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private pools, as their engine knows them. They are above this module.

use std::path::PathBuf;

/// Owns disks that end with the engine.
pub trait Companion: std::fmt::Debug + Send + Sync {
    /// Nodes of the disks that show a file.
    fn bound_nodes(&self) -> Vec<PathBuf>;
    /// Ends them all, by force. Waits for that within limits.
    fn end(&self);
    /// The kernel has added or removed nodes of partitions, or of disks on top of others.
    fn update_nodes(&self);
}
