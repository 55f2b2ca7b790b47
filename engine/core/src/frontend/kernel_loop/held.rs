// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of the kernel's loop driver that its holder keeps open: a disk of a private pool.
//!
//! The driver unbinds a device at its last close only. So nobody else can unbind this one, whatever
//! they do with a descriptor of it, and `losetup -f` of the host never gets it. It has autoclear
//! set: when the daemon dies, an unused device ends, and one in use ends at its last close. Each
//! step has a deadline, because the driver waits for the file system of the image. Knows neither
//! pools nor what an operation of loop(4) means.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::device::{BlockStats, PRIVATE_OWNER, disk, flag, node, owned_name, parse_stats};
use super::{add, remove};
use crate::error::{Error, Kind, Result};
use crate::frontend::disk_list::DiskList;
use crate::frontend::timeout::with_timeout;
use crate::image::{Identity, Image};
use crate::sys::block;
use crate::sys::loop_device::{
    self, LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO, LO_FLAGS_PARTSCAN, LO_FLAGS_READ_ONLY, LoopInfo,
};

/// How often a number is tried that another program binds first.
const BIND_TRIES: u32 = 16;
/// An offset beyond the end of any file: the device has size 0.
const BEYOND_ANY_FILE: u64 = 1 << 62;

/// A bound device.
#[derive(Debug)]
pub struct HeldLoop {
    number: u32,
    owner_cookie: u64,
    rdev: u64,
    state: Mutex<HeldState>,
}

#[derive(Debug)]
struct HeldState {
    /// None: it was unbound.
    file: Option<Arc<File>>,
    image: Identity,
}

impl HeldLoop {
    /// Adds a device, and binds it.
    pub fn start(image: Image, owner_cookie: u64) -> Result<HeldLoop> {
        let image = Arc::new(image);
        for _ in 0..BIND_TRIES {
            let number = add()?;
            let listed = DiskList::of_machine().add(&disk(number), owner_cookie);
            match listed.and_then(|()| HeldLoop::bind(number, owner_cookie, Arc::clone(&image))) {
                // The host's losetup was faster.
                Err(error) if error.kind() == Kind::Busy => release_number(number, owner_cookie),
                Err(error) => {
                    release_number(number, owner_cookie);
                    return Err(error);
                }
                Ok(device) => return Ok(device),
            }
        }
        Err(Error::new(Kind::Busy, "other programs bind each new loop device").hint("try again"))
    }

    /// Binds it again after [`HeldLoop::unbind`]: nobody has it open, and it keeps its number.
    pub fn rebind(&self, image: Image) -> Result<HeldLoop> {
        HeldLoop::bind(self.number, self.owner_cookie, Arc::new(image))
    }

    fn bind(number: u32, owner_cookie: u64, image: Arc<Image>) -> Result<HeldLoop> {
        let bound = with_timeout("binding a loop device", move || -> rustix::io::Result<HeldLoop> {
            let geometry = image.geometry();
            let os = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
            let options = File::options()
                .read(true)
                .write(!geometry.read_only)
                .custom_flags(libc::O_NONBLOCK)
                .open(node(number));
            let file = options.map_err(os)?;
            let rdev = file.metadata().map_err(os)?.rdev();
            let mut info = LoopInfo::default();
            (info.offset, info.size_limit) = (geometry.offset, image.size_limit());
            info.flags = LO_FLAGS_AUTOCLEAR
                | flag(geometry.read_only, LO_FLAGS_READ_ONLY)
                | flag(!image.is_buffered(), LO_FLAGS_DIRECT_IO);
            info.set_file_name(owned_name(PRIVATE_OWNER, owner_cookie, image.name()).as_bytes());
            loop_device::configure(&file, image.fd(), geometry.block_size, &info)?;
            let state = HeldState { file: Some(Arc::new(file)), image: image.identity() };
            Ok(HeldLoop { number, owner_cookie, rdev, state: Mutex::new(state) })
        })?;
        bound.map_err(|error| match error {
            Errno::BUSY => Error::new(Kind::Busy, format!("another program has {}", node(number).display())),
            error => Error::os(error, "the kernel's loop driver refuses the image"),
        })
    }

    /// Its device number.
    pub fn rdev(&self) -> u64 {
        self.rdev
    }

    /// The path that users open.
    pub fn node(&self) -> PathBuf {
        node(self.number)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        // Under the lock: `unbind` must have the only reference.
        let state = self.state();
        state.file.as_ref().and_then(|file| block::size(file.as_fd()).ok()).unwrap_or(0)
    }

