// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unmodified builders of disk images under `loopengine run`: the same steps on the kernel's driver
//! and in a pool print the same lines. `engine/doc/builders.md` lists the builders.

use std::time::Duration;

use super::private_bundle::{Bundle, Pool, any_runtime, unbound};
use super::private_mapped::installed;
use super::private_partitions::{REPORT, same};
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private::builders::script", Needs::Private, 580, |ctx| {
            same(ctx, &format!("MOUNT=; {SCRIPT}{LOOK}"))
        }),
        case("private::builders::script_of_a_user", Needs::Private, 580, of_a_user),
        case("private::builders::script_in_a_container", Needs::Private, 580, in_container),
        case("private::builders::chroot", Needs::Private, 580, |ctx| same(ctx, CHROOT)),
        case("private::builders::devtmpfs", Needs::Private, 580, |ctx| {
            installed(&["dmsetup"])?;
            same(ctx, DEVTMPFS)
        }),
        case("private::builders::vmdb2", Needs::Private, 580, |ctx| {
            installed(&["vmdb2", "lvm"])?;
            same(ctx, VMDB2)
        }),
    ]
}

/// Steps of a builder of Raspberry Pi images: a table, a file system per partition, a copied tree,
/// names by PARTUUID.
const SCRIPT: &str = r#"
set -e
truncate -s 96M disk
table "label: dos" "label-id: 0xcafe1234" "start=8192,size=65536,type=c" "start=73728" | sfdisk -q disk
dev=$(losetup --show -f -P disk)
report "bound" true
mkfs.vfat -F 32 -n BOOTFS -i 12345678 ${dev}p1 > /dev/null
mkfs.ext4 -q -L rootfs -U 11111111-2222-3333-4444-555555555555 -E lazy_itable_init=0 ${dev}p2
mkdir -p mnt; mount $MOUNT ${dev}p2 mnt
mkdir -p mnt/boot/firmware mnt/etc mnt/bin mnt/dev; mount $MOUNT ${dev}p1 mnt/boot/firmware
cp /bin/busybox mnt/bin/; echo PATH=/bin > mnt/etc/profile
for part in 1 2; do echo "PARTUUID=$(blkid -s PARTUUID -o value ${dev}p$part)"; done > mnt/etc/fstab
echo "root=$(lsblk -nro PARTUUID ${dev}p2)" > mnt/boot/firmware/cmdline.txt
cat mnt/etc/fstab mnt/boot/firmware/cmdline.txt
findmnt -nro FSTYPE,LABEL -R $PWD/mnt
umount -R mnt
losetup -d $dev
set +e
"#;

/// Checks the resulting image.
const LOOK: &str = r#"
bind -P -r
e2fsck -fn ${dev}p2 > said 2>&1; echo "e2fsck: $?"
fsck.vfat -n ${dev}p1 > said 2>&1; echo "fsck.vfat: $?"
blkid -o export ${dev}p2 | grep -E 'UUID|LABEL|TYPE' | sort
report "copied" debugfs -R "cat /etc/fstab" ${dev}p2; cat said
free
"#;

/// Runs `SCRIPT` as a user: the kernel mounts the file systems that the administrator allows.
fn of_a_user(ctx: &Ctx) -> Res {
    let config = ctx.path("loopengine.toml");
    tools::sh(format!("printf '[private]\\nkernel_mounts = [\"ext4\", \"vfat\"]\\n' > {config}"))?;
    let daemon = Daemon::with(ctx, &["--config", &config])?;
    tools::ok(&["chown", "1000:1000", &ctx.dir.display().to_string()])?;
    let script = format!(
        "MOUNT=; {REPORT}\n{SCRIPT}{}",
        r#"
        same "unbound" "$(losetup -j disk)" ""
        e2fsck -fn "disk?offset=$((73728 * 512))" > said 2>&1; same "e2fsck" "$?" 0
        holds "fstab" "$(debugfs -R 'cat /etc/fstab' "disk?offset=$((73728 * 512))" 2>/dev/null)" PARTUUID=cafe1234-02
        "#
    );
    let user = Inside::new(ctx, &daemon).user(1000).with(&["--mount", "ext4,vfat"]);
    user.run_for(Duration::from_secs(300), &script)?;
    daemon.stop()
}

