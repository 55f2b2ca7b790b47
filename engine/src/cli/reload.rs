// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Applies the configuration to a running engine: at start, and on reload.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::timeout;

use super::configured_devices::ConfiguredDevices;
use super::serve::notify;
use crate::config::{Config, DeviceTable};
use crate::control::{self, EngineApi};
use crate::error::{Error, Kind, Result};
use crate::instance::spec::{DEFAULT_INSTANCE, InstanceSpec};
use crate::private::Registry;

/// Maximum time to read the configuration.
const LOAD_MAX: Duration = Duration::from_secs(5);

/// Objects that a new configuration changes.
#[derive(Clone)]
pub(super) struct ReloadTargets {
    pub(super) backend: Arc<dyn EngineApi>,
    pub(super) registry: Arc<Registry>,
    pub(super) devices: ConfiguredDevices,
}

/// Attaches the devices of `config` at the start of the daemon, then reports readiness.
pub(super) async fn start(config: Config, targets: ReloadTargets) -> Config {
    targets.devices.attach(config.devices().cloned().collect()).await;
    notify(&[NotifyState::Ready]);
    config
}

/// Loads the configuration again and applies it to the running engine. Returns the effective
/// configuration. Does not block other tasks.
pub(super) async fn reload(
    load: impl FnOnce() -> Result<Config> + Send + 'static,
    config: Config,
    targets: ReloadTargets,
) -> Config {
    let mut states = vec![NotifyState::Reloading];
    states.extend(NotifyState::monotonic_usec_now());
    notify(&states);
    // On a thread of its own: a hung file system would occupy a thread of the blocking pool.
    let loaded = timeout(LOAD_MAX, control::run_blocking(load)).await;
    let late = |_| Err(Error::new(Kind::Deadline, "cannot read the configuration file in time"));
    let config = match loaded.unwrap_or_else(late) {
        Ok(new) => {
            let (applied, ReloadTargets { backend, registry, devices }) = (new.clone(), targets);
            let applying = tokio::task::spawn_blocking(move || {
                apply_user_limits(&applied, &registry);
                apply(&config, &applied, &*backend)
            });
            match applying.await {
                Ok(notes) => notes.iter().for_each(|note| tracing::info!("reload: {note}")),
                Err(error) => tracing::error!("reload failed: {error}"),
            }
            devices.attach(new.devices().cloned().collect()).await;
            new
        }
        Err(error) => {
            tracing::error!("cannot reload, the old configuration stays: {error}");
            config
        }
    };
    notify(&[NotifyState::Ready]);
    config
}

/// Applies the user limits of `config`. Logs unknown users.
pub(super) fn apply_user_limits(config: &Config, registry: &Registry) {
    let (users, unknown) = config.users();
    registry.configure(&users);
    for error in unknown {
        tracing::error!("[[private.user]]: {error}");
    }
}

/// Creates the instances of `config`. An existing instance (recovered from an earlier daemon) only
/// gets its limit. Returns notes for the log.
pub(super) fn create_all(config: &Config, backend: &dyn EngineApi) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let there = backend.instances();
    for spec in config.instances().chain([config.default_instance()]) {
        match there.iter().find(|instance| instance.name == spec.name) {
            Some(known) if known.max_devices != spec.max_devices => {
                notes.push(limit(&spec, backend));
            }
            Some(_) => {}
            None => {
                backend.create_instance(&spec).map_err(|error| unconfigurable(&spec.name, &error))?;
            }
        }
    }
    Ok(notes)
}

fn unconfigurable(name: &str, error: &Error) -> Error {
    let message = format!("cannot create the configured instance '{name}': {}", error.message());
    let whole = Error::new(error.kind(), message);
    match error.next_step() {
        Some(hint) => whole.hint(hint),
        None => whole,
    }
}

