// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A name means one device: a pool uses no loopN that the tables of mounts and swap areas name,
//! also if the host mounts one later. And the message on a tenant's terminal when its pool ends.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::private_bundle::{Bundle, Pool, any_runtime, unbound};
use super::private_driver::Driver;
use super::private_script::{Inside, WORDS};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::names_root", Needs::Private, 240, |ctx| names(ctx, None)),
        case("private::names_user", Needs::Private, 240, |ctx| names(ctx, Some(1000))),
        case("private::names_later", Needs::Private, 240, host_mounts_later),
        case("private::names_container", Needs::Private, 240, container),
        case("private::names_backing_file", Needs::Private, 120, backing_file),
        case("private::end_prints_a_message", Needs::Private, 120, message_at_the_end),
    ]
}

/// Loop devices of the kernel, as on a machine with snaps: loop0 mounted, loop1 swap. Removed on
/// drop.
struct HostLoops {
    dir: String,
    _driver: Driver,
}

impl HostLoops {
    fn new(ctx: &Ctx) -> Res<HostLoops> {
        let host = HostLoops { dir: ctx.path("host"), _driver: Driver::load()? };
        let dir = &host.dir;
        tools::sh(format!(
            "mkdir -p {dir}; mount --bind {dir} {dir}; mount --make-shared {dir}
            cd {dir}; mkdir mnt late tmpfs; chmod 755 .
            truncate -s 8M a c; truncate -s 2M b
            mkfs.ext4 -q a; mkfs.ext4 -q c; mkswap -q b
            losetup /dev/loop0 a; mount /dev/loop0 mnt; echo host > mnt/file
            losetup /dev/loop1 b; swapon /dev/loop1; losetup /dev/loop2 c
            # As udev does for every disk.
            mkdir -p /dev/disk/by-diskseq; ln -sf ../../loop2 /dev/disk/by-diskseq/99"
        ))?;
        Ok(host)
    }

    fn mount_later(&self) -> Res {
        tools::ok(&["mount", "/dev/loop2", &format!("{}/late", self.dir)]).map(drop)
    }
}

impl Drop for HostLoops {
    fn drop(&mut self) {
        let dir = &self.dir;
        let _ = tools::sh(format!(
            "set +e; umount {dir}/late; swapoff /dev/loop1; umount {dir}/mnt; losetup -d /dev/loop0 /dev/loop1 /dev/loop2
            umount {dir}; rm -rf {dir} /dev/disk/by-diskseq/99"
        ));
    }
}

/// Lets users write to the case's directory and mount with FUSE, as on a machine with udev.
fn open_to_users(ctx: &Ctx) -> Res {
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666)).at("/dev/fuse")?;
    std::fs::set_permissions(&ctx.dir, PermissionsExt::from_mode(0o1777)).at("chmod")
}

/// Programs that look devices up by name find the tenant's, and not the host's.
fn names(ctx: &Ctx, user: Option<u32>) -> Res {
    let daemon = Daemon::start(ctx)?;
    open_to_users(ctx)?;
    let host = HostLoops::new(ctx)?;
    let mut inside = Inside::new(ctx, &daemon);
    if let Some(user) = user {
        inside = inside.user(user);
    }
    inside.run(
        r#"
        mkdir own; cd own; truncate -s 40M a b; mkdir mnt
        holds "the host's is named" "$(cat /proc/mounts)" "/dev/loop0 "
        holds "its swap is named" "$(cat /proc/swaps)" /dev/loop1
        same "-f" "$(losetup -f)" /dev/loop2
        refused "a number that is named" "" losetup /dev/loop0 a
        refused "a number that is swap" "" losetup /dev/loop1 a
        dev=$(losetup -f --show a); same "-f --show" "$dev" /dev/loop2
        for mkfs in mkfs.vfat mkfs.btrfs "mkfs.ext4 -q -E root_owner=0:0"; do
            command -v ${mkfs%% *} > /dev/null || continue
            dd if=/dev/zero of=$dev bs=1M count=4 2> /dev/null
            works "$mkfs" $mkfs $dev
        done
        works "mount" mount $dev mnt
        echo ours > mnt/ours
        same "findmnt" "$(findmnt -nro TARGET -S $dev)" "$PWD/mnt"
        works "umount" umount $dev
        same "ours is unmounted" "$(ls mnt)" ""
        same "the host's is still mounted" "$(cat ../host/mnt/file)" host
        soon "whole" 0 bash -c "e2fsck -fn $dev > /dev/null 2>&1; echo \$?"
        works "mkswap" mkswap -q $dev
        holds "lsblk shows ours" "$(lsblk -nro NAME)" loop2
        same "lsblk does not show the host's" "$(lsblk -nro NAME,MOUNTPOINTS | grep -E '^loop[01] ')" ""
        losetup -d $dev; soon "none" "" losetup -a
        "#,
    )?;
    if user.is_none() {
        inside.run(
            r#"
            cd own; dev=$(losetup -f --show b); mkswap -q $dev
            works "swapon" swapon $dev; holds "swaps" "$(cat /proc/swaps)" /loop2
            works "swapoff" swapoff $dev; losetup -d $dev
            "#,
        )?;
    }
    let still = tools::ok(&["findmnt", "-nro", "SOURCE", &format!("{}/mnt", host.dir)])?;
    ensure!(still.trim() == "/dev/loop0", "the host has {still:?} mounted");
    drop(host);
    daemon.stop()
}

