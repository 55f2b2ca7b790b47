// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times attaching, from the call until the first block is read, and detaching, until it returns.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use super::Extras;
use crate::daemon::Daemon;
use crate::outcome::Attach;
use crate::site::Site;
use crate::target::{LoopDevice, Loops};
use crate::varlink::Client;
use crate::{daemon, sh};

const IMAGE_BYTES: u64 = 64 << 20;
/// Starting a program is slow on emulated CPUs: a few starts suffice.
const COMMANDS: u32 = 10;

/// Times losetup on kernel loop, and the engine's command and calls, with few and with many
/// devices.
pub(super) fn run(extras: &Extras, site: &Site) -> Result<Vec<Attach>> {
    let home = site.place.directory("attach")?;
    let images = site.place.images.join("attach");
    fs::create_dir_all(&images)?;
    let image = sparse(&images, "one", IMAGE_BYTES)?;
    let loops = &site.place.loops;
    let mut figures = Vec::new();
    let commands = extras.attaches.min(COMMANDS);

    for present in [0, extras.present] {
        let others: Result<Vec<LoopDevice>> =
            (0..present).map(|n| loops.attach(&sparse(&images, &n.to_string(), 1 << 20)?, true)).collect();
        match others {
            Ok(_others) => {
                let by = ByLosetup { loops, device: None };
                figures.push(series("kernel loop", "command", present, commands, &image, by)?);
            }
            Err(error) => {
                sh::interrupted()?;
                println!("attach: kernel loop: {error:#}");
            }
        }
    }
    for (frontend, target) in
        [("ublk", "loopengine"), ("loop", "loopengine loop"), ("fuse", "loopengine fuse")]
    {
        if frontend == "ublk" && !daemon::can_run_here() {
            continue;
        }
        let run_dir = home.join(frontend);
        let daemon = match Daemon::start_with(&run_dir, &["--backend", frontend]) {
            Ok(daemon) => daemon,
            Err(error) => {
                sh::interrupted()?;
                println!("attach: {target}: {error:#}");
                continue;
            }
        };
        let mut client = Client::new(&daemon.socket())?;
        for present in [0, extras.present] {
            for number in 0..present {
                client.attach("default", &sparse(&images, &number.to_string(), 1 << 20)?)?;
            }
            figures.push(series(target, "call", present, extras.attaches, &image, ByCall(&mut client))?);
            figures.push(series(target, "command", present, commands, &image, ByCommand(&daemon))?);
        }
        daemon.stop()?;
    }
    fs::remove_dir_all(images)?;
    Ok(figures)
}

/// A way to attach and detach.
trait Way {
    fn attach(&mut self, image: &Path) -> Result<PathBuf>;
    fn detach(&mut self, device: &Path) -> Result<()>;
}

/// Owns the device until it is detached, so that an aborted series detaches it too.
struct ByLosetup<'a> {
    loops: &'a Loops,
    device: Option<LoopDevice>,
}
struct ByCall<'a>(&'a mut Client);
struct ByCommand<'a>(&'a Daemon);

impl Way for ByLosetup<'_> {
    fn attach(&mut self, image: &Path) -> Result<PathBuf> {
        Ok(self.device.insert(self.loops.attach(image, true)?).path().to_owned())
    }

    fn detach(&mut self, _: &Path) -> Result<()> {
        self.device.take().map_or(Ok(()), LoopDevice::detach)
    }
}

impl Way for ByCall<'_> {
    fn attach(&mut self, image: &Path) -> Result<PathBuf> {
        self.0.attach("default", image).map(PathBuf::from)
    }

    fn detach(&mut self, device: &Path) -> Result<()> {
        self.0.detach(&device.to_string_lossy())
    }
}

impl Way for ByCommand<'_> {
    fn attach(&mut self, image: &Path) -> Result<PathBuf> {
        self.0.attach(image, &[])
    }

    fn detach(&mut self, device: &Path) -> Result<()> {
        self.0.detach(device)
    }
}

fn series(
    target: &str,
    how: &str,
    present: u32,
    count: u32,
    image: &Path,
    mut way: impl Way,
) -> Result<Attach> {
    let (mut attach_ns, mut detach_ns) = (Vec::new(), Vec::new());
    for _ in 0..count {
        sh::interrupted()?;
        let start = Instant::now();
        let device = way.attach(image)?;
        read_first_block(&device)?;
        attach_ns.push(nanoseconds(start));
        let start = Instant::now();
        way.detach(&device)?;
        detach_ns.push(nanoseconds(start));
    }
    println!("attach: {target} by {how}, {present} devices present: {count} times");
    // The device that is attached and detached counts too.
    Ok(Attach { target: target.into(), how: how.into(), present: present.max(1), attach_ns, detach_ns })
}

/// A sparse file of `bytes`.
pub(super) fn sparse(directory: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = directory.join(format!("{name}.img"));
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(bytes)?;
    Ok(path)
}

/// Reads with direct I/O, past the page cache.
fn read_first_block(device: &Path) -> Result<()> {
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::DIRECT.bits())?)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))?;
    file.read_exact_at(&mut buffer[start..start + 4096], 0)
        .with_context(|| format!("cannot read {}", device.display()))
}

fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
