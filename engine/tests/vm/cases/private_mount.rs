// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unmodified mount(8) and umount(8) with private loop devices, and many rounds of them.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};

/// Deadline for all rounds, on a busy CPU.
const ROUNDS: Duration = Duration::from_secs(1200);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::mount", Needs::Private, 180, mount),
        case("private::mount_options", Needs::Private, 180, mount_options),
        case("private::mount_covers", Needs::Private, 180, mount_covers),
        case("private::umount", Needs::Private, 180, umount),
        case("private::mount_names", Needs::Private, 180, mount_names),
        case("private::rounds", Needs::Private, 1500, rounds),
    ]
}

/// `mount -o loop` leaves nothing behind.
fn mount(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt mnt2
        works "-o loop" mount -o loop a mnt
        same "bound" "$(bound)" "/dev/loop0 $PWD/a"
        same "autoclear" "$(losetup -n -O AUTOCLEAR /dev/loop0 | tr -d ' ')" 1
        echo hello > mnt/file
        holds "shown" "$(findmnt -no SOURCE mnt)" "/dev/loop0"
        works "umount" umount mnt
        soon "nothing bound after umount" "" losetup -a
        soon "size 0" 0 size /dev/loop0
        works "the image is whole" e2fsck -fn a
        works "without -o" mount a mnt
        same "file" "$(cat mnt/file)" hello
        works "umount" umount mnt
        soon "nothing bound after the second" "" losetup -a
        # One image on two directories shares one device: two file systems would corrupt it.
        works "first" mount -o loop a mnt; works "second" mount -o loop a mnt2
        same "one device" "$(losetup -n -l | wc -l)" 1
        echo two > mnt2/two; same "one file system" "$(cat mnt/two)" two
        umount mnt; sleep 0.5
        same "still mounted" "$(cat mnt2/two)" two
        same "still bound" "$(bound)" "/dev/loop0 $PWD/a"
        umount mnt2; soon "the last umount" "" losetup -a
        works "whole again" e2fsck -fn a
        "#,
    )?;
    daemon.stop()
}

fn mount_options(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt
        cp a was
        works "ro" mount -o loop,ro a mnt
        same "ro: device" "$(losetup -n -O RO /dev/loop0 | tr -d ' ')" 1
        refused "ro: write" "Read-only file system" touch mnt/x
        umount mnt; soon "ro: unbound" "" losetup -a
        works "ro: the image is unchanged" cmp a was
        { head -c 1M /dev/zero; cat a; head -c 1M /dev/zero; } > b
        works "offset" mount -o loop,offset=1M,sizelimit=16M b mnt
        same "offset: device" "$(losetup -n --raw -O OFFSET,SIZELIMIT)" "1048576 16777216"
        echo hello > mnt/file
        umount mnt; soon "offset: unbound" "" losetup -a
        dd if=b of=c bs=1M skip=1 count=16 2>/dev/null
        works "offset: whole" e2fsck -fn c
        # mount, unlike losetup, needs an existing device.
        works "loop=: a device" losetup /dev/loop3 a; losetup -d /dev/loop3; soon "loop=: free" "" losetup -a
        works "loop=" mount -o loop=/dev/loop3 a mnt
        same "loop=: device" "$(bound)" "/dev/loop3 $PWD/a"
        umount mnt; soon "loop=: unbound" "" losetup -a
        # umount does not unbind a device that losetup has bound.
        losetup /dev/loop2 a; works "a device" mount /dev/loop2 mnt
        umount mnt; sleep 0.5
        same "still bound" "$(bound)" "/dev/loop2 $PWD/a"
        losetup -d /dev/loop2
        truncate -s 1M junk
        refused "no file system" "" mount -o loop junk mnt
        soon "no file system: unbound" "" losetup -a
        losetup -r -f a; works "read-only by losetup" mount -o ro /dev/loop0 mnt; umount mnt
        "#,
    )?;
    daemon.stop()
}

/// A mount covers the files of its directory until the unmount, by the kernel and by FUSE.
fn mount_covers(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 8M ext4; mkfs.ext4 -q -E root_owner=0:0 ext4
        mkdir mnt tree; echo below > mnt/below; echo file > tree/file
        mksquashfs tree squashfs -quiet -no-progress >/dev/null
        for kind in ext4 squashfs; do
            works "$kind" mount -o loop $kind mnt
            refused "$kind: covered" "" cat mnt/below
            works "$kind: umount" umount mnt
            same "$kind: seen again" "$(cat mnt/below)" below
            soon "$kind: unbound" "" losetup -a
        done
        { head -c 4096 ext4; head -c 8M /dev/zero; } > broken
        refused "broken" "" mount -o loop broken mnt; soon "broken: unbound" "" losetup -a
        "#;
    // As udev would.
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666)).at("/dev/fuse")?;
    std::fs::set_permissions(&ctx.dir, PermissionsExt::from_mode(0o1777)).at("chmod")?;
    Inside::new(ctx, &daemon).run(&format!("mkdir root; cd root\n{script}"))?;
    // FUSE drivers fail at a journal; the kernel replays it.
    let journal = r#"
        cp ext4 dirty; debugfs -w -R 'feature +needs_recovery' dirty 2>/dev/null
        refused "journal" "Structure needs cleaning" mount -o loop dirty mnt
        soon "journal: unbound" "" losetup -a; same "journal: not covered" "$(cat mnt/below)" below
        works "journal: replayed" e2fsck -p -E journal_only dirty
        works "journal: mounted" mount -o loop dirty mnt; works "journal: umount" umount mnt
        "#;
    Inside::new(ctx, &daemon).user(1000).run(&format!("mkdir user; cd user\n{script}{journal}"))?;
    daemon.stop()
}

