// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs of `loopbench` on this machine without a VM: their results, and that they leave nothing
//! behind.
//!
//! Needs root, fio and the kernel's loop driver; prints what is missing. Targets of QEMU and of the
//! engine are measured too if they are installed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use loopbench::outcome::Outcome;

type Check = Result<(), Failed>;
type Test = (&'static str, fn() -> Check);

fn main() {
    let arguments = Arguments::from_args();
    let missing = missing();
    if let Some(why) = &missing {
        println!("skipped: {why}");
    }
    let tests: [Test; 7] = [
        ("a_run_measures_and_leaves_nothing", a_run_measures_and_leaves_nothing),
        ("every_job_file_runs", every_job_file_runs),
        ("ctrl_c_keeps_what_was_measured", ctrl_c_keeps_what_was_measured),
        ("ctrl_c_removes_the_loop_devices_that_were_made", ctrl_c_removes_the_loop_devices_that_were_made),
        ("plan_says_what_run_finds", plan_says_what_run_finds),
        ("what_cannot_be_set_up_is_named", what_cannot_be_set_up_is_named),
        ("bad_input_is_one_line", bad_input_is_one_line),
    ];
    let trials = tests.map(|(name, test)| Trial::test(name, test).with_ignored_flag(missing.is_some()));
    // One at a time: each checks what is left on the machine.
    let arguments = Arguments { test_threads: Some(1), ..arguments };
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// Why these tests cannot run here.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("no loop driver".into());
    }
    ["fio", "losetup", "fallocate"]
        .into_iter()
        .find(|program| loopbench::sh::which(program).is_err())
        .map(|program| format!("{program} is not installed"))
}

/// A directory for images and results, and the loop devices that existed before.
struct Home(tempfile::TempDir, Vec<String>);

impl Home {
    fn new() -> Home {
        // On a disk: not every tmpfs supports direct I/O.
        let home =
            tempfile::Builder::new().prefix("bench-run-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Home(home, loops())
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("result")
    }

    fn run(&self, words: &[&str]) -> Command {
        self.run_on(self.0.path(), words)
    }

    /// The same with images in another directory.
    fn run_on(&self, images: &Path, words: &[&str]) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_loopbench"));
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        // The engine is in the same directory, if it was built.
        command.env("PATH", format!("{}:{path}", program.parent().unwrap().display()));
        command.arg("run").args(["--images", &images.to_string_lossy(), "--image-mb", "32"]);
        command.args(["--run-ms", "100", "--idle", "0", "--out"]).arg(self.out());
        if !words.contains(&"--attaches") {
            command.args(["--attaches", "0"]);
        }
        command.args(words).stdin(Stdio::null());
        command
    }

    fn outcome(&self) -> Outcome {
        loopbench::render::read(&self.out()).unwrap()
    }

    /// Checks that no loop device, mount, directory or process of a run is left.
    fn check_nothing_is_left(&self) -> Check {
        let place = self.0.path().to_string_lossy().into_owned();
        let loops = said(Command::new("losetup").arg("--all"));
        ensure(!loops.contains(&place), &format!("a loop device is left: {loops}"))?;
        // A bound device belongs to another program.
        let bound = |name: &str| Path::new("/sys/block").join(name).join("loop").exists();
        let made: Vec<String> = self::loops().into_iter().filter(|name| !self.1.contains(name)).collect();
        ensure(made.iter().all(|name| bound(name)), &format!("devices of the driver are left: {made:?}"))?;
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        ensure(
            !mounts.contains(&place) && !mounts.contains("/loopbench-"),
            &format!("something is left mounted: {mounts}"),
        )?;
        for entry in fs::read_dir(&place)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure(!name.starts_with("loopbench-"), &format!("{name} is left"))?;
        }
        for process in fs::read_dir("/proc")?.flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            ensure(!line.contains(&place), &format!("a process is left: {line}"))?;
        }
        Ok(())
    }
}

/// All loop devices, bound or not.
fn loops() -> Vec<String> {
    let disks = fs::read_dir("/sys/block").unwrap().flatten();
    disks
        .filter_map(|disk| disk.file_name().into_string().ok())
        .filter(|name| name.starts_with("loop"))
        .collect()
}

/// Starts a run and presses Ctrl-C, as a terminal does it: every process of the foreground gets the
/// signal. Once a line with `word` has come, or a moment later.
fn interrupt(command: &mut Command, word: &str, later: Duration) -> Check {
    let mut child = command.process_group(0).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    ensure(lines.any(|line| line.is_ok_and(|line| line.contains(word))), &format!("it did not say {word}"))?;
    std::thread::sleep(later);
    let group = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process_group(group, rustix::process::Signal::INT)?;
    lines.for_each(drop);
    let status = child.wait()?;
    ensure(status.code() == Some(130), &format!("it ended with {status}"))
}

