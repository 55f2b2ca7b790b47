// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and structures of linux/loop.h, as bytes, and the texts that clients print of them.
//!
//! Written independently of the engine, to detect errors in its definitions.

pub(crate) const SET_FD: u64 = 0x4c00;
pub(crate) const CLR_FD: u64 = 0x4c01;
pub(crate) const SET_STATUS: u64 = 0x4c02;
pub(crate) const GET_STATUS: u64 = 0x4c03;
pub(crate) const SET_STATUS64: u64 = 0x4c04;
pub(crate) const GET_STATUS64: u64 = 0x4c05;
pub(crate) const CHANGE_FD: u64 = 0x4c06;
pub(crate) const SET_CAPACITY: u64 = 0x4c07;
pub(crate) const SET_DIRECT_IO: u64 = 0x4c08;
pub(crate) const SET_BLOCK_SIZE: u64 = 0x4c09;
pub(crate) const CONFIGURE: u64 = 0x4c0a;
pub(crate) const CTL_ADD: u64 = 0x4c80;
pub(crate) const CTL_REMOVE: u64 = 0x4c81;
pub(crate) const CTL_GET_FREE: u64 = 0x4c82;

// linux/fs.h and linux/blkpg.h.
pub(crate) const BLKRRPART: u64 = 0x125f;
pub(crate) const BLKPG: u64 = 0x1269;
pub(crate) const BLKPG_ADD: i32 = 1;
pub(crate) const BLKPG_DEL: i32 = 2;
pub(crate) const BLKPG_RESIZE: i32 = 3;
/// Bytes of `struct blkpg_partition`.
const BLKPG_PARTITION: usize = 152;

/// A `struct blkpg_ioctl_arg` at this address, and its `struct blkpg_partition` 64 bytes later.
pub(crate) fn blkpg(
    address: u64,
    compat: bool,
    operation: i32,
    number: i32,
    start: u64,
    length: u64,
) -> Vec<u8> {
    let mut bytes = vec![0; 64 + BLKPG_PARTITION];
    put(&mut bytes, 0, &operation.to_ne_bytes());
    put(&mut bytes, 8, &(BLKPG_PARTITION as u32).to_ne_bytes());
    match compat {
        true => put(&mut bytes, 12, &((address + 64) as u32).to_ne_bytes()),
        false => put(&mut bytes, 16, &(address + 64).to_ne_bytes()),
    }
    put(&mut bytes, 64, &start.to_ne_bytes());
    put(&mut bytes, 72, &length.to_ne_bytes());
    put(&mut bytes, 80, &number.to_ne_bytes());
    bytes
}

pub(crate) const READ_ONLY: u32 = 1;
pub(crate) const AUTOCLEAR: u32 = 4;
pub(crate) const PARTSCAN: u32 = 8;
pub(crate) const DIRECT_IO: u32 = 16;

/// Bytes of `struct loop_info64`.
pub(crate) const INFO64: usize = 232;

/// The fields of `struct loop_info64` that clients set.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Info {
    pub(crate) offset: u64,
    pub(crate) limit: u64,
    pub(crate) encrypt_type: u32,
    pub(crate) key_size: u32,
    pub(crate) flags: u32,
    pub(crate) name: &'static str,
}

impl Info {
    /// `struct loop_info64`. Fields that the driver must ignore are not zero.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0xa5; INFO64];
        put(&mut bytes, 24, &self.offset.to_ne_bytes());
        put(&mut bytes, 32, &self.limit.to_ne_bytes());
        put(&mut bytes, 44, &self.encrypt_type.to_ne_bytes());
        put(&mut bytes, 48, &self.key_size.to_ne_bytes());
        put(&mut bytes, 52, &self.flags.to_ne_bytes());
        bytes[56..120].fill(0);
        put(&mut bytes, 56, self.name.as_bytes());
        bytes
    }

    /// `struct loop_info` of an ABI. `offset` is truncated to an int.
    pub(crate) fn old_bytes(&self, compat: bool) -> Vec<u8> {
        let (len, at) = if compat { (140, 16) } else { (168, 32) };
        let mut bytes = vec![0xa5; len];
        put(&mut bytes, at, &(self.offset as u32).to_ne_bytes());
        put(&mut bytes, at + 4, &self.encrypt_type.to_ne_bytes());
        put(&mut bytes, at + 8, &self.key_size.to_ne_bytes());
        put(&mut bytes, at + 12, &self.flags.to_ne_bytes());
        bytes[at + 16..at + 80].fill(0);
        put(&mut bytes, at + 16, self.name.as_bytes());
        bytes
    }
}

/// `struct loop_config`, with non-zero reserved fields.
pub(crate) fn config(fd: i32, block_size: u32, info: &Info) -> Vec<u8> {
    let mut bytes = vec![0x5a; 304];
    put(&mut bytes, 0, &fd.to_ne_bytes());
    put(&mut bytes, 4, &block_size.to_ne_bytes());
    put(&mut bytes, 8, &info.bytes());
    bytes
}

/// `struct loop_info64` as text. Numbers of devices and inodes are compared with `stat`, since they
/// differ in every run.
pub(crate) fn info_text(bytes: &[u8], stat: Option<&rustix::fs::Stat>) -> String {
    let (u64_at, u32_at) =
        (|at| u64::from_ne_bytes(field(bytes, at)), |at| u32::from_ne_bytes(field(bytes, at)));
    let same = |value: u64, wanted: Option<u64>| match wanted {
        Some(wanted) if value == wanted => "as stat".to_owned(),
        _ => value.to_string(),
    };
    format!(
        "device {}, inode {}, rdevice {}, offset {}, limit {}, number {}, encryption {} {}, flags {}, {}",
        same(u64_at(0), stat.map(|stat| stat.st_dev)),
        same(u64_at(8), stat.map(|stat| stat.st_ino)),
        same(u64_at(16), stat.map(|stat| stat.st_rdev)),
        u64_at(24),
        u64_at(32),
        u32_at(40),
        u32_at(44),
        u32_at(48),
        u32_at(52),
        name_text(bytes, 56, 120),
    )
}

/// `struct loop_info` as text.
pub(crate) fn old_info_text(bytes: &[u8], compat: bool, stat: &rustix::fs::Stat) -> String {
    let number = |at, len| bytes[at..at + len].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    let [device, inode, rdevice] = match compat {
        true => [number(4, 2), number(8, 4), number(12, 2)],
        false => [number(8, 8), number(16, 8), number(24, 8)],
    };
    let at = if compat { 16 } else { 32 };
    format!(
        "device {}, inode {}, rdevice {}, offset {}, number {}, encryption {} {}, flags {}, {}",
        device == stat.st_dev,
        inode == stat.st_ino,
        rdevice == stat.st_rdev,
        number(at, 4),
        number(0, 4),
        number(at + 4, 4),
        number(at + 8, 4),
        number(at + 12, 4),
        name_text(bytes, at + 16, at + 80),
    )
}

/// The name, and whether the bytes after it are zero.
fn name_text(bytes: &[u8], name: usize, after: usize) -> String {
    let name = &bytes[name..after];
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    let rest = &bytes[after..];
    let rest = if rest.iter().all(|&byte| byte == 0) { "zeroes" } else { "something" };
    format!("name '{}' of {end}, then {rest}", String::from_utf8_lossy(&name[..end]))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("structures are as long as their fields")
}
