// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Detection of file systems: those of the machine's mkfs programs, with the names of blkid.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use loopengine_core::image::{Region, fs::detect};
use proptest::prelude::*;

use crate::support::*;

fn detected(path: &Path) -> Option<&'static str> {
    let size = fs::metadata(path).unwrap().len();
    let file = File::open(path).unwrap();
    let found = detect(&mut Region::new(file.as_fd(), 0, size));
    if let Ok(direct) = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
        assert_eq!(detect(&mut Region::new(direct.as_fd(), 0, size)), found);
    }
    found
}

fn blkid(path: &Path) -> Option<String> {
    run(&format!("blkid --probe --match-tag TYPE --output value {}", path.display())).ok()
}

#[test]
fn detects_what_blkid_detects() {
    if run("blkid --version").is_err() {
        return skipped("no blkid");
    }
    let directory = temporary();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "text").unwrap();
    let image = directory.path().join("image");
    let tree = tree.display().to_string();
    let commands = [
        ("ext2", "mkfs.ext2 -q IMAGE"),
        ("ext3", "mkfs.ext3 -q IMAGE"),
        ("ext4", "mkfs.ext4 -q IMAGE"),
        ("ext4", "mkfs.ext4 -q -O ^has_journal IMAGE"),
        ("xfs", "mkfs.xfs -q IMAGE"),
        ("btrfs", "mkfs.btrfs -q IMAGE"),
        ("squashfs", "mksquashfs TREE IMAGE -noappend -quiet"),
        ("erofs", "mkfs.erofs IMAGE TREE"),
        ("f2fs", "mkfs.f2fs -q IMAGE"),
        ("vfat", "mkfs.vfat -F 12 IMAGE"),
        ("vfat", "mkfs.vfat -F 16 IMAGE"),
        ("vfat", "mkfs.vfat -F 32 IMAGE"),
        ("vfat", "mkfs.vfat -S 4096 IMAGE"),
        ("exfat", "mkfs.exfat IMAGE"),
        ("ntfs", "mkfs.ntfs -q -F IMAGE"),
        ("iso9660", "genisoimage -quiet -o IMAGE TREE"),
        ("swap", "mkswap IMAGE"),
        ("swap", "mkswap -p 65536 IMAGE"),
        ("udf", "mkudffs IMAGE"),
        (
            "crypto_LUKS",
            "cryptsetup --batch-mode --pbkdf pbkdf2 --iter-time 1 luksFormat --type luks1 IMAGE KEY",
        ),
        (
            "crypto_LUKS",
            "cryptsetup --batch-mode --pbkdf pbkdf2 --iter-time 1 luksFormat --type luks2 IMAGE KEY",
        ),
    ];
    let mut tried = 0;
    for (name, command) in commands {
        let _ = fs::remove_file(&image);
        image_file(&image, if command.contains("-F 12") { 8 } else { 400 } * MIB);
        let key = format!("{tree}/file");
        let words =
            command.replace("IMAGE", image.to_str().unwrap()).replace("TREE", &tree).replace("KEY", &key);
        if let Err(why) = run(&words) {
            skipped(&why);
            continue;
        }
        tried += 1;
        assert_eq!(blkid(&image).as_deref(), Some(name), "{command}");
        assert_eq!(detected(&image), Some(name), "{command}");
    }
    println!("{tried} of {} tried", commands.len());
    assert!(tried > 0);
}

#[test]
fn detects_nothing_in_other_data() {
    let directory = temporary();
    let path = directory.path().join("image");
    for size in [0, 1, 511, 512, 1025, 4096, 70_000, MIB] {
        image_file(&path, size);
        assert_eq!(detected(&path), None);
    }
    // A partition table is not a file system.
    if run(&format!("sgdisk -n 1:0:0 {}", path.display())).is_ok() {
        assert_eq!(detected(&path), None);
    }
    // The end of the region counts, not the file's.
    File::options().write(true).open(&path).unwrap().write_all_at(b"_BHRfS_M", 65536 + 64).unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(detect(&mut Region::new(file.as_fd(), 0, 65536 + 72)), Some("btrfs"));
    assert_eq!(detect(&mut Region::new(file.as_fd(), 0, 65536 + 71)), None);
    assert_eq!(detect(&mut Region::new(file.as_fd(), 65536, MIB)), None);
}

proptest! {
    #[test]
    fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..5000), size: u64) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let _ = detect(&mut Region::new(file.as_fd(), 0, size));
    }
}
