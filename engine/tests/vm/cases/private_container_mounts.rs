// SPDX-License-Identifier: Apache-2.0 OR MIT
//! mount(8) and umount(8) in containers with the default capabilities of runtimes: successful
//! mounts, refused ones, and the end of the container.

use std::time::Duration;

use serde_json::{Value, json};

use super::private_bundle::{Bundle, CONTAINER, Pool, any_runtime, end, image, unbound};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::tools;

/// The documented limit is a second, on an idle machine.
const SOON: Duration = Duration::from_secs(4);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_containers::mount_crun", Needs::Private, 240, |ctx| mount(ctx, "crun")),
        case("private_containers::mount_runc", Needs::Private, 240, |ctx| mount(ctx, "runc"))
            .variant_if(true),
        case("private_containers::mount_userns_crun", Needs::Private, 240, |ctx| {
            in_user_namespace(ctx, "crun")
        }),
        case("private_containers::mount_userns_runc", Needs::Private, 240, |ctx| {
            in_user_namespace(ctx, "runc")
        }),
        case("private_containers::mount_refused", Needs::Private, 240, refused),
        case("private_containers::mount_ends", Needs::Private, 300, container_ends),
    ]
}

/// Common uses of a loop device, by unmodified programs.
fn mount(ctx: &Ctx, runtime: &'static str) -> Res {
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::with_mounts(ctx, &daemon, "ci", 2, "ext4,xfs")?;
    let bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    bundle.run(
        r#"
        holds "caps" "$(grep CapEff /proc/self/status)" 0000000020000420
        truncate -s 32M a; mkfs.ext4 -q a; mkdir mnt mnt2 mnt/below; ln -s mnt link
        works "mount" mount -o loop a mnt
        same "source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 ext4"
        for word in rw nosuid nodev relatime errors=remount-ro; do
            holds "options" ",$(findmnt -no OPTIONS mnt)," ",$word,"
        done
        same "owner" "$(stat -c '%u %g' mnt)" "0 0"
        mkdir mnt/dir; echo hello > mnt/dir/file
        same "bound" "$(bound)" "/dev/loop0 /work/a"
        same "read-only" "$(blockdev --getro /dev/loop0)" 1
        works "again" mount -o loop a mnt2
        same "seen in both" "$(cat mnt2/dir/file)" hello
        refused "umount of a busy mount" "busy" bash -c 'cd mnt2/dir; umount /work/mnt2'
        works "umount" umount mnt2
        same "mounted still" "$(cat mnt/dir/file)" hello
        works "umount by the image" umount a
        soon "unbound" "" losetup -a
        [ -d mnt/below ] || wrong "the directory below is not back"
        works "whole" e2fsck -fn a
        # Through a symlink, on top of another mount; lazy unmount.
        works "by a link" mount -o loop,ro link/../a link
        same "where" "$(findmnt -no TARGET,FSTYPE mnt)" "/work/mnt ext4"
        refused "written" "Read-only" bash -c 'echo > mnt/x'
        truncate -s 320M b; mkfs.xfs -q b
        works "on top" mount -o loop b mnt
        same "the upper" "$(stat -f -c %T mnt)" xfs
        works "umount of the upper" umount mnt
        same "the lower" "$(cat mnt/dir/file)" hello
        exec 8< mnt/dir/file
        works "lazily" umount -l mnt
        same "gone" "$(findmnt mnt)" ""
        same "held" "$(cat <&8)" hello
        same "bound while held" "$(bound | head -n 1)" "/dev/loop0 /work/a"
        exec 8<&-
        soon "unbound after that" "" losetup -a
        works "xfs: whole" xfs_repair -n b
        # With busybox, on a device that is bound already.
        losetup /dev/loop1 a
        works "busybox" busybox mount -t ext4 /dev/loop1 mnt
        echo more > mnt/more
        works "busybox: umount" busybox umount mnt
        soon "writable" 0 blockdev --getro /dev/loop1
        losetup -d /dev/loop1; soon "none" "" losetup -a
        works "whole" e2fsck -fn a
        "#,
    )?;
    let status = tools::run(&["debugfs", "-R", "cat /more", &bundle.work("a")])?.ok()?;
    ensure!(status.out == "more\n", "the image has {:?}", status.out);
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// Root of a container that is an unprivileged user outside.
fn in_user_namespace(ctx: &Ctx, runtime: &'static str) -> Res {
    const ROOT: u32 = 100_000;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::owned_by(ctx, &daemon, "ci", ROOT, "ext4")?;
    let mut bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    bundle.capabilities = vec!["CAP_CHOWN"];
    std::os::unix::fs::chown(bundle.work(""), Some(ROOT), Some(ROOT)).at("the container's directory")?;
    let mut config = bundle.config(
        r#"
        same "mapped" "$(cat /proc/self/uid_map | tr -s ' ')" " 0 100000 65536"
        truncate -s 32M a; mkfs.ext4 -q a; mkdir mnt
        works "mount" mount -o loop a mnt
        same "source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 ext4"
        for word in rw nosuid nodev errors=remount-ro; do
            holds "options" ",$(findmnt -no OPTIONS mnt)," ",$word,"
        done
        same "owner" "$(stat -c '%u %g' mnt)" "0 0"
        mkdir mnt/dir; echo hello > mnt/dir/file; chown 7:8 mnt/dir/file
        same "owner of a file" "$(stat -c '%u %g' mnt/dir/file)" "7 8"
        same "bound" "$(bound)" "/dev/loop0 /work/a"
        works "umount" umount mnt
        soon "unbound" "" losetup -a
        works "whole" e2fsck -fn a
        image b 1M bytes
        same "a device" "$(losetup -f --show b)" /dev/loop0
        same "its bytes" "$(head_of /dev/loop0)" bytes
        echo other | dd of=/dev/loop0 conv=notrunc,fsync 2>/dev/null; same "written" "$(head_of b 5)" other
        "#,
    )?;
    config["linux"]["namespaces"].as_array_mut().ok_or("no namespaces")?.push(json!({ "type": "user" }));
    for ids in ["uidMappings", "gidMappings"] {
        config["linux"][ids] = json!([{ "containerID": 0, "hostID": ROOT, "size": 65536 }]);
    }
    end(bundle.start_as(&config)?)?;
    // The owner on the disk is the one inside of the container.
    let stat = tools::run(&["debugfs", "-R", "stat /dir/file", &bundle.work("a")])?.ok()?;
    ensure!(stat.out.contains("User:     7   Group:     8"), "the image has {:?}", stat.out);
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// Mounts and unmounts that root of a container is refused.
fn refused(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::with_mounts(ctx, &daemon, "ci", 2, "ext4")?;
    let mut bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    bundle.run(
        r#"
        truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt; losetup /dev/loop0 a
        touch plain; ln -s /proc/self/fd magic
        for dir in / /proc /proc/1 /proc/sys /sys /dev/pts /dev/mqueue /sys/fs/cgroup; do
            refused "on $dir" "permi" busybox mount -t ext4 /dev/loop0 $dir
        done
        exec 9< mnt
        refused "through a magic link" "" busybox mount -t ext4 /dev/loop0 magic/9
        exec 9<&-
        refused "on a file" "Not a directory" busybox mount -t ext4 /dev/loop0 plain
        refused "on nothing" "No such file" busybox mount -t ext4 /dev/loop0 nothing
        refused "tmpfs" "permi" busybox mount -t tmpfs none mnt
        refused "bind" "permi" mount --bind /etc mnt
        refused "a file system that is not allowed" "unknown filesystem" mount -t vfat /dev/loop0 mnt
        refused "an option" "bad option" mount -o errors=panic /dev/loop0 mnt
        refused "another's device" "permi" busybox mount -t ext4 /dev/null mnt
        for dir in /proc /sys /work /dev/loopfs /sys/block; do
            refused "umount $dir" "permi" busybox umount $dir
        done
        refused "umount of nothing" "permi" busybox umount mnt
        works "mount" mount /dev/loop0 mnt
        refused "by force" "permi" busybox umount -f mnt
        refused "remount" "permi" mount -o remount,suid,dev mnt
        for word in nosuid nodev; do holds "options" ",$(findmnt -no OPTIONS mnt)," ",$word,"; done
        refused "moved" "permi" mount --move mnt /tmp
        # Set-uid programs are inert.
        cp /bin/busybox mnt/su; chmod 4755 mnt/su
        holds "nosuid" "$(findmnt -no OPTIONS mnt)" nosuid
        works "umount" umount mnt
        losetup -D; soon "none" "" losetup -a
        "#,
    )?;
    // An annotation can allow fewer file systems, and not more.
    for (mounts, said) in [("xfs", "permi"), ("", "permi")] {
        bundle.annotations = vec![("io.loopengine.mount", mounts)];
        bundle.run(&format!(
            "losetup /dev/loop0 a; refused {mounts:?} {said} busybox mount -t ext4 /dev/loop0 mnt"
        ))?;
    }
    bundle.annotations = vec![("io.loopengine.mount", "ext4,xfs")];
    bundle
        .run("truncate -s 320M b; mkfs.xfs -q b; refused wider 'unknown filesystem' mount -o loop b mnt")?;
    bundle.annotations.clear();
    pool.end(&daemon)?;
    // Without kernel mounts, the kernel serves mount(2).
    let pool = Pool::new(ctx, &daemon, "ci", 2)?;
    bundle.run("losetup /dev/loop0 a; refused 'not allowed' permi busybox mount -t ext4 /dev/loop0 mnt")?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// The container ends with a mounted file system: the image is intact, and the pool is reset.
fn container_ends(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::with_mounts(ctx, &daemon, "ci", 2, "ext4")?;
    let bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    image(&bundle.work("a"), "")?;
    let script = r#"
        truncate -s 32M a; mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 a; mkdir -p mnt
        same "as new" "$(losetup -a)" ""
        works "mount" mount -o loop a mnt
        echo hello > mnt/file
        pause mounted
        "#;
    for how in ["ends", "killed", "its namespace is held"] {
        let mut running = bundle.start(script)?;
        bundle.wait(&mut running, "mounted")?;
        let state = bundle.control(&["state", "c1"])?.ok()?.out;
        let pid = serde_json::from_str::<Value>(&state).at("state")?["pid"].as_u64().ok_or("no pid")?;
        let held = std::fs::File::open(format!("/proc/{pid}/ns/mnt")).at("the mount namespace")?;
        let held = (how == "its namespace is held").then_some(held);
        match how {
            "ends" => bundle.resume("mounted")?,
            _ => bundle.control(&["kill", "c1", "KILL"])?.ok().map(drop)?,
        }
        let code = running.finish(CONTAINER)?.code;
        ensure!((code == 0) == (how == "ends"), "{how}: exit status {code}");
        let took = unbound(&daemon, "ci")?;
        ctx.note(format!("{how}: unbound after {took:?}"));
        ensure!(took < SOON, "{how}: {took:?}");
        let _ = bundle.control(&["delete", "--force", "c1"])?;
        // A holder of the namespace keeps the mount, but not the file: its journal is replayed, and
        // synced data is there.
        let check = if held.is_some() { "-fp" } else { "-fn" };
        let checked = tools::run(&["e2fsck", check, &bundle.work("a")])?;
        ensure!(checked.code <= u8::from(held.is_some()).into(), "{how}: {checked:?}");
        let said = tools::run(&["debugfs", "-R", "cat /file", &bundle.work("a")])?.ok()?;
        ensure!(said.out == "hello\n", "{how}: the image has {:?}", said.out);
        bundle.run(
            "same 'as new' \"$(losetup -a)\" ''; works mount mount -o loop a mnt; works umount umount mnt",
        )?;
        unbound(&daemon, "ci")?;
        drop(held);
    }
    pool.end(&daemon)?;
    daemon.stop()
}
