// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts by the kernel for tenants: their properties, refusals, and their end.

use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::kernel_mount", Needs::Private, 240, mount),
        case("private::kernel_mount_file_systems", Needs::Private, 180, other_file_systems),
        case("private::kernel_mount_writers", Needs::Private, 180, writers_are_refused),
        case("private::kernel_mount_nosuid_nodev", Needs::Private, 180, nodes_have_no_effect),
        case("private::kernel_mount_refused", Needs::Private, 240, refused),
        case("private::kernel_mount_policy", Needs::Private, 120, policy),
        case("private::kernel_mount_ends", Needs::Private, 240, tenant_ends),
        case("private::kernel_mount_rounds", Needs::Private, 600, rounds),
        case("private::kernel_mount_maker_killed", Needs::Private, 120, maker_is_killed),
    ]
}

/// File systems that other cases do not use.
fn other_file_systems(ctx: &Ctx) -> Res {
    for program in ["mksquashfs", "mkfs.erofs", "mkfs.vfat"] {
        if tools::run(&["sh", "-c", &format!("command -v {program}")])?.code != 0 {
            skip!("{program} is not installed");
        }
    }
    let daemon = allowing_these(ctx, "'ext2', 'ext3', 'squashfs', 'erofs', 'vfat'")?;
    let inside = Inside::new(ctx, &daemon).user(1000).with(&["--mount", "ext2,ext3,squashfs,erofs,vfat"]);
    inside.run(
        r#"
        cd home; mkdir tree mnt; echo hello > tree/file
        works "mksquashfs" mksquashfs tree squashfs -quiet -no-progress
        works "mkfs.erofs" mkfs.erofs --quiet erofs tree
        truncate -s 40M vfat ext2 ext3
        works "mkfs.vfat" mkfs.vfat vfat; mkfs.ext2 -q ext2; mkfs.ext3 -q ext3
        for kind in squashfs erofs vfat ext2 ext3; do
            works "mount $kind" mount -o loop $kind mnt
            # The ext4 driver mounts all three.
            same "source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 ${kind/ext[23]/ext4}"
            for word in nosuid nodev; do holds "$kind" ",$(findmnt -no OPTIONS mnt)," ",$word,"; done
            [ -e mnt/file ] || echo hello > mnt/file
            same "$kind" "$(cat mnt/file) $(stat -c '%u %g' mnt/file)" "hello 0 0"
            works "umount $kind" umount mnt
            soon "unbound" "" losetup -a
        done
        works "vfat: whole" fsck.vfat -n vfat
        for kind in ext2 ext3; do works "$kind: whole" e2fsck -fn $kind; done"#,
    )?;
    daemon.stop()
}

/// After SIGKILL of the maker, new mounts fail, and everything else works.
fn maker_is_killed(ctx: &Ctx) -> Res {
    let mut daemon = allowing(ctx)?;
    let script = user(ctx, &daemon).start(
        r#"
        cd home; truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt
        works "with it" mount -o loop a mnt; echo hello > mnt/file; works "umount" umount mnt
        soon "unbound" "" losetup -a
        works "held over it" mount -o loop a mnt
        pause killed
        same "its mounts stay" "$(cat mnt/file)" hello
        works "umount without it" umount mnt; soon "unbound" "" losetup -a
        from=$SECONDS
        refused "without it" "superblock" mount -o loop a mnt
        [ $((SECONDS - from)) -lt 10 ] || wrong "the failure took $((SECONDS - from)) s"
        soon "nothing is left bound" "" losetup -a
        image b 1M bytes; dev=$(losetup -f --show b); same "devices" "$(head_of $dev)" bytes; losetup -d $dev
        works "whole" e2fsck -fn a"#,
    )?;
    let script = script.wait("home/killed")?;
    let pid = tools::ok(&["pgrep", "-P", &daemon.pid()?.to_string(), "-f", "mount-maker"])?;
    tools::ok(&["kill", "-KILL", pid.trim()])?;
    script.resume("home/killed")?;
    script.finish()?;
    daemon.check_alive()?;
    ensure!(
        daemon.log().contains("mount-maker does not answer; restart the daemon"),
        "the log does not say why"
    );
    daemon.stop()
}

/// Deadline for all rounds, on a busy CPU.
const ROUNDS: Duration = Duration::from_secs(400);

/// A daemon that allows all users kernel mounts of ext4 and xfs, and a home for user 1000.
fn allowing(ctx: &Ctx) -> Res<Daemon> {
    allowing_these(ctx, "'ext4', 'xfs'")
}

