// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend on the kernel's own loop driver: devices of this program with numbers of their own.
//!
//! The driver does all I/O: there are no queues, and devices live on without a daemon. Their
//! numbers lie in the upper half of those that the driver has, or from a configured one on, so that
//! `losetup -f` of the host never meets them. `device` knows one device of an instance, `private` one
//! of a private pool.

mod device;
mod private;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

pub use device::{KernelLoop, cookie, is_held};
pub use private::PrivateLoop;

use crate::error::{Error, Kind, Result};
use crate::frontend::BackendKind;
use crate::frontend::disk_list::DiskList;
use crate::parallel;
use crate::sys::loop_device;

/// The driver's control node.
pub const CONTROL_NODE: &str = "/dev/loop-control";

/// Devices removed at a time. The driver takes some 40 ms for each, in which it waits for others.
pub const REMOVED_AT_A_TIME: usize = 64;

/// Checks that this machine has the driver.
pub fn check() -> Result<()> {
    if Path::new(CONTROL_NODE).exists() {
        return Ok(());
    }
    Err(Error::new(Kind::Unavailable, format!("the kernel's loop driver is missing: no {CONTROL_NODE}"))
        .hint("run 'modprobe loop'; a container needs the device passed in"))
}

/// Whether a node of /dev can be a device of this backend.
pub fn is_node(path: &Path) -> bool {
    let number = path.to_str().and_then(|path| path.strip_prefix("/dev/loop")?.parse::<u32>().ok());
    number.is_some_and(numbered_as_ours())
}

/// Tells whether a device with this number can be of this program: by its number, or as one of a
/// daemon with another configuration.
pub fn numbered_as_ours() -> impl Fn(u32) -> bool {
    let (first, _) = numbers();
    move |number| number >= first || DiskList::of_machine().contains(&format!("loop{number}"))
}

/// Numbers of all loop devices that can be of this program.
pub fn present_devices() -> Vec<u32> {
    let ours = numbered_as_ours();
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok());
    numbers.filter(|number| ours(*number)).collect()
}

/// The configured first number; 0: none is configured.
static FIRST: AtomicU32 = AtomicU32::new(0);

/// From now on, new devices have numbers from this one on.
pub fn set_first_number(first: u32) -> Result<()> {
    let (_, end) = numbers();
    if !(1..end).contains(&first) {
        let context = format!("a loop device of this kernel cannot have the number {first}");
        return Err(Error::new(Kind::Invalid, context).hint(format!("give 1 to {}", end - 1)));
    }
    FIRST.store(first, Relaxed);
    Ok(())
}

/// The first number of this program's devices, and the end of the driver's numbers: a minor number
/// has 20 bits, of which partitions take some if the module was loaded with `max_part`.
fn numbers() -> (u32, u32) {
    let max_part = fs::read_to_string("/sys/module/loop/parameters/max_part");
    let max_part: u32 = max_part.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let end = 1 << (20 - (u32::BITS - max_part.leading_zeros()).min(19));
    match FIRST.load(Relaxed) {
        0 => (end / 2, end),
        first => (first, end),
    }
}

/// Numbers that this process uses. One that is unbound for a moment is nobody else's.
static TAKEN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn taken() -> MutexGuard<'static, BTreeSet<u32>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a device that is not bound, with the lowest free number of ours.
fn add() -> Result<u32> {
    let cannot = |error: Errno| Error::os(error, "the kernel's loop driver adds no device");
    let control = control()?;
    let (first, end) = numbers();
    for number in first..end {
        // Held by nobody across a call of the driver.
        if !taken().insert(number) {
            continue;
        }
        match add_number(&control, number) {
            Ok(()) => return Ok(number),
            Err(error) => {
                taken().remove(&number);
                if error != Errno::EXIST {
                    return Err(cannot(error));
                }
            }
        }
    }
    Err(cannot(Errno::NOSPC))
}

/// Adds the device with this number. EEXIST: there is one.
fn add_number(control: &File, number: u32) -> rustix::io::Result<()> {
    let disk = format!("/sys/block/loop{number}");
    // One that is listed and not bound is another daemon's, which binds it again.
    let listed = DiskList::of_machine().contains(&format!("loop{number}"));
    if listed || Path::new(&disk).join("loop/backing_file").exists() {
        return Err(Errno::EXIST);
    }
    if Path::new(&disk).exists() {
        // A forced detach left it, and its last user has closed it. A new one has new statistics.
        let _ = loop_device::remove(control, number);
    }
    loop_device::add(control, number)
}

/// Removes the devices of a previous daemon that are not bound: it ended before it could remove
/// them, or their last users have closed them since. Returns their number.
pub fn remove_unbound(is_ours: impl Fn(u64) -> bool) -> usize {
    let is_unbound = |(disk, owner_cookie): &(String, u64)| {
        let sysfs = Path::new("/sys/block").join(disk);
        is_ours(*owner_cookie) && sysfs.exists() && !sysfs.join("loop/backing_file").exists()
    };
    let mut listed = DiskList::of_machine().entries();
    listed.retain(is_unbound);
    let removed = AtomicUsize::new(0);
    parallel::for_each("remove", REMOVED_AT_A_TIME, &listed, |(disk, owner_cookie)| {
        let Some((BackendKind::Loop, number)) = BackendKind::of_disk(disk) else { return };
        // The driver refuses to remove one that was bound or opened since.
        if remove(number).is_ok() {
            DiskList::of_machine().remove(disk, *owner_cookie);
            removed.fetch_add(1, Relaxed);
        }
    });
    removed.into_inner()
}

/// Removes a device that is not bound; one that is open stays.
fn remove(number: u32) -> rustix::io::Result<()> {
    let removed = match control() {
        Ok(control) => loop_device::remove(control, number),
        Err(_) => Err(Errno::NODEV),
    };
    taken().remove(&number);
    removed
}

fn control() -> Result<File> {
    let options = File::options().read(true).write(true).open(CONTROL_NODE);
    options.map_err(|error| Error::os(error, format!("cannot open {CONTROL_NODE}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_the_host_are_no_devices() {
        let (first, _) = numbers();
        assert!(is_node(Path::new(&format!("/dev/loop{first}"))));
        for path in ["/dev/loop0", "/dev/loop-control", "/dev/loopengine/default/loop0", "loop524288"] {
            assert!(!is_node(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn numbers_fit_minor_numbers() {
        let (first, end) = numbers();
        assert!(first >= 1 && first < end && end <= 1 << 20, "{first} {end}");
    }
}
