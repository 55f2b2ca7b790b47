// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program: with a fake daemon, and (in `cli/*.trycmd`) without one.

#[path = "cli/create.rs"]
mod create;
#[path = "cli/statistics.rs"]
mod statistics;
mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

use loopengine::instance::spec::*;
use support::{Daemon, KINDS, Ran};

#[test]
fn fails_without_a_daemon() {
    trycmd::TestCases::new().case("tests/cli/*.trycmd").run();
}

fn ok(ran: &Ran) -> &str {
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    &ran.out
}

fn fails(ran: &Ran, code: i32, says: &str) {
    assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{ran:?}");
    assert!(ran.err.starts_with("loopengine: ") && ran.err.contains(says), "{ran:?}");
    assert_eq!(ran.err.matches('\n').count(), 1, "one line: {ran:?}");
}

#[test]
fn attach_prints_the_path_alone() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 1 << 20);
    assert_eq!(ok(&daemon.run(&["attach", "a.img"])), "/run/fake/default/loop0\n");
    assert_eq!(daemon.fake.received(&image), Some(true), "by its absolute path, writable");
    let second = daemon.image("b.img", 1 << 20);
    assert_eq!(ok(&daemon.run(&["attach", "--read-only", "b.img"])), "/run/fake/default/loop1\n");
    assert_eq!(daemon.fake.received(&second), Some(false));
    assert_eq!(ok(&daemon.run(&["detach", "default/loop0"])), "/run/fake/default/loop0\n");
    fails(&daemon.run(&["detach", "default/loop0"]), 3, "no such device");
    assert_eq!(ok(&daemon.run(&["detach", "--all"])), "/run/fake/default/loop1\n");
    assert_eq!(ok(&daemon.run(&["detach", "--all"])), "");
}

#[test]
fn attach_passes_every_option() {
    let daemon = Daemon::start();
    daemon.image("a.img", 1 << 20);
    ok(&daemon.run(&["instance", "create", "build", "--max", "3", "--cpus", "0"]));
    let options = "--offset 8k --size-limit 64K --block-size 4k --buffered --queues 3 --depth 7 --io-mode auto -i build -r";
    let words: Vec<&str> = ["attach", "a.img"].into_iter().chain(options.split(' ')).collect();
    ok(&daemon.run(&words));
    let listed = daemon.run(&["list", "--json", "-i", "build"]);
    let devices: Vec<DeviceInfo> = serde_json::from_str(ok(&listed)).unwrap();
    let device = &devices[0];
    assert_eq!((device.offset, device.size_limit, device.block_size), (8192, 65536, 4096));
    assert_eq!((device.queues, device.depth, device.io_mode), (3, 7, IoMode::Auto));
    assert!(device.buffered && device.read_only);
    let table = daemon.run(&["list"]);
    let lines: Vec<&str> = ok(&table).lines().collect();
    assert!(lines[0].starts_with("DEVICE") && lines[0].ends_with("IMAGE"), "{lines:?}");
    assert!(lines[1].contains("ro,buffered") && lines[1].contains("4096"), "{lines:?}");
}

#[test]
fn every_kind_of_error_has_its_exit_code() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let codes = [2, 3, 4, 4, 5, 6, 7, 8, 9, 1, 1];
    for (kind, code) in KINDS.iter().zip(codes) {
        let ran = daemon.run(&["attach", "-i", &format!("error-{kind:?}"), "a.img"]);
        fails(&ran, code, &format!("{kind:?} happened; do something else"));
    }
}

