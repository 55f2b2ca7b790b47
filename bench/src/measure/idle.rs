// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory and CPU time of a daemon with idle devices.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::attach::sparse;
use crate::cost::Reading;
use crate::daemon::{self, Daemon};
use crate::outcome::Idle;
use crate::sh;
use crate::site::Site;
use crate::varlink::Client;

/// Time over which CPU time is measured.
const WATCH: Duration = Duration::from_secs(5);

/// Measures `count` devices of the engine, over ublk and over FUSE.
pub(super) fn run(count: u32, site: &Site) -> Result<Vec<Idle>> {
    let home = site.place.directory("idle")?;
    let mut figures = Vec::new();
    for (frontend, target) in
        [("ublk", "loopengine"), ("loop", "loopengine loop"), ("fuse", "loopengine fuse")]
    {
        if frontend == "ublk" && !daemon::can_run_here() {
            continue;
        }
        match one(count, frontend, target, site, &home.join(frontend)) {
            Ok(idle) => figures.push(idle),
            Err(error) => {
                sh::interrupted()?;
                println!("idle: {target}: {error:#}");
            }
        }
    }
    Ok(figures)
}

fn one(count: u32, frontend: &str, target: &str, site: &Site, run_dir: &std::path::Path) -> Result<Idle> {
    let images = site.place.images.join("idle");
    fs::create_dir_all(&images)?;
    let daemon = Daemon::start_with(run_dir, &["--backend", frontend])?;
    daemon.run(&["instance", "create", "idle", "--max", &count.to_string()])?;
    let pss_kib_before = pss(daemon.pid())?;
    let mut client = Client::new(&daemon.socket())?;
    for number in 0..count {
        sh::interrupted()?;
        let image = sparse(&images, &number.to_string(), 1 << 20)?;
        client.attach("idle", &image).with_context(|| format!("after {number} devices"))?;
    }
    let pss_kib = pss(daemon.pid())?;
    let (before, start) = (Reading::of(daemon.pid()), Instant::now());
    sh::pause(WATCH)?;
    let over_ns = u64::try_from(start.elapsed().as_nanos())?;
    let cpu_ns = Reading::of(daemon.pid()).since(&before).cpu_ns;
    daemon.stop()?;
    fs::remove_dir_all(images)?;
    println!("idle: {target}: {count} devices, {pss_kib} KiB, {} µs of CPU time", cpu_ns / 1000);
    Ok(Idle { target: target.into(), devices: count, pss_kib, pss_kib_before, cpu_ns, over_ns })
}

fn pss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    field(&text, "Pss:").with_context(|| format!("{path} has no Pss"))
}

/// KiB in the line that begins with `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(field("Rss:      12 kB\nPss:               9876 kB\n", "Pss:"), Some(9876));
        assert_eq!(field("", "Pss:"), None);
    }
}