fn allowing_these(ctx: &Ctx, kinds: &str) -> Res<Daemon> {
    let config = ctx.path("config.toml");
    std::fs::write(&config, format!("[private]\nkernel_mounts = [{kinds}]\n"))?;
    let home = ctx.path("home");
    tools::sh(format!("mkdir {home}; chown 1000:1000 {home}"))?;
    Daemon::with(ctx, &["--config", &config])
}

fn user<'a>(ctx: &'a Ctx, daemon: &'a Daemon) -> Inside<'a> {
    Inside::new(ctx, daemon).user(1000).with(&["--mount", "ext4,xfs"])
}

/// `mount -o loop` by a plain user: the properties of the mount. It leaves nothing behind.
fn mount(ctx: &Ctx) -> Res {
    let daemon = allowing(ctx)?;
    let script = user(ctx, &daemon).start(
        r#"
        cd home; echo $$ > pid
        truncate -s 32M a; mkfs.ext4 -q a; truncate -s 320M b; mkfs.xfs -q b; mkdir mnt mnt2
        works "ext4" mount -o loop a mnt
        same "source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 ext4"
        for word in rw nosuid nodev relatime idmapped errors=remount-ro; do
            holds "options" ",$(findmnt -no OPTIONS mnt)," ",$word,"
        done
        same "owner of the root" "$(stat -c '%u %g' mnt)" "0 0"
        mkdir mnt/dir; echo hello > mnt/dir/file
        same "owner inside" "$(stat -c '%u %g' mnt/dir/file)" "0 0"
        same "bound" "$(bound)" "/dev/loop0 $PWD/a"
        works "again: the same file system" mount -o loop a mnt2
        same "one device" "$(bound)" "/dev/loop0 $PWD/a"
        same "seen in both" "$(cat mnt2/dir/file)" hello
        pause mounted
        works "umount" umount mnt2; sleep 0.5
        same "mounted still" "$(cat mnt/dir/file)" hello
        works "umount by the image" umount a
        soon "unbound" "" losetup -a
        soon "size 0" 0 size /dev/loop0
        works "whole" e2fsck -fn a
        holds "owner in the image" "$(debugfs -R 'stat /dir/file' a 2>&1)" "User:     0   Group:     0"
        works "xfs" mount -o loop,noatime,noexec b mnt
        same "xfs: source" "$(findmnt -no SOURCE,FSTYPE mnt)" "/dev/loop0 xfs"
        for word in rw nosuid nodev noatime noexec idmapped nouuid; do
            holds "xfs: options" ",$(findmnt -no OPTIONS mnt)," ",$word,"
        done
        echo hello > mnt/file
        works "umount /dev/loop0" umount /dev/loop0; soon "xfs: unbound" "" losetup -a
        works "xfs: whole" xfs_repair -n b
        # A partition, by the daemon's table.
        truncate -s 24M d; printf 'label: dos\n2048,16384\n,\n' | sfdisk -q d
        losetup -P /dev/loop3 d; mkfs.ext4 -q /dev/loop3p1
        works "partition" mount /dev/loop3p1 mnt
        same "partition: source" "$(findmnt -no SOURCE mnt)" /dev/loop3p1
        echo hello > mnt/file
        same "partition: read-only" "$(blockdev --getro /dev/loop3 /dev/loop3p1 /dev/loop3p2 | tr '\n' ' ')" "1 1 1 "
        umount mnt; soon "partition: writable" 0 blockdev --getro /dev/loop3p1
        works "partition: whole" e2fsck -fn /dev/loop3p1
        losetup -d /dev/loop3; soon "none" "" losetup -a
        "#,
    )?;
    let script = script.wait("home/mounted")?;
    let pid = std::fs::read_to_string(ctx.path("home/pid"))?;
    let home = ctx.path("home");
    let file = format!("/proc/{}/root{home}/mnt/dir/file", pid.trim());
    let outside = tools::ok(&["stat", "-c", "%u %g", &file])?;
    ensure!(outside == "1000 1000", "the owner outside is {outside}");
    script.resume("home/mounted")?;
    script.finish()?;
    daemon.stop()
}

