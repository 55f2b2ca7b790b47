// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks the descriptors of a call for a pool, before any other use: an operation on a wrong file
//! could block.

use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Error, Kind, Result};
use crate::intercept::mounts::check_socket;
use crate::sys::descriptor::{is_listener, is_user_namespace};

pub(super) fn check_listener(listener: &OwnedFd) -> Result<()> {
    match is_listener(listener.as_fd()) {
        true => Ok(()),
        false => {
            Err(Error::new(Kind::Invalid, "the file descriptor is not the listener of a seccomp filter"))
        }
    }
}

/// Checks those of a call of Supervise.
pub(super) fn check(listener: &OwnedFd, namespace: &OwnedFd, mounter: Option<&OwnedFd>) -> Result<()> {
    check_listener(listener)?;
    if !is_user_namespace(namespace.as_fd()) {
        return Err(Error::new(Kind::Invalid, "the file descriptor is not a user namespace")
            .hint("pass a descriptor of /proc/PID/ns/user"));
    }
    mounter.map_or(Ok(()), check_socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::filter::{FilterOptions, program};
    use crate::sys::{packet, seccomp};
    use std::fs::File;

    #[test]
    fn refuses_descriptors_of_other_types() {
        // The filter applies to this thread only, and ends with it.
        let listener = std::thread::spawn(|| {
            let listener = seccomp::install_with_listener(&program(FilterOptions::default()));
            listener.inspect_err(|error| eprintln!("skipped: no filter here: {error}")).ok()
        });
        let Some(listener) = listener.join().unwrap() else { return };
        let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
        let (user, mount, null) = (open("/proc/self/ns/user"), open("/proc/self/ns/mnt"), open("/dev/null"));
        let (socket, _other) = packet::pair().unwrap();
        let refusal = |listener, namespace, mounter| {
            check(listener, namespace, mounter).map_err(|error| error.message().to_owned()).err()
        };
        assert_eq!(refusal(&listener, &user, Some(&socket)), None);
        assert_eq!(refusal(&listener, &user, None), None);
        for other in [&mount, &null, &socket, &listener] {
            assert!(
                refusal(&listener, other, None)
                    .is_some_and(|message| message.contains("not a user namespace"))
            );
        }
        for other in [&user, &null, &socket] {
            assert!(refusal(other, &user, None).is_some_and(|message| message.contains("not the listener")));
        }
        for other in [&user, &null, &listener] {
            assert!(
                refusal(&listener, &user, Some(other))
                    .is_some_and(|message| message.contains("not a packet socket"))
            );
        }
    }
}
