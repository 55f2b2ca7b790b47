// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks of the machine and of the targets before a run. Each problem becomes a warning with
//! advice, which the report shows.
//!
//! Changes nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::outcome::{Mode, Warning};
use crate::sh;
use crate::target::{Kind, Opened, RAW};

/// Other processes that use more than this share of a CPU disturb a measurement.
const LOAD: f64 = 0.5;
/// Pages of an image that may remain in the page cache.
const RESIDUE: u64 = 1 << 20;

/// Checks the machine before a run.
pub fn machine(mode: Mode) -> Vec<Warning> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut warnings = Vec::new();
    // A VM of the lab runs nothing else; its load is that of its own boot.
    if mode == Mode::Host {
        warnings.extend(load(&read("/proc/loadavg")));
        let cpus = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
        let governors: Vec<String> = cpus
            .filter_map(|cpu| fs::read_to_string(cpu.path().join("cpufreq/scaling_governor")).ok())
            .collect();
        warnings.extend(governor(&governors));
    }
    let group = read("/proc/self/cgroup");
    let group = group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let max = read(&format!("/sys/fs/cgroup{}/cpu.max", group.trim_end_matches('/')));
    warnings.extend(throttled(&max));
    warnings
}

fn load(loadavg: &str) -> Option<Warning> {
    let load: f64 = loadavg.split(' ').next()?.parse().ok()?;
    (load > LOAD).then(|| Warning {
        what: format!("the load of the machine is {load} before the run"),
        advice: "stop other programs, or use ratios only".into(),
    })
}

fn governor(governors: &[String]) -> Option<Warning> {
    let other = governors.iter().find(|governor| governor.trim() != "performance")?;
    Some(Warning {
        what: format!("the CPU frequency governor is {}", other.trim()),
        advice: "cpupower frequency-set --governor performance".into(),
    })
}

fn throttled(cpu_max: &str) -> Option<Warning> {
    let limit = cpu_max.split_whitespace().next()?;
    (limit != "max").then(|| Warning {
        what: format!("this cgroup may use {} of CPU time only", cpu_max.trim().replace(' ', " of every ")),
        advice: "run it in a cgroup without cpu.max".into(),
    })
}

/// Checks a target that has been set up.
pub fn target(name: &str, opened: &Opened) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if opened.kind != Kind::Mount && !takes_direct(&opened.path) {
        warnings.push(Warning {
            what: format!("{name} does not support direct I/O"),
            advice: "it measures the page cache; use another file system for the images".into(),
        });
    }
    if opened.kind == Kind::Block {
        warnings.extend(scheduler(name, &opened.path));
    }
    if name == RAW {
        warnings.extend(image(&opened.path));
    }
    warnings
}

fn takes_direct(path: &Path) -> bool {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    fs::OpenOptions::new().read(true).custom_flags(direct).open(path).is_ok()
}

fn scheduler(name: &str, node: &Path) -> Option<Warning> {
    let real = node.canonicalize().ok()?;
    let file = Path::new("/sys/block").join(real.file_name()?).join("queue/scheduler");
    let said = fs::read_to_string(file).ok()?;
    let chosen = said.split('[').nth(1)?.split(']').next()?.to_owned();
    (chosen != "none").then(|| Warning {
        what: format!("{name} has the I/O scheduler {chosen}"),
        advice: "the others have none, so ratios are not comparable".into(),
    })
}

/// Checks that the image is fully allocated and not cached.
fn image(path: &Path) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if fs::metadata(path).is_ok_and(|metadata| metadata.blocks() * 512 < metadata.len()) {
        warnings.push(Warning {
            what: "the image is not fully allocated".into(),
            advice: "reads of holes cost nothing; use a file system that supports fallocate".into(),
        });
    }
    let fincore = sh::which("fincore").and_then(|program| {
        let mut command = Command::new(program);
        command.args(["--bytes", "--noheadings", "--output", "RES"]).arg(path);
        sh::capture(&mut command, Duration::from_secs(60))
    });
    let resident: u64 = fincore.ok().and_then(|said| said.trim().parse().ok()).unwrap_or(0);
    if resident > RESIDUE {
        warnings.push(Warning {
            what: format!("{} MB of the image are in the page cache", resident >> 20),
            advice: "echo 3 > /proc/sys/vm/drop_caches".into(),
        });
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_is_noticed_and_a_quiet_one_is_not() {
        assert!(load("1.73 1.2 0.9 2/300 123\n").unwrap().what.contains("1.73"));
        assert_eq!(load("0.12 1.2 0.9 2/300 123\n"), None);
        assert_eq!(load(""), None);
    }

    #[test]
    fn a_governor_that_saves_power_and_a_cgroup_that_limits_are_noticed() {
        assert!(
            governor(&["performance\n".into(), "powersave\n".into()]).unwrap().what.ends_with("powersave")
        );
        assert_eq!(governor(&["performance\n".into()]), None);
        assert_eq!(governor(&[]), None);
        assert_eq!(throttled("max 100000\n"), None);
        assert_eq!(
            throttled("50000 100000\n").unwrap().what,
            "this cgroup may use 50000 of every 100000 of CPU time only"
        );
    }

    #[test]
    fn a_sparse_image_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        assert!(image(file.path()).iter().any(|warning| warning.what.contains("not fully allocated")));
    }
}