fn ensure(truth: bool, otherwise: &str) -> Check {
    if truth { Ok(()) } else { Err(otherwise.into()) }
}

fn said(command: &mut Command) -> String {
    String::from_utf8_lossy(&command.output().unwrap().stdout).into_owned()
}

fn words(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn a_run_measures_and_leaves_nothing() -> Check {
    let home = Home::new();
    let jobs = "randread-4k-qd32,randwrite-4k-qd1,many-16-4k,discard-64k,smallfile-create";
    let targets =
        "raw file,kernel loop,loopengine fuse,fuse passthrough,qemu fuse,ext4 on kernel loop,fuse2fs";
    let output = home.run(&["--rounds", "2", "--jobs", jobs, "--targets", targets]).output()?;
    ensure(output.status.success(), &words(&output))?;
    home.check_nothing_is_left()?;
    let outcome = home.outcome();
    ensure(outcome.manifest.complete, "it is not complete")?;
    let count = |job: &str, target: &str| {
        outcome.samples.iter().filter(|sample| sample.job == job && sample.target == target).count()
    };
    for target in ["raw file", "kernel loop"] {
        for job in ["randread-4k-qd32", "randwrite-4k-qd1", "many-16-4k"] {
            ensure(count(job, target) == 2, &format!("{target}: {job}: {} samples", count(job, target)))?;
        }
    }
    ensure(count("discard-64k", "kernel loop") == 2, "kernel loop was not discarded on")?;
    ensure(count("discard-64k", "raw file") == 0, "fio discards on block devices only")?;
    ensure(count("smallfile-create", "ext4 on kernel loop") == 2, "no small files")?;
    // All other targets are measured, or have a reason.
    for target in &outcome.targets {
        let measured = outcome.samples.iter().any(|sample| sample.target == target.name);
        ensure(measured || target.unavailable.is_some(), &format!("nothing is said of {}", target.name))?;
    }
    for file in ["result.csv", "report.md", "report.html", "raw.tar.gz", "plots/iops-randread-4k-qd32.svg"] {
        ensure(home.out().join(file).exists(), &format!("{file} is missing"))?;
    }
    ensure(!home.out().join("raw").exists(), "raw files are not packed")?;
    let report = fs::read(home.out().join("report.md"))?;
    said(Command::new(env!("CARGO_BIN_EXE_loopbench")).arg("report").arg(home.out()));
    ensure(fs::read(home.out().join("report.md"))? == report, "the archive makes another report")
}

fn every_job_file_runs() -> Check {
    let home = Home::new();
    let targets = ["--targets", "raw file,kernel loop,ext4 on kernel loop"];
    let output = home.run(&[&targets[..], &["--rounds", "1"]].concat()).output()?;
    ensure(output.status.success(), &words(&output))?;
    home.check_nothing_is_left()?;
    let outcome = home.outcome();
    for job in loopbench::job::JOBS {
        let reference = job.info().reference;
        let measured =
            outcome.samples.iter().any(|sample| sample.job == job.name && sample.target == reference);
        ensure(measured, &format!("{} was not measured on {reference}: {}", job.name, words(&output)))?;
    }
    Ok(())
}

fn ctrl_c_keeps_what_was_measured() -> Check {
    let home = Home::new();
    let choice =
        ["--jobs", "randread-4k-qd1,randread-4k-qd32", "--targets", "raw file,kernel loop,qemu fuse"];
    let mut command = home.run(&[&choice[..], &["--rounds", "50"]].concat());
    interrupt(&mut command, "2 of 100", Duration::from_millis(150))?;
    home.check_nothing_is_left()?;
    let outcome = home.outcome();
    ensure(!outcome.manifest.complete && outcome.samples.len() >= 4, "what was measured is lost")?;
    let unmeasured = |outcome: &Outcome| {
        let targets = outcome.targets.iter().filter(|target| target.name != "qemu fuse");
        targets.filter_map(|target| target.unavailable.clone()).collect::<Vec<_>>()
    };
    ensure(unmeasured(&outcome).is_empty(), &format!("it counts as failed: {:?}", unmeasured(&outcome)))?;

    let again = home.run(&choice).output()?;
    ensure(!again.status.success() && words(&again).contains("--resume"), &words(&again))?;
    let before = outcome.samples;
    let output = home.run(&[&choice[..], &["--rounds", "3", "--resume"]].concat()).output()?;
    ensure(output.status.success(), &words(&output))?;
    let outcome = home.outcome();
    ensure(outcome.manifest.complete, "it did not go on to the end")?;
    ensure(outcome.samples.starts_with(&before[..2]), "it measured again what was there")?;
    ensure(unmeasured(&outcome).is_empty(), &format!("it counts as failed: {:?}", unmeasured(&outcome)))?;
    home.check_nothing_is_left()
}

/// While the run makes a hundred devices, to time attaching beside them.
fn ctrl_c_removes_the_loop_devices_that_were_made() -> Check {
    let home = Home::new();
    let choice = ["--jobs", "randread-4k-qd1", "--rounds", "1", "--targets", "raw file", "--attaches", "2"];
    let mut command = home.run(&choice);
    interrupt(&mut command, "attach: kernel loop by command, 0 devices", Duration::from_millis(1500))?;
    home.check_nothing_is_left()
}

fn plan_says_what_run_finds() -> Check {
    let home = Home::new();
    let choice = ["--jobs", "randread-4k-qd1", "--rounds", "1"];
    let output = home.run(&choice).output()?;
    ensure(output.status.success(), &words(&output))?;
    let mut plan = Command::new(env!("CARGO_BIN_EXE_loopbench"));
    let run = home.run(&choice);
    plan.env("PATH", run.get_envs().find_map(|(name, value)| (name == "PATH").then_some(value)?).unwrap());
    let plan = said(plan.arg("plan").args(choice).arg("--images").arg(home.0.path()));
    for target in home.outcome().targets {
        let line = plan.lines().find(|line| line.trim_start().starts_with(&format!("{:<22} ", target.name)));
        let line = line.ok_or(format!("{} is not planned: {plan}", target.name))?;
        let why = target.unavailable.map(|why| format!("unavailable: {why}"));
        ensure(line.ends_with(&why.unwrap_or(target.version)), &format!("plan says {line}"))?;
    }
    let nowhere = said(Command::new(env!("CARGO_BIN_EXE_loopbench")).args(["plan", "--images", "/nowhere"]));
    ensure(nowhere.contains("unavailable: there is no directory /nowhere"), &nowhere)?;
    ensure(plan.contains(&format!("{} (", home.0.path().display())), &format!("no file system: {plan}"))
}

fn what_cannot_be_set_up_is_named() -> Check {
    let home = Home::new();
    let disk = home.0.path().join("small");
    fs::create_dir(&disk)?;
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "none"]).arg(&disk).status()?;
    ensure(mount.success(), "no tmpfs")?;
    let choice =
        ["--jobs", "randread-4k-qd1", "--rounds", "1", "--targets", "raw file,kernel loop,qemu fuse"];
    let mut command = home.run_on(&disk, &choice);
    // A QEMU daemon that always fails.
    let fake = home.0.path().join("fake");
    fs::create_dir(&fake)?;
    let program = fake.join("qemu-storage-daemon");
    fs::write(&program, "#!/bin/sh\necho 'QEMU version 0.1'\n[ \"$1\" = --version ]\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", fake.display()));
    let output = command.output();
    // Programs that scan all disks, such as udev, briefly hold a device open.
    let unmounted = (0..20).any(|_| {
        let gone = Command::new("umount").arg(&disk).status().is_ok_and(|status| status.success());
        if !gone {
            std::thread::sleep(Duration::from_millis(250));
        }
        gone
    });
    let output = output?;
    ensure(unmounted, &format!("the small disk is still in use: {}", words(&output)))?;
    ensure(output.status.success(), &words(&output))?;
    home.check_nothing_is_left()?;
    let outcome = home.outcome();
    let why = |name: &str| {
        let target = outcome.targets.iter().find(|target| target.name == name);
        target.and_then(|target| target.unavailable.clone()).unwrap_or_default()
    };
    ensure(why("kernel loop").contains("No space left"), &why("kernel loop"))?;
    ensure(!why("qemu fuse").is_empty(), "the failed daemon is not named")?;
    let measured = outcome.samples.iter().any(|sample| sample.target == "raw file");
    ensure(measured, "the rest did not go on")
}

