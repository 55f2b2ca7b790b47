// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine mount` and `umount`: a file system in an image in one step, in the user's own shell.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::mount_command::user", Needs::Private, 180, user),
        case("private::mount_command::partitions", Needs::Private, 180, parts),
        case("private::mount_command::failures", Needs::Private, 180, failures),
        case("private::mount_command::root", Needs::Private, 180, root),
    ]
}

/// Shell functions of all scripts.
const WORDS: &str = r#"
export loopengine
mnt() { "$loopengine" mount "$@"; }
umnt() { "$loopengine" umount "$@"; }
options() { findmnt -no OPTIONS "$1"; }
# Devices of the user that the daemon counts.
devices() { "$loopengine" limit | awk -v user="$(id -un 2>/dev/null || id -u)" '$1 == user { print $3 }'; }
mkdir -p dir dir2
"#;

/// A daemon, and a directory that a plain user can write to.
fn prepared(ctx: &Ctx) -> Res<Daemon> {
    // As udev would.
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666)).at("/dev/fuse")?;
    std::fs::set_permissions(&ctx.dir, PermissionsExt::from_mode(0o1777))?;
    Daemon::start(ctx)
}

/// A shell of a plain user, for whom fusermount3 works.
fn of_user<'a>(ctx: &'a Ctx, daemon: &'a Daemon) -> Res<Inside<'a>> {
    for program in ["fusermount3", "fuse2fs", "squashfuse", "mksquashfs"] {
        if tools::run(&["which", program])?.code != 0 {
            skip!("no {program} here");
        }
    }
    let fusermount = tools::ok(&["which", "fusermount3"])?;
    if Path::new(&fusermount).metadata()?.permissions().mode() & 0o4000 == 0 {
        skip!("{fusermount} is not set-user-ID, so no user may mount");
    }
    Ok(Inside::new(ctx, daemon).user(1000).shell())
}

fn left(daemon: &Daemon) -> Res {
    let gone = tools::until(Duration::from_secs(10), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "devices left: {:?}", daemon.ublk_ids());
    Ok(())
}

/// Mounts and unmounts of a plain user leave nothing behind.
fn user(ctx: &Ctx) -> Res {
    let daemon = prepared(ctx)?;
    let script = of_user(ctx, &daemon)?.start(&format!(
        "{WORDS}{}",
        r#"
        truncate -s 16M a; mkfs.ext4 -q a
        works "mount" mnt a dir
        holds "type" "$(findmnt -no FSTYPE dir)" fuse
        same "source" "$(findmnt -no SOURCE dir)" "$PWD/a"
        holds "nosuid" "$(options dir)" nosuid; holds "nodev" "$(options dir)" nodev
        works "write" sh -c 'echo hello > dir/file && mkdir dir/sub && chmod 4755 dir/file'
        same "owner" "$(stat -c '%u %g' dir/file)" "1000 1000"
        refused "the image again" "is mounted already" mnt a dir2
        cp a b; tune2fs -U random b >/dev/null 2>&1
        refused "the directory again" "an image is mounted on" mnt b dir
        same "devices" "$(devices)" 1
        pause seen
        sleep 60 > dir/open & works "asleep" sleep 0.2
        refused "busy" "cannot unmount" umnt dir
        same "still there" "$(cat dir/file)" hello
        kill $!; wait
        works "umount" umnt dir
        same "nothing is left" "$(devices)" ""
        refused "unmounted" "" findmnt dir
        works "whole at once" e2fsck -fn a
        works "again" mnt a dir
        same "file" "$(cat dir/file)" hello
        works "by the image" umnt a
        same "nothing is left of it" "$(devices)" ""
        works "under run" "$loopengine" run -- sh -c \
            '"$loopengine" mount a dir && grep -q hello dir/file && "$loopengine" umount dir'
        soon "nothing is left of that" "" devices
        works "once more" mnt a dir
        works "by fusermount3" fusermount3 -u dir
        soon "and nothing is left" "" devices
        works "whole" e2fsck -fn a
        refused "nothing to unmount" "is not a mount of" umnt dir
        chmod 444 a; cp a was
        holds "the warning" "$(mnt a dir 2>&1)" "mounted read-only"
        refused "read-only" "Read-only file system" touch dir/x
        umnt dir; works "unchanged" cmp a was
        chmod 644 a
        same "no warning" "$(mnt --read-only a dir 2>&1)" ""
        works "read-only twice" mnt -r a dir2
        refused "a writable mount besides" "is mounted already" mnt a dir
        works "both" umnt a
        refused "first" "" findmnt dir; refused "second" "" findmnt dir2
        mkdir tree; echo squash > tree/file; mksquashfs tree s -quiet -no-progress >/dev/null
        same "squashfs" "$(mnt s dir 2>&1)" ""
        same "squashfs: file" "$(cat dir/file)" squash
        holds "squashfs: ro" "$(options dir)" ro
        works "squashfs: umount" umnt s
        same "at the end" "$(devices)" ""
        "#
    ))?;
    let script = script.wait("seen")?;
    let dir = ctx.path("dir");
    let look = ["setpriv", "--reuid", "1001", "--regid", "1001", "--clear-groups", "ls", &dir];
    ensure!(tools::run(&look)?.code != 0, "another user sees the files");
    script.resume("seen")?;
    script.finish()?;
    left(&daemon)?;
    daemon.stop()
}

