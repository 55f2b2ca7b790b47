// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a descriptor that came from anybody is, found out without a question to whoever serves its file.
//!
//! fstat(2) or fstatfs(2) on a file of FUSE waits for its server for as long as that likes. The name that
//! /proc has for a descriptor comes from the kernel alone; that of a file begins with a slash or, where the
//! kernel itself makes it, with the kind. Does not know what a descriptor is wanted for.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::net::{AddressFamily, SocketType, sockopt};

/// linux/nsfs.h: _IO(0xb7, 3). Answers the CLONE_NEW* of a namespace.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// The listener of a seccomp filter.
pub fn is_listener(fd: BorrowedFd<'_>) -> bool {
    name(fd).is_some_and(|name| name == b"anon_inode:seccomp notify")
}

/// A user namespace.
pub fn is_user_namespace(fd: BorrowedFd<'_>) -> bool {
    if !name(fd).is_some_and(|name| name.starts_with(b"user:[")) {
        return false;
    }
    // SAFETY: the name says that the file is of nsfs; the request takes no argument and returns an integer.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWUSER
}

/// A Unix socket of the type SOCK_SEQPACKET.
pub fn is_packet_socket(fd: impl AsFd) -> bool {
    // Of anything else than a socket this fails at once.
    sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&fd) == Ok(SocketType::SEQPACKET)
}

fn name(fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()).ok()?;
    Some(link.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;

    #[test]
    fn only_a_user_namespace_is_one() {
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        assert!(is_user_namespace(open("/proc/self/ns/user").as_fd()));
        for other in ["mnt", "net", "pid", "uts", "ipc", "cgroup"] {
            assert!(!is_user_namespace(open(&format!("/proc/self/ns/{other}")).as_fd()), "{other}");
        }
        let (socket, pipe) = (crate::sys::packet::pair().unwrap().0, std::io::pipe().unwrap().0);
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().join("user:[4026531837]");
        std::fs::write(&named, "").unwrap();
        let all =
            [socket, pipe.into(), open(named.to_str().unwrap()), open("/dev/null"), open("/proc/self/stat")];
        assert!(all.iter().all(|fd| !is_user_namespace(fd.as_fd())));
        assert!(all.iter().all(|fd| !is_listener(fd.as_fd())));
    }

    #[test]
    fn only_a_unix_packet_socket_is_one() {
        let (socket, _other) = crate::sys::packet::pair().unwrap();
        assert!(is_packet_socket(&socket));
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!is_packet_socket(&stream) && !is_packet_socket(&tcp));
        assert!(!is_packet_socket(File::open("/dev/null").unwrap()));
    }
}
