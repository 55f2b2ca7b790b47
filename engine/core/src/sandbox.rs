// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drops privileges of the daemon before its first thread starts, and of its other processes.
//!
//! Lists the capabilities that `serve` needs and the system calls that it never makes;
//! doc/threat-model.md explains both. An attacker in the daemon still has CAP_SYS_ADMIN, so this is
//! no hard boundary: it removes convenient steps (start a program, load kernel code, use the
//! network) and inherited privileges.
//!
//! A failure is only logged: the daemon works all the same.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use libc::{SYS_clone, SYS_clone3, SYS_socket, c_long, sock_filter};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use crate::ring;
use crate::sys::seccomp;

/// The capabilities of the daemon:
/// - SYS_ADMIN: ublk's control commands, mounts, FUSE file systems for all users.
/// - SYS_PTRACE: descriptors, memory and rights of an intercepted caller, whoever that is.
/// - DAC_OVERRIDE: to open an image anew that a caller has open and root could not, and nodes.
/// - FOWNER: to open it without access times (O_NOATIME).
/// - SYS_RESOURCE: its own limit on open files; to declare I/O threads I/O flushers.
/// - IPC_LOCK: buffers of rings, beyond RLIMIT_MEMLOCK.
pub const DAEMON: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::IPC_LOCK);

/// The capabilities of an I/O thread. Without CAP_SYS_RESOURCE disk quotas apply to writes to an
/// image; without CAP_FSETID a write clears the file's set-user-ID bit.
pub const IO_THREAD: CapabilitySet = CapabilitySet::IPC_LOCK;

/// Whether [`enter`] was called: threads of tests and of clients keep their privileges.
static ENTERED: AtomicBool = AtomicBool::new(false);

/// Restricts the calling thread and its descendants. Call it before any other thread starts.
pub fn enter() {
    ENTERED.store(true, Relaxed);
    // The order matters: the first needs a capability that the second drops.
    warn("limit its capability bounding set", limit_bounding_set(DAEMON));
    warn("drop capabilities", set_all(DAEMON));
    warn("set no_new_privs", set_no_new_privs(true));
    // The daemon's memory holds data of all tenants.
    warn("forbid core dumps", set_dumpable_behavior(DumpableBehavior::NotDumpable));
    // Seccomp filters do not see what rings do.
    if let Err(error) = ring::setup::restrict_all() {
        tracing::debug!(
            %error,
            "the kernel cannot restrict all rings of a process: each ring restricts itself"
        );
    }
    match program() {
        Some(program) => warn("install its seccomp filter", seccomp::restrict(&program)),
        None => tracing::warn!("the daemon has no seccomp filter for this architecture"),
    }
}

/// Restricts the calling thread and its descendants to the needs of an I/O thread; if [`enter`] was
/// called.
pub fn enter_io_thread() {
    if ENTERED.load(Relaxed) {
        warn("drop capabilities of an I/O thread", set_all(IO_THREAD));
    }
}

/// Likewise, but keeps CAP_SYS_ADMIN for the ring's personality: the driver permits partition
/// scanning only if all servers of a disk register with it.
pub fn prepare_io_thread() {
    if ENTERED.load(Relaxed) {
        warn("drop capabilities of an I/O thread", set_all(IO_THREAD | CapabilitySet::SYS_ADMIN));
    }
}

fn warn<E: std::fmt::Display>(what: &str, done: Result<(), E>) {
    if let Err(error) = done {
        tracing::warn!("the daemon cannot {what}: {error}");
    }
}

/// Restricts a helper process, which starts no programs, to these capabilities.
pub fn keep(capabilities: CapabilitySet) -> rustix::io::Result<()> {
    set_all(capabilities)?;
    clear_ambient_capability_set()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Restricts the thread to these of its capabilities.
fn set_all(to: CapabilitySet) -> rustix::io::Result<()> {
    let left = capabilities(None)?.permitted & to;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets)
}