/// Applies the change from `old` to `new` as far as a running engine can. Returns notes on what was
/// applied and what was not.
pub(super) fn apply(old: &Config, new: &Config, backend: &dyn EngineApi) -> Vec<String> {
    let mut notes = Vec::new();
    if old.dev_links != new.dev_links {
        notes.push("dev_links changed: takes effect at the next start".to_owned());
    }
    if (old.backend, old.first_loop_number) != (new.backend, new.first_loop_number) {
        notes.push("backend or first_loop_number changed: takes effect at the next start".to_owned());
    }
    if old.tuning() != new.tuning() {
        notes.push("[tuning] changed: takes effect at the next start".to_owned());
    }
    let others = |config: &Config| (config.private.kernel_mounts.clone(), config.private.backend);
    if old.private() != new.private() || others(old) != others(new) {
        notes.push(
            "[private] changed: takes effect at the next start; [[private.user]] changes the limits of one user at once"
                .to_owned(),
        );
    }
    if old.private.user != new.private.user {
        notes.push("[[private.user]] changed: the new limits are in effect".to_owned());
    }
    let before: Vec<InstanceSpec> = old.instances().chain([old.default_instance()]).collect();
    for spec in new.instances().chain([new.default_instance()]) {
        match before.iter().find(|known| known.name == spec.name) {
            None => notes.push(create(&spec, backend)),
            Some(known) => notes.extend(change(known, &spec, backend)),
        }
    }
    for gone in old.instances() {
        if !new.instances().any(|spec| spec.name == gone.name) {
            notes.push(format!(
                "instance '{0}' is no longer configured; remove it with 'loopengine instance remove {0}'",
                gone.name
            ));
        }
    }
    notes.extend(new.devices().filter_map(|device| change_device(old, device)));
    let gone = |device: &&DeviceTable| !new.devices().any(|other| other.same_device(device));
    notes.extend(old.devices().filter(gone).map(|DeviceTable { image, instance, .. }| {
        format!(
            "{image} in the instance '{instance}' is no longer configured; \
             detach its device with 'loopengine detach {image}'"
        )
    }));
    if notes.is_empty() {
        notes.push("nothing changed".to_owned());
    }
    notes
}

fn create(spec: &InstanceSpec, backend: &dyn EngineApi) -> String {
    match backend.create_instance(spec) {
        Ok(_) => format!("created instance '{}'", spec.name),
        Err(error) => format!("cannot create instance '{}': {error}", spec.name),
    }
}

/// The change of a device. The later attach finds out whether it exists.
fn change_device(old: &Config, new: &DeviceTable) -> Option<String> {
    let DeviceTable { image, instance, .. } = new;
    let before = old.devices().find(|before| before.same_device(new));
    match before.map(|before| before.spec() == new.spec()) {
        None => Some(format!("{image} in the instance '{instance}' is new in the configuration")),
        Some(false) => Some(format!(
            "the options of {image} in the instance '{instance}' changed: run 'loopengine detach {image}' and \
             reload to apply them"
        )),
        Some(true) => None,
    }
}

fn change(old: &InstanceSpec, new: &InstanceSpec, backend: &dyn EngineApi) -> Vec<String> {
    let mut notes = Vec::new();
    let name = &new.name;
    if (old.workers, &old.cpus, old.backend) != (new.workers, &new.cpus, new.backend) {
        let how = match name.as_str() {
            DEFAULT_INSTANCE => "takes effect at the next start",
            _ => "takes effect when the instance is created again",
        };
        notes.push(format!("workers, CPUs or backend of instance '{name}' changed: {how}"));
    }
    if old.max_devices != new.max_devices {
        notes.push(limit(new, backend));
    }
    notes
}

