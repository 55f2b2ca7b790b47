// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile kinds that misuse pools and their devices. Each runs until it is killed.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::Child;
use std::time::Duration;

use anyhow::Result;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::json;

use super::descriptors::Pool;
use super::kinds::Scene;
use super::wire::call;

/// Pools that a user tries to hold: more than its limit.
const POOLS: usize = 20;
const IMAGE_BYTES: u64 = 4 << 20;

/// Opens pools, closes some, and abandons others.
pub(super) fn pools(scene: &mut Scene) -> Result<()> {
    let mut held = Vec::new();
    loop {
        for _ in 0..scene.random.usize(1..=POOLS) {
            let pool = Pool::open(scene);
            match scene.random.u8(..4) {
                0 => {
                    let close = json!({ "name": pool.name, "force": scene.random.bool() });
                    let _ = pool.peer.call("io.loopengine.Private.Close", &close, &[]);
                }
                1 => drop(pool.mounts),
                _ if held.len() < 8 => held.push((pool.name, pool.mounts)),
                _ => {}
            }
        }
        scene.say(format!("holds {} pools, then closes all", held.len()));
        scene.rest(500);
        held.clear();
    }
}

/// Kills tenants at random moments: the command, its mount helper, or both.
pub(super) fn killed(scene: &mut Scene) -> Result<()> {
    let script = "truncate -s 1M i$$; while :; do losetup -f i$$; losetup -D; done";
    loop {
        let mut child = scene.start_run(&["--max", "3", "--", "sh", "-c", script], true)?;
        scene.rest(2500);
        match scene.random.u8(..3) {
            0 => {
                scene.say("kills a tenant's command");
                let _ = child.kill();
            }
            1 => {
                let mounters = mounters(scene.uid);
                scene.say(format!("kills {} mounters", mounters.len()));
                for pid in mounters {
                    let _ = kill_process(pid, Signal::KILL);
                }
                scene.rest(1000);
            }
            _ => scene.say("kills a tenant with all its processes"),
        }
        signal(&mut child, Signal::KILL);
        let _ = child.wait();
    }
}

/// Stops tenants that hold pools, descriptors and an incomplete call.
pub(super) fn stopped(scene: &mut Scene) -> Result<()> {
    let script = "truncate -s 1M i$$; losetup -f i$$; exec 3</dev/loop0; while :; do losetup -a; done";
    loop {
        let mut children = Vec::new();
        for _ in 0..scene.random.usize(1..=4) {
            children.push(scene.start_run(&["--max", "2", "--", "sh", "-c", script], true)?);
        }
        scene.rest(2000);
        scene.say(format!("stops {} tenants (SIGSTOP)", children.len()));
        children.iter_mut().for_each(|child| signal(child, Signal::STOP));
        let null = std::fs::File::open("/dev/null")?;
        let peer = scene.connect();
        let _ = peer.send(&call("io.loopengine.Private.Open", &json!({ "spec": {} })), &[]);
        let _ = peer.send(b"{\"method\":", &[null.as_fd(); 2]);
        scene.rest(3000);
        for mut child in children {
            signal(&mut child, Signal::KILL);
            let _ = child.wait();
        }
    }
}

/// Requests more devices than the limit allows, by several processes at once.
pub(super) fn losetup_storm(scene: &mut Scene) -> Result<()> {
    let script = "truncate -s 1M image; for n in 1 2 3; do \
                  (for m in 1 2 3 4 5 6; do losetup -f image; done) & done; losetup -a; wait";
    loop {
        scene.say("binds as many devices as it can");
        scene.works(&["sh", "-c", script]);
        scene.say("unbinds all");
        scene.works(&["losetup", "-D"]);
    }
}

/// Issues calls of loop(4) with invalid addresses, which no system program can do.
const IOCTLS: &str = r#"
srand($ARGV[0]);
my @calls = (0x4C00 .. 0x4C0A, 0x4C80 .. 0x4C82, 0x1260, 0x125F, 0x80081272);
my @values = (0, 1, -1, 4095, 0xdead0000, 0x7fffffffffff, -4096);
for (1 .. 300) {
    my $path = ("/dev/loop-control", "/dev/loop0", "/dev/loop1")[rand 3];
    open(my $file, "+<", $path) or open($file, "<", $path) or next;
    for (1 .. 5) {
        my $number = $calls[rand @calls];
        ioctl($file, $number, $values[rand @values] + 0);
    }
}
"#;

