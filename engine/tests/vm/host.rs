// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The machine: whether cases can run here, the features of its kernel, and the kernel's log.
//!
//! Knows /proc, /sys, the kernel's log and `loopengine features`. Knows no case.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use crate::harness::{At, Needs, Res, Stop, fail, skip};
use crate::tools;

pub(crate) use crate::SCRATCH;

/// Programs that cases start many times. Not fio: copying its many libraries takes as long as
/// loading them each time.
const TOOLS: [&str; 20] = [
    "bash",
    "blkdiscard",
    "blockdev",
    "cat",
    "cmp",
    "dd",
    "dmesg",
    "e2fsck",
    "losetup",
    "ls",
    "mkfs.ext4",
    "mkfs.xfs",
    "mount",
    "rm",
    "setpriv",
    "sleep",
    "stat",
    "tr",
    "truncate",
    "umount",
];

/// Features, probed once before the first case.
#[derive(Debug)]
pub(crate) struct Host {
    /// The program under test, copied to memory: the lab's shared root is slow.
    pub(crate) program: String,
    /// I/O modes that work here.
    pub(crate) io_modes: Vec<String>,
    /// Whether devices can be resized.
    pub(crate) resize: bool,
    /// Whether devices outlive the daemon.
    pub(crate) recovery: bool,
    /// Whether disks can be bound in place, which private loop devices need.
    pub(crate) private: bool,
    /// Whether cases run at full length, and not at the everyday one.
    pub(crate) full: bool,
}

impl Host {
    /// The machine, or why no case can run on it.
    pub(crate) fn get() -> Res<&'static Host> {
        static HOST: OnceLock<Res<Host>> = OnceLock::new();
        HOST.get_or_init(Host::probe).as_ref().map_err(Stop::clone)
    }

    fn probe() -> Res<Host> {
        if !rustix::process::geteuid().is_root() {
            skip!("needs root; run 'cargo lab test'");
        }
        if crate::BACKEND != "ublk" {
            return Host::probe_without_ublk();
        }
        let allowed = std::env::var_os("LOOPENGINE_VM_CASES").is_some_and(|v| v == "1");
        if !is_virtual() && !allowed {
            skip!("not in the lab's VM; run 'cargo lab test', or set LOOPENGINE_VM_CASES=1");
        }
        if tools::run(&["modprobe", "ublk_drv"])?.code != 0 || !Path::new("/dev/ublk-control").exists() {
            skip!("this kernel has no ublk: /dev/ublk-control is missing");
        }
        tools::sh("modprobe -a xfs ext4 && modprobe null_blk nr_devices=0").at("kernel modules")?;
        if !Path::new("/sys/kernel/config/nullb").exists() {
            tools::ok(&["mount", "-t", "configfs", "none", "/sys/kernel/config"])?;
        }
        let program = copy_program()?;
        if is_virtual() {
            tools::copy_to_memory(&[&TOOLS[..], &[&program]].concat(), SCRATCH)?;
        }
        let done = tools::run(&[&program, "features", "--json"])?.ok()?;
        let features: Value = serde_json::from_str(&done.out).at("features --json")?;
        let Some(io_modes) = features["ioModes"].as_array() else {
            fail!("features --json has no ioModes: {}", done.out);
        };
        let host = Host {
            program,
            io_modes: io_modes.iter().filter_map(|p| p.as_str().map(String::from)).collect(),
            resize: features["resize"] == true,
            recovery: features["recovery"] == true,
            private: ["UPDATE_SIZE", "SAFE_STOP_DEV"].iter().all(|flag| has_flag(&features, flag)),
            full: std::env::var_os("LOOPENGINE_VM_FULL").is_some_and(|v| v == "1"),
        };
        eprintln!("{host:?}");
        Ok(host)
    }

    /// The other backends need fewer features, and no VM.
    fn probe_without_ublk() -> Res<Host> {
        for (node, module) in [("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")] {
            if !Path::new(node).exists() && tools::run(&["modprobe", module]).is_err() {
                skip!("{node} is missing");
            }
            if !Path::new(node).exists() {
                skip!("{node} is missing");
            }
        }
        for tool in ["fio", "mkfs.ext4", "e2fsck", "losetup"] {
            if tools::run(&["sh", "-c", &format!("command -v {tool}")])?.code != 0 {
                skip!("the program {tool} is not installed");
            }
        }
        let Some(program) =
            std::env::var("LOOPENGINE").ok().or(option_env!("CARGO_BIN_EXE_loopengine").map(String::from))
        else {
            fail!("LOOPENGINE is not set");
        };
        std::fs::create_dir_all(SCRATCH)?;
        // Cases run it as other users, who may not reach the source tree.
        let (new, copy) =
            (format!("{SCRATCH}/loopengine.{}", std::process::id()), format!("{SCRATCH}/loopengine"));
        std::fs::copy(&program, &new).at(format!("copy {program}"))?;
        std::fs::rename(&new, &copy).at(&copy)?;
        let program = copy;
        let full = std::env::var_os("LOOPENGINE_VM_FULL").is_some_and(|v| v == "1");
        Ok(Host {
            program,
            io_modes: vec![crate::BACKEND.into()],
            resize: true,
            recovery: crate::BACKEND == "loop",
            private: crate::BACKEND == "loop" && !release_before(6, 9),
            full,
        })
    }

    /// Skips a case if the kernel does not meet its needs.
    pub(crate) fn meets(&self, needs: Needs) -> Res {
        match needs {
            Needs::IoMode(io_mode) | Needs::Recovery(io_mode)
                if !self.io_modes.iter().any(|p| p == io_mode) =>
            {
                skip!("this kernel does not grant I/O mode '{io_mode}'")
            }
            Needs::Recovery(_) if !self.recovery => skip!("this kernel grants no recovery"),
            Needs::Private if !self.private => {
                skip!("private loop devices need Linux 7.0 for ublk, 6.9 for the kernel's loop driver")
            }
            Needs::Resize if !self.resize => skip!("this kernel does not resize ublk devices"),
            _ => Ok(()),
        }
    }
}

