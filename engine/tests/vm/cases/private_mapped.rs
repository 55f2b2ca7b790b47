// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Device mapper and md on loop devices of `loopengine run`, by their own tools: the same script
//! with the kernel's driver and in a pool must print the same lines. Active disks end with the
//! tenant.

use std::time::Duration;

use super::private_partitions::same;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, skip};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    let tools = |name: &str, needs: &'static [&'static str], script: &'static str| {
        case(format!("private::mapped::{name}"), Needs::Private, 580, move |ctx| {
            installed(needs)?;
            same(ctx, &format!("{MODULES}\n{script}"))
        })
    };
    vec![
        tools("cryptsetup", &["cryptsetup"], CRYPTSETUP),
        tools("veritysetup", &["veritysetup"], VERITYSETUP),
        tools("dmsetup", &["dmsetup"], DMSETUP),
        tools("kpartx", &["kpartx"], KPARTX),
        tools("by_number", &["dmsetup"], BY_NUMBER),
        tools("lvm", &["lvm"], LVM),
        tools("mdadm", &["mdadm"], MDADM),
        case("private::mapped::left_active", Needs::Private, 300, left_active),
        case("private::mapped::others_stay_closed", Needs::Private, 300, others_stay_closed),
    ]
}

pub(super) fn installed(needs: &[&str]) -> Res {
    for name in needs {
        if !tools::run(&["which", name]).is_ok_and(|done| done.code == 0) {
            skip!("no {name}");
        }
    }
    Ok(())
}

/// These machines have no udev. The tools create nodes only if these variables say so; `run` sets
/// them, too.
pub(super) const MODULES: &str = r#"modprobe -a dm_mod dm_crypt dm_verity raid1 2>&1; export DM_DISABLE_UDEV=1 MDADM_NO_UDEV=1
    gone() { for i in {1..100}; do [ -n "$(losetup -j disk)" ] || break; sleep 0.05; done; losetup -j disk; }"#;

const CRYPTSETUP: &str = r#"
printf secret > key
fast="--batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file key"
bind
report "format" cryptsetup luksFormat $fast $dev
report "open" cryptsetup open --key-file key $dev secret
ls -l /dev/mapper/secret | cut -c 1-10
report "mkfs" mkfs.ext4 -q /dev/mapper/secret
mkdir -p mnt; report "mount" mount /dev/mapper/secret mnt; echo hello > mnt/file
report "lsblk" lsblk -nro NAME,TYPE,MOUNTPOINTS $dev; sed "s,$PWD,," said
report "losetup -d while open" losetup -d $dev; losetup -n -O BACK-FILE -l $dev | sed "s,.*/,,"
umount mnt
report "status" cryptsetup status secret; grep -E 'type|cipher|keysize|active' said
dev=none; report "close" cryptsetup close secret
ls /dev/mapper/secret 2>&1
gone
report "open, a file" cryptsetup open --key-file key disk secret
report "mount" mount /dev/mapper/secret mnt; cat mnt/file; umount mnt
report "close" cryptsetup close secret
gone
"#;

const VERITYSETUP: &str = r#"
mkfs.ext4 -q disk; truncate -s 4M hashes; bind -r
hash=$(veritysetup format disk hashes | sed -n 's/^Root hash:[[:space:]]*//p')
report "open" veritysetup open $dev checked hashes $hash
mkdir -p mnt; report "mount" mount -r /dev/mapper/checked mnt; ls mnt; umount mnt
report "close" veritysetup close checked
report "open, a wrong hash" veritysetup open $dev checked hashes ${hash/?/g}
free; rm -f hashes
"#;

const DMSETUP: &str = r#"
bind; sectors=$(blockdev --getsz $dev)
report "create" dmsetup create whole --table "0 $sectors linear $dev 0"
report "a second on top" dmsetup create half --table "0 $((sectors / 2)) linear /dev/mapper/whole 0"
blockdev --getsize64 /dev/mapper/half
report "ls" dmsetup ls; cut -f 1 said | sort
report "tree" lsblk -nro NAME,TYPE $dev; cat said
echo "by number: $(cat /sys/class/block/dm-*/dm/name | sort | tr '\n' ' ')"
dd if=/dev/zero of=/dev/mapper/half bs=1M count=1 oflag=direct 2>/dev/null; echo "written: $?"
report "the lower first" dmsetup remove whole
report "the upper" dmsetup remove half
report "the lower" dmsetup remove whole
ls /dev/mapper
free; dev=none
"#;

