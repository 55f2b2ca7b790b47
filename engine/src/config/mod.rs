// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration file, and every default that a user can change.
//!
//! Knows TOML and the specifications of instances. Checks the form of values; the instance that
//! gets a value checks its meaning.

mod device;
pub mod number;
pub mod size;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::accounts;
use crate::error::{Error, Kind, Result};
use crate::instance::spec::{BackendKind, DEFAULT_INSTANCE, InstanceSpec};
use crate::instance::{EngineConfig, Tuning};
use crate::kernel_mounts::{FileSystem, policy};
use crate::limits::{USER_DEVICES, USER_POOLS};
use crate::private::{Defaults, UserLimit};
pub use device::DeviceTable;

/// Directory of the daemon's sockets, state and device names.
pub const RUN_DIR: &str = "/run/loopengine";

/// Default configuration file of `serve`; may be missing.
pub const CONFIG_FILE: &str = "/etc/loopengine.toml";

/// Default device limit of an instance.
pub const MAX_DEVICES: u32 = 256;

/// Default worker options: those that measured best.
pub const TUNING: Tuning = Tuning { linked_commit: true };

/// Default limits per user of private pools.
pub const PRIVATE: Defaults = Defaults { devices: USER_DEVICES, pools: USER_POOLS };

/// Maximum size of a configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A configuration file, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The backend of instances and pools that ask for none.
    pub backend: Option<BackendChoice>,
    /// The lowest number of devices of the kernel's loop driver.
    pub first_loop_number: Option<u32>,
    /// Devices also have names below /dev.
    #[serde(default)]
    pub dev_links: bool,
    /// The instance `default`.
    #[serde(default)]
    pub default: DefaultTable,
    /// Options of all workers.
    #[serde(default)]
    pub tuning: TuningTable,
    /// Limits per user of private pools.
    #[serde(default)]
    pub private: PrivateTable,
    /// Instances to create at start.
    #[serde(default)]
    pub instance: Vec<InstanceTable>,
    /// Devices to attach at start.
    #[serde(default)]
    pub device: Vec<Spanned<DeviceTable>>,
}

/// `backend`, and `serve --backend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The first of the others that the kernel has.
    #[default]
    Auto,
    /// Block devices that the daemon serves.
    Ublk,
    /// Block devices that the kernel's loop driver serves.
    Loop,
    /// Files, through FUSE.
    Fuse,
}

/// `[default]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefaultTable {
    /// Maximum number of devices.
    pub max_devices: Option<u32>,
    /// Worker threads; 0 or none: one per usable CPU.
    pub workers: Option<u32>,
    /// CPUs that the workers may run on.
    pub cpus: Option<String>,
}

/// `[tuning]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuningTable {
    /// See [`Tuning::linked_commit`].
    pub linked_commit: Option<bool>,
}

/// `[private]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrivateTable {
    /// Devices of all private pools of one user.
    pub max_per_user: Option<u32>,
    /// Private pools of one user.
    pub max_pools_per_user: Option<u32>,
    /// File systems that the kernel may mount for users, from their devices.
    #[serde(default)]
    pub kernel_mounts: Vec<String>,
    /// What serves the disks of pools that ask for no backend: ublk or loop.
    pub backend: Option<BackendKind>,
    /// Limits of single users.
    #[serde(default)]
    pub user: Vec<Spanned<UserTable>>,
}

/// `[[private.user]]`. Missing values have the general limit.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserTable {
    /// The user's name in /etc/passwd, or number.
    #[serde(deserialize_with = "device::number_or_text")]
    pub user: String,
    /// Devices of all its private pools.
    pub max_devices: Option<u32>,
    /// Its private pools.
    pub max_pools: Option<u32>,
}

/// `[[instance]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceTable {
    /// Its name.
    pub name: String,
    /// Maximum number of devices.
    pub max_devices: Option<u32>,
    /// Worker threads; 0 or none: one per usable CPU.
    pub workers: Option<u32>,
    /// CPUs that the workers may run on.
    pub cpus: Option<String>,
    /// Backend of its disks.
    pub backend: Option<BackendKind>,
}

