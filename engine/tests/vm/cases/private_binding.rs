// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private loop devices from bind to unbind: detaching with and without holders, rebinding,
//! overlaps, removal, partitions.

use std::time::Duration;

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::detach", Needs::Private, 120, detach),
        case("private::rebind", Needs::Private, 120, rebind),
        case("private::bind_during_unbind", Needs::Private, 240, bind_while_unbinding),
        case("private::nooverlap", Needs::Private, 120, overlap),
        case("private::remove", Needs::Private, 120, remove),
        case("private::partitions::mbr", Needs::Private, 150, |ctx| partitions(ctx, "dos")),
        case("private::partitions::gpt", Needs::Private, 150, |ctx| partitions(ctx, "gpt")),
    ]
}

/// `losetup -d` unbinds at once or with the last close; `-D` unbinds all.
fn detach(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 1M alpha
        dev=$(losetup -f --show a)
        works "-d" losetup -d $dev
        same "not held: unbound at once" "$(losetup -a)" ""
        refused "-d of an unbound device" "No such device" losetup -d $dev
        soon "size, unbound" 0 size $dev
        same "the node stays" "$(stat -Lc %F $dev)" "block special file"

        dev=$(losetup -f --show a); exec 7<>$dev
        works "-d, held" losetup -d $dev
        sleep 1.5
        same "held: still bound" "$(bound)" "$dev $PWD/a"
        same "held: autoclear" "$(losetup -n -O AUTOCLEAR $dev | tr -d ' ')" 1
        same "held: its bytes" "$(head_of /dev/fd/7)" alpha
        printf OMEGA >&7; exec 7>&-
        soon "unbound after the last close" "" losetup -a
        same "the last write" "$(head_of a)" OMEGA

        for i in 1 2 3; do works "bind $i" losetup -f a; done
        works "-D" losetup -D
        soon "-D leaves none" "" losetup -a
        works "-D of none" losetup -D
        same "numbers from 0 again" "$(losetup -f)" /dev/loop0
        "#,
    )?;
    daemon.stop()
}

/// A device that is bound again serves the new file, and does not write to the old one.
fn rebind(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 2M alpha; image b 1M beta; cp a a.was; cp b b.was
        for round in 1 2 3 4 5; do
            losetup /dev/loop0 a; same "$round: a" "$(head_of /dev/loop0)" alpha
            works "$round: all of a" cmp /dev/loop0 a.was
            losetup -d /dev/loop0
            works "$round: b at once" losetup /dev/loop0 b
            same "$round: size of b" "$(size /dev/loop0)" 1048576
            works "$round: all of b" cmp /dev/loop0 b.was
            losetup -d /dev/loop0
        done
        # Dirty data goes to the file that was bound when it was written.
        losetup /dev/loop0 a; printf ALPHA | dd of=/dev/loop0 conv=notrunc 2>/dev/null
        losetup -d /dev/loop0; losetup /dev/loop0 b
        same "b has nothing of a" "$(head_of /dev/loop0)" beta
        losetup -d /dev/loop0; soon "unbound" "" losetup -a
        same "a has it" "$(head_of a)" ALPHA; works "b is as it was" cmp b b.was
        # Rebind while a process holds the previous binding open.
        losetup /dev/loop0 a; exec 7</dev/loop0; losetup -d /dev/loop0
        if losetup /dev/loop0 b 2>/dev/null; then
            same "rebound: bytes of b" "$(head_of /dev/loop0)" beta
            same "the holder's bytes" "$(dd bs=16 count=1 <&7 2>/dev/null | tr -d '\0')" ALPHA
        else
            echo "a device that is held after -d cannot be bound, as with the kernel's" >&2
        fi
        exec 7<&-
        "#,
    )?;
    daemon.stop()
}

/// Binds the next free device while the previous one unbinds: each has its own file.
fn bind_while_unbinding(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run_for(
        Duration::from_secs(200),
        r#"
        image a 1M alpha; image b 2M beta; mkdir mnt; truncate -s 8M fs; mkfs.ext4 -q fs
        for round in {1..15}; do
            first=$(losetup -f --show a); same "$round: a" "$(head_of $first)" alpha
            losetup -d $first
            next=$(losetup -f --show b); same "$round: b" "$(head_of $next)" beta
            same "$round: one is bound" "$(bound)" "$next $PWD/b"
            losetup -d $next
            works "$round: mount" mount -o loop fs mnt
            same "$round: mounted" "$(findmnt -no FSTYPE mnt)" ext4
            umount mnt
        done
        soon "unbound" "" losetup -a
        "#,
    )?;
    daemon.stop()
}

