// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Podman with the options that `podman-setup` prints, and no others about loop devices.

use std::process::Command;

use super::private_bundle::{self as bundle, unbound};
use super::private_script::WORDS;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_containers::podman_crun", Needs::Private, 240, |ctx| podman(ctx, "crun")),
        case("private_containers::podman_runc", Needs::Private, 240, |ctx| podman(ctx, "runc"))
            .variant_if(true),
    ]
}

/// Podman's run directory, which needs a short path.
const RUN: &str = "/run/loopengine-podman";

/// Removes the files outside of the case's directory on drop.
struct Outside;

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(RUN);
    }
}

fn podman(ctx: &Ctx, runtime: &str) -> Res {
    for program in ["podman", runtime] {
        if tools::run(&["sh", "-c", &format!("command -v {program}")])?.code != 0 {
            skip!("{program} is not installed");
        }
    }
    let daemon = Daemon::start(ctx)?;
    let _outside = Outside;
    let setup = ["podman-setup", "podman", "--max", "2", "--mount", "ext4"];
    let options = daemon.ok(&setup)?;
    ensure!(daemon.ok(&setup[..2])? == options, "a second setup prints other options: {options}");
    let other = daemon.cli(&["podman-setup", "podman", "--max", "3"])?;
    ensure!(other.code == 4 && other.err.contains("has 2 devices"), "{other:?}");
    let work = ctx.path("work");
    std::fs::create_dir(&work).at(&work)?;

    let script = r#"
        cd /work
        [ $((0x$(sed -n 's/CapEff:\t//p' /proc/self/status) & 1 << 21)) = 0 ] || wrong "has CAP_SYS_ADMIN"
        truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt
        works "mount" mount -o loop a mnt
        same "source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 ext4"
        echo hello > mnt/file
        same "bound" "$(bound)" "/dev/loop0 /work/a"
        works "umount" umount mnt
        soon "unbound" "" losetup -a
        works "whole" e2fsck -fn a
        image b 1M bytes
        same "a device" "$(losetup --show /dev/loop1 b)" /dev/loop1
        same "its bytes" "$(head_of /dev/loop1)" bytes
        exit $bad"#;
    let mut command = Command::new("podman");
    command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--storage-driver", "vfs"]);
    command.args(["--runtime", runtime, "--root", &ctx.path("store"), "--runroot", RUN]);
    command.args(["run", "--rm", "--network", "none", "--log-driver", "none"]);
    command.args(options.split_whitespace());
    command.args(["--volume", &format!("{work}:/work"), "--rootfs", &bundle::root()?]);
    command.args(["bash", "-c", &format!("{WORDS}\n{script}")]);
    command.env("TMPDIR", &ctx.dir);
    bundle::end(Running::start(command)?)?;
    let file = tools::run(&["debugfs", "-R", "cat /file", &format!("{work}/a")])?.ok()?;
    ensure!(file.out == "hello\n", "the image has {:?}", file.out);
    unbound(&daemon, "podman")?;
    daemon.ok(&["podman-setup", "podman", "--remove"])?;
    let left = tools::sh("ls -d /run/loopengine-pools /run/cdi/loopengine-* 2>/dev/null || true")?;
    ensure!(left.is_empty(), "left behind: {left}");
    ensure!(daemon.cli(&["podman-setup", "podman", "--remove"])?.code == 3, "removed twice");
    daemon.stop()
}