const KPARTX: &str = r#"
table "label: gpt" "start=2048,size=32768" "size=8192" | sfdisk -q disk
bind
report "add" kpartx -av $dev; sed -E 's/\([0-9:]+\)/()/; s/linear [0-9:]+/linear/' said
p=/dev/mapper/${dev##*/}p1
report "mkfs" mkfs.ext4 -q $p
mkdir -p mnt; report "mount" mount $p mnt; echo hello > mnt/file; umount mnt
report "list" kpartx -l $dev; cat said
report "delete" kpartx -d $dev
free
report "add, a file" kpartx -asv $PWD/disk; sed -E 's/\([0-9:]+\)/()/; s/linear [0-9:]+/linear/' said
report "mount" mount /dev/mapper/loop0p1 mnt; cat mnt/file; umount mnt
# kpartx finds the device of a file only with a loopN in /sys/devices and udev's /dev/block.
report "delete, a file" kpartx -dv $PWD/disk
report "delete, its device" kpartx -d $dev; dev=none; losetup -d /dev/loop0; gone
"#;

/// Links by device number in /dev/block. For the kernel's driver the script makes them, as udev
/// would.
const BY_NUMBER: &str = r#"
ours() { [ -d /dev/loopfs ]; }
number() { cat /sys/class/block/$1/dev; }
show() {
    local link=/dev/block/$(number $1)
    ours || { mkdir -p /dev/block; ln -sfn ../$1 $link; }
    echo "$(readlink $link | sed 's/[0-9][0-9]*/N/g'): $(stat -Lc %F $link), $(head -c 4 $link)"
    [ "$(stat -Lc %Hr:%Lr $link)" = "$(number $1)" ] || echo "$1: another number"
}
table "label: dos" "start=2048,size=4096" | sfdisk -q disk
write() { printf $1 | dd of=disk bs=512 seek=$2 conv=notrunc 2>/dev/null; }
write disk 0; write part 2048
bind -P; name=${dev#/dev/}; show $name; show ${name}p1
dmsetup create whole --table "0 4096 linear ${dev}p1 0"; show $(cd /sys/class/block; grep -l '^whole$' dm-*/dm/name | cut -d/ -f1)
report "by number" blockdev --getsz /dev/block/$(number $name); cat said
dmsetup remove whole; free
ours || rm -rf /dev/block
echo "left: $(ls -l /dev/block 2>/dev/null | grep -cE 'p1$|dm-')"
"#;

const LVM: &str = r#"
export LVM_SUPPRESS_FD_WARNINGS=1 LVM_SYSTEM_DIR=$PWD/lvm; mkdir -p lvm/backup lvm/archive lvm/cache; : > lvm/lvm.conf
bind
report "pvcreate" lvm pvcreate $dev; cat said
report "vgcreate" lvm vgcreate group $dev; cat said
report "lvcreate" lvm lvcreate -y -L 16M -n first group; cat said
report "a second" lvm lvcreate -y -L 16M -n second group; cat said
report "mkfs" mkfs.ext4 -q /dev/group/first
mkdir -p mnt; report "mount" mount /dev/group/first mnt; echo hello > mnt/file
report "snapshot" lvm lvcreate -y -s -L 8M -n before group/first; cat said
report "lsblk" lsblk -nro NAME,TYPE $dev; cat said
report "lvs" lvm lvs --noheadings -o lv_name,lv_size,origin; cat said
umount mnt
report "extend" lvm lvextend -L +8M group/second; cat said
report "deactivate" lvm vgchange -an group; cat said
ls /dev/group 2>&1
report "activate" lvm vgchange -ay group; cat said
report "mount" mount /dev/group/first mnt; cat mnt/file; umount mnt
report "remove" lvm vgremove -y group; cat said
free; rm -rf lvm
"#;

const MDADM: &str = r#"
truncate -s 64M other; bind; second=$(losetup -f --show other)
report "create" mdadm --create /dev/md77 --run --metadata 1.2 --level 1 --raid-devices 2 $dev $second
stat -c %F /dev/md77
mdadm --wait /dev/md77 >/dev/null 2>&1
report "mkfs" mkfs.ext4 -q /dev/md77
mkdir -p mnt; report "mount" mount /dev/md77 mnt; echo hello > mnt/file
report "detail" mdadm --detail /dev/md77; grep -E 'Raid Level|Raid Devices' said | sort
report "lsblk" lsblk -nro NAME,TYPE $dev; cat said
umount mnt
report "stop" mdadm --stop /dev/md77
report "assemble" mdadm --assemble /dev/md77 $dev $second
report "mount" mount /dev/md77 mnt; cat mnt/file; umount mnt
report "stop" mdadm --stop /dev/md77
losetup -d $second; free; rm -f other
"#;

/// A tenant is killed with active mappings: the mappings and the disks are removed.
fn left_active(ctx: &Ctx) -> Res {
    installed(&["dmsetup"])?;
    tools::sh(MODULES)?;
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 64M disk; mkdir -p mnt
        dev=$(losetup -f --show disk); sectors=$(blockdev --getsz $dev)
        works "whole" dmsetup create whole --table "0 $sectors linear $dev 0"
        works "half" dmsetup create half --table "0 $((sectors / 2)) linear /dev/mapper/whole 0"
        works "mkfs" mkfs.ext4 -q /dev/mapper/half
        works "mount" mount /dev/mapper/half mnt
        pause left
        "#;
    let script = Inside::new(ctx, &daemon).start(script)?;
    let script = script.wait("left")?;
    let there = tools::ok(&["dmsetup", "ls"])?;
    ensure!(there.contains("whole") && there.contains("half"), "mappings: {there}");
    script.kill();
    let gone = tools::until(Duration::from_secs(20), || {
        let left = tools::ok(&["dmsetup", "ls"]).ok()?;
        (!left.contains("whole") && !left.contains("half")).then_some(())
    });
    ensure!(gone.is_some(), "mappings of a killed tenant are left");
    let gone = tools::until(Duration::from_secs(20), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "disks of a killed tenant are left");
    daemon.stop()
}

/// Refuses mappings and nodes of disks outside of the pool.
fn others_stay_closed(ctx: &Ctx) -> Res {
    installed(&["dmsetup"])?;
    tools::sh(MODULES)?;
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 64M disk; dev=$(losetup -f --show disk)
        holds "a mapping without a device" "$(dmsetup create zero --table "0 2048 zero" 2>&1)" "not permitted"
        refused "its node" "" test -b /dev/mapper/zero
        works "of the kernel's driver" mknod /dev/loop5 b 7 5
        works "again" mknod /dev/loop5 b 7 5
        same "it is one of the pool" "$(losetup -f --show disk)" /dev/loop1
        works "it can be bound" losetup /dev/loop5 disk
        refused "elsewhere" "not permitted" mknod other b 7 5
        dmsetup remove --force zero >/dev/null 2>&1
        "#;
    Inside::new(ctx, &daemon).run(script)?;
    daemon.stop()
}
