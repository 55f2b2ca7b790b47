// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab demo`: serves file systems in images and private loop devices to containers, over ublk and over
//! the kernel's loop driver, and compares both with kernel loop.
//!
//! Runs on this machine if it has ublk, else in a VM of the lab. Says first what it will do and how
//! long that takes. Leaves nothing behind, whether it succeeds or fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use loopbench::daemon::{self, Daemon};
use loopbench::fio::Length;
use loopbench::job::{self, Job};
use loopbench::measure::Extras;
use loopbench::run::{self, Plan};
use loopbench::store::{DEFAULTS, Fs, Store};
use loopbench::{collect, outcome, render, sh, target};

use crate::kernel::Line;
use crate::steps::Steps;
use crate::vm::{self, Mode, Vm};
use crate::{programs, setup, tenants};

/// Where to run.
#[derive(clap::Args)]
pub(crate) struct DemoOptions {
    /// Kernel of the VM
    #[arg(long, value_enum, default_value = "7")]
    kernel: Line,
    /// Use a VM even if this machine has ublk
    #[arg(long)]
    vm: bool,
    /// Run on this machine, with loopengine on PATH
    #[arg(long, hide = true)]
    inside: bool,
}

const TOOL_LIMIT: Duration = Duration::from_secs(180);
/// Limits of the files that are copied: an emulated CPU is slow.
const TREE_BYTES_MAX: u64 = 24 << 20;
const TREE_FILES_MAX: usize = 300;
const TREE_SOURCES: [&str; 3] = ["/etc", "/usr/share/doc", "/usr/lib/x86_64-linux-gnu"];
/// mkfs.xfs refuses less than 300 MB. Sparse: it takes what is written.
const IMAGE: &str = "320M";
/// Five rounds are the fewest that give an interval; seven make it narrower.
const ROUNDS: u32 = 7;
const JOBS: [&Job; 3] = [&job::QD1, &job::QD32, &job::SEQ];

/// Runs the demo; its exit code.
pub(crate) fn run(options: &DemoOptions) -> Result<u8> {
    if options.inside {
        return show().map(|()| 0);
    }
    let here = !options.vm && daemon::can_run_here();
    let steps = Steps::start();
    let missing = if here { Vec::new() } else { setup::missing()? };
    println!("{}", announcement(options.kernel.name(), here, &missing));
    if here {
        steps.begin("build");
        let programs = programs::build()?;
        steps.begin("demo");
        let mut again = programs::again(&programs, &["demo", "--inside"])?;
        let (status, _) = sh::tee(&mut again, vm::LIMIT)?;
        return Ok(if status.success() { 0 } else { 1 });
    }
    steps.begin("set up");
    let lab = setup::ensure()?;
    let kernel = lab.kernel(options.kernel)?;
    steps.begin("build");
    let programs = programs::build()?;
    steps.begin(&format!("boot Linux {} in QEMU, about 15 s", kernel.release));
    let machine = Vm::new(kernel, Mode::Smp);
    let status = machine.run(&lab, &programs, "lab demo --inside", &mut vm::to_stdout)?;
    println!("{} s in all.", steps.seconds());
    Ok(u8::try_from(status).unwrap_or(1))
}

/// Says what the demo will do, and for how long. `missing` is what the set-up installs.
fn announcement(kernel: &str, here: bool, missing: &[String]) -> String {
    let build = "  build   loopengine and the lab: several minutes the first time, then seconds";
    let demo = "  demo    serves two instances, makes file systems in images, verifies checksums, gives\n          \
                containers private loop devices, and compares with kernel loop";
    if here {
        let summary = "The demo runs on this machine, which has ublk: about 2 min, more the first time.";
        return [summary, build, demo].join("\n");
    }
    let summary =
        format!("The demo runs in a throw-away VM with Linux {kernel}: about 5 min, more the first time.");
    let set_up = match missing {
        [] => "  set up  nothing is missing".to_owned(),
        _ => format!("  set up  about 2 min: {}", missing.join("; ")),
    };
    let boot = "  boot    a Debian kernel with ublk in QEMU, on emulated CPUs: about 15 s";
    [&summary, &set_up, build, boot, demo].join("\n")
}

