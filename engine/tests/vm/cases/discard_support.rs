// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Discards are offered where the image's file system can free blocks, and nowhere else.
//!
//! The block layer reports success for an EOPNOTSUPP of the disk: only a limit of 0 makes it refuse
//! discards.

use super::MIB;
use super::private_script::Inside;
use crate::daemon::{self, Daemon};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::store::{Disk, Mount, Shape};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("discard_support::instance", Needs::Ublk, 180, instance),
        case("private::discard_support", Needs::Private, 240, pool),
    ]
}

/// One file system of each kind with a 16 MiB image, and whether it supports holes.
fn stores(ctx: &Ctx) -> Res<Vec<(&'static str, bool, Mount, Disk)>> {
    let mut stores = Vec::new();
    for (kind, holes, mkfs) in [
        ("vfat", false, &["mkfs.vfat"][..]),
        ("ext4", true, &["mkfs.ext4", "-q", "-F"]),
        ("xfs", true, &["mkfs.xfs", "-q", "-f"]),
    ] {
        let disk = Disk::new(&Shape { size_mib: 400, ..Shape::default() })?;
        tools::ok(&[mkfs, &[&disk.node()]].concat())?;
        let mount = Mount::new(&disk.node(), &ctx.path(kind), &[])?;
        let image = format!("{}/image", mount.dir);
        std::fs::File::create(&image).and_then(|file| file.set_len(16 * MIB)).at(&image)?;
        stores.push((kind, holes, mount, disk));
    }
    Ok(stores)
}

fn instance(ctx: &Ctx) -> Res {
    let stores = stores(ctx)?;
    let daemon = Daemon::start(ctx)?;
    for (kind, holes, mount, _) in &stores {
        let image = format!("{}/image", mount.dir);
        for (words, expected) in [(&[&*image][..], *holes), (&[&image, "--read-only"], false)] {
            let device = daemon.attach(words)?;
            let most = daemon::queue_attribute(&device, "discard_max_bytes")?;
            ensure!((most.trim() != "0") == expected, "{kind}: {words:?}: discard_max_bytes is {most}");
            let done = tools::run(&["blkdiscard", "--force", &device])?;
            ensure!((done.code == 0) == expected, "{kind}: {words:?}: {done:?}");
            daemon.detach(&device)?;
        }
    }
    daemon.stop()
}

/// Each loopN reports the discard support of its current file, not of the previous one.
fn pool(ctx: &Ctx) -> Res {
    let stores = stores(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        truncate -s 16M here
        said="Operation not supported"
        for dir in ext4 vfat xfs vfat . ext4; do
            image=$dir/image; [ $dir = . ] && image=here
            dev=$(losetup -f --show $image)
            same "always the first" $dev /dev/loop0
            dd if=/dev/urandom of=$dev bs=1M count=8 conv=fsync status=none
            before=$(stat -c %b $image)
            case $dir in
            vfat) refused "discard on $dir" "$said" blkdiscard -f $dev ;;
            *) works "discard on $dir" blkdiscard -f $dev
               [ $(stat -c %b $image) -lt $before ] || wrong "$dir: nothing was freed" ;;
            esac
            works "zeroes on $dir" blkdiscard -z -f $dev
            same "zeroes on $dir" "$(cmp $dev /dev/zero 2>&1 | grep -c EOF)" 1
            losetup -d $dev
            soon "unbound" "" losetup -a
        done

        printf 'start=2048, type=83\n' | sfdisk -q vfat/image 2>/dev/null
        dev=$(losetup -f -P --show vfat/image)
        soon "a partition" "${dev}p1" ls ${dev}p1
        refused "discard of a partition on vfat" "$said" blkdiscard -f ${dev}p1
        losetup -d $dev

        mkfs.ext4 -q -F vfat/image; mkdir mnt
        works "a mount" mount -o loop vfat/image mnt
        refused "fstrim on vfat" "discard operation is not supported" fstrim mnt
        works "its end" umount mnt
        "#;
    Inside::new(ctx, &daemon).run(script)?;
    drop(stores);
    daemon.stop()
}
