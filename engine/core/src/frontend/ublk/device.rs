// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifecycle of one ublk device: add, set parameters, start, resize, stop, delete; or recover
//! it from a daemon that is gone.
//!
//! Knows the order that the driver requires. Every step has a deadline. Nothing is undone on
//! failure: the caller decides.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libublk::sys;

use super::batch::Batch;
use super::control::{ControlCommand, TIMEOUT, run};
use super::fallback::Fallback;
use super::features::DriverFeatures;
use super::memory::{CopyBuffers, Descriptors};
use super::per_io::{DataBuffers, PerIo};
use crate::error::{Error, Kind, Result};
use crate::frontend::disk_list::DiskList;
use crate::frontend::{DeviceParameters, FrontendQueue, IoMode, StopMode};
use crate::image::Geometry;
use crate::request::SECTOR;

/// Largest request in bytes. Two I/O modes do not copy data, so large requests cost nothing. In the
/// third one each tag may need a buffer of this size.
const MAX_REQUEST: u32 = 1 << 20;
const MAX_REQUEST_COPIED: u32 = 512 << 10;
/// Largest discard in sectors: its length in bytes fits 32 bits.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// How long to wait for the character device node.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the last operations of a dead daemon may take.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_micros(500);
/// Time for the driver to reply after its own time limit.
const QUIESCE_SLACK: Duration = Duration::from_millis(500);
/// Held while a block device starts: its number depends on which are free.
static STARTS: Mutex<()> = Mutex::new(());

