//! The descriptors that come with a call for a pool: each is found out to be what it should be before
//! anything else is done with it, since any other file could make whoever asks it something wait.

use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Error, Kind, Result};
use crate::intercept::mounts::check_socket;
use crate::sys::descriptor::{is_listener, is_user_namespace};

pub(super) fn check_listener(listener: &OwnedFd) -> Result<()> {
    match is_listener(listener.as_fd()) {
        true => Ok(()),
        false => Err(Error::new(Kind::Invalid, "what came with the call is no listener of a seccomp filter")),
    }
}

/// Those of a call for supervision.
pub(super) fn check(listener: &OwnedFd, namespace: &OwnedFd, mounter: Option<&OwnedFd>) -> Result<()> {
    check_listener(listener)?;
    if !is_user_namespace(namespace.as_fd()) {
        return Err(Error::new(Kind::Invalid, "what came with the call is no user namespace")
            .hint("pass a descriptor of /proc/PID/ns/user"));
    }
    mounter.map_or(Ok(()), check_socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::filter::{Options, program};
    use crate::sys::{packet, seccomp};
    use std::fs::File;

    #[test]
    fn refuses_what_is_not_what_it_should_be() {
        // The filter is that of this thread alone, and ends with it.
        let listener = std::thread::spawn(|| {
            let listener = seccomp::install_with_listener(&program(Options::default()));
            listener.inspect_err(|error| eprintln!("skipped: no filter here: {error}")).ok()
        });
        let Some(listener) = listener.join().unwrap() else { return };
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        let (user, mount, null) = (open("/proc/self/ns/user"), open("/proc/self/ns/mnt"), open("/dev/null"));
        let (socket, _other) = packet::pair().unwrap();
        let said = |listener, namespace, mounter| {
            check(listener, namespace, mounter).map_err(|error| error.message().to_owned()).err()
        };
        assert_eq!(said(&listener, &user, Some(&socket)), None);
        assert_eq!(said(&listener, &user, None), None);
        for other in [&mount, &null, &socket, &listener] {
            assert!(said(&listener, other, None).is_some_and(|said| said.contains("no user namespace")));
        }
        for other in [&user, &null, &socket] {
            assert!(said(other, &user, None).is_some_and(|said| said.contains("no listener")));
        }
        for other in [&user, &null, &listener] {
            assert!(said(&listener, &user, Some(other)).is_some_and(|said| said.contains("no socket")));
        }
    }
}