impl Config {
    /// Reads `file`, or [`CONFIG_FILE`] if none is given; the latter may be missing.
    pub fn load(file: Option<&Path>) -> Result<Config> {
        let path = file.unwrap_or(Path::new(CONFIG_FILE));
        let text = match read(path) {
            Ok(text) => text,
            Err(error) if file.is_none() && error.kind() == Kind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        Config::parse(&text, &path.display().to_string())
    }

    /// Parses `text`; `name` is its name in errors.
    pub fn parse(text: &str, name: &str) -> Result<Config> {
        let location = |start: usize| {
            let line = 1 + text.bytes().take(start).filter(|&byte| byte == b'\n').count();
            format!("{name}, line {line}")
        };
        let mut config: Config = toml::from_str(text).map_err(|error| {
            let message = error.message().replace('\n', ", ");
            invalid(format!("{}: {message}", location(error.span().map_or(0, |span| span.start))))
        })?;
        for table in &mut config.device {
            table.get_mut().location = location(table.span().start);
        }
        config.check(name)?;
        config.check_devices()?;
        let users = &config.private.user;
        for (at, table) in users.iter().enumerate() {
            let user = &table.get_ref().user;
            if users[..at].iter().any(|other| other.get_ref().user == *user) {
                let message = format!("{}: the user '{user}' appears twice", location(table.span().start));
                return Err(invalid(message));
            }
        }
        Ok(config)
    }

    fn check_devices(&self) -> Result<()> {
        for (at, table) in self.devices().enumerate() {
            let DeviceTable { image, instance, number, location, .. } = table;
            for other in self.devices().take(at) {
                if table.same_device(other) {
                    let message =
                        format!("{location}: the image {image} appears twice in the instance '{instance}'");
                    return Err(invalid(message));
                }
                if let (Some(number), true) = (number, other.instance == *instance)
                    && other.number == Some(*number)
                {
                    let message =
                        format!("{location}: loop{number} of the instance '{instance}' appears twice");
                    return Err(invalid(message));
                }
            }
        }
        Ok(())
    }

    fn check(&self, name: &str) -> Result<()> {
        for (at, table) in self.instance.iter().enumerate() {
            if table.name == DEFAULT_INSTANCE {
                return Err(invalid(format!(
                    "{name}: the instance '{DEFAULT_INSTANCE}' is configured in [default], not in [[instance]]"
                )));
            }
            if self.instance[..at].iter().any(|other| other.name == table.name) {
                return Err(invalid(format!("{name}: the instance '{}' appears twice", table.name)));
            }
        }
        let limits = self.instance.iter().map(|table| table.max_devices);
        if limits.chain([self.default.max_devices]).any(|max| max == Some(0)) {
            return Err(invalid(format!("{name}: max_devices must be 1 or more")));
        }
        if self.private.backend == Some(BackendKind::Fuse) {
            let message = "[private], backend: a private pool has block devices, not files";
            return Err(Error::new(Kind::Invalid, message).hint("set it to 'ublk' or 'loop', or remove it"));
        }
        for listed in &self.private.kernel_mounts {
            let unknown = |error: Error| {
                let hint = error.next_step().unwrap_or_default().to_owned();
                Error::new(error.kind(), format!("{name}, kernel_mounts: {}", error.message())).hint(hint)
            };
            policy::find_or_err(listed).map_err(unknown)?;
        }
        Ok(())
    }

    /// The instance `default`.
    pub fn default_instance(&self) -> InstanceSpec {
        InstanceSpec {
            name: DEFAULT_INSTANCE.to_owned(),
            max_devices: self.default.max_devices.unwrap_or(MAX_DEVICES),
            workers: self.default.workers.unwrap_or(0),
            cpus: self.default.cpus.clone(),
            backend: None,
        }
    }

    /// The other instances.
    pub fn instances(&self) -> impl Iterator<Item = InstanceSpec> + '_ {
        self.instance.iter().map(|table| InstanceSpec {
            name: table.name.clone(),
            max_devices: table.max_devices.unwrap_or(MAX_DEVICES),
            workers: table.workers.unwrap_or(0),
            cpus: table.cpus.clone(),
            backend: table.backend,
        })
    }

    /// Devices to attach.
    pub fn devices(&self) -> impl Iterator<Item = &DeviceTable> {
        self.device.iter().map(Spanned::get_ref)
    }

    /// What single users may have of private pools, and why that of others is not known.
    pub fn users(&self) -> (BTreeMap<u32, UserLimit>, Vec<Error>) {
        let (mut users, mut unknown) = (BTreeMap::new(), Vec::new());
        for UserTable { user, max_devices, max_pools } in self.private.user.iter().map(Spanned::get_ref) {
            match accounts::uid_of(user) {
                Ok(uid) => {
                    let limit = UserLimit { devices: *max_devices, pools: *max_pools };
                    if users.insert(uid, limit).is_some() {
                        let message = format!("user {uid} appears twice, as '{user}' and under another name");
                        unknown.push(invalid(message));
                    }
                }
                Err(error) => unknown.push(error),
            }
        }
        (users, unknown)
    }

    /// Worker options.
    pub fn tuning(&self) -> Tuning {
        Tuning { linked_commit: self.tuning.linked_commit.unwrap_or(TUNING.linked_commit) }
    }

    /// Limits per user of private pools.
    pub fn private(&self) -> Defaults {
        Defaults {
            devices: self.private.max_per_user.unwrap_or(PRIVATE.devices),
            pools: self.private.max_pools_per_user.unwrap_or(PRIVATE.pools),
        }
    }

    /// File systems that the kernel may mount for users.
    pub fn kernel_mounts(&self) -> Vec<&'static FileSystem> {
        self.private.kernel_mounts.iter().filter_map(|name| policy::find(name)).collect()
    }

    /// The configuration of the engine.
    pub fn engine(&self, run_dir: PathBuf, backends: Vec<BackendKind>) -> EngineConfig {
        let (default_instance, tuning) = (self.default_instance(), self.tuning());
        EngineConfig { run_dir, default_instance, backends, tuning, dev_links: self.dev_links }
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message).hint("correct the file; loopengine-serve(1) describes it")
}

