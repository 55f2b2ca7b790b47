//! `struct loop_info`, `loop_info64` and `loop_config` of linux/loop.h: bytes to values and back.
//!
//! Knows their layouts for 64-bit and 32-bit callers. Does not know where the bytes come from, nor
//! what the values are good for ([`crate::loops`] refuses those that are not).

use super::filter::Abi;
use crate::loops::{Answer, Errno, Info, NAME_BYTES, Status};

/// Bytes of `struct loop_info64`: the same for all callers.
pub const INFO64_BYTES: usize = 232;
/// Bytes of `struct loop_config`: the same for all callers. Of its end nothing is looked at, as the
/// kernel does not.
pub const CONFIG_BYTES: usize = 304;
/// Bytes of the largest `struct loop_info`.
pub const INFO_BYTES_MAX: usize = 168;

// Where fields of `struct loop_info64` are. Behind the name come two that nobody uses (lo_crypt_name,
// lo_init) and the key, which stays unread.
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

/// A `struct loop_info`, which differs from one ABI to the next: where its fields are.
#[derive(Debug)]
pub struct Layout {
    /// Bytes of the whole.
    pub bytes: usize,
    device: usize,
    /// Bytes of `lo_device` and `lo_rdevice`.
    device_bytes: usize,
    inode: usize,
    inode_bytes: usize,
    rdevice: usize,
    /// `lo_offset`, then `lo_encrypt_type`, `lo_encrypt_key_size` and `lo_flags`, four bytes each, then
    /// the name.
    offset: usize,
}

const X86_64: Layout =
    Layout { bytes: 168, device: 8, device_bytes: 8, inode: 16, inode_bytes: 8, rdevice: 24, offset: 32 };
const I386: Layout =
    Layout { bytes: 140, device: 4, device_bytes: 2, inode: 8, inode_bytes: 4, rdevice: 12, offset: 16 };
const AARCH64: Layout =
    Layout { bytes: 160, device: 4, device_bytes: 4, inode: 8, inode_bytes: 8, rdevice: 16, offset: 20 };

impl Layout {
    /// That of these callers.
    pub fn of(abi: Abi) -> &'static Layout {
        match abi {
            Abi::X86_64 => &X86_64,
            Abi::I386 | Abi::Arm => &I386,
            Abi::Aarch64 => &AARCH64,
        }
    }
}

/// What `struct loop_info64` says.
pub fn info64(bytes: &[u8; INFO64_BYTES]) -> Info {
    Info {
        offset: u64::from_le_bytes(field(bytes, OFFSET)),
        size_limit: u64::from_le_bytes(field(bytes, SIZE_LIMIT)),
        flags: u32::from_le_bytes(field(bytes, FLAGS)),
        file_name: field(bytes, NAME),
        encrypt_type: u32::from_le_bytes(field(bytes, ENCRYPT_TYPE)),
        encrypt_key_size: u32::from_le_bytes(field(bytes, ENCRYPT_KEY_SIZE)),
    }
}

