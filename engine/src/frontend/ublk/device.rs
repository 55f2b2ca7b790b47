//! The life of one ublk device: added, described, started, resized, stopped, deleted; or taken
//! back from a daemon that is gone.
//!
//! Knows the order in which the driver wants things. Every step has a deadline and undoes
//! nothing: the caller decides what to do about a failure.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libublk::sys;

use super::batch::Batch;
use super::control::{Command, LIMIT, run};
use super::fallback::Fallback;
use super::features::Granted;
use super::memory::{CopyBuffers, Descriptors};
use super::per_io::{Buffers, PerIo};
use crate::error::{Error, Kind, Result};
use crate::frontend::{Parameters, Queue, Stop};
use crate::image::Geometry;
use crate::instance::spec::DataPath;
use crate::request::SECTOR;

/// Bytes of the largest request. Data is not copied on two of the paths, so that there is no cost
/// in allowing large ones; on the third each tag may come to hold a buffer of this size.
const MAX_REQUEST: u32 = 1 << 20;
const MAX_REQUEST_COPIED: u32 = 512 << 10;
/// Sectors of the largest discard: its length in bytes fits 32 bits.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// How long to wait for something that is known to happen soon.
const SOON: Duration = Duration::from_secs(3);
/// How long a dead daemon's last operations on the image may take.
const RECOVERY: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_micros(500);
/// For the driver to answer after its own time limit.
const QUIESCE_SLACK: Duration = Duration::from_millis(500);
/// Held while a block device appears: which number it gets depends on which are free.
static STARTS: Mutex<()> = Mutex::new(());

