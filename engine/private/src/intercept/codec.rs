// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `struct loop_info`, `loop_info64` and `loop_config` of linux/loop.h: bytes to values and back.
//!
//! Knows their layouts for 64-bit and 32-bit callers. Does not know where the bytes come from, nor
//! which values are valid ([`crate::loops`] checks them).

use super::filter::Abi;
use crate::image::partitions::PartitionRange;
use crate::loops::{Answer, Errno, LoopInfo, LoopStatus, NAME_BYTES, PartitionChange};

/// Bytes of `struct loop_info64`: the same for all callers.
pub const INFO64_BYTES: usize = 232;
/// Bytes of `struct loop_config`: the same for all callers. Its reserved end is not checked, as in
/// the kernel.
pub const CONFIG_BYTES: usize = 304;
/// Bytes of the largest `struct loop_info`.
pub const INFO_BYTES_MAX: usize = 168;

// Offsets in `struct loop_info64`. Two unused fields (lo_crypt_name, lo_init) and the key follow
// the name.
const DEVICE: usize = 0;
const INODE: usize = 8;
const RDEVICE: usize = 16;
const OFFSET: usize = 24;
const SIZE_LIMIT: usize = 32;
const NUMBER: usize = 40;
const ENCRYPT_TYPE: usize = 44;
const ENCRYPT_KEY_SIZE: usize = 48;
const FLAGS: usize = 52;
const NAME: usize = 56;

/// Offsets in `struct loop_info`, which differs between ABIs.
#[derive(Debug)]
pub struct Layout {
    /// Size of the struct.
    pub bytes: usize,
    device: usize,
    /// Bytes of `lo_device` and `lo_rdevice`.
    device_bytes: usize,
    inode: usize,
    inode_bytes: usize,
    rdevice: usize,
    /// `lo_offset`, then `lo_encrypt_type`, `lo_encrypt_key_size` and `lo_flags`, four bytes each,
    /// then the name.
    offset: usize,
}

const X86_64: Layout =
    Layout { bytes: 168, device: 8, device_bytes: 8, inode: 16, inode_bytes: 8, rdevice: 24, offset: 32 };
const I386: Layout =
    Layout { bytes: 140, device: 4, device_bytes: 2, inode: 8, inode_bytes: 4, rdevice: 12, offset: 16 };
const AARCH64: Layout =
    Layout { bytes: 160, device: 4, device_bytes: 4, inode: 8, inode_bytes: 8, rdevice: 16, offset: 20 };

impl Layout {
    /// The layout for callers of this ABI.
    pub fn of(abi: Abi) -> &'static Layout {
        match abi {
            Abi::X86_64 => &X86_64,
            Abi::I386 | Abi::Arm => &I386,
            Abi::Aarch64 => &AARCH64,
        }
    }
}

/// Bytes of `struct blkpg_ioctl_arg`.
pub const BLKPG_BYTES_MAX: usize = 24;
/// Bytes of the beginning of `struct blkpg_partition` that are read.
pub const BLKPG_PARTITION_BYTES: usize = 20;

/// Bytes of a `struct blkpg_ioctl_arg` of this ABI.
pub fn blkpg_bytes(abi: Abi) -> usize {
    if abi.is_compat() { 16 } else { BLKPG_BYTES_MAX }
}

/// Decodes a `struct blkpg_ioctl_arg`: the operation, and the address of the partition.
pub fn blkpg(bytes: &[u8; BLKPG_BYTES_MAX], abi: Abi) -> (u32, u64) {
    let address = match abi.is_compat() {
        true => u32::from_le_bytes(field(bytes, 12)).into(),
        false => u64::from_le_bytes(field(bytes, 16)),
    };
    (u32::from_le_bytes(field(bytes, 0)), address)
}

