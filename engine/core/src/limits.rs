// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon allows of what strangers can ask for: the limits that doc/threat-model.md states.
//!
//! One place, so that code and document can be compared; a test here does. Limits of one module that
//! nobody is promised stay in that module.

use std::time::Duration;

/// Connections to one socket at a time.
pub const CONNECTIONS_MAX: usize = 256;
/// So many more for root at the socket for private pools.
pub const ROOT_CONNECTIONS: usize = 16;
/// Connections to one socket that wait to be accepted. More wait in connect(2), one per thread: a
/// client that connects again and again delays the others by this many connections at most.
pub const BACKLOG: i32 = 64;
/// Connections of one plain user to the socket for private pools.
pub const USER_CONNECTIONS_MAX: usize = 16;
/// Bytes of one message to the socket for private pools.
pub const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors since the last complete message there: a listener, a user namespace and a mounter.
pub const PRIVATE_DESCRIPTORS_MAX: usize = 3;
/// The same at the control socket: an image.
pub const CONTROL_DESCRIPTORS_MAX: usize = 1;
/// How long a message may take from its first byte.
pub const MESSAGE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a connection of a plain user may be silent.
pub const PRIVATE_IDLE_MAX: Duration = Duration::from_secs(20);
/// Descriptors of the daemon that clients of the socket for private pools cannot use up.
pub const RESERVED_DESCRIPTORS: u64 = 1024;
/// Loop devices of one user, unless the configuration says otherwise.
pub const USER_DEVICES: u32 = 64;
/// Private pools of one user, unless the configuration says otherwise.
pub const USER_POOLS: u32 = 16;
/// Private pools in all. Each has a file system.
pub const POOLS_MAX: usize = 1024;
/// Intercepted calls of one pool at a time.
pub const CALLS_AT_ONCE: usize = 4;
/// Events of pools that are served at a time: calls, requests at directories, polls. Each has a
/// thread. Beyond them, each listener and each directory serves one at a time.
pub const EVENT_THREADS: usize = 512;
/// Files of one user that are being closed while another may be bound. Each has a thread.
pub const CLOSING_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// Every figure of a row's mitigation, in its order.
    fn figures(row: &str) -> Vec<u64> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../doc/threat-model.md");
        let text = std::fs::read_to_string(path).unwrap();
        let row = text.lines().find(|line| line.starts_with(row)).expect("the row is there");
        let digits = |word: &str| word.trim_matches(|c: char| !c.is_ascii_digit()).replace(',', "");
        let mitigation = row.split('|').nth(2).unwrap();
        mitigation.split_whitespace().filter_map(|word| digits(word).parse().ok()).collect()
    }

    #[test]
    fn threat_model_states_the_limits_of_the_code() {
        let limits = [
            u64::from(USER_DEVICES),
            u64::from(USER_POOLS),
            POOLS_MAX as u64,
            USER_CONNECTIONS_MAX as u64,
            CONNECTIONS_MAX as u64,
            ROOT_CONNECTIONS as u64,
            PRIVATE_IDLE_MAX.as_secs(),
            MESSAGE_TIME_MAX.as_secs(),
            (MESSAGE_MAX >> 10) as u64,
            PRIVATE_DESCRIPTORS_MAX as u64,
            CONTROL_DESCRIPTORS_MAX as u64,
            RESERVED_DESCRIPTORS,
            CALLS_AT_ONCE as u64,
            EVENT_THREADS as u64,
            CLOSING_MAX as u64,
        ];
        assert_eq!(figures("| use up devices"), limits);
        assert_eq!(figures("| flood a socket with connections"), [BACKLOG as u64]);
    }
}
