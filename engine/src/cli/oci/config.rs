//! `oci print-config`: a config.json of the OCI runtime specification, with the devices of a pool.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::place::Place;
use super::profile::{Profile, read};
use crate::cli::{complete, out};
use crate::error::{Error, Kind, Result};
use crate::private::LIBUDEV;

/// Print a config.json with private loop devices, for runc, crun and what uses them.
///
/// Adds to that of a bundle what a container needs for the devices of a pool that was made with
/// 'loopengine instance mount --container': the pool's directory at /dev/loopfs and the names in /dev, its
/// /sys/block, exact device numbers, and the seccomp rules. What the container's capabilities are is
/// not changed. One pool is one container's at a time; print it again when the pool was made anew.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Config {
    /// The pool.
    #[arg(long, value_name = "NAME", add = complete::pools())]
    pool: String,

    /// Socket of the daemon for listeners [default: DIR/oci in the run directory].
    #[arg(long, value_name = "PATH")]
    listener: Option<PathBuf>,

    /// Ask that only fatal signals interrupt a call that is being answered (runc 1.2 or later).
    #[arg(long)]
    wait_killable: bool,

    /// The config.json, of 'runc spec' for instance.
    file: PathBuf,
}

impl Config {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let mut config = read(&self.file)?;
        let place = Place::find(run_dir, &self.pool)?;
        add(&mut config, &place)?;
        let profile = Profile {
            base: None,
            listener: self.listener,
            metadata: Some(format!("pool={}", place.name)),
            mount: place.mounting,
            wait_killable: self.wait_killable,
        };
        // A container that had no profile has one now that forbids nothing else.
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

fn add(config: &mut Value, place: &Place) -> Result<()> {
    // Twice would be two of everything.
    let annotations = object(config, "annotations")?;
    if let Some(other) = annotations.get(POOL) {
        let message = format!("the config.json has the private pool {other} already");
        return Err(Error::new(Kind::Exists, message).hint("give the one from before"));
    }
    annotations.insert(POOL.to_owned(), json!(place.name));
    let mounts = list(config.as_object_mut().ok_or_else(bad)?, "mounts")?;
    for (source, destination, options) in &place.mounts {
        mounts.push(
            json!({ "destination": destination, "type": "bind", "source": source, "options": options }),
        );
    }
    list(object(config, "process")?, "env")?.push(json!(format!("{}={}", LIBUDEV.0, LIBUDEV.1)));
    let hooks = list(object(config, "hooks")?, "createContainer")?;
    hooks.push(json!({ "path": place.program, "args": place.hook(0) }));
    let linux = object(config, "linux")?;
    let resources = linux.entry("resources").or_insert_with(|| json!({}));
    let devices = list(resources.as_object_mut().ok_or_else(bad)?, "devices")?;
    for (major, minor) in &place.numbers {
        // Not "m": a container must not make nodes of its own.
        devices.push(json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": "rw" }));
    }
    Ok(())
}

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
    Error::new(Kind::Invalid, "the file is no config.json of a bundle")
        .hint("make one with 'runc spec' or 'crun spec'")
}

#[cfg(test)]
mod tests {
    use super::super::place::tests::place;
    use super::*;

    #[test]
    fn what_is_there_stays() {
        let mut config = json!({
            "mounts": [{ "destination": "/proc" }], "process": { "args": ["sh"] },
            "linux": { "resources": { "devices": [{ "allow": false, "access": "rwm" }] }, "namespaces": [] },
        });
        add(&mut config, &place()).unwrap();
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
        assert_eq!(add(&mut config, &place()).unwrap_err().kind(), Kind::Exists);
    }

    #[test]
    fn what_is_none() {
        for mut bad in
            [json!(null), json!([]), json!({ "mounts": {} }), json!({ "linux": { "resources": 1 } })]
        {
            assert_eq!(add(&mut bad, &place()).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }
}
