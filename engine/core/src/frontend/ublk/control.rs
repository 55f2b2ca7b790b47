// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Control commands to /dev/ublk-control: one function for all, each with a deadline.
//!
//! A command that does not complete in time is abandoned with its ring and its buffer: the kernel
//! may still write to them. Rings of completed commands are reused.

use std::fs::File;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;

use crate::error::{Error, Kind, Result};
use crate::sys::uring;

type ControlRing = IoUring<squeue::Entry128, cqueue::Entry>;

/// Deadline of a command. START_DEV and STOP_DEV wait for I/O; none should take seconds.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// The driver's control device.
pub const NODE: &str = "/dev/ublk-control";
/// Rings kept for reuse: commands rarely overlap.
const CACHED_RINGS: usize = 1;

static RINGS: Mutex<Vec<ControlRing>> = Mutex::new(Vec::new());

/// A control command and its arguments.
#[derive(Debug, Default)]
pub(super) struct ControlCommand {
    pub(super) name: &'static str,
    pub(super) opcode: u32,
    pub(super) device: u32,
    pub(super) data: u64,
    /// Buffer that the driver reads or writes.
    pub(super) buffer: Vec<u8>,
}

/// Runs a command. Returns its result and its buffer; the errno is the driver's.
pub(super) fn run(command: ControlCommand, limit: Duration) -> Result<(i32, Vec<u8>)> {
    let ControlCommand { name, opcode, device, data, mut buffer } = command;
    let node = open()?;
    let header = sys::ublksrv_ctrl_cmd {
        dev_id: device,
        queue_id: u16::MAX,
        len: buffer.len() as u16,
        addr: if buffer.is_empty() { 0 } else { buffer.as_mut_ptr() as u64 },
        data: [data],
        ..Default::default()
    };
    let mut payload = [0u8; 80];
    // SAFETY: the header is plain integers without padding that matters, smaller than the payload.
    let bytes = unsafe {
        std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<sys::ublksrv_ctrl_cmd>())
    };
    payload[..bytes.len()].copy_from_slice(bytes);
    let fd = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&node));
    let entry = opcode::UringCmd80::new(fd, opcode).cmd(payload).build();

    let mut ring = acquire_ring()?;
    // SAFETY: `buffer` is moved nowhere before the completion has come; if it does not come, it is
    // leaked below together with the ring.
    unsafe { ring.submission().push(&entry) }
        .map_err(|_| Error::new(Kind::Internal, "the control ring is full"))?;
    match wait(&mut ring, limit) {
        Ok(Some(result)) => {
            release_ring(ring);
            if result < 0 {
                let error = std::io::Error::from_raw_os_error(-result);
                return Err(Error::os(error, format!("ublk {name} (device {device})")));
            }
            Ok((result, buffer))
        }
        Ok(None) => {
            std::mem::forget((ring, buffer, node));
            let context =
                format!("ublk {name} (device {device}) did not answer within {} s", limit.as_secs_f32());
            Err(Error::new(Kind::Deadline, context))
        }
        Err(error) => {
            std::mem::forget((ring, buffer, node));
            Err(Error::os(error, format!("cannot submit ublk {name} (device {device})")))
        }
    }
}

fn open() -> Result<File> {
    File::options().read(true).write(true).open(NODE).map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::ENOENT) => {
                "load the driver with 'modprobe ublk_drv' (Linux 6.5 or newer with CONFIG_BLK_DEV_UBLK)"
            }
            _ => "run the daemon as root",
        };
        let kind = if error.kind() == std::io::ErrorKind::PermissionDenied {
            Kind::Denied
        } else {
            Kind::Unavailable
        };
        Error::os(error, format!("cannot open {NODE}")).with_kind(kind).hint(hint)
    })
}

fn acquire_ring() -> Result<ControlRing> {
    let cached = RINGS.lock().map_or(None, |mut rings| rings.pop());
    match cached {
        Some(ring) => Ok(ring),
        None => restricted_ring().map_err(|error| Error::os(error, "cannot create a control ring")),
    }
}

/// A ring that can only send commands to drivers: seccomp filters do not see what a ring does.
fn restricted_ring() -> std::io::Result<ControlRing> {
    let ring: ControlRing = IoUring::builder().setup_r_disabled().build(2)?;
    let mut rules = [Restriction::sqe_op(opcode::UringCmd80::CODE), Restriction::sqe_flags_allowed(0)];
    match ring.submitter().register_restrictions(&mut rules) {
        Err(error) if !uring::is_covered(&error) => return Err(error),
        _ => {}
    }
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

fn release_ring(ring: ControlRing) {
    if let Ok(mut rings) = RINGS.lock()
        && rings.len() < CACHED_RINGS
    {
        rings.push(ring);
    }
}

/// The result of the queued command; none: the deadline has passed.
fn wait(ring: &mut ControlRing, limit: Duration) -> std::io::Result<Option<i32>> {
    let deadline = Instant::now() + limit;
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let pause = types::Timespec::from(remaining.max(Duration::from_millis(1)));
        let args = types::SubmitArgs::new().timespec(&pause);
        let submitted = ring.submitter().submit_with_args(1, &args);
        if let Some(entry) = ring.completion().next() {
            return Ok(Some(entry.result()));
        }
        if remaining.is_zero() {
            return Ok(None);
        }
        match submitted.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR), _)) => {}
            // The kernel is temporarily out of memory for requests.
            Err((Some(libc::EAGAIN | libc::EBUSY), _)) => std::thread::sleep(Duration::from_millis(1)),
            Err((_, error)) => return Err(error),
        }
    }
}

/// The ids of all ublk devices, of any owner.
pub fn present_devices() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let mut numbers: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_rings_only_send_commands() {
        let mut ring = restricted_ring().unwrap();
        let null = File::open("/dev/null").unwrap();
        let fd = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&null));
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        let command = opcode::UringCmd80::new(fd, 0).build();
        // /dev/null accepts commands and ignores them.
        for (entry, expected) in [(socket.into(), -libc::EACCES), (command, 0)] {
            // SAFETY: neither names any memory.
            unsafe { ring.submission().push(&entry) }.unwrap();
            assert_eq!(wait(&mut ring, TIMEOUT).unwrap(), Some(expected));
        }
    }
}
