// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of the kernel's loop driver for a private pool. It does not outlive its daemon: the next
//! one removes it, or it ends at its last close.
//!
//! The daemon does not keep it open: the last close of its users must be the driver's last close,
//! which writes back. The disk sequence number tells whether it still has the file that it was bound
//! to, whoever else has called the driver. Each step has a deadline, because the driver waits for the
//! file system of the image. Knows neither pools nor what an operation of loop(4) means.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::device::{
    PRIVATE_OWNER, disk, flag, keep_at_last_close, node, open_node, owned_name, unbind_at_last_close,
};
use super::{add, remove};
use crate::error::{Error, Kind, Result};
use crate::frontend::disk_list::DiskList;
use crate::frontend::timeout::with_timeout;
use crate::image::{Identity, Image};
use crate::sys::block;
use crate::sys::block_stats::BlockStats;
use crate::sys::loop_device::{self, LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY, LoopInfo};

/// How often a number is tried that another program binds first.
const BIND_TRIES: u32 = 16;
/// How long the driver may take to unbind a device after its last close, and the interval between
/// two attempts to bind it again.
const REBIND_TIMEOUT: Duration = Duration::from_millis(500);
const REBIND_INTERVAL: Duration = Duration::from_millis(1);
/// An offset beyond the end of any file: the device has size 0.
const BEYOND_ANY_FILE: u64 = 1 << 62;

/// A bound device.
#[derive(Debug)]
pub struct PrivateLoop {
    number: u32,
    owner_cookie: u64,
    rdev: u64,
    state: Mutex<Binding>,
    /// A call that has not ended holds a reference.
    call: Arc<()>,
}

#[derive(Clone, Copy, Debug)]
struct Binding {
    image: Identity,
    /// Its file is empty, and no file system can delay a call.
    is_empty: bool,
    /// The disk sequence number since it was bound.
    sequence: u64,
}

impl PrivateLoop {
    /// Adds a device, and binds it.
    pub fn start(image: &Arc<Image>, owner_cookie: u64) -> Result<PrivateLoop> {
        for _ in 0..BIND_TRIES {
            let number = add()?;
            let listed = DiskList::of_machine().add(&disk(number), owner_cookie);
            match listed.and_then(|()| bind(number, owner_cookie, Arc::clone(image))) {
                // The host's losetup was faster.
                Err(error) if error.kind() == Kind::Busy => release_number(number, owner_cookie),
                Err(error) => {
                    release_number(number, owner_cookie);
                    return Err(error);
                }
                Ok(device) => return Ok(device),
            }
        }
        Err(Error::new(Kind::Busy, "other programs bound each new loop device first").hint("try again"))
    }

    /// Binds it again after it was unbound. It keeps its number.
    pub fn rebind(&self, image: &Arc<Image>) -> Result<PrivateLoop> {
        bind(self.number, self.owner_cookie, Arc::clone(image))
    }

