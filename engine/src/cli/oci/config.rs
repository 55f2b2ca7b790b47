// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `oci print-config`: adds the devices of a pool to a config.json of the OCI runtime
//! specification.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::pool_dir::PoolDir;
use super::profile::{PrintProfile, read};
use crate::cli::{complete, out};
use crate::error::{Error, Kind, Result};
use crate::private::LIBUDEV;

/// Print a config.json with private loop devices, for runc and crun.
///
/// Adds the devices of a pool that 'loopengine instance mount --container' created: the pool's
/// directory at /dev/loopfs, links in /dev, a private /sys/block, device numbers and seccomp rules.
/// Does not change the capabilities of the container. Only one container can use a pool at a time.
/// Print the file again after the pool was created again.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PrintConfig {
    /// Pool for containers.
    #[arg(long, value_name = "NAME", add = complete::pools())]
    pool: String,

    /// Socket of the daemon for seccomp listeners [default: oci in the run directory].
    #[arg(long, value_name = "PATH")]
    listener: Option<PathBuf>,

    /// Let only fatal signals interrupt an intercepted call (runc 1.2 or later).
    #[arg(long)]
    wait_killable: bool,

    /// The config.json of a bundle, for example from 'runc spec'.
    file: PathBuf,
}

impl PrintConfig {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let mut config = read(&self.file, SPEC)?;
        let dir = PoolDir::find(run_dir, &self.pool)?;
        add(&mut config, &dir)?;
        let profile = PrintProfile {
            base: None,
            listener: self.listener,
            metadata: Some(format!("pool={}", dir.name)),
            mount: dir.mounting,
            wait_killable: self.wait_killable,
        };
        // A container without a profile gets one that forbids nothing else.
        let config = if config.pointer("/linux/seccomp").is_some_and(Value::is_object) {
            profile.make(Some(config), run_dir)?
        } else {
            let alone = profile.make(None, run_dir)?;
            object(&mut config, "linux")?.insert("seccomp".to_owned(), alone);
            config
        };
        out::json(&config).map(drop)
    }
}

fn add(config: &mut Value, dir: &PoolDir) -> Result<()> {
    // Adding a pool twice would duplicate its entries.
    let annotations = object(config, "annotations")?;
    if let Some(other) = annotations.get(POOL) {
        let message = format!("the config.json already has the private pool {other}");
        return Err(Error::new(Kind::Exists, message)
            .hint("give a config.json without a pool, such as from 'runc spec'"));
    }
    annotations.insert(POOL.to_owned(), json!(dir.name));
    let mounts = list(config.as_object_mut().ok_or_else(bad)?, "mounts")?;
    for (source, destination, options) in &dir.mounts {
        mounts.push(
            json!({ "destination": destination, "type": "bind", "source": source, "options": options }),
        );
    }
    list(object(config, "process")?, "env")?.push(json!(format!("{}={}", LIBUDEV.0, LIBUDEV.1)));
    let hooks = list(object(config, "hooks")?, "createContainer")?;
    hooks.push(json!({ "path": dir.program, "args": dir.hook(0) }));
    let linux = object(config, "linux")?;
    let resources = linux.entry("resources").or_insert_with(|| json!({}));
    let devices = list(resources.as_object_mut().ok_or_else(bad)?, "devices")?;
    for (major, minor) in &dir.numbers {
        // Without "m": a container must not create nodes.
        devices.push(json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": "rw" }));
    }
    Ok(())
}

/// Where a config.json comes from.
pub(super) const SPEC: &str = "create one with 'runc spec' or 'crun spec'";

/// The annotation that names the pool.
const POOL: &str = "io.loopengine.pool";

fn object<'a>(config: &'a mut Value, key: &str) -> Result<&'a mut Map<String, Value>> {
    let whole = config.as_object_mut().ok_or_else(bad)?;
    whole.entry(key).or_insert_with(|| json!({})).as_object_mut().ok_or_else(bad)
}

fn list<'a>(map: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>> {
    map.entry(key).or_insert_with(|| json!([])).as_array_mut().ok_or_else(bad)
}

fn bad() -> Error {
    Error::new(Kind::Invalid, "the file is not the config.json of a bundle").hint(SPEC)
}

#[cfg(test)]
mod tests {
    use super::super::pool_dir::tests::pool_dir;
    use super::*;

    #[test]
    fn keeps_existing_entries() {
        let mut config = json!({
            "mounts": [{ "destination": "/proc" }], "process": { "args": ["sh"] },
            "linux": { "resources": { "devices": [{ "allow": false, "access": "rwm" }] }, "namespaces": [] },
        });
        add(&mut config, &pool_dir()).unwrap();
        let process = json!({ "args": ["sh"], "env": ["SYSTEMD_DEVICE_VERIFY_SYSFS=0"] });
        assert_eq!(config["process"], process);
        assert_eq!(config["mounts"][0], json!({ "destination": "/proc" }));
        let dev = json!({ "destination": "/dev/loopfs", "type": "bind", "source": "/srv/ci/dev",
            "options": ["bind", "nosuid", "noexec"] });
        assert_eq!((&config["mounts"][1], config["mounts"].as_array().unwrap().len()), (&dev, 5));
        let devices = config["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(devices[0]["allow"], false);
        let last = json!({ "allow": true, "type": "b", "major": 259, "minor": 300, "access": "rw" });
        assert_eq!((&devices[2], devices.len()), (&last, 3));
        let hook = &config["hooks"]["createContainer"][0];
        assert_eq!(hook["args"], json!(["loopengine", "oci", "hook", "--devices", "2", "--pool", "ci"]));
        assert_eq!(add(&mut config, &pool_dir()).unwrap_err().kind(), Kind::Exists);
    }

    #[test]
    fn refuses_other_json() {
        for mut bad in
            [json!(null), json!([]), json!({ "mounts": {} }), json!({ "linux": { "resources": 1 } })]
        {
            assert_eq!(add(&mut bad, &pool_dir()).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }
}
