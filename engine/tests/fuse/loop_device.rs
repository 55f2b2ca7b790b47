// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices below a store, for machines without null_blk: loop devices of the kernel over sparse
//! files.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::harness::{At, Res, skip};
use crate::tools;

/// A loop device and its file.
pub(crate) struct Disk {
    node: String,
    file: String,
}

/// Properties of a [`Disk`]; sizes in MiB.
pub(crate) struct Shape {
    /// Its size.
    pub(crate) size_mib: u32,
    /// Its logical block size in bytes.
    pub(crate) block_size: u32,
    /// Ignored: the file below has the page cache.
    pub(crate) cache_mib: u32,
    /// Ignored.
    pub(crate) latency_ns: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { size_mib: 1000, block_size: 512, cache_mib: 0, latency_ns: 0 }
    }
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Disk {
    /// Creates a device.
    pub(crate) fn new(shape: &Shape) -> Res<Disk> {
        // Another case may run in another process.
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let file = format!("{}/disk{process}-{number}", crate::SCRATCH);
        let made = std::fs::File::create(&file).at(&file)?;
        made.set_len(u64::from(shape.size_mib) << 20)?;
        let size = shape.block_size.to_string();
        let node = tools::ok(&["losetup", "--find", "--show", "--sector-size", &size, &file])?;
        Ok(Disk { node, file })
    }

    /// Its node in /dev.
    pub(crate) fn node(&self) -> String {
        self.node.clone()
    }

    /// Skips the case: faults need null_blk.
    pub(crate) fn set(&self, attribute: &str, _value: impl std::fmt::Display) -> Res {
        skip!("a loop device has no attribute '{attribute}'")
    }

    /// Flushes that reached the device.
    pub(crate) fn flushes(&self) -> Res<u64> {
        let name = Path::new(&self.node).file_name().ok_or("no name")?.to_string_lossy();
        let path = format!("/sys/block/{name}/stat");
        let text = std::fs::read_to_string(&path).at(path)?;
        let field = text.split_whitespace().nth(15).ok_or("no flush counter")?;
        Ok(field.parse()?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = tools::ok(&["losetup", "--detach", &self.node]) {
            eprintln!("  {} not removed: {error:?}", self.node);
        }
        let _ = std::fs::remove_file(&self.file);
    }
}
