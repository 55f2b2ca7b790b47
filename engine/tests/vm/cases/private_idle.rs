// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounted private loop devices cost the daemon next to nothing while nothing happens, and are
//! released soon after the last close: at once after a sign of it, within a second without one.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};

/// From the last sign until the interval of polls has grown to its maximum, and a reserve.
const QUIET: Duration = Duration::from_secs(25);
/// How long context switches are counted, and how many a second are allowed.
const COUNTED: Duration = Duration::from_secs(5);
const SWITCHES_MAX: u64 = 30;
/// A last close with a sign: the goal is 50 ms, and an emulated machine needs more.
const SIGNED: Duration = Duration::from_millis(250);
/// One without a sign: a poll per second, and the time of an emulated machine.
const UNSIGNED: Duration = Duration::from_millis(1800);

pub(super) fn cases() -> Vec<Case> {
    vec![case("private_idle::mounted_devices", Needs::Private, 240, mounted_devices)]
}

/// Mounted in six ways, of which one gives no sign at its end.
const MOUNTED: &str = r#"
    now() { local t=${EPOCHREALTIME/./}; echo $((t / 1000)); }
    # lag WHAT N CMD...: milliseconds from CMD until the device of image N has no size.
    lag() {
        local what=$1 size=/sys/class/block/${name[$2]}/size from i; shift 2
        "$@" || wrong "$what"; from=$(now)
        for i in {1..200}; do [ "$(< $size)" = 0 ] && break; sleep 0.005; done
        [ "$(< $size)" = 0 ] || wrong "$what: still bound"
        echo "$what $(($(now) - from))"
    }
    # The device of image N.
    of() { losetup -n -O NAME -j fs$1; }
    # hold N CMD...: runs CMD in its own mount namespace, and keeps that.
    hold() { local n=$1; shift; unshare -m "$@" 7<> hold$n & held[$n]=$!; until [ -e at$n ]; do sleep 0.05; done; }
    release() { echo > hold$1; wait ${held[$1]}; }
    for n in {1..6}; do truncate -s 8M fs$n; mkfs.ext2 -q fs$n; mkdir mnt$n; mkfifo hold$n; done
    # A new namespace copies all mounts: these come first.
    works "mount 5" mount -o loop fs5 mnt5; hold 5 bash -c '> at5; read -u 7'; works "umount 5" umount mnt5
    hold 6 bash -c 'mount -o loop fs6 mnt6; > at6; read -u 7'
    for n in {1..4}; do works "mount $n" mount -o loop fs$n mnt$n; done
    for n in {1..6}; do dev=$(of $n); name[$n]=${dev#/dev/}; [ "$dev" ] || wrong "no device $n"; done
    pause idle
    lag umount 1 umount mnt1; lag umount 2 umount mnt2; lag umount 3 umount mnt3
    lag namespace 6 release 6
    # A descriptor is the last user.
    exec 8< /dev/${name[4]}; umount mnt4; sleep 5; close() { exec 8<&-; }; lag close 4 close
    pause later
    lag copy 5 release 5
    soon "unbound" "" losetup -a
"#;

fn mounted_devices(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start(MOUNTED)?.wait("idle")?;
    std::thread::sleep(QUIET);
    let switches = switches_during(&daemon, COUNTED)?;
    ctx.note(format!("{switches} context switches in {COUNTED:?}"));
    ensure!(switches < SWITCHES_MAX * COUNTED.as_secs(), "{switches} context switches in {COUNTED:?}");
    script.resume("idle")?;
    let script = script.wait("later")?;
    std::thread::sleep(QUIET);
    script.resume("later")?;
    let out = script.finish()?;
    ctx.note(out.replace('\n', " ms, ") + " ms");
    for line in out.lines() {
        let Some((what, lag)) = line.split_once(' ') else { fail!("{line}") };
        let lag = Duration::from_millis(lag.parse()?);
        let limit = if what == "copy" { UNSIGNED } else { SIGNED };
        ensure!(lag < limit, "{lag:?} after the last close: {what}");
    }
    daemon.stop()
}

/// The voluntary context switches of all threads of the daemon.
fn switches_during(daemon: &Daemon, time: Duration) -> Res<u64> {
    let tasks = format!("/proc/{}/task", daemon.pid()?);
    let switches = || -> Res<BTreeMap<PathBuf, u64>> {
        let mut switches = BTreeMap::new();
        for task in fs::read_dir(&tasks).at(&tasks)? {
            let task = task?.path();
            // It may have ended.
            let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            switches.insert(task, line.ok_or("no count of switches")?.trim().parse()?);
        }
        Ok(switches)
    };
    let before = switches()?;
    std::thread::sleep(time);
    let count = |(task, now): (PathBuf, u64)| now - before.get(&task).copied().unwrap_or(0);
    Ok(switches()?.into_iter().map(count).sum())
}