/// While this is held, only its holder starts block devices in this process.
#[derive(Debug)]
pub struct StartLock(#[expect(dead_code, reason = "held, never read")] MutexGuard<'static, ()>);

impl StartLock {
    /// Waits for the lock.
    pub fn acquire() -> StartLock {
        StartLock(STARTS.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One ublk device.
#[derive(Debug)]
pub struct UblkDevice {
    id: u32,
    features: DriverFeatures,
    parameters: DeviceParameters,
}

/// `struct ublk_params` up to the DMA alignment, where libublk's ends. (Embedding that one fails:
/// the next field begins in its tail padding.)
#[repr(C)]
#[derive(Default)]
pub(super) struct FullParams {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) basic: sys::ublk_param_basic,
    pub(super) discard: sys::ublk_param_discard,
    pub(super) devt: sys::ublk_param_devt,
    pub(super) zoned: sys::ublk_param_zoned,
    pub(super) dma_align: sys::ublk_param_dma_align,
}
const _: () = assert!(std::mem::offset_of!(FullParams, dma_align) == 108);

impl UblkDevice {
    /// Adds a device to the driver. It has no size and no users yet.
    pub fn add(features: DriverFeatures, parameters: DeviceParameters) -> Result<UblkDevice> {
        let wanted = DriverFeatures::flags_for(parameters.io_mode) | optional_flags(features, &parameters);
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: parameters.queues,
            queue_depth: parameters.depth,
            max_io_buf_bytes: max_request(parameters.io_mode),
            dev_id: u32::MAX,
            flags: u64::from(wanted),
            ublksrv_flags: parameters.owner_cookie,
            ..Default::default()
        };
        let (_, answer) = run(
            ControlCommand {
                buffer: to_bytes(&info),
                ..command("ADD_DEV", sys::UBLK_U_CMD_ADD_DEV, u32::MAX)
            },
            TIMEOUT,
        )
        .map_err(|error| match error.kind() {
            Kind::Denied => error.hint("the daemon needs root (CAP_SYS_ADMIN)"),
            _ => error,
        })?;
        let info: sys::ublksrv_ctrl_dev_info = from_bytes(&answer)?;
        // The driver drops unknown flags silently and grants at most one queue per CPU. What it
        // wrote back counts.
        let asked = parameters;
        let parameters = DeviceParameters { queues: info.nr_hw_queues, ..asked };
        let device = UblkDevice { id: info.dev_id, features, parameters };
        let mode_flags = u64::from(DriverFeatures::flags_for(asked.io_mode));
        let served = (1..=asked.queues).contains(&info.nr_hw_queues) && info.queue_depth == asked.depth;
        if info.flags & mode_flags != mode_flags || !served {
            if let Err(error) = device.delete() {
                tracing::warn!(%error, "cannot delete a device with unsupported parameters");
            }
            let context = format!(
                "the driver does not support I/O mode {} with {} queues of depth {}",
                asked.io_mode.as_str(),
                asked.queues,
                asked.depth
            );
            return Err(Error::new(Kind::Unsupported, context));
        }
        Ok(device)
    }

    fn disk(&self) -> String {
        format!("ublkb{}", self.id)
    }

    /// An existing device, to be recovered or deleted.
    pub fn existing(features: DriverFeatures, id: u32, parameters: DeviceParameters) -> UblkDevice {
        UblkDevice { id, features, parameters }
    }

    /// Its id at the driver.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its parameters.
    pub fn parameters(&self) -> DeviceParameters {
        self.parameters
    }

    /// Its block device node.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(self.disk())
    }

    /// Sets the device's parameters at the driver.
    pub fn describe(&self, geometry: &Geometry) -> Result<()> {
        let params = params(geometry, self.parameters.io_mode);
        let buffer = to_bytes(&params);
        run(ControlCommand { buffer, ..command("SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS, self.id) }, TIMEOUT)
            .map(drop)
    }

    /// Opens the device for serving and creates its queues.
    pub fn queues(&self) -> Result<Vec<FrontendQueue>> {
        let DeviceParameters { io_mode, queues, depth, partscan, .. } = self.parameters;
        let file = open_with_retry(&format!("/dev/ublkc{}", self.id))?;
        (0..queues)
            .map(|queue| {
                let file =
                    file.try_clone().map_err(|error| Error::os(error, "cannot duplicate a descriptor"))?;
                let descriptors = Descriptors::map(&file, queue, depth)?;
                Ok(match io_mode {
                    IoMode::Batch => {
                        FrontendQueue::Batch(Batch::new(file, queue, depth, descriptors, partscan))
                    }
                    IoMode::Auto => {
                        let buffers = DataBuffers::Registered(Fallback::new());
                        FrontendQueue::PerIo(PerIo::new(file, queue, depth, descriptors, buffers, partscan))
                    }
                    IoMode::Copy => {
                        let buffers = CopyBuffers::new(depth, max_request(io_mode) as usize)?;
                        let buffers = DataBuffers::Copied(buffers);
                        FrontendQueue::PerIo(PerIo::new(file, queue, depth, descriptors, buffers, partscan))
                    }
                    IoMode::Loop | IoMode::Fuse => {
                        return Err(Error::new(Kind::Internal, "not an I/O mode of ublk"));
                    }
                })
            })
            .collect()
    }

    /// Starts the block device. All queues must be served: the kernel may read from it.
    pub fn start(&self) -> Result<()> {
        self.start_exclusively(&StartLock::acquire())?;
        self.disable_scheduler();
        Ok(())
    }

    /// Whether the block device exists. It disappears when all requests have ended.
    pub fn is_present(&self) -> bool {
        PathBuf::from(format!("/sys/block/ublkb{}", self.id)).exists()
    }

    /// The block device's number, once it has started.
    pub fn device_number(&self) -> Result<u64> {
        let path = format!("/sys/block/ublkb{}/dev", self.id);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::os(error, format!("cannot read {path}")))?;
        let numbers = text
            .trim()
            .split_once(':')
            .and_then(|(major, minor)| Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)));
        numbers.ok_or_else(|| Error::new(Kind::Internal, format!("{path} holds {text:?}")))
    }

    /// Starts the block device for a holder of the start lock, who disables its scheduler later.
    pub fn start_exclusively(&self, _alone: &StartLock) -> Result<()> {
        // First: udev sees the disk at once. A disk that is not listed does not start, because the
        // host would probe its contents.
        DiskList::of_machine().add(&self.disk(), self.parameters.owner_cookie)?;
        let pid = u64::from(std::process::id());
        run(ControlCommand { data: pid, ..command("START_DEV", sys::UBLK_U_CMD_START_DEV, self.id) }, TIMEOUT)
            .map(drop)
    }

    /// Begins its recovery from a daemon that is gone.
    pub fn begin_recovery(&self) -> Result<()> {
        // The driver detects the death of a daemon asynchronously.
        retry_while_busy(RECOVERY_TIMEOUT, || {
            run(command("START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY, self.id), TIMEOUT)
                .map(drop)
        })
    }

    /// Ends its recovery: all queues are served again.
    pub fn end_recovery(&self) -> Result<()> {
        let pid = u64::from(std::process::id());
        let end = ControlCommand {
            data: pid,
            ..command("END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY, self.id)
        };
        run(end, TIMEOUT)?;
        self.disable_scheduler();
        Ok(())
    }

    /// Disables the I/O scheduler, which costs time and keeps requests from arriving in batches;
    /// the kernel gives one to devices with one queue. The change freezes the queue, so nothing may
    /// be in flight on a file that might hang. It is slow, because the kernel first runs modprobe
    /// for a module named "none"; so this checks first. A scheduler that stays is only slow.
    pub fn disable_scheduler(&self) {
        let path = format!("/sys/block/ublkb{}/queue/scheduler", self.id);
        if std::fs::read_to_string(&path).is_ok_and(|chosen| !chosen.contains("[none]")) {
            let _ = std::fs::write(&path, "none");
        }
    }

    /// Enables or disables discards, whatever its parameters say. This freezes its queue: nothing
    /// may be in flight on a file that might hang.
    pub fn set_discard_support(&self, offer: bool) -> Result<()> {
        let path = format!("/sys/block/ublkb{}/queue/discard_max_bytes", self.id);
        let most = if offer { u64::from(MAX_DISCARD_SECTORS) * SECTOR } else { 0 };
        std::fs::write(&path, most.to_string())
            .map_err(|error| Error::os(error, format!("cannot write {path}")))
    }

    /// Changes its size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        if !self.features.has(sys::UBLK_F_UPDATE_SIZE) {
            return Err(Error::new(
                Kind::Unsupported,
                "this kernel cannot resize ublk devices (Linux 6.16 can)",
            ));
        }
        let update = ControlCommand {
            data: bytes / SECTOR,
            ..command("UPDATE_SIZE", sys::UBLK_U_CMD_UPDATE_SIZE, self.id)
        };
        run(update, TIMEOUT).map(drop)
    }

    /// Stops the block device, after the requests in flight.
    pub fn stop(&self, when: StopMode) -> Result<()> {
        let patience = Duration::from_millis(if when == StopMode::IfUnusedNow { 0 } else { 300 });
        let stop = || run(command("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV, self.id), TIMEOUT).map(drop);
        match when {
            StopMode::Always => stop(),
            StopMode::IfUnused | StopMode::IfUnusedNow if self.features.has(sys::UBLK_F_SAFE_STOP_DEV) => {
                // Programs that probe a new disk (udev, blkid) keep it open briefly.
                let attempt = retry_while_busy(patience, || {
                    run(command("TRY_STOP_DEV", sys::UBLK_U_CMD_TRY_STOP_DEV, self.id), TIMEOUT).map(drop)
                });
                match attempt {
                    // The disk is gone already, but not the device.
                    Err(error) if error.kind() == Kind::NotFound => stop(),
                    outcome => outcome,
                }
            }
            StopMode::IfUnused | StopMode::IfUnusedNow => {
                retry_while_busy(patience, || self.check_unclaimed())?;
                stop()
            }
        }
    }

    /// Holds new requests for the next daemon, and ends the fetch commands. The workers still
    /// complete the requests that they have. Returns false where the end of the process does all
    /// that: older drivers lack the command, and in batch mode requests fail with EIO after it
    /// (seen on Linux 7.3.4).
    pub fn quiesce(&self, limit: Duration) -> Result<bool> {
        if !self.features.has(sys::UBLK_F_QUIESCE) || self.parameters.io_mode == IoMode::Batch {
            return Ok(false);
        }
        let data = (limit.as_millis() as u64).max(1);
        let quiesce = ControlCommand { data, ..command("QUIESCE_DEV", sys::UBLK_U_CMD_QUIESCE_DEV, self.id) };
        run(quiesce, limit + QUIESCE_SLACK).map(|_| true)
    }

    /// The closest match to TRY_STOP_DEV on older kernels: checks that it is not mounted or
    /// claimed.
    fn check_unclaimed(&self) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(self.node());
        match opened {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                Err(Error::os(error, "the device is in use"))
            }
            _ => Ok(()),
        }
    }

    /// Deletes the device and frees its id. It must not be open here any more.
    pub fn delete(&self) -> Result<()> {
        // Before the id is free: another server may use it next.
        DiskList::of_machine().remove(&self.disk(), self.parameters.owner_cookie);
        run(command("DEL_DEV", sys::UBLK_U_CMD_DEL_DEV_ASYNC, self.id), TIMEOUT)?;
        // Waits until the device is not listed any more; its deletion is certain.
        let gone = PathBuf::from(format!("/sys/class/ublk-char/ublkc{}", self.id));
        let deadline = Instant::now() + Duration::from_millis(500);
        while gone.exists() && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }
}

fn optional_flags(features: DriverFeatures, parameters: &DeviceParameters) -> u32 {
    // QUIESCE is for recoverable devices only. Older drivers recover devices but cannot quiesce
    // them.
    let recovery = [sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE, sys::UBLK_F_QUIESCE];
    // A partition table is tenant data: the kernel parses it only on request.
    let no_scan = Some(sys::UBLK_F_NO_AUTO_PART_SCAN).filter(|_| !parameters.partscan);
    let recovery = recovery.into_iter().filter(|_| parameters.recoverable);
    recovery
        .chain(no_scan)
        .chain([sys::UBLK_F_UPDATE_SIZE])
        .filter(|flags| features.has(*flags))
        .fold(sys::UBLK_F_CMD_IOCTL_ENCODE, |all, flags| all | flags)
}

fn max_request(io_mode: IoMode) -> u32 {
    match io_mode {
        IoMode::Copy => MAX_REQUEST_COPIED,
        IoMode::Auto | IoMode::Batch | IoMode::Loop | IoMode::Fuse => MAX_REQUEST,
    }
}

fn params(geometry: &Geometry, io_mode: IoMode) -> FullParams {
    let cache = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    let mut attrs = if geometry.durable_writes { 0 } else { cache };
    if geometry.read_only {
        attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    let physical = geometry.physical_block_size.clamp(geometry.block_size, PAGE);
    let basic = sys::ublk_param_basic {
        attrs,
        logical_bs_shift: geometry.block_size.trailing_zeros() as u8,
        physical_bs_shift: physical.trailing_zeros() as u8,
        io_opt_shift: 0,
        io_min_shift: physical.trailing_zeros() as u8,
        max_sectors: max_request(io_mode) / SECTOR as u32,
        dev_sectors: geometry.size / SECTOR,
        ..Default::default()
    };
    let writable = !geometry.read_only;
    let discard = sys::ublk_param_discard {
        discard_granularity: geometry.discard_granularity.max(geometry.block_size),
        max_discard_sectors: if writable && geometry.can_discard { MAX_DISCARD_SECTORS } else { 0 },
        max_write_zeroes_sectors: if writable && geometry.can_write_zeroes { MAX_DISCARD_SECTORS } else { 0 },
        max_discard_segments: 1,
        ..Default::default()
    };
    let dma_align = sys::ublk_param_dma_align {
        alignment: geometry.dma_align.clamp(SECTOR as u32, PAGE).next_power_of_two() - 1,
        ..Default::default()
    };
    let types = sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD | sys::UBLK_PARAM_TYPE_DMA_ALIGN;
    FullParams { len: size_of::<FullParams>() as u32, types, basic, discard, dma_align, ..Default::default() }
}

const PAGE: u32 = 4096;

pub(super) fn command(name: &'static str, opcode: u32, device: u32) -> ControlCommand {
    ControlCommand { name, opcode, device, ..ControlCommand::default() }
}

fn open_with_retry(path: &str) -> Result<File> {
    let deadline = Instant::now() + OPEN_TIMEOUT;
    loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => {
                debug_assert!(file.as_raw_fd() >= 0);
                return Ok(file);
            }
            // The node is not there yet, or a dead daemon still has it open.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(POLL_INTERVAL);
            }
            Err(error) => return Err(Error::os(error, format!("cannot open {path}"))),
        }
    }
}

fn retry_while_busy(limit: Duration, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt() {
            Err(error) if error.kind() == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(4 * POLL_INTERVAL)
            }
            outcome => return outcome,
        }
    }
}

/// Plain structures of the driver's interface: integers only, all bit patterns valid.
pub(super) trait Plain: Default {}
impl Plain for sys::ublksrv_ctrl_dev_info {}
impl Plain for FullParams {}

pub(super) fn to_bytes<T: Plain>(value: &T) -> Vec<u8> {
    // SAFETY: `Plain` types are integers in a C layout without padding.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

pub(super) fn from_bytes<T: Plain>(bytes: &[u8]) -> Result<T> {
    if bytes.len() < size_of::<T>() {
        return Err(Error::new(Kind::Internal, "the driver's reply is too short"));
    }
    // SAFETY: long enough (checked), read unaligned, any bits are valid for `Plain` types.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