/// While it lives, no block device of this process appears but those of who has it.
#[derive(Debug)]
pub struct Alone(#[expect(dead_code, reason = "held, not looked at")] MutexGuard<'static, ()>);

impl Alone {
    /// Waits until nobody else has it.
    pub fn wait() -> Alone {
        Alone(STARTS.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One ublk device.
#[derive(Debug)]
pub struct Device {
    id: u32,
    granted: Granted,
    parameters: Parameters,
}

/// `struct ublk_params` up to the alignment of memory, before which libublk's ends. (It cannot be
/// embedded: its tail padding is where the next field begins.)
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

impl Device {
    /// Adds a device to the driver. It has no size and no users yet.
    pub fn add(granted: Granted, parameters: Parameters) -> Result<Device> {
        let wanted = Granted::flags_of(parameters.path) | supported_extras(granted, &parameters);
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: parameters.queues,
            queue_depth: parameters.depth,
            max_io_buf_bytes: max_request(parameters.path),
            dev_id: u32::MAX,
            flags: u64::from(wanted),
            ublksrv_flags: parameters.owner,
            ..Default::default()
        };
        let (_, answer) = run(
            Command { buffer: to_bytes(&info), ..command("ADD_DEV", sys::UBLK_U_CMD_ADD_DEV, u32::MAX) },
            LIMIT,
        )
        .map_err(|error| match error.kind() {
            Kind::Denied => error.hint("the daemon needs root (CAP_SYS_ADMIN)"),
            _ => error,
        })?;
        let info: sys::ublksrv_ctrl_dev_info = from_bytes(&answer)?;
        // Unknown flags are dropped in silence, and there are no more queues than CPUs: what counts
        // is what the driver wrote back.
        let asked = parameters;
        let parameters = Parameters { queues: info.nr_hw_queues, ..asked };
        let device = Device { id: info.dev_id, granted, parameters };
        let path_flags = u64::from(Granted::flags_of(asked.path));
        let served = (1..=asked.queues).contains(&info.nr_hw_queues) && info.queue_depth == asked.depth;
        if info.flags & path_flags != path_flags || !served {
            if let Err(error) = device.delete() {
                tracing::warn!(%error, "a device that was not as asked for stays at the driver");
            }
            let context = format!(
                "the driver does not grant path {} with {} queues of depth {}",
                asked.path.as_str(),
                asked.queues,
                asked.depth
            );
            return Err(Error::new(Kind::Unsupported, context));
        }
        Ok(device)
    }

    /// A device that exists already, to be taken back or deleted.
    pub fn existing(granted: Granted, id: u32, parameters: Parameters) -> Device {
        Device { id, granted, parameters }
    }

    /// Its number at the driver.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What it was made with.
    pub fn parameters(&self) -> Parameters {
        self.parameters
    }

    /// Its block device node.
    pub fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.id))
    }

    /// Tells the driver what the device looks like.
    pub fn describe(&self, geometry: &Geometry) -> Result<()> {
        let params = params(geometry, self.parameters.path);
        let buffer = to_bytes(&params);
        run(Command { buffer, ..command("SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS, self.id) }, LIMIT).map(drop)
    }

    /// Opens the device for serving and makes its queues.
    pub fn queues(&self) -> Result<Vec<Queue>> {
        let Parameters { path, queues, depth, partscan, .. } = self.parameters;
        let file = open_soon(&format!("/dev/ublkc{}", self.id))?;
        (0..queues)
            .map(|queue| {
                let file =
                    file.try_clone().map_err(|error| Error::os(error, "cannot duplicate a descriptor"))?;
                let descriptors = Descriptors::map(&file, queue, depth)?;
                Ok(match path {
                    DataPath::Batch => Queue::Batch(Batch::new(file, queue, depth, descriptors, partscan)),
                    DataPath::Auto => {
                        let buffers = Buffers::Registered(Fallback::new());
                        Queue::PerIo(PerIo::new(file, queue, depth, descriptors, buffers, partscan))
                    }
                    DataPath::Copy => {
                        let buffers = CopyBuffers::new(depth, max_request(path) as usize)?;
                        let buffers = Buffers::Copied(buffers);
                        Queue::PerIo(PerIo::new(file, queue, depth, descriptors, buffers, partscan))
                    }
                    DataPath::Fuse => return Err(Error::new(Kind::Internal, "not a path of ublk")),
                })
            })
            .collect()
    }

    /// Makes the block device appear. All queues must be served: the kernel may read from it.
    pub fn start(&self) -> Result<()> {
        self.start_alone(&Alone::wait())?;
        self.take_scheduler_off();
        Ok(())
    }

    /// There is a block device. It goes when all requests have ended.
    pub fn is_shown(&self) -> bool {
        PathBuf::from(format!("/sys/block/ublkb{}", self.id)).exists()
    }

    /// The block device's number, once it has appeared.
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

    /// The same for who holds back all others, and takes its scheduler off later.
    pub fn start_alone(&self, _alone: &Alone) -> Result<()> {
        let pid = u64::from(std::process::id());
        run(Command { data: pid, ..command("START_DEV", sys::UBLK_U_CMD_START_DEV, self.id) }, LIMIT)
            .map(drop)
    }

    /// Begins to take it back from a daemon that is gone.
    pub fn begin_recovery(&self) -> Result<()> {
        // The driver lets go of the dead daemon in its own time.
        retry_while_busy(RECOVERY, || {
            run(command("START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY, self.id), LIMIT).map(drop)
        })
    }

    /// Has taken it back: all queues are served again.
    pub fn end_recovery(&self) -> Result<()> {
        let pid = u64::from(std::process::id());
        let end =
            Command { data: pid, ..command("END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY, self.id) };
        run(end, LIMIT)?;
        self.take_scheduler_off();
        Ok(())
    }

    /// A scheduler costs time and keeps requests from arriving in batches; the kernel gives one to devices
    /// with one queue. Taking it off freezes the queue, so that nothing may be in flight on a file that might
    /// not answer, and takes long: the kernel first has modprobe look for a module of the name "none". So it
    /// is looked at first. One that stays is slow and not wrong.
    pub fn take_scheduler_off(&self) {
        let path = format!("/sys/block/ublkb{}/queue/scheduler", self.id);
        if std::fs::read_to_string(&path).is_ok_and(|chosen| !chosen.contains("[none]")) {
            let _ = std::fs::write(&path, "none");
        }
    }

    /// Lets it offer discards or not, whatever it was described with. This freezes its queue: nothing may be
    /// in flight on a file that might not answer.
    pub fn offer_discards(&self, offer: bool) -> Result<()> {
        let path = format!("/sys/block/ublkb{}/queue/discard_max_bytes", self.id);
        let most = if offer { u64::from(MAX_DISCARD_SECTORS) * SECTOR } else { 0 };
        std::fs::write(&path, most.to_string())
            .map_err(|error| Error::os(error, format!("cannot write {path}")))
    }

    /// Changes its size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        if !self.granted.has(sys::UBLK_F_UPDATE_SIZE) {
            return Err(Error::new(
                Kind::Unsupported,
                "this kernel cannot resize ublk devices (Linux 6.16 can)",
            ));
        }
        let update =
            Command { data: bytes / SECTOR, ..command("UPDATE_SIZE", sys::UBLK_U_CMD_UPDATE_SIZE, self.id) };
        run(update, LIMIT).map(drop)
    }

    /// Makes the block device go away, after what is in flight.
    pub fn stop(&self, when: Stop) -> Result<()> {
        let patience = Duration::from_millis(if when == Stop::IfUnusedNow { 0 } else { 300 });
        let stop = || run(command("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV, self.id), LIMIT).map(drop);
        match when {
            Stop::Always => stop(),
            Stop::IfUnused | Stop::IfUnusedNow if self.granted.has(sys::UBLK_F_SAFE_STOP_DEV) => {
                // Whoever looks at a new disk (udev, blkid) has it open for a moment.
                let attempt = retry_while_busy(patience, || {
                    run(command("TRY_STOP_DEV", sys::UBLK_U_CMD_TRY_STOP_DEV, self.id), LIMIT).map(drop)
                });
                match attempt {
                    // The disk has gone already; what is left of the device has not.
                    Err(error) if error.kind() == Kind::NotFound => stop(),
                    outcome => outcome,
                }
            }
            Stop::IfUnused | Stop::IfUnusedNow => {
                retry_while_busy(patience, || self.claim_alone())?;
                stop()
            }
        }
    }

    /// Holds back new requests for the next daemon, and ends the commands that wait for one. Requests that
    /// the workers have are still answered. False where all of that happens when the process ends: older
    /// drivers lack the command, and in batch mode requests fail with EIO after it (seen on Linux 7.3.4).
    pub fn quiesce(&self, limit: Duration) -> Result<bool> {
        if !self.granted.has(sys::UBLK_F_QUIESCE) || self.parameters.path == DataPath::Batch {
            return Ok(false);
        }
        let data = (limit.as_millis() as u64).max(1);
        let quiesce = Command { data, ..command("QUIESCE_DEV", sys::UBLK_U_CMD_QUIESCE_DEV, self.id) };
        run(quiesce, limit + QUIESCE_SLACK).map(|_| true)
    }

    /// The nearest thing to TRY_STOP on older kernels: nobody has mounted or claimed it.
    fn claim_alone(&self) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(self.node());
        match opened {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                Err(Error::os(error, "the device is in use"))
            }
            _ => Ok(()),
        }
    }

    /// Gives its number back. Nothing of it may be open here any more.
    pub fn delete(&self) -> Result<()> {
        run(command("DEL_DEV", sys::UBLK_U_CMD_DEL_DEV_ASYNC, self.id), LIMIT)?;
        // So that a user who counts devices counts right; the deletion itself is certain.
        let gone = PathBuf::from(format!("/sys/class/ublk-char/ublkc{}", self.id));
        let deadline = Instant::now() + Duration::from_millis(500);
        while gone.exists() && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

fn supported_extras(granted: Granted, parameters: &Parameters) -> u32 {
    // Stopping for a while is for those that are taken back; older drivers take back and cannot stop.
    let recovery = [sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE, sys::UBLK_F_QUIESCE];
    // A partition table is a tenant's data: the kernel parses it only where that was asked for.
    let no_scan = Some(sys::UBLK_F_NO_AUTO_PART_SCAN).filter(|_| !parameters.partscan);
    let recovery = recovery.into_iter().filter(|_| parameters.outlives);
    recovery
        .chain(no_scan)
        .chain([sys::UBLK_F_UPDATE_SIZE])
        .filter(|flags| granted.has(*flags))
        .fold(sys::UBLK_F_CMD_IOCTL_ENCODE, |all, flags| all | flags)
}

fn max_request(path: DataPath) -> u32 {
    match path {
        DataPath::Copy => MAX_REQUEST_COPIED,
        DataPath::Auto | DataPath::Batch | DataPath::Fuse => MAX_REQUEST,
    }
}

fn params(geometry: &Geometry, path: DataPath) -> FullParams {
    let mut attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
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
        max_sectors: max_request(path) / SECTOR as u32,
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

pub(super) fn command(name: &'static str, opcode: u32, device: u32) -> Command {
    Command { name, opcode, device, ..Command::default() }
}

fn open_soon(path: &str) -> Result<File> {
    let deadline = Instant::now() + SOON;
    loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => {
                debug_assert!(file.as_raw_fd() >= 0);
                return Ok(file);
            }
            // The node is being made, or a dead daemon's hold on it ends.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY))
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(PAUSE);
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
                std::thread::sleep(4 * PAUSE)
            }
            outcome => return outcome,
        }
    }
}

/// Plain structures of the driver's interface: integers only, any bits are valid.
pub(super) trait Plain: Default {}
impl Plain for sys::ublksrv_ctrl_dev_info {}
impl Plain for FullParams {}

pub(super) fn to_bytes<T: Plain>(value: &T) -> Vec<u8> {
    // SAFETY: `Plain` types are integers in a C layout without padding.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

pub(super) fn from_bytes<T: Plain>(bytes: &[u8]) -> Result<T> {
    if bytes.len() < size_of::<T>() {
        return Err(Error::new(Kind::Internal, "the driver's answer is too short"));
    }
    // SAFETY: long enough (checked), read unaligned, any bits are valid for `Plain` types.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
