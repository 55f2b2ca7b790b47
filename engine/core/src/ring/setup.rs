// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Creates a ring in stages: build it disabled, check it, add its tables, restrict it, enable it.
//! After the last stage it can do only what the data path needs.

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

use super::buffers::{ArrivalBuffers, BUFFER_SLOTS};
use super::files::FileTable;
use crate::error::{Error, Kind, Result};
use crate::sys::uring;

/// Group of the arrival buffers.
pub const ARRIVAL_GROUP: u16 = 0;

/// Sizes of a ring's queues and tables.
#[derive(Clone, Copy, Debug)]
pub struct RingSizes {
    /// Entries of the submission queue; a power of two.
    pub submissions: u32,
    /// Entries of the completion queue; a power of two.
    pub completions: u32,
    /// Slots for fixed files.
    pub files: u32,
    /// Slots for registered buffers.
    pub buffers: u16,
    /// Arrival buffers; a power of two.
    pub arrivals: u16,
}

impl RingSizes {
    /// For `devices` devices.
    pub fn for_devices(devices: u32) -> Self {
        Self {
            submissions: 1024,
            completions: 8192,
            files: 1 + 2 * devices,
            buffers: BUFFER_SLOTS,
            arrivals: 64,
        }
    }
}

/// Runs the stages in order, on the thread that will use the ring. With `privileged`, the ring
/// keeps the thread's present credentials for commands that need them.
pub fn create(
    sizes: &RingSizes,
    privileged: bool,
) -> Result<(IoUring, Option<u16>, FileTable, ArrivalBuffers)> {
    let ring = build_disabled(sizes)?;
    check(&ring)?;
    // Without it the driver refuses the commands that need it.
    let personality = privileged.then(|| ring.submitter().register_personality().ok()).flatten();
    let files = FileTable::new(&ring, sizes.files)?;
    let arrivals = register_buffers(&ring, sizes)?;
    restrict(&ring, &files)?;
    let ring = enable(ring)?;
    Ok((ring, personality, files, arrivals))
}

fn build_disabled(sizes: &RingSizes) -> Result<IoUring> {
    let build = |without_sqarray: bool| {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(sizes.completions);
        if without_sqarray {
            builder.setup_no_sqarray();
        }
        builder.build(sizes.submissions)
    };
    // The submission array is needless; kernels before 6.6 insist on it.
    build(true).or_else(|_| build(false)).map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::EPERM) => "allow io_uring: sysctl kernel.io_uring_disabled=0",
            Some(libc::ENOMEM) => "raise the limit on locked memory",
            _ => "Linux 6.1 or newer is needed",
        };
        Error::os(error, "cannot create an io_uring").hint(hint)
    })
}

fn check(ring: &IoUring) -> Result<()> {
    let params = ring.params();
    let needed = [
        (params.is_feature_nodrop(), "NODROP"),
        (params.is_feature_ext_arg(), "EXT_ARG"),
        (params.is_feature_skip_cqe_on_success(), "CQE_SKIP"),
    ];
    match needed.iter().find(|(granted, _)| !granted) {
        None => Ok(()),
        Some((_, name)) => Err(Error::new(Kind::Unsupported, format!("this kernel's io_uring lacks {name}"))),
    }
}

fn register_buffers(ring: &IoUring, sizes: &RingSizes) -> Result<ArrivalBuffers> {
    let submitter = ring.submitter();
    let failed = |what: &'static str| move |error: std::io::Error| Error::os(error, what);
    submitter
        .register_buffers_sparse(u32::from(sizes.buffers))
        .map_err(failed("cannot register a buffer table"))?;
    let arrivals = ArrivalBuffers::new(sizes.arrivals)?;
    let (address, entries) = arrivals.registration();
    // SAFETY: the memory belongs to `arrivals`, which `Ring` drops after the io_uring.
    unsafe { submitter.register_buf_ring_with_flags(address, entries, ARRIVAL_GROUP, 0) }
        .map_err(failed("cannot register arrival buffers"))?;
    // Bounds the io-wq threads for blocking operations (fsync, fallocate, holes): a stuck file
    // system would otherwise collect one thread per request.
    submitter
        .register_iowq_max_workers(&mut [32, 8])
        .map_err(failed("cannot limit io_uring's worker threads (io-wq)"))?;
    Ok(arrivals)
}

