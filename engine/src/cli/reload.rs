//! What the configuration asks of a running engine: at start, and when it has changed.

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::timeout;

use super::configured::Devices;
use super::serve::tell;
use crate::config::{Config, DeviceTable};
use crate::control::{self, EngineApi};
use crate::error::{Error, Kind, Result};
use crate::instance::spec::{DEFAULT_INSTANCE, InstanceSpec};
use crate::private::Registry;

/// How long reading the configuration may take.
const LOAD_MAX: Duration = Duration::from_secs(5);

/// What follows the configuration.
#[derive(Clone)]
pub(super) struct Followers {
    pub(super) backend: Arc<dyn EngineApi>,
    pub(super) registry: Arc<Registry>,
    pub(super) devices: Devices,
}

/// Attaches the devices of `config` at the start of the daemon, which is ready then.
pub(super) async fn start(config: Config, followers: Followers) -> Config {
    followers.devices.attach(config.devices().cloned().collect()).await;
    tell(&[NotifyState::Ready]);
    config
}

/// Loads the configuration anew and makes a running engine follow it. Answers the one that holds now.
/// Nothing else waits for this.
pub(super) async fn reload(
    load: impl FnOnce() -> Result<Config> + Send + 'static,
    config: Config,
    followers: Followers,
) -> Config {
    let mut states = vec![NotifyState::Reloading];
    states.extend(NotifyState::monotonic_usec_now());
    tell(&states);
    // Not on the pool of threads: a file system that hangs would keep one of them.
    let loaded = timeout(LOAD_MAX, control::apart(load)).await;
    let late = |_| Err(Error::new(Kind::Deadline, "the configuration file was not read in time"));
    let config = match loaded.unwrap_or_else(late) {
        Ok(new) => {
            let (applied, Followers { backend, registry, devices }) = (new.clone(), followers);
            let applying = tokio::task::spawn_blocking(move || {
                limit_users(&applied, &registry);
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
            tracing::error!("the configuration stays as it was: {error}");
            config
        }
    };
    tell(&[NotifyState::Ready]);
    config
}

/// Gives users what `config` does. Of users that are not known the log tells.
pub(super) fn limit_users(config: &Config, registry: &Registry) {
    let (users, unknown) = config.users();
    registry.configure(&users);
    for error in unknown {
        tracing::error!("[[private.user]]: {error}");
    }
}

/// Creates the instances of `config`. One that is there already (taken back from an earlier
/// daemon) only gets the limit of `config`. Answers what could not be done without a failure.
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

/// Makes a running engine follow the change from `old` to `new`, as far as that goes without a
/// restart. Answers what was done and what was not.
pub(super) fn apply(old: &Config, new: &Config, backend: &dyn EngineApi) -> Vec<String> {
    let mut notes = Vec::new();
    if old.dev_links != new.dev_links {
        notes.push("dev_links changed: takes effect at the next start".to_owned());
    }
    if old.frontend != new.frontend {
        notes.push("frontend changed: takes effect at the next start".to_owned());
    }
    if old.tuning() != new.tuning() {
        notes.push("[tuning] changed: takes effect at the next start".to_owned());
    }
    if old.private() != new.private() || old.private.kernel_mounts != new.private.kernel_mounts {
        notes.push(
            "[private] changed: takes effect at the next start; [[private.user]] changes one user's limits now"
                .to_owned(),
        );
    }
    if old.private.user != new.private.user {
        notes.push("[[private.user]] changed: the limits of these users hold now".to_owned());
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
                "instance '{0}' is no longer configured but stays; 'loopengine instance remove {0}' removes it",
                gone.name
            ));
        }
    }
    notes.extend(new.devices().filter_map(|device| change_device(old, device)));
    let gone = |device: &&DeviceTable| !new.devices().any(|other| other.same_device(device));
    notes.extend(old.devices().filter(gone).map(|DeviceTable { image, instance, .. }| {
        format!(
            "{image} in the instance '{instance}' is no longer configured but its device stays; \
             'loopengine detach {image}' detaches it"
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

/// What has changed of a device that may be there. Whether it is is seen when it is attached.
fn change_device(old: &Config, new: &DeviceTable) -> Option<String> {
    let DeviceTable { image, instance, .. } = new;
    let before = old.devices().find(|before| before.same_device(new));
    match before.map(|before| before.spec() == new.spec()) {
        None => Some(format!("{image} in the instance '{instance}' is configured now")),
        Some(false) => Some(format!(
            "the options of {image} in the instance '{instance}' changed: they take effect at the next reload \
             after 'loopengine detach {image}'"
        )),
        Some(true) => None,
    }
}

fn change(old: &InstanceSpec, new: &InstanceSpec, backend: &dyn EngineApi) -> Vec<String> {
    let mut notes = Vec::new();
    let name = &new.name;
    if old.workers != new.workers || old.cpus != new.cpus {
        let how = match name.as_str() {
            DEFAULT_INSTANCE => "takes effect at the next start",
            _ => "takes effect when the instance is created anew",
        };
        notes.push(format!("workers or CPUs of instance '{name}' changed: {how}"));
    }
    if old.max_devices != new.max_devices {
        notes.push(limit(new, backend));
    }
    notes
}

fn limit(spec: &InstanceSpec, backend: &dyn EngineApi) -> String {
    let (name, max) = (&spec.name, spec.max_devices);
    match backend.set_max_devices(name, max) {
        Ok(()) => format!("instance '{name}' may have {max} devices now"),
        Err(error) => format!("instance '{name}' keeps its limit: {error}"),
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

    /// Writes down what it is asked for; knows the instance `there` already, and devices once attached.
    #[derive(Default)]
    pub(in crate::cli) struct Asked(pub(in crate::cli) Mutex<Vec<String>>, Mutex<Vec<DeviceInfo>>);

    fn info(name: &str) -> InstanceInfo {
        InstanceInfo {
            name: name.to_owned(),
            max_devices: crate::config::MAX_DEVICES,
            devices: 0,
            workers: 2,
            cpus: None,
            directory: String::new(),
        }
    }

    impl EngineApi for Asked {
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
        fn recover(&self, _: &RecoverSpec, _: OwnedFd) -> Result<DeviceInfo> {
            unreachable!()
        }
        fn devices(&self, _: &Selector) -> Result<Vec<DeviceInfo>> {
            Ok(self.1.lock().unwrap().clone())
        }
        fn stats(&self, _: &Selector) -> Result<Vec<DeviceStats>> {
            unreachable!()
        }
    }

    fn config(text: &str) -> Config {
        Config::parse(text, "test").unwrap()
    }

    fn applied(old: &str, new: &str) -> (Vec<String>, Vec<String>) {
        let asked = Asked::default();
        let notes = apply(&config(old), &config(new), &asked);
        (asked.0.into_inner().unwrap(), notes)
    }

    #[test]
    fn at_start_what_is_there_already_gets_its_limit() {
        let asked = Asked::default();
        let text = "[[instance]]\nname='there'\nmax_devices=3\n[[instance]]\nname='new'\n";
        let notes = create_all(&config(text), &asked).unwrap();
        assert_eq!(*asked.0.lock().unwrap(), ["limit there 3", "create new"]);
        assert_eq!(notes, ["instance 'there' may have 3 devices now"]);
        let error = create_all(&config("[[instance]]\nname='bad'\n"), &asked).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(error.message().contains("'bad'"), "{error}");
        assert_eq!(error.next_step(), Some("stop"));
    }

    #[test]
    fn only_what_changed_is_done() {
        let same = "[[instance]]\nname='a'\n[tuning]\npoll_us=3\n";
        assert_eq!(applied(same, same), (vec![], vec!["nothing changed".to_owned()]));
    }

    #[test]
    fn devices_that_come_change_and_go_are_told() {
        let old = "[[device]]\nimage='/same'\n[[device]]\nimage='/other'\n[[device]]\nimage='/gone'\n\
                   [[private.user]]\nuser=7\n";
        let new = "\n[[private.user]]\nuser=7\nmax_devices=1\n[[device]]\nimage='/new'\n\
                   [[device]]\nimage='/same'\n[[device]]\nimage='/other'\nread_only=true\n";
        let (asked, notes) = applied(old, new);
        assert_eq!(asked, [""; 0]);
        let words = ["[[private.user]] changed", "/new in", "options of /other", "/gone in"];
        assert_eq!(notes.len(), words.len(), "{notes:?}");
        for (note, words) in notes.iter().zip(words) {
            assert!(note.contains(words), "{notes:?}");
        }
        // That an entry has moved in the file is no change.
        assert_eq!(applied(old, &format!("\n\n{old}")).1, ["nothing changed"]);
    }

    #[test]
    fn new_instances_and_limits_are_applied_the_rest_is_told() {
        let old = "[[instance]]\nname='a'\nmax_devices=1\n[[instance]]\nname='gone'\n";
        let new = "[default]\nmax_devices=9\nworkers=7\n[tuning]\npoll_us=3\n\
                   [[instance]]\nname='a'\nmax_devices=2\n[[instance]]\nname='b'\n";
        let (asked, notes) = applied(old, new);
        assert_eq!(asked, ["limit a 2", "create b", "limit default 9"]);
        let told = |words: &str| notes.iter().any(|note| note.contains(words));
        assert!(told("[tuning] changed") && told("workers or CPUs of instance 'default'"), "{notes:?}");
        assert!(told("instance 'gone' is no longer configured"), "{notes:?}");
    }
}
