// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file systems that the kernel mounts for tenants, and their options.
//!
//! Listed are file systems that support owner mapping and open no device but the given one. So
//! btrfs and f2fs are not, which can span several: btrfs finds the others of an image by UUID,
//! anywhere on the host. Unlisted options are rejected, so that a new kernel's options are not
//! allowed automatically. Does not mount.

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::image::Region;
use crate::loops::Answer;

use self::Value::{Number, OneOf};

/// Maximum length of an option's value.
const VALUE_MAX: usize = 20;

/// A file system that the kernel may mount.
#[derive(Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its name for mount(2).
    pub name: &'static str,
    /// The driver that mounts it.
    pub driver: &'static str,
    /// Options that are always set.
    forced: &'static [(&'static str, Option<&'static str>)],
    /// Options without a value.
    flags: &'static [&'static str],
    /// Options with a value.
    values: &'static [(&'static str, Value)],
}

/// The allowed values of an option.
#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// Digits, and a unit suffix.
    Number,
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// An option, with its value if it has one.
pub type Setting = (String, Option<String>);

/// Errors never panic, whatever the superblock says: they make the mount read-only. Not among the
/// options: external journals, quota files, another superblock than the first.
const EXT: FileSystem = FileSystem {
    name: "ext4",
    driver: "ext4",
    forced: &[("errors", Some("remount-ro"))],
    flags: &[
        "acl",
        "noacl",
        "user_xattr",
        "nouser_xattr",
        "barrier",
        "nobarrier",
        "discard",
        "nodiscard",
        "delalloc",
        "nodelalloc",
        "auto_da_alloc",
        "noauto_da_alloc",
        "grpid",
        "nogrpid",
        "bsddf",
        "minixdf",
        "block_validity",
        "noblock_validity",
        "noload",
        "norecovery",
        "journal_checksum",
        "nojournal_checksum",
        "lazytime",
        "nolazytime",
    ],
    values: &[
        ("data", OneOf(&["ordered", "writeback", "journal"])),
        ("errors", OneOf(&["remount-ro"])),
        ("barrier", OneOf(&["0", "1"])),
        ("commit", Number),
    ],
};

/// All supported file systems. The kernel's drivers ext2 and ext3 do not support owner mapping;
/// ext4 mounts these, too.
const ALL: &[FileSystem] = &[
    FileSystem { name: "ext2", ..EXT },
    FileSystem { name: "ext3", ..EXT },
    EXT,
    FileSystem {
        name: "xfs",
        driver: "xfs",
        // Without it, an image with the UUID of a host's file system would block that one's mount.
        forced: &[("nouuid", None)],
        flags: &[
            "nouuid",
            "inode32",
            "inode64",
            "noquota",
            "norecovery",
            "wsync",
            "discard",
            "nodiscard",
            "noalign",
            "largeio",
            "nolargeio",
            "swalloc",
        ],
        values: &[("allocsize", Number), ("logbufs", Number), ("logbsize", Number)],
    },
    FileSystem {
        name: "squashfs",
        driver: "squashfs",
        forced: &[],
        flags: &[],
        values: &[("errors", OneOf(&["continue"]))],
    },
    FileSystem {
        name: "erofs",
        driver: "erofs",
        forced: &[],
        flags: &["user_xattr", "nouser_xattr", "acl", "noacl"],
        values: &[],
    },
    FileSystem {
        name: "vfat",
        driver: "vfat",
        forced: &[("errors", Some("remount-ro"))],
        flags: &["quiet", "flush", "discard", "showexec", "utf8"],
        values: &[
            ("errors", OneOf(&["remount-ro"])),
            ("uid", Number),
            ("gid", Number),
            ("umask", Number),
            ("fmask", Number),
            ("dmask", Number),
            ("shortname", OneOf(&["lower", "win95", "winnt", "mixed"])),
            ("tz", OneOf(&["UTC"])),
        ],
    },
];

/// The file system with this name, if it is supported.
pub fn find(name: &str) -> Option<&'static FileSystem> {
    ALL.iter().find(|known| known.name == name)
}

/// Likewise, with an error for a configuration.
pub fn find_or_err(name: &str) -> Result<&'static FileSystem> {
    find(name).ok_or_else(|| {
        let known: Vec<_> = ALL.iter().map(|known| known.name).collect();
        Error::new(
            Kind::Invalid,
            format!("{name:?} is not a file system that the kernel can mount for tenants"),
        )
        .hint(format!("choose from {}", known.join(", ")))
    })
}