/// `--nooverlap` finds bound devices.
fn overlap(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).run(
        r#"
        image a 4M
        same "first" "$(losetup --nooverlap -f --show -o 1M --sizelimit 1M a)" /dev/loop0
        same "the same: the same device" "$(losetup --nooverlap -f --show -o 1M --sizelimit 1M a)" /dev/loop0
        refused "into it" "overlapping" losetup --nooverlap -f --show -o 1536K --sizelimit 1M a
        same "beside it" "$(losetup --nooverlap -f --show -o 2M --sizelimit 1M a)" /dev/loop1
        same "overlaps are allowed otherwise" "$(losetup -f --show a)" /dev/loop2
        same "three" "$(losetup -n -l | wc -l)" 3
        "#,
    )?;
    daemon.stop()
}

/// Removes devices with unlink and, if losetup supports it, with --remove.
fn remove(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let out = Inside::new(ctx, &daemon).run(
        r#"
        image a 1M
        losetup /dev/loop0 a; losetup /dev/loop3 a
        refused "bound" "busy" rm /dev/loopfs/loop3
        losetup -d /dev/loop3; soon "unbound" 0 size /dev/loop3; exec 7</dev/loop3
        refused "open" "busy" rm /dev/loopfs/loop3
        exec 7<&-
        works "unbound" rm /dev/loopfs/loop3
        works "gone from the pool" test ! -e /dev/loopfs/loop3
        works "gone from /dev" test ! -L /dev/loop3
        works "gone from /sys" test ! -e /sys/block/loop3
        refused "twice" "No such file" rm /dev/loopfs/loop3
        same "the other is there" "$(bound)" "/dev/loop0 $PWD/a"
        works "made again" losetup /dev/loop3 a
        if losetup --help | grep -q -- --remove; then
            losetup -d /dev/loop3; works "--remove" losetup --remove /dev/loop3
            works "gone with --remove" test ! -e /dev/loop3
        else
            echo "this losetup has no --remove"
        fi
        "#,
    )?;
    if !out.is_empty() {
        ctx.note(out);
    }
    daemon.stop()
}

/// `-P`: partitions are devices, and are removed with their disk.
fn partitions(ctx: &Ctx, table: &str) -> Res {
    let daemon = Daemon::start(ctx)?;
    let script = format!(
        "table={table}\n{}",
        r#"
        truncate -s 40M disk; mkdir mnt
        printf 'label: %s\nstart=2048, size=32768\nstart=40960, size=8192\n' $table | sfdisk -q disk || exit 1
        printf second | dd of=disk bs=512 seek=40960 conv=notrunc 2>/dev/null
        dev=$(losetup -P -f --show disk)
        same "PARTSCAN" "$(losetup -n -O PARTSCAN $dev | tr -d ' ')" 1
        same "nodes" "$(echo /dev/loop0p*)" "/dev/loop0p1 /dev/loop0p2"
        same "size of 1" "$(size /dev/loop0p1)" 16777216
        same "size of 2" "$(size /dev/loop0p2)" 4194304
        same "bytes of 2" "$(head_of /dev/loop0p2)" second
        same "sysfs: start of 2" "$(cat /sys/block/loop0/loop0p2/start)" 40960
        same "sysfs: number of 2" "$(cat /sys/class/block/loop0p2/partition)" 2
        works "mkfs" mkfs.ext4 -q /dev/loop0p1
        works "mount" mount /dev/loop0p1 mnt
        echo hello > mnt/file
        works "-d while a partition is mounted" losetup -d $dev
        sleep 1.5
        same "still bound" "$(bound)" "$dev $PWD/disk"
        same "its file" "$(cat mnt/file)" hello
        works "umount" umount mnt
        soon "unbound after umount" "" losetup -a
        dev=$(losetup -P -f --show disk)
        works "mount again" mount -o ro /dev/loop0p1 mnt
        same "file" "$(cat mnt/file)" hello
        umount mnt
        losetup -d $dev; soon "unbound" "" losetup -a
        soon "partitions go" "/dev/loop0p*" eval 'echo /dev/loop0p*'
        # The file system is where the table says.
        works "by offset" mount -o loop,ro,offset=1048576,sizelimit=16777216 disk mnt
        same "file, by offset" "$(cat mnt/file 2>&1)" hello
        umount mnt; soon "unbound" "" losetup -a
        dev=$(losetup -f --show disk); same "without -P" "$(echo /dev/loop0p*)" "/dev/loop0p*"
        "#
    );
    Inside::new(ctx, &daemon).run(&script)?;
    daemon.stop()
}
