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

/// Without udev, which is not in these machines, the tools make no nodes unless they are told;
/// `run` tells them.
const MODULES: &str = r#"modprobe -a dm_mod dm_crypt dm_verity raid1 2>&1; export DM_DISABLE_UDEV=1 MDADM_NO_UDEV=1
    gone() { for i in {1..100}; do [ -n "$(losetup -j disk)" ] || break; sleep 0.05; done; losetup -j disk; }"#;

const CRYPTSETUP: &str = r#"
printf secret > key
fast="--batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file key"
bind
tell "format" cryptsetup luksFormat $fast $dev
tell "open" cryptsetup open --key-file key $dev secret
ls -l /dev/mapper/secret | cut -c 1-10
tell "mkfs" mkfs.ext4 -q /dev/mapper/secret
mkdir -p mnt; tell "mount" mount /dev/mapper/secret mnt; echo hello > mnt/file
tell "lsblk" lsblk -nro NAME,TYPE,MOUNTPOINTS $dev; sed "s,$PWD,," said
tell "in the way of losetup -d" losetup -d $dev; losetup -n -O BACK-FILE -l $dev | sed "s,.*/,,"
umount mnt
tell "status" cryptsetup status secret; grep -E 'type|cipher|keysize|active' said
dev=none; tell "close" cryptsetup close secret
ls /dev/mapper/secret 2>&1
gone
tell "open, a file" cryptsetup open --key-file key disk secret
tell "mount" mount /dev/mapper/secret mnt; cat mnt/file; umount mnt
tell "close" cryptsetup close secret
gone
"#;

const VERITYSETUP: &str = r#"
mkfs.ext4 -q disk; truncate -s 4M hashes; bind -r
hash=$(veritysetup format disk hashes | sed -n 's/^Root hash:[[:space:]]*//p')
tell "open" veritysetup open $dev checked hashes $hash
mkdir -p mnt; tell "mount" mount -r /dev/mapper/checked mnt; ls mnt; umount mnt
tell "close" veritysetup close checked
tell "open, a wrong hash" veritysetup open $dev checked hashes ${hash/?/g}
free; rm -f hashes
"#;

const DMSETUP: &str = r#"
bind; sectors=$(blockdev --getsz $dev)
tell "create" dmsetup create whole --table "0 $sectors linear $dev 0"
tell "a second upon it" dmsetup create half --table "0 $((sectors / 2)) linear /dev/mapper/whole 0"
blockdev --getsize64 /dev/mapper/half
tell "ls" dmsetup ls; cut -f 1 said | sort
tell "tree" lsblk -nro NAME,TYPE $dev; cat said
echo "by number: $(cat /sys/class/block/dm-*/dm/name | sort | tr '\n' ' ')"
dd if=/dev/zero of=/dev/mapper/half bs=1M count=1 oflag=direct 2>/dev/null; echo "written: $?"
tell "the lower first" dmsetup remove whole
tell "the upper" dmsetup remove half
tell "the lower" dmsetup remove whole
ls /dev/mapper
free; dev=none
"#;

const KPARTX: &str = r#"
table "label: gpt" "start=2048,size=32768" "size=8192" | sfdisk -q disk
bind
tell "add" kpartx -av $dev; sed -E 's/\([0-9:]+\)/()/; s/linear [0-9:]+/linear/' said
p=/dev/mapper/${dev##*/}p1
tell "mkfs" mkfs.ext4 -q $p
mkdir -p mnt; tell "mount" mount $p mnt; echo hello > mnt/file; umount mnt
tell "list" kpartx -l $dev; cat said
tell "delete" kpartx -d $dev
free
tell "add, a file" kpartx -asv $PWD/disk; sed -E 's/\([0-9:]+\)/()/; s/linear [0-9:]+/linear/' said
tell "mount" mount /dev/mapper/loop0p1 mnt; cat mnt/file; umount mnt
# Where there is no /dev/block, which udev makes, kpartx knows of a file's device only by its name.
tell "delete, a file" kpartx -dv $PWD/disk
tell "delete, its device" kpartx -d $dev; dev=none; losetup -d /dev/loop0; gone
"#;

const LVM: &str = r#"
export LVM_SUPPRESS_FD_WARNINGS=1 LVM_SYSTEM_DIR=$PWD/lvm; mkdir -p lvm/backup lvm/archive lvm/cache; : > lvm/lvm.conf
bind
tell "pvcreate" lvm pvcreate $dev; cat said
tell "vgcreate" lvm vgcreate group $dev; cat said
tell "lvcreate" lvm lvcreate -y -L 16M -n first group; cat said
tell "a second" lvm lvcreate -y -L 16M -n second group; cat said
tell "mkfs" mkfs.ext4 -q /dev/group/first
mkdir -p mnt; tell "mount" mount /dev/group/first mnt; echo hello > mnt/file
tell "snapshot" lvm lvcreate -y -s -L 8M -n before group/first; cat said
tell "lsblk" lsblk -nro NAME,TYPE $dev; cat said
tell "lvs" lvm lvs --noheadings -o lv_name,lv_size,origin; cat said
umount mnt
tell "extend" lvm lvextend -L +8M group/second; cat said
tell "deactivate" lvm vgchange -an group; cat said
ls /dev/group 2>&1
tell "activate" lvm vgchange -ay group; cat said
tell "mount" mount /dev/group/first mnt; cat mnt/file; umount mnt
tell "remove" lvm vgremove -y group; cat said
free; rm -rf lvm
"#;

const MDADM: &str = r#"
truncate -s 64M other; bind; second=$(losetup -f --show other)
tell "create" mdadm --create /dev/md77 --run --metadata 1.2 --level 1 --raid-devices 2 $dev $second
stat -c %F /dev/md77
mdadm --wait /dev/md77 >/dev/null 2>&1
tell "mkfs" mkfs.ext4 -q /dev/md77
mkdir -p mnt; tell "mount" mount /dev/md77 mnt; echo hello > mnt/file
tell "detail" mdadm --detail /dev/md77; grep -E 'Raid Level|Raid Devices' said | sort
tell "lsblk" lsblk -nro NAME,TYPE $dev; cat said
umount mnt
tell "stop" mdadm --stop /dev/md77
tell "assemble" mdadm --assemble /dev/md77 $dev $second
tell "mount" mount /dev/md77 mnt; cat mnt/file; umount mnt
tell "stop" mdadm --stop /dev/md77
losetup -d $second; free; rm -f other
"#;

/// A script that ends, or is killed, with active disks: nothing of it stays.
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
        halfway left
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
    ensure!(gone.is_some(), "mappings of who is gone stay");
    let gone = tools::until(Duration::from_secs(20), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "disks of who is gone stay");
    daemon.stop()
}

/// Nodes of disks that belong to another, or also to another.
fn others_stay_closed(ctx: &Ctx) -> Res {
    installed(&["dmsetup"])?;
    tools::sh(MODULES)?;
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 64M disk; dev=$(losetup -f --show disk)
        holds "a mapping upon nothing" "$(dmsetup create zero --table "0 2048 zero" 2>&1)" "not permitted"
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
