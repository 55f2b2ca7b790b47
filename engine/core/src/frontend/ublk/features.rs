// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's feature flags, as reported by the driver rather than derived from its version.

use libublk::sys;

use super::control::{ControlCommand, TIMEOUT, run};
use crate::error::Result;
use crate::frontend::IoMode;

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

/// The driver's feature flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverFeatures(pub u64);

impl DriverFeatures {
    /// Queries the driver.
    pub fn query() -> Result<DriverFeatures> {
        let command = ControlCommand {
            name: "GET_FEATURES",
            opcode: sys::UBLK_U_CMD_GET_FEATURES,
            device: u32::MAX,
            buffer: vec![0; 8],
            ..ControlCommand::default()
        };
        let (_, bytes) = run(command, TIMEOUT)?;
        let mut flags = [0; 8];
        flags.copy_from_slice(&bytes[..8]);
        Ok(DriverFeatures(u64::from_ne_bytes(flags)))
    }

    /// Whether the driver supports all of `flags`.
    pub fn has(self, flags: u32) -> bool {
        self.0 & u64::from(flags) == u64::from(flags)
    }

    /// Whether the driver supports this I/O mode.
    pub fn allows(self, mode: IoMode) -> bool {
        match mode {
            IoMode::Copy => self.has(sys::UBLK_F_CMD_IOCTL_ENCODE),
            IoMode::Auto => self.has(Self::flags_for(IoMode::Auto)),
            IoMode::Batch => self.has(Self::flags_for(IoMode::Batch)),
            IoMode::Loop | IoMode::Fuse => false,
        }
    }

    /// The supported I/O modes, best first.
    pub fn io_modes(self) -> Vec<IoMode> {
        [IoMode::Batch, IoMode::Auto, IoMode::Copy].into_iter().filter(|mode| self.allows(*mode)).collect()
    }

    /// The flags of an I/O mode.
    pub fn flags_for(mode: IoMode) -> u32 {
        match mode {
            IoMode::Copy | IoMode::Loop | IoMode::Fuse => 0,
            IoMode::Auto => sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG,
            IoMode::Batch => sys::UBLK_F_SUPPORT_ZERO_COPY | sys::UBLK_F_AUTO_BUF_REG | sys::UBLK_F_BATCH_IO,
        }
    }

    /// Devices outlive the daemon and can be recovered.
    pub fn supports_recovery(self) -> bool {
        self.has(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE)
    }

    /// Devices can be resized.
    pub fn supports_resize(self) -> bool {
        self.has(sys::UBLK_F_UPDATE_SIZE)
    }

    /// Devices can be bound to an image after their start, and stopped only if unused.
    pub fn supports_binding(self) -> bool {
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