impl FileSystem {
    /// The settings of a mount with these options; EINVAL for an option that is not allowed, as the
    /// kernel has for an unknown one.
    pub fn settings(&self, data: &str) -> Answer<Vec<Setting>> {
        let mut settings = Vec::new();
        for option in data.split(',').filter(|option| !option.is_empty()) {
            if !self.allows(option) {
                return Err(Errno::INVAL);
            }
            settings.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            });
        }
        let forced = |key: &str| self.forced.iter().any(|(forced, _)| *forced == key);
        settings.retain(|(key, _)| !forced(key));
        let more = self.forced.iter().map(|(key, value)| ((*key).to_owned(), value.map(str::to_owned)));
        settings.extend(more);
        Ok(settings)
    }

    fn allows(&self, option: &str) -> bool {
        let Some((key, value)) = option.split_once('=') else {
            return self.flags.contains(&option);
        };
        self.values.iter().any(|(known, wanted)| *known == key && wanted.is(value))
    }

    /// Checks the image before the kernel mounts it, for references elsewhere: an external journal,
    /// and options in the superblock. EINVAL: it is not mounted. The owner may change the image
    /// after the check; doc/threat-model.md covers that.
    pub fn check(&self, image: &mut Region<'_>) -> Answer<()> {
        if self.driver != "ext4" {
            return Ok(());
        }
        let Some(superblock) = image.bytes::<1024>(1024) else { return Ok(()) };
        let number = |at: usize| {
            let bytes = superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        if number(0x38) & 0xffff != 0xef53 {
            return Ok(());
        }
        let (has_journal, is_journal) = (number(0x5c) & 0x4 != 0, number(0x60) & 0x8 != 0);
        let (journal_inode, journal_device) = (number(0xe0), number(0xe4));
        if is_journal || journal_device != 0 || has_journal && journal_inode == 0 {
            return Err(Errno::INVAL);
        }
        let options = superblock[0x200..0x240].split(|&byte| byte == 0).next().unwrap_or_default();
        let options = std::str::from_utf8(options).map_err(|_| Errno::INVAL)?;
        self.settings(options).map(drop)
    }
}

impl Value {
    fn is(&self, value: &str) -> bool {
        match self {
            Number => {
                let digits = value.trim_end_matches(['k', 'm', 'K', 'M']);
                let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
                number && value.len() <= VALUE_MAX && value.len() - digits.len() <= 1
            }
            OneOf(words) => words.contains(&value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    fn made(name: &str, data: &str) -> Answer<Vec<String>> {
        let settings = find(name).unwrap().settings(data)?;
        let text = |(key, value): Setting| value.map_or(key.clone(), |value| format!("{key}={value}"));
        Ok(settings.into_iter().map(text).collect())
    }

    #[test]
    fn rejects_unlisted_options_and_adds_forced_ones() {
        assert_eq!(made("ext4", ""), Ok(vec!["errors=remount-ro".to_owned()]));
        let some = made("ext3", "data=journal,,commit=5,errors=remount-ro,noload");
        assert_eq!(some.unwrap(), ["data=journal", "commit=5", "noload", "errors=remount-ro"]);
        assert_eq!(made("xfs", "allocsize=64k").unwrap(), ["allocsize=64k", "nouuid"]);
        for bad in [
            "errors=panic",
            "errors=continue",
            "journal_dev=2049",
            "journal_path=/dev/sda",
            "sb=8193",
            "usrjquota=x",
            "commit=",
            "commit=5kk",
            "commit=-1",
            "commit",
            "dax",
            "suid",
            "unheard-of",
            "data=ordered;",
        ] {
            assert_eq!(made("ext4", bad), Err(Errno::INVAL), "{bad}");
        }
        for bad in ["logdev=/dev/loop0", "rtdev=/dev/loop0"] {
            assert_eq!(made("xfs", bad), Err(Errno::INVAL), "{bad}");
        }
        assert_eq!(made("squashfs", "errors=panic"), Err(Errno::INVAL));
        assert_eq!(made("erofs", "device=/dev/sda"), Err(Errno::INVAL));
        for unlisted in ["btrfs", "f2fs", "EXT4", "overlay", "proc", ""] {
            assert!(find(unlisted).is_none(), "{unlisted}");
        }
        assert!(find_or_err("btrfs").unwrap_err().next_step().unwrap().contains("xfs"));
    }

    /// Superblocks, with this written over one that is fine.
    fn checked(patches: &[(u64, &[u8])]) -> Answer<()> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let write = |at: u64, bytes: &[u8]| file.write_all_at(bytes, 1024 + at).unwrap();
        write(0x38, &[0x53, 0xef]);
        write(0x5c, &[0x4]);
        write(0xe0, &[8]);
        patches.iter().for_each(|(at, bytes)| write(*at, bytes));
        find("ext4").unwrap().check(&mut Region::new(file.as_fd(), 0, 8192))
    }

    #[test]
    fn rejects_superblocks_with_external_references() {
        assert_eq!(checked(&[]), Ok(()));
        assert_eq!(checked(&[(0x200, b"commit=5")]), Ok(()));
        assert_eq!(checked(&[(0xe0, &[0])]), Err(Errno::INVAL), "a journal, but not inside");
        assert_eq!(checked(&[(0xe4, &[1, 8])]), Err(Errno::INVAL), "a journal on 8:1");
        assert_eq!(checked(&[(0x60, &[0x8])]), Err(Errno::INVAL), "a journal of another");
        assert_eq!(checked(&[(0x200, b"journal_path=/dev/sda")]), Err(Errno::INVAL));
        assert_eq!(checked(&[(0x200, b"errors=panic")]), Err(Errno::INVAL));
        assert_eq!(checked(&[(0x200, &[0xff; 64])]), Err(Errno::INVAL));
        // Nothing that the ext4 driver would take: it says so itself.
        assert_eq!(checked(&[(0x38, &[0, 0]), (0xe4, &[1])]), Ok(()));
    }
}