#[test]
fn bad_images_do_not_reach_the_daemon() {
    let daemon = Daemon::start();
    daemon.image("empty.img", 0);
    daemon.image("odd.img", 1000);
    daemon.image("a.img", 4096);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["missing.img"], 3, "loopengine create missing.img"),
        (&["."], 2, "is a directory"),
        (&[".", "-r"], 2, "is a directory"),
        (&["/dev/null"], 2, "neither a file nor a block device"),
        (&["empty.img"], 2, "truncate"),
        (&["odd.img"], 2, "truncate -s %512"),
        (&["a.img", "--offset", "100"], 2, "--offset"),
        (&["a.img", "--offset", "4096"], 2, "--offset"),
        (&["a.img", "--size-limit", "100"], 2, "--size-limit"),
        (&["a.img/b"], 2, "a.img/b"),
    ];
    for (words, code, says) in cases {
        let words: Vec<&str> = ["attach"].iter().chain(*words).copied().collect();
        fails(&daemon.run(&words), *code, says);
    }
    assert_eq!(ok(&daemon.run(&["list", "--json"])), "[]\n");
}

/// An image that cannot be mounted is refused for its content, before a call to the daemon.
#[test]
fn mount_checks_the_image_first() {
    use std::os::unix::fs::FileExt;
    let daemon = Daemon::start();
    let made = |name: &str, bytes: &[(u64, &[u8])]| {
        let image = std::fs::File::options().write(true).open(daemon.image(name, 4 << 20)).unwrap();
        bytes.iter().for_each(|(at, bytes)| image.write_all_at(bytes, *at).unwrap());
    };
    let dir = daemon.image("file", 0).with_file_name("dir");
    std::fs::create_dir(&dir).unwrap();
    made("junk.img", &[]);
    made("swap.img", &[(4086, b"SWAPSPACE2")]);
    made("squashfs.img", &[(0, b"hsqs")]);
    // An MBR with two partitions of 1 MiB: squashfs in the second, nothing in the first.
    let entry = |start: u32| {
        let mut bytes = [0; 16];
        bytes[4] = 0x83;
        bytes[8..12].copy_from_slice(&start.to_le_bytes());
        bytes[12..].copy_from_slice(&2048_u32.to_le_bytes());
        bytes
    };
    let (first, second) = (entry(2048), entry(4096));
    made("disk.img", &[(446, &first), (462, &second), (510, &[0x55, 0xaa]), (2 << 20, b"hsqs")]);
    // The first sector of a GPT, whose image is cut.
    let mut gpt = entry(1);
    gpt[4] = 0xee;
    made("cut.img", &[(446, &gpt), (510, &[0x55, 0xaa])]);
    let pipe = dir.with_file_name("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, pipe, rustix::fs::Mode::RWXU).unwrap();
    let cases: &[(&str, i32, &str)] = &[
        ("missing.img dir", 3, "cannot open missing.img"),
        ("dir dir", 2, "dir is a directory"),
        ("pipe dir", 2, "neither a file nor a block device"),
        ("file dir", 2, "file has 0 bytes"),
        ("junk.img dir", 2, "junk.img contains no known file system"),
        ("swap.img dir", 2, "swap, which cannot be mounted"),
        ("disk.img dir", 2, "1 (1M), 2 (squashfs, 1M); select one with --partition N"),
        ("disk.img dir -p 3", 3, "has no partition 3, but 1 (1M), 2 (1M)"),
        ("disk.img dir -p 1", 2, "partition 1 of disk.img contains no known file system"),
        ("junk.img dir --partition 1", 3, "junk.img has no partitions"),
        ("cut.img dir", 2, "cut.img has a GPT without readable partitions; see whether the image is"),
        ("cut.img dir --all", 2, "cut.img has a GPT without readable partitions"),
        ("cut.img dir --partition 1", 2, "cut.img has a GPT without readable partitions"),
        ("disk.img dir --offset 3M", 2, "contains no known file system"),
        ("disk.img dir --offset 4M", 2, "no file system at 4194304"),
        ("disk.img dir --offset 2M --sizelimit 512", 8, "cannot reach the daemon"),
        ("disk.img dir --partition 2", 8, "cannot reach the daemon"),
        ("squashfs.img none", 3, "mkdir none"),
        ("squashfs.img junk.img", 2, "junk.img is not a directory"),
        ("squashfs.img dir", 8, "cannot reach the daemon"),
    ];
    for (words, code, says) in cases {
        // Users other than root need a FUSE driver, which may be missing.
        if *code == 8 && !rustix::process::geteuid().is_root() {
            eprintln!("skipped: {words}: not root");
            continue;
        }
        let words: Vec<&str> = std::iter::once("mount").chain(words.split(' ')).collect();
        fails(&daemon.run(&words), *code, says);
    }
    fails(&daemon.run(&["umount", "dir"]), 8, "cannot reach the daemon");
}

#[test]
fn run_gives_the_device_to_a_command() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let run = |words: &[&str]| {
        let words: Vec<&str> = ["attach", "a.img", "--run"].iter().chain(words).copied().collect();
        daemon.run(&words)
    };
    let device = "/run/fake/default/loop0";
    assert_eq!(ok(&run(&["echo", "-n"])), device);
    assert_eq!(ok(&run(&["echo", "if={}", "x"])), format!("if={device} x\n"));
    let shell = "echo $LOOPENGINE_DEVICE; exit 42";
    let ran = run(&["sh", "-c", shell]);
    assert_eq!((ran.code, ran.out.as_str()), (42, format!("{device}\n").as_str()));
    assert_eq!(run(&["sh", "-c", "kill -9 $$"]).code, 137);
    fails(&run(&["/nonexistent/command"]), 127, "cannot run /nonexistent/command");
    fails(&run(&["/etc/passwd"]), 126, "cannot run /etc/passwd");
    fails(&daemon.run(&["attach", "missing.img", "--run", "true"]), 125, "missing.img");
    assert_eq!(daemon.run(&["attach", "a.img", "--nonsense", "--run", "true"]).code, 125);
    assert_eq!(ok(&daemon.run(&["list", "--json"])), "[]\n", "nothing is left attached");
}

