// SPDX-License-Identifier: Apache-2.0 OR MIT
//! seccomp: a filter of one's own, and the listener that it notifies.
//!
//! Knows seccomp(2) and seccomp_unotify(2). Does not know what a filter looks for (`intercept`,
//! `sandbox`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;

/// linux/seccomp.h, Linux 6.6: who answers wakes the caller on its own CPU, since it sleeps next.
const SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: u64 = 1;

/// A system call that a filter stopped and that waits for an answer.
pub type Notification = libc::seccomp_notif;

/// Installs the filter for the calling thread and whatever it starts from now on, and answers the
/// listener (close-on-exec). A caller that has been received waits killably: no other signal
/// interrupts it, so nothing is asked twice. Without CAP_SYS_ADMIN in the user namespace the thread
/// gives up gaining privileges first, as the kernel demands.
pub fn install_with_listener(program: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    match install(program) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            rustix::thread::set_no_new_privs(true)?;
            install(program)
        }
        done => done,
    }
}

/// Whether poll(2) of a listener says that nobody is left under its filter. ERR says nothing: the kernel answers
/// that where something for this thread (a signal, work of io_uring) came while it waited to look.
pub fn is_over(events: PollFlags) -> bool {
    events.contains(PollFlags::HUP)
}

/// Installs a filter that notifies nobody, for the calling thread and whatever it starts from now on.
pub fn restrict(program: &[libc::sock_filter]) -> io::Result<()> {
    set_filter(program, 0).map(drop)
}

fn install(program: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let fd = set_filter(program, flags)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<i32> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions, which `program` borrows until after the call.
    let done =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    i32::try_from(done).ok().filter(|&done| done >= 0).ok_or_else(io::Error::last_os_error)
}

