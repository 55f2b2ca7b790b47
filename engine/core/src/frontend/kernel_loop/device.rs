// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifecycle of one device of the kernel's loop driver: bind, resize, unbind; or take it over
//! from a daemon that is gone.
//!
//! The driver keeps a name for the binder, `loopengine:COOKIE:IMAGE`: by its owner cookie a device
//! is known as ours, and only such a device is changed. Each step has a deadline, because the
//! driver waits for the file system of the image.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::frontend::disk_list::DiskList;
use crate::frontend::timeout::with_timeout;
use crate::frontend::{DeviceParameters, ExistingDevice, IoMode, OrphanState, StopMode};
use crate::image::{Geometry, Image, is_block_size};
use crate::request::SECTOR;
use crate::sys::block_stats::BlockStats;
use crate::sys::loop_device::{
    self, LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY, LoopInfo,
};

/// Prefix of the driver's names of devices that outlive the daemon.
const OWNER: &str = "loopengine:";
/// The same of those of private pools, which do not.
pub(super) const PRIVATE_OWNER: &str = "loopengine-private:";
/// How often a number is tried that a `losetup -f` of the host binds first.
const BIND_TRIES: u32 = 16;
/// How long udev and blkid may have a new device open.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// One device, which exists from its start to its stop.
#[derive(Debug)]
pub struct KernelLoop {
    parameters: DeviceParameters,
    state: Mutex<LoopState>,
}

#[derive(Debug, Default)]
struct LoopState {
    /// None: it has not started.
    number: Option<u32>,
    image: Option<Arc<Image>>,
}

impl KernelLoop {
    /// A device that has not started.
    pub(in crate::frontend) fn new(parameters: DeviceParameters) -> KernelLoop {
        KernelLoop { parameters, state: Mutex::default() }
    }

    /// A device of a previous daemon.
    pub(in crate::frontend) fn existing(number: u32, parameters: DeviceParameters) -> KernelLoop {
        let state = LoopState { number: Some(number), image: None };
        KernelLoop { parameters, state: Mutex::new(state) }
    }

    /// Queries the driver about a device. [`Kind::NotFound`]: it does not exist, is not bound, or is
    /// not ours.
    pub fn examine(number: u32) -> Result<ExistingDevice> {
        let info = status_of(number)?;
        let Some(owner_cookie) = cookie(&info) else { return Err(not_ours(number)) };
        let parameters = DeviceParameters {
            io_mode: IoMode::Loop,
            queues: 0,
            depth: 0,
            owner_cookie,
            recoverable: info.file_name().starts_with(OWNER.as_bytes()),
            partscan: info.flags & LO_FLAGS_PARTSCAN != 0,
        };
        Ok(ExistingDevice { parameters, state: OrphanState::Waiting })
    }

    fn state(&self) -> MutexGuard<'_, LoopState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its number at the driver; 0 before it starts.
    pub fn number(&self) -> u32 {
        self.state().number.unwrap_or(0)
    }

    pub(in crate::frontend) fn parameters(&self) -> DeviceParameters {
        self.parameters
    }

    pub(in crate::frontend) fn node(&self) -> PathBuf {
        node(self.number())
    }

    pub(in crate::frontend) fn describe(&self, image: &Arc<Image>) {
        self.state().image = Some(image.clone());
    }

    /// Adds a device and binds it to the image.
    pub(in crate::frontend) fn start(&self) -> Result<()> {
        let image = self.state().image.take();
        let image = image.ok_or_else(|| Error::new(Kind::Internal, "the device has no image yet"))?;
        let name = image.name().to_owned();
        for _ in 0..BIND_TRIES {
            let number = super::add()?;
            let listed = DiskList::of_machine().add(&disk(number), self.parameters.owner_cookie);
            let (image, parameters) = (image.clone(), self.parameters);
            let bound = listed.and_then(|()| {
                with_timeout(&format!("binding {}", node(number).display()), move || {
                    bind(number, &image, &parameters)
                })
            });
            match bound {
                Ok(Ok(())) => {
                    self.state().number = Some(number);
                    return Ok(());
                }
                // The host's losetup was faster.
                Ok(Err(Errno::BUSY)) => self.unlist(number),
                Ok(Err(error)) => {
                    self.give_up(number);
                    let context = format!("the kernel's loop driver refuses {name}");
                    return Err(Error::os(error, context));
                }
                Err(error) => {
                    self.give_up(number);
                    return Err(error);
                }
            }
        }
        Err(Error::new(Kind::Busy, "other programs bound each new loop device first").hint("try again"))
    }

