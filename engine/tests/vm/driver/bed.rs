// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything that steps need: devices, files, calls by either ABI, and the printed lines.
//!
//! Knows /dev/loop-control, /dev/loopN and /sys/block, but not which driver serves them. Every line
//! is `theme: step: value`, and must be the same in every run.

use std::cell::Cell;
use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::abi::{self, Info};
use super::raw::{self, Done, Memory};

// linux/fs.h, as programs of 64 bits have them.
const BLKROGET: u64 = 0x125e;
const BLKSSZGET: u64 = 0x1268;
const BLKGETSIZE64: u64 = 0x8008_1272;

/// Deadline for an expected change.
const SOON: Duration = Duration::from_secs(30);

/// A running client.
pub(crate) struct Bed {
    /// Calls are those of a program of 32 bits.
    pub(crate) compat: bool,
    dir: PathBuf,
    memory: Memory,
    theme: Cell<&'static str>,
}

/// A loop device and a descriptor of it.
pub(crate) struct Device {
    pub(crate) number: i64,
    pub(crate) fd: OwnedFd,
}

impl Bed {
    /// In the working directory.
    pub(crate) fn new(compat: bool) -> Bed {
        let dir = std::env::current_dir().expect("a working directory");
        Bed { compat, dir, memory: Memory::new(true), theme: Cell::new("") }
    }

    /// Sets the theme of the next lines.
    pub(crate) fn theme(&self, theme: &'static str) {
        self.theme.set(theme);
    }

    /// Prints one line.
    pub(crate) fn say(&self, step: impl Display, value: impl Display) {
        println!("{}: {step}: {value}", self.theme.get());
    }

    /// Prints the result of a call.
    pub(crate) fn step(&self, step: impl Display, done: Done) {
        self.say(step, named(done));
    }

    /// ioctl(2) with a number or an address of the caller's choice.
    pub(crate) fn ioctl(&self, fd: impl AsFd, command: u64, argument: u64) -> Done {
        self.ioctl_of(fd.as_fd().as_raw_fd(), command, argument)
    }

    /// The same, with a descriptor that may be invalid.
    pub(crate) fn ioctl_of(&self, fd: RawFd, command: u64, argument: u64) -> Done {
        match self.compat {
            true => raw::ioctl32(fd, command as u32, argument as u32),
            false => raw::ioctl(fd, command, argument),
        }
    }

    /// ioctl(2) with the address of these bytes.
    pub(crate) fn with(&self, fd: impl AsFd, command: u64, bytes: &[u8]) -> Done {
        self.memory.put(bytes);
        self.ioctl(fd, command, self.memory.address())
    }

    /// BLKPG.
    pub(crate) fn blkpg(&self, fd: impl AsFd, operation: i32, number: i32, start: u64, length: u64) -> Done {
        let address = self.memory.address();
        self.with(fd, abi::BLKPG, &abi::blkpg(address, self.compat, operation, number, start, length))
    }

    /// The argument after a call of `with`.
    pub(crate) fn argument(&self, len: usize) -> Vec<u8> {
        self.memory.get(len)
    }

    /// An operation on loop-control.
    pub(crate) fn control(&self, command: u64, argument: u64) -> Done {
        self.ioctl(open("/dev/loop-control", OFlags::RDWR), command, argument)
    }

    /// LOOP_CONFIGURE with a descriptor that may be invalid.
    pub(crate) fn configure_of(&self, device: &Device, fd: RawFd, block_size: u32, info: &Info) -> Done {
        self.with(device, abi::CONFIGURE, &abi::config(fd, block_size, info))
    }

    /// LOOP_CONFIGURE.
    pub(crate) fn configure(&self, device: &Device, file: impl AsFd, block_size: u32, info: &Info) -> Done {
        self.configure_of(device, file.as_fd().as_raw_fd(), block_size, info)
    }

    /// LOOP_SET_STATUS64.
    pub(crate) fn set_status(&self, device: &Device, info: &Info) -> Done {
        self.with(device, abi::SET_STATUS64, &info.bytes())
    }

    /// Flags of LOOP_GET_STATUS64.
    pub(crate) fn flags(&self, device: &Device) -> Done {
        self.with(device, abi::GET_STATUS64, &[0xee; abi::INFO64])?;
        let bytes = self.argument(abi::INFO64);
        Ok(i64::from(u32::from_ne_bytes([bytes[52], bytes[53], bytes[54], bytes[55]])))
    }

    /// A file with `text` at its beginning and at its offset 512 (as far as it is long enough).
    pub(crate) fn file(&self, name: &str, size: u64) -> File {
        let path = self.dir.join(name);
        let file = File::options().create(true).truncate(true).read(true).write(true).open(path);
        let mut file = file.expect("a new file");
        let mut bytes = vec![b'.'; 1024];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
        file.write_all(&bytes).expect("bytes of a new file");
        file.set_len(size).expect("size of a new file");
        file
    }

    /// The lowest free device, opened for reading and writing.
    pub(crate) fn device(&self) -> Device {
        self.device_as(OFlags::RDWR)
    }

    /// The same, with other flags of open(2).
    pub(crate) fn device_as(&self, flags: OFlags) -> Device {
        let number = self.control(abi::CTL_GET_FREE, 0).expect("a free device");
        Device { number, fd: open(&format!("/dev/loop{number}"), flags) }
    }