/// Partitions and other parts of an image.
fn parts(ctx: &Ctx) -> Res {
    let daemon = prepared(ctx)?;
    of_user(ctx, &daemon)?.run(&format!(
        "{WORDS}{}",
        r#"
        truncate -s 16M one; mkfs.ext4 -q one; truncate -s 8M two; mkfs.ext2 -q two
        truncate -s 32M disk
        printf '%s\n' 'label: gpt' 'start=2048, size=32768' 'start=34816, size=16384' | sfdisk -q disk
        dd if=one of=disk bs=1M seek=1 conv=notrunc 2>/dev/null
        dd if=two of=disk bs=1M seek=17 conv=notrunc 2>/dev/null
        refused "no file system of its own" "1 (ext4, 16M), 2 (ext2, 8M)" mnt disk dir
        refused "the next step" "--partition N" mnt disk dir
        refused "no such partition" "has no partition 3" mnt disk dir --partition 3
        refused "no partitions" "has no partitions" mnt one dir --partition 1
        works "the first" mnt disk dir --partition 1
        works "the second beside it" mnt --partition 2 disk dir2
        refused "the first again" "is mounted already" mnt --partition 1 disk dir2
        echo 1 > dir/file; echo 2 > dir2/file
        works "both" umnt disk
        same "nothing is left" "$(devices)" ""
        dd if=disk of=one bs=1M skip=1 count=16 conv=notrunc 2>/dev/null; works "first" e2fsck -fn one
        dd if=disk of=two bs=1M skip=17 count=8 conv=notrunc 2>/dev/null; works "second" e2fsck -fn two
        works "by offset" mnt --offset 17M --sizelimit 8M disk dir
        same "by offset: file" "$(cat dir/file)" 2
        works "by offset: umount" umnt disk
        same "nothing is left at last" "$(devices)" ""
        "#
    ))?;
    left(&daemon)?;
    daemon.stop()
}

/// A failed mount prints one line and leaves nothing behind.
fn failures(ctx: &Ctx) -> Res {
    let daemon = prepared(ctx)?;
    let inside = of_user(ctx, &daemon)?;
    std::fs::create_dir(ctx.path("theirs"))?;
    let script = inside.start(&format!(
        "{WORDS}{}",
        r#"
        # one WHAT TEXT CMD...: refused in one line, and nothing left of it
        one() {
            refused "$@"
            same "$1: lines" "$("${@:3}" 2>&1 | wc -l)" 1
            same "$1: left" "$(devices)" ""; refused "$1: mounted" "" findmnt dir
        }
        truncate -s 16M a; mkfs.ext4 -q a
        truncate -s 1M junk; one "junk" "contains no known file system" mnt junk dir
        mkswap -q junk 2>/dev/null || mkswap junk >/dev/null
        one "swap" "cannot be mounted" mnt junk dir
        one "no image" "No such file" mnt none dir
        one "no directory" "mkdir none" mnt a none
        one "a file for a directory" "is not a directory" mnt a junk
        truncate -s 300M x; mkfs.xfs -q x
        one "xfs" "--fuse xfs=PROGRAM" mnt x dir
        # A valid superblock, and nothing else.
        { head -c 4096 a; head -c 16M /dev/zero; } > broken
        one "broken" "fuse2fs cannot mount broken" mnt broken dir
        one "no such program" "cannot-be-there is not installed" mnt --fuse ext4=cannot-be-there a dir
        one "does not mount" "true did not mount" mnt --fuse ext4=true a dir
        # A child of the driver holds the device: the command waits for it.
        printf '#!/bin/sh\nsleep 3 &\n' > lingers; chmod +x lingers
        one "lingers" "did not mount" mnt --fuse ext4=$PWD/lingers a dir
        bin=$(mktemp -d); for tool in fusermount3 fusermount; do ln -s $(command -v $tool) $bin; done
        one "not installed" "apt install fuse2fs" env PATH=$bin "$loopengine" mount a dir
        mkdir -p empty; ln -s $(command -v fuse2fs) empty/
        one "no fusermount3" "apt install fuse3" env PATH=$PWD/empty "$loopengine" mount a dir
        one "not our directory" "no write access" mnt a theirs
        mkdir full; touch full/x; one "not empty" "is not empty" mnt a full
        # The FUSE driver is killed: the mount is dead, the device is removed.
        works "mount" mnt a dir
        pkill -KILL -u 1000 -x fuse2fs
        soon "nothing is left of a killed one" "" devices
        refused "a dead one" "loopengine umount dir" mnt a dir
        works "unmount a dead one" umnt dir
        refused "no longer there" "" findmnt dir
        # FUSE drivers fail at a journal.
        truncate -s 16M dirty; mkfs.ext4 -q dirty; debugfs -w -R 'feature +needs_recovery' dirty 2>/dev/null
        one "a journal" "e2fsck -E journal_only dirty" mnt dirty dir
        works "a journal, where asked" mnt --replay-journal dirty dir
        works "a journal: umount" umnt dirty
        works "a journal: whole" e2fsck -fn dirty
        pause closed
        one "no /dev/fuse" "/dev/fuse" mnt a dir
        pause stopped
        # Without a daemon, the FUSE driver opens the image itself.
        works "no daemon" mnt dirty dir
        same "no daemon: source" "$(findmnt -no SOURCE dir)" "$PWD/dirty"
        refused "no daemon: again" "is mounted already" mnt dirty dir2
        works "no daemon: write" touch dir/new
        works "no daemon: umount" umnt dirty
        works "no daemon: whole" e2fsck -fn dirty
        refused "no daemon: nothing to unmount" "loopengine serve" umnt dir
        "#
    ))?;
    let script = script.wait("closed")?;
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o600))?;
    script.resume("closed")?;
    let script = script.wait("stopped")?;
    left(&daemon)?;
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666))?;
    daemon.stop()?;
    script.resume("stopped")?;
    script.finish()?;
    Ok(())
}

