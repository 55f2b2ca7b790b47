// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The account whose limits a user id counts against.
//!
//! One user can act as many ids: those assigned in /etc/subuid, and those of user namespaces that
//! it created. Limits hold for the user, so every id has an *account*: its owner's id. Knows
//! /etc/subuid, /etc/passwd and the owners of sockets' user namespaces. Does not know limits.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::error::{Error, Kind, Result};
use crate::sys::open_regular;

/// Maximum size of a file.
const FILE_MAX: u64 = 1 << 20;
/// Maximum number of learned ids; beyond, the table restarts empty.
const LEARNED_MAX: usize = 4096;

#[derive(Debug, Default, PartialEq, Eq)]
struct AccountTable {
    /// First id → last id and owner.
    ranges: BTreeMap<u32, (u32, u32)>,
    learned: BTreeMap<u32, u32>,
    /// Version of the files that the ranges were read from.
    version: Option<[(SystemTime, u64); 2]>,
}

static TABLE: Mutex<AccountTable> =
    Mutex::new(AccountTable { ranges: BTreeMap::new(), learned: BTreeMap::new(), version: None });

fn table() -> MutexGuard<'static, AccountTable> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The account of `uid`: its owner's id, or its own.
pub fn of(uid: u32) -> u32 {
    table().of(uid)
}

/// Records that `owner` created the user namespace of a process of `uid`. Root's namespaces are
/// ignored.
pub fn learn(uid: u32, owner: u32) {
    let mut table = table();
    if uid == 0 || owner == 0 || uid == owner || table.of(uid) == owner {
        return;
    }
    if table.learned.len() >= LEARNED_MAX {
        table.learned.clear();
    }
    table.learned.insert(uid, owner);
}

/// Reads /etc/subuid if it has changed. May block on the disk: not for threads that others wait
/// for.
pub fn refresh() {
    refresh_from(Path::new("/etc/subuid"), Path::new("/etc/passwd"));
}

fn refresh_from(subuid: &Path, passwd: &Path) {
    let version = [subuid, passwd].map(|path| {
        let meta = std::fs::metadata(path).ok();
        meta.map_or((SystemTime::UNIX_EPOCH, 0), |meta| {
            (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len())
        })
    });
    if table().version == Some(version) {
        return;
    }
    let ranges = parse(&read(subuid), &read(passwd));
    let mut table = table();
    (table.ranges, table.version) = (ranges, Some(version));
}

/// The id of a user, given by number or by name in /etc/passwd. Network directories are not
/// queried: they may hang.
pub fn uid_of(user: &str) -> Result<u32> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    let passwd = read(Path::new("/etc/passwd"));
    ids(&passwd).get(user).copied().ok_or_else(|| {
        let message = format!("no user '{user}' is in /etc/passwd");
        Error::new(Kind::NotFound, message).hint("give the user's number, as 'id -u NAME' prints it")
    })
}

/// The content of a file, or nothing.
fn read(path: &Path) -> String {
    let mut text = String::new();
    let file = open_regular(path).and_then(|file| file.take(FILE_MAX).read_to_string(&mut text));
    file.map(|_| text).unwrap_or_default()
}

/// Names and numbers of a passwd(5) file.
fn ids(passwd: &str) -> BTreeMap<&str, u32> {
    let entry = |line| {
        let mut fields = str::split(line, ':');
        Some((fields.next()?, fields.nth(1)?.parse().ok()?))
    };
    passwd.lines().filter_map(entry).collect()
}

/// Lines `OWNER:FIRST:COUNT`, where the owner is a name in `passwd` or a number. Ids below 1000 are
/// ignored; of overlapping ranges the first counts.
fn parse(subuid: &str, passwd: &str) -> BTreeMap<u32, (u32, u32)> {
    let ids = ids(passwd);
    let mut ranges = BTreeMap::<u32, (u32, u32)>::new();
    for line in subuid.lines() {
        let fields: Vec<_> = line.trim().split(':').collect();
        let [owner, first, count] = fields[..] else { continue };
        let owner = ids.get(owner).copied().or_else(|| owner.parse().ok());
        let (Some(owner), Ok(first), Ok(count)) = (owner, first.parse::<u32>(), count.parse::<u32>()) else {
            continue;
        };
        let last = first.saturating_add(count.saturating_sub(1));
        let taken = ranges.range(..=last).next_back().is_some_and(|(_, (end, _))| *end >= first);
        if count > 0 && first >= 1000 && owner != 0 && !taken {
            ranges.insert(first, (last, owner));
        }
    }
    ranges
}

impl AccountTable {
    fn of(&self, uid: u32) -> u32 {
        match self.ranges.range(..=uid).next_back() {
            Some((_, (last, owner))) if *last >= uid => *owner,
            _ => self.learned.get(&uid).copied().unwrap_or(uid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nann:x:1001:1001::/:/bin/sh\nbob:x:1002:1002::/:\n";

    #[test]
    fn subordinate_ids_count_for_their_owner() {
        let text = "ann:100000:65536\n1002:165536:65536\nnobody-knows:300000:10\nroot:400000:10\n\
                    bob:100005:3\nbob:0:1000\nann:500000:0\nann:4294967000:4294967295\n";
        let table = AccountTable { ranges: parse(text, PASSWD), ..AccountTable::default() };
        for (uid, account) in [
            (0, 0),
            (999, 999),
            (1001, 1001),
            (100_000, 1001),
            (165_535, 1001),
            (165_536, 1002),
            (231_071, 1002),
            (231_072, 231_072),
            (300_001, 300_001),
            (400_001, 400_001),
            (u32::MAX, 1001),
        ] {
            assert_eq!(table.of(uid), account, "{uid}");
        }
    }

    #[test]
    fn rereads_a_changed_file_and_keeps_learned_ids() {
        let dir = tempfile::tempdir().unwrap();
        let (subuid, passwd) = (dir.path().join("subuid"), dir.path().join("passwd"));
        std::fs::write(&passwd, PASSWD).unwrap();
        std::fs::write(&subuid, "ann:3000000000:10\n").unwrap();
        refresh_from(&subuid, &passwd);
        assert_eq!(of(3_000_000_001), 1001);
        std::fs::write(&subuid, "bob:3000000000:100\n").unwrap();
        refresh_from(&subuid, &passwd);
        assert_eq!(of(3_000_000_099), 1002);
        learn(3_100_000_000, 1003);
        learn(3_100_000_001, 0);
        assert_eq!((of(3_100_000_000), of(3_100_000_001)), (1003, 3_100_000_001));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "([a-z0-9]{0,5}:[0-9]{0,11}:[0-9]{0,11}\n|\\PC{0,20}\n){0,8}", uid: u32) {
            let table = AccountTable { ranges: parse(&text, PASSWD), ..AccountTable::default() };
            table.of(uid);
        }
    }
}
