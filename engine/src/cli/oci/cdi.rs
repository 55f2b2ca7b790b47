// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `oci print-cdi`: a Container Device Interface specification of an instance or of a pool for
//! containers.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, minor};
use serde_json::{Value, json};

use super::pool_dir::PoolDir;
use crate::cli::{complete, daemon, out};
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::DEFAULT_INSTANCE;
use crate::private::LIBUDEV;

/// Directory of runtime CDI specifications.
pub(super) const CDI_DIR: &str = "/run/cdi";
/// Vendor and class of our devices in CDI.
pub(super) const CDI_KIND: &str = "loopengine.io/loop";

/// Print a CDI specification, for /var/run/cdi.
///
/// For a pool for containers: one CDI device with mounts, device numbers and a hook;
/// 'print-profile' prints its seccomp profile. For an instance: its current devices. The
/// specification contains device numbers. Print it again after the pool was created again, or after
/// devices of the instance changed.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PrintCdi {
    /// Instance.
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_INSTANCE, add = complete::instances())]
    instance: String,

    /// Pool that 'loopengine instance mount --container' created, instead of an instance.
    #[arg(long, value_name = "NAME", conflicts_with = "instance", add = complete::pools())]
    pool: Option<String>,
}

/// A block device for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CdiNode {
    /// N of loopN.
    number: u32,
    /// Path of the node on the host.
    path: String,
    /// Device number.
    rdev: u64,
    read_only: bool,
}

impl PrintCdi {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if let Some(name) = &self.pool {
            return out::json(&of_pool(&PoolDir::find(run_dir, name)?)?).map(drop);
        }
        let which = Selector::Instance(self.instance.clone());
        let devices = daemon::ask(run_dir, async |client| client.devices(&which).await)?;
        let nodes = devices.into_iter().map(|device| {
            let node = &device.node;
            let meta =
                std::fs::metadata(node).map_err(|error| Error::os(error, format!("cannot access {node}")))?;
            if !meta.file_type().is_block_device() {
                let message = format!("{node} is a file, not a block device");
                return Err(Error::new(Kind::Unsupported, message).hint(
                    "use an instance with the backend ublk or loop, or mount the file into the container",
                ));
            }
            let (number, read_only) = (device.number, device.read_only);
            Ok(CdiNode { number, path: device.node, rdev: meta.rdev(), read_only })
        });
        let nodes = nodes.collect::<Result<Vec<CdiNode>>>()?;
        out::json(&cdi(&self.instance, &nodes)?).map(drop)
    }
}

fn check_name(name: &str) -> Result<()> {
    let ends = [name.chars().next(), name.chars().next_back()];
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.chars().all(fits) && ends.iter().all(|end| end.is_some_and(|c| c.is_ascii_alphanumeric())) {
        return Ok(());
    }
    let message = format!("the name {name:?} is not valid in CDI");
    Err(Error::new(Kind::Invalid, message).hint("use a name that starts and ends with a letter or digit"))
}

/// A pool as one CDI device. CDI allows device numbers only for nodes. The hook removes the nodes,
/// which could belong to another pool later, and their numbers stay allowed.
pub(super) fn of_pool(dir: &PoolDir) -> Result<Value> {
    check_name(&dir.name)?;
    let nodes = dir.numbers.iter().enumerate().map(|(at, (major, minor))| {
        let path = format!("/dev/loop{at}");
        json!({ "path": path, "type": "b", "major": major, "minor": minor, "permissions": "rw" })
    });
    let mounts = dir
        .mounts
        .iter()
        .map(|(from, to, options)| json!({ "hostPath": from, "containerPath": to, "options": options }));
    let hook =
        json!({ "hookName": "createContainer", "path": dir.program, "args": dir.hook(dir.numbers.len()) });
    let env = [format!("{}={}", LIBUDEV.0, LIBUDEV.1)];
    let edits = json!({ "env": env, "deviceNodes": nodes.collect::<Vec<_>>(), "mounts": mounts.collect::<Vec<_>>(), "hooks": [hook] });
    let device = json!({ "name": dir.name, "containerEdits": edits });
    Ok(json!({ "cdiVersion": "0.5.0", "kind": CDI_KIND, "devices": [device] }))
}