/// The descriptor that notifications of one filter come from. Whoever installed the filter may hold
/// another of the same: then anything may be answered by them, and receiving may block.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// Takes a descriptor that may come from anybody: what is no listener is refused, before any
    /// call reaches its driver.
    pub fn new(fd: OwnedFd) -> io::Result<Listener> {
        if !super::descriptor::is_listener(fd.as_fd()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let listener = Listener(fd);
        // Before Linux 6.6 an answer takes a little longer, and that is all.
        let _ = listener.set_flags(SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
        Ok(listener)
    }

    /// The next notification. NOENT: its caller is gone already, or all who could call are.
    pub fn receive(&self) -> io::Result<Notification> {
        let data = libc::seccomp_data { nr: 0, arch: 0, instruction_pointer: 0, args: [0; 6] };
        let mut note = libc::seccomp_notif { id: 0, pid: 0, flags: 0, data };
        // SAFETY: the kernel fills a struct of the size that the request encodes; it is all zeroes,
        // as the kernel demands.
        let done = unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_RECV, (&raw mut note).cast()) };
        done.map(|_| note)
    }

    /// Ends the call with this value or errno. NOENT: nobody waits for it any more.
    pub fn answer(&self, id: u64, answer: Result<i64, Errno>) -> io::Result<()> {
        self.respond(match answer {
            Ok(val) => libc::seccomp_notif_resp { id, val, error: 0, flags: 0 },
            Err(errno) => libc::seccomp_notif_resp { id, val: 0, error: -errno.raw_os_error(), flags: 0 },
        })
    }

    /// Lets the kernel serve the call as if there were no filter, reading its arguments anew.
    pub fn let_through(&self, id: u64) -> io::Result<()> {
        let flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        self.respond(libc::seccomp_notif_resp { id, val: 0, error: 0, flags })
    }

    /// The caller still waits. What was looked up by its thread id before this answered true was
    /// looked up of the caller, not of another thread with the same number.
    pub fn waits(&self, id: u64) -> bool {
        let mut id = id;
        // SAFETY: the kernel reads the u64 that the request encodes.
        unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ID_VALID, (&raw mut id).cast()) }.is_ok()
    }

    /// Puts a file onto a descriptor of the caller, in place of what is there.
    pub fn put_descriptor(
        &self,
        id: u64,
        file: BorrowedFd<'_>,
        number: u32,
        cloexec: bool,
    ) -> io::Result<()> {
        let mut put = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
            srcfd: file.as_raw_fd().cast_unsigned(),
            newfd: number,
            newfd_flags: if cloexec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        // SAFETY: the kernel reads the struct that the request encodes; `file` is open during the call.
        unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_ADDFD, (&raw mut put).cast()) }.map(drop)
    }

    fn respond(&self, response: libc::seccomp_notif_resp) -> io::Result<()> {
        let mut response = response;
        // SAFETY: the kernel reads the struct that the request encodes.
        unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SEND, (&raw mut response).cast()) }.map(drop)
    }

    fn set_flags(&self, flags: u64) -> io::Result<()> {
        let argument = std::ptr::without_provenance_mut(flags as usize);
        // SAFETY: the argument is the number itself, not a pointer.
        unsafe { self.ioctl(libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, argument) }.map(drop)
    }

    /// Asks again when interrupted: that tells of this thread (work of io_uring is enough, if another thread has the
    /// kernel's lock just then), and nothing of the caller.
    ///
    /// # Safety
    /// `argument` is what this request takes, and lives until the call is over.
    unsafe fn ioctl(&self, request: libc::Ioctl, argument: *mut libc::c_void) -> io::Result<i32> {
        loop {
            // SAFETY: the descriptor is open; the caller of this function vouches for the argument.
            match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } {
                -1 => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
                done => return Ok(done),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    /// A filter that stops ioctl(2) and allows all other calls.
    fn stops_ioctl() -> [libc::sock_filter; 4] {
        let plain = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let is_ioctl = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        [
            plain(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
            libc::sock_filter { jf: 1, ..plain(is_ioctl, libc::SYS_ioctl as u32) },
            plain(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
            plain(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        ]
    }

    /// Threads that look at the same caller at once, and are interrupted: none may take him for gone.
    #[test]
    fn an_interrupted_poll_gives_no_answer() {
        use super::{Listener, install_with_listener};
        use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
        use std::sync::mpsc;
        use std::time::{Duration, Instant};

        const LOOKS: usize = 48;
        extern "C" fn nothing(_: i32) {}
        // SAFETY: the handler touches nothing; the signal is sent to threads of this test only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
        }
        let (to, from) = mpsc::channel();
        let caller = std::thread::spawn(move || {
            to.send(install_with_listener(&stops_ioctl())).unwrap();
            // SAFETY: LOOP_CLR_FD takes no memory, and no file has this number.
            unsafe { libc::ioctl(-1, 0x4c01, 0) };
        });
        let listener = match from.recv().unwrap() {
            Ok(fd) => Listener::new(fd).unwrap(),
            Err(error) => return eprintln!("skipped: no filter can be installed: {error}"),
        };
        let id = listener.receive().unwrap().id;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (to, from) = mpsc::channel();
            for _ in 0..LOOKS {
                let (to, listener, over) = (to.clone(), &listener, &over);
                scope.spawn(move || {
                    to.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                    while !over.load(Relaxed) {
                        if !listener.waits(id) {
                            over.store(true, Relaxed);
                            panic!("the caller waits, and was taken for gone");
                        }
                    }
                });
            }
            let threads: Vec<i32> = from.iter().take(LOOKS).collect();
            let end = Instant::now() + Duration::from_secs(4);
            while Instant::now() < end && !over.load(Relaxed) {
                for thread in &threads {
                    // SAFETY: plain numbers; the thread is one of this process, or gone.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), *thread, libc::SIGUSR1) };
                }
            }
            over.store(true, Relaxed);
        });
        listener.answer(id, Ok(0)).unwrap();
        caller.join().unwrap();
    }

    #[test]
    fn only_a_hang_up_is_the_end() {
        use super::{PollFlags, is_over};
        assert!(is_over(PollFlags::HUP) && is_over(PollFlags::HUP | PollFlags::ERR));
        assert!(![PollFlags::ERR, PollFlags::IN, PollFlags::empty()].into_iter().any(is_over));
    }
}