#[test]
fn run_reports_a_failed_detach() {
    let daemon = Daemon::start();
    daemon.image("busy.img", 4096);
    let ran = daemon.run(&["attach", "busy.img", "--run", "true"]);
    fails(&ran, 125, "loopengine detach /run/fake/default/loop0");
    let ran = daemon.run(&["attach", "busy.img", "--run", "sh", "-c", "exit 7"]);
    fails(&ran, 7, "still attached");
}

#[test]
fn run_detaches_on_a_signal() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let mut child = daemon
        .command(&[
            "attach",
            "a.img",
            "--run",
            "sh",
            "-c",
            "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let started = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert!(started.elapsed() < Duration::from_secs(8), "not by SIGKILL");
    assert_eq!(ok(&daemon.run(&["list", "--json"])), "[]\n");
}

#[test]
fn creates_lists_and_removes_instances() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    ok(&daemon.run(&["instance", "create", "one", "--max", "1", "--workers", "4"]));
    fails(&daemon.run(&["instance", "create", "one"]), 4, "exists");
    let listed = daemon.run(&["instance", "list", "--json"]);
    let infos: Vec<InstanceInfo> = serde_json::from_str(ok(&listed)).unwrap();
    assert_eq!((infos[1].name.as_str(), infos[1].max_devices, infos[1].workers), ("one", 1, 4));
    ok(&daemon.run(&["attach", "-i", "one", "a.img"]));
    fails(&daemon.run(&["attach", "-i", "one", "a.img"]), 5, "full");
    let table = daemon.run(&["instance", "list"]);
    assert!(
        ok(&table).starts_with("NAME     DEVICES  MAX  BACKEND  WORKERS  CPUS  DIRECTORY\n"),
        "{table:?}"
    );
    ok(&daemon.run(&["instance", "remove", "one"]));
    fails(&daemon.run(&["instance", "remove", "one"]), 3, "no instance");
}

