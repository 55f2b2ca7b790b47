//! Which file an image is, whatever path led to it.
//!
//! Knows stat; does not know paths. Two devices over one file are found by this, and so is a file
//! that was replaced behind a restarted daemon's back.

use std::hash::{Hash, Hasher};
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A file's or a block device's identity. Equal means: the same bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The file system's device number; 0 for a block device.
    pub dev: u64,
    /// The inode; 0 for a block device, which may have many nodes.
    pub ino: u64,
    /// The block device's number; 0 for a regular file.
    pub rdev: u64,
    /// When the file was created, in ns since 1970; 0: its file system does not say.
    #[serde(default)]
    pub born_ns: u64,
}

impl Identity {
    /// Of an open file, opened in any way, O_PATH included.
    pub(super) fn of(file: BorrowedFd<'_>, name: &str) -> Result<Identity> {
        let mask = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask)
            .map_err(|e| Error::os(e, format!("cannot examine {name}")))?;
        if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice {
            return Ok(Identity {
                dev: 0,
                ino: 0,
                rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
                born_ns: 0,
            });
        }
        let born = (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| {
            let seconds = u64::try_from(stat.stx_btime.tv_sec).unwrap_or(0);
            seconds.saturating_mul(1_000_000_000).saturating_add(stat.stx_btime.tv_nsec.into())
        });
        Ok(Identity {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            rdev: 0,
            born_ns: born.unwrap_or(0),
        })
    }

    /// Whether this is the file that had the identity `before`, perhaps a daemon ago. Stricter
    /// than equality: inode numbers are used again as soon as a file is gone, times of birth not.
    pub fn is_still(&self, before: &Identity) -> bool {
        let birth_tells = self.born_ns != 0 && before.born_ns != 0;
        self == before && (!birth_tells || self.born_ns == before.born_ns)
    }
}

// The time of birth stays out of equality: of two open files it says nothing new, and a file
// system that tells it only sometimes must not hide that an image is attached already.
impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        (self.dev, self.ino, self.rdev) == (other.dev, other.ino, other.rdev)
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.dev, self.ino, self.rdev).hash(state);
    }
}
