// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks which version of fio is installed.
//!
//! Knows nothing of jobs.

use std::fmt;
use std::io::ErrorKind;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::sh;

/// Oldest supported version: the format of older reports was never tested.
const OLDEST: (u32, u32) = (3, 30);

/// Version of fio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    /// Parses "fio-3.33", or "fio-3.42-6-g219f" of a build between releases.
    text: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Version of fio on PATH; fails if fio is missing or too old.
pub fn version() -> Result<Version> {
    let said = match sh::capture(Command::new("fio").arg("--version"), Duration::from_secs(60)) {
        Err(error) if missing(&error) => bail!("fio is not installed: apt install fio"),
        said => said?,
    };
    read(&said)
}

fn missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::NotFound)
}

fn read(said: &str) -> Result<Version> {
    let text = said.trim();
    let number = |text: &str| -> Option<(u32, u32)> {
        let (major, rest) = text.strip_prefix("fio-")?.split_once('.')?;
        let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let (major, minor) = number(text).with_context(|| format!("fio has an unknown version: {text:?}"))?;
    if (major, minor) < OLDEST {
        bail!("{text} is too old: install {}.{} or newer", OLDEST.0, OLDEST.1);
    }
    Ok(Version { major, minor, text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_and_builds_between_them_have_a_version() {
        let of = |text| read(text).map(|version| (version.major, version.minor)).unwrap();
        assert_eq!([of("fio-3.33\n"), of("fio-3.42-6-g219f"), of("fio-4.0")], [(3, 33), (3, 42), (4, 0)]);
        assert_eq!(read("fio-3.42-6-g219f\n").unwrap().to_string(), "fio-3.42-6-g219f");
    }

    #[test]
    fn rejects_old_versions_and_other_programs() {
        let error = |text| read(text).unwrap_err().to_string();
        assert!(error("fio-3.28").starts_with("fio-3.28 is too old"));
        assert!(error("fio-2.99").contains("3.30 or newer"));
        assert!(error("Usage: fio").contains("unknown version") && error("").contains("unknown version"));
    }

    #[test]
    fn distinguishes_a_missing_program_from_a_failing_one() {
        let run = |program| sh::capture(&mut Command::new(program), Duration::from_secs(10)).unwrap_err();
        assert!(missing(&run("loopengine-no-such-program")));
        assert!(!missing(&run("false")));
    }
}