/// Drops all others from the bounding set. Needs CAP_SETPCAP, unless there is nothing to drop.
fn limit_bounding_set(to: CapabilitySet) -> rustix::io::Result<()> {
    clear_ambient_capability_set()?;
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(one) {
            Ok(true) if !to.contains(one) => remove_capability_from_bounding_set(one)?,
            Ok(_) => {}
            // Beyond this kernel's last capability.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// System calls that the daemon never makes, by purpose.
const FORBIDDEN: &[&[c_long]] = &[
    // Other programs, other identities, other roots.
    &[libc::SYS_execve, libc::SYS_execveat, libc::SYS_setns, libc::SYS_chroot, libc::SYS_pivot_root],
    &[libc::SYS_setuid, libc::SYS_setreuid, libc::SYS_setresuid, libc::SYS_setfsuid, libc::SYS_setgroups],
    &[libc::SYS_setgid, libc::SYS_setregid, libc::SYS_setresgid, libc::SYS_setfsgid],
    // Other processes. (Their memory is read, and written through /proc/TID/mem.)
    &[libc::SYS_ptrace, libc::SYS_process_vm_writev, libc::SYS_process_madvise, libc::SYS_kcmp],
    &[libc::SYS_kill, libc::SYS_pidfd_send_signal, libc::SYS_rt_sigqueueinfo, libc::SYS_rt_tgsigqueueinfo],
    &[libc::SYS_move_pages, libc::SYS_migrate_pages],
    // Kernel code, and common exploit vectors.
    &[libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module, libc::SYS_kexec_load],
    &[libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_personality],
    &[libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_request_key],
    // The machine.
    &[libc::SYS_reboot, libc::SYS_swapon, libc::SYS_swapoff, libc::SYS_syslog, libc::SYS_acct],
    &[libc::SYS_clock_settime, libc::SYS_clock_adjtime, libc::SYS_adjtimex, libc::SYS_settimeofday],
    &[libc::SYS_sethostname, libc::SYS_setdomainname, libc::SYS_vhangup],
    &[libc::SYS_quotactl, libc::SYS_quotactl_fd],
    // Files without paths, and nodes.
    &[libc::SYS_open_by_handle_at, libc::SYS_fanotify_init, libc::SYS_mknodat],
    #[cfg(target_arch = "x86_64")]
    &[libc::SYS_fork, libc::SYS_vfork, libc::SYS_mknod, libc::SYS_kexec_file_load],
    #[cfg(target_arch = "x86_64")]
    &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_uselib],
];

/// AUDIT_ARCH_* of this machine's native system calls.
const ARCH: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

/// Numbers from here on are x32's on x86_64; no other ABI has as many.
const X32: u32 = 0x4000_0000;

/// Offsets in `struct seccomp_data`.
const NR_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARG0_OFFSET: u32 = 16;

/// The filter. The kernel determines which calls it always allows, and skips it for them (since
/// Linux 5.11).
fn program() -> Option<Vec<sock_filter>> {
    let refuse = |errno: i32| ret(libc::SECCOMP_RET_ERRNO | errno.cast_unsigned());
    let allow = ret(libc::SECCOMP_RET_ALLOW);
    let mut program =
        vec![load(ARCH_OFFSET), skip_if(libc::BPF_JEQ, ARCH?, 1), refuse(libc::EPERM), load(NR_OFFSET)];
    // Calls of another ABI: only an attacker makes them.
    program.extend([skip_unless(libc::BPF_JGE, X32, 1), refuse(libc::EPERM)]);
    for number in FORBIDDEN.iter().copied().flatten() {
        program.extend([skip_unless(libc::BPF_JEQ, u32::try_from(*number).ok()?, 1), refuse(libc::EPERM)]);
    }
    // Allows threads, not processes. The flags of clone3 are invisible to filters, and the C
    // library falls back.
    let number = |call: c_long| u32::try_from(call).ok();
    program.extend([skip_unless(libc::BPF_JEQ, number(SYS_clone3)?, 1), refuse(libc::ENOSYS)]);
    program.extend([
        skip_unless(libc::BPF_JEQ, number(SYS_clone)?, 4),
        load(ARG0_OFFSET),
        skip_unless(libc::BPF_JSET, libc::CLONE_THREAD.cast_unsigned(), 1),
        allow,
        refuse(libc::EPERM),
        // No network.
        skip_unless(libc::BPF_JEQ, number(SYS_socket)?, 3),
        load(ARG0_OFFSET),
        skip_if(libc::BPF_JEQ, libc::AF_UNIX.cast_unsigned(), 1),
        refuse(libc::EPERM),
        allow,
    ]);
    Some(program)
}

/// A filter that allows these calls and child processes, but no threads. None: unsupported
/// architecture.
pub fn only(calls: &[c_long]) -> Option<Vec<sock_filter>> {
    let (refuse, allow) =
        (ret(libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()), ret(libc::SECCOMP_RET_ALLOW));
    let missing = ret(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned());
    let number = |call: c_long| u32::try_from(call).ok();
    let mut program = vec![load(ARCH_OFFSET), skip_if(libc::BPF_JEQ, ARCH?, 1), refuse, load(NR_OFFSET)];
    for call in calls {
        program.extend([skip_unless(libc::BPF_JEQ, number(*call)?, 1), allow]);
    }
    // Its flags are invisible to filters, and the C library falls back.
    program.extend([skip_unless(libc::BPF_JEQ, number(SYS_clone3)?, 1), missing]);
    program.extend([
        skip_unless(libc::BPF_JEQ, number(SYS_clone)?, 3),
        load(ARG0_OFFSET),
        skip_if(libc::BPF_JSET, libc::CLONE_THREAD.cast_unsigned(), 1),
        allow,
        refuse,
    ]);
    Some(program)
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn ret(action: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: action }
}

/// Skips this many instructions if the comparison holds.
fn skip_if(compare: u32, k: u32, skip: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | compare | libc::BPF_K) as u16, jt: skip, jf: 0, k }
}

