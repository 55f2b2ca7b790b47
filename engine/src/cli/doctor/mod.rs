// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine doctor`: diagnose this machine.
//!
//! This file checks the requirements of the daemon, for root; `goal` checks those of one purpose or
//! of a plain user.

mod goal;

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::broken_kernels;
use crate::control::reason;
use crate::error::{Error, Kind, Result};
use crate::frontend::{fuse, kernel_loop, ublk::CONTROL_NODE as UBLK_CONTROL};
use crate::instance::Engine;
use crate::instance::spec::BackendKind;
use crate::kernels::{self, BLOCK_DEVICES, NO_COPYING};

use goal::Goal;

use super::backend_choice::driver_hint;
use super::{daemon, out};

/// A lower limit does not suffice for a thousand devices.
const FILES_MIN: u64 = 8192;

/// Diagnose this machine.
///
/// Prints one line per check: 'ok', 'warning' or 'problem', and the finding. Below it, prints the
/// next step. Exits with 1 if a check finds a problem. As root, checks the requirements of the
/// daemon; as a plain user, the same as '--for run' and '--for mount'.
#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// Check whether images at this path support direct I/O.
    path: Option<PathBuf>,

    /// Check only the requirements of this purpose. Opens a private pool as a test.
    #[arg(long = "for", value_name = "PURPOSE")]
    goal: Option<Goal>,

    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// No action needed.
    Ok,
    /// Works with restrictions, or will work later.
    Warning,
    /// Does not work.
    Problem,
}

/// One check of 'loopengine doctor'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct Check {
    /// Subject of the check.
    pub(crate) name: String,
    /// Result.
    pub(crate) verdict: Verdict,
    /// Finding.
    pub(crate) found: String,
    /// Next step. Absent if none is needed.
    pub(crate) advice: Option<String>,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Check {
        Check { name: name.into(), verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn bad(verdict: Verdict, name: &str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        let advice = Some(advice.into());
        Check { name: name.into(), verdict, found: found.into(), advice }
    }

    fn warning(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check::bad(Verdict::Warning, name, found, advice)
    }

    fn problem(name: &str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check::bad(Verdict::Problem, name, found, advice)
    }
}

impl DoctorArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let mut checks = match self.goal {
            Some(goal) => goal::checks(&[goal], run_dir),
            None if rustix::process::geteuid().is_root() => daemon_checks(run_dir),
            None => goal::checks(&[Goal::Run, Goal::Mount], run_dir),
        };
        if let Some(path) = &self.path {
            checks.push(direct_io(path)?);
        }
        if self.json {
            out::json(&checks)?;
        } else {
            out::print(&text(&checks))?;
        }
        Ok(u8::from(checks.iter().any(|check| check.verdict == Verdict::Problem)))
    }
}

fn daemon_checks(run_dir: &Path) -> Vec<Check> {
    let mut checks = vec![driver()];
    checks.extend(driver_fault(&kernels::release()));
    checks.extend([permission(), io_uring(), features()]);
    checks.extend(goal::features());
    let (daemon, running) = daemon(run_dir);
    checks.push(daemon);
    match running {
        None => checks.push(open_files(None)),
        // The limits of another process are not those of the daemon.
        Some(Daemon { pid: None, .. }) => {}
        Some(Daemon { pid: Some(pid), backends }) => {
            checks.extend([open_files(Some(pid)), mount_namespace(pid, &backends)]);
        }
    }
    checks
}

fn text(checks: &[Check]) -> String {
    let mut text = String::new();
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0).max(16);
    for check in checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Problem => "problem",
        };
        text.push_str(&format!("{verdict:<8} {:<width$} {}\n", check.name, check.found));
        if let Some(advice) = &check.advice {
            text.push_str(&format!("{:<indent$} -> {advice}\n", "", indent = width + 9));
        }
    }
    text
}

fn driver() -> Check {
    let name = "driver";
    if Path::new(UBLK_CONTROL).exists() {
        return Check::ok(name, format!("ublk_drv is loaded, {UBLK_CONTROL} exists"));
    }
    if Path::new("/sys/module/ublk_drv").exists() {
        let found = format!("ublk_drv is loaded, but {UBLK_CONTROL} is missing");
        return Check::problem(name, found, "make the node visible here; pass it into the container");
    }
    match (kernel_loop::check(), fuse::check()) {
        (Ok(()), _) => {
            let found = "ublk_drv is not loaded: the daemon uses the kernel's loop driver";
            Check::warning(name, found, driver_hint())
        }
        (_, Ok(())) => {
            let found = "ublk_drv is not loaded: the daemon serves files (FUSE), not block devices";
            Check::warning(name, found, format!("{}, or run 'modprobe loop'", driver_hint()))
        }
        _ => {
            let advice = format!("{}; or run 'modprobe loop', or 'modprobe fuse' for files", driver_hint());
            Check::problem(name, "neither ublk_drv nor the loop driver nor FUSE is available", advice)
        }
    }
}