/// Decodes a `struct blkpg_partition`, with the kernel's checks. It is the same for all callers.
pub fn blkpg_partition(operation: u32, bytes: &[u8; BLKPG_PARTITION_BYTES]) -> Answer<PartitionChange> {
    let number = i32::from_le_bytes(field(bytes, 16));
    let number = u32::try_from(number).ok().filter(|&number| number > 0).ok_or(Errno::INVAL)?;
    if operation == BLKPG_DEL_PARTITION {
        return Ok(PartitionChange::Delete(number));
    }
    let value = |at| u64::try_from(i64::from_le_bytes(field(bytes, at))).map_err(|_| Errno::INVAL);
    let part = PartitionRange { number, start: value(0)?, size: value(8)? };
    match operation {
        _ if part.start.checked_add(part.size).is_none_or(|end| end > i64::MAX as u64) => Err(Errno::INVAL),
        BLKPG_ADD_PARTITION => Ok(PartitionChange::Add(part)),
        BLKPG_RESIZE_PARTITION => Ok(PartitionChange::Resize(part)),
        _ => Err(Errno::INVAL),
    }
}

// linux/blkpg.h.
const BLKPG_ADD_PARTITION: u32 = 1;
const BLKPG_DEL_PARTITION: u32 = 2;
const BLKPG_RESIZE_PARTITION: u32 = 3;

/// Decodes a `struct loop_info64`.
pub fn info64(bytes: &[u8; INFO64_BYTES]) -> LoopInfo {
    LoopInfo {
        offset: u64::from_le_bytes(field(bytes, OFFSET)),
        size_limit: u64::from_le_bytes(field(bytes, SIZE_LIMIT)),
        flags: u32::from_le_bytes(field(bytes, FLAGS)),
        file_name: field(bytes, NAME),
        encrypt_type: u32::from_le_bytes(field(bytes, ENCRYPT_TYPE)),
        encrypt_key_size: u32::from_le_bytes(field(bytes, ENCRYPT_KEY_SIZE)),
    }
}

/// Encodes a `struct loop_info64`.
pub fn status64(status: &LoopStatus) -> [u8; INFO64_BYTES] {
    let mut bytes = [0; INFO64_BYTES];
    let info = &status.info;
    for (at, value) in [
        (DEVICE, status.device),
        (INODE, status.inode),
        (RDEVICE, status.rdevice),
        (OFFSET, info.offset),
        (SIZE_LIMIT, info.size_limit),
    ] {
        put(&mut bytes, at, &value.to_le_bytes());
    }
    for (at, value) in [
        (NUMBER, status.number),
        (ENCRYPT_TYPE, info.encrypt_type),
        (ENCRYPT_KEY_SIZE, info.encrypt_key_size),
        (FLAGS, info.flags),
    ] {
        put(&mut bytes, at, &value.to_le_bytes());
    }
    put(&mut bytes, NAME, &info.file_name);
    bytes
}

/// Decodes a `struct loop_config`: descriptor, block size, and `loop_info64`.
pub fn config(bytes: &[u8; CONFIG_BYTES]) -> (u32, u32, LoopInfo) {
    let info = info64(&field(bytes, 8));
    (u32::from_le_bytes(field(bytes, 0)), u32::from_le_bytes(field(bytes, 4)), info)
}

/// Decodes a `struct loop_info` of `layout.bytes` bytes. As in the kernel, a negative offset
/// becomes a huge one, and encryption is ignored.
pub fn info(bytes: &[u8; INFO_BYTES_MAX], layout: &Layout) -> LoopInfo {
    let int = |at| u32::from_le_bytes(field(bytes, layout.offset + at));
    LoopInfo {
        offset: i64::from(int(0).cast_signed()).cast_unsigned(),
        size_limit: 0,
        flags: int(12),
        file_name: field(bytes, layout.offset + 16),
        encrypt_type: 0,
        encrypt_key_size: 0,
    }
}

