// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Containers with private loop devices, with unmodified runtimes and their default capabilities:
//! runc and crun, whichever is installed.

use std::path::Path;

use serde_json::{Value, json};

use super::private_bundle::{Bundle, CONTAINER, Pool, UNBOUND, any_runtime, end, image, unbound};
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_containers::crun", Needs::Private, 180, |ctx| chain(ctx, "crun")),
        case("private_containers::runc", Needs::Private, 180, |ctx| chain(ctx, "runc")),
        case("private_containers::two_containers", Needs::Private, 180, two),
        case("private_containers::partitions", Needs::Private, 180, partitions),
        case("private_containers::hook", Needs::Private, 60, hook),
        case("private_containers::restart", Needs::Private, 180, restart),
        case("private_containers::policy", Needs::Private, 180, policy),
    ]
}

/// Operations of a container on a loop device, and what the host sees of them.
fn chain(ctx: &Ctx, runtime: &'static str) -> Res {
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::new(ctx, &daemon, "ci", 2)?;
    let bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    bundle.run(
        r#"
        same "names" "$(readlink /dev/loop-control) $(readlink /dev/loop1)" "loopfs/loop-control loopfs/loop1"
        holds "caps" "$(grep CapEff /proc/self/status)" 0000000020000420
        same "user" "$(id -u)" 0
        same "nothing bound" "$(losetup -a)" ""
        same "-f" "$(losetup -f)" /dev/loop0
        truncate -s 16M a
        same "-f --show" "$(losetup -f --show a)" /dev/loop0
        holds "-a" "$(losetup -a)" "/dev/loop0: ["
        holds "-a" "$(losetup -a)" "(/work/a)"
        same "-l" "$(losetup -n -l -O NAME,BACK-FILE,RO --raw)" "/dev/loop0 /work/a 0"
        same "-j" "$(losetup -n -O NAME -j a)" /dev/loop0
        same "size" "$(size /dev/loop0)" 16777216
        works "mkfs" mkfs.ext4 -q /dev/loop0
        holds "blkid" "$(blkid -p /dev/loop0)" 'TYPE="ext4"'
        printf hello | dd of=/dev/loop0 conv=notrunc,fsync 2>/dev/null || wrong dd
        same "read" "$(head_of /dev/loop0 5)" hello
        truncate -s 17M a; works "-c" losetup -c /dev/loop0
        same "-c" "$(size /dev/loop0)" 17825792
        image b 1M beta
        same "the second" "$(losetup -r -f --show b)" /dev/loop1
        same "its bytes" "$(head_of /dev/loop1)" beta
        refused "read-only" "not permitted" dd if=/dev/zero of=/dev/loop1 bs=512 count=1
        refused "the third" "find an unused loop device" losetup -f
        works "-d" losetup -d /dev/loop1; soon "one left" "/dev/loop0 /work/a" bound
        # Rebind at once with other block sizes: the device numbers stay within the allowed ones.
        for round in 1 2 3; do
            works "-b 4096" losetup -b 4096 /dev/loop1 b; same "blocks" "$(blockdev --getss /dev/loop1)" 4096
            works "-d 4096" losetup -d /dev/loop1
            works "-b 512" losetup /dev/loop1 b; same "bytes" "$(head_of /dev/loop1)" beta
            works "-d 512" losetup -d /dev/loop1
        done
        works "-d" losetup -d /dev/loop0; soon "none" "" losetup -a
        "#,
    )?;
    unbound(&daemon, "ci")?;
    let bytes = std::fs::read(bundle.work("a")).at("the image")?;
    ensure!(bytes.starts_with(b"hello"), "the image does not begin with the written data");
    ensure!(bytes[0x438..0x43a] == [0x53, 0xef], "no ext4 in the image");
    pool.end(&daemon)?;
    daemon.stop()
}

