//! The feature ladder: what the driver grants, asked of the driver and never of its version.

use libublk::sys;

use super::control::{Command, LIMIT, run};
use crate::error::Result;
use crate::instance::spec::DataPath;

/// Names of the flags, by bit.
const NAMES: [&str; 20] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
];

/// The driver's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted(pub u64);

impl Granted {
    /// Asks the driver.
    pub fn ask() -> Result<Granted> {
        let command = Command {
            name: "GET_FEATURES",
            opcode: sys::UBLK_U_CMD_GET_FEATURES,
            device: u32::MAX,
            buffer: vec![0; 8],
            ..Command::default()
        };
        let (_, bytes) = run(command, LIMIT)?;
        let mut flags = [0; 8];
        flags.copy_from_slice(&bytes[..8]);
        Ok(Granted(u64::from_ne_bytes(flags)))
    }

    /// Whether all of `flags` are granted.
    pub fn has(self, flags: u32) -> bool {
        self.0 & u64::from(flags) == u64::from(flags)
    }

    /// Whether this path of the ladder works here.
    pub fn allows(self, path: DataPath) -> bool {
        match path {
            DataPath::Copy => self.has(sys::UBLK_F_CMD_IOCTL_ENCODE),
            DataPath::Auto => self.has(Self::flags_of(DataPath::Auto)),
            DataPath::Batch => self.has(Self::flags_of(DataPath::Batch)),
            DataPath::Fuse => false,
        }
    }

    /// Paths that work here, best first.
    pub fn paths(self) -> Vec<DataPath> {
        [DataPath::Batch, DataPath::Auto, DataPath::Copy]
            .into_iter()
            .filter(|path| self.allows(*path))
            .collect()
    }

    /// The flags that make a path.
    pub fn flags_of(path: DataPath) -> u32 {
        match path {
            DataPath::Copy | DataPath::Fuse => 0,
            DataPath::Auto => sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG,
            DataPath::Batch => {
                sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG | sys::UBLK_F_BATCH_IO
            }
        }
    }

    /// A device outlives the daemon and can be taken back.
    pub fn recovers(self) -> bool {
        self.has(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE)
    }

    /// A device can be resized.
    pub fn resizes(self) -> bool {
        self.has(sys::UBLK_F_UPDATE_SIZE)
    }

    /// A device can be bound to an image after it has appeared, and be told to be unused.
    pub fn binds_in_place(self) -> bool {
        self.has(sys::UBLK_F_UPDATE_SIZE | sys::UBLK_F_SAFE_STOP_DEV)
    }

    /// Names of the flags.
    pub fn names(self) -> Vec<String> {
        (0..64)
            .filter(|bit| self.0 >> bit & 1 == 1)
            .map(|bit| NAMES.get(bit).map_or_else(|| format!("BIT_{bit}"), |name| (*name).to_owned()))
            .collect()
    }
}
