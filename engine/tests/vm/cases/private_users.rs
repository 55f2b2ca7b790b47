// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Users of private loop devices: limits, plain users, concurrent pools; and programs other than
//! util-linux.

use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::top_shows_io", Needs::Private, 120, top_shows_io),
        case("private::quota", Needs::Private, 120, quota),
        case("private::limit", Needs::Private, 120, limit),
        case("private::plain_user", Needs::Private, 120, plain_user),
        case("private::two_pools", Needs::Private, 120, two_pools),
        case("private::concurrent_runs", Needs::Private, 300, concurrent_runs),
        case("private::busybox", Needs::Private, 120, busybox),
        case("private::fixed_paths_in_dev", Needs::Private, 120, fixed_paths_in_dev),
        case("private::without_interception", Needs::Private, 120, without_interception),
    ]
}

/// Eight concurrent `run`s on a busy machine: each gets a pool, and the daemon logs no early
/// disconnect.
fn concurrent_runs(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        for i in 1 2 3 4; do nice -n 19 sh -c 'while :; do :; done' & busy="${busy:-} $!"; done
        for i in {1..8}; do image f$i 1M "file $i"; done
        for i in {1..8}; do
            $loopengine run -- sh -c "losetup -f --show f$i && head -c 6 /dev/loop0" > out$i 2>&1 & all="${all:-} $!"
        done
        for pid in $all; do wait $pid || wrong "a run failed"; done
        kill $busy
        for i in {1..8}; do same "run $i" "$(tr '\n' ' ' < out$i)" "/dev/loop0 file $i"; done
        "#;
    Inside::new(ctx, &daemon).shell().run_for(Duration::from_secs(240), script)?;
    let log = daemon.log();
    ensure!(!log.contains("WARN") && !log.contains("ERROR"), "the daemon's log: {log}");
    daemon.stop()
}

/// `--max`: one more device fails, as at the kernel's limit, and changes nothing.
fn quota(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).with(&["--max", "2"]).start(
        r#"
        image a 1M alpha
        works "1" losetup -f a; works "2" losetup -f a
        was=$(ls /dev /dev/loopfs /sys/block; losetup -a)
        pause full
        refused "3" "cannot find an unused loop device" losetup -f
        refused "3 --show" "cannot find an unused loop device" losetup -f --show a
        refused "explicit" "" losetup /dev/loop7 a
        truncate -s 4M fs; mkfs.ext4 -q fs; mkdir mnt
        refused "mount" "" mount -o loop fs mnt
        same "no side effects" "$(ls /dev /dev/loopfs /sys/block; losetup -a)" "$was"
        pause refused
        losetup -d /dev/loop0
        same "one is free again" "$(losetup -f --show a)" /dev/loop0
        "#,
    )?;
    let script = script.wait("full")?;
    let before = (daemon.ublk_ids(), daemon.footprint()?.fds);
    script.resume("full")?;
    let script = script.wait("refused")?;
    let after = (daemon.ublk_ids(), daemon.footprint()?.fds);
    script.resume("refused")?;
    script.finish()?;
    ensure!(before == after, "from {before:?} to {after:?}");
    daemon.stop()
}

