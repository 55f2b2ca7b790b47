// SPDX-License-Identifier: Apache-2.0 OR MIT
//! systemd-nspawn: a container with the daemon's socket, and `loopengine run` inside, as described
//! in doc/container.md.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::tools;

/// Programs of the container; busybox provides the others.
const PROGRAMS: [&str; 8] =
    ["bash", "losetup", "mkfs.ext4", "e2fsck", "mount", "umount", "blockdev", "fuse2fs"];

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_nspawn::socket", Needs::Private, 200, socket),
        case("private_nspawn::private_users", Needs::Private, 200, private_users),
    ]
}

/// A minimal root file system.
fn tree(ctx: &Ctx) -> Res<String> {
    let root = ctx.path("root");
    tools::sh(format!(
        r#"
        root={root}; mkdir -p $root/{{usr/bin,usr/lib,usr/lib64,etc,proc,sys,dev,run,tmp,var,root,mnt,images}}
        for dir in bin sbin lib lib64; do ln -s usr/${{dir/sbin/bin}} $root/$dir; done
        cp -L $(command -v busybox) $root/usr/bin/busybox
        for applet in sh ls cat dd truncate head sleep id mkdir sync tr stat; do ln -s busybox $root/usr/bin/$applet; done
        echo ID=test > $root/etc/os-release; echo root:x:0:0::/root:/bin/sh > $root/etc/passwd
        for program in {programs} {ours}; do
            file=$(command -v $program); cp -L $file $root/usr/bin/
            LD_LIBRARY_PATH= ldd $file | grep -o '/[^ ]*\.so[^ ]*'
        done | sort -u | while read -r library; do
            mkdir -p $root/${{library%/*}}; cp -L $library $root/$library
        done"#,
        programs = PROGRAMS.join(" "),
        ours = ctx.host.program,
    ))?;
    Ok(root)
}

/// Binds, makes a file system, mounts it and writes, all inside; then checks the images outside.
fn socket(ctx: &Ctx) -> Res {
    with_socket(ctx, &[])
}

/// The same where root inside is an unprivileged user outside: FUSE drivers mount.
fn private_users(ctx: &Ctx) -> Res {
    // As udev does; this machine has none.
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666)).at("/dev/fuse")?;
    with_socket(ctx, &["--private-users=524288:65536", "--private-users-ownership=off", "--bind=/dev/fuse"])
}

fn with_socket(ctx: &Ctx, more: &[&str]) -> Res {
    if tools::run(&["sh", "-c", "command -v systemd-nspawn"])?.code != 0 {
        skip!("the program systemd-nspawn is not installed");
    }
    let root = tree(ctx)?;
    let images = ctx.path("images");
    std::fs::create_dir(&images)?;
    std::fs::set_permissions(&images, PermissionsExt::from_mode(0o777)).at("images")?;
    let daemon = Daemon::start(ctx)?;
    let inside = "
        set -eu; cd /images; truncate -s 16M a; truncate -s 1M b
        test \"$(losetup -f)\" = /dev/loop0
        test \"$(losetup -f --show a)\" = /dev/loop0; mkfs.ext4 -q /dev/loop0; losetup -d /dev/loop0
        mount -o loop a /mnt; echo from inside > /mnt/file; losetup -a; umount /mnt
        for i in 1 2 3 4 5 6 7 8 9 10; do test -z \"$(losetup -j a)\" || sleep 0.5; done
        dev=$(losetup -f --show b); printf raw | dd of=$dev conv=fsync 2>/dev/null
        ls /dev/loopfs; echo all done";
    let mut command = daemon.command_of("systemd-nspawn");
    command.args(["--quiet", "--register=no", "--keep-unit", "--directory", &root]);
    command.arg(format!("--bind={}:/run/loopengine", ctx.path("run")));
    command.arg(format!("--bind={images}:/images"));
    command.args(more);
    // The container has its own program and libraries.
    command.args(["--", "/usr/bin/loopengine", "run", "--", "/usr/bin/bash", "-c", inside]);
    let done = tools::Running::start(command)?.finish(Duration::from_secs(120))?;
    ensure!(done.code == 0 && done.out.trim_end().ends_with("all done"), "{done:?}");
    ensure!(done.out.contains("(/images/a)"), "not listed with the container's path: {}", done.out);
    let gone = tools::until(Duration::from_secs(5), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "devices of an ended container are left: {:?}", daemon.ublk_ids());
    tools::ok(&["e2fsck", "-fn", &format!("{images}/a")])?;
    let file = tools::ok(&["debugfs", "-R", "cat /file", &format!("{images}/a")])?;
    ensure!(file == "from inside", "the image has {file:?}");
    ensure!(
        std::fs::read(format!("{images}/b"))?.starts_with(b"raw"),
        "the image does not have the device's data"
    );
    daemon.stop()
}