fn show() -> Result<()> {
    let start = Instant::now();
    let home = tempfile::Builder::new().prefix("loopengine-demo-").tempdir_in("/run")?;
    let place = home.path().join("store");
    let _store = Store::new(Fs::Xfs, 900, DEFAULTS, &place)?;
    say("store", "XFS on a memory-backed null_blk device holds the images");
    let daemon = Daemon::start(&home.path().join("loopengine"))?;
    for instance in ["red", "blue"] {
        daemon.run(&["instance", "create", instance])?;
    }
    let modes = daemon::io_modes()?;
    say("serve", &format!("instances red and blue; I/O modes of this kernel: {}", modes.join(", ")));

    let tree = home.path().join("tree");
    let (files, bytes) = gather(&tree)?;
    say("tree", &format!("{files} files, {} MB, from {}", bytes >> 20, TREE_SOURCES.join(", ")));
    for (instance, kind) in [("red", "ext4"), ("blue", "xfs")] {
        file_system(&daemon, instance, kind, &place, &tree, home.path())?;
    }

    // Over ublk, private pools need what the I/O mode batch needs: Linux 7.0.
    let over_ublk = modes.iter().any(|mode| mode == "batch").then_some(("ublk", "ublk"));
    // Nothing has loaded the driver yet.
    let has_loop = sh::capture(Command::new("modprobe").arg("loop"), TOOL_LIMIT).is_ok();
    let over_loop = has_loop.then_some(("loop", "the kernel's loop driver"));
    for (backend, title) in over_ublk.into_iter().chain(over_loop) {
        say("private", &format!("private loop devices over {title}"));
        tenants::show(&daemon, &place, backend, |text| say("", text))?;
    }

    say(
        "measure",
        &format!("{ROUNDS} interleaved rounds of {} jobs, about 90 s on emulated CPUs", JOBS.len()),
    );
    let best = modes.first().cloned().context("the kernel supports no I/O mode")?;
    daemon.stop()?;
    let plan = Plan {
        mode: outcome::Mode::Smp,
        rounds: ROUNDS,
        length: Length { ramp_ms: 100, run_ms: 400 },
        jobs: JOBS.into(),
        targets: Some(vec![
            target::RAW.into(),
            job::LOOP.into(),
            format!("loopengine {best}"),
            "loopengine loop".into(),
        ]),
        images: None,
        store_options: DEFAULTS.into(),
        image_mb: 128,
        extras: Extras::default(),
        notes: Default::default(),
        windows: false,
    };
    let raw = home.path().join("raw");
    run::run(&plan, &raw, false)?;
    println!("\n{}", render::brief(&collect::collect(&raw)?));
    if std::env::var_os("LAB_VM").is_some() {
        println!("These CPUs are emulated: ratios are meaningful, absolute rates are not.");
    }
    println!("All checks passed, {} s.", start.elapsed().as_secs());
    Ok(())
}

/// Makes a file system in an image, fills and checks it, and checks it again after a reattach.
fn file_system(
    daemon: &Daemon,
    instance: &str,
    kind: &str,
    place: &Path,
    tree: &Path,
    home: &Path,
) -> Result<()> {
    let image = place.join(format!("{kind}.img"));
    let mount = home.join(kind);
    fs::create_dir(&mount)?;
    sh::capture(Command::new("loopengine").arg("create").arg(&image).args(["--size", IMAGE]), TOOL_LIMIT)?;
    let device = daemon.attach(&image, &["--instance", instance])?;
    say("attach", &format!("{} is {}", image.display(), device.display()));
    let mkfs = format!("mkfs.{kind}");
    tool(&mkfs, &["-q"], &device)?;
    {
        let _mounted = Mounted::new(&device, &mount, "rw")?;
        sh::capture(Command::new("cp").arg("-a").arg(tree.join(".")).arg(&mount), TOOL_LIMIT)?;
        sums(tree, &mount)?;
    }
    check(kind, &device)?;
    say(kind, "mkfs, mount, copy, checksums, umount and fsck succeeded");
    daemon.detach(&device)?;
    let device = daemon.attach(&image, &["--instance", instance])?;
    {
        let _mounted = Mounted::new(&device, &mount, "ro")?;
        sums(tree, &mount)?;
    }
    check(kind, &device)?;
    daemon.detach(&device)?;
    say(kind, "detached and attached again: checksums and fsck succeeded");
    fs::remove_file(&image).with_context(|| format!("cannot remove {}", image.display()))
}

