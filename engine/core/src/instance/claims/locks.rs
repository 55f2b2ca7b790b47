// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds programs that hold locks of fcntl(2) on a file: QEMU and `loopengine mount` lock the images
//! that they use.
//!
//! Reads /proc as root, and no file system. Does not find locks of flock(2): scripts hold them around
//! an attach. Does not find files that st_dev of stat(2) places on another device than the file
//! system's own (Btrfs).

use std::fs;

use super::holders::ExternalUse;
use crate::image::Identity;
use crate::sys::processes::{self, Process};

/// The byte that QEMU locks, for reading, while it may write to an image.
const QEMU_WRITES: u64 = 101;

/// A line of /proc/locks.
#[derive(Debug, PartialEq, Eq)]
struct Lock<'a> {
    writes: bool,
    /// None: of an open file, not of a process.
    pid: Option<u32>,
    /// Device and inode, as written in the line.
    file: &'a str,
}

/// The programs that hold locks on this file.
pub fn find(image: &Identity) -> Vec<ExternalUse> {
    // A lock on a block device is a lock on its node.
    if image.rdev != 0 {
        return Vec::new();
    }
    let (major, minor) = (rustix::fs::major(image.dev), rustix::fs::minor(image.dev));
    let file = format!("{major:02x}:{minor:02x}:{}", image.ino);
    let table = fs::read_to_string("/proc/locks").unwrap_or_default();
    let locks: Vec<Lock<'_>> = table.lines().filter_map(parse).filter(|lock| lock.file == file).collect();
    let Some(first) = locks.first() else { return Vec::new() };
    let process = locks.iter().find_map(|lock| lock.pid).or_else(|| processes::with_lock_on(first.file));
    let process = process.and_then(Process::of).map_or("another program".to_owned(), |one| one.to_string());
    let writes = locks.iter().any(|lock| lock.writes);
    vec![ExternalUse { who: format!("{process}, which has locked it"), writes, range: (0, 0) }]
}

/// `1: OFDLCK ADVISORY  WRITE -1 08:01:1234 0 EOF`
fn parse(line: &str) -> Option<Lock<'_>> {
    let words: Vec<&str> = line.split_ascii_whitespace().skip(1).collect();
    // A lock that waits has an arrow before its kind.
    let ["OFDLCK" | "POSIX", _, kind, pid, file, start, end] = words[..] else { return None };
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().unwrap_or(u64::MAX));
    let writes = kind == "WRITE" || (start..=end).contains(&QEMU_WRITES) && start > 0;
    Some(Lock { writes, pid: pid.parse().ok(), file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_locks() {
        let lock = |writes, pid| Some(Lock { writes, pid, file: "08:01:12" });
        for (line, want) in [
            ("1: POSIX  ADVISORY  WRITE 17 08:01:12 0 EOF", lock(true, Some(17))),
            ("2: OFDLCK ADVISORY  READ -1 08:01:12 0 EOF", lock(false, None)),
            ("3: OFDLCK ADVISORY  READ -1 08:01:12 100 101", lock(true, None)),
            ("3: OFDLCK ADVISORY  READ -1 08:01:12 201 201", lock(false, None)),
            ("4: -> POSIX ADVISORY  WRITE 17 08:01:12 0 EOF", None),
            ("5: FLOCK  ADVISORY  WRITE 17 08:01:12 0 EOF", None),
            ("", None),
        ] {
            assert_eq!(parse(line), want, "{line}");
        }
    }
}