/// The host mounts its loop2 while the tenant has its own mounted: the tenant sees only its own.
fn host_mounts_later(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    open_to_users(ctx)?;
    for (at, user) in [None, Some(1000)].into_iter().enumerate() {
        let host = HostLoops::new(ctx)?;
        let mut inside = Inside::new(ctx, &daemon);
        if let Some(user) = user {
            inside = inside.user(user);
        }
        let script = inside.start(&format!(
            r#"
            mkdir own{at}; cd own{at}; truncate -s 16M a; mkfs.ext4 -q -E root_owner=0:0 a; mkdir mnt
            works "mount" mount -o loop a mnt; holds "its device" "$(findmnt -nro SOURCE mnt)" loop2
            pause ../mounted{at}
            soon "the host's mounts have arrived" 1 bash -c "grep -c host/tmpfs /proc/mounts"
            soon "only ours is named" "$PWD/mnt" findmnt -nro TARGET -S /dev/loop2
            works "umount" umount /dev/loop2
            same "ours is unmounted" "$(findmnt -n mnt)" ""
            soon "unbound" "" losetup -a
            soon "whole" 0 bash -c "e2fsck -fn a > /dev/null 2>&1; echo \$?"
            "#
        ))?;
        let script = script.wait(&format!("mounted{at}"))?;
        let dir = &host.dir;
        let done = host.mount_later().and_then(|()| {
            tools::sh(format!("mount -t tmpfs none {dir}/tmpfs"))?;
            script.resume(&format!("mounted{at}"))?;
            script.finish()?;
            let still = tools::ok(&["findmnt", "-nro", "TARGET", "-S", "/dev/loop2"])?;
            ensure!(still.trim() == format!("{dir}/late"), "the host has loop2 mounted at {still:?}");
            Ok(())
        });
        let _ = tools::sh(format!("umount {dir}/tmpfs"));
        done?;
        drop(host);
    }
    daemon.stop()
}

/// A container that sees a mount of the host's loop0 gets other numbers.
fn container(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let host = HostLoops::new(ctx)?;
    let pool = Pool::with_mounts(ctx, &daemon, "ci", 2, "ext4")?;
    let mut bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    let script = r#"
        holds "the host's is named" "$(cat /proc/mounts)" "/dev/loop0 "
        same "names" "$(echo /dev/loop[0-9]*)" "/dev/loop2 /dev/loop3"
        same "-f" "$(losetup -f)" /dev/loop2
        truncate -s 16M a; mkfs.ext4 -q -F a; mkdir -p mnt
        works "mount" mount -o loop a mnt; same "source" "$(findmnt -no SOURCE mnt)" /dev/loop2
        works "umount" umount /dev/loop2
        same "ours is unmounted" "$(findmnt -n mnt)" ""; same "the host's is still mounted" "$(cat /host/file)" host
        soon "unbound" "" losetup -a
        works "mkfs" bash -c 'losetup /dev/loop3 a && mkfs.ext4 -q -F /dev/loop3'
        losetup -d /dev/loop3; soon "none" "" losetup -a
        "#;
    let with_host = |bundle: &Bundle<'_>, script: &str| -> Res<serde_json::Value> {
        let mut config = bundle.config(script)?;
        let mounts = config["mounts"].as_array_mut().ok_or("no mounts")?;
        mounts.push(serde_json::json!({ "destination": "/host", "type": "bind",
            "source": format!("{}/mnt", host.dir), "options": ["bind", "ro"] }));
        Ok(config)
    };
    super::private_bundle::end(bundle.start_as(&with_host(&bundle, script)?)?)?;
    unbound(&daemon, "ci")?;
    // A lower limit keeps the lowest numbers.
    bundle.annotations = vec![("io.loopengine.max", "1")];
    let fewer = r#"
        image b 1M; works "the first" losetup /dev/loop2 b; refused "the second" "" losetup /dev/loop3 b
        losetup -d /dev/loop2; soon "none" "" losetup -a
        "#;
    super::private_bundle::end(bundle.start_as(&with_host(&bundle, fewer)?)?)?;
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    drop(host);
    daemon.stop()
}