    /// Removes what a failed start has made. A call that is still under way keeps the device.
    fn give_up(&self, number: u32) {
        if super::remove(number).is_ok() {
            self.unlist(number);
        }
    }

    fn unlist(&self, number: u32) {
        DiskList::of_machine().remove(&disk(number), self.parameters.owner_cookie);
    }

    /// Takes it over: a previous daemon may have died while it stopped the device.
    pub(in crate::frontend) fn take_over(&self) -> Result<()> {
        let number = self.number();
        self.call("taking over", move |file, info| match info.flags & LO_FLAGS_AUTOCLEAR {
            0 => Ok(()),
            _ => keep_at_last_close(file),
        })?
        .map_err(|error| Error::os(error, format!("cannot take over {}", node(number).display())))
    }

    /// Its size is that of its file, which has changed.
    pub(in crate::frontend) fn resize(&self) -> Result<()> {
        let number = self.number();
        self.call("resizing", |file, _| loop_device::set_capacity(file))?
            .map_err(|error| Error::os(error, format!("cannot resize {}", node(number).display())))
    }

    /// Unbinds it. The driver does so at once if nobody has it open. Otherwise, without force, it
    /// stays; with force, it is no longer ours, and its last user's close unbinds it.
    pub(in crate::frontend) fn stop(&self, when: StopMode) -> Result<()> {
        if self.state().number.is_none() {
            return Ok(());
        }
        let wait = if when == StopMode::IfUnused { RELEASE_TIMEOUT } else { Duration::ZERO };
        let deadline = Instant::now() + wait;
        let force = when == StopMode::Always;
        let number = self.number();
        let set = self.call("unbinding", move |file, mut info| {
            if !force {
                return unbind_at_last_close(file, number);
            }
            // It is a loop device as any other now: the next daemon must not take it over.
            let name = info.file_name().splitn(3, |byte| *byte == b':').last().unwrap_or_default();
            let name = name.to_vec();
            info.set_file_name(&name);
            info.flags |= LO_FLAGS_AUTOCLEAR;
            loop_device::set_status(file, &info)
        })?;
        set.map_err(|error| self.cannot("unbind", error))?;
        while !force && self.is_present() {
            if Instant::now() < deadline {
                std::thread::sleep(POLL_INTERVAL);
                continue;
            }
            let kept = self.call("keeping", |file, _| keep_at_last_close(file));
            return match kept {
                Ok(Ok(())) => Err(Error::new(Kind::Busy, "the device is open")),
                // It was unbound all the same.
                Ok(Err(Errno::NXIO)) => Ok(()),
                Err(error) if error.kind() == Kind::NotFound => Ok(()),
                Ok(Err(error)) => Err(self.cannot("keep", error)),
                Err(error) => Err(error),
            };
        }
        Ok(())
    }

    /// Removes it from the driver. One that still has users is removed after their last close, by
    /// whoever needs the number next.
    pub(in crate::frontend) fn delete(&self) -> Result<()> {
        let Some(number) = self.state().number else { return Ok(()) };
        match super::remove(number) {
            Ok(()) | Err(Errno::NODEV | Errno::BUSY) => self.unlist(number),
            Err(error) => return Err(Error::os(error, format!("cannot remove {}", node(number).display()))),
        }
        Ok(())
    }

    pub(in crate::frontend) fn is_present(&self) -> bool {
        status_of(self.number()).is_ok_and(|info| cookie(&info) == Some(self.parameters.owner_cookie))
    }