/// What a user does on a private device, as the block layer counts it.
fn top_shows_io(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    std::fs::set_permissions(&ctx.dir, std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    let script = Inside::new(ctx, &daemon).user(1000).start(
        r#"
        image a 4M a; works "bind" losetup -f a
        while :; do dd if=/dev/loop0 of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null; done & reader=$!
        pause reading
        kill $reader
        "#,
    )?;
    let script = script.wait("reading")?;
    let shown = daemon.json(&["top", "-n", "1", "-d", "2"])?;
    script.resume("reading")?;
    script.finish()?;
    let [device] = shown["devices"].as_array().map_or(&[][..], |all| all) else {
        return Err(format!("not one device: {shown}").into());
    };
    ensure!(device["uid"] == 1000 && device["private"] == true, "{shown}");
    let disk = if crate::BACKEND == "loop" { "loop" } else { "ublkb" };
    ensure!(device["disk"].as_str().is_some_and(|name| name.starts_with(disk)), "{shown}");
    let rate = |name: &str| device["rates"][name].as_f64().unwrap_or_default();
    ensure!(rate("readsPerSecond") > 10.0 && rate("utilisationPercent") > 1.0, "{shown}");
    let bytes = (rate("readBytesPerSecond") / rate("readsPerSecond")).round();
    ensure!(bytes == 4096.0, "{bytes} bytes per read: {shown}");
    daemon.stop()
}

/// The limit of a user counts the devices of all pools, and can change while they are in use.
fn limit(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    daemon.ok(&["limit", "1000", "3"])?;
    std::fs::set_permissions(&ctx.dir, std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    let inside = |max: &'static str| Inside::new(ctx, &daemon).user(1000).with(&["--max", max]);
    let first =
        inside("2").start(r#"image a 1M a; works "1" losetup -f a; works "2" losetup -f a; pause first"#)?;
    let first = first.wait("first")?;
    let second = inside("3").start(
        r#"
        image b 1M b; works "3" losetup -f b
        refused "4" "cannot find an unused loop device" losetup -f b
        pause full
        works "4, raised" losetup -f b
        pause raised
        refused "5, lowered" "cannot find an unused loop device" losetup -f b
        same "existing devices stay" "$(bound | wc -l)" 2
        "#,
    )?;
    let second = second.wait("full")?;
    let other = Inside::new(ctx, &daemon).user(1001);
    other.run(r#"image c 1M c; works "another user" losetup -f c"#)?;
    daemon.ok(&["limit", "1000", "4"])?;
    second.resume("full")?;
    let second = second.wait("raised")?;
    let shown = daemon.json(&["limit"])?;
    let of_user =
        |uid: u64| shown.as_array().and_then(|all| all.iter().find(|limit| limit["uid"] == uid)).cloned();
    ensure!(of_user(1000).is_some_and(|limit| limit["devices"] == 4 && limit["pools"] == 2), "{shown}");
    daemon.ok(&["limit", "1000", "1"])?;
    second.resume("raised")?;
    second.finish()?;
    first.resume("first")?;
    first.finish()?;
    let Err(refusal) = inside("2").run("true") else {
        return Err("a user with a limit of 1 got a pool of 2".into());
    };
    ensure!(format!("{refusal:?}").contains("exceeds the limit of user"), "refused by {refusal:?}");
    daemon.stop()
}

/// A plain user is root of its own devices only, and still owns their files.
fn plain_user(ctx: &Ctx) -> Res {
    let secret = ctx.path("secret");
    std::fs::write(&secret, [7; 4096])?;
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let daemon = Daemon::start(ctx)?;
    let home = ctx.path("home");
    tools::sh(format!("mkdir {home}; chown 1000:1000 {home}; chmod 1777 {home}/.. "))?;
    let script = Inside::new(ctx, &daemon).user(1000).start(
        r#"
        same "who" "$(id -u)" 0
        cd home; image a 1M alpha; image b 1M beta; chmod 444 b
        echo $$ > pid
        same "-f" "$(losetup -f)" /dev/loop0
        same "-f --show" "$(losetup -f --show a)" /dev/loop0
        same "owner of the node" "$(stat -Lc '%u %g %a' /dev/loop0)" "0 0 660"
        same "owner of the image" "$(stat -c '%u %g' a)" "0 0"
        same "bytes" "$(head_of /dev/loop0)" alpha
        printf ALPHA | dd of=/dev/loop0 conv=notrunc,fsync 2>/dev/null
        same "written" "$(head_of a)" ALPHA
        holds "-l" "$(losetup -l)" "$PWD/a"
        holds "-a" "$(losetup -a)" "$(stat -c %i a) ($PWD/a)"
        dev=$(losetup -f --show -r b)
        refused "read-only" "Operation not permitted" dd if=/dev/zero of=$dev bs=512 count=1
        truncate -s 2M a; works "-c" losetup -c /dev/loop0; same "-c" "$(size /dev/loop0)" 2097152
        works "mkfs" mkfs.ext4 -q /dev/loop0
        refused "another's file" "Permission denied" losetup -f --show ../secret
        pause ../open
        works "-d" losetup -d /dev/loop0; works "-D" losetup -D
        soon "none" "" losetup -a
        "#,
    )?;
    let script = script.wait("open")?;
    let pid = std::fs::read_to_string(format!("{home}/pid"))?;
    let root = format!("/proc/{}/root", pid.trim());
    let owner = |path: &str| tools::ok(&["stat", "-c", "%u %g", path]);
    ensure!(owner(&format!("{root}/dev/loopfs/loop0"))? == "1000 1000", "the node has another owner");
    ensure!(owner(&format!("{home}/a"))? == "1000 1000", "the image has another owner");
    let disk = if crate::BACKEND == "loop" { "loop" } else { "ublkb" };
    for id in daemon.ublk_ids() {
        let node = format!("/dev/{disk}{id}");
        ensure!(owner(&node)?.starts_with("0 "), "{node} does not belong to root");
    }
    let open = format!("head -c 1 {root}/dev/loopfs/loop0");
    let other = ["setpriv", "--reuid", "1001", "--regid", "1001", "--clear-groups", "sh", "-c", &open];
    ensure!(tools::run(&other)?.code != 0, "another user reads the device");
    script.resume("open")?;
    script.finish()?;
    daemon.stop()
}

/// Two pools share only the names of their devices.
fn two_pools(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let one = |name: &str| {
        let script = format!(
            "me={name}\n{}",
            r#"
            image $me 1M "$me"; losetup /dev/loop0 $me; losetup /dev/loop1 $me
            pause $me
            same "bytes" "$(head_of /dev/loop0)" "$me"
            same "list" "$(bound)" "/dev/loop0 $PWD/$me
/dev/loop1 $PWD/$me"
            printf "$me wrote this" | dd of=/dev/loop0 conv=notrunc,fsync 2>/dev/null
            losetup -d /dev/loop1; pause $me.2
            same "bytes at the end" "$(head_of /dev/loop0 32)" "$me wrote this"
            same "list at the end" "$(bound)" "/dev/loop0 $PWD/$me"
            "#
        );
        Inside::new(ctx, &daemon).start(&script)
    };
    let (first, second) = (one("first")?.wait("first")?, one("second")?.wait("second")?);
    first.resume("first")?;
    second.resume("second")?;
    let (first, second) = (first.wait("first.2")?, second.wait("second.2")?);
    first.resume("first.2")?;
    first.finish()?;
    // Its neighbour has ended.
    second.resume("second.2")?;
    second.finish()?;
    daemon.stop()
}

/// BusyBox has its own losetup and mount, and is linked statically.
fn busybox(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        bb() { busybox "$@"; }
        image a 1M alpha; truncate -s 4M fs; mkfs.ext4 -q fs; mkdir mnt
        same "-f" "$(bb losetup -f)" /dev/loop0
        works "-f img" bb losetup -f a
        same "-a, with the name as it was given" "$(bb losetup -a)" "/dev/loop0: 0 a"
        same "bytes" "$(bb head -c 5 /dev/loop0)" alpha
        # Unlike util-linux, it needs an existing device.
        same "the next" "$(bb losetup -f)" /dev/loop1
        works "offset" bb losetup -o 512 /dev/loop1 a; same "size" "$(size /dev/loop1)" 1048064
        same "the next" "$(bb losetup -f)" /dev/loop2
        works "read-only" bb losetup -r /dev/loop2 a; same "ro" "$(blockdev --getro /dev/loop2)" 1
        truncate -s 2M a; works "-c" bb losetup -c /dev/loop0; same "-c" "$(size /dev/loop0)" 2097152
        for n in 0 1 2; do works "-d $n" bb losetup -d /dev/loop$n; done
        soon "none" "" bb losetup -a
        works "mount" bb mount -o loop -t ext4 fs mnt; echo hello > mnt/file
        same "mounted" "$(losetup -n -l | wc -l)" 1
        works "umount" bb umount mnt; soon "none after umount" "" losetup -a
        works "whole" e2fsck -fn fs
        "#,
    )?;
    daemon.stop()
}

/// The recipe of loopengine-loopfs(7) for programs that use fixed paths in /dev.
fn fixed_paths_in_dev(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M alpha
        mkdir pool; mount --bind /dev/loopfs pool
        rm /dev/loop-control; ln -s $PWD/pool/loop-control /dev/loop-control
        dev=$(losetup -f); same "-f" "$dev" /dev/loop0
        rm -f $dev; ln -s $PWD/pool/${dev##*/} $dev
        works "bind" losetup $dev a
        same "bytes" "$(head_of $dev)" alpha
        truncate -s 4M fs; mkfs.ext4 -q fs; mkdir mnt
        works "mount" mount -o loop fs mnt
        same "its device" "$(losetup -n -O NAME -j fs | tr -d ' ')" /dev/loop1
        works "umount" umount mnt
        losetup -d $dev; soon "unbound" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// Without interception a pool has a loop-control and empty devices; other operations are refused.
fn without_interception(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let dir = ctx.path("pool");
    std::fs::create_dir(&dir)?;
    Running::start(daemon.command(&["instance", "mount", "--max", "2", &dir]))?.finish(tools::SHORT)?.ok()?;
    let result = Inside::new(ctx, &daemon).plain().run(
        r#"
        image a 1M; pool=$PWD/pool
        mount -t tmpfs -o mode=755 dev /dev; mknod /dev/null c 1 3
        ln -s $pool/loop-control /dev/loop-control
        same "-f" "$(losetup -f)" /dev/loop0
        ln -s $pool/loop0 /dev/loop0
        same "node" "$(stat -Lc %F /dev/loop0)" "block special file"
        same "empty" "$(size /dev/loop0)" 0
        refused "bind" "Inappropriate ioctl" losetup /dev/loop0 a
        same "free inodes" "$(stat -f -c '%c %d' $pool)" "2 1"
        works "removed" rm $pool/loop0
        same "free inodes" "$(stat -f -c '%c %d' $pool)" "2 2"
        "#,
    );
    tools::ok(&["umount", &dir])?;
    result?;
    let gone = tools::until(Duration::from_secs(10), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "devices of an unmounted pool are left: {:?}", daemon.ublk_ids());
    daemon.stop()
}