fn limit(spec: &InstanceSpec, backend: &dyn EngineApi) -> String {
    let (name, max) = (&spec.name, spec.max_devices);
    match backend.set_max_devices(name, max) {
        Ok(()) => format!("the limit of instance '{name}' is now {max} devices"),
        Err(error) => format!("cannot change the limit of instance '{name}': {error}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Mutex;

    use super::*;
    use crate::error::Kind;
    use crate::instance::Selector;
    use crate::instance::spec::*;

    /// Records calls. Knows the instance `there`, and attached devices.
    #[derive(Default)]
    pub(in crate::cli) struct RecordedCalls(pub(in crate::cli) Mutex<Vec<String>>, Mutex<Vec<DeviceInfo>>);

    fn info(name: &str) -> InstanceInfo {
        InstanceInfo {
            name: name.to_owned(),
            max_devices: crate::config::MAX_DEVICES,
            devices: 0,
            backend: BackendKind::Ublk,
            workers: 2,
            cpus: None,
            directory: String::new(),
        }
    }

    impl EngineApi for RecordedCalls {
        fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo> {
            self.0.lock().unwrap().push(format!("create {}", spec.name));
            match spec.name.as_str() {
                "bad" => Err(Error::new(Kind::Invalid, "no").hint("stop")),
                name => Ok(info(name)),
            }
        }
        fn set_max_devices(&self, name: &str, max: u32) -> Result<()> {
            self.0.lock().unwrap().push(format!("limit {name} {max}"));
            Ok(())
        }
        fn features(&self) -> Result<Features> {
            unreachable!()
        }
        fn instances(&self) -> Vec<InstanceInfo> {
            vec![info("default"), info("there")]
        }
        fn remove_instance(&self, _: &str, _: bool) -> Result<()> {
            unreachable!()
        }
        fn attach(&self, spec: &AttachSpec, force: bool, _: OwnedFd) -> Result<DeviceInfo> {
            self.0.lock().unwrap().push(format!("attach {} {force}", spec.path));
            let mut devices = self.1.lock().unwrap();
            let taken = |number: &u32| devices.iter().any(|device| device.number == *number);
            let number = spec.number.unwrap_or_else(|| (0..).find(|number| !taken(number)).unwrap());
            let device = DeviceInfo {
                instance: spec.instance.clone(),
                number,
                path: format!("/run/{}/loop{number}", spec.instance),
                node: String::new(),
                image: spec.path.clone(),
                state: DeviceState::Live,
                reason: None,
                size: 0,
                offset: spec.offset,
                size_limit: spec.size_limit,
                block_size: 512,
                read_only: spec.read_only,
                buffered: spec.buffered,
                durable: spec.durable,
                iops: spec.iops,
                bytes_per_second: spec.bytes_per_second,
                queues: 1,
                depth: 1,
                io_mode: IoMode::Copy,
                shared_with: Vec::new(),
                since_unix_seconds: None,
                image_device: 0,
                image_inode: 0,
            };
            devices.push(device.clone());
            Ok(device)
        }
        fn detach(&self, _: &Selector, _: bool) -> Result<Vec<String>> {
            unreachable!()
        }
        fn resize(&self, _: &ResizeSpec) -> Result<DeviceInfo> {
            unreachable!()
        }
        fn set_io_limits(&self, _: &IoLimitsSpec) -> Result<DeviceInfo> {
            unreachable!()
        }
        fn recover(&self, _: &RecoverSpec, _: OwnedFd) -> Result<DeviceInfo> {
            unreachable!()
        }
        fn devices(&self, _: &Selector) -> Result<Vec<DeviceInfo>> {
            Ok(self.1.lock().unwrap().clone())
        }
        fn stats(&self, _: &Selector) -> Result<Vec<DeviceStats>> {
            unreachable!()
        }
        fn activity(&self) -> Result<Vec<crate::instance::activity::DeviceActivity>> {
            unreachable!()
        }
    }

    fn config(text: &str) -> Config {
        Config::parse(text, "test").unwrap()
    }

    fn applied(old: &str, new: &str) -> (Vec<String>, Vec<String>) {
        let calls = RecordedCalls::default();
        let notes = apply(&config(old), &config(new), &calls);
        (calls.0.into_inner().unwrap(), notes)
    }

    #[test]
    fn sets_limits_of_existing_instances_at_start() {
        let calls = RecordedCalls::default();
        let text = "[[instance]]\nname='there'\nmax_devices=3\n[[instance]]\nname='new'\n";
        let notes = create_all(&config(text), &calls).unwrap();
        assert_eq!(*calls.0.lock().unwrap(), ["limit there 3", "create new"]);
        assert_eq!(notes, ["the limit of instance 'there' is now 3 devices"]);
        let error = create_all(&config("[[instance]]\nname='bad'\n"), &calls).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.message().contains("'bad'"), "{error}");
        assert_eq!(error.next_step(), Some("stop"));
    }

    #[test]
    fn applies_only_changes() {
        let same = "[[instance]]\nname='a'\n[tuning]\nlinked_commit=false\n";
        assert_eq!(applied(same, same), (vec![], vec!["nothing changed".to_owned()]));
    }

    #[test]
    fn notes_added_changed_and_removed_devices() {
        let old = "[[device]]\nimage='/same'\n[[device]]\nimage='/other'\n[[device]]\nimage='/gone'\n\
                   [[private.user]]\nuser=7\n";
        let new = "\n[[private.user]]\nuser=7\nmax_devices=1\n[[device]]\nimage='/new'\n\
                   [[device]]\nimage='/same'\n[[device]]\nimage='/other'\nread_only=true\n";
        let (calls, notes) = applied(old, new);
        assert_eq!(calls, [""; 0]);
        let words = ["[[private.user]] changed", "/new in", "options of /other", "/gone in"];
        assert_eq!(notes.len(), words.len(), "{notes:?}");
        for (note, words) in notes.iter().zip(words) {
            assert!(note.contains(words), "{notes:?}");
        }
        // Moving an entry in the file is no change.
        assert_eq!(applied(old, &format!("\n\n{old}")).1, ["nothing changed"]);
    }

    #[test]
    fn applies_instances_and_limits_and_notes_the_rest() {
        let old = "[[instance]]\nname='a'\nmax_devices=1\n[[instance]]\nname='gone'\n";
        let new = "[default]\nmax_devices=9\nworkers=7\n[tuning]\nlinked_commit=false\n\
                   [[instance]]\nname='a'\nmax_devices=2\n[[instance]]\nname='b'\n";
        let (calls, notes) = applied(old, new);
        assert_eq!(calls, ["limit a 2", "create b", "limit default 9"]);
        let notes_contain = |words: &str| notes.iter().any(|note| note.contains(words));
        assert!(
            notes_contain("[tuning] changed")
                && notes_contain("workers, CPUs or backend of instance 'default'"),
            "{notes:?}"
        );
        assert!(notes_contain("instance 'gone' is no longer configured"), "{notes:?}");
    }
}