    pub(in crate::frontend) fn device_number(&self) -> Result<u64> {
        let node = self.node();
        let found = fs::metadata(&node)
            .map_err(|error| Error::os(error, format!("cannot examine {}", node.display())))?;
        Ok(found.rdev())
    }

    /// Its geometry, as the driver has made it; `offset` is its first byte in the image.
    pub(in crate::frontend) fn driver_geometry(&self, offset: u64) -> Result<Geometry> {
        let sysfs = Path::new("/sys/block").join(disk(self.number()));
        let read = |name: &str| -> Result<u64> {
            let file = sysfs.join(name);
            let text = fs::read_to_string(&file)
                .map_err(|error| Error::os(error, format!("cannot read {}", file.display())))?;
            text.trim()
                .parse()
                .map_err(|_| Error::new(Kind::Internal, format!("{} contains no number", file.display())))
        };
        let small = |name: &str| read(name).map(|value| u32::try_from(value).unwrap_or(u32::MAX));
        let block_size = small("queue/logical_block_size")?;
        if !is_block_size(block_size) {
            let context = format!("{} has an unsupported block size", disk(self.number()));
            return Err(Error::new(Kind::Unsupported, context));
        }
        Ok(Geometry {
            size: read("size")?.saturating_mul(SECTOR),
            offset,
            block_size,
            physical_block_size: small("queue/physical_block_size")?.max(block_size),
            dma_align: small("queue/dma_alignment").map_or(SECTOR as u32, |mask| mask.saturating_add(1)),
            discard_granularity: small("queue/discard_granularity")?.max(block_size),
            read_only: read("ro")? != 0,
            can_discard: read("queue/discard_max_bytes")? > 0,
            can_write_zeroes: read("queue/write_zeroes_max_bytes")? > 0,
            durable_writes: false,
        })
    }

    /// Whether it still has a file. Does not wait for the driver.
    pub fn is_bound(&self) -> bool {
        Path::new("/sys/block").join(disk(self.number())).join("loop/backing_file").exists()
    }

    /// Whether the driver uses the page cache.
    pub fn is_buffered(&self) -> bool {
        let dio = fs::read_to_string(Path::new("/sys/block").join(disk(self.number())).join("loop/dio"));
        dio.is_ok_and(|text| text.trim() == "0")
    }

    /// What the block layer has counted since the device was added.
    pub fn stats(&self) -> Result<BlockStats> {
        let disk = disk(self.number());
        BlockStats::of_disk(&disk)
            .map_err(|error| Error::os(error, format!("cannot read /sys/block/{disk}/stat")))
    }

    fn cannot(&self, verb: &str, error: Errno) -> Error {
        Error::os(error, format!("cannot {verb} {}", self.node().display()))
    }

    /// Makes a call on the device, if it is still ours.
    fn call<T: Send + 'static>(
        &self,
        what: &str,
        call: impl FnOnce(&File, LoopInfo) -> rustix::io::Result<T> + Send + 'static,
    ) -> Result<rustix::io::Result<T>> {
        let (number, owner_cookie) = (self.number(), self.parameters.owner_cookie);
        with_timeout(&format!("{what} {}", node(number).display()), move || {
            let file = open(number)?;
            match status(&file, number) {
                Ok(info) if cookie(&info) == Some(owner_cookie) => Ok(call(&file, info)),
                Ok(_) => Err(not_ours(number)),
                Err(error) => Err(error),
            }
        })?
    }
}

/// Binds a device that was just added.
fn bind(number: u32, image: &Image, parameters: &DeviceParameters) -> rustix::io::Result<()> {
    let geometry = image.geometry();
    let file = open_node(number, !geometry.read_only)?;
    let mut info = LoopInfo::default();
    (info.offset, info.size_limit) = (geometry.offset, image.size_limit());
    info.flags = flag(geometry.read_only, LO_FLAGS_READ_ONLY)
        | flag(parameters.partscan, LO_FLAGS_PARTSCAN)
        | flag(!image.is_buffered(), LO_FLAGS_DIRECT_IO);
    info.set_file_name(owned_name(OWNER, parameters.owner_cookie, image.name()).as_bytes());
    loop_device::configure(&file, image.fd(), geometry.block_size, &info)
}

