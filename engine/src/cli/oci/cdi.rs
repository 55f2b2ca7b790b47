//! `oci print-cdi`: a specification of the Container Device Interface, of the devices of an instance or of
//! a pool for containers.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{major, minor};
use serde_json::{Value, json};

use super::place::Place;
use crate::cli::{complete, daemon, out};
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::DEFAULT_INSTANCE;
use crate::private::LIBUDEV;

/// Where what makes containers looks for specifications of what lives as long as the machine is up.
pub(super) const CDI_DIR: &str = "/run/cdi";
/// Who devices are by, in CDI's names.
pub(super) const CDI_KIND: &str = "loopengine.io/loop";

/// Print a CDI specification, for /var/run/cdi.
///
/// Of a pool for containers: all of it is one device, with mounts, exact device numbers and a hook; the
/// seccomp profile comes from print-profile. Of an instance: the devices that it has now.
/// It names exact device numbers: print it again when the pool was made anew, or devices of the
/// instance have come or gone.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Cdi {
    /// The instance.
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_INSTANCE, add = complete::instances())]
    instance: String,

    /// A pool that was made with 'loopengine instance mount --container', instead of an instance.
    #[arg(long, value_name = "NAME", conflicts_with = "instance", add = complete::pools())]
    pool: Option<String>,
}

/// A block device for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// N of loopN.
    number: u32,
    /// The node on the host.
    path: String,
    /// Its device number.
    rdev: u64,
    read_only: bool,
}

impl Cdi {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if let Some(name) = &self.pool {
            return out::json(&of_pool(&Place::find(run_dir, name)?)?).map(drop);
        }
        let which = Selector::Instance(self.instance.clone());
        let devices = daemon::ask(run_dir, async |client| client.devices(&which).await)?;
        let nodes = devices.into_iter().map(|device| {
            let node = &device.node;
            let meta = std::fs::metadata(node)
                .map_err(|error| Error::os(error, format!("cannot look at {node}")))?;
            if !meta.file_type().is_block_device() {
                let message = format!("{node} is a file, which containers take as a mount");
                return Err(Error::new(Kind::Unsupported, message).hint("serve with ublk"));
            }
            let (number, read_only) = (device.number, device.read_only);
            Ok(Node { number, path: device.node, rdev: meta.rdev(), read_only })
        });
        let nodes = nodes.collect::<Result<Vec<Node>>>()?;
        out::json(&cdi(&self.instance, &nodes)?).map(drop)
    }
}

fn check_name(name: &str) -> Result<()> {
    let ends = [name.chars().next(), name.chars().next_back()];
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.chars().all(fits) && ends.iter().all(|end| end.is_some_and(|c| c.is_ascii_alphanumeric())) {
        return Ok(());
    }
    let message = format!("the name {name:?} cannot be a device of CDI");
    Err(Error::new(Kind::Invalid, message).hint("it must start and end with a letter or digit"))
}

/// A pool as one device. CDI knows device numbers only as those of nodes: the hook takes the nodes away,
/// which would be another's when the pool has ended, and leaves their numbers allowed.
pub(super) fn of_pool(place: &Place) -> Result<Value> {
    check_name(&place.name)?;
    let nodes = place.numbers.iter().enumerate().map(|(at, (major, minor))| {
        let path = format!("/dev/loop{at}");
        json!({ "path": path, "type": "b", "major": major, "minor": minor, "permissions": "rw" })
    });
    let mounts = place
        .mounts
        .iter()
        .map(|(from, to, options)| json!({ "hostPath": from, "containerPath": to, "options": options }));
    let hook = json!({ "hookName": "createContainer", "path": place.program, "args": place.hook(place.numbers.len()) });
    let env = [format!("{}={}", LIBUDEV.0, LIBUDEV.1)];
    let edits = json!({ "env": env, "deviceNodes": nodes.collect::<Vec<_>>(), "mounts": mounts.collect::<Vec<_>>(), "hooks": [hook] });
    let device = json!({ "name": place.name, "containerEdits": edits });
    Ok(json!({ "cdiVersion": "0.5.0", "kind": CDI_KIND, "devices": [device] }))
}

/// A CDI specification: each node as a device, and all of them as one.
fn cdi(instance: &str, nodes: &[Node]) -> Result<Value> {
    check_name(instance)?;
    if nodes.is_empty() {
        let message = format!("the instance {instance} has no devices");
        return Err(Error::new(Kind::NotFound, message).hint("attach an image first"));
    }
    let node = |node: &Node| {
        json!({
            "path": format!("/dev/loop{}", node.number),
            "hostPath": node.path,
            "type": "b",
            "major": major(node.rdev),
            "minor": minor(node.rdev),
            // Not "m": a container must not make nodes of its own.
            "permissions": if node.read_only { "r" } else { "rw" },
        })
    };
    let device = |name: String, nodes: &[Node]| {
        let nodes: Vec<Value> = nodes.iter().map(node).collect();
        json!({ "name": name, "containerEdits": { "deviceNodes": nodes } })
    };
    let one = |node: &Node| device(format!("{instance}-loop{}", node.number), std::slice::from_ref(node));
    let mut devices: Vec<Value> = nodes.iter().map(one).collect();
    devices.push(device(instance.to_owned(), nodes));
    Ok(json!({ "cdiVersion": "0.5.0", "kind": CDI_KIND, "devices": devices }))
}

#[cfg(test)]
mod tests {
    use super::super::place::tests::place;
    use super::*;

    #[test]
    fn a_pool_is_one_device() {
        let spec = of_pool(&place()).unwrap();
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
    fn cdi_names_exact_nodes() {
        let node = |number, read_only| Node {
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
