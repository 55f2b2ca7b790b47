//! What the configuration asks of a running engine: at start, and when it has changed.

use crate::config::Config;
use crate::control::Backend;
use crate::error::{Error, Kind, Result};
use crate::instance::spec::{DEFAULT_INSTANCE, InstanceSpec};

/// Creates the instances of `config`. One that is there already (taken back from an earlier
/// daemon) is left as it is.
pub(super) fn create_all(config: &Config, backend: &dyn Backend) -> Result<()> {
    for spec in config.instances() {
        if let Err(error) = backend.create_instance(&spec)
            && error.kind() != Kind::Exists
        {
            let message = format!("cannot create the configured instance '{}'", spec.name);
            let all = Error::new(error.kind(), format!("{message}: {}", error.message()));
            return Err(match error.next_step() {
                Some(hint) => all.hint(hint),
                None => all,
            });
        }
    }
    Ok(())
}

/// Makes a running engine follow the change from `old` to `new`, as far as that goes without a
/// restart. Answers what was done and what was not.
pub(super) fn apply(old: &Config, new: &Config, backend: &dyn Backend) -> Vec<String> {
    let mut notes = Vec::new();
    if old.tuning() != new.tuning() {
        notes.push("[tuning] changed: takes effect at the next start".to_owned());
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
    if notes.is_empty() {
        notes.push("nothing changed".to_owned());
    }
    notes
}

fn create(spec: &InstanceSpec, backend: &dyn Backend) -> String {
    match backend.create_instance(spec) {
        Ok(_) => format!("created instance '{}'", spec.name),
        Err(error) => format!("cannot create instance '{}': {error}", spec.name),
    }
}

fn change(old: &InstanceSpec, new: &InstanceSpec, backend: &dyn Backend) -> Vec<String> {
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
        let max = new.max_devices;
        notes.push(match backend.set_max_devices(name, max) {
            Ok(()) => format!("instance '{name}' may have {max} devices now"),
            Err(error) => format!("instance '{name}' keeps its limit: {error}"),
        });
    }
    notes
}
