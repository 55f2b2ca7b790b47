// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Isolation: every access to a neighbour's private device fails, also after another device has got
//! its number. Images are harmless to a plain user who mounts them.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::MIB;
use super::private_script::{Inside, Script};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::tools::{self, Running};

/// Until the kernel reuses the number of a removed disk.
const NUMBER_FREED: Duration = Duration::from_secs(1);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_isolation::stale_references_fail", Needs::Private, 120, kept_references_fail),
        case("private_isolation::root", Needs::Private, 120, root),
        case("private_isolation::user", Needs::Private, 120, user),
        case("private_isolation::nodes_have_no_effect", Needs::Private, 120, nodes_have_no_effect),
        case("private_isolation::refused", Needs::Private, 120, refused),
        case(
            "private_isolation::damaged_images_do_not_panic",
            Needs::Private,
            120,
            damaged_images_do_not_panic,
        ),
        case("private_isolation::loop_control_is_no_image", Needs::Private, 120, loop_control_is_no_image),
    ]
}

/// A tenant whose /dev/loop0 has an image that starts with the tenant's name.
fn tenant(inside: &Inside<'_>, name: &str) -> Res<Script> {
    let script = format!(
        "me={name}\n{}",
        r#"
        image $me 1M "$me"; same "device" "$(losetup -f --show $me)" /dev/loop0
        echo $$ > $me.pid; pause $me
        same "still its own" "$(head_of /dev/loop0)" "$me"
        same "still its own, below" "$(head_of $me)" "$me"
        "#
    );
    inside.start(&script)?.wait(name)
}

