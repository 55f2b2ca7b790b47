// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queries the driver about an existing device: owner, parameters, geometry.
//!
//! Knows the driver's structures. Does not use the daemon's records: they may be lost, the driver's
//! state is not.

use libublk::sys;

use super::control::{ControlCommand, TIMEOUT, run};
use super::device::{FullParams, UblkDevice, command, from_bytes, to_bytes};
use super::features::DriverFeatures;
use crate::error::{Error, Kind, Result};
use crate::frontend::IoMode;
use crate::frontend::{DeviceParameters, ExistingDevice, OrphanState};
use crate::image::{Geometry, is_block_size};
use crate::request::SECTOR;

impl UblkDevice {
    /// The parameters and the state of a device.
    pub fn examine(id: u32) -> Result<ExistingDevice> {
        let buffer = to_bytes(&sys::ublksrv_ctrl_dev_info::default());
        let ask = ControlCommand { buffer, ..command("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO, id) };
        let info: sys::ublksrv_ctrl_dev_info = from_bytes(&run(ask, TIMEOUT)?.1)?;
        let flags = DriverFeatures(info.flags);
        // Best first: the flags of each mode include those of the next one.
        let mode = [IoMode::Batch, IoMode::Auto]
            .into_iter()
            .find(|mode| flags.has(DriverFeatures::flags_for(*mode)));
        Ok(ExistingDevice {
            state: match u32::from(info.state) {
                sys::UBLK_S_DEV_DEAD => OrphanState::Unused,
                _ => OrphanState::Waiting,
            },
            parameters: DeviceParameters {
                io_mode: mode.unwrap_or(IoMode::Copy),
                queues: info.nr_hw_queues,
                depth: info.queue_depth,
                owner_cookie: info.ublksrv_flags,
                recoverable: flags.has(sys::UBLK_F_USER_RECOVERY),
                partscan: !flags.has(sys::UBLK_F_NO_AUTO_PART_SCAN),
            },
        })
    }

    /// Its geometry, which never changes with the image; the driver does not know `offset`.
    pub fn driver_geometry(&self, offset: u64) -> Result<Geometry> {
        let wanted = FullParams { len: size_of::<FullParams>() as u32, ..Default::default() };
        let ask = ControlCommand {
            buffer: to_bytes(&wanted),
            ..command("GET_PARAMS", sys::UBLK_U_CMD_GET_PARAMS, self.id())
        };
        let FullParams { types, basic, discard, dma_align, .. } = from_bytes(&run(ask, TIMEOUT)?.1)?;
        let bytes = |shift: u8| 1u32.checked_shl(shift.into()).unwrap_or(0);
        let (block_size, physical) = (bytes(basic.logical_bs_shift), bytes(basic.physical_bs_shift));
        if types & sys::UBLK_PARAM_TYPE_BASIC == 0 || !is_block_size(block_size) {
            let context =
                format!("ublk device {} has a geometry that this program does not support", self.id());
            return Err(Error::new(Kind::Unsupported, context));
        }
        Ok(Geometry {
            size: basic.dev_sectors.saturating_mul(SECTOR),
            offset,
            block_size,
            physical_block_size: physical.max(block_size),
            dma_align: dma_align.alignment.saturating_add(1).max(SECTOR as u32),
            discard_granularity: Some(discard.discard_granularity)
                .filter(|granularity| granularity.is_power_of_two())
                .map_or(block_size, |granularity| granularity.max(block_size)),
            read_only: basic.attrs & sys::UBLK_ATTR_READ_ONLY != 0,
            can_discard: discard.max_discard_sectors > 0,
            can_write_zeroes: discard.max_write_zeroes_sectors > 0,
            durable_writes: basic.attrs & sys::UBLK_ATTR_VOLATILE_CACHE == 0,
        })
    }
}