#[test]
fn a_device_in_use_needs_force() {
    let daemon = Daemon::start();
    daemon.image("busy.img", 4096);
    daemon.image("a.img", 4096);
    ok(&daemon.run(&["attach", "busy.img"]));
    ok(&daemon.run(&["attach", "a.img"]));
    fails(&daemon.run(&["detach", "default/loop0"]), 4, "in use");
    let both = daemon.run(&["detach", "default/loop0", "default/loop1"]);
    assert_eq!((both.code, both.out.as_str()), (4, "/run/fake/default/loop1\n"));
    assert_eq!(ok(&daemon.run(&["detach", "--force", "--all"])), "/run/fake/default/loop0\n");
}

/// The keys and types of the `--json` output, which scripts depend on.
#[test]
fn json_has_a_schema() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let device = "instance:string number:number path:string node:string image:string state:string \
        reason:null sizeBytes:number offsetBytes:number sizeLimitBytes:number blockSizeBytes:number \
        readOnly:boolean buffered:boolean durable:boolean iops:number bytesPerSecond:number queues:number depth:number ioMode:string sharedWith:array \
        sinceUnixSeconds:number imageDevice:number imageInode:number";
    let instance = "name:string maxDevices:number devices:number backend:string workers:number cpus:null directory:string";
    let stats = "path:string image:string atNs:number reads:number readBytes:number writes:number \
        writeBytes:number flushes:number syncs:number discards:number errors:number resubmits:number punts:number \
        fallbacks:number requests:number batches:number held:number inFlight:number latency:object";
    let interval = "atUnixMs:number seconds:number problem:null total:object devices:array";
    let cases: &[(&[&str], &str)] = &[
        (&["create", "new.img", "--size", "1M"], "path:string sizeBytes:number"),
        (&["attach", "a.img"], device),
        (&["resize", "default/loop0"], device),
        (&["list"], device),
        (&["stats"], stats),
        (&["top", "-n", "1", "-d", "0.1"], interval),
        (&["instance", "create", "other"], instance),
        (&["instance", "list"], instance),
    ];
    for (words, schema) in cases {
        let words: Vec<&str> = words.iter().chain(&["--json"]).copied().collect();
        let printed: serde_json::Value = serde_json::from_str(ok(&daemon.run(&words))).unwrap();
        has_schema(printed.as_array().map_or(&printed, |all| &all[0]), schema);
        if words[0] == "top" {
            let device = "name:string number:number private:boolean uid:number user:string disk:string \
                image:string state:string rates:object";
            has_schema(&printed["devices"][0], device);
            let rates = "readsPerSecond:number readBytesPerSecond:number writesPerSecond:number \
                writeBytesPerSecond:number flushesPerSecond:number discardsPerSecond:number averageNs:null \
                p99Ns:null queueDepth:null utilisationPercent:null inFlight:number errors:number";
            has_schema(&printed["devices"][0]["rates"], rates);
            has_schema(&printed["total"], rates);
        }
    }
}

fn has_schema(value: &serde_json::Value, schema: &str) {
    let object = value.as_object().unwrap();
    let mut have: Vec<String> = object.iter().map(|(key, value)| format!("{key}:{}", kind(value))).collect();
    let mut want: Vec<&str> = schema.split_whitespace().collect();
    have.sort_unstable();
    want.sort_unstable();
    assert_eq!(have, want, "{value}");
}

fn kind(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "boolean",
        serde_json::Value::Number(_) => "number",
        serde_json::Value::String(_) => "string",
        serde_json::Value::Array(_) => "array",
        serde_json::Value::Object(_) => "object",
    }
}