/// `struct loop_info64` that says this.
pub fn status64(status: &Status) -> [u8; INFO64_BYTES] {
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

/// Descriptor, block size and the rest of `struct loop_config`.
pub fn config(bytes: &[u8; CONFIG_BYTES]) -> (u32, u32, Info) {
    let info = info64(&field(bytes, 8));
    (u32::from_le_bytes(field(bytes, 0)), u32::from_le_bytes(field(bytes, 4)), info)
}

/// What `struct loop_info` says, of which `layout.bytes` bytes are looked at. As in the kernel, a
/// negative offset becomes an enormous one, and encryption is not looked at.
pub fn info(bytes: &[u8; INFO_BYTES_MAX], layout: &Layout) -> Info {
    let int = |at| u32::from_le_bytes(field(bytes, layout.offset + at));
    Info {
        offset: i64::from(int(0).cast_signed()).cast_unsigned(),
        size_limit: 0,
        flags: int(12),
        file_name: field(bytes, layout.offset + 16),
        encrypt_type: 0,
        encrypt_key_size: 0,
    }
}

/// `struct loop_info` that says this: the first `layout.bytes` bytes. OVERFLOW where it has no room
/// for a value; the size limit it never says.
pub fn status(status: &Status, layout: &Layout) -> Answer<[u8; INFO_BYTES_MAX]> {
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

/// N bytes from `at` on; zeroes behind the end, which no layout reaches.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Writes `value` at `at`; nothing behind the end, which no layout reaches.
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

    const ABIS: [Abi; 4] = [Abi::X86_64, Abi::I386, Abi::Aarch64, Abi::Arm];

    prop_compose! {
        fn any_info()(
            offset: u64, size_limit: u64, flags: u32, name: [[u8; 32]; 2], encrypt_type: u32,
            encrypt_key_size: u32,
        ) -> Info {
            let file_name = name.as_flattened().try_into().unwrap();
            Info { offset, size_limit, flags, file_name, encrypt_type, encrypt_key_size }
        }
    }

    prop_compose! {
        fn any_status()(
            number: u32, device in small(), inode in small(), rdevice in small(), info in any_info(),
            offset in small(),
        ) -> Status {
            Status { number, device, inode, rdevice, info: Info { offset, ..info } }
        }
    }

    /// As often small as not.
    fn small() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..64_u32).prop_map(|(value, shift)| value >> shift)
    }

    proptest! {
        #[test]
        fn what_was_said_is_read_back(status in any_status()) {
            let bytes = status64(&status);
            prop_assert_eq!(info64(&bytes), status.info);
            let mut whole = [0; CONFIG_BYTES];
            whole[..8].copy_from_slice(&[7, 0, 0, 0, 0, 16, 0, 0]);
            whole[8..240].copy_from_slice(&bytes);
            prop_assert_eq!(config(&whole), (7, 4096, status.info));
        }

        #[test]
        fn the_old_struct_says_all_it_can_or_refuses(said in any_status()) {
            for abi in ABIS {
                let layout = Layout::of(abi);
                let room = |value: u64, bytes: usize| bytes == 8 || value >> (8 * bytes) == 0;
                let fits = room(said.device, layout.device_bytes)
                    && room(said.rdevice, layout.device_bytes)
                    && room(said.inode, layout.inode_bytes)
                    && said.info.offset < 1 << 31;
                match status(&said, layout) {
                    Ok(bytes) => {
                        prop_assert!(fits);
                        let plain = Info { encrypt_type: 0, encrypt_key_size: 0, ..said.info };
                        prop_assert_eq!(info(&bytes, layout), Info { size_limit: 0, ..plain });
                        prop_assert!(bytes[layout.bytes..].iter().all(|&byte| byte == 0));
                        prop_assert_eq!(u32::from_le_bytes(field(&bytes, 0)), said.number);
                    }
                    Err(errno) => prop_assert_eq!((fits, errno), (false, Errno::OVERFLOW)),
                }
            }
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), CONFIG_BYTES)) {
            let (fd, _, said) = config(&field(&bytes, 0));
            prop_assert_eq!(fd.to_le_bytes(), field::<4>(&bytes, 0));
            prop_assert_eq!(said.offset.to_le_bytes(), field::<8>(&bytes, 32));
            for abi in ABIS {
                let said = info(&field(&bytes, 0), Layout::of(abi));
                prop_assert!(said.offset < 1 << 31 || said.offset >= u64::MAX << 31);
            }
        }
    }

    /// Values at the places that the C compiler gives for linux/loop.h.
    #[test]
    fn fields_are_where_the_headers_have_them() {
        let name = std::array::from_fn(|at| at as u8 + 1);
        let info = Info { offset: 0x1122, size_limit: 512, flags: 5, file_name: name, ..Info::default() };
        let said = Status { number: 3, device: 0x801, inode: 77, rdevice: 0x702, info };
        let old = super::status(&said, &X86_64).unwrap();
        assert_eq!((old[0], &old[8..10], old[16], &old[24..26]), (3, &[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&old[32..34], old[44], &old[48..112]), (&[0x22, 0x11][..], 5, &name[..]));
        let old = super::status(&said, &I386).unwrap();
        assert_eq!((old[0], &old[4..6], old[8], &old[12..14]), (3, &[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&old[16..18], old[28], &old[32..96]), (&[0x22, 0x11][..], 5, &name[..]));
        let new = status64(&said);
        assert_eq!((&new[..2], new[8], &new[16..18]), (&[1, 8][..], 77, &[2, 7][..]));
        assert_eq!((&new[24..26], &new[32..34], new[40]), (&[0x22, 0x11][..], &[0, 2][..], 3));
        assert_eq!((new[52], &new[56..120]), (5, &name[..]));
    }
}
