// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private pools on disks of the kernel's loop driver: what the driver does differently from ublk,
//! and what the host and processes that bypass the interception can do to a tenant's disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::pools_end::FuseMount;
use super::private_mapped::{MODULES, installed};
use super::private_partitions::same;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::host;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("pools::a_last_close_writes_back", Needs::Private, 300, a_last_close_writes_back),
        case("pools::mounts_outlive_the_daemon", Needs::Private, 120, mounts_outlive_the_daemon),
        case("pools::the_next_daemon_removes_idle_disks", Needs::Private, 90, idle_disks_are_removed),
        case("pools::mounts_outlive_their_tenant", Needs::Private, 120, mounts_outlive_their_tenant),
        case("pools::disks_without_a_file_are_bound", Needs::Private, 90, disks_are_bound),
        case(
            "pools::unbound_by_a_bypass_of_the_interception",
            Needs::Private,
            120,
            unbound_by_a_bypass_of_the_interception,
        ),
        case("pools::last_closes_are_reported", Needs::Private, 120, last_closes_are_reported),
        case("pools::threads_do_not_grow_with_pools", Needs::Private, 300, threads_do_not_grow_with_pools),
        case("pools::losetup_of_the_host", Needs::Private, 600, losetup_of_the_host),
        case("pools::an_opened_disk_is_bound", Needs::Private, 90, an_opened_disk_is_bound),
        case("pools::the_daemon_opens_no_other_disk", Needs::Private, 90, no_other_disk_is_opened),
        case("pools::a_tenant_has_no_image_on_fuse", Needs::Private, 120, no_image_on_fuse),
        case("pools::dissect_needs_a_bound_device", Needs::Private, 120, |ctx| {
            installed(&["systemd-dissect"])?;
            let daemon = Daemon::start(ctx)?;
            Inside::new(ctx, &daemon).run(DISSECT)?;
            daemon.stop()
        }),
        case("pools::kpartx_of_a_file", Needs::Private, 580, |ctx| {
            installed(&["kpartx"])?;
            same(ctx, &format!("{MODULES}\n{KPARTX_OF_A_FILE}"))
        }),
    ]
}

/// The file that the driver has for this device; empty: none.
pub(super) fn backing_file(number: u32) -> String {
    let file = format!("/sys/block/loop{number}/loop/backing_file");
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

fn is_empty_file(number: u32) -> bool {
    backing_file(number).starts_with("/memfd:loopengine")
}

/// As with the kernel's own: the image has the data when close(2) returns.
fn a_last_close_writes_back(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M alpha; dev=$(losetup -f --show a)
        for i in {1..50}; do
            printf "round $i " | dd of=$dev conv=notrunc 2>/dev/null
            same "after a close" "$(head_of a | tr ' ' _)" "$(printf "round_${i}_" | head -c 16)"
        done
        losetup -d $dev
        # The device is open elsewhere when its writer closes it, and is detached then.
        for i in {1..20}; do
            dev=$(losetup -f --show a); exec 7<$dev
            printf "detach $i " | dd of=$dev conv=notrunc 2>/dev/null
            losetup -d $dev; exec 7<&-
            soon "unbound" "" losetup -a
            same "after -d" "$(head_of a | cut -d' ' -f1,2)" "detach $i"
        done
        "#,
    )?;
    daemon.stop()
}