fn open_to_all(ctx: &Ctx) -> Res {
    std::fs::set_permissions(&ctx.dir, std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    // As udev does; this machine has none.
    std::fs::set_permissions("/dev/fuse", std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    Ok(())
}

/// A tenant's /dev/loopfs, as root of the machine reaches it.
fn directory(ctx: &Ctx, name: &str) -> Res<String> {
    let pid = std::fs::read_to_string(ctx.path(&format!("{name}.pid")))?;
    Ok(format!("/proc/{}/root/dev/loopfs", pid.trim()))
}

/// All references to a device that a process can keep.
struct Kept {
    rdev: u64,
    path: OwnedFd,
    /// While it is open, the kernel does not reuse its number.
    open: Option<File>,
    bind: String,
    _holder: Running,
}

impl Kept {
    fn of(ctx: &Ctx, name: &str, node: &str) -> Res<Kept> {
        let path = rustix::fs::open(node, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at(node)?;
        let (bind, pid_file) = (ctx.path(&format!("{name}.bind")), ctx.path(&format!("{name}.holder")));
        std::fs::write(&bind, "").at(&bind)?;
        // A mount can be bound only in its own namespace; a copy of the namespace keeps it.
        let script =
            format!("mount --bind /dev/loopfs/loop0 {bind} && echo $$ > {pid_file} && exec sleep 1000");
        let pid = std::fs::read_to_string(ctx.path(&format!("{name}.pid")))?;
        let mut command = Command::new("nsenter");
        command.args(["-m", "-t", pid.trim(), "unshare", "-m", "bash", "-c", &script]);
        let holder = Running::start(command)?;
        let pid = tools::until(Duration::from_secs(20), || {
            std::fs::read_to_string(&pid_file).ok().filter(|text| text.ends_with('\n'))
        });
        let bind = format!("/proc/{}/root{bind}", pid.ok_or("no bind mount")?.trim());
        ensure!(File::open(&bind).is_ok(), "{bind} cannot be opened");
        let mut open = File::open(node).at(node)?;
        let mut first = [0; 16];
        open.read_exact(&mut first)?;
        ensure!(first.starts_with(name.as_bytes()), "{node} begins with {first:?}");
        let rdev = rustix::fs::fstat(&path)?.st_rdev;
        Ok(Kept { rdev, path, open: Some(open), bind, _holder: holder })
    }

    /// Checks that no reference gives access any more. Closes the open file.
    fn check(&mut self, when: &str) -> Res {
        for link in [format!("/proc/self/fd/{}", self.path.as_raw_fd()), self.bind.clone()] {
            match File::open(&link) {
                Err(_) => {}
                Ok(_) => fail!("{when}: {link} can be opened"),
            }
        }
        let mut bytes = [0; 4096];
        let Some(open) = self.open.take() else { return Ok(()) };
        for at in [0, 512 << 10] {
            // Cached data may be returned; new data may not.
            let read = rustix::io::pread(&open, &mut bytes, at);
            ensure!(!read.is_ok_and(|len| len > 0), "{when}: {read:?} bytes at {at}: {:?}", &bytes[..16]);
        }
        Ok(())
    }
}

/// A pool's loop-control is refused as an image, though it is a regular file: a device on it would
/// keep the pool.
fn loop_control_is_no_image(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let other = ctx.path("other");
    std::fs::create_dir(&other).at(&other)?;
    daemon.ok(&["instance", "mount", "--name", "other", &other])?;
    Inside::new(ctx, &daemon).run(
        r#"
        for pool in other /dev/loopfs; do
            refused "$pool" "Invalid argument" losetup -f --show $pool/loop-control
        done
        image a 1M; dev=$(losetup -r -f --show a)
        same "only that is bound" "$(losetup -n -O NAME)" $dev"#,
    )?;
    let refused = daemon.cli(&["attach", &format!("{other}/loop-control")])?;
    ensure!(refused.code != 0, "an instance accepts a pool's loop-control: {refused:?}");
    tools::ok(&["umount", &other])?;
    let gone = tools::until(Duration::from_secs(10), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "the other pool does not end");
    daemon.stop()
}

/// Kept names and descriptors give no access when the next tenant has the device number, nor after
/// the end of the daemon.
fn kept_references_fail(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let red = tenant(&Inside::new(ctx, &daemon), "red")?;
    let mut kept = Kept::of(ctx, "red", &format!("{}/loop0", directory(ctx, "red")?))?;
    let dir = directory(ctx, "red")?;
    let linked = tools::run(&["ln", &format!("{dir}/loop0"), &format!("{dir}/loop7")])?;
    ensure!(linked.code != 0, "a node has got a second name");
    red.kill();
    let gone = tools::until(Duration::from_secs(10), || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "red's devices are left");
    kept.check("red has ended")?;
    std::thread::sleep(NUMBER_FREED);

    let blue = tenant(&Inside::new(ctx, &daemon).user(1001), "blue")?;
    let mut kept_of_blue = Kept::of(ctx, "blue", &format!("{}/loop0", directory(ctx, "blue")?))?;
    ensure!(kept_of_blue.rdev == kept.rdev, "the number was not reused: the test proves nothing");
    kept.check("blue has its number")?;
    blue.resume("blue")?;
    // The daemon ends the tenant when it exits.
    daemon.sigterm()?;
    let _ = blue.finish();
    daemon.wait_drained()?;
    kept_of_blue.check("its daemon has ended")?;
    std::thread::sleep(NUMBER_FREED);
    daemon.restart()?;
    let green = tenant(&Inside::new(ctx, &daemon).user(1002), "green")?;
    let kept_of_green = Kept::of(ctx, "green", &format!("{}/loop0", directory(ctx, "green")?))?;
    ensure!(kept_of_green.rdev == kept.rdev, "the number was not reused: the test proves nothing");
    for (kept, when) in
        [(&mut kept, "red's, under another daemon"), (&mut kept_of_blue, "blue's, under another daemon")]
    {
        kept.check(when)?;
    }
    green.resume("green")?;
    green.finish()?;
    drop((kept, kept_of_blue, kept_of_green));
    daemon.stop()
}

/// Root, of the machine and of a user namespace, under the filter.
fn root(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let red = tenant(&Inside::new(ctx, &daemon), "red")?;
    let device = rustix::fs::stat(format!("{}/loop0", directory(ctx, "red")?))?.st_rdev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let id = *daemon.ublk_ids().first().ok_or("no disk")?;
    let pid = std::fs::read_to_string(ctx.path("red.pid"))?;
    let disk = if crate::BACKEND == "loop" { "loop" } else { "ublkb" };
    let known = format!("major={major} minor={minor} disk={disk}{id} red={}\n", pid.trim());
    let alike = r#"
        refused "mknod" "Operation not permitted" mknod node b $major $minor
        refused "mknod, in memory" "Operation not permitted" mknod /dev/shm/node b $major $minor
        same "no disk of others" "$(ls /dev | grep -E 'ublk|loop5[0-9]'; find /dev -maxdepth 1 -name 'loop[0-9]*' ! -type l)" ""
        same "nor in /sys/block" "$(ls /sys/block | grep -E 'ublk|loop5[0-9]')" ""
        works "a pipe can be made" mknod pipe p; rm -f pipe
    "#;
    Inside::new(ctx, &daemon).run(&format!("{known}{alike}"))?;
    let denied = r#"
        refused "its root" "" head -c 16 /proc/$red/root/dev/loopfs/loop0
        refused "the machine's /dev" "" head -c 16 /proc/1/root/dev/$disk
        refused "another /dev" "" mount -t devtmpfs dev /mnt
        mkdir -p under; mount --rbind / under 2>/dev/null; refused "below /dev" "" head -c 16 under/dev/$disk
    "#;
    let other =
        r#"umount -l /dev 2>/dev/null; refused "the machine's /dev, uncovered" "" head -c 16 /dev/$disk"#;
    // Root of this namespace is root outside and may read the disk if it uncovers /dev: no `other`.
    Inside::new(ctx, &daemon).with(&["--user"]).run(&format!("{known}{alike}{denied}"))?;
    Inside::new(ctx, &daemon).user(1001).run(&format!("{known}{alike}{denied}{other}"))?;
    red.resume("red")?;
    red.finish()?;
    daemon.stop()
}

/// A plain user, without a filter, against root's pools and another user's.
fn user(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let dir = ctx.path("pool");
    std::fs::create_dir(&dir).at(&dir)?;
    daemon.ok(&["instance", "mount", "--name", "open", &dir])?;
    let image = ctx.path("image");
    std::fs::write(&image, [7; 1 << 20]).at(&image)?;
    daemon.ok(&["losetup", "-f", &image])?;
    let red = tenant(&Inside::new(ctx, &daemon), "red")?;
    let blue = tenant(&Inside::new(ctx, &daemon).user(1000), "blue")?;
    let ids = daemon.ublk_ids();
    let of_loop = crate::BACKEND == "loop";
    let node = |id: &u32| if of_loop { format!("/dev/loop{id}") } else { format!("/dev/ublkb{id}") };
    let number = |id: &u32| Ok::<_, crate::harness::Stop>(rustix::fs::stat(node(id))?.st_rdev);
    let mut script = format!("dir={dir}; program={}\n", ctx.host.program);
    for id in &ids {
        let rdev = number(id)?;
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        script += &format!(
            "refused 'disk {id}' 'Permission denied' head -c 16 {}
            refused 'mknod' 'Operation not permitted' mknod node b {major} {minor}
            refused 'mknod as root of a namespace' '' unshare -Ur mknod node b {major} {minor}\n",
            node(id)
        );
        if !of_loop {
            script += &format!("refused 'its control' 'Permission denied' head -c 16 /dev/ublkc{id}\n");
        }
    }
    for name in ["red", "blue"] {
        let node = format!("{}/loop0", directory(ctx, name)?);
        script += &format!("refused '{name} by its root' 'Permission denied' head -c 16 {node}\n");
    }
    script += r#"
        refused "a visible node" "Permission denied" head -c 16 $dir/loop0
        refused "for writing" "Permission denied" dd if=/dev/zero of=$dir/loop0 bs=512 count=1
        refused "loop-control" "Permission denied" head -c 1 $dir/loop-control
        refused "a hard link" "" ln $dir/loop0 link
        refused "remove it" "" rm -f $dir/loop0
        refused "as root of a namespace" "" unshare -Ur head -c 16 $dir/loop0
        : > bound; refused "a bind mount" "" unshare -Urm bash -c "mount --bind $dir/loop0 bound && head -c 16 bound"
        for pool in open red 1000.3; do
            refused "by name: $pool" "" $program losetup --pool $pool -a
        done
    "#;
    let command = format!(
        "{}\ncd {} || exit 1\n{script}\nexit $bad\n",
        super::private_script::WORDS,
        ctx.dir.display()
    );
    let mut other = daemon.command_of("setpriv");
    other.args(["--reuid", "1001", "--regid", "1001", "--clear-groups", "--", "bash", "-c", &command]);
    let done = Running::start(other)?.finish(Duration::from_secs(60))?;
    ensure!(done.code == 0, "{}", done.err);
    for (script, name) in [(red, "red"), (blue, "blue")] {
        script.resume(name)?;
        script.finish()?;
    }
    tools::ok(&["umount", &dir])?;
    daemon.stop()
}

/// An ext4 image with the files that `fill` creates in $PWD.
fn file_system(ctx: &Ctx, name: &str, fill: &str) -> Res<String> {
    let image = ctx.path(name);
    tools::sh(format!(
        "mkdir {image}.d; cd {image}.d; {fill}
        truncate -s {size} {image}; mkfs.ext4 -q -d {image}.d {image}; chmod 666 {image}",
        size = 16 * MIB
    ))?;
    Ok(image)
}

/// Set-uid programs and device nodes have no effect in an image that FUSE mounts.
fn nodes_have_no_effect(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let fill = "cp $(command -v busybox) id; chown 33:33 id; chmod 6755 id; mknod null c 1 3; mknod disk b 259 0; chmod 666 null disk; chmod 777 .";
    file_system(ctx, "fs", fill)?;
    let daemon = Daemon::start(ctx)?;
    let script = r#"
        mkdir mnt.$who; works "mount" mount -o loop -t ext4 fs mnt.$who
        holds "options" "$(grep mnt.$who /proc/mounts)" "nosuid,nodev"
        holds "type of file system" "$(grep mnt.$who /proc/mounts)" "fuse"
        holds "mode" "$(stat -c %a mnt.$who/id)" 6755
        same "effective user" "$(mnt.$who/id -u)" 0
        same "type of node" "$(stat -c %F mnt.$who/null)" "character special file"
        refused "a character device" "Permission denied" dd if=/dev/zero of=mnt.$who/null bs=1 count=1 conv=notrunc
        refused "a block device" "Permission denied" dd if=mnt.$who/disk of=/dev/null bs=512 count=1
        mount -o remount,dev mnt.$who 2>/dev/null
        refused "after remount,dev" "Permission denied" dd if=mnt.$who/disk of=/dev/null bs=512 count=1
        echo mine > mnt.$who/file; same "owner inside" "$(stat -c '%u %g' mnt.$who/file)" "0 0"
        works "umount" umount mnt.$who; soon "unbound" "" losetup -a
        works "whole" e2fsck -fn fs
    "#;
    Inside::new(ctx, &daemon).user(1000).run(&format!("who=user\n{script}"))?;
    Inside::new(ctx, &daemon).with(&["--user"]).run(&format!("who=root\n{script}"))?;
    daemon.stop()
}

/// Refused calls, and their errnos.
fn refused(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    file_system(ctx, "fs", "true")?;
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).user(1000).run(
        r#"
        mkdir mnt; losetup -r -f fs; losetup -f fs
        # errno TYPE OPTIONS [DEVICE [TARGET [FLAGS]]]: of mount(2) itself.
        errno() {
            perl -e 'my ($type, $data, $device, $target, $flags) = @ARGV; $flags += 0;
                print syscall(165, $device, $target, $type, $flags, $data) == 0 ? 0 : $! + 0' \
                "$1" "$2" "${3:-/dev/loop1}" "${4:-mnt}" "${5:-0}"
        }
        same "a type that is not listed" "$(errno xfs '')" 19
        same "another" "$(errno btrfs '')" 19
        # Its FUSE driver is read-only; mount(8) retries with ro.
        { type -P fusefat || type -P fusefatfs; } >/dev/null && same "a read-only driver" "$(errno vfat '')" 13
        holds "message of mount(8)" "$(mount -t xfs /dev/loop1 mnt 2>&1)" "unknown filesystem type"
        holds "no device" "$(mount /dev/loop99 mnt 2>&1)" "special device /dev/loop99 does not exist"
        holds "a device without a file" "$(mount /dev/loop2 mnt 2>&1)" "superblock on /dev/loop"
        for option in errors=panic errors=continue allow_other fakeroot dev suid user_id=0 fsname=x offset=512; do
            same "$option" "$(errno ext4 $option)" 22
            same "$option after another" "$(errno ext4 errors=remount-ro,$option)" 22
        done
        same "writable on a read-only device" "$(errno ext4 '' /dev/loop0)" 13
        same "no directory" "$(errno ext4 '' /dev/loop1 nowhere)" 2
        same "a file" "$(errno ext4 '' /dev/loop1 fs)" 20
        same "nothing mounted" "$(grep -c " $PWD/mnt " /proc/mounts)" 0
        same "an allowed option" "$(errno ext4 errors=remount-ro)" 0
        mkdir mnt2; same "mounted already" "$(errno ext4 '' /dev/loop1 mnt2)" 16
        works "umount" umount mnt
        "#,
    )?;
    daemon.stop()
}

/// Damaged file systems with errors=panic in their superblock do not panic the kernel.
fn damaged_images_do_not_panic(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let image = file_system(ctx, "fs", "echo hello > file; mkdir d; echo x > d/y")?;
    // Some of these edits may fail.
    let harm = r"set_inode_field /d mode 0100644\nset_inode_field /file block[0] 99999999\nclear_inode <2>\n";
    tools::sh(format!(
        "tune2fs -e panic {image} >/dev/null; cp {image} {image}.2; chmod 666 {image}.2
        printf '{harm}' | debugfs -w -f - {image} >/dev/null 2>&1 || true
        dd if=/dev/urandom of={image}.2 bs=4096 seek=1 count=200 conv=notrunc 2>/dev/null"
    ))?;
    for image in [image.clone(), format!("{image}.2")] {
        ensure!(tools::run(&["e2fsck", "-fn", &image])?.code >= 4, "{image} is not damaged");
    }
    let daemon = Daemon::start(ctx)?;
    Inside::new(ctx, &daemon).user(1000).run(
        r#"
        mkdir mnt
        for image in fs fs.2; do
            if mount -o loop -t ext4 $image mnt 2> said.$image; then
                ls -lR mnt > seen.$image 2>&1; cat mnt/file mnt/d/y > /dev/null 2>&1; echo x > mnt/new 2>/dev/null
                works "umount" umount mnt
            fi
            soon "unbound: $image" "" losetup -a
        done
        image other 1M other; losetup -f other; same "the pool works" "$(head_of /dev/loop0)" other
        "#,
    )?;
    daemon.stop()
}