    /// The device with this number, which must be free.
    pub(crate) fn device_at(&self, number: u64) -> Device {
        // It may exist already.
        let _ = self.control(abi::CTL_ADD, number);
        Device { number: number as i64, fd: open(&format!("/dev/loop{number}"), OFlags::RDWR) }
    }

    /// A device that is bound to this file.
    pub(crate) fn bound(&self, file: impl AsFd, info: &Info) -> Device {
        let device = self.device();
        self.configure(&device, file, 0, info).expect("a device is bound");
        device
    }

    /// Unbinds a device, if it is bound, closes it, and waits until nothing is left of its file.
    pub(crate) fn finish(&self, device: Device) {
        // It may be unbound already.
        let _ = self.ioctl(&device, abi::CLR_FD, 0);
        let number = device.number;
        let empty = self.sysfs(number, "size") == "0";
        drop(device);
        self.wait_until_unbound(number);
        // A size of 0 does not show whether the device is unbound.
        let free = || self.control(abi::CTL_GET_FREE, 0).is_ok_and(|free| free <= number);
        assert!(!empty || soon(free), "loop{number} is not free again");
    }

    /// Waits until a device has no size.
    pub(crate) fn wait_until_unbound(&self, number: i64) {
        let unbound = || !self.has_attribute(number, "loop") && self.sysfs(number, "size") == "0";
        assert!(soon(unbound), "loop{number} is still bound: {}", self.attributes(number));
    }

    /// An attribute of a device.
    pub(crate) fn sysfs(&self, number: i64, name: &str) -> String {
        let path = format!("/sys/block/loop{number}/{name}");
        match std::fs::read_to_string(path) {
            Ok(text) => text.trim_end().replace(&format!("{}/", self.dir.display()), ""),
            Err(error) => named(Err(error.raw_os_error().unwrap_or(0))),
        }
    }

    /// Whether a device has this attribute.
    pub(crate) fn has_attribute(&self, number: i64, name: &str) -> bool {
        Path::new(&format!("/sys/block/loop{number}/{name}")).exists()
    }

    /// The attributes in /sys/block/loopN/loop, and some in /sys/block/loopN.
    pub(crate) fn attributes(&self, number: i64) -> String {
        let names = ["offset", "sizelimit", "autoclear", "partscan", "dio", "backing_file"];
        let own = names.map(|name| format!("{name} {}", self.sysfs(number, &format!("loop/{name}"))));
        let [size, ro, block] =
            ["size", "ro", "queue/logical_block_size"].map(|name| self.sysfs(number, name));
        format!("size {size}, ro {ro}, block {block}, loop {}", own.join(", "))
    }

    /// Size, sizes of blocks and whether it is read-only, by the ioctls of block devices.
    pub(crate) fn shape(&self, device: &Device) -> String {
        let ask = |command, len| {
            self.memory.put(&[0; 8]);
            let done = raw::ioctl(device.fd.as_raw_fd(), command, self.memory.address());
            let value = self.argument(len).iter().rev().fold(0, |sum, &byte| sum << 8 | i64::from(byte));
            named(done.map(|_| value))
        };
        let end = rustix::fs::seek(&device.fd, rustix::fs::SeekFrom::End(0));
        let end = named(end.map(|end| end as i64).map_err(|error| error.raw_os_error()));
        let [size, block, read_only] = [ask(BLKGETSIZE64, 8), ask(BLKSSZGET, 4), ask(BLKROGET, 4)];
        format!("{size} bytes, end at {end}, blocks of {block}, read-only {read_only}")
    }

    /// Prints size, status and sysfs attributes of a device.
    pub(crate) fn show(&self, step: impl Display, device: &Device, file: Option<&File>) {
        self.say(format!("{step}, size"), self.shape(device));
        let stat = file.map(|file| rustix::fs::fstat(file).expect("stat of a file"));
        let done = self.with(device, abi::GET_STATUS64, &[0xee; abi::INFO64]);
        let status = done.map(|_| abi::info_text(&self.argument(abi::INFO64), stat.as_ref()));
        self.say(format!("{step}, status"), status.unwrap_or_else(|errno| named(Err(errno))));
        self.say(format!("{step}, sysfs"), self.attributes(device.number));
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens a file that must exist.
pub(crate) fn open(path: &str, flags: OFlags) -> OwnedFd {
    try_open(path, flags).unwrap_or_else(|errno| panic!("{path}: {}", named(Err(errno))))
}

/// Opens a file that may not exist.
pub(crate) fn try_open(path: &str, flags: OFlags) -> Result<OwnedFd, i32> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|error| error.raw_os_error())
}

/// Whether the condition becomes true before the deadline.
pub(crate) fn soon(condition: impl Fn() -> bool) -> bool {
    let end = Instant::now() + SOON;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A result as text.
pub(crate) fn named(done: Done) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EINTR, "EINTR"),
        (libc::EIO, "EIO"),
        (libc::ENXIO, "ENXIO"),
        (libc::EBADF, "EBADF"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::ENODEV, "ENODEV"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::EOVERFLOW, "EOVERFLOW"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::ESTALE, "ESTALE"),
    ];
    match done {
        Ok(value) => value.to_string(),
        Err(errno) => match names.iter().find(|(number, _)| *number == errno) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("errno {errno}"),
        },
    }
}