/// The fault of the ublk driver of this release, if one is known.
fn driver_fault(release: &str) -> Option<Check> {
    let broken = broken_kernels::find(release)?;
    let advice = format!("{}; until then, 'loopengine serve --backend loop'", broken.next_kernel());
    Some(Check::problem("driver fault", broken.sentence(release), advice))
}

fn permission() -> Check {
    let name = "permission";
    match open(UBLK_CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Check::ok(name, format!("root can open {UBLK_CONTROL}")),
        Err(rustix::io::Errno::NOENT) => Check::ok(name, "this user is root"),
        Err(error) => {
            let found = format!("root cannot open {UBLK_CONTROL}: {}", reason(&error.into()));
            Check::problem(name, found, "allow the device in this container or security policy")
        }
    }
}

fn io_uring() -> Check {
    let name = "io_uring";
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    if disabled.trim() == "2" {
        let advice = "run 'sysctl kernel.io_uring_disabled=0'";
        return Check::problem(name, "disabled for all users", advice);
    }
    match tokio_uring::Runtime::new(tokio_uring::builder().entries(2)) {
        Ok(_) => Check::ok(name, "works"),
        Err(error) if disabled.trim() == "1" => {
            let found = format!("disabled for this user: {}", reason(&error));
            Check::warning(name, found, "run the daemon as root")
        }
        Err(error) => {
            let advice = "allow io_uring in this container or security policy (seccomp)";
            Check::problem(name, format!("does not work: {}", reason(&error)), advice)
        }
    }
}

fn features() -> Check {
    let name = "I/O modes";
    match Engine::features() {
        Ok(features) if features.io_modes.is_empty() && !features.backends.is_empty() => {
            let words: Vec<&str> = features.backends.iter().map(|backend| backend.as_str()).collect();
            Check::ok(name, format!("{} (kernel {})", words.join(" "), features.kernel))
        }
        Ok(features) if features.io_modes.is_empty() => {
            let found = format!("none is supported by kernel {}", features.kernel);
            let (works, faster) = (BLOCK_DEVICES.version(), NO_COPYING.version());
            Check::problem(
                name,
                found,
                format!("use Linux {works} or newer; {faster} or newer avoids copies"),
            )
        }
        Ok(features) => {
            let words: Vec<&str> = features.io_modes.iter().map(|mode| mode.as_str()).collect();
            let found = format!("{} (kernel {})", words.join(" "), features.kernel);
            match words.len() {
                1 => {
                    let advice = format!("use Linux {} or newer to avoid copies", NO_COPYING.version());
                    Check::warning(name, found, advice)
                }
                _ => Check::ok(name, found),
            }
        }
        Err(error) => {
            let advice = error.next_step().unwrap_or("see the check 'driver'").to_owned();
            Check::problem(name, format!("unknown: {}", error.message()), advice)
        }
    }
}

/// A daemon that answers.
struct Daemon {
    /// Its process. `None` in another PID namespace.
    pid: Option<i32>,
    backends: Vec<BackendKind>,
}

/// Also returns the daemon, if it answers.
fn daemon(run_dir: &Path) -> (Check, Option<Daemon>) {
    let name = "daemon";
    let asked = daemon::ask(run_dir, async |client| client.instances().await);
    // A connection that starts the daemon has the service manager as its peer, a later one the
    // daemon.
    let asked = asked.and_then(|instances| {
        daemon::ask(run_dir, async |client| Ok(client.daemon_pid())).map(|pid| (instances, pid))
    });
    match asked {
        Ok((instances, pid)) => {
            let devices: u32 = instances.iter().map(|instance| instance.devices).sum();
            let process = match pid {
                Some(pid) => format!("process {pid}"),
                None => "a process of another PID namespace".into(),
            };
            let mut backends: Vec<_> = instances.iter().map(|instance| instance.backend).collect();
            backends.sort_by_key(|backend| backend.as_str());
            backends.dedup();
            let kinds = backends.iter().map(|backend| backend.as_str()).collect::<Vec<_>>().join(" and ");
            let count = instances.len();
            let found =
                format!("{process} serves {count} instances with {devices} devices (backend {kinds})");
            (Check::ok(name, found), Some(Daemon { pid, backends }))
        }
        Err(error) => {
            let advice = error.next_step().unwrap_or("read the log of the daemon").to_owned();
            // A daemon that does not run is no problem yet.
            let verdict = match error.kind() {
                Kind::Unavailable => Verdict::Warning,
                _ => Verdict::Problem,
            };
            (Check::bad(verdict, name, error.message(), advice), None)
        }
    }
}