    /// What the block layer has counted since the device was added.
    pub fn stats(&self) -> BlockStats {
        let file = Path::new("/sys/block").join(disk(self.number)).join("stat");
        parse_stats(&fs::read_to_string(file).unwrap_or_default())
    }

    /// Serves another range of its file, or the same range of another file, which is read-only and
    /// has the same size. EAGAIN: somebody keeps pages of the device in memory.
    pub fn set_image(&self, image: Image) -> Result<()> {
        let (before, identity) = (self.state().image, image.identity());
        self.call("changing a loop device", move |file| {
            if before != identity {
                loop_device::change_file(file, image.fd())?;
            }
            set_range(file, image.geometry().offset, image.size_limit())
        })?;
        self.state().image = identity;
        Ok(())
    }

    /// Takes its file away from all who have it open: its size is 0. EAGAIN: somebody keeps pages of
    /// the device in memory, a mounted file system for instance.
    pub fn withdraw_file(&self) -> Result<()> {
        self.call("taking a file away from a loop device", |file| set_range(file, BEYOND_ANY_FILE, 0))
    }

    /// Its size is that of its file, which has changed.
    pub fn set_capacity(&self) -> Result<()> {
        self.call("resizing a loop device", |file| loop_device::set_capacity(file))
    }

    /// Switches direct I/O.
    pub fn set_direct_io(&self, on: bool) -> Result<()> {
        self.call("switching direct I/O", move |file| loop_device::set_direct_io(file, on))
    }

    /// Changes the logical block size.
    pub fn set_block_size(&self, bytes: u32) -> Result<()> {
        self.call("changing a block size", move |file| loop_device::set_block_size(file, bytes))
    }

    /// Unbinds it if nobody else has it open; otherwise [`Kind::Busy`], and nothing has changed.
    pub fn unbind(&self) -> Result<()> {
        // Only the thread has the file: its close ends the device.
        let Some(file) = self.state().file.take() else { return Ok(()) };
        let (keep, kept) = crossbeam::channel::bounded(1);
        let unbound = with_timeout("unbinding a loop device", move || {
            let unbound = loop_device::clear(&*file).map(|()| loop_device::status(&*file).err());
            match unbound {
                Ok(Some(Errno::NXIO)) => drop(file),
                _ => drop(keep.send(file)),
            }
            unbound
        })?;
        // The thread has ended.
        if let Ok(file) = kept.try_recv() {
            self.state().file = Some(file);
        }
        match unbound {
            Ok(Some(Errno::NXIO)) => Ok(()),
            Ok(_) => Err(Error::new(Kind::Busy, "the device is open")),
            Err(error) => Err(Error::os(error, format!("cannot unbind {}", self.node().display()))),
        }
    }

    /// Gives it up: it ends at its last close.
    pub fn abandon(&self) {
        super::taken().remove(&self.number);
        let file = self.state().file.take();
        // The last close writes back.
        let _ = with_timeout("closing a loop device", move || drop(file));
    }

    /// Removes a device that is unbound. That takes some 40 ms.
    pub fn delete(&self) -> Result<()> {
        match remove(self.number) {
            Ok(()) | Err(Errno::NODEV) => {
                DiskList::of_machine().remove(&disk(self.number), self.owner_cookie);
                Ok(())
            }
            // Somebody has opened it since. The host's next `losetup -f` must not bind it for them.
            Err(Errno::BUSY) => Image::empty(512).and_then(|empty| self.rebind(empty)).map(|it| it.abandon()),
            Err(error) => Err(Error::os(error, format!("cannot remove {}", self.node().display()))),
        }
    }

    fn state(&self) -> MutexGuard<'_, HeldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(
        &self,
        what: &str,
        call: impl FnOnce(&File) -> rustix::io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let file = self.state().file.clone();
        let file = file.ok_or_else(|| Error::new(Kind::NotFound, "the device was unbound"))?;
        with_timeout(what, move || call(&file))?
            .map_err(|error| Error::os(error, format!("{what} failed: {}", self.node().display())))
    }
}

/// Removes what a failed start has made. A call that is still under way keeps the device.
fn release_number(number: u32, owner_cookie: u64) {
    if remove(number).is_ok() {
        DiskList::of_machine().remove(&disk(number), owner_cookie);
    }
}

fn set_range(file: &File, offset: u64, size_limit: u64) -> rustix::io::Result<()> {
    let mut info = loop_device::status(file)?;
    (info.offset, info.size_limit) = (offset, size_limit);
    // Whoever has it open can change its flags.
    info.flags = info.flags & !LO_FLAGS_PARTSCAN | LO_FLAGS_AUTOCLEAR;
    loop_device::set_status(file, &info)
}
