// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A user namespace in which the caller is root.
//!
//! With newuidmap(1) and ranges in /etc/subuid and /etc/subgid, other users exist in it too;
//! without, only root exists. Root of the host maps all users to themselves.

use std::fs;
use std::io::Write;
use std::process::{Child, Command, Stdio};

use super::NAMESPACES;
use crate::error::{Error, Result};
use crate::sys;

/// Waits for the namespace, then writes maps that only a privileged helper can write: `$1` the
/// process; user, first id and length of the range; then the same for groups.
const MAP: &str =
    r#"read -r go && newuidmap "$1" 0 "$2" 1 1 "$3" "$4" && newgidmap "$1" 0 "$5" 1 1 "$6" "$7""#;

/// The map of all users.
const ALL: &str = "0 0 4294967295";

/// Enters a user namespace, with a mount namespace that receives mounts and propagates none.
pub(super) fn enter() -> Result<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // Started first, so that it stays outside.
    let helper = if uid == 0 { map_all() } else { map_ranges(uid, gid) };
    let cannot = |error| Error::os(error, "cannot enter a user namespace").hint(NAMESPACES);
    sys::userns::enter_own().map_err(cannot)?;
    if !helper.is_some_and(finish) {
        map_one(uid, gid).map_err(|error| Error::os(error, "cannot become root of a user namespace"))?;
    }
    super::make_mounts_slave().map_err(|error| Error::os(error, "cannot enter a private mount namespace"))
}

fn start(script: &str, words: &[String]) -> Option<Child> {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script, "sh", &std::process::id().to_string()]).args(words);
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
}

fn map_all() -> Option<Child> {
    let script = format!("read -r go && echo '{ALL}' >/proc/$1/uid_map && echo '{ALL}' >/proc/$1/gid_map");
    start(&script, &[])
}

fn map_ranges(uid: u32, gid: u32) -> Option<Child> {
    let name = user_name(uid);
    let (users, groups) =
        (range("/etc/subuid", uid, name.as_deref())?, range("/etc/subgid", uid, name.as_deref())?);
    let numbers = [uid, users.0, users.1, gid, groups.0, groups.1];
    start(MAP, &numbers.map(|number| number.to_string()))
}

/// Lets the helper write the maps.
fn finish(mut helper: Child) -> bool {
    let started = helper.stdin.take().is_some_and(|mut stdin| stdin.write_all(b"go\n").is_ok());
    helper.wait().is_ok_and(|status| started && status.success())
}

fn map_one(uid: u32, gid: u32) -> std::io::Result<()> {
    // The helper may have mapped the users and failed at the groups.
    let mapped = |map: &str| fs::read_to_string(map).is_ok_and(|text| !text.trim().is_empty());
    if !mapped("/proc/self/uid_map") {
        fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    }
    if !mapped("/proc/self/gid_map") {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

/// The name of a user in /etc/passwd.
pub(in crate::cli) fn user_name(uid: u32) -> Option<String> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

fn range(file: &str, uid: u32, name: Option<&str>) -> Option<(u32, u32)> {
    find_range(&fs::read_to_string(file).ok()?, uid, name)
}

/// First id and length of the first range in a file like subuid(5).
fn find_range(text: &str, uid: u32, name: Option<&str>) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let owner = fields.next()?;
        let (first, length) = (fields.next()?.trim().parse().ok()?, fields.next()?.trim().parse().ok()?);
        (Some(owner) == name || owner.parse() == Ok(uid)).then_some((first, length))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_ranges() {
        let text = "# none\nann:100000:65536\n1001:200000:10\nbob:x:1\nbob:300000:7\n";
        assert_eq!(find_range(text, 1000, Some("ann")), Some((100_000, 65536)));
        assert_eq!(find_range(text, 1001, Some("eve")), Some((200_000, 10)));
        assert_eq!(find_range(text, 1002, Some("bob")), Some((300_000, 7)));
        assert_eq!(find_range(text, 1003, None), None);
    }
}