fn bad_input_is_one_line() -> Check {
    let home = Home::new();
    let fails = |command: &mut Command, word: &str| -> Check {
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure(!output.status.success() && said.contains(word) && !said.contains("panicked"), &said)?;
        ensure(said.trim().lines().count() == 1, &format!("more than a line: {said}"))
    };
    fails(&mut home.run(&["--jobs", "nonsense"]), "nonsense")?;
    fails(&mut home.run(&["--targets", "floppy"]), "floppy")?;
    fails(&mut home.run_on(Path::new("/nowhere/at/all"), &[]), "/nowhere/at/all")?;
    let mut without_fio = home.run(&["--jobs", "randread-4k-qd1"]);
    fails(without_fio.env("PATH", home.0.path()), "fio")?;
    let loopbench = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loopbench"));
        command.args(words);
        command
    };
    let place = home.0.path().to_string_lossy().into_owned();
    fails(&mut loopbench(&["report", &place]), "is not a result")?;
    fs::write(home.0.path().join("result.json"), "{\"schema\":1,")?;
    fails(&mut loopbench(&["compare", &place, &place]), "result.json")?;
    fs::write(home.0.path().join("result.json"), "{\"schema\":99}")?;
    fails(&mut loopbench(&["compare", &place, &place]), "99")
}
