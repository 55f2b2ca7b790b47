//! What the driver says of a device that exists: whose it is, what it was made with, its shape.
//!
//! Knows the driver's structures. Does not know records of a daemon: they may be lost, the driver is not.

use libublk::sys;

use super::control::{Command, LIMIT, run};
use super::device::{Device, FullParams, command, from_bytes, to_bytes};
use super::features::Granted;
use crate::error::{Error, Kind, Result};
use crate::frontend::{Found, Parameters, Waiting};
use crate::image::Geometry;
use crate::instance::spec::DataPath;
use crate::request::SECTOR;

impl Device {
    /// What a device was made with, and what it waits for.
    pub fn examine(id: u32) -> Result<Found> {
        let buffer = to_bytes(&sys::ublksrv_ctrl_dev_info::default());
        let ask = Command { buffer, ..command("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO, id) };
        let info: sys::ublksrv_ctrl_dev_info = from_bytes(&run(ask, LIMIT)?.1)?;
        let flags = Granted(info.flags);
        // Best first: each path's flags are among those of the ones before it.
        let path =
            [DataPath::Batch, DataPath::Auto].into_iter().find(|path| flags.has(Granted::flags_of(*path)));
        Ok(Found {
            waiting: match u32::from(info.state) {
                sys::UBLK_S_DEV_DEAD => Waiting::ForNothing,
                _ => Waiting::ForDaemon,
            },
            parameters: Parameters {
                path: path.unwrap_or(DataPath::Copy),
                queues: info.nr_hw_queues,
                depth: info.queue_depth,
                owner: info.ublksrv_flags,
                outlives: flags.has(sys::UBLK_F_USER_RECOVERY),
                partscan: !flags.has(sys::UBLK_F_NO_AUTO_PART_SCAN),
            },
        })
    }

    /// Its shape, which stays what it is whatever happens to the image; `offset` is not the driver's to know.
    pub fn shape(&self, offset: u64) -> Result<Geometry> {
        let wanted = FullParams { len: size_of::<FullParams>() as u32, ..Default::default() };
        let ask = Command {
            buffer: to_bytes(&wanted),
            ..command("GET_PARAMS", sys::UBLK_U_CMD_GET_PARAMS, self.id())
        };
        let FullParams { types, basic, discard, dma_align, .. } = from_bytes(&run(ask, LIMIT)?.1)?;
        let bytes = |shift: u8| 1u32.checked_shl(shift.into()).unwrap_or(0);
        let (block_size, physical) = (bytes(basic.logical_bs_shift), bytes(basic.physical_bs_shift));
        if types & sys::UBLK_PARAM_TYPE_BASIC == 0 || !(512..=4096).contains(&block_size) {
            let context = format!("ublk device {} has no shape that this program makes", self.id());
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
        })
    }
}