/// Encodes a `struct loop_info` of `layout.bytes` bytes. EOVERFLOW if a value does not fit. It has
/// no size limit.
pub fn status(status: &LoopStatus, layout: &Layout) -> Answer<[u8; INFO_BYTES_MAX]> {
    let mut bytes = [0; INFO_BYTES_MAX];
    for (at, value, len) in [
        (layout.device, status.device, layout.device_bytes),
        (layout.inode, status.inode, layout.inode_bytes),
        (layout.rdevice, status.rdevice, layout.device_bytes),
    ] {
        let value = value.to_le_bytes();
        if value[len..].iter().any(|&byte| byte != 0) {
            return Err(Errno::OVERFLOW);
        }
        put(&mut bytes, at, &value[..len]);
    }
    let offset = i32::try_from(status.info.offset).map_err(|_| Errno::OVERFLOW)?;
    put(&mut bytes, 0, &status.number.to_le_bytes());
    put(&mut bytes, layout.offset, &offset.to_le_bytes());
    put(&mut bytes, layout.offset + 4, &status.info.encrypt_type.to_le_bytes());
    put(&mut bytes, layout.offset + 8, &status.info.encrypt_key_size.to_le_bytes());
    put(&mut bytes, layout.offset + 12, &status.info.flags.to_le_bytes());
    put(&mut bytes, layout.offset + 16, &status.info.file_name);
    Ok(bytes)
}

/// N bytes at `at`; zeroes beyond the end, which no layout reaches.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Writes `value` at `at`; nothing beyond the end, which no layout reaches.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

