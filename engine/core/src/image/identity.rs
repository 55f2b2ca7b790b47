// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The identity of an image's file, independent of its path.
//!
//! Uses statx. It detects two devices on one file, and a file that was replaced while the daemon
//! was down.

use std::hash::{Hash, Hasher};
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The identity of a file or a block device. Equal identities mean the same bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The file system's device number; 0 for a block device.
    pub dev: u64,
    /// The inode; 0 for a block device, which may have many nodes.
    pub ino: u64,
    /// The block device's number; 0 for a regular file.
    pub rdev: u64,
    /// Creation time in ns since 1970; 0: the file system does not report it.
    #[serde(default)]
    pub btime_ns: u64,
}

impl Identity {
    /// Of an open file, with any open flags, including O_PATH.
    pub fn of(file: BorrowedFd<'_>, name: &str) -> Result<Identity> {
        let mask = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask)
            .map_err(|e| Error::os(e, format!("cannot examine {name}")))?;
        if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice {
            return Ok(Identity {
                dev: 0,
                ino: 0,
                rdev: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
                btime_ns: 0,
            });
        }
        let btime = (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| {
            let seconds = u64::try_from(stat.stx_btime.tv_sec).unwrap_or(0);
            seconds.saturating_mul(1_000_000_000).saturating_add(stat.stx_btime.tv_nsec.into())
        });
        Ok(Identity {
            dev: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            rdev: 0,
            btime_ns: btime.unwrap_or(0),
        })
    }

    /// Whether this is the file that had the identity `before`, perhaps under a previous daemon.
    /// Stricter than equality: inode numbers are reused, creation times are not.
    pub fn is_same_file(&self, before: &Identity) -> bool {
        let both_known = self.btime_ns != 0 && before.btime_ns != 0;
        self == before && (!both_known || self.btime_ns == before.btime_ns)
    }
}

// Equality ignores the creation time. It adds nothing for two open files, and a file system that
// reports it only sometimes must not hide an attached image.
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