fn umount(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        truncate -s 16M a; mkfs.ext4 -q a; mkdir mnt
        for what in mnt a /dev/loop0; do
            works "mount" mount -o loop a mnt
            works "umount $what" umount $what
            soon "unbound after umount $what" "" losetup -a
        done
        works "mount" mount -o loop a mnt
        works "-d while it is mounted" losetup -d /dev/loop0
        sleep 1.5; same "still bound" "$(bound)" "/dev/loop0 $PWD/a"
        works "still usable" touch mnt/x
        exec 7< mnt/x; refused "in use" "busy" umount mnt; exec 7<&-
        works "umount" umount mnt; soon "unbound" "" losetup -a
        works "mount" mount -o loop a mnt
        works "lazily" umount -l mnt; soon "unbound, lazily" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// The name of a device in the mount table, although /dev/loopN is a link, which mount(8) resolves.
fn mount_names(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 32M a; mkfs.ext4 -q a; mkdir mnt
        source_of() { sed -n "s,^\([^ ]*\) $PWD/mnt .*,\1,p" /proc/mounts; }
        works "losetup" losetup /dev/loop0 a; works "mount" mount /dev/loop0 mnt
        same "mount" "$(source_of)" /dev/loop0
        same "findmnt" "$(findmnt -nro TARGET /dev/loop0)" "$PWD/mnt"
        same "lsblk" "$(lsblk -nro MOUNTPOINTS /dev/loop0)" "$PWD/mnt"
        works "umount" umount /dev/loop0
        works "mount -c" mount -c /dev/loop0 $PWD/mnt; same "mount -c" "$(source_of)" /dev/loop0
        works "umount" umount /dev/loop0; losetup -d /dev/loop0
        works "-o loop" mount -o loop a mnt; same "-o loop" "$(source_of)" /dev/loop0
        works "umount" umount a
        rm a; truncate -s 64M a; echo "start=2048" | sfdisk -q a; works "losetup -P" losetup -P /dev/loop0 a
        mkfs.ext4 -q /dev/loop0p1; works "a partition" mount /dev/loop0p1 mnt
        same "a partition" "$(source_of)" /dev/loop0p1; works "umount" umount /dev/loop0p1
        works "fsopen" python3 -c "$FSOPEN" /dev/loopfs/loop0p1 $PWD/mnt
        same "fsopen" "$(source_of)" /dev/loop0p1; works "umount" umount mnt
        works "other file systems" mount -t tmpfs /dev/loopfs mnt; same "tmpfs" "$(source_of)" /dev/loopfs
        "#;
    Inside::new(ctx, &daemon).run(&format!("FSOPEN='{FSOPEN}'\n{script}"))?;
    daemon.stop()
}

/// Mounts as libmount 2.39 does: fsopen(2), fsconfig(2), fsmount(2), move_mount(2).
const FSOPEN: &str = r#"
import ctypes, sys
def call(*words):
    done = ctypes.CDLL(None, use_errno=True).syscall(*words)
    if done < 0: sys.exit(f"{words}: errno {ctypes.get_errno()}")
    return done
device, target = (word.encode() for word in sys.argv[1:])
fs = call(430, b"ext4", 0)
call(431, fs, 1, b"source", ctypes.create_string_buffer(device), 0)
call(431, fs, 6, None, None, 0)
call(429, call(432, fs, 0, 0), b"", -100, target, 4)
"#;

/// Rounds of mount and umount leak nothing in the daemon.
fn rounds(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let count = if ctx.host.full { 1000 } else { 40 };
    let script = format!(
        "count={count}\n{}",
        r#"
        truncate -s 4M a; mkfs.ext4 -q -O ^has_journal a; mkdir mnt
        round() { mount -o loop a mnt && umount mnt || { wrong "round $1"; return 1; }; }
        for i in {1..10}; do round w$i || break; done
        soon "warm" "" losetup -a; sleep 3; pause warm
        for i in $(seq $count); do round $i || break; done
        soon "unbound" "" losetup -a; sleep 3
        same "devices" "$(ls /dev/loopfs | wc -l)" "$(ls -d /sys/block/loop* | wc -l | { read n; echo $((n + 1)); })"
        pause done
        "#
    );
    let look = || -> Res<_> { Ok((daemon.footprint()?, daemon.ublk_ids())) };
    let script = Inside::new(ctx, &daemon).start(&script)?.wait("warm")?;
    let before = look()?;
    let resident = daemon.resident_kib()?;
    script.resume("warm")?;
    let script = script.wait_for(ROUNDS, "done")?;
    let after = look()?;
    let more = daemon.resident_kib()?.saturating_sub(resident);
    script.resume("done")?;
    script.finish()?;
    ensure!(before == after, "{count} rounds: from {before:?} to {after:?}");
    ensure!(more < 4096, "{count} rounds took {more} KiB");
    ctx.note(format!("{count} rounds, {more} KiB more"));
    daemon.stop()
}