fn read(path: &Path) -> Result<String> {
    use std::io::Read;
    let shown = path.display();
    let mut text = String::new();
    crate::sys::open_regular(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| Error::os(error, format!("cannot read {shown}")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(invalid(format!("{shown} is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(text: &str) -> String {
        let error = Config::parse(text, "x.toml").unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        error.message()
    }

    #[test]
    fn an_empty_file_has_the_defaults() {
        let config = Config::parse("", "x.toml").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.tuning(), TUNING);
        assert_eq!(config.default_instance().max_devices, MAX_DEVICES);
        assert_eq!(config.instances().count(), 0);
    }

    #[test]
    fn parses_every_section() {
        let text = "backend = 'fuse'\n[default]\nmax_devices = 8\nworkers = 2\ncpus = '0-1'\n\
                    [tuning]\nlinked_commit = false\n[private]\nmax_per_user = 9\n\
                    kernel_mounts = ['ext4', 'xfs']\n\
                    [[instance]]\nname = 'build'\nmax_devices = 4\n[[instance]]\nname = 'ci'\n";
        let config = Config::parse(text, "x.toml").unwrap();
        assert_eq!(config.backend, Some(BackendChoice::Fuse));
        let engine = config.engine(PathBuf::from("/run/x"), vec![BackendKind::Fuse]);
        assert_eq!(engine.default_instance.max_devices, 8);
        assert_eq!(engine.default_instance.cpus.as_deref(), Some("0-1"));
        assert_eq!(engine.tuning, Tuning { linked_commit: false });
        assert_eq!(config.private(), Defaults { devices: 9, pools: PRIVATE.pools });
        assert_eq!(config.kernel_mounts().iter().map(|kind| kind.name).collect::<Vec<_>>(), ["ext4", "xfs"]);
        let instances: Vec<_> = config.instances().collect();
        assert_eq!(instances[0].max_devices, 4);
        assert_eq!(instances[1].max_devices, MAX_DEVICES);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let message = refused("[default]\nmax_devices = 3\nmax_device = 4\n");
        assert!(message.starts_with("x.toml, line 3: "), "{message}");
        assert!(message.contains("max_device"), "{message}");
        assert!(refused("backend = 'nbd'\n").starts_with("x.toml, line 1: "));
        assert!(refused("[tuning]\n\nlinked_commit = -1\n").starts_with("x.toml, line 3: "));
        assert!(refused("[[instance]]\nmax_devices = 1\n").contains("name"));
        assert!(refused("[[instance]]\nname = 'default'\n").contains("[default]"));
        assert!(refused("[[instance]]\nname='a'\n[[instance]]\nname='a'\n").contains("twice"));
        assert!(refused("[default]\nmax_devices = 0\n").contains("max_devices"));
        let users = "[[private.user]]\nuser = 'ann'\n";
        assert_eq!(refused(&format!("{users}{users}")), "x.toml, line 3: the user 'ann' appears twice");
        assert!(refused(&format!("{users}max_device = 1\n")).starts_with("x.toml, line 3: "));
        assert!(refused(&format!("{users}max_pools = -1\n")).starts_with("x.toml, line 3: "));
        assert!(refused("[private]\nkernel_mounts = ['ext4', 'btrfs']\n").contains("\"btrfs\""));
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let text = "[[private.user]]\nuser = 'root'\nmax_devices = 3\n[[private.user]]\nuser = 1000\n\
                    max_pools = 0\n[[private.user]]\nuser = 'no such user'\n";
        let (users, unknown) = Config::parse(text, "x.toml").unwrap().users();
        let root = UserLimit { devices: Some(3), pools: None };
        assert_eq!(users, BTreeMap::from([(0, root), (1000, UserLimit { devices: None, pools: Some(0) })]));
        assert_eq!(unknown[0].message(), "no user 'no such user' is in /etc/passwd");
    }

    #[test]
    fn a_named_file_must_exist() {
        let missing = Path::new("/nonexistent/loopengine.toml");
        assert_eq!(Config::load(Some(missing)).unwrap_err().kind(), Kind::NotFound);
    }

    proptest! {
        #[test]
        fn no_text_panics_and_every_error_is_one_line(text in "\\PC{0,40}(\n\\PC{0,40}){0,5}") {
            if let Err(error) = Config::parse(&text, "x.toml") {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }

        #[test]
        fn parses_what_is_written(max in 1u32.., workers in 0u32..64, linked: bool) {
            let text = format!(
                "[default]\nmax_devices = {max}\nworkers = {workers}\n[tuning]\nlinked_commit = {linked}\n"
            );
            let config = Config::parse(&text, "x.toml").unwrap();
            prop_assert_eq!(config.default_instance().max_devices, max);
            prop_assert_eq!(config.default_instance().workers, workers);
            prop_assert_eq!(config.tuning(), Tuning { linked_commit: linked });
        }
    }
}
