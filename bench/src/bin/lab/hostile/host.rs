// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile kinds that need root: file systems below a tenant that hang or are full, and a careless
//! administrator. Each runs until it is killed.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Child;

use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::process::{Pid, Signal, kill_process};

use super::kinds::Scene;
use super::{fuse, guest, tenants};

/// Process id of the daemon.
pub(super) const DAEMON: &str = "LAB_HOSTILE_DAEMON";

/// Images on a FUSE file system that stops answering transfers, and the end of their tenants.
pub(super) fn hung_image(scene: &mut Scene) -> Result<()> {
    if !scene.inner {
        let hang = fuse::Hang::Transfers(scene.random.u32(..64));
        let server = fuse::Server::mount(&scene.home.join("fuse"), scene.uid, hang)?;
        let _inner = scene.start_inner()?;
        return server.serve();
    }
    let script = "d=$(losetup -f --show fuse/image) || exit; dd if=/dev/zero of=$d bs=64k count=8 conv=fsync & \
                  dd if=$d of=/dev/null bs=4k iflag=direct & sleep 1; losetup -d $d; wait";
    let mut gone: Vec<Child> = Vec::new();
    loop {
        scene.say("starts a tenant whose image hangs");
        let mut child = scene.start_run(&["--max", "2", "--", "sh", "-c", script], true)?;
        scene.rest(4000);
        scene.say("kills it");
        tenants::signal(&mut child, Signal::KILL);
        // It may wait for its image until the server ends.
        gone.push(child);
        gone.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }
}

/// Images larger than the free space of their file system.
pub(super) fn full_disk(scene: &mut Scene) -> Result<()> {
    let uid = scene.uid;
    let small = scene.home.join("small");
    std::fs::create_dir_all(&small)?;
    let options = format!("size=6M,uid={uid},gid={uid}");
    scene.works(&["mount", "-t", "tmpfs", "-o", &options, "small", &small.to_string_lossy()]);
    let script = "rm -f small/*; truncate -s 32M small/image; d=$(losetup -f --show small/image) || exit; \
                  dd if=/dev/zero of=$d bs=64k conv=fsync; mkfs.ext4 -q $d; losetup -d $d";
    loop {
        scene.say("starts a tenant that fills its file system");
        let mut child = scene.start_run(&["--max", "2", "--", "sh", "-c", script], true)?;
        scene.rest(6000);
        tenants::signal(&mut child, Signal::KILL);
        let _ = child.wait();
    }
}

/// A configuration file that is a FIFO when the daemon rereads it.
pub(super) fn fifo_config(scene: &mut Scene) -> Result<()> {
    let daemon = std::env::var(DAEMON)?.parse().ok().and_then(Pid::from_raw).context("no daemon")?;
    let (config, kept) = (guest::config(), guest::config().with_extension("kept"));
    if !kept.exists() {
        std::fs::copy(&config, &kept)?;
    }
    loop {
        let _ = std::fs::remove_file(&config);
        mkfifoat(CWD, &config, Mode::RUSR)?;
        scene.say("reloads a configuration that is a FIFO");
        kill_process(daemon, Signal::HUP)?;
        scene.rest(5000);
        scene.say("reloads a configuration that is a file");
        // Releases readers that wait for a writer.
        let writer =
            OpenOptions::new().write(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&config);
        std::fs::remove_file(&config)?;
        std::fs::copy(&kept, &config)?;
        drop(writer);
        kill_process(daemon, Signal::HUP)?;
        scene.rest(1000);
    }
}