fn check(kind: &str, device: &Path) -> Result<()> {
    match kind {
        "ext4" => tool("e2fsck", &["-f", "-n"], device),
        _ => tool("xfs_repair", &["-n"], device),
    }
}

fn tool(program: &str, words: &[&str], device: &Path) -> Result<()> {
    sh::capture(Command::new(sh::which(program)?).args(words).arg(device), TOOL_LIMIT).map(drop)
}

/// Verifies the files of `copy` against the checksums of `tree`.
fn sums(tree: &Path, copy: &Path) -> Result<()> {
    let mut check = Command::new("sha256sum");
    check.args(["--check", "--quiet", "--strict"]).arg(tree.with_extension("sums")).current_dir(copy);
    sh::capture(&mut check, TOOL_LIMIT).map(drop)
}

/// A mounted file system; dropping it unmounts it.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, directory: &Path, options: &str) -> Result<Mounted> {
        let mut mount = Command::new("mount");
        sh::capture(mount.args(["-o", options]).arg(device).arg(directory), TOOL_LIMIT)?;
        Ok(Mounted(directory.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = sh::capture(Command::new("umount").arg(&self.0), TOOL_LIMIT) {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Copies some files of this system to `tree` and writes their checksums; returns their number and
/// size.
fn gather(tree: &Path) -> Result<(usize, u64)> {
    let (mut files, mut bytes) = (Vec::new(), 0);
    for (index, source) in TREE_SOURCES.iter().enumerate() {
        // Each source gets an equal share, plus what the sources before it left over.
        let share = |whole: u64| whole * (index as u64 + 1) / TREE_SOURCES.len() as u64;
        let (count_max, bytes_max) = (share(TREE_FILES_MAX as u64) as usize, share(TREE_BYTES_MAX));
        walk(Path::new(source), &mut |file, size| {
            if files.len() < count_max && bytes + size <= bytes_max {
                files.push(file.to_owned());
                bytes += size;
            }
            files.len() < count_max && bytes < bytes_max
        });
    }
    if files.is_empty() {
        bail!("found no file to copy in {}", TREE_SOURCES.join(", "));
    }
    for file in &files {
        let copy = tree.join(file.strip_prefix("/").unwrap_or(file));
        fs::create_dir_all(copy.parent().unwrap_or(tree))?;
        fs::copy(file, &copy).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let names = files.iter().map(|file| file.strip_prefix("/").unwrap_or(file));
    let sums = sh::capture(Command::new("sha256sum").arg("--").args(names).current_dir(tree), TOOL_LIMIT)?;
    fs::write(tree.with_extension("sums"), sums)?;
    Ok((files.len(), bytes))
}

/// Calls `visit` with the readable regular files under `directory` until it returns false.
fn walk(directory: &Path, visit: &mut dyn FnMut(&Path, u64) -> bool) -> bool {
    let mut entries: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(meta) = entry.path().symlink_metadata() else { continue };
        let go_on = if meta.is_dir() {
            walk(&entry.path(), visit)
        } else if meta.is_file() && meta.len() > 0 && fs::File::open(entry.path()).is_ok() {
            visit(&entry.path(), meta.len())
        } else {
            true
        };
        if !go_on {
            return false;
        }
    }
    true
}

fn say(what: &str, text: &str) {
    println!("  {what:<9}{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announces_what_it_installs_builds_and_boots() {
        let text = announcement("7", false, &["installs fio".to_owned()]);
        for part in ["Linux 7", "about 5 min", "set up  about 2 min: installs fio", "  boot  ", "  build "] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let here = announcement("7", true, &[]);
        assert!(here.contains("this machine") && !here.contains("boot"), "{here}");
    }

    #[test]
    fn a_walk_sees_regular_files_and_stops_when_told() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("sub")).unwrap();
        for name in ["a", "sub/b", "z"] {
            fs::write(home.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("a", home.path().join("link")).unwrap();
        let mut seen = Vec::new();
        walk(home.path(), &mut |file, _| {
            seen.push(file.strip_prefix(home.path()).unwrap().to_owned());
            seen.len() < 2
        });
        assert_eq!(seen, [Path::new("a"), Path::new("sub/b")]);
    }
}
