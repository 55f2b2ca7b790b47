// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `oci print-profile`: a seccomp profile that forwards calls on loop devices to the daemon.
//!
//! Knows the profile format, and how libseccomp selects rules. Does not know what the socket in the
//! profile does.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cli::out;
use crate::error::{Error, Kind, Result};

/// Socket in the run directory for seccomp listeners of runtimes.
const LISTENER: &str = "oci";
/// Maximum size of a profile.
const BASE_MAX: u64 = 4 << 20;
/// LOOP_* and LOOP_CTL_* are 0x4c00 to 0x4cff, in the 32 bits that the kernel reads.
const LOOP: u64 = 0x4c00;
const LOOP_MASK: u64 = 0xffff_ff00;
/// BLKRRPART and BLKPG.
const PARTITIONS: [u64; 2] = [0x125f, 0x1269];
/// The file type bits of a mode.
const KIND_MASK: u32 = libc::S_IFMT;
/// All file types except block devices.
const OTHER_KINDS: [u32; 7] =
    [0, libc::S_IFREG, libc::S_IFCHR, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFDIR, libc::S_IFLNK];
/// Calls that create nodes, with the index of the mode argument.
const MAKE_NODES: [(&str, u32); 2] = [("mknod", 1), ("mknodat", 2)];
/// Intercepted mount calls.
const MOUNT: [&str; 2] = ["mount", "umount2"];
/// The newer mount API, which the profile disables: programs then use mount(2).
const NEW_MOUNT_API: [&str; 4] = ["fsopen", "fsconfig", "fsmount", "fspick"];

/// Print a seccomp profile that forwards loop ioctls to loopengine.
///
/// A profile replaces the profile of the runtime: give that with '--base', or the container may
/// call everything else. The profile forbids creating block nodes, since a node would outlive the
/// device with its number.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PrintProfile {
    /// Profile to extend: of Docker, Podman or containerd, or a config.json.
    #[arg(long, value_name = "FILE")]
    pub(super) base: Option<PathBuf>,

    /// Socket of the daemon for seccomp listeners [default: oci in the run directory].
    #[arg(long, value_name = "PATH")]
    pub(super) listener: Option<PathBuf>,

    /// Text that the runtime sends with the listener, for example pool=NAME.
    #[arg(long, value_name = "TEXT")]
    pub(super) metadata: Option<String>,

    /// Forward mount and umount2 too. The kernel then mounts for a container without CAP_SYS_ADMIN,
    /// if its pool was created with 'instance mount --mount'.
    #[arg(long)]
    pub(super) mount: bool,

    /// Let only fatal signals interrupt an intercepted call (runc 1.2 or later).
    #[arg(long)]
    pub(super) wait_killable: bool,
}