pub(super) fn flag(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

/// The last close of a bound device unbinds it, ours for instance. LOOP_SET_STATUS64 would do the same
/// and wait some 15 ms for the block layer.
pub(super) fn unbind_at_last_close(file: &File, number: u32) -> rustix::io::Result<()> {
    // With one descriptor the driver refuses I/O from now on, and loses what the last close has to
    // write back.
    let _second = open_node(number, false)?;
    loop_device::clear(file)
}

/// The last close of a bound device leaves it bound.
pub(super) fn keep_at_last_close(file: &File) -> rustix::io::Result<()> {
    let mut info = loop_device::status(file)?;
    info.flags &= !LO_FLAGS_AUTOCLEAR;
    loop_device::set_status(file, &info)
}

/// The driver's name of a device of ours: the cookie, and the end of the image's path.
pub(super) fn owned_name(owner: &str, owner_cookie: u64, image: &str) -> String {
    let prefix = format!("{owner}{owner_cookie:016x}:");
    let fits = 63 - prefix.len();
    let start = image.ceil_char_boundary(image.len().saturating_sub(fits));
    format!("{prefix}{}", &image[start..])
}

/// Whether this process has added this device.
pub fn is_held(number: u32) -> bool {
    super::taken().contains(&number)
}

/// The owner cookie of a device of this program.
pub fn cookie(info: &LoopInfo) -> Option<u64> {
    let name = std::str::from_utf8(info.file_name()).ok()?;
    let owned = name.strip_prefix(OWNER).or_else(|| name.strip_prefix(PRIVATE_OWNER))?;
    let (cookie, _) = owned.split_once(':')?;
    u64::from_str_radix(cookie, 16).ok()
}

pub(super) fn disk(number: u32) -> String {
    format!("loop{number}")
}

pub(super) fn node(number: u32) -> PathBuf {
    Path::new("/dev").join(disk(number))
}

/// Opens a device for reading: a close after a write makes udev probe it.
fn open(number: u32) -> Result<File> {
    open_node(number, false).map_err(|error| match error {
        Errno::NOENT | Errno::NXIO | Errno::NODEV => not_ours(number),
        _ => Error::os(error, format!("cannot open {}", node(number).display())),
    })
}

pub(super) fn open_node(number: u32, writable: bool) -> rustix::io::Result<File> {
    let opened = File::options().read(true).write(writable).custom_flags(libc::O_NONBLOCK).open(node(number));
    opened.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn status(file: impl AsFd, number: u32) -> Result<LoopInfo> {
    loop_device::status(file).map_err(|error| match error {
        Errno::NXIO => not_ours(number),
        error => Error::os(error, format!("cannot examine {}", node(number).display())),
    })
}

fn status_of(number: u32) -> Result<LoopInfo> {
    let what = format!("examining {}", node(number).display());
    with_timeout(&what, move || status(&open(number)?, number))?
}

fn not_ours(number: u32) -> Error {
    Error::new(Kind::NotFound, format!("{} is not a device of loopengine", node(number).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_the_owner() {
        let mut info = LoopInfo::default();
        assert_eq!(cookie(&info), None);
        let long = format!("/{}/ä.img", "x".repeat(100));
        for image in ["/a.img", &long] {
            for owner in [OWNER, PRIVATE_OWNER] {
                let name = owned_name(owner, 0x1234, image);
                assert!(name.len() <= 63 && image.ends_with(name.rsplit(':').next().unwrap()), "{name}");
                info.set_file_name(name.as_bytes());
                assert_eq!(cookie(&info), Some(0x1234));
            }
        }
        for name in ["/a.img", "loopengine:", "loopengine:12", "loopengine:xyz:/a", "x:0000000000001234:/a"] {
            info.set_file_name(name.as_bytes());
            assert_eq!(cookie(&info), None, "{name}");
        }
    }
}
