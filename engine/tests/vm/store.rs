//! Where images live while a case runs: a file system on a memory-backed null_blk device, for its
//! direct I/O is real and nothing else uses it.
//!
//! Knows null_blk, mkfs and mount. Dropping a store unmounts it and frees its memory.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::harness::{At, Ctx, Res};
use crate::tools;

/// A memory-backed block device.
pub(crate) struct Disk {
    name: String,
}

/// What a [`Disk`] is like; sizes in MiB.
pub(crate) struct Shape {
    /// Its size.
    pub(crate) size_mib: u32,
    /// Its logical block size in bytes.
    pub(crate) block_size: u32,
    /// A volatile write cache of this size; 0: none.
    pub(crate) cache_mib: u32,
    /// Nanoseconds that each request takes; 0: none.
    pub(crate) latency_ns: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { size_mib: 1000, block_size: 512, cache_mib: 0, latency_ns: 0 }
    }
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Disk {
    /// Makes a device.
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
        // Where the kernel offers it: without FUA every durable write shows as a flush.
        let _ = disk.set("fua", 0);
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

/// A file system that is mounted until this is dropped.
pub(crate) struct Mount {
    /// Where.
    pub(crate) dir: String,
    mounted: bool,
}

impl Mount {
    /// Mounts `device`; `options` are words for mount(8).
    pub(crate) fn new(device: &str, dir: &str, options: &[&str]) -> Res<Mount> {
        std::fs::create_dir_all(dir).at(dir)?;
        tools::ok(&[&["mount"], options, &[device, dir]].concat())?;
        Ok(Mount { dir: dir.to_string(), mounted: true })
    }

    /// Unmounts; unlike a drop, tells of a failure.
    pub(crate) fn umount(mut self) -> Res {
        self.mounted = false;
        tools::ok(&["umount", &self.dir])?;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted
            && tools::ok(&["umount", &self.dir]).is_err()
            && let Err(error) = tools::ok(&["umount", "--lazy", &self.dir])
        {
            eprintln!("  {} not unmounted: {error:?}", self.dir);
        }
    }
}

/// A file system on a memory-backed device. Fields are dropped in this order.
pub(crate) struct Store {
    mount: Mount,
    /// The device below.
    pub(crate) disk: Disk,
}

impl Store {
    /// An XFS store.
    pub(crate) fn xfs(ctx: &Ctx) -> Res<Store> {
        Store::new(ctx, "xfs", &Shape::default())
    }

    /// An ext4 store.
    pub(crate) fn ext4(ctx: &Ctx) -> Res<Store> {
        Store::new(ctx, "ext4", &Shape::default())
    }

    /// A store of either kind on a device of the given shape.
    pub(crate) fn new(ctx: &Ctx, kind: &str, shape: &Shape) -> Res<Store> {
        let disk = Disk::new(shape)?;
        mkfs(kind, &disk.node())?;
        let mount = Mount::new(&disk.node(), &ctx.path("store"), &[])?;
        Ok(Store { mount, disk })
    }

    /// The path of a file in the store.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.mount.dir)
    }

    /// A sparse image.
    pub(crate) fn sparse(&self, name: &str, bytes: u64) -> Res<String> {
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).at(&path)?;
        Ok(path)
    }

    /// An image with blocks of its own, zeroed.
    pub(crate) fn allocated(&self, name: &str, bytes: u64) -> Res<String> {
        let path = self.path(name);
        tools::ok(&["fallocate", "-l", &bytes.to_string(), &path])?;
        Ok(path)
    }

    /// Unmounts and gives the device.
    pub(crate) fn into_disk(self) -> Res<Disk> {
        self.mount.umount()?;
        Ok(self.disk)
    }
}

/// Makes a file system.
pub(crate) fn mkfs(kind: &str, device: &str) -> Res {
    let words: &[&str] = match kind {
        "xfs" => &["mkfs.xfs", "-q", "-f", device],
        // Without lazy initialisation: no kernel thread writes behind a case's back.
        _ => &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device],
    };
    tools::ok(words)?;
    Ok(())
}

/// Checks a file system that is not mounted, changing nothing.
pub(crate) fn fsck(kind: &str, device: &str) -> Res {
    let words: &[&str] = match kind {
        "xfs" => &["xfs_repair", "-n", device],
        _ => &["e2fsck", "-f", "-n", device],
    };
    tools::run_for(Duration::from_secs(120), words)?.ok()?;
    Ok(())
}