/// A device is read-only while the kernel has it mounted, and writable again afterwards.
fn writers_are_refused(ctx: &Ctx) -> Res {
    let daemon = allowing(ctx)?;
    user(ctx, &daemon).run(
        r#"
        cd home; truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt; truncate -s +4096 a
        losetup /dev/loop2 a
        # A process that has the device open for writing, and mapped.
        exec 7<> /dev/loop2
        cat > writer.py <<-'X'
	import mmap, os, sys
	fd = os.open("/dev/loop2", os.O_RDWR)
	at = os.lseek(fd, 0, os.SEEK_END) - 4096
	memory = mmap.mmap(fd, 4096, offset=at)
	memory[0:4] = b"good"; memory.flush()
	open("mapped", "w"); sys.stdin.readline()
	memory[0:4] = b"evil"
	try: memory.flush()
	except OSError: pass
	X
        mkfifo go; /usr/bin/python3 writer.py < go & exec 8> go
        for i in {1..200}; do [ -e mapped ] && break; sleep 0.1; done
        works "mount" mount /dev/loop2 mnt
        same "read-only" "$(blockdev --getro /dev/loop2)" 1
        refused "a new writer" "Operation not permitted" dd if=/dev/zero of=/dev/loop2 bs=512 count=1 conv=notrunc
        # With the kernel's loop driver the device has another disk now.
        case $backend in loop) old="Stale file handle";; *) old="Operation not permitted";; esac
        refused "an old writer" "$old" dd if=/dev/zero bs=512 count=1 conv=notrunc of=/proc/self/fd/7
        echo >&8; wait %1
        same "mapped data" "$(tail -c 4096 a | tr -d '\0')" good
        refused "mkfs" "" mkfs.ext4 -q -F /dev/loop2
        echo new > mnt/file; works "umount" umount mnt
        exec 8>&-
        soon "writable" 0 blockdev --getro /dev/loop2
        same "still bound" "$(bound)" "/dev/loop2 $PWD/a"
        works "no stale data" cmp a /dev/loop2
        works "written" dd if=/dev/zero of=/dev/loop2 bs=512 seek=32768 count=1 conv=notrunc,fsync
        same "in the file" "$(tail -c 4096 a | tr -d '\0')" ""
        exec 7>&-
        losetup -d /dev/loop2; soon "unbound" "" losetup -a
        works "whole" e2fsck -fn a
        # A read-only device cannot be mounted writable.
        losetup /dev/loop2 a; mkfs.ext4 -q /dev/loop2
        works "read-only binding" losetup -r /dev/loop4 a
        refused "writable mount" "" mount -w /dev/loop4 mnt
        works "read-only" mount -o ro /dev/loop4 mnt; umount mnt
        soon "still read-only" 1 blockdev --getro /dev/loop4
        losetup -D; soon "none" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// Set-uid programs and nodes of an image have no effect, also after remounts.
