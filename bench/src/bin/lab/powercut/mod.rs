// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power cut tests: writes that were reported as durable must survive a kill of the VM.
//!
//! Boots a VM with a disk, lets the guest write through a device of the engine, kills QEMU, boots
//! again on the same disk and compares. Uses only the command line of the engine.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

pub(crate) mod guest;

use loopbench::sh;

use crate::kernel::Line;
use crate::programs::Program;
use crate::setup::Lab;
use crate::tally::Tally;
use crate::vm::{Mode, Sink, Vm};

/// Durable writes to wait for before the cut.
const DURABLE_WRITES: usize = 400;
const DISK_BYTES: u64 = 768 << 20;
const LIMIT: Duration = Duration::from_secs(300);

/// A case: its name, and the kinds of writes that it checks.
const CASES: [(&str, &[&str]); 3] = [
    ("power_cut::fsync", &["fsync"]),
    ("power_cut::lone_writes", &["lone"]),
    ("power_cut::fua", &["fua", "file"]),
];

/// Runs the cases that match `filter` on the kernel of `line`.
pub(crate) fn run(
    lab: &Lab,
    line: Line,
    programs: &[Program],
    filter: Option<&str>,
    sink: Sink<'_>,
) -> Result<Tally> {
    let wanted: Vec<_> =
        CASES.iter().filter(|(name, _)| filter.is_none_or(|text| name.contains(text))).collect();
    let mut tally = Tally::default();
    if wanted.is_empty() {
        return Ok(tally);
    }
    // XFS on one kernel and ext4 on the other cover both in half the time.
    let fs = if line == Line::Seven { "xfs" } else { "ext4" };
    let outcome = cut(lab, line, programs, fs);
    sh::interrupted()?;
    for (name, kinds) in wanted {
        let verdict =
            outcome.as_ref().map_err(|error| format!("{error:#}")).and_then(|said| judge(said, kinds));
        match verdict {
            Ok(kept) => {
                sink(format!("test {name} ... ok ({kept} writes kept, {fs})\n").as_bytes());
                tally.passed += 1;
            }
            Err(why) => {
                sink(format!("test {name} ... FAILED: {why}\n").as_bytes());
                tally.fail(&format!("{name}: {why}"));
            }
        }
    }
    Ok(tally)
}

/// Boots twice; returns the output of the second boot.
fn cut(lab: &Lab, line: Line, programs: &[Program], fs: &str) -> Result<String> {
    let directory = tempfile::Builder::new().prefix("power-cut-").tempdir_in(&lab.cache)?;
    let disk = directory.path().join("disk");
    std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let machine = Vm { disks: vec![disk], limit: LIMIT, ..Vm::new(lab.kernel(line)?, Mode::Smp) };
    let durable = write_until_cut(&machine, lab, programs, fs)?;
    let list = directory.path().join("durable");
    std::fs::write(&list, durable.join("\n"))?;
    let mut said = Vec::new();
    let line = format!("lab power-cut verify --durable {}", sh::quote(&[list.to_string_lossy()]));
    let status = machine.run(lab, programs, &line, &mut |bytes| said.extend_from_slice(bytes))?;
    if status != 0 {
        bail!("the second boot failed with status {status}: {}", last_line(&said));
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Runs the first boot up to the cut; returns the durable writes, as "fsync 12".
fn write_until_cut(machine: &Vm, lab: &Lab, programs: &[Program], fs: &str) -> Result<Vec<String>> {
    let mut said = Vec::new();
    let mut running = machine.start(lab, programs, &format!("lab power-cut write --fs {fs}"))?;
    let start = Instant::now();
    while durable(&said).len() < DURABLE_WRITES {
        if let Some(status) = running.turn(&mut |bytes| said.extend_from_slice(bytes))? {
            bail!("the first boot ended with status {status} before the cut: {}", last_line(&said));
        }
        if start.elapsed() > LIMIT {
            bail!("only {} writes were durable after {} s", durable(&said).len(), LIMIT.as_secs());
        }
    }
    running.kill();
    running.pass_on(&mut |bytes| said.extend_from_slice(bytes))?;
    Ok(durable(&said))
}

fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.trim_end().lines().next_back().unwrap_or("no output").to_owned()
}

/// Durable writes among complete lines of output.
fn durable(said: &[u8]) -> Vec<String> {
    let said = String::from_utf8_lossy(said);
    said.split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n')?.strip_prefix("durable "))
        .map(str::to_owned)
        .collect()
}

/// Number of writes of `kinds` that survived, or the reason of a failure.
fn judge(said: &str, kinds: &[&str]) -> Result<usize, String> {
    let of = |verdict: &str| -> Vec<&str> {
        said.lines()
            .filter_map(|line| line.strip_prefix(verdict)?.strip_prefix(' '))
            .filter(|entry| kinds.iter().any(|kind| entry.split(' ').next() == Some(kind)))
            .collect()
    };
    let (kept, lost) = (of("kept"), of("lost"));
    if !lost.is_empty() {
        return Err(format!(
            "{} of {} durable writes were lost: {}",
            lost.len(),
            lost.len() + kept.len(),
            lost.join(", ")
        ));
    }
    if kept.is_empty() {
        return Err("no durable write was checked".into());
    }
    if kinds.contains(&"file") && !said.lines().any(|line| line == "clean") {
        return Err("the file system in the image is damaged".into());
    }
    Ok(kept.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durable_write_counts_once_its_line_is_complete() {
        assert_eq!(durable(b"noise\ndurable fsync 0\ndurable fua 1"), ["fsync 0"]);
    }

    #[test]
    fn one_lost_write_fails_the_case_it_belongs_to() {
        let said = "kept fsync 0\nlost fua 0\nkept file 0\nclean\n";
        assert_eq!(judge(said, &["fsync"]), Ok(1));
        assert!(judge(said, &["fua", "file"]).unwrap_err().contains("1 of 2"));
        assert!(judge("kept file 0\ndamaged\n", &["file"]).is_err());
        assert!(judge("", &["fsync"]).is_err());
    }
}