/// A file system mounted by root's tenant goes on without the daemon, and the disk ends with it.
fn mounts_outlive_the_daemon(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start(
        r#"
        truncate -s 16M fs; mkfs.ext4 -q fs; mkdir mnt; works "mount" mount -o loop fs mnt
        pause mounted
        works "write" dd if=/dev/zero of=mnt/file bs=1M count=4 conv=fsync
        works "umount" umount mnt
        "#,
    )?;
    let script = script.wait("mounted")?;
    let number = host::loop_numbers().into_iter().find(|number| backing_file(*number).ends_with("/fs"));
    let Some(number) = number else { return Err("no loop device has the image".into()) };
    daemon.kill()?;
    script.resume("mounted")?;
    script.finish()?;
    let gone = tools::until(Duration::from_secs(5), || backing_file(number).is_empty().then_some(()));
    ensure!(gone.is_some(), "the disk is still bound to {}", backing_file(number));
    let found = tools::ok(&["debugfs", "-R", "stat /file", &ctx.path("fs")])?;
    ensure!(found.contains("Size: 4194304"), "{found}");
    tools::ok(&["e2fsck", "-fn", &ctx.path("fs")])?;
    daemon.restart()?;
    daemon.stop()
}

fn idle_disks_are_removed(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon)
        .start("image a 1M a; image b 1M b; losetup -f a; losetup -f b; pause bound")?
        .wait("bound")?;
    ensure!(host::loop_numbers().len() >= 2, "no disks");
    daemon.kill()?;
    script.kill();
    ensure!(!host::loop_numbers().is_empty(), "the case proves nothing: the disks ended with their daemon");
    daemon.restart()?;
    let left = host::loop_numbers();
    ensure!(left.is_empty(), "left by the previous daemon: {left:?}");
    let listed = daemon.json(&["list"])?;
    ensure!(listed.as_array().is_some_and(Vec::is_empty), "{listed}");
    daemon.stop()
}

/// The driver takes no disk away: a mount that left its tenant stays, and so does the pool.
fn mounts_outlive_their_tenant(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start(
        r#"
        truncate -s 16M fs; mkfs.ext4 -q fs; mkdir mnt; works "mount" mount -o loop fs mnt
        echo $$ > pid; pause mounted
        "#,
    )?;
    let script = script.wait("mounted")?;
    let pid = fs::read_to_string(ctx.path("pid"))?;
    let mut keeper = std::process::Command::new("nsenter");
    keeper.args(["-t", pid.trim(), "-m", "sleep", "1000"]);
    let keeper = tools::Running::start(keeper)?;
    std::thread::sleep(Duration::from_millis(300));
    script.kill();
    let warned = || daemon.log().contains("until its last user closes it").then_some(());
    ensure!(tools::until(Duration::from_secs(5), warned).is_some(), "no warning: {}", daemon.log());
    std::thread::sleep(Duration::from_secs(1));
    let pools = daemon.json(&["list", "--all"])?.to_string();
    ensure!(pools.contains("loop0") || !host::loop_numbers().is_empty(), "the disk was taken away: {pools}");
    drop(keeper);
    let gone = tools::until(Duration::from_secs(5), || host::loop_numbers().is_empty().then_some(()));
    ensure!(gone.is_some(), "disks are left: {:?}", host::loop_numbers());
    let ended = || daemon.cli(&["losetup", "-a"]).ok().filter(|done| done.code == 3);
    ensure!(tools::until(Duration::from_secs(5), ended).is_some(), "the pool has not ended");
    tools::ok(&["e2fsck", "-fn", &ctx.path("fs")])?;
    daemon.stop()
}

/// A disk of the driver without a file would be the next one of the host's `losetup -f`.
fn disks_are_bound(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon)
        .start("for i in {0..7}; do size /dev/loop$i > /dev/null; done; pause there")?
        .wait("there")?;
    let numbers = host::loop_numbers();
    ensure!(numbers.len() == 8 && numbers.iter().all(|number| is_empty_file(*number)), "{numbers:?}");
    for number in &numbers {
        let flag = fs::read_to_string(format!("/sys/block/loop{number}/loop/partscan"))?;
        ensure!(flag.trim() == "0", "loop{number} has partscan");
    }
    script.resume("there")?;
    script.finish()?;
    daemon.stop()
}