/// A CDI specification: each node as a device, and all of them as one.
fn cdi(instance: &str, nodes: &[CdiNode]) -> Result<Value> {
    check_name(instance)?;
    if nodes.is_empty() {
        let message = format!("the instance {instance} has no devices");
        return Err(Error::new(Kind::NotFound, message).hint("attach an image first"));
    }
    let node = |node: &CdiNode| {
        json!({
            "path": format!("/dev/loop{}", node.number),
            "hostPath": node.path,
            "type": "b",
            "major": major(node.rdev),
            "minor": minor(node.rdev),
            // Without "m": a container must not create nodes.
            "permissions": if node.read_only { "r" } else { "rw" },
        })
    };
    let device = |name: String, nodes: &[CdiNode]| {
        let nodes: Vec<Value> = nodes.iter().map(node).collect();
        json!({ "name": name, "containerEdits": { "deviceNodes": nodes } })
    };
    let one = |node: &CdiNode| device(format!("{instance}-loop{}", node.number), std::slice::from_ref(node));
    let mut devices: Vec<Value> = nodes.iter().map(one).collect();
    devices.push(device(instance.to_owned(), nodes));
    Ok(json!({ "cdiVersion": "0.5.0", "kind": CDI_KIND, "devices": devices }))
}

#[cfg(test)]
mod tests {
    use super::super::pool_dir::tests::pool_dir;
    use super::*;

    #[test]
    fn describes_a_pool_as_one_device() {
        let spec = of_pool(&pool_dir()).unwrap();
        let edits = &spec["devices"][0]["containerEdits"];
        assert_eq!(spec["devices"][0]["name"], "ci");
        let node =
            json!({ "path": "/dev/loop1", "type": "b", "major": 259, "minor": 300, "permissions": "rw" });
        assert_eq!(edits["deviceNodes"][1], node);
        assert_eq!(edits["env"], json!(["SYSTEMD_DEVICE_VERIFY_SYSFS=0"]));
        assert_eq!(edits["mounts"][0]["containerPath"], "/dev/loopfs");
        assert_eq!(
            edits["hooks"][0]["args"],
            json!(["loopengine", "oci", "hook", "--devices", "2", "--pool", "ci", "--nodes", "2"])
        );
    }

    #[test]
    fn lists_exact_device_numbers() {
        let node = |number, read_only| CdiNode {
            number,
            path: format!("/dev/ublkb{}", number + 7),
            rdev: rustix::fs::makedev(259, 300 + number),
            read_only,
        };
        let spec = cdi("ci", &[node(0, false), node(3, true)]).unwrap();
        assert_eq!((&spec["cdiVersion"], &spec["kind"]), (&json!("0.5.0"), &json!("loopengine.io/loop")));
        let names: Vec<&Value> =
            spec["devices"].as_array().unwrap().iter().map(|device| &device["name"]).collect();
        assert_eq!(names, ["ci-loop0", "ci-loop3", "ci"]);
        let three = json!({ "path": "/dev/loop3", "hostPath": "/dev/ublkb10", "type": "b", "major": 259,
            "minor": 303, "permissions": "r" });
        assert_eq!(spec["devices"][1]["containerEdits"]["deviceNodes"], json!([three]));
        assert_eq!(spec["devices"][2]["containerEdits"]["deviceNodes"].as_array().unwrap().len(), 2);
        assert_eq!(cdi("ci", &[]).unwrap_err().kind(), Kind::NotFound);
        for name in ["_ci", "ci.", "a/b", ""] {
            assert_eq!(cdi(name, &[node(0, false)]).unwrap_err().kind(), Kind::Invalid);
        }
    }
}
