// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unmodified tools add, change and remove partitions of a bound device: the same script prints the
//! same lines on the kernel's driver and in a pool.

use std::time::Duration;

use super::private_driver::Driver;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    let tools = |name: &str, script: &'static str| {
        case(format!("private::partitions::{name}"), Needs::Private, 580, move |ctx| same(ctx, script))
    };
    vec![
        tools("sfdisk", SFDISK),
        tools("partx", PARTX),
        tools("sgdisk", SGDISK),
        tools("parted", PARTED),
        tools("grown", GROWN),
        tools("tables", TABLES),
        tools("many", MANY),
        tools("block_size", BLOCK_SIZE),
        case("private::partitions::plain_user", Needs::Private, 300, plain_user),
    ]
}

const SCRIPT: Duration = Duration::from_secs(250);

/// Shell functions that print one line per step, the same on both drivers.
pub(super) const REPORT: &str = r#"
truncate -s 64M disk; dev=
report() { local what=$1; shift; "$@" > said 2>&1; echo "$what: status $?: $(shown)"; }
shown() {
    local p
    for p in $(ls -d ${dev}p* 2>/dev/null | sort -V); do echo -n "${p#$dev} $(blockdev --getsize64 $p) "; done
    echo -n "[$(lsblk -nro NAME,SIZE,TYPE $dev 2>&1 | sed "s,^${dev#/dev/},," | sort -V | tr '\n' ';')]"
}
bind() { dev=$(losetup -f --show "$@" disk); }
free() { losetup -d $dev; for i in {1..100}; do [ -n "$(losetup -j disk)" ] || break; sleep 0.05; done; }
table() { printf '%s\n' "$@"; }
"#;

/// Partitions stay when the block size of their device changes.
const BLOCK_SIZE: &str = r#"
table "label: dos" "start=2048,size=4096" "size=8192" | sfdisk -q disk
bind -P
printf hello | dd of=${dev}p1 conv=notrunc 2>/dev/null
for size in 4096 512; do
    report "blocks of $size" losetup -b $size $dev
    echo "bytes: $(head -c 5 ${dev}p1)"; echo "blocks: $(blockdev --getss $dev ${dev}p1 | xargs)"
done
exec 7<${dev}p2; report "while a partition is open" losetup -b 1024 $dev; exec 7<&-
report "read again" blockdev --rereadpt $dev
free
"#;

pub(super) const SFDISK: &str = r#"
write() { table "$@" | sfdisk $options $dev; }
for how in "" -P; do
    options=; bind $how; echo "with '$how'"
    report "MBR" write "label: dos" "start=2048,size=4096" "size=8192"
    report "another" write "label: dos" "start=2048,size=8192" "size=4096" "size=2048"
    report "GPT" write "label: gpt" "start=2048,size=4096" "size=8192"
    options="--append"; report "append" write "size=4096"
    options="-N 2"; report "one is changed" write "size=4096"
    report "one is deleted" sfdisk --delete $dev 1
    exec 7<${dev}p2; options=; report "one is open" write "label: gpt" "start=4096,size=8192"; exec 7<&-
    report "read again" blockdev --rereadpt $dev
    report "nothing" wipefs -aq $dev
    report "read again, nothing" blockdev --rereadpt $dev
    free; rm disk; truncate -s 64M disk
done
bind -P; options=; write "label: dos" "start=2048,size=32768" "size=8192" >/dev/null 2>&1
mkfs.ext4 -q ${dev}p1; mkdir -p mnt; mount ${dev}p1 mnt; echo hello > mnt/file
report "while one is mounted" write "label: dos" "start=4096,size=4096"
report "while one is mounted, read again" blockdev --rereadpt $dev
report "the other one is taken away" partx -d --nr 2 $dev
report "the mounted one is not" partx -d --nr 1 $dev
options="--no-reread --force"; report "by force" write "label: dos" "start=2048,size=32768" "size=16384"
report "update" partx -u $dev
echo "file: $(cat mnt/file)"; umount mnt
report "unmounted, read again" blockdev --rereadpt $dev
free; bind
mkfs.ext4 -qF $dev; mount $dev mnt
report "while all is mounted" sfdisk $dev < /dev/null
options=; report "while all is mounted, a table" write "label: dos" "start=2048,size=4096"
umount mnt; free
"#;

const PARTX: &str = r#"
table "label: dos" "start=2048,size=4096" "size=8192" "size=65536,type=5" "size=2048" "size=4096" | sfdisk -q disk
bind
report "none was asked for" true
report "all" partx -a $dev
report "again" partx -a $dev
report "logical ones go" partx -d --nr 5:6 $dev
report "one comes" partx -a --nr 6 $dev
report "update" partx -u $dev
report "delpart" delpart $dev 2
report "delpart again" delpart $dev 2
report "addpart" addpart $dev 2 6144 4096
report "addpart over others" addpart $dev 9 2048 64
report "resizepart" resizepart $dev 2 8192
report "resizepart too far" resizepart $dev 2 1000000
report "list" partx -o NR,START,END,SECTORS,SIZE -g --show $dev
cat said
report "all go" partx -d $dev
free
"#;

pub(super) const SGDISK: &str = r#"
for how in "" -P; do
    bind $how; echo "with '$how'"
    report "new" sgdisk -o -n 1:2048:+4M -n 2:0:+8M $dev
    report "more" sgdisk -n 0:0:+1M $dev
    report "hybrid" sgdisk -h 1:2 $dev
    report "less" sgdisk -d 2 $dev
    report "partprobe" partprobe $dev
    report "zapped" sgdisk -Z $dev
    report "partprobe, nothing" partprobe $dev
    free; rm disk; truncate -s 64M disk
done
"#;

pub(super) const PARTED: &str = r#"
for how in "" -P; do
    bind $how; echo "with '$how'"
    report "label" parted -s $dev mklabel gpt
    report "first" parted -s $dev mkpart one ext4 1MiB 9MiB
    report "second" parted -s $dev mkpart two ext4 9MiB 17MiB
    report "resized" parted -s $dev resizepart 2 33MiB
    mkfs.ext4 -q ${dev}p1; mkdir -p mnt; mount ${dev}p1 mnt
    report "third, while the first is mounted" parted -s $dev mkpart three ext4 40MiB 48MiB
    report "removed" parted -s $dev rm 2
    umount mnt
    report "partprobe" partprobe $dev
    report "print" parted -sm $dev unit s print
    grep -v "^/dev" said
    free; rm disk; truncate -s 64M disk
done
"#;

pub(super) const GROWN: &str = r#"
table "label: gpt" "start=2048,size=4096" "size=65536" | sfdisk -q disk
bind -P; report "bound" true
mkfs.ext4 -q ${dev}p2; mkdir -p mnt; mount ${dev}p2 mnt; echo hello > mnt/file
truncate -s 160M disk; losetup -c $dev
report "the device" blockdev --getsize64 $dev; cat said
report "growpart" growpart $dev 2
report "sfdisk -N" sh -c "echo ', +' | sfdisk --no-reread --force -N 2 $dev"
report "partx -u" partx -u $dev
report "resize2fs" resize2fs ${dev}p2
echo "blocks: $(stat -f -c %b mnt), $(cat mnt/file)"
umount mnt; e2fsck -fn ${dev}p2 >/dev/null 2>&1; echo "e2fsck: $?"
free
"#;

pub(super) const TABLES: &str = r#"
for block in 512 4096; do
    rm -f disk; truncate -s 64M disk; bind -P -b $block; echo "blocks of $block"
    report "gpt" sh -c "printf 'label: gpt\nsize=4M\nsize=8M\n' | sfdisk $dev"
    report "dos with logical ones" sh -c "printf 'label: dos\nsize=4M\nsize=40M,type=5\nsize=4M\nsize=8M\n' | sfdisk $dev"
    free
done
rm -f disk; truncate -s 32M disk; printf 'label: gpt\nsize=4M\nsize=8M\n' | sfdisk -q disk
truncate -s 64M disk; bind -P
report "backup header not at the end" true
dd if=/dev/zero of=$dev bs=512 count=2 conv=fsync,notrunc 2>/dev/null
report "no primary header, no backup" blockdev --rereadpt $dev
free
"#;

const MANY: &str = r#"
truncate -s 300M disk
{ echo "label: gpt"; for i in {1..128}; do echo "size=2M"; done; } | sfdisk -q disk
bind -P; ls -d ${dev}p* | wc -l
for i in 1 64 128; do echo "$(cat /sys/class/block/${dev#/dev/}p$i/start) $(blockdev --getsize64 ${dev}p$i)"; done
sfdisk -q --delete $dev 64; ls -d ${dev}p* | wc -l
echo "start=$((2048 + 63 * 4096)),size=2048" | sfdisk -q --append $dev; blockdev --getsize64 ${dev}p64
free; echo "left: $(ls -d ${dev}p* 2>/dev/null | wc -l)"
"#;

/// Checks that a script prints the same lines on the kernel's driver and in a pool.
pub(super) fn same(ctx: &Ctx, script: &str) -> Res {
    let script = format!("{REPORT}\n{script}");
    let dir = ctx.dir.display().to_string();
    let clean = || tools::sh(format!("cd {dir} && rm -rf disk said mnt"));
    let driver = Driver::load()?;
    let daemon = Daemon::start(ctx)?;
    let theirs = Inside::new(ctx, &daemon).plain().run_for(SCRIPT, &script)?;
    driver.unload()?;
    clean()?;
    let ours = Inside::new(ctx, &daemon).run_for(SCRIPT, &format!("{script}\n{NOTHING_OUTSIDE}"))?;
    clean()?;
    compare(ctx, &theirs, &ours)?;
    daemon.stop()
}

/// Checks that both have the same lines, except for known differences.
pub(super) fn compare(ctx: &Ctx, theirs: &str, ours: &str) -> Res {
    ensure!(!theirs.contains("status 127"), "a tool is not installed: {theirs}");
    let mut wrong = 0;
    for (theirs, ours) in theirs.lines().zip(ours.lines()) {
        let known = KNOWN.contains(&(theirs, ours));
        if theirs != ours && !known {
            wrong += 1;
            eprintln!("  kernel: {theirs}\n  ours:   {ours}");
        }
    }
    let lines = (theirs.lines().count(), ours.lines().count());
    ensure!(wrong == 0 && lines.0 == lines.1, "{wrong} lines differ, of {lines:?}");
    ctx.note(format!("{} lines", lines.1));
    Ok(())
}

/// Known differences: the kernel's line, and ours. A partition is a disk of its own, so a mounted
/// partition does not block an O_EXCL open of the device.
const KNOWN: [(&str, &str); 1] = [(
    "while one is mounted: status 1: p1 16777216 p2 4194304 [p1 16M part;p2 4M part; 64M loop;]",
    "while one is mounted: status 0: p1 16777216 p2 4194304 [p1 16M part;p2 4M part; 64M loop;]",
)];

/// Only the tenant sees the partitions of its devices.
const NOTHING_OUTSIDE: &str = r#"same "partitions of private disks on the machine" "$(grep -cE '(ublkb|loop5)[0-9]*p' /proc/partitions)" 0"#;

/// The same tools for a user, who is root in a namespace only.
fn plain_user(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    tools::ok(&["chown", "1000:1000", &ctx.dir.display().to_string()])?;
    let script = format!(
        "{REPORT}\n{}\n{NOTHING_OUTSIDE}",
        r#"
        bind -P
        table "label: gpt" "start=2048,size=4096" "size=8192" | sfdisk -q $dev
        same "sfdisk" "$(echo ${dev}p*)" "${dev}p1 ${dev}p2"
        works "mkfs" mkfs.ext4 -q ${dev}p2
        works "sgdisk" sgdisk -n 0:0:+1M $dev
        same "sgdisk, nodes" "$(echo ${dev}p*)" "${dev}p1 ${dev}p2 ${dev}p3"
        works "delpart" delpart $dev 1
        same "delpart, nodes" "$(echo ${dev}p*)" "${dev}p2 ${dev}p3"
        works "resizepart" resizepart $dev 2 4096
        same "resizepart, size" "$(size ${dev}p2)" 2097152
        same "owner" "$(stat -Lc %u ${dev}p2)" "$(id -u)"
        works "flush" blockdev --flushbufs $dev ${dev}p2
        works "block size of the cache" blockdev --setbsz 1024 ${dev}p2
        refused "not a power of two" "Invalid argument" blockdev --setbsz 1000 $dev
        free
        truncate -s 320M xfs; dev=$(losetup -f --show xfs)
        works "mkfs.xfs" mkfs.xfs -q $dev
        same "xfs" "$(blkid -p -o value -s TYPE $dev)" xfs
        losetup -d $dev
        "#
    );
    Inside::new(ctx, &daemon).user(1000).run(&script)?;
    daemon.stop()
}