/// A process that calls the driver itself unbinds a tenant's disk: the tenant's names do not lead to
/// whatever the host binds next under this number.
fn unbound_by_a_bypass_of_the_interception(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start(
        r#"
        image a 1M alpha; image b 1M beta; works "a" losetup /dev/loop0 a; pause bound
        same "its name has no file" "$(size /dev/loop0)" 0
        works "bound again" losetup /dev/loop0 b; same "b" "$(head_of /dev/loop0)" beta
        pause again
        "#,
    )?;
    let script = script.wait("bound")?;
    let of =
        |name: &str| host::loop_numbers().into_iter().find(|number| backing_file(*number).ends_with(name));
    let Some(number) = of("/a") else { return Err("no loop device has the image".into()) };
    let node = format!("/dev/loop{number}");
    tools::ok(&["losetup", "-d", &node])?;
    // The host binds it before the daemon looks.
    let other = ctx.path("of-the-host");
    fs::write(&other, [b'h'; 1 << 20])?;
    let bound = tools::run(&["losetup", &node, &other])?;
    script.resume("bound")?;
    let script = script.wait("again")?;
    if bound.code == 0 {
        ensure!(backing_file(number) == other, "the host's device has {}", backing_file(number));
        tools::ok(&["losetup", "-d", &node])?;
    }
    script.resume("again")?;
    script.finish()?;
    let _ = tools::run(&["losetup", "-d", &node]);
    daemon.stop()
}

/// The host's `losetup -f` gets no disk of a pool, and both work beside each other.
fn losetup_of_the_host(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let rounds = if ctx.host.full { 10_000 } else { 300 };
    let script = Inside::new(ctx, &daemon).start(
        r#"
        image a 1M alpha
        rounds=0
        until [ -e stop ]; do
            dev=$(losetup -f --show a) || { wrong "bind"; break; }
            [ "$(head_of $dev)" = alpha ] || { wrong "bytes"; break; }
            losetup -d $dev || { wrong "-d"; break; }
            rounds=$((rounds + 1))
        done
        echo $rounds
        "#,
    )?;
    let image = ctx.path("host");
    fs::write(&image, [b'h'; 1 << 16])?;
    for round in 0..rounds {
        let device = tools::ok(&["losetup", "-f", "--show", &image])?;
        let number: u32 = device.trim_start_matches("/dev/loop").parse()?;
        tools::ok(&["losetup", "-d", &device])?;
        ensure!(number < 1 << 18, "round {round}: the host got {device}");
    }
    fs::write(ctx.path("stop"), "")?;
    let of_tenant = script.finish()?;
    ctx.note(format!("{rounds} rounds of the host beside {of_tenant} of the tenant"));
    daemon.stop()
}

/// A mounted device costs no polls, and its last close is noticed at once.
fn last_closes_are_reported(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start(
        r#"
        truncate -s 16M fs; mkfs.ext4 -q fs; mkdir mnt; works "mount" mount -o loop fs mnt
        pause mounted
        works "umount" umount mnt; sleep 0.1; same "unbound" "$(losetup -a)" ""
        "#,
    )?;
    let script = script.wait("mounted")?;
    let wakeups = || -> Res<BTreeMap<PathBuf, u64>> {
        let mut wakeups = BTreeMap::new();
        for thread in event_threads(&daemon)? {
            let status = fs::read_to_string(thread.join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            wakeups.insert(thread, line.ok_or("no count of switches")?.trim().parse()?);
        }
        Ok(wakeups)
    };
    // The mount itself, and udev, have changed the disk until now.
    std::thread::sleep(Duration::from_secs(3));
    let before = wakeups()?;
    std::thread::sleep(Duration::from_secs(5));
    // A thread may have replaced another one.
    let count = |(thread, now): (PathBuf, u64)| now - before.get(&thread).copied().unwrap_or(0);
    let polls: u64 = wakeups()?.into_iter().map(count).sum();
    ctx.note(format!("{polls} wake-ups in 5 s"));
    // One poll per second reads the names. It wakes the leader, its follower to monitor it, and that
    // one again when its time is up.
    ensure!(polls <= 3 * 15, "{polls} wake-ups for polls in 5 s");
    script.resume("mounted")?;
    script.finish()?;
    daemon.stop()
}

/// The threads that the pools of a daemon share.
fn event_threads(daemon: &Daemon) -> Res<Vec<PathBuf>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid()?)).at("threads")?;
    let named =
        |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "pool-events");
    Ok(tasks.flatten().map(|task| task.path()).filter(named).collect())
}