/// Two concurrent containers, each with a /dev/loop0 on an image of its own; and sharing of a pool.
fn two(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pools = [Pool::new(ctx, &daemon, "red", 1)?, Pool::new(ctx, &daemon, "blue", 1)?];
    let script = r#"
        same "-f --show" "$(losetup -f --show a)" /dev/loop0
        same "own bytes" "$(head_of /dev/loop0)" "$NAME"
        pause both
        same "still its own bytes" "$(head_of /dev/loop0)" "$NAME"
        same "own device alone" "$(bound)" "/dev/loop0 /work/a"
        # /sys/devices shows sizes and numbers of the other's disks; a node with such a number
        # cannot be opened.
        for dev in /sys/devices/virtual/block/$DISKS/dev; do
            IFS=: read -r major minor < $dev; same "major" $major $MAJOR
            refused "node $minor" "not permitted" mknod /work/node b $major $minor
        done
        "#;
    let disks = if crate::BACKEND == "loop" { "DISKS='loop52*' MAJOR=7" } else { "DISKS='ublkb*' MAJOR=259" };
    let [red, blue] = ["red", "blue"].map(|name| Bundle::new(ctx, &daemon, runtime, name, name));
    let (mut red, mut blue) = (red?, blue?);
    let mut running = Vec::new();
    for bundle in [&mut red, &mut blue] {
        bundle.capabilities = vec!["CAP_MKNOD", "CAP_DAC_OVERRIDE"];
        image(&bundle.work("a"), &bundle.name)?;
        running.push(bundle.start(&format!("NAME={} {disks}\n{script}", bundle.name))?);
    }
    red.wait(&mut running[0], "both")?;
    blue.wait(&mut running[1], "both")?;
    // Another process in the same container; another container with the same pool.
    let inside =
        red.control(&["exec", "red", "/bin/losetup", "-n", "-O", "NAME,BACK-FILE", "--raw"])?.ok()?;
    ensure!(inside.out.trim() == "/dev/loop0 /work/a", "exec: {}", inside.out);
    let status = red.control(&["exec", "red", "/bin/losetup", "--sector-size", "512", "/dev/loop0"])?;
    ensure!(status.code == 0, "an ioctl in exec: {status:?}");
    let guest = Bundle::new(ctx, &daemon, runtime, "guest", "red")?;
    image(&guest.work("a"), "guest")?;
    guest.run(r#"refused "another's pool" "Function not implemented" losetup /dev/loop0 a"#)?;
    ensure!(daemon.log().contains("cannot serve a container"), "the log does not name the other container");
    for bundle in [&red, &blue] {
        bundle.resume("both")?;
    }
    running.into_iter().try_for_each(end)?;
    for name in ["red", "blue"] {
        unbound(&daemon, name)?;
    }
    let [first, second] = pools;
    tools::ok(&["umount", "-R", &first.dir])?;
    second.end(&daemon)?;
    daemon.stop()
}

/// Names of partitions are added, changed and removed in the container's own /dev; the next
/// container starts without.
fn partitions(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::new(ctx, &daemon, "ci", 4)?;
    for container in ["c1", "c2"] {
        run_on_partitions(&Bundle::new(ctx, &daemon, runtime, container, "ci")?)?;
        unbound(&daemon, "ci")?;
    }
    pool.end(&daemon)?;
    daemon.stop()
}

fn run_on_partitions(bundle: &Bundle<'_>) -> Res {
    for (name, table) in [("two", "size=2M\\nsize=1M"), ("three", "size=1M\\nsize=1M\\nsize=3M")] {
        let (image, table) = (bundle.work(name), format!("label: gpt\\n{table}\\n"));
        tools::sh(format!("truncate -s 16M {image}; printf '{table}' | sfdisk -q {image}"))?;
    }
    let script = r#"
        names() { (cd /dev && ls -d loop[0-9]*p* 2>/dev/null | tr '\n' ' '); }
        same "none" "$(names)" ""
        same "-P" "$(losetup -P -f --show two)" /dev/loop0
        soon "two" "loop0p1 loop0p2 " names
        same "sizes" "$(size /dev/loop0p1) $(size /dev/loop0p2)" "2097152 1048576"
        works "mkfs" mkfs.ext4 -q /dev/loop0p1
        works "another table" dd if=three of=/dev/loop0 bs=1M conv=notrunc
        works "reread" blockdev --rereadpt /dev/loop0
        soon "three" "loop0p1 loop0p2 loop0p3 " names
        same "size" "$(size /dev/loop0p3)" 3145728
        # Files that the container creates in its own /dev are kept.
        rm /dev/loop0p3; echo mine > /dev/loop0p3; ln -s /tmp /dev/loop1p1
        works "-d" losetup -d /dev/loop0
        soon "its own" "loop0p3 loop1p1 " names
        same "its file" "$(cat /dev/loop0p3)" mine
        works "again" losetup -P /dev/loop1 two
        soon "the name is the device's" loopfs/loop1p1 readlink /dev/loop1p1
        soon "beside its own" "loop0p3 loop1p1 loop1p2 loop1p3 " names
        "#;
    bundle.run(script)
}

/// The daemon logs why a hook fails; only root may report that.
fn hook(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::new(ctx, &daemon, "ci", 2)?;
    let bundle = ctx.path("bundle");
    tools::sh(format!("mkdir -p {bundle}/r; echo '{{\"root\":{{\"path\":\"r\"}}}}' > {bundle}/config.json"))?;
    let run_dir = ctx.path("run");
    let hook = format!(
        "echo '{{\"id\":\"c1\",\"bundle\":\"{bundle}\"}}' |
        ${{BY:-env}} loopengine --run-dir {run_dir} oci hook --devices 2 --pool ci"
    );
    let failed = tools::run(&["sh", "-c", &hook])?;
    ensure!(failed.code != 0 && failed.err.contains("/dev"), "{failed:?}");
    ensure!(
        daemon.log().contains("container \"c1\" was not prepared for private pool ci"),
        "{}",
        daemon.log()
    );
    // A directory that is no tmpfs is refused.
    tools::sh(format!("mkdir {bundle}/r/dev && mount -t ramfs none {bundle}/r/dev"))?;
    let done = tools::run(&["sh", "-c", &hook])?;
    ensure!(done.code == 0 && done.err.contains("not a directory of a tmpfs"), "{done:?}");
    let by = "setpriv --reuid 1000 --regid 1000 --clear-groups";
    let other = tools::run(&["sh", "-c", &format!("chmod -R a+rwX {bundle}; BY='{by}'; {hook}")])?;
    ensure!(other.err.contains("there is no private pool"), "{other:?}");
    tools::ok(&["umount", &format!("{bundle}/r/dev")])?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// The pool stays when its container ends, however it ends, and is reset for the next.
fn restart(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::new(ctx, &daemon, "ci", 2)?;
    let bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    image(&bundle.work("a"), "alpha")?;
    let numbers = |daemon: &Daemon| {
        tools::ok(&["stat", "-c", "%Hr:%Lr", &format!("{}/dev/loop0", pool.dir)])
            .map(|text| (text, daemon.ublk_ids().len()))
    };
    let before = numbers(&daemon)?;
    let script = r#"
        same "as new" "$(losetup -a)" ""
        same "-f --show" "$(losetup -f --show a)" /dev/loop0
        same "bytes" "$(head_of /dev/loop0)" alpha
        printf omega | dd of=/dev/loop0 seek=1 bs=4096 conv=notrunc 2>/dev/null
        exec 9</dev/loop0
        rm -f /dev/loopfs/loop1
        pause bound
        "#;
    for how in ["ends", "kill", "cgroup.kill"] {
        let mut running = bundle.start(script)?;
        bundle.wait(&mut running, "bound")?;
        let pid = bundle.control(&["state", "c1"])?.ok()?.out;
        let pid = serde_json::from_str::<Value>(&pid).at("state")?["pid"].as_u64().ok_or("no pid")?;
        match how {
            "ends" => bundle.resume("bound")?,
            "kill" => bundle.control(&["kill", "c1", "KILL"])?.ok().map(drop)?,
            _ => {
                let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).at("cgroup")?;
                let cgroup =
                    cgroup.lines().find_map(|line| line.strip_prefix("0::")).ok_or("no cgroup2")?.to_owned();
                std::fs::write(format!("/sys/fs/cgroup{cgroup}/cgroup.kill"), "1").at("cgroup.kill")?;
            }
        }
        let gone = || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(());
        ensure!(tools::until(CONTAINER, gone).is_some(), "{how}: the container is still there");
        let took = unbound(&daemon, "ci")?;
        ctx.note(format!("{how}: unbound after {took:?}"));
        let code = running.finish(CONTAINER)?.code;
        ensure!((code == 0) == (how == "ends"), "{how}: exit status {code}");
        let _ = bundle.control(&["delete", "--force", "c1"])?;
        // A disk of the kernel's loop driver gives way to another one of the pool's.
        let same = |now: &(String, usize)| match crate::BACKEND {
            "loop" => now.0.starts_with("7:5") && now.1 == before.1,
            _ => *now == before,
        };
        let back = || {
            (same(&numbers(&daemon).ok()?) && Path::new(&format!("{}/dev/loop1", pool.dir)).exists())
                .then_some(())
        };
        ensure!(tools::until(UNBOUND, back).is_some(), "{how}: {:?}, expected {before:?}", numbers(&daemon)?);
        let bytes = std::fs::read(bundle.work("a"))?;
        ensure!(bytes[4096..].starts_with(b"omega"), "{how}: the written data is not in the image");
        image(&bundle.work("a"), "alpha")?;
    }
    // Held open from outside: the end of the container unbinds it nevertheless.
    let mut running = bundle.start(script)?;
    bundle.wait(&mut running, "bound")?;
    let held = std::fs::File::open(format!("{}/dev/loop0", pool.dir)).at("loop0")?;
    bundle.control(&["kill", "c1", "KILL"])?.ok()?;
    unbound(&daemon, "ci")?;
    running.finish(CONTAINER)?;
    let _ = bundle.control(&["delete", "--force", "c1"])?;
    bundle.run(
        "same '-f --show' \"$(losetup -f --show a)\" /dev/loop0; same bytes \"$(head_of /dev/loop0)\" alpha",
    )?;
    drop(held);
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    daemon.stop()
}

/// Limits that a container requests, and the effect of exceeding them.
fn policy(ctx: &Ctx) -> Res {
    let runtime = any_runtime()?;
    let daemon = Daemon::start(ctx)?;
    let pool = Pool::new(ctx, &daemon, "ci", 2)?;
    let mut bundle = Bundle::new(ctx, &daemon, runtime, "c1", "ci")?;
    for name in ["a", "b"] {
        image(&bundle.work(name), name)?;
    }
    bundle.annotations = vec![("io.loopengine.max", "1")];
    bundle.run(
        r#"
        same "the first" "$(losetup -f --show a)" /dev/loop0
        refused "no second" "No space left" losetup -f b
        refused "not by name" "No space left" losetup /dev/loop1 b
        refused "not added" "No space left" bash -c 'losetup -d /dev/loop0; losetup /dev/loop1 b'
        "#,
    )?;
    bundle.annotations = vec![("io.loopengine.max", "100")];
    bundle.run(
        r#"
        same "two" "$(losetup -f --show a) $(losetup -f --show b)" "/dev/loop0 /dev/loop1"
        refused "not a third" "find an unused loop device" losetup -f
        "#,
    )?;
    // Without a pool, with an unknown pool, or with invalid requests: calls fail, and nothing
    // hangs.
    bundle.annotations.clear();
    let fails = r#"refused "no pool" "Function not implemented" losetup /dev/loop0 a"#;
    let refusals = [
        ("pool=other", "2", "there is no private pool"),
        ("pool=ci", "many", "io.loopengine.max"),
        ("nothing", "2", "names no private pool"),
    ];
    for (metadata, max, said) in refusals {
        let mut config = bundle.config(fails)?;
        config["linux"]["seccomp"]["listenerMetadata"] = json!(metadata);
        config["annotations"] = json!({ "io.loopengine.max": max });
        end(bundle.start_as(&config)?)?;
        ensure!(daemon.log().contains(said), "{metadata}: the log does not say {said:?}");
    }
    // A client of the socket that is no runtime.
    use std::io::Write;
    let mut garbage = std::os::unix::net::UnixStream::connect(ctx.path("run/oci")).at("the socket")?;
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    drop(garbage);
    let logged = || daemon.log().contains("not a containerProcessState").then_some(());
    ensure!(tools::until(UNBOUND, logged).is_some(), "the log does not report the invalid message");
    unbound(&daemon, "ci")?;
    pool.end(&daemon)?;
    daemon.stop()
}