#[test]
fn resize_prints_the_new_size() {
    let daemon = Daemon::start();
    let image = daemon.image("a.img", 4096);
    ok(&daemon.run(&["attach", "a.img"]));
    std::fs::File::options().write(true).open(image).unwrap().set_len(8192).unwrap();
    assert_eq!(ok(&daemon.run(&["resize", "default/loop0"])), "8192\n");
    fails(&daemon.run(&["resize", "default/loop9"]), 3, "no device");
    assert_eq!(ok(&daemon.run(&["resize", "default/loop0", "--size", "1M"])), "1048576\n");
    fails(&daemon.run(&["resize", "default/loop0"]), 2, "8192 of 1048576");
    fails(&daemon.run(&["resize", "default/loop0", "--shrink"]), 2, "8192 of 1048576");
    assert_eq!(ok(&daemon.run(&["resize", "default/loop0", "--shrink", "--force"])), "8192\n");
}

#[test]
fn recover_sends_the_image_and_prints_the_path() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let moved = daemon.image("moved.img", 8192);
    ok(&daemon.run(&["attach", "a.img"]));
    let path = "/run/fake/default/loop0\n";
    assert_eq!(
        ok(&daemon.run(&["recover", "default/loop0", "--image", "moved.img", "--offset", "4K"])),
        path
    );
    let list: Vec<DeviceInfo> = serde_json::from_str(ok(&daemon.run(&["list", "--json"]))).unwrap();
    assert_eq!((list[0].image.as_str(), list[0].offset), (moved.to_str().unwrap(), 4096));
    fails(&daemon.run(&["recover", "default/loop9", "--image", "moved.img"]), 3, "no device");
    fails(&daemon.run(&["recover", "default/loop0", "--image", "none.img"]), 3, "none.img");
}

#[test]
fn fails_if_it_cannot_write_its_output() {
    let daemon = Daemon::start();
    daemon.image("a.img", 4096);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let messages = full.try_clone().unwrap();
    let ran = Ran::from(daemon.command(&["attach", "a.img"]).stdout(full).output().unwrap());
    fails(&ran, 1, "standard output");
    let ran = Ran::from(daemon.command(&["attach", "none.img"]).stderr(messages).output().unwrap());
    assert_eq!(ran.code, 3, "a message that cannot be written changes no exit code");
    assert_eq!(ok(&daemon.run(&["list", "--json"])), "[]\n", "the unreported device is detached");
}

#[test]
fn doctor_reports_the_daemon() {
    let daemon = Daemon::start();
    let ran = daemon.run(&["doctor", "--json", "."]);
    let checks: Vec<serde_json::Value> = serde_json::from_str(&ran.out).unwrap();
    let verdict = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        check["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict("daemon"), "ok", "{ran:?}");
    // The fake daemon is a thread of this test. A real one of ublk devices has its own mount namespace:
    // who shares it has entered it.
    assert_eq!(verdict("mount namespace"), "warning", "{ran:?}");
    assert_eq!(ran.code, 0);
    assert!(checks.iter().any(|check| check["name"] == "direct I/O"));
    let text = daemon.run(&["doctor"]);
    assert!(text.out.contains("warning  mount namespace"), "{text:?}");
    fails(&daemon.run(&["doctor", "/nonexistent"]), 3, "/nonexistent");
}

#[test]
fn serve_checks_its_options_first() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let config = dir.path().join("loopengine.toml");
    let serve = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_loopengine"));
        command.args(["serve", "--backend", "ublk", "--config"]).arg(&config).arg("--run-dir").arg(&run_dir);
        Ran::from(command.output().unwrap())
    };
    std::fs::write(&config, "[default]\n\nmax_device = 3\n").unwrap();
    fails(&serve(), 2, "loopengine.toml, line 3: ");
    std::fs::write(&config, "").unwrap();
    if !rustix::process::geteuid().is_root() {
        fails(&serve(), 6, "only root");
    } else if std::path::Path::new("/dev/ublk-control").exists() {
        eprintln!("skipped: this machine has ublk, so the daemon would start");
    } else {
        fails(&serve(), 8, "modprobe ublk_drv");
    }
    assert!(!run_dir.exists());
}