/// Pools with a bound device and a listener each, then more of them.
fn threads_do_not_grow_with_pools(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let before = daemon.settled_footprint()?.threads;
    let mut scripts = vec![];
    for name in 0..12 {
        let script = format!("image i{name} 1M a; works bind losetup -f i{name}; pause bound{name}");
        scripts.push(Inside::new(ctx, &daemon).start(&script)?.wait(&format!("bound{name}"))?);
    }
    let after = daemon.settled_footprint()?.threads;
    let shared = event_threads(&daemon)?.len();
    ctx.note(format!("{before} threads without a pool, {after} with 12"));
    ensure!(shared == 2, "{shared} idle threads of pools");
    ensure!(after == before, "{before} threads without a pool, {after} with 12");
    for (name, script) in scripts.into_iter().enumerate() {
        script.resume(&format!("bound{name}"))?;
        script.finish()?;
    }
    daemon.stop()
}

/// A pool `p` in a directory, for commands that bypass the interception.
fn pool_in_directory(ctx: &Ctx, daemon: &Daemon) -> Res<FuseMount> {
    let dir = ctx.path("pool");
    fs::create_dir(&dir)?;
    daemon.ok(&["instance", "mount", "--name", "p", "--max", "4", &dir])?;
    Ok(FuseMount(dir))
}

/// udev or lsblk of the host has an unbound disk open for a moment, which the socket then binds.
fn an_opened_disk_is_bound(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let mounted = pool_in_directory(ctx, &daemon)?;
    let image = ctx.path("image");
    fs::write(&image, [b'a'; 1 << 16])?;
    let before = host::loop_numbers();
    daemon.ok(&["losetup", "--pool", "p", "-f"])?;
    let new = host::loop_numbers().into_iter().find(|number| !before.contains(number));
    let number = new.ok_or("the pool has no disk")?;
    let bind = || daemon.cli(&["losetup", "--pool", "p", "loop0", &image]);
    let holder = fs::File::open(format!("/dev/loop{number}"))?;
    let refused = bind()?;
    ensure!(refused.code != 0 && refused.err.contains("busy"), "bound while it is open: {refused:?}");
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(holder);
    });
    let bound = bind()?;
    ensure!(closer.join().is_ok() && bound.code == 0, "{bound:?}");
    drop(mounted);
    daemon.stop()
}

/// A disk that is open for a moment counts as in use. The daemon looks for other users of each image.
fn no_other_disk_is_opened(ctx: &Ctx) -> Res {
    use rustix::fs::inotify;
    let daemon = Daemon::start(ctx)?;
    let mounted = pool_in_directory(ctx, &daemon)?;
    let (image, other) = (ctx.path("image"), ctx.path("other"));
    fs::write(&image, [b'a'; 1 << 16])?;
    fs::write(&other, [b'b'; 1 << 16])?;
    daemon.ok(&["losetup", "--pool", "p", "-f", &image])?;
    let bound = |number: &u32| backing_file(*number).ends_with("/image");
    let number = host::loop_numbers().into_iter().find(bound).ok_or("no disk has the image")?;
    let opens = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&opens, format!("/dev/loop{number}"), inotify::WatchFlags::OPEN)?;
    daemon.ok(&["losetup", "--pool", "p", "-f", &other])?;
    let device = daemon.attach(&[&other, "--force"])?;
    // The check of a pool's image runs on another thread.
    std::thread::sleep(Duration::from_secs(1));
    let opened = rustix::io::read(&opens, &mut [0; 4096]);
    ensure!(opened == Err(rustix::io::Errno::AGAIN), "the disk of another image was opened");
    daemon.detach(&device)?;
    drop(mounted);
    daemon.stop()
}