/// For root, the kernel mounts.
fn root(ctx: &Ctx) -> Res {
    let daemon = prepared(ctx)?;
    Inside::new(ctx, &daemon).shell().run(&format!(
        "{WORDS}{}",
        r#"
        truncate -s 16M a; mkfs.ext4 -q a; tune2fs -e panic a >/dev/null; cp a b
        works "mount" mnt a dir
        same "type" "$(findmnt -no FSTYPE dir)" ext4
        holds "source" "$(findmnt -no SOURCE dir)" $([ $backend = loop ] && echo /dev/loop5 || echo /dev/ublkb)
        holds "nosuid" "$(options dir)" nosuid; holds "nodev" "$(options dir)" nodev
        holds "no panic" "$(options dir),$(cat /proc/fs/ext4/*/options)" "errors=remount-ro"
        echo hello > dir/file; sleep 2
        same "two seconds later" "$(cat dir/file)" hello
        refused "the image again" "a is mounted already on $PWD/dir by" mnt a dir2
        refused "attach" "a is mounted already on $PWD/dir by" "$loopengine" attach a
        refused "detach" "unmount it with 'loopengine umount $PWD/dir'" "$loopengine" detach a
        refused "the directory again" "an image is mounted on" mnt b dir
        cd dir; refused "busy" "cannot unmount" umnt .; cd ..
        unshare --mount --propagation private sleep 60 & copy=$!; sleep 1
        refused "a copy" "pid $copy (sleep) has a copy of the mount" umnt dir
        kill $copy; wait $copy; soon "it ends with the copy" "" devices
        works "whole at once" e2fsck -fn a
        works "again" mnt a dir; same "file" "$(cat dir/file)" hello
        works "by the image" umnt a
        "$loopengine" run -- sh -c 'losetup -f a; : > bound; exec sleep 60' & soon "bound" bound ls bound
        refused "in use elsewhere" "is loop0 of private pool" mnt a dir
        kill $!; wait; soon "no more" "" devices
        modprobe -q loop; host=$(losetup -f --show a)
        refused "in use by the host" "a is in use by $host" mnt a dir
        refused "in use by the host: read-only" "a is in use by $host" mnt -r a dir
        losetup -d $host; host=$(losetup -r -f --show a)
        works "read-only in both places" mnt -r a dir; works "umount" umnt dir
        losetup -d $host
        dev=$("$loopengine" attach a)
        refused "attached" "a is attached as default/loop0" mnt a dir
        works "detach" "$loopengine" detach $dev
        works "read-only" mnt -r a dir
        refused "read-only: write" "Read-only file system" touch dir/x
        works "by umount(8)" umount dir
        soon "nothing is left of it" "" devices
        mkdir tree; echo squash > tree/file; mksquashfs tree s -quiet -no-progress >/dev/null
        works "by a program" mnt --fuse squashfs=squashfuse s dir
        holds "by a program: type" "$(findmnt -no FSTYPE dir)" fuse
        works "by a program: umount" umnt dir
        works "by fuse2fs" mnt --fuse ext4=fuse2fs a dir
        holds "by fuse2fs: nosuid" "$(options dir)" nosuid; holds "nodev" "$(options dir)" nodev
        works "by fuse2fs: umount" umnt dir
        { head -c 4096 a; head -c 16M /dev/zero; } > broken
        refused "broken" "dmesg" mnt broken dir
        same "at the end" "$(devices)" ""
        "#
    ))?;
    left(&daemon)?;
    daemon.stop()
}
