//! Who uses a device, for messages and for what is refused while somebody does.
//!
//! Reads what the kernel shows of mounts, swap, holders and open files; changes nothing.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::frontend::Device;
use crate::image::printable;
use crate::sys::processes::{self, Process};
use crate::sys::usage::Disks;

/// Who uses a device: "mounted on DIR", "open in pid 123 (PROGRAM)" and the like.
pub fn user_of(device: &Device) -> Option<String> {
    let (node, number) = (device.node(), device.device_number().ok());
    // A file tells by itself whether somebody has it open.
    if number.is_none() && !device.is_open() {
        return None;
    }
    let disks = Disks::of(&node);
    let mount = || {
        disks
            .mounts()
            .first()
            .map(|directory| format!("mounted on {}", printable(&directory.display().to_string())))
    };
    let swap = || disks.swaps().first().map(|_| "used as swap".to_owned());
    mount()
        .or_else(swap)
        .or_else(|| holder(&node).map(|holder| format!("used by {holder}")))
        .or_else(|| program_with(&node, number).map(|program| format!("open in {program}")))
        .or_else(|| device.is_open().then(|| "open".to_owned()))
        .or_else(|| is_claimed(&node).then(|| "claimed by another program".to_owned()))
}

/// A block device on top of this one.
fn holder(node: &Path) -> Option<String> {
    let disk = Path::new("/sys/block").join(node.file_name()?);
    let upon = fs::read_dir(disk.join("holders")).ok().and_then(|all| all.flatten().next());
    let name = upon.map(|upon| upon.file_name()).or_else(|| Disks::backed_by(|file| file == node).first())?;
    Some(format!("/dev/{}", name.to_string_lossy()))
}

/// A process that has it open.
fn program_with(node: &Path, number: Option<u64>) -> Option<Process> {
    let open = processes::open_devices(|name| name == node);
    open.iter().find(|open| open.rdev == number).and_then(|open| Process::of(open.pid))
}

/// Somebody has it for himself. (What has it open only shared is not seen by this.)
fn is_claimed(node: &Path) -> bool {
    let opened = fs::File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
