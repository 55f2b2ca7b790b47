// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attributes of a device below /sys: the same script prints the same lines on the kernel's driver
//! and in a pool.

use super::private_partitions::same;
use crate::harness::{Case, Needs, case};

pub(super) fn cases() -> Vec<Case> {
    let tools = |name: &str, script: &'static str| {
        case(format!("private::sysfs::{name}"), Needs::Private, 580, move |ctx| same(ctx, script))
    };
    vec![tools("names", NAMES), tools("tools", TOOLS), tools("dissect", DISSECT)]
}

/// The names, and the contents of those that do not depend on the disk. Excluded: `mq` has a
/// directory per queue, `trace` depends on the kernel's configuration, and only disks with requests
/// have an `io_timeout`.
const NAMES: &str = r#"
table "label: gpt" "start=2048,size=4096,name=first" "size=8192" | sfdisk -q disk
top=$PWD
# libudev follows no symlink to a node, so DEVNAME is the path in the pool's file system.
uevent() { sed "s/=[0-9][0-9]*$/=N/; s,DEVNAME=loopfs/,DEVNAME=,; s/loop[0-9]*/loopN/; /PARTUUID/d; /PARTNAME/d" uevent; }
names() { (cd $1 && find -L . -maxdepth 2 -not -path './mq/*' -not -path './subsystem/*' -not -path './bdi/*' \
    -not -path './holders/*' -not -path './trace/*' -not -name io_timeout -printf '%P\n' | sed "s/${dev#/dev/}/loopN/g" | sort); }
texts() { local f; for f; do echo "$f: $(tr '\n' ' ' < $f)"; done; }
for how in "" "-P" "-P -r"; do
    bind $how; echo "with '$how'"
    cd /sys/block/${dev#/dev/}
    names .
    texts size ro removable range ext_range hidden capability partscan events events_async events_poll_msecs
    texts alignment_offset discard_alignment queue/{logical_block_size,hw_sector_size,rotational,zoned,dax,add_random}
    readlink subsystem | sed 's,.*/,,'
    uevent
    same "uevent has the number of the disk" "$(sed -n s/DISKSEQ=//p uevent)" "$(cat diskseq)"
    dd if=$dev of=/dev/null bs=64K count=4 iflag=direct 2>/dev/null
    echo "stat: $(wc -w < stat) words, inflight: $(wc -w < inflight); $(($(cut -c1-9 stat) > 0))"
    if [ -d ${dev#/dev/}p2 ]; then
        cd ${dev#/dev/}p2; names .; texts size start partition ro
        uevent
        readlink subsystem | sed 's,.*/,,'
    fi
    cd $top; free
done
"#;

const TOOLS: &str = r#"
table "label: gpt" "start=2048,size=32768,name=first" "size=16384" | sfdisk -q disk
bind -P
mkfs.ext4 -q -L root ${dev}p1; mkdir -p mnt; mount ${dev}p1 mnt
columns=NAME,FSTYPE,LABEL,PTTYPE,PARTTYPENAME,PARTLABEL,PARTN,RO,RM,SIZE,START,TYPE,LOG-SEC,PHY-SEC,ROTA,ZONED
lsblk -nro $columns $dev | sed "s/loop[0-9]*/loopN/"
echo "keys: $(lsblk -OJ $dev | jq -r '.blockdevices[0] | keys[]' | tr '\n' ' ')"
lsblk -OJ $dev | jq -c '.blockdevices[0] | [.ro, .size, .type, .subsystems, .["disk-seq"] != null, .["disc-max"] != "0B"]'
lsblk -nDo DISC-GRAN,DISC-ZERO $dev
blkid -p -o udev ${dev}p1 | grep -v UUID | sed "s/=[0-9]*:[0-9]*$/=M:m/"
blkid -p -o udev $dev | grep -v UUID
echo "trimmed by -A: $(fstrim -A --listed-in /proc/self/mountinfo -v 2>/dev/null | grep -c mnt)"
umount mnt; free
"#;

const DISSECT: &str = r#"
table "label: gpt" "size=16M,type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709,name=root" "size=8M,type=linux" | sfdisk -q disk
bind -P; mkfs.ext4 -q -L root ${dev}p1
mkdir -p mnt; mount ${dev}p1 mnt; mkdir -p mnt/{etc,usr,proc,sys,dev,run,tmp}
echo 'ID=trial' > mnt/etc/os-release; echo hello > mnt/file; umount mnt; free
report "table" systemd-dissect disk; grep -E "Size|root|linux" said | sed 's/[0-9a-f]*-[0-9a-f-]*//; s,/dev/\(loopfs/\)*loop[0-9]*,loopN,'
report "mount" systemd-dissect --mount disk mnt; echo "file: $(cat mnt/file)"
report "umount" systemd-dissect --umount mnt
# lsblk might see the device, which is removed a moment later: no `report`.
systemd-dissect --copy-from disk /file copied; echo "copied: status $?, $(cat copied)"; rm copied
for i in {1..100}; do [ -n "$(losetup -j disk)" ] || break; sleep 0.05; done
echo "left: $(losetup -j disk | wc -l)"
"#;