/// Whether this is a VM of the lab, whose CPUs are emulated.
pub(crate) fn is_virtual() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("virtme"))
}

fn has_flag(features: &Value, flag: &str) -> bool {
    features["flags"].as_array().is_some_and(|flags| flags.iter().any(|name| name == flag))
}

fn copy_program() -> Res<String> {
    let given = match std::env::var("LOOPENGINE") {
        Ok(path) => path,
        Err(_) => tools::ok(&["sh", "-c", "command -v loopengine"])
            .at("no program 'loopengine' on PATH, and LOOPENGINE is not set")?,
    };
    std::fs::create_dir_all(SCRATCH)?;
    if given.starts_with("/run/") {
        return Ok(given);
    }
    let copy = format!("{SCRATCH}/loopengine");
    std::fs::copy(&given, &copy).at(format!("copy {given}"))?;
    Ok(copy)
}

/// Whether the kernel is older than this release.
fn release_before(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    (numbers.next().unwrap_or(u32::MAX), numbers.next().unwrap_or(u32::MAX)) < (major, minor)
}

/// Numbers of the kernel's bound loop devices from the first of `serve --backend loop` on.
pub(crate) fn loop_numbers() -> Vec<u32> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let bound = entries.filter(|disk| disk.path().join("loop/backing_file").exists());
    let numbers = bound.filter_map(|disk| disk.file_name().to_str()?.strip_prefix("loop")?.parse().ok());
    numbers.filter(|number| *number >= 1 << 15).collect()
}

/// Numbers of the existing ublk devices, under any of the kernel's names.
pub(crate) fn ublk_ids() -> Vec<u32> {
    let mut ids = BTreeSet::new();
    for (folder, prefix) in
        [("/sys/block", "ublkb"), ("/sys/class/ublk-char", "ublkc"), ("/dev", "ublkc"), ("/dev", "ublkb")]
    {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            ids.extend(name.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok()));
        }
    }
    ids.into_iter().collect()
}

fn marker(case: &str) -> String {
    format!("loopengine case {case} begins")
}

/// Writes a line to the kernel's log, which starts the part of this case.
pub(crate) fn mark_kernel_log(case: &str) {
    if let Ok(mut log) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = writeln!(log, "{}", marker(case));
    }
}

fn since_marker<'a>(log: &'a str, case: &str) -> &'a str {
    log.rfind(&marker(case)).map_or(log, |at| &log[at..])
}

fn kernel_log() -> String {
    tools::ok(&["dmesg"]).unwrap_or_default()
}

/// The kernel's log since a case began.
pub(crate) fn kernel_log_since(case: &str) -> String {
    since_marker(&kernel_log(), case).to_owned()
}

/// The kernel's warnings about itself since a case began.
pub(crate) fn kernel_complaints(case: &str) -> Vec<String> {
    const BAD: [&str; 7] =
        ["BUG:", "WARNING:", "Oops", "general protection", "blocked for more than", "refcount_t:", "stall"];
    // Emulated CPUs stall when their host is busy; the kernel then warns of its clock and timers,
    // which we do not touch. Possible hangs of ours, such as a soft lockup, still count.
    const OF_EMULATED_TIME: [&str; 3] = ["clocksource", "rcu_preempt", "WARNING: kernel/time/"];
    let log = kernel_log();
    since_marker(&log, case)
        .lines()
        .filter(|line| BAD.iter().any(|bad| line.contains(bad)))
        .filter(|line| !OF_EMULATED_TIME.iter().any(|doubt| line.contains(doubt)))
        .take(5)
        .map(String::from)
        .collect()
}

/// Prints the last lines of the kernel's log since a case began.
pub(crate) fn print_kernel_log(case: &str, lines: usize) {
    let log = kernel_log();
    let since = since_marker(&log, case);
    eprintln!("--- kernel log\n{}", tools::tail(since, lines));
}

/// Prints the ends of the logs in a case's directory.
pub(crate) fn print_logs(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "log") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            eprintln!("--- {}\n{}", path.display(), tools::tail(&text, 40));
        }
    }
}

/// Prints the kernel stacks of all threads of the case's processes, and of all threads in
/// uninterruptible sleep.
pub(crate) fn print_stuck() {
    let ours = tools::running();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        let tasks = std::fs::read_dir(entry.path().join("task"));
        for task in tasks.into_iter().flatten().flatten() {
            print_thread(&task.path(), ours.contains(&pid));
        }
    }
}

fn print_thread(task: &Path, ours: bool) {
    let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
    let stat = read("stat");
    let state = stat.rsplit(')').next().unwrap_or("").trim();
    if ours || state.starts_with('D') {
        let (comm, wchan) = (read("comm"), read("wchan"));
        let stack = read("stack").replace('\n', " ");
        let state = state.chars().next().unwrap_or('?');
        eprintln!("{} {} {state} in {wchan}: {stack}", task.display(), comm.trim());
    }
}
