//! Who uses a device, for messages and for what is refused while somebody does.
//!
//! Reads what the kernel shows of mounts, swap, holders and open files; changes nothing.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::frontend::Device;

/// Who uses a device: "mounted on DIR", "open in PROGRAM (process N)" and the like.
pub fn user_of(device: &Device) -> Option<String> {
    let node = device.node();
    if device.is_open() {
        return Some("open".to_owned());
    }
    let number = device.device_number().ok()?;
    mounted_on(number)
        .map(|directory| format!("mounted on {directory}"))
        .or_else(|| is_swap(&node).then(|| "used as swap".to_owned()))
        .or_else(|| holder(&node).map(|holder| format!("used by {holder}")))
        .or_else(|| open_in(&node))
        .or_else(|| is_claimed(&node).then(|| "claimed by another program".to_owned()))
}

/// Where the block device with this number is mounted, in the first process's namespace.
fn mounted_on(number: u64) -> Option<String> {
    let wanted = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let table = fs::read_to_string("/proc/1/mountinfo").ok()?;
    let directory = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(2) == Some(&wanted.as_str())).then(|| fields.get(4).map(|dir| (*dir).to_owned()))?
    };
    table.lines().find_map(directory)
}

fn is_swap(node: &Path) -> bool {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    table.lines().any(|line| line.split_whitespace().next().is_some_and(|file| Path::new(file) == node))
}

/// A block device on top of this one.
fn holder(node: &Path) -> Option<String> {
    let holders = Path::new("/sys/block").join(node.file_name()?).join("holders");
    let first = fs::read_dir(holders).ok()?.flatten().next()?;
    Some(format!("/dev/{}", first.file_name().to_string_lossy()))
}

/// A process that has it open. Links are read and not followed: what they lead to might not answer.
fn open_in(node: &Path) -> Option<String> {
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let files = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let open = |file: fs::DirEntry| fs::read_link(file.path()).is_ok_and(|path| path == node);
        if pid != own && files.into_iter().any(open) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("open in {} (process {pid})", program.trim()));
        }
    }
    None
}

/// Somebody has it for himself. (What has it open only shared is not seen by this.)
fn is_claimed(node: &Path) -> bool {
    let opened = fs::File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
