// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Detects the file system in a region, by blkid's names.
//!
//! Knows the signatures of file systems. A result is a hint, never a guarantee: the author of the
//! image chose the signature.

use super::region::{Region, le};

/// A signature: file system name, offset, bytes.
type Magic = (&'static str, u64, &'static [u8]);

/// File systems identified by their signature alone, in the order of checks.
const MAGICS: &[Magic] = &[
    ("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM2_member", 512 + 24, b"LVM2 001"),
    ("LVM2_member", 24, b"LVM2 001"),
    ("xfs", 0, b"XFSB"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("btrfs", 65536 + 64, b"_BHRfS_M"),
    ("exfat", 3, b"EXFAT   "),
    ("ntfs", 3, b"NTFS    "),
    ("iso9660", 32768 + 1, b"CD001"),
    ("udf", 32768 + 1, b"BEA01"),
    ("cramfs", 0, b"\x45\x3d\xcd\x28"),
];

/// Page sizes with which mkswap may have run.
const PAGES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];

/// The file system in `region`; None: unknown or unreadable.
///
/// May block as long as the file does; reads some hundred KiB at most.
pub fn detect(region: &mut Region<'_>) -> Option<&'static str> {
    let mut is = |&(_, at, magic): &Magic| {
        let mut bytes = [0; 8];
        let bytes = bytes.get_mut(..magic.len());
        bytes.is_some_and(|bytes| region.read(at, bytes).unwrap_or(false) && bytes == magic)
    };
    if let Some(&(name, ..)) = MAGICS.iter().find(|magic| is(magic)) {
        return Some(name);
    }
    let swap = PAGES.iter().any(|page| {
        is(&("swap", page - 10, b"SWAPSPAC")) && is(&("swap", page - 2, b"E2"))
            || is(&("swap", page - 10, b"SWAP-SPA")) && is(&("swap", page - 2, b"CE"))
    });
    if swap {
        return Some("swap");
    }
    ext(region).or_else(|| fat(region))
}

/// ext2, ext3 or ext4, by the features that the kernel's ext2 and ext3 did not have.
fn ext(region: &mut Region<'_>) -> Option<&'static str> {
    const HAS_JOURNAL: u64 = 0x4;
    const JOURNAL_DEVICE: u64 = 0x8;
    // Incompatible: filetype, recover, meta_bg. Read-only compatible: sparse_super, large_file,
    // btree_dir.
    const EXT3_INCOMPATIBLE: u64 = 0x2 | 0x4 | 0x10;
    const EXT3_READ_ONLY: u64 = 0x1 | 0x2 | 0x4;
    let superblock: [u8; 128] = region.bytes(1024)?;
    if le::<2>(&superblock, 0x38) != 0xef53 {
        return None;
    }
    let [compatible, incompatible, read_only] = [0x5c, 0x60, 0x64].map(|at| le::<4>(&superblock, at));
    if incompatible & JOURNAL_DEVICE != 0 {
        return Some("jbd");
    }
    let newer = incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0;
    Some(match (newer, compatible & HAS_JOURNAL != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    })
}

/// Whether the ext3 or ext4 in `region` needs journal recovery before use.
pub fn needs_recovery(region: &mut Region<'_>) -> bool {
    const RECOVER: u64 = 0x4;
    let superblock: Option<[u8; 128]> = region.bytes(1024);
    superblock.is_some_and(|bytes| le::<2>(&bytes, 0x38) == 0xef53 && le::<4>(&bytes, 0x60) & RECOVER != 0)
}

/// FAT has no signature: checks a boot sector for plausible values.
fn fat(region: &mut Region<'_>) -> Option<&'static str> {
    let boot: [u8; 512] = region.bytes(0)?;
    let (sector, cluster) = (le::<2>(&boot, 11), le::<1>(&boot, 13));
    let (reserved, tables, media) = (le::<2>(&boot, 14), le::<1>(&boot, 16), le::<1>(&boot, 21));
    let named = boot.get(54..57) == Some(b"FAT") || boot.get(82..87) == Some(b"FAT32");
    let fits = boot.ends_with(&[0x55, 0xaa])
        && (512..=4096).contains(&sector)
        && sector.is_power_of_two()
        && cluster.is_power_of_two()
        && reserved > 0
        && (1..=2).contains(&tables)
        && (media >= 0xf8 || media == 0xf0);
    (named && fits).then_some("vfat")
}