/// The driver would wait for the server of a plain user's FUSE, and nobody could end that.
fn no_image_on_fuse(ctx: &Ctx) -> Res {
    if !Path::new("/usr/bin/fuse2fs").exists() && tools::run(&["sh", "-c", "command -v fuse2fs"])?.code != 0 {
        crate::harness::skip!("fuse2fs is not installed");
    }
    let daemon = Daemon::start(ctx)?;
    let (below, dir) = (ctx.path("below"), ctx.path("hung"));
    tools::sh(format!(
        "chmod 777 {}; truncate -s 16M {below}; mkfs.ext4 -q {below}; mkdir {dir}; \
         fuse2fs -o allow_other {below} {dir}; truncate -s 1M {dir}/image; chmod 666 {dir}/image",
        ctx.dir.display()
    ))?;
    let _mounted = FuseMount(dir);
    Inside::new(ctx, &daemon).user(1000).run(
        r#"
        refused "an image on FUSE" "not supported" losetup -f hung/image
        image a 1M alpha; works "another" losetup -f a
        "#,
    )?;
    daemon.stop()
}

/// kpartx finds the device of a file by a loopN in /sys/devices and its /dev/block/M:m; over ublk
/// there is none. For the kernel's driver the script makes the links, as udev would.
const KPARTX_OF_A_FILE: &str = r#"
ours() { [ -d /dev/loopfs ]; }
ours || { mkdir -p /dev/block; for i in {0..15}; do ln -sfn ../loop$i /dev/block/7:$i; done; }
table "label: gpt" "start=2048,size=32768" "size=8192" | sfdisk -q disk
maps() { sed -E 's/\([0-9:]+\)/()/; s/linear [0-9:]+/linear/; s,/[^ ]*/,,g' said; }
state() { echo "mapped: $(dmsetup ls | cut -f 1 | sort | xargs), nodes: $(ls /dev/mapper | xargs), bound: $(losetup -nj disk -O NAME | xargs)"; }
report "add" kpartx -asv $PWD/disk; maps; state
mkfs.ext4 -q /dev/mapper/loop0p1; mkdir -p mnt
report "mount" mount /dev/mapper/loop0p1 mnt
report "delete while mounted" kpartx -dv $PWD/disk; maps; state
report "umount" umount mnt
report "delete" kpartx -dv $PWD/disk; maps; gone; state
report "delete again" kpartx -dv $PWD/disk; maps; state
ours || rm -rf /dev/block
"#;

/// A bound device is another disk than an unbound one, with another number. systemd-dissect compares
/// the number before and after it binds a file, and takes the partitions for those of a stranger.
const DISSECT: &str = r#"
truncate -s 64M disk; mkdir mnt
printf '%s\n' "label: gpt" "size=16M,type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709,name=root" | sfdisk -q disk
unbound=$(stat -Lc %Hr:%Lr /dev/loop0); dev=$(losetup -fP --show disk)
[ "$(stat -Lc %Hr:%Lr $dev)" != "$unbound" ] || wrong "the number stays"
mkfs.ext4 -q ${dev}p1; mount ${dev}p1 mnt; mkdir -p mnt/{etc,usr,proc,sys,dev,run,tmp}
echo 'ID=trial' > mnt/etc/os-release; echo hello > mnt/file; umount mnt
holds "a bound device" "$(systemd-dissect $dev)" loopfs/loop0p1
works "mount" systemd-dissect --mount $dev mnt
same "file" "$(cat mnt/file)" hello
works "umount" umount -R mnt
losetup -d $dev; soon "unbound" "" losetup -a
refused "a file" "No suitable root partition" systemd-dissect disk
"#;
