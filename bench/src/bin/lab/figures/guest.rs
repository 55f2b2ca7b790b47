//! The measuring itself, where ublk is: rounds of fio, attach latency, memory of idle devices.
//!
//! Leaves raw files in a directory and draws no conclusions.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::varlink::Client;
use crate::engine::{self, Daemon};
use crate::fio::{self, Job, Length};
use crate::rig::Rig;
use crate::sh;
use crate::store::{Fs, Store};

/// What is measured, and for how long.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Plan {
    /// Rounds; targets are interleaved within each
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub(super) rounds: u32,
    /// Length of a job in a round
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub(super) run_ms: u32,
    /// Devices that are attached to see how long it takes
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(super) attaches: u32,
    /// Idle devices whose memory is measured; 0: none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(super) idle: u32,
}

/// From a call of the daemon until the first block is read from the new device.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Attach {
    /// Of a client that is connected already.
    pub(super) call_ns: Vec<u64>,
    /// Of the command line: the program's start is part of it.
    pub(super) command_ns: Vec<u64>,
}

/// Memory of the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Idle {
    pub(super) devices: u32,
    pub(super) before: Memory,
    pub(super) after: Memory,
}

/// In KiB, as the kernel counts it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) pss_kib: u64,
    pub(super) rss_kib: u64,
}

/// What only this side knows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) kernel: String,
    pub(super) cpus: usize,
    pub(super) fio: String,
    pub(super) data_paths: Vec<String>,
}

const IMAGE_MB: u32 = 256;
const IDLE_INSTANCE: &str = "idle";

/// Measures by `plan` and leaves all that was seen in `out`.
pub(super) fn run(plan: &Plan, jobs: &[Job], out: &Path) -> Result<()> {
    let home = tempfile::Builder::new().prefix("loopengine-figures-").tempdir_in("/run")?;
    let place = home.path().join("store");
    let _store = Store::new(Fs::Xfs, 700, &place)?;
    let daemon = Daemon::start(&home.path().join("loopengine"))?;
    let facts = Facts {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        fio: sh::capture(Command::new("fio").arg("--version"), Duration::from_secs(60))?.trim().to_owned(),
        data_paths: engine::data_paths()?,
    };
    write(out, "facts.json", &facts)?;

    let rig = Rig::new(&place.join("bench.img"), IMAGE_MB, &daemon, &facts.data_paths)?;
    for round in 0..plan.rounds {
        let mut targets = rig.targets.clone();
        targets.rotate_left(round as usize % rig.targets.len());
        let start = Instant::now();
        let length = Length { ramp_ms: plan.run_ms / 5, run_ms: plan.run_ms };
        let json = fio::run(jobs, &targets, length, home.path())?;
        let samples = fio::parse(&json)?;
        fs::write(out.join(format!("round-{round:02}.json")), json)?;
        println!(
            "round {} of {}: {} samples, {} s",
            round + 1,
            plan.rounds,
            samples.len(),
            start.elapsed().as_secs()
        );
    }
    drop(rig);

    let socket = home.path().join("loopengine/control");
    if plan.attaches > 0 {
        let attach = attach(plan.attaches, &daemon, &socket, &place)?;
        println!("attach: {} devices", attach.call_ns.len());
        write(out, "attach.json", &attach)?;
    }
    if plan.idle > 0 {
        let idle = idle(plan.idle, &daemon, &socket, &place)?;
        println!("idle: {} devices, {} KiB", idle.devices, idle.after.pss_kib);
        write(out, "idle.json", &idle)?;
    }
    daemon.stop()
}

fn attach(count: u32, daemon: &Daemon, socket: &Path, place: &Path) -> Result<Attach> {
    let image = place.join("attach.img");
    File::create(&image)?.set_len(64 << 20)?;
    let mut client = Client::new(socket)?;
    let (mut call_ns, mut command_ns) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let start = Instant::now();
        let device = client.attach("default", &image)?;
        read_first_block(Path::new(&device))?;
        call_ns.push(nanoseconds(start));
        client.detach(&device)?;
    }
    // Starting a program is slow where CPUs are emulated: a few say enough.
    for _ in 0..count.min(10) {
        let start = Instant::now();
        let device = daemon.attach(&image, &[])?;
        read_first_block(&device)?;
        command_ns.push(nanoseconds(start));
        daemon.detach(&device)?;
    }
    fs::remove_file(image)?;
    Ok(Attach { call_ns, command_ns })
}

fn idle(count: u32, daemon: &Daemon, socket: &Path, place: &Path) -> Result<Idle> {
    daemon.run(&["instance", "create", IDLE_INSTANCE, "--max", &count.to_string()])?;
    let before = memory(daemon.pid())?;
    let mut client = Client::new(socket)?;
    for number in 0..count {
        let image = place.join(format!("idle-{number}.img"));
        File::create(&image)?.set_len(1 << 20)?;
        client.attach(IDLE_INSTANCE, &image).with_context(|| format!("after {number} devices"))?;
    }
    let after = memory(daemon.pid())?;
    Ok(Idle { devices: count, before, after })
}

/// Past the page cache, as a file system's first read would come.
fn read_first_block(device: &Path) -> Result<()> {
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::DIRECT.bits())?)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))?;
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer[start..start + 4096], 0)
        .with_context(|| format!("cannot read {}", device.display()))
}

fn memory(pid: u32) -> Result<Memory> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    match (field(&text, "Pss:"), field(&text, "Rss:")) {
        (Some(pss_kib), Some(rss_kib)) => Ok(Memory { pss_kib, rss_kib }),
        _ => bail!("{} has no Pss and Rss", path.display()),
    }
}

/// The number of KiB after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
}

fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn write<T: Serialize>(out: &Path, name: &str, value: &T) -> Result<()> {
    let path = out.join(name);
    fs::write(&path, serde_json::to_vec_pretty(value)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_words() {
        let text = "5581-7ffd ---p 00000000 00:00 0 [rollup]\nRss:               14332 kB\nPss:                9876 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(field(text, "Pss:"), Some(9876));
        assert_eq!(field(text, "Rss:"), Some(14332));
        assert_eq!(field(text, "Swap:"), None);
        let own = memory(std::process::id()).unwrap();
        assert!(own.rss_kib > 100);
    }
}
