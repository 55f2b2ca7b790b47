// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine with systemd shuts down: file systems on devices are unmounted while the daemon still
//! serves.
//!
//! The machine runs in namespaces of this one, with an overlay as its root and with our kernel and
//! devices.

use std::time::Duration;

use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::store::Store;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![case("shutdown::under_systemd", Needs::Recovery("copy"), 900, machine)]
}

/// Steps on the machine: mounts from fstab and without, restarts of the daemon, power-off.
const DOES: &str = r#"
set -ex
exec >> /images/said 2>&1
trap 'systemctl --no-block --force poweroff' ERR
loopengine attach /images/net; loopengine attach /images/hand; loopengine attach /images/swap
mount /mnt/net; mount /run/loopengine/default/loop1 /mnt/hand; swapon /run/loopengine/default/loop2
mount -t tmpfs below /mnt/hand/below
before=$(loopengine list)
for round in 1 2; do
    for mount in net hand; do
        head -c 3000000 /dev/urandom > /mnt/$mount/file$round; echo $round >> /mnt/$mount/rounds
    done
    timeout 180 systemctl restart loopengine
    test "$(loopengine list)" = "$before"
    timeout 120 sh -c 'cat /mnt/net/file* /mnt/hand/file* | wc -c; sync'
done
(cd /mnt; sha256sum net/file* hand/file* > /images/sums)
grep -E 'ublkb' /proc/self/mountinfo
echo all done
systemctl --no-block poweroff
"#;