fn nodes_have_no_effect(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let image = ctx.path("image");
    let dir = ctx.path("tree");
    tools::sh(format!(
        "mkdir {dir}; cp $(command -v busybox) {dir}/busybox; chmod 4755 {dir}/busybox
        mknod {dir}/null c 1 3; mknod {dir}/block b 259 0; chmod 666 {dir}/null {dir}/block
        truncate -s 32M {image}; mkfs.ext4 -q -d {dir} {image}"
    ))?;
    // Root: its namespace has other users, and it needs no permission for kernel mounts.
    Inside::new(ctx, &daemon).with(&["--user", "--mount", "ext4"]).run(
        r#"
        mkdir mnt; works "mount" mount -o loop,suid,dev image mnt
        who() { setpriv --reuid 1000 --clear-groups mnt/busybox id -u; }
        tries() {
            same "$1: mode" "$(stat -c %a mnt/busybox)" 4755
            same "$1: set-uid" "$(who)" 1000
            refused "$1: node" "Permission denied" dd if=/dev/zero of=mnt/null count=1
            refused "$1: block node" "Permission denied" dd if=mnt/block of=/dev/null count=1
        }
        tries "mounted"
        for word in dev suid dev,suid; do
            refused "remount,bind,$word" "permission denied" mount -o remount,bind,$word mnt
            refused "remount,$word" "permission denied" mount -o remount,$word mnt
        done
        tries "after remounts"
        mkdir copy; works "bind" mount --bind mnt copy
        refused "remount of a copy" "permission denied" mount -o remount,bind,dev,suid copy
        works "in another namespace" unshare -m sh -c '! mount -o remount,bind,dev,suid mnt 2>/dev/null'
        works "more restrictions" mount -o remount,bind,nosuid,nodev,ro copy
        umount copy mnt
        works "ro" mount -o loop,ro image mnt
        refused "ro: write" "Read-only" touch mnt/x
        refused "ro: remount" "permission denied" mount -o remount,bind,rw mnt
        refused "ro: of the file system" "permission denied" mount -o remount,rw mnt
        umount mnt; soon "none" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// Refuses options, external journals and file systems that are not allowed. Overrides
/// errors=panic.
fn refused(ctx: &Ctx) -> Res {
    let daemon = allowing(ctx)?;
    user(ctx, &daemon).run(
        r#"
        cd home; truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt
        for option in errors=panic errors=continue sb=8193 journal_dev=0x10300 journal_path=/dev/loop0 \
            usrjquota=x,jqfmt=vfsv0 dax nonsense; do
            refused "$option" "bad option" mount -t ext4 -o loop,$option a mnt
        done
        works "allowed options" mount -o loop,commit=9,nodelalloc a mnt
        holds "commit" "$(findmnt -no OPTIONS mnt)" "commit=9"
        umount mnt; soon "unbound" "" losetup -a
        works "without recovery" mount -o loop,ro,noload a mnt
        umount mnt; soon "none is left" "" losetup -a
        refused "a file system that is not allowed" "unknown filesystem type" mount -t btrfs -o loop a mnt
        # A FUSE driver, if installed, finds no file system.
        { type -P fusefat || type -P fusefatfs; } >/dev/null && said=superblock || said="unknown filesystem type"
        refused "a file system without --mount" "$said" mount -t vfat -o loop a mnt
        refused "another file system" "wrong fs type" mount -t xfs -o loop a mnt
        truncate -s 1M junk; refused "no file system" "wrong fs type" mount -t ext4 -o loop junk mnt
        refused "no file system of any type" "superblock on /dev/loop" mount -o loop junk mnt
        refused "no device" "" mount -t ext4 /dev/loop7 mnt
        refused "no directory" "" mount -t ext4 -o loop a missing
        soon "nothing is bound" "" losetup -a
        # A journal on another device, by number, which the tenant chose.
        truncate -s 8M j; losetup /dev/loop5 j; mke2fs -q -b 1024 -O journal_dev /dev/loop5
        truncate -s 16M e; mkfs.ext4 -q -b 1024 -J device=/dev/loop5 e
        holds "external journal, dumpe2fs" "$(dumpe2fs -h e 2>&1)" "Journal device"
        refused "external journal" "bad superblock" mount -t ext4 -o loop e mnt
        refused "a journal" "bad superblock" mount -t ext4 /dev/loop5 mnt
        losetup -D; soon "none" "" losetup -a
        # Mount options in the superblock.
        cp a o; tune2fs -E mount_opts=journal_path=/dev/loop0 o > /dev/null
        refused "options of the superblock" "bad superblock" mount -t ext4 -o loop o mnt
        # An error in a file system with errors=panic.
        truncate -s 16M p; mkfs.ext4 -q -O ^metadata_csum -e panic p
        debugfs -w -R 'clri lost+found' p 2> /dev/null
        works "panic" mount -o loop p mnt
        holds "forced" "$(findmnt -no OPTIONS mnt)" "errors=remount-ro"
        refused "an error" "" stat mnt/lost+found
        refused "read-only then" "Read-only" touch mnt/x
        umount mnt; soon "none at the end" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// Users may mount what the administrator lists, and root all supported file systems.
fn policy(ctx: &Ctx) -> Res {
    let denied = |daemon: &Daemon, kinds: &str, uid: Option<u32>| {
        let inside = Inside::new(ctx, daemon).with(&["--user", "--mount", kinds]);
        let inside = if let Some(uid) = uid { inside.user(uid) } else { inside };
        match inside.run("true") {
            Ok(_) => Err("it was allowed".into()),
            Err(refusal) => Ok::<_, crate::harness::Stop>(format!("{refusal:?}")),
        }
    };
    let daemon = Daemon::start(ctx)?;
    let said = denied(&daemon, "ext4", Some(1000))?;
    ensure!(
        said.contains("may not have ext4 mounted by the kernel") && said.contains("kernel_mounts"),
        "{said}"
    );
    ensure!(!said.contains("\\n\\n") && said.matches("loopengine: ").count() == 1, "not one line: {said}");
    let said = denied(&daemon, "ext4,btrfs", None)?;
    ensure!(said.contains("\\\"btrfs\\\" is not a file system"), "{said}");
    Inside::new(ctx, &daemon).with(&["--mount", "xfs,squashfs,erofs,vfat,ext2"]).run("true")?;
    daemon.stop()?;
    let daemon = allowing(ctx)?;
    let said = denied(&daemon, "ext4,squashfs", Some(1000))?;
    ensure!(said.contains("may not have squashfs mounted"), "{said}");
    daemon.stop()
}

/// The process tree is killed, or the daemon ends, while a file system is mounted.
fn tenant_ends(ctx: &Ctx) -> Res {
    let daemon = allowing(ctx)?;
    let home = ctx.path("home");
    let start = |name: &str| {
        let script = format!(
            "cd home; name={name}; echo $$ > $name.pid\n{}",
            r#"
            truncate -s 32M $name; mkfs.ext4 -q $name; mkdir $name.mnt
            works "mount" mount -o loop $name $name.mnt
            echo synced > $name.mnt/synced; sync $name.mnt/synced
            head -c 1M /dev/urandom > $name.mnt/more
            pause $name
            "#
        );
        user(ctx, &daemon).start(&script)?.wait(&format!("home/{name}"))
    };
    let whole = |name: &str| -> Res {
        // Replays the journal, if there is something in it.
        let replayed = tools::run(&["e2fsck", "-p", &format!("{home}/{name}")])?;
        ensure!(replayed.code <= 1, "{name}: {} {}", replayed.out, replayed.err);
        tools::ok(&["e2fsck", "-fn", &format!("{home}/{name}")])?;
        let synced = tools::ok(&["debugfs", "-R", "cat /synced", &format!("{home}/{name}")])?;
        ensure!(synced == "synced", "{name} has {synced:?}");
        Ok(())
    };
    // Until the daemon is idle.
    user(ctx, &daemon).run("true")?;
    std::thread::sleep(Duration::from_secs(3));
    let before = daemon.footprint()?;
    let killed = start("killed")?;
    tools::sh(format!("kill -KILL -- -$(cat {home}/killed.pid)"))?;
    let gone = tools::until(Duration::from_secs(20), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "devices of a killed process tree are left: {:?}", daemon.ublk_ids());
    ensure!(killed.finish().is_err(), "the script was not killed");
    whole("killed")?;
    let clean = tools::ok(&["dumpe2fs", "-h", &format!("{home}/killed")])?;
    ensure!(!clean.contains("needs_recovery"), "the file system was not unmounted: {clean}");
    let idle = tools::until(Duration::from_secs(20), || {
        daemon.footprint().is_ok_and(|after| after == before).then_some(())
    });
    ensure!(idle.is_some(), "from {before:?} to {:?}", daemon.footprint()?);
    let left = start("left")?;
    daemon.stop()?;
    left.resume("home/left")?;
    left.finish()?;
    whole("left")
}

/// Rounds of mount and umount leak nothing in the daemon and the maker.
fn rounds(ctx: &Ctx) -> Res {
    let daemon = allowing(ctx)?;
    let count = if ctx.host.full { 200 } else { 20 };
    let script = user(ctx, &daemon).start(&format!(
        "count={count}\n{}",
        r#"
        cd home; truncate -s 8M a; mkfs.ext4 -q a; mkdir mnt
        round() { mount -o loop a mnt && umount mnt || { wrong "round $1"; return 1; }; }
        for i in {1..5}; do round w$i || break; done
        refused "an option" "" mount -o loop,errors=panic a mnt
        soon "warm" "" losetup -a; sleep 3; pause warm
        for i in $(seq $count); do round $i || break; done
        refused "an option" "" mount -o loop,errors=panic a mnt
        soon "unbound" "" losetup -a; sleep 3; pause done
        "#
    ))?;
    let maker = || -> Res<_> {
        let pid = tools::ok(&["pgrep", "-P", &daemon.pid()?.to_string(), "-f", "mount-maker"])?;
        let count = |what: &str| Ok::<_, crate::harness::Stop>(std::fs::read_dir(what)?.count());
        if tools::run(&["pgrep", "-P", &pid])?.code == 0 {
            fail!("the maker has children");
        }
        Ok((pid.clone(), count(&format!("/proc/{pid}/fd"))?))
    };
    let look = || -> Res<_> { Ok((daemon.footprint()?, daemon.ublk_ids().len(), maker()?)) };
    let script = script.wait_for(ROUNDS, "home/warm")?;
    let before = look()?;
    script.resume("home/warm")?;
    let script = script.wait_for(ROUNDS, "home/done")?;
    let after = look()?;
    script.resume("home/done")?;
    script.finish()?;
    ensure!(before == after, "from {before:?} to {after:?}");
    daemon.stop()
}