const _: () = assert!(I386.offset + 16 + NAME_BYTES + 32 + 8 + 4 == I386.bytes);
const _: () = assert!(X86_64.offset + 16 + NAME_BYTES + 32 + 16 + 8 == X86_64.bytes);
const _: () = assert!(NAME + NAME_BYTES + 64 + 32 + 16 == INFO64_BYTES);
const _: () = assert!(8 + INFO64_BYTES + 64 == CONFIG_BYTES);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decodes_requests_of_blkpg() {
        let mut bytes = [0; BLKPG_BYTES_MAX];
        bytes[0] = 3;
        bytes[12] = 0x40;
        bytes[16] = 0x80;
        assert_eq!(blkpg(&bytes, Abi::X86_64), (3, 0x80));
        assert_eq!(blkpg(&bytes, Abi::I386), (3, 0x40));
        assert_eq!((blkpg_bytes(Abi::Aarch64), blkpg_bytes(Abi::Arm)), (24, 16));
        let partition = |number: i32, start: i64, size: i64| {
            let bytes = [&start.to_le_bytes()[..], &size.to_le_bytes(), &number.to_le_bytes()].concat();
            <[u8; BLKPG_PARTITION_BYTES]>::try_from(bytes).unwrap()
        };
        let part = PartitionRange { number: 2, start: 4096, size: 512 };
        assert_eq!(blkpg_partition(1, &partition(2, 4096, 512)), Ok(PartitionChange::Add(part)));
        assert_eq!(blkpg_partition(3, &partition(2, 4096, 512)), Ok(PartitionChange::Resize(part)));
        assert_eq!(blkpg_partition(2, &partition(2, -1, -1)), Ok(PartitionChange::Delete(2)));
        for (operation, bad) in [
            (1, partition(0, 0, 512)),
            (2, partition(-1, 0, 512)),
            (1, partition(1, -512, 512)),
            (3, partition(1, 0, -512)),
            (1, partition(1, i64::MAX - 511, 512)),
            (4, partition(1, 0, 512)),
        ] {
            assert_eq!(blkpg_partition(operation, &bad), Err(Errno::INVAL), "{operation} {bad:?}");
        }
    }

    const ABIS: [Abi; 4] = [Abi::X86_64, Abi::I386, Abi::Aarch64, Abi::Arm];

    prop_compose! {
        fn any_info()(
            offset: u64, size_limit: u64, flags: u32, name: [[u8; 32]; 2], encrypt_type: u32,
            encrypt_key_size: u32,
        ) -> LoopInfo {
            let file_name = name.as_flattened().try_into().unwrap();
            LoopInfo { offset, size_limit, flags, file_name, encrypt_type, encrypt_key_size }
        }
    }

    prop_compose! {
        fn any_status()(
            number: u32, device in small(), inode in small(), rdevice in small(), info in any_info(),
            offset in small(),
        ) -> LoopStatus {
            LoopStatus { number, device, inode, rdevice, info: LoopInfo { offset, ..info } }
        }
    }

    /// Small and large values alike.
    fn small() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..64_u32).prop_map(|(value, shift)| value >> shift)
    }

    proptest! {
        #[test]
        fn decodes_what_it_encodes(status in any_status()) {
            let bytes = status64(&status);
            prop_assert_eq!(info64(&bytes), status.info);
            let mut whole = [0; CONFIG_BYTES];
            whole[..8].copy_from_slice(&[7, 0, 0, 0, 0, 16, 0, 0]);
            whole[8..240].copy_from_slice(&bytes);
            prop_assert_eq!(config(&whole), (7, 4096, status.info));
        }

        #[test]
        fn encodes_the_old_struct_or_refuses(expected in any_status()) {
            for abi in ABIS {
                let layout = Layout::of(abi);
                let fits_in = |value: u64, bytes: usize| bytes == 8 || value >> (8 * bytes) == 0;
                let fits = fits_in(expected.device, layout.device_bytes)
                    && fits_in(expected.rdevice, layout.device_bytes)
                    && fits_in(expected.inode, layout.inode_bytes)
                    && expected.info.offset < 1 << 31;
                match status(&expected, layout) {
                    Ok(bytes) => {
                        prop_assert!(fits);
                        let plain = LoopInfo { encrypt_type: 0, encrypt_key_size: 0, ..expected.info };
                        prop_assert_eq!(info(&bytes, layout), LoopInfo { size_limit: 0, ..plain });
                        prop_assert!(bytes[layout.bytes..].iter().all(|&byte| byte == 0));
                        prop_assert_eq!(u32::from_le_bytes(field(&bytes, 0)), expected.number);
                    }
                    Err(errno) => prop_assert_eq!((fits, errno), (false, Errno::OVERFLOW)),
                }
            }
        }

        #[test]
        fn decodes_any_bytes(bytes in proptest::collection::vec(any::<u8>(), CONFIG_BYTES)) {
            let (fd, _, expected) = config(&field(&bytes, 0));
            prop_assert_eq!(fd.to_le_bytes(), field::<4>(&bytes, 0));
            prop_assert_eq!(expected.offset.to_le_bytes(), field::<8>(&bytes, 32));
            for abi in ABIS {
                let expected = info(&field(&bytes, 0), Layout::of(abi));
                prop_assert!(expected.offset < 1 << 31 || expected.offset >= u64::MAX << 31);
            }
        }
    }

    /// Offsets of the C compiler for linux/loop.h.
    #[test]
    fn has_the_offsets_of_the_headers() {
        let name = std::array::from_fn(|at| at as u8 + 1);
        let info =
            LoopInfo { offset: 0x1122, size_limit: 512, flags: 5, file_name: name, ..LoopInfo::default() };
        let expected = LoopStatus { number: 3, device: 0x801, inode: 77, rdevice: 0x702, info };
        let old = super::status(&expected, &X86_64).unwrap();
        assert_eq!((old[0], &old[8..10], old[16], &old[24..26]), (3, &[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&old[32..34], old[44], &old[48..112]), (&[0x22, 0x11][..], 5, &name[..]));
        let old = super::status(&expected, &I386).unwrap();
        assert_eq!((old[0], &old[4..6], old[8], &old[12..14]), (3, &[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&old[16..18], old[28], &old[32..96]), (&[0x22, 0x11][..], 5, &name[..]));
        let new = status64(&expected);
        assert_eq!((&new[..2], new[8], &new[16..18]), (&[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&new[24..26], &new[32..34], new[40]), (&[0x22, 0x11][..], &[0, 2][..], 3));
        assert_eq!((new[52], &new[56..120]), (5, &name[..]));
    }
}