/// Sets the machine up, and becomes its first process, systemd.
const BOOTS: &str = r#"
set -e; exec &>> $IMAGES/said
mount --make-rprivate /; cd $S; mkdir -p up work root
mount -t overlay overlay -o lowerdir=/,upperdir=$S/up,workdir=$S/work root; cd root
mount --rbind /dev dev; mount -t sysfs x sys; mount -t proc x proc; mount -t cgroup2 x sys/fs/cgroup
mkdir images; mount --bind $IMAGES images
cp $PROGRAM usr/bin/loopengine
for dir in run tmp etc/systemd mnt; do mount -t tmpfs x $dir; done
mkdir -p mnt/net mnt/hand etc/systemd/system/multi-user.target.wants var/log/journal
cp $S/units/*.service etc/systemd/system/
ln -s ../loopengine.service ../does.service etc/systemd/system/multi-user.target.wants/
printf '[Journal]\nStorage=persistent\nSyncIntervalSec=1\n' > etc/systemd/journald.conf
for unit in getty.target dbus.socket dbus.service systemd-{udevd,udev-trigger,logind}.service; do
    ln -s /dev/null etc/systemd/system/$unit
done
echo '/run/loopengine/default/loop0 /mnt/net ext4 noauto,_netdev 0 0' > etc/fstab
echo 0123456789abcdef0123456789abcdef > etc/machine-id
mkdir -p old; pivot_root . old; umount -l old; /usr/bin/mount --make-rshared /
exec env -i PATH=/usr/sbin:/usr/bin container=lab /lib/systemd/systemd --unit=multi-user.target &>> /images/said
"#;

fn machine(ctx: &Ctx) -> Res {
    if !std::path::Path::new("/lib/systemd/systemd").exists() {
        skip!("systemd is not installed");
    }
    let store = Store::xfs(ctx)?;
    for name in ["net", "hand"] {
        let image = store.sparse(name, 64 << 20)?;
        // The kernel initializes the tables later: I/O that no process waits for.
        tools::sh(format!("mkfs.ext4 -q -F {image}; debugfs -w -R 'mkdir below' {image} 2>/dev/null"))?;
    }
    tools::ok(&["mkswap", "-q", &store.sparse("swap", 16 << 20)?])?;
    let scratch = ctx.path("machine");
    let units = format!("{scratch}/units");
    std::fs::create_dir_all(&units)?;
    let unit = include_str!("../../../share/systemd/loopengine.service");
    std::fs::write(format!("{units}/loopengine.service"), unit)?;
    std::fs::write(
        format!("{units}/does.service"),
        "[Unit]\nAfter=loopengine.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\nSuccessExitStatus=TERM\nExecStart=bash /images/does\n",
    )?;
    std::fs::write(store.path("does"), DOES)?;
    std::fs::write(store.path("boots"), BOOTS)?;
    // A control group for the machine.
    let script = format!(
        "mkdir -p {scratch}/groups; mount -t cgroup2 x {scratch}/groups; mkdir {scratch}/groups/machine
         echo $$ > {scratch}/groups/machine/cgroup.procs
         export S={scratch} IMAGES={images} PROGRAM={program}
         exec unshare --pid --mount --cgroup --uts --ipc --fork --kill-child bash {images}/boots",
        images = store.path("").trim_end_matches('/'),
        program = ctx.host.program,
    );
    let mut command = std::process::Command::new("bash");
    command.args(["-ec", &script]);
    let ended = tools::Running::start(command)?.finish(Duration::from_secs(800));
    let done = tools::sh(format!("umount {scratch}/groups || umount -l {scratch}/groups"));
    let said = std::fs::read_to_string(store.path("said")).unwrap_or_default();
    let journal =
        tools::run(&["journalctl", "--no-pager", "--directory", &format!("{scratch}/up/var/log/journal")])?
            .out;
    // The kernel's log has lines of earlier cases, too.
    let begins = format!("case {} begins", ctx.name);
    let journal = journal.rsplit_once(&begins).map_or(journal.as_str(), |(_, since)| since);
    let shown = || format!("it said:\n{said}\nits journal:\n{}", tools::tail(journal, 120));
    ended.at(shown())?;
    ensure!(said.trim_end().lines().any(|line| line == "all done"), "{}", shown());
    done?;
    for wrong in ["I/O error", "Failed", "still in use", "ERROR", "timed out", "EXT4-fs error"] {
        let lines: Vec<&str> = journal.lines().filter(|l| l.contains(wrong) && is_about_us(l)).collect();
        ensure!(lines.is_empty(), "{wrong:?} in {lines:?}; {}", shown());
    }
    let stopped = journal.lines().rposition_of("Stopped loopengine.service");
    let unmounted = journal.lines().rposition_of("Unmounted mnt-net.mount");
    ensure!(unmounted.is_some() && unmounted < stopped, "{unmounted:?}, {stopped:?}: {}", shown());
    for name in ["net", "hand"] {
        let image = store.path(name);
        let head = tools::ok(&["dumpe2fs", "-h", &image])?;
        let clean = head.contains("Filesystem state:         clean") && !head.contains("needs_recovery");
        ensure!(clean, "{name} was not unmounted: {head}\n{}", shown());
        tools::ok(&["e2fsck", "-fn", &image])?;
        let dir = ctx.path(name);
        tools::sh(format!(
            "mkdir {dir}; for i in 1 2; do debugfs -R \"dump /file$i {dir}/file$i\" {image} 2>/dev/null; done"
        ))?;
    }
    tools::sh(format!("cd {}; sha256sum -c {}", ctx.path(""), store.path("sums")))?;
    // The machine is off, but its devices wait in this kernel: a daemon detaches them.
    let next =
        format!("timeout 15 {} serve --run-dir /run/loopengine --detach-all || true", ctx.host.program);
    tools::sh(next).map(drop)
}

/// Whether a line of the journal is about this case: other services may fail in a namespace.
fn is_about_us(line: &str) -> bool {
    ["loopengine", "ublk", "mnt-", "/mnt", "does", "EXT4"].iter().any(|word| line.contains(word))
}

trait Lines {
    fn rposition_of(self, text: &str) -> Option<usize>;
}

impl<'a, I: Iterator<Item = &'a str>> Lines for I {
    /// The number of the last line with this text.
    fn rposition_of(self, text: &str) -> Option<usize> {
        self.enumerate().filter(|(_, line)| line.contains(text)).map(|(number, _)| number).last()
    }
}