impl PrintProfile {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let base = self.base.as_deref().map(|path| read(path, OTHER_BASE)).transpose()?;
        out::json(&self.make(base, run_dir)?).map(drop)
    }

    /// Returns `base` with our rules.
    pub(super) fn make(&self, base: Option<Value>, run_dir: &Path) -> Result<Value> {
        let listener = self.listener.clone().unwrap_or_else(|| run_dir.join(LISTENER));
        let Some(listener) = listener.to_str().filter(|path| path.starts_with('/')) else {
            let message = format!("'{}' is not the absolute path of a listener", listener.display());
            return Err(Error::new(Kind::Invalid, message).hint("give an absolute path with --listener"));
        };
        self.profile(base, listener)
    }

    fn profile(&self, base: Option<Value>, listener: &str) -> Result<Value> {
        let bad = || {
            Error::new(Kind::Invalid, "the base is not a seccomp profile")
                .hint("give a JSON object with 'defaultAction' and 'syscalls'")
        };
        let mut whole = base.unwrap_or_else(allow_all);
        // A config.json contains the profile.
        let inside = match whole.pointer("/linux/seccomp") {
            Some(_) => whole.pointer_mut("/linux/seccomp"),
            None => Some(&mut whole),
        };
        let profile = inside.and_then(Value::as_object_mut).ok_or_else(bad)?;
        if !profile.get("defaultAction").is_some_and(Value::is_string) {
            return Err(bad());
        }
        if let Some(other) = profile.get("listenerPath").and_then(Value::as_str)
            && other != listener
        {
            let message = format!("the base already has a listener: {other}");
            return Err(Error::new(Kind::Exists, message)
                .hint("give a base without a listener: a container can have only one"));
        }
        profile.insert("listenerPath".to_owned(), json!(listener));
        if let Some(metadata) = &self.metadata {
            profile.insert("listenerMetadata".to_owned(), json!(metadata));
        }
        if self.wait_killable {
            let flags = profile.entry("flags").or_insert_with(|| json!([]));
            let flags = flags.as_array_mut().ok_or_else(bad)?;
            flags.push(json!("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"));
        }
        let rules = profile.entry("syscalls").or_insert_with(|| json!([]));
        let rules = rules.as_array_mut().ok_or_else(bad)?;
        let mut kept = Vec::new();
        for rule in std::mem::take(rules) {
            kept.extend(self.split_rule(rule).ok_or_else(bad)?);
        }
        let is_loop = argument("SCMP_CMP_MASKED_EQ", LOOP_MASK, Some(LOOP));
        let of_partitions =
            PARTITIONS.map(|value| argument("SCMP_CMP_MASKED_EQ", u64::from(u32::MAX), Some(value)));
        for condition in std::iter::once(is_loop).chain(of_partitions) {
            kept.push(json!({ "names": ["ioctl"], "action": "SCMP_ACT_NOTIFY", "args": [condition] }));
        }
        for (call, mode) in MAKE_NODES {
            let block = kind(mode, libc::S_IFBLK);
            kept.push(json!({ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM, "args": [block] }));
        }
        if self.mount {
            kept.push(json!({ "names": MOUNT, "action": "SCMP_ACT_NOTIFY" }));
            kept.push(
                json!({ "names": NEW_MOUNT_API, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }),
            );
        }
        *rules = kept;
        Ok(whole)
    }

    /// Rewrites a rule of the base that conflicts with ours. libseccomp prefers rules without
    /// conditions. So an unconditional "ioctl" becomes rules for all other ioctls, and an
    /// unconditional "mknod" one rule per other file type.
    fn split_rule(&self, rule: Value) -> Option<Vec<Value>> {
        let Value::Object(mut rule) = rule else { return None };
        let unconditional = rule.get("args").and_then(Value::as_array).is_none_or(Vec::is_empty);
        let mut names: Vec<Value> = match (rule.get("names"), rule.get("name")) {
            (Some(Value::Array(names)), _) => names.clone(),
            (_, Some(name)) => vec![name.clone()],
            _ => return None,
        };
        let before = names.len();
        let is_ours = |name: &Value| name == "ioctl" || MAKE_NODES.iter().any(|(call, _)| name == call);
        let is_mount = |name: &Value| MOUNT.iter().chain(&NEW_MOUNT_API).any(|call| name == call);
        names.retain(|name| !(unconditional && is_ours(name) || self.mount && is_mount(name)));
        if names.len() == before {
            return Some(vec![Value::Object(rule)]);
        }
        let had_ioctl = unconditional && has(&rule, "ioctl");
        let had_nodes = MAKE_NODES.into_iter().filter(|(call, _)| unconditional && has(&rule, call));
        let had_nodes: Vec<_> = had_nodes.collect();
        rule.remove("name");
        let mut rules = Vec::new();
        if !names.is_empty() {
            let rest = with(&rule, "names", Value::Array(names));
            rules.push(Value::Object(rest));
        }
        if had_ioctl {
            for condition in other_ioctls() {
                let rule = with(&rule, "names", json!(["ioctl"]));
                rules.push(Value::Object(with(&rule, "args", json!([condition]))));
            }
        }
        for (call, mode) in had_nodes {
            for other in OTHER_KINDS {
                let rule = with(&rule, "names", json!([call]));
                rules.push(Value::Object(with(&rule, "args", json!([kind(mode, other)]))));
            }
        }
        Some(rules)
    }
}

/// A condition on the file type of a new node.
fn kind(mode: u32, kind: u32) -> Value {
    json!({ "index": mode, "value": KIND_MASK, "valueTwo": kind, "op": "SCMP_CMP_MASKED_EQ" })
}

/// Conditions for all ioctls that are not ours. A rule can have one condition per argument, so
/// ranges between our ioctls are split into aligned blocks of powers of two.
fn other_ioctls() -> Vec<Value> {
    let [first, second] = PARTITIONS;
    let mut conditions = vec![argument("SCMP_CMP_LT", first, None)];
    for (mut at, end) in [(first + 1, second), (second + 1, LOOP)] {
        while at < end {
            let mut size = 1 << at.trailing_zeros();
            while at + size > end {
                size /= 2;
            }
            conditions.push(argument("SCMP_CMP_MASKED_EQ", !(size - 1), Some(at)));
            at += size;
        }
    }
    conditions.push(argument("SCMP_CMP_GT", LOOP | 0xff, None));
    conditions
}

