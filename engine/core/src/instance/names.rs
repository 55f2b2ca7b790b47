// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parsers of user input: instance names and device names.
//!

use super::Selector;
use super::links::DEV_DIR;
use super::spec::DEFAULT_INSTANCE;
use crate::error::{Error, Kind, Result};

/// Names in the run directory that are not instances.
const RESERVED: [&str; 4] = ["control", "lock", "private", "oci"];

/// Rejects invalid names of instances and pools: they become directory names.
pub fn check_instance_name(name: &str) -> Result<()> {
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !name.starts_with(['.', '-'])
        && !RESERVED.contains(&name);
    if fits {
        return Ok(());
    }
    let reserved = RESERVED.map(|name| format!("'{name}'")).join(", ");
    Err(Error::new(Kind::Invalid, format!("{name:?} cannot be the name of an instance or a pool")).hint(
        format!(
            "use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-', none of {reserved}"
        ),
    ))
}

/// How a user can name a device: instance and number, or the kernel's node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// `NAME/loopN`, `loopN`, or the path of either in the run directory.
    Number(String, u32),
    /// The kernel's node, such as `/dev/ublkb3` or `/dev/loop524288`.
    Node(std::path::PathBuf),
}

/// Parses a device name; `run_dir` is the directory of instances.
pub fn parse_device(text: &str, run_dir: &std::path::Path) -> Result<DeviceName> {
    let invalid = || {
        // A valid path that is not one of ours.
        let kind = if text.starts_with('/') { Kind::NotFound } else { Kind::Invalid };
        Error::new(kind, format!("{text:?} does not name a device")).hint(format!(
            "use a path such as {}/{DEFAULT_INSTANCE}/loop0, or NAME/loop0; 'loopengine list' shows all",
            run_dir.display()
        ))
    };
    let digits = |prefix| text.strip_prefix(prefix).filter(|rest| !rest.starts_with("engine/"));
    if let Some(number) = digits("/dev/ublkb").or_else(|| digits("/dev/loop")) {
        return number.parse::<u32>().map(|_| DeviceName::Node(text.into())).map_err(|_| invalid());
    }
    let below =
        |directory: &std::path::Path| std::path::Path::new(text).strip_prefix(directory).ok()?.to_str();
    let inside = below(run_dir).or_else(|| below(DEV_DIR.as_ref())).unwrap_or(text);
    let (instance, device) = inside.split_once('/').unwrap_or((DEFAULT_INSTANCE, inside));
    let number = device.strip_prefix("loop").and_then(|number| number.parse().ok()).ok_or_else(invalid)?;
    check_instance_name(instance).map_err(|_| invalid())?;
    Ok(DeviceName::Number(instance.to_owned(), number))
}

impl Selector {
    /// For messages.
    pub fn describe(&self) -> String {
        match self {
            Selector::Device(name) => name.clone(),
            Selector::Instance(name) => format!("instance {name}"),
            Selector::All => "all devices".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    #[test]
    fn the_error_for_a_reserved_name_lists_all_reserved_names() {
        let error = check_instance_name("oci").unwrap_err().to_string();
        assert!(RESERVED.iter().all(|name| error.contains(&format!("'{name}'"))), "{error}");
    }

    #[test]
    fn parses_every_form_of_device_name() {
        let run = Path::new("/run/loopengine");
        let number = |name: &str, number| DeviceName::Number(name.to_owned(), number);
        assert_eq!(parse_device("/run/loopengine/ci/loop7", run).unwrap(), number("ci", 7));
        assert_eq!(parse_device("/dev/loopengine/ci/loop7", run).unwrap(), number("ci", 7));
        assert_eq!(parse_device("ci/loop7", run).unwrap(), number("ci", 7));
        assert_eq!(parse_device("loop0", run).unwrap(), number("default", 0));
        assert_eq!(parse_device("/dev/ublkb3", run).unwrap(), DeviceName::Node("/dev/ublkb3".into()));
        assert_eq!(parse_device("/dev/loop524288", run).unwrap(), DeviceName::Node("/dev/loop524288".into()));
        for bad in ["", "/dev/loop", "../loop0", "a/b/loop1", "loop", "loop-1", "/dev/ublkb", "control/loop1"]
        {
            assert!(parse_device(bad, run).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*") {
            let _ = parse_device(&text, Path::new("/run/x"));
            if check_instance_name(&text).is_ok() {
                prop_assert!(!text.contains('/') && text != "." && text != "..");
            }
        }
    }
}