/// Operations of the data path. All others fail with EACCES.
const OPERATIONS: [u8; 8] = [
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::UringCmd16::CODE,
    opcode::Nop::CODE,
];
/// Registrations of a running worker: files of devices, and its own ring fd.
const REGISTRATIONS: [u8; 3] =
    [6 /* FILES_UPDATE */, 20 /* RING_FDS */, 21 /* UNREGISTER_RING_FDS */];

/// Registrations during setup: tables of files and buffers, provided buffers, io-wq limits,
/// personality, restrictions, enable.
const SETUP_REGISTRATIONS: [u8; 7] = [13, 15, 22, 19, 9, 11, 12];
/// Flags of submissions.
const FLAGS: squeue::Flags = squeue::Flags::FIXED_FILE
    .union(squeue::Flags::IO_LINK)
    .union(squeue::Flags::SKIP_SUCCESS)
    .union(squeue::Flags::ASYNC)
    .union(squeue::Flags::BUFFER_SELECT);

/// Restricts all rings that this thread and its descendants create from now on to what workers'
/// rings can do, plus sending commands. Fails before Linux 7.0.
pub fn restrict_all() -> std::io::Result<()> {
    uring::restrict_all(&OPERATIONS, &[&REGISTRATIONS[..], &SETUP_REGISTRATIONS].concat(), FLAGS.bits())
}

fn restrict(ring: &IoUring, files: &FileTable) -> Result<()> {
    let mut rules: Vec<Restriction> = OPERATIONS
        .into_iter()
        .map(Restriction::sqe_op)
        .chain(REGISTRATIONS.into_iter().map(Restriction::register_op))
        .collect();
    rules.push(Restriction::sqe_flags_allowed(FLAGS.bits()));
    if !files.by_descriptor() {
        rules.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    }
    match ring.submitter().register_restrictions(&mut rules) {
        Err(error) if !uring::is_covered(&error) => Err(Error::os(error, "cannot restrict the io_uring")),
        _ => Ok(()),
    }
}

fn enable(ring: IoUring) -> Result<IoUring> {
    ring.submitter()
        .register_enable_rings()
        .map_err(|error| Error::os(error, "cannot enable the io_uring"))?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Ring;

    /// Result of one submission on a worker's ring.
    fn result(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
        ring.push(entry).unwrap();
        ring.enter(1).unwrap();
        let result = ring.next_completion().unwrap().result();
        assert!(ring.next_completion().is_none());
        result
    }

    #[test]
    fn submissions_without_a_file_need_the_fixed_file_flag() {
        let sizes = RingSizes { submissions: 8, completions: 16, files: 4, buffers: 16, arrivals: 8 };
        let mut ring = Ring::new(&sizes, false).unwrap();
        assert_eq!(result(&mut ring, &opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE)), 0);
        if ring.files.by_descriptor() {
            return eprintln!("skipped: this kernel's rings use descriptors");
        }
        assert_eq!(result(&mut ring, &opcode::Nop::new().build()), -libc::EACCES);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        assert_eq!(result(&mut ring, &socket.flags(squeue::Flags::FIXED_FILE)), -libc::EACCES);
    }

    #[test]
    fn rings_cannot_create_sockets() {
        let tried = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            if let Err(error) = restrict_all() {
                return eprintln!("skipped: {error}");
            }
            let mut any = IoUring::new(8).unwrap();
            for (entry, expected) in [
                (opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(), -libc::EACCES),
                (opcode::Nop::new().build(), 0),
            ] {
                // SAFETY: neither names any memory.
                unsafe { any.submission().push(&entry) }.unwrap();
                any.submit_and_wait(1).unwrap();
                assert_eq!(any.completion().next().unwrap().result(), expected);
            }
            // Workers' rings can still be created.
            Ring::new(&RingSizes::for_devices(4), true).unwrap();
        });
        tried.join().unwrap();
    }
}