/// The limit of the daemon if it runs, else of this process.
fn open_files(daemon: Option<i32>) -> Check {
    let name = "open files";
    let limit = daemon.and_then(limit_of).or_else(|| getrlimit(Resource::Nofile).maximum);
    match limit {
        None => Check::ok(name, "no limit"),
        Some(limit) if limit >= FILES_MIN => Check::ok(name, format!("up to {limit}")),
        Some(limit) => {
            let advice = format!("raise it to {FILES_MIN} (LimitNOFILE= of the service, 'ulimit -Hn')");
            Check::warning(name, format!("up to {limit}: too few for a thousand devices"), advice)
        }
    }
}

/// The hard limit of another process: the fifth column in proc(5).
fn limit_of(pid: i32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(4)?.parse().ok()
}

/// A daemon of ublk devices always has a mount namespace of its own, because it could not write
/// back what is mounted there when it stops.
fn mount_namespace(daemon: i32, backends: &[BackendKind]) -> Check {
    let name = "mount namespace";
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    match (of("self"), of(&daemon.to_string())) {
        (Ok(own), Ok(its)) if own != its => Check::ok(name, "the daemon has a mount namespace of its own"),
        (Ok(_), Ok(_)) if backends.contains(&BackendKind::Fuse) => {
            Check::ok(name, "the daemon shares it, so that users see its files")
        }
        (Ok(_), Ok(_)) if !backends.contains(&BackendKind::Ublk) => {
            Check::ok(name, "the daemon shares it; the kernel serves its devices")
        }
        (Ok(_), Ok(_)) => Check::warning(
            name,
            "this process has entered that of the daemon, as nsenter does, and 'podman exec' if the \
             daemon is the first process of the container",
            "do not mount its devices here, because the daemon would hang when it stops; mount them on \
             the host or in another container",
        ),
        (Err(error), _) | (_, Err(error)) => {
            let found = format!("cannot compare: {}", reason(&error));
            Check::warning(name, found, "run this as root, in the PID namespace of the daemon")
        }
    }
}

/// Checks whether files at `path` (a file, a device, or a directory for files) support direct I/O.
fn direct_io(path: &Path) -> Result<Check> {
    let name = "direct I/O";
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| Error::os(error, format!("cannot access {shown}")))?;
    let flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    let probe = if meta.is_dir() {
        // A directory has no direct I/O; test an unnamed file in it.
        open(path, flags | OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR | Mode::WUSR)
    } else {
        open(path, flags | OFlags::RDONLY, Mode::empty())
    };
    let probe = match probe {
        Ok(probe) => probe,
        Err(error) => {
            let found = format!("cannot test {shown}: {}", reason(&error.into()));
            return Ok(Check::warning(name, found, "give the path of an image"));
        }
    };
    let known = statx(&probe, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let known = known.filter(|known| known.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let advice = "attach with --buffered, or keep images on XFS, ext4 or btrfs";
    Ok(match known {
        Some(known) if known.stx_dio_offset_align > 0 => {
            let (offset, memory) = (known.stx_dio_offset_align, known.stx_dio_mem_align);
            let found = format!("{shown}: needs offsets aligned to {offset}, memory to {memory}");
            match offset {
                ..=4096 => Check::ok(name, found),
                _ => Check::problem(name, found, advice),
            }
        }
        Some(_) => Check::problem(name, format!("{shown} does not support it"), advice),
        None => {
            let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&probe));
            let direct = rustix::fs::openat(CWD, again, flags | OFlags::DIRECT, Mode::empty());
            match direct {
                Ok(_) => {
                    Check::ok(name, format!("{shown} supports it; the kernel does not report its alignment"))
                }
                Err(_) => Check::problem(name, format!("{shown} does not support it"), advice),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_kernel_is_a_problem_with_the_next_step() {
        let check = driver_fault("6.17.0-1016-azure").unwrap();
        assert_eq!(check.verdict, Verdict::Problem);
        assert!(check.found.contains("6.17.0-1016-azure"), "{}", check.found);
        let advice = check.advice.unwrap();
        assert!(advice.contains("newer kernel") && advice.contains("--backend loop"), "{advice}");
        assert!(driver_fault("6.17.0-1019-azure").is_none());
    }

    #[test]
    fn opens_no_pool_on_a_broken_kernel() {
        let opens = || unreachable!("the daemon would add a device");
        let checks = goal::checks_on("6.18.4", &[Goal::Run], Path::new("/nonexistent"), opens);
        assert!(matches!(&checks[..], [only] if only.name == "driver fault"), "{checks:?}");
    }
}