/// Runs `SCRIPT` in a container with the default capabilities of its runtime.
fn in_container(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::with_mounts(ctx, &daemon, "ci", 2, "ext4,vfat")?;
    let bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    // Without udev's data libudev answers lsblk there, and lsblk reads no table itself.
    let steps = SCRIPT.replace("lsblk -nro PARTUUID", "blkid -s PARTUUID -o value");
    bundle.run(&format!(
        "{}\nMOUNT=; {REPORT}\n{steps}\n{}",
        r#"holds "caps" "$(grep CapEff /proc/self/status)" 0000000020000420"#,
        r#"soon "unbound" "" losetup -a; same "partitions" "$(ls /dev | grep loop0p)" """#
    ))?;
    let disk = bundle.work("disk");
    let part = format!("{disk}?offset={}", 73728 * 512);
    tools::ok(&["e2fsck", "-fn", &part])?;
    let fstab = tools::ok(&["debugfs", "-R", "cat /etc/fstab", &part])?;
    ensure!(fstab.contains("PARTUUID=cafe1234-02"), "the second partition has {fstab:?}");
    tools::ok(&["grep", "-aq", "root=cafe1234-02", &disk])?;
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// Programs in a root directory with a bind mount of /dev, which omits the mounts in /dev.
const CHROOT: &str = r#"
within() { chroot root /bin/busybox "$@"; }
# Nodes follow their devices within milliseconds.
until_it_has() { local i; for i in {1..100}; do [ "$(within head -c 4 $1 2>/dev/null)" != $2 ] || break; sleep 0.05; done; }
mkdir -p root/bin root/dev; cp $(command -v busybox) root/bin/busybox
table "label: dos" "start=2048,size=4096" | sfdisk -q disk
write() { printf $1 | dd of=disk bs=512 seek=$2 conv=notrunc 2>/dev/null; }
write disk 0; write part 2048
mount --bind /dev root/dev
bind -P; until_it_has $dev disk; until_it_has ${dev}p1 part
report "types" within stat -Lc %F $dev ${dev}p1; cat said
report "size" within blockdev --getsize64 $dev; cat said
report "a partition" within head -c 4 ${dev}p1; cat said; echo
report "is written" within dd if=/dev/zero of=${dev}p1 bs=512 count=1 conv=fsync
report "other nodes" within stat -c "%F %t:%T %a" /dev/null /dev/zero /dev/urandom; cat said
report "are usable" within sh -c "echo > /dev/null && head -c 8 /dev/urandom | /bin/busybox wc -c"; cat said
within losetup -d $dev; echo "unbind: $?"
for i in {1..100}; do [ -n "$(losetup -j disk)" ] || break; sleep 0.05; done
write next 0
bind; until_it_has $dev next
report "another file" within head -c 4 $dev; cat said; echo
report "umount" umount root/dev
free; rm -rf root
"#;

/// A new devtmpfs on /dev of a root directory has the devices and mappings of the command.
const DEVTMPFS: &str = r#"
modprobe dm_mod; export DM_DISABLE_UDEV=1
within() { chroot root /bin/busybox "$@"; }
# Nodes follow their devices within milliseconds.
until_it_has() { local i; for i in {1..100}; do [ "$(head -c 4 root$1 2>/dev/null)" != $2 ] || break; sleep 0.05; done; }
mkdir -p root/bin root/dev; cp $(command -v busybox) root/bin/busybox
table "label: dos" "start=2048,size=4096" | sfdisk -q disk
printf part | dd of=disk bs=512 seek=2048 conv=notrunc 2>/dev/null
bind -P
report "mapping" dmsetup create built --table "0 4096 linear $dev 2048"
report "mount" mount -t devtmpfs -o mode=0755,nosuid udev root/dev
report "its type" stat -fc %T root/dev; cat said
report "mapping, within" within head -c 4 /dev/mapper/built; cat said; echo
until_it_has ${dev}p1 part
report "partition, within" within head -c 4 ${dev}p1; cat said; echo
report "other nodes" within stat -c "%F %t:%T %a" /dev/null /dev/zero /dev/urandom; cat said
report "devpts" mount -t devpts devpts root/dev/pts
report "umount, in use" umount root/dev
report "umount" umount root/dev/pts root/dev
ls root/dev
report "a new mapping" dmsetup create another --table "0 4096 linear $dev 2048"
report "mount, within" within mount -t devtmpfs devtmpfs /dev
report "both, within" within head -qc 4 /dev/mapper/built /dev/mapper/another; cat said; echo
report "umount" umount root/dev
report "in another namespace" unshare -m sh -c "mount -t devtmpfs udev root/dev && head -c 4 root/dev/mapper/built"
grep -c part said; ls root/dev
report "no such directory" mount -t devtmpfs udev root/nothing
report "no directory" mount -t devtmpfs udev root/bin/busybox
dmsetup remove built; dmsetup remove another
free; rm -rf root
"#;

/// With kpartx, and LVM within.
const VMDB2: &str = r#"
modprobe dm_mod; export DM_DISABLE_UDEV=1
export LVM_SUPPRESS_FD_WARNINGS=1 LVM_SYSTEM_DIR=$PWD/lvm; mkdir -p lvm/backup lvm/archive lvm/cache; : > lvm/lvm.conf
cat > spec <<'END'
steps:
  - mkimg: "{{ output }}"
    size: 192M
  - mklabel: gpt
    device: "{{ output }}"
  - mkpart: primary
    device: "{{ output }}"
    start: 1M
    end: 65M
    tag: boot
  - mkpart: primary
    device: "{{ output }}"
    start: 65M
    end: 100%
    tag: pv
  - kpartx: "{{ output }}"
  - vgcreate: built
    physical:
      - pv
  - lvcreate: built
    name: rootlv
    size: 64M
  - mkfs: ext4
    partition: rootlv
  - mkfs: vfat
    partition: boot
  - mount: rootlv
    zerofree: false
  - mount: boot
    mount-on: rootlv
    dirname: /boot
    zerofree: false
  - create-file: /boot/hello
    contents: "built\n"
  - create-file: /hello
    contents: "by vmdb2\n"
END
rm -f disk
vmdb2 --output $PWD/disk --log log spec > said 2>&1 || wrong "vmdb2: $(tail -n 5 said log)"
losetup -a; ls /dev/mapper
bind -P
report "found" lvm pvs --noheadings -o vg_name; cat said
report "activated" lvm vgchange -ay built
mkdir -p mnt; mount /dev/built/rootlv mnt; cat mnt/hello; umount mnt
mount ${dev}p1 mnt; cat mnt/hello; umount mnt
report "deactivated" lvm vgchange -an built
free; rm -rf lvm spec log
"#;
