// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The CPUs and the number of an instance's workers.

use std::fs;

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Highest CPU number that a list may name.
const CPU_MAX: usize = 8191;
/// Maximum number of workers of an instance.
const MAX_WORKERS: u32 = 256;

/// "0-3,8" as numbers, ascending, each once.
pub(super) fn parse_cpus(list: &str) -> Result<Vec<usize>> {
    let bad =
        || Error::new(Kind::Invalid, format!("{list:?} is not a list of CPUs")).hint("write it like 0-3,8");
    let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu <= CPU_MAX).ok_or_else(bad);
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(bad());
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

/// Rejects CPUs that this machine lacks: workers would silently run on fewer.
pub(super) fn check_cpus(cpus: &[usize]) -> Result<()> {
    let present = fs::read_to_string("/sys/devices/system/cpu/present").unwrap_or_default();
    let present = present.trim();
    let Ok(known) = parse_cpus(present) else { return Ok(()) };
    match cpus.iter().find(|cpu| !known.contains(cpu)) {
        None => Ok(()),
        Some(cpu) => Err(Error::new(Kind::Invalid, format!("this machine has no CPU {cpu}"))
            .hint(format!("choose from {present}"))),
    }
}

/// One worker per usable CPU, at least two; at most one per CPU of the machine, since the driver
/// allows no more queues.
pub(super) fn worker_count(wanted: u32, cpus: &[usize]) -> Result<u32> {
    if wanted > MAX_WORKERS {
        return Err(Error::new(Kind::Invalid, format!("an instance can have 1 to {MAX_WORKERS} workers")));
    }
    let allowed = sys::allowed_cpus().len() as u32;
    let usable = if cpus.is_empty() { allowed } else { cpus.len() as u32 };
    Ok(match wanted {
        0 => usable.max(2).min(allowed.max(1)).min(MAX_WORKERS),
        wanted => wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cpus_are_lists_of_ranges() {
        assert_eq!(parse_cpus("0-3,8").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse_cpus("5,5,1").unwrap(), [1, 5]);
        for bad in ["", "-", "3-1", "a", "1,", "0-99999999999", "8192", "1--2"] {
            assert!(parse_cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rejects_cpus_that_the_machine_lacks() {
        assert!(check_cpus(&[]).is_ok() && check_cpus(&[0]).is_ok());
        let error = check_cpus(&[0, 8191]).unwrap_err();
        assert!(error.kind() == Kind::Invalid && error.to_string().contains("no CPU 8191"), "{error}");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".*") {
            let _ = parse_cpus(&text);
        }
    }
}
