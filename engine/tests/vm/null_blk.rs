// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices below a store: null_blk, backed by memory, with faults on demand.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::harness::{At, Res};
use crate::tools;

/// A memory-backed block device.
pub(crate) struct Disk {
    name: String,
}

/// Properties of a [`Disk`]; sizes in MiB.
pub(crate) struct Shape {
    /// Its size.
    pub(crate) size_mib: u32,
    /// Its logical block size in bytes.
    pub(crate) block_size: u32,
    /// A volatile write cache of this size; 0: none.
    pub(crate) cache_mib: u32,
    /// Requests can write through that cache (FUA).
    pub(crate) fua: bool,
    /// Nanoseconds that each request takes; 0: none.
    pub(crate) latency_ns: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { size_mib: 1000, block_size: 512, cache_mib: 0, fua: false, latency_ns: 0 }
    }
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Disk {
    /// Creates a device.
    pub(crate) fn new(shape: &Shape) -> Res<Disk> {
        let name = format!("lecase{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let disk = Disk { name };
        std::fs::create_dir(disk.folder()).at("null_blk")?;
        let attributes = [
            ("memory_backed", 1),
            ("irqmode", if shape.latency_ns > 0 { 2 } else { 1 }),
            ("completion_nsec", shape.latency_ns.max(1)),
            ("submit_queues", 2),
            ("blocksize", shape.block_size),
            ("size", shape.size_mib),
            ("cache_size", shape.cache_mib),
            ("discard", 1),
        ];
        for (attribute, value) in attributes {
            disk.set(attribute, value)?;
        }
        // If the kernel supports it: without FUA, every durable write causes a flush.
        let _ = disk.set("fua", u32::from(shape.fua));
        disk.set("power", 1)?;
        tools::until(Duration::from_secs(10), || Path::new(&disk.node()).exists().then_some(()))
            .ok_or_else(|| format!("{} did not appear", disk.node()))?;
        Ok(disk)
    }

    /// Its node in /dev.
    pub(crate) fn node(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Sets an attribute in configfs.
    pub(crate) fn set(&self, attribute: &str, value: impl std::fmt::Display) -> Res {
        let path = format!("{}/{attribute}", self.folder());
        std::fs::write(&path, value.to_string()).at(path)
    }

    /// Flushes that reached the device.
    pub(crate) fn flushes(&self) -> Res<u64> {
        let path = format!("/sys/block/{}/stat", self.name);
        let text = std::fs::read_to_string(&path).at(path)?;
        let field = text.split_whitespace().nth(15).ok_or("no flush counter")?;
        Ok(field.parse()?)
    }

    fn folder(&self) -> String {
        format!("/sys/kernel/config/nullb/{}", self.name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.set("power", 0);
        if let Err(error) = std::fs::remove_dir(self.folder()) {
            eprintln!("  {} not removed: {error}", self.name);
        }
    }
}