    /// Its number at the driver.
    pub fn number(&self) -> u32 {
        self.number
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
        let sectors = fs::read_to_string(self.sysfs().join("size")).ok();
        sectors.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0).saturating_mul(512)
    }

    /// What the block layer has counted since the device was added.
    pub fn stats(&self) -> BlockStats {
        BlockStats::of_disk(&disk(self.number)).unwrap_or_default()
    }

    /// Whether it still has its file: neither its last close nor anybody else has unbound it.
    pub fn is_bound(&self) -> bool {
        let sequence = fs::read_to_string(self.sysfs().join("diskseq")).ok();
        sequence.and_then(|text| text.trim().parse().ok()) == Some(self.state().sequence)
    }

    /// Serves another range of its file, or the same range of another file, which is read-only and
    /// has the same size. EAGAIN: somebody keeps pages of the device in memory.
    pub fn set_image(&self, image: Image) -> Result<()> {
        let (before, identity) = (self.state().image, image.identity());
        let sequence = self.call("changing", move |file| {
            if before != identity {
                loop_device::change_file(file, image.fd())?;
            }
            set_range(file, image.geometry().offset, image.size_limit())?;
            block::disk_sequence(file.as_fd())
        })?;
        let mut state = self.state();
        (state.image, state.is_empty, state.sequence) = (identity, false, sequence);
        Ok(())
    }

    /// Takes its file away from all who have it open: its size is 0. EAGAIN: somebody keeps pages of
    /// the device in memory, a mounted file system for instance.
    pub fn withdraw_file(&self) -> Result<()> {
        self.call("withdrawing the file of", |file| set_range(file, BEYOND_ANY_FILE, 0))
    }

    /// Its size is that of its file, which has changed.
    pub fn set_capacity(&self) -> Result<()> {
        self.call("resizing", |file| loop_device::set_capacity(file))
    }

    /// Switches direct I/O.
    pub fn set_direct_io(&self, on: bool) -> Result<()> {
        self.call("switching direct I/O of", move |file| loop_device::set_direct_io(file, on))
    }

    /// Whether its last close unbinds it. Without users, it is unbound at once.
    pub fn set_autoclear(&self, on: bool) -> Result<()> {
        if self.is_autoclear() == on {
            return Ok(());
        }
        let number = self.number;
        self.call("changing", move |file| match on {
            true => unbind_at_last_close(file, number),
            false => keep_at_last_close(file),
        })
    }

    /// What the driver says: a process that bypasses the interception can change it.
    fn is_autoclear(&self) -> bool {
        fs::read(self.sysfs().join("loop/autoclear")).is_ok_and(|text| text.starts_with(b"1"))
    }

    /// Unbinds it if nobody has it open; otherwise [`Kind::Busy`], and nothing has changed.
    pub fn unbind(&self) -> Result<()> {
        let busy = || Err(Error::new(Kind::Busy, "the device is open"));
        if !self.is_bound() {
            return Ok(());
        }
        if self.is_autoclear() {
            return busy();
        }
        let number = self.number;
        self.call("unbinding", move |file| unbind_at_last_close(file, number))?;
        if !self.is_bound() {
            return Ok(());
        }
        match self.call("unbinding", keep_at_last_close) {
            Ok(()) => busy(),
            Err(_) if !self.is_bound() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Another program has it now.
    pub fn forget(&self) {
        super::taken().remove(&self.number);
    }

    /// Removes a device that is unbound. That takes some 40 ms.
    pub fn delete(&self) -> Result<()> {
        match remove(self.number) {
            Ok(()) | Err(Errno::NODEV) => {
                DiskList::of_machine().remove(&disk(self.number), self.owner_cookie);
                Ok(())
            }
            // Somebody has opened it since. The host's next `losetup -f` must not bind it for them.
            Err(Errno::BUSY) => {
                let empty = Arc::new(Image::empty(512)?);
                self.rebind(&empty)?.set_autoclear(true)
            }
            Err(error) => Err(Error::os(error, format!("cannot remove {}", self.node().display()))),
        }
    }

    fn sysfs(&self) -> PathBuf {
        Path::new("/sys/block").join(disk(self.number))
    }

    fn state(&self) -> MutexGuard<'_, Binding> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call on the device, if it still has its file.
    fn call<T: Send + 'static>(
        &self,
        what: &str,
        call: impl FnOnce(&File) -> rustix::io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (number, node) = (self.number, self.node());
        let Binding { sequence, is_empty, .. } = *self.state();
        if Arc::strong_count(&self.call) > 1 {
            // Each call more would hang, too, and keep a thread.
            let context = format!("the file system of the image of {} does not answer", node.display());
            return Err(Error::new(Kind::Deadline, context));
        }
        let running = Arc::clone(&self.call);
        let what = format!("{what} {}", node.display());
        let call = move || {
            let _running = running;
            let file = open_node(number, false)?;
            match block::disk_sequence(file.as_fd())? == sequence {
                true => call(&file),
                false => Err(Errno::NXIO),
            }
        };
        let done = if is_empty { call() } else { with_timeout(&what, call)? };
        done.map_err(|error| Error::os(error, format!("{what} failed")))
    }
}

fn bind(number: u32, owner_cookie: u64, image: Arc<Image>) -> Result<PrivateLoop> {
    let (what, name) = (format!("binding {}", node(number).display()), image.name().to_owned());
    let bound = with_timeout(&what, move || -> rustix::io::Result<PrivateLoop> {
        let geometry = image.geometry();
        let mut info = LoopInfo::default();
        (info.offset, info.size_limit) = (geometry.offset, image.size_limit());
        info.flags =
            flag(geometry.read_only, LO_FLAGS_READ_ONLY) | flag(!image.is_buffered(), LO_FLAGS_DIRECT_IO);
        info.set_file_name(owned_name(PRIVATE_OWNER, owner_cookie, image.name()).as_bytes());
        let file = open_unbound(number, !geometry.read_only)?;
        loop_device::configure(&file, image.fd(), geometry.block_size, &info)?;
        let sequence = block::disk_sequence(file.as_fd())?;
        let rdev = rustix::fs::fstat(&file)?.st_rdev;
        let state = Binding { image: image.identity(), is_empty: image.is_placeholder(), sequence };
        Ok(PrivateLoop { number, owner_cookie, rdev, state: Mutex::new(state), call: Arc::default() })
    })?;
    bound.map_err(|error| match error {
        Errno::BUSY | Errno::NXIO | Errno::NOENT => {
            Error::new(Kind::Busy, format!("another program uses {}", node(number).display()))
        }
        error => Error::os(error, format!("the kernel's loop driver refuses {name}")),
    })
}

/// Opens a device that the driver may still be unbinding.
fn open_unbound(number: u32, writable: bool) -> rustix::io::Result<File> {
    let until = Instant::now() + REBIND_TIMEOUT;
    loop {
        match open_node(number, writable) {
            Err(Errno::NXIO) if Instant::now() < until => std::thread::sleep(REBIND_INTERVAL),
            opened => return opened,
        }
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
    loop_device::set_status(file, &info)
}