/// `backing_file` is the file's current path, byte for byte, as with the kernel's driver.
fn backing_file(ctx: &Ctx) -> Res {
    const RENAMED: &str = r#"
        mkdir -p dir; truncate -s 1M dir/a; dev=$(losetup -f --show dir/a)
        shown=/sys/block/${dev##*/}/loop/backing_file
        same "at first" "$(< $shown)" "$PWD/dir/a"
        # Sooner than the pool reads all names.
        for name in c d e b; do
            mv dir/* dir/$name; sleep 0.4; same "renamed" "$(< $shown)" "$PWD/dir/$name"
        done
        mv dir dir2; soon "its directory renamed" "$PWD/dir2/b" cat $shown
        odd=$'\xff\xfe odd'; mv dir2/b "dir2/$odd"; soon "not UTF-8" "$PWD/dir2/$odd" cat $shown
        rm "dir2/$odd"; sleep 0.4; same "deleted" "$(< $shown)" "$PWD/dir2/$odd (deleted)"
        losetup -d $dev; soon "gone" "" bash -c "cat $shown 2> /dev/null"
        rmdir dir2; exit $bad
        "#;
    let driver = Driver::load()?;
    tools::sh(format!("set +e; cd {}; {WORDS}{RENAMED}", ctx.dir.display()))?;
    driver.unload()?;
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(RENAMED)?;
    daemon.stop()
}

/// If the daemon ends before a command, the command's terminal gets one message; otherwise none.
fn message_at_the_end(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    open_to_users(ctx)?;
    let typescript = |words: &str| format!("{} run {words}", ctx.host.program);
    let quiet = Running::start({
        let mut command = daemon.command_of("script");
        command.args(["-qec", &typescript("--name quiet -- true"), "/dev/null"]);
        command
    })?;
    let quiet = quiet.finish(tools::SHORT)?.ok()?;
    ensure!(!quiet.out.contains("has ended"), "a message after a normal end: {:?}", quiet.out);
    for (name, kills) in [("plain", true), ("stopped", false)] {
        let (there, on) = (ctx.path(&format!("{name}.there")), ctx.path(&format!("{name}.on")));
        let wait = format!("sh -c ': > {there}; until [ -e {on} ]; do sleep 0.05; done'");
        let mut command = daemon.command_of("setpriv");
        let words = ["--reuid", "1000", "--regid", "1000", "--clear-groups", "script", "-qec"];
        command.args(words).args([&typescript(&format!("--name {name} -- {wait}")), "/dev/null"]);
        let mut running = Running::start(command)?;
        let come = tools::until(tools::SHORT, || std::path::Path::new(&there).exists().then_some(()));
        ensure!(come.is_some() && running.alive(), "the command did not start");
        match kills {
            true => daemon.kill()?,
            false => {
                daemon.sigterm()?;
                daemon.wait_drained()?;
            }
        }
        std::thread::sleep(Duration::from_secs(3));
        std::fs::write(&on, "")?;
        let said = running.finish(tools::SHORT)?.ok()?.out;
        let messages = said.matches(&format!("loopengine: private pool 1000.{name} has ended")).count();
        ensure!(messages == 1 && said.contains("loopengine run"), "{messages} messages: {said:?}");
        daemon.restart()?;
    }
    daemon.stop()
}