/// A condition on the request of an ioctl.
fn argument(operator: &str, value: u64, two: Option<u64>) -> Value {
    match two {
        Some(two) => json!({ "index": 1, "value": value, "valueTwo": two, "op": operator }),
        None => json!({ "index": 1, "value": value, "op": operator }),
    }
}

fn has(rule: &Map<String, Value>, call: &str) -> bool {
    let named = rule.get("names").and_then(Value::as_array).is_some_and(|names| names.contains(&json!(call)));
    named || rule.get("name").is_some_and(|name| name == call)
}

fn with(rule: &Map<String, Value>, key: &str, value: Value) -> Map<String, Value> {
    let mut rule = rule.clone();
    rule.insert(key.to_owned(), value);
    rule
}

/// A profile that forbids nothing.
fn allow_all() -> Value {
    let architectures: &[&str] = match std::env::consts::ARCH {
        "x86_64" => &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "aarch64" => &["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        _ => &[],
    };
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": [] })
}

/// The next step if the profile to extend is missing.
pub(super) const OTHER_BASE: &str = "give another seccomp profile with --base";

pub(super) fn read(path: &Path, if_missing: &str) -> Result<Value> {
    let shown = path.display();
    let cannot = |error: std::io::Error| {
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let error = Error::os(error, format!("cannot read {shown}"));
        if missing { error.hint(if_missing) } else { error }
    };
    let mut text = Vec::new();
    let file = File::open(path).map_err(cannot)?;
    file.take(BASE_MAX + 1).read_to_end(&mut text).map_err(cannot)?;
    if text.len() as u64 > BASE_MAX {
        return Err(Error::new(Kind::Invalid, format!("{shown} is too large for a seccomp profile"))
            .hint("give a seccomp profile, or a config.json"));
    }
    serde_json::from_slice(&text).map_err(|error| {
        Error::new(Kind::Invalid, format!("{shown} is not valid JSON: {error}"))
            .hint("give a seccomp profile, or a config.json")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/run/loopengine/oci";

    fn args() -> PrintProfile {
        PrintProfile { base: None, listener: None, metadata: None, mount: false, wait_killable: false }
    }

    fn ours() -> [Value; 3] {
        [(0xffff_ff00_u32, 0x4c00), (u32::MAX, 0x125f), (u32::MAX, 0x1269)].map(|(mask, value)| {
            json!({ "names": ["ioctl"], "action": "SCMP_ACT_NOTIFY", "args": [
                { "index": 1, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" }] })
        })
    }

    /// True if a condition matches a request.
    fn holds(condition: &Value, command: u64) -> bool {
        let value = |name: &str| condition[name].as_u64().unwrap();
        match condition["op"].as_str().unwrap() {
            "SCMP_CMP_LT" => command < value("value"),
            "SCMP_CMP_GT" => command > value("value"),
            "SCMP_CMP_MASKED_EQ" => command & value("value") == value("valueTwo"),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn covers_every_ioctl_once() {
        let (ours, other_ioctls) = (ours(), other_ioctls());
        for command in (0..0x1_0000).chain([0x8008_1272, 0xffff_ffff]) {
            let is_ours = ours.iter().any(|rule| holds(&rule["args"][0], command));
            let is_other = other_ioctls.iter().filter(|condition| holds(condition, command)).count();
            assert_eq!(is_other, usize::from(!is_ours), "{command:x}");
        }
    }

    fn no_nodes() -> [Value; 2] {
        [("mknod", 1), ("mknodat", 2)].map(|(call, mode)| {
            json!({ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [
                { "index": mode, "value": 0o170000, "valueTwo": 0o060000, "op": "SCMP_CMP_MASKED_EQ" }] })
        })
    }

    #[test]
    fn allows_nodes_of_other_types() {
        let base = json!({ "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{ "names": ["mknod", "read"], "action": "SCMP_ACT_ALLOW" }] });
        let profile = args().profile(Some(base), PATH).unwrap();
        let rules = profile["syscalls"].as_array().unwrap();
        assert_eq!(rules[0]["names"], json!(["read"]));
        let kinds: Vec<u64> =
            rules[1..8].iter().map(|rule| rule["args"][0]["valueTwo"].as_u64().unwrap()).collect();
        assert!(
            rules[1..8].iter().all(|rule| rule["names"] == json!(["mknod"]) && rule["args"][0]["index"] == 1)
        );
        assert!(kinds.contains(&0o020000) && !kinds.contains(&0o060000), "{kinds:?}");
        assert_eq!(rules[8..11], ours());
    }

    #[test]
    fn makes_a_profile_without_a_base() {
        let profile = PrintProfile { metadata: Some("pool=ci".to_owned()), mount: true, ..args() };
        let profile = profile.profile(None, PATH).unwrap();
        assert_eq!(profile["listenerPath"], PATH);
        assert_eq!(profile["listenerMetadata"], "pool=ci");
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ALLOW");
        let mount = json!({ "names": ["mount", "umount2"], "action": "SCMP_ACT_NOTIFY" });
        let anew = json!({ "names": ["fsopen", "fsconfig", "fsmount", "fspick"], "action": "SCMP_ACT_ERRNO",
            "errnoRet": 38 });
        let [mknod, mknodat] = no_nodes();
        let [loops, reread, blkpg] = ours();
        assert_eq!(profile["syscalls"], json!([loops, reread, blkpg, mknod, mknodat, mount, anew]));
    }

    #[test]
    fn rewrites_only_conflicting_rules() {
        let base = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "archMap": [{ "architecture": "x" }],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                { "names": ["read", "ioctl", "write"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["mount", "umount2"], "action": "SCMP_ACT_ALLOW", "includes": { "caps": ["CAP_SYS_ADMIN"] } },
                { "names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "args": [{ "index": 1, "value": 1, "op": "SCMP_CMP_EQ" }] },
                { "name": "ioctl", "action": "SCMP_ACT_LOG", "args": [] },
            ],
        });
        let split = |action: &str| -> Vec<Value> {
            let rule = |arg| json!({ "names": ["ioctl"], "action": action, "args": [arg] });
            other_ioctls().into_iter().map(rule).collect()
        };
        let mut rules = vec![json!({ "names": ["read", "write"], "action": "SCMP_ACT_ALLOW" })];
        rules.extend(split("SCMP_ACT_ALLOW"));
        rules.extend([base["syscalls"][1].clone(), base["syscalls"][2].clone()]);
        rules.extend(split("SCMP_ACT_LOG"));
        rules.extend(ours().into_iter().chain(no_nodes()));
        let profile = args().profile(Some(base.clone()), PATH).unwrap();
        assert_eq!(profile["syscalls"], json!(rules));
        for kept in ["defaultAction", "defaultErrnoRet", "archMap", "flags"] {
            assert_eq!(profile[kept], base[kept]);
        }
        // A config.json, with mount.
        let config = json!({ "process": { "args": ["sh"] }, "linux": { "seccomp": base } });
        let profile = PrintProfile { mount: true, wait_killable: true, ..args() };
        let profile = profile.profile(Some(config), PATH).unwrap();
        assert_eq!(profile["process"]["args"][0], "sh");
        let seccomp = &profile["linux"]["seccomp"];
        let rules = seccomp["syscalls"].as_array().unwrap();
        let mount =
            |rule: &&Value| rule["names"].as_array().is_some_and(|names| names.contains(&json!("umount2")));
        assert_eq!(rules.iter().filter(mount).count(), 1, "removes the rule of the base");
        assert_eq!(seccomp["flags"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn refuses_invalid_bases() {
        let allow = |more: Value| {
            let mut base = json!({ "defaultAction": "SCMP_ACT_ALLOW" });
            base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            base
        };
        args().profile(Some(allow(json!({}))), PATH).unwrap();
        args().profile(Some(allow(json!({ "listenerPath": PATH }))), PATH).unwrap();
        let other = args().profile(Some(allow(json!({ "listenerPath": "/x" }))), PATH);
        assert_eq!(other.unwrap_err().kind(), Kind::Exists);
        for bad in [
            json!(null),
            json!([]),
            json!({}),
            json!({ "linux": { "seccomp": null } }),
            allow(json!({ "syscalls": 1 })),
            allow(json!({ "syscalls": [1] })),
            allow(json!({ "syscalls": [{ "action": "x" }] })),
        ] {
            assert_eq!(args().profile(Some(bad.clone()), PATH).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }
}
