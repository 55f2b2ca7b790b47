//! Which file systems the kernel mounts for tenants, and with which options.
//!
//! On the list are those whose mounts can show owners as a user namespace has them, and which open no
//! device but the one they are given. So not btrfs and f2fs, which are made of several: btrfs finds the
//! others of an image by its UUID, wherever the host has them. What is not on a list is refused, so
//! that an option of a new kernel is not allowed by itself. Knows names; does not know how to mount.

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::image::Region;
use crate::loops::Answer;

use self::Value::{Number, OneOf};

/// Bytes of an option's value at the most.
const VALUE_MAX: usize = 20;

/// A file system that the kernel may mount.
#[derive(Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// What mount(2) calls it.
    pub name: &'static str,
    /// Which driver mounts it.
    pub driver: &'static str,
    /// What it is mounted with, whatever is asked for.
    forced: &'static [(&'static str, Option<&'static str>)],
    /// Options without a value.
    flags: &'static [&'static str],
    /// Options with one.
    values: &'static [(&'static str, Value)],
}

/// What an option may be.
#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// Digits, and a unit after them.
    Number,
    /// One of these.
    OneOf(&'static [&'static str]),
}

/// An option, with its value if it has one.
pub type Setting = (String, Option<String>);

/// An error that its superblock wants to be a panic is none, and what the kernel finds wrong makes it
/// read-only. Not among the options: journals elsewhere, quota files, another superblock than the first.
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

/// All of them. The kernel's drivers ext2 and ext3 cannot map owners; that of ext4 mounts the same.
const ALL: &[FileSystem] = &[
    FileSystem { name: "ext2", ..EXT },
    FileSystem { name: "ext3", ..EXT },
    EXT,
    FileSystem {
        name: "xfs",
        driver: "xfs",
        // Or an image with the UUID of a file system of the host would keep that from being mounted.
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

/// The file system with this name, if it is on the list.
pub fn find(name: &str) -> Option<&'static FileSystem> {
    ALL.iter().find(|known| known.name == name)
}

/// The same, for who wrote it down.
pub fn named(name: &str) -> Result<&'static FileSystem> {
    find(name).ok_or_else(|| {
        let known: Vec<_> = ALL.iter().map(|known| known.name).collect();
        Error::new(Kind::Invalid, format!("the kernel mounts no {name:?} for tenants"))
            .hint(format!("name some of {}", known.join(", ")))
    })
}

impl FileSystem {
    /// What a mount with these options is made with; INVAL, as the kernel says of an option that it
    /// does not know, for one that may not be.
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

    /// Looks at the image before the kernel does, for what would make it look elsewhere: a journal on
    /// another device, and options in the superblock. INVAL: it is not mounted. Its owner may change
    /// the image between this and that; doc/threat-model.md says what comes of it.
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
    fn what_is_allowed_and_what_is_forced() {
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
        assert!(named("btrfs").unwrap_err().next_step().unwrap().contains("xfs"));
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
    fn superblocks_that_lead_elsewhere() {
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