/// Skips this many instructions if it does not.
fn skip_unless(compare: u32, k: u32, skip: u8) -> sock_filter {
    sock_filter { jt: 0, jf: skip, ..skip_if(compare, k, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A filter holds for the thread that installs it.
    #[test]
    fn the_filter_rejects_forbidden_calls() {
        let tried = std::thread::spawn(|| {
            set_no_new_privs(true).unwrap();
            seccomp::restrict(&program().unwrap()).unwrap();
            for number in FORBIDDEN.iter().copied().flatten() {
                assert_eq!(crate::sys::testing::errno_of(*number), Some(libc::EPERM), "{number}");
            }
            assert!(std::process::Command::new("true").status().is_err(), "a process was started");
            assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err());
            // Allowed calls.
            std::thread::spawn(|| ()).join().unwrap();
            std::os::unix::net::UnixDatagram::unbound().unwrap();
            std::fs::read("/proc/thread-self/status").unwrap();
        });
        tried.join().unwrap();
    }

    #[test]
    fn keeps_only_needed_capabilities() {
        let tried = std::thread::spawn(|| {
            let had = capabilities(None).unwrap().permitted;
            if let Err(error) = limit_bounding_set(DAEMON) {
                eprintln!("skipped: the bounding set: {error}");
            }
            set_all(DAEMON).unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let value = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                u64::from_str_radix(line.trim(), 16).unwrap()
            };
            assert_eq!(value("CapPrm:"), (had & DAEMON).bits());
            assert_eq!(value("CapEff:"), (had & DAEMON).bits());
            assert_eq!((value("CapInh:"), value("CapAmb:")), (0, 0));
            if had.contains(CapabilitySet::SETPCAP) {
                assert_eq!(value("CapBnd:") & !DAEMON.bits(), 0);
            }
        });
        tried.join().unwrap();
    }
}