/// Issues calls of loop(4) with invalid arguments.
pub(super) fn bad_pointers(scene: &mut Scene) -> Result<()> {
    scene.works(&["truncate", "-s", "1M", "image"]);
    loop {
        scene.works(&["losetup", "-f", "image"]);
        let seed = scene.random.u16(..).to_string();
        scene.say(format!("makes 1500 calls of loop(4) with invalid arguments, seed {seed}"));
        scene.works(&["perl", "-e", IOCTLS, &seed]);
        scene.works(&["losetup", "-D"]);
    }
}

/// Truncates, punches, renames and removes an image while it is bound and in use.
pub(super) fn image_changes(scene: &mut Scene) -> Result<()> {
    loop {
        let image = std::fs::File::create("image")?;
        image.set_len(IMAGE_BYTES)?;
        let device = scene.output(&["losetup", "-f", "--show", "image"]);
        let Ok(open) = OpenOptions::new().read(true).write(true).open(&device) else {
            scene.rest(200);
            continue;
        };
        for _ in 0..scene.random.u32(1..=30) {
            let at = scene.random.u64(..IMAGE_BYTES / 4096) * 4096;
            let what = scene.random.u8(..7);
            scene.say(
                ["truncates", "punches", "removes", "replaces", "renames", "extends", "reads"]
                    [usize::from(what)],
            );
            match what {
                0 => image.set_len(at)?,
                1 => {
                    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let _ = fallocate(&image, how, at, 65536);
                }
                2 => drop(std::fs::remove_file("image")),
                3 => {
                    std::fs::File::create("other")?;
                    std::fs::rename("other", "image")?;
                }
                4 => drop(std::fs::rename("image", "renamed")),
                5 => image.set_len(IMAGE_BYTES + at)?,
                _ => drop(open.read_at(&mut [0; 65536], at)),
            }
            let _ = open.write_at(&[7; 65536], at);
            if scene.random.bool() {
                let _ = open.sync_data();
            }
            if scene.random.u8(..8) == 0 {
                scene.works(&["losetup", "-c", &device]);
            }
        }
        drop(open);
        scene.works(&["losetup", "-d", &device]);
    }
}

/// Mounts and unmounts as fast as possible.
pub(super) fn mount_storm(scene: &mut Scene) -> Result<()> {
    let script = "truncate -s 8M image && mkfs.ext4 -q image && mkdir -p mnt";
    scene.works(&["sh", "-c", script]);
    loop {
        scene.say("mounts");
        scene.works(&["mount", "-o", "loop", "image", "mnt"]);
        if let Ok(mut file) = std::fs::File::create("mnt/file") {
            let _ = file.write_all(&[7; 4096]);
        }
        scene.say("unmounts");
        let lazy = scene.random.bool();
        scene.works(if lazy { &["umount", "-l", "mnt"] } else { &["umount", "mnt"] });
        if scene.random.u8(..4) == 0 {
            scene.works(&["losetup", "-D"]);
        }
    }
}

/// Sends a signal to the process group that `child` leads.
pub(super) fn signal(child: &mut Child, signal: Signal) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, signal);
    }
    std::thread::sleep(Duration::from_millis(1));
}

/// Mount helpers of the user `uid`.
fn mounters(uid: u32) -> Vec<Pid> {
    let mut found = processes(|of| of == uid);
    found.retain(|pid| {
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"mounter")
    });
    found
}

/// Running processes of the users.
pub(super) fn processes(is_one: impl Fn(u32) -> bool) -> Vec<Pid> {
    let Ok(all) = std::fs::read_dir("/proc") else { return Vec::new() };
    let lives = |status: &str| !status.contains("\nState:\tZ");
    let uid = |status: &str| {
        status.lines().find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse().ok())
    };
    all.flatten()
        .filter(|entry| {
            // root owns the directory of a process that is not dumpable.
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            lives(&status) && uid(&status).is_some_and(&is_one)
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
        .collect()
}
