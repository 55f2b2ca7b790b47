// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The requirements of one purpose, for the user who asks.
//!
//! Checks from the kernel upwards, and gives no advice above a missing requirement. Tests pools by
//! opening one, which ends at once.

use std::fs;
use std::path::Path;

use super::Check;
use crate::cli::daemon;
use crate::cli::fuse_drivers::is_installed;
use crate::cli::mount;
use crate::control::{OCI_SOCKET, PrivateClient};
use crate::error::{Error, Kind, Result};
use crate::kernels::{self, BLOCK_DEVICES, Feature, PRIVATE};
use crate::private::OpenSpec;

/// A purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Goal {
    /// 'loopengine run': run a command with private loop devices.
    Run,
    /// 'loopengine mount': mount the file system in an image.
    Mount,
    /// Podman containers with private loop devices.
    Podman,
    /// Kubernetes pods with private loop devices.
    Kubernetes,
}

/// All checks for these purposes.
pub(super) fn checks(goals: &[Goal], run_dir: &Path) -> Vec<Check> {
    checks_on(&kernels::release(), goals, run_dir, || try_pool(run_dir))
}

/// All checks on a kernel of this release. `open_pool` opens a pool, unless the kernel is broken:
/// the daemon adds a device for it, which would crash the driver.
pub(super) fn checks_on(
    release: &str,
    goals: &[Goal],
    run_dir: &Path,
    open_pool: impl FnOnce() -> Result<()>,
) -> Vec<Check> {
    if let Some(fault) = super::driver_fault(release) {
        return vec![fault];
    }
    let pool = open_pool();
    // A working pool needs no version check: distributions backport features.
    if pool.is_err()
        && let Some(missing) = missing(&PRIVATE)
    {
        return vec![missing];
    }
    let root = rustix::process::geteuid().is_root();
    let mut checks = vec![Check::ok(PRIVATE.name, supported(&PRIVATE)), daemon_and_pool(pool)];
    for goal in goals {
        let more = match goal {
            Goal::Run | Goal::Mount if root => vec![],
            Goal::Run => vec![user_namespaces(), fuse_drivers()],
            Goal::Mount => vec![fuse_drivers()],
            Goal::Podman if root => vec![podman(), runtime(), oci_socket(run_dir)],
            Goal::Kubernetes if root => vec![oci_socket(run_dir), kubernetes()],
            Goal::Podman | Goal::Kubernetes => vec![not_for_users()],
        };
        let more: Vec<_> = more.into_iter().filter(|check| !checks.contains(check)).collect();
        checks.extend(more);
    }
    checks
}

/// One check per kernel feature.
pub(super) fn features() -> Vec<Check> {
    let line = |feature: &Feature| match feature.missing() {
        None => Check::ok(feature.name, supported(feature)),
        Some(_) => {
            let advice = format!("boot Linux {} or newer to use: {}", feature.version(), feature.by);
            Check::warning(feature.name, needs(feature), advice)
        }
    };
    kernels::ALL.iter().map(line).collect()
}

fn supported(feature: &Feature) -> String {
    format!("Linux {} supports them (since {})", kernels::release(), feature.version())
}

fn needs(feature: &Feature) -> String {
    format!("need Linux {}: this is {}", feature.version(), kernels::release())
}

fn missing(feature: &Feature) -> Option<Check> {
    feature.missing()?;
    let root = rustix::process::geteuid().is_root();
    let advice = match BLOCK_DEVICES.missing() {
        None if root => "boot a newer kernel; with this one, root can run 'loopengine attach IMAGE'",
        Some(_) if root => "boot a newer kernel; this one supports 'loopengine serve --backend loop'",
        _ if is_installed("fuse2fs") && mount::check_fuse().is_ok() => {
            "use 'loopengine mount IMAGE DIR', which works with this kernel and a FUSE driver"
        }
        _ => "have root boot a newer kernel; with this one only root can attach images",
    };
    Some(Check::problem(feature.name, needs(feature), advice))
}

/// Opens a pool of one device, which ends when its detached mounts are closed.
fn try_pool(run_dir: &Path) -> Result<()> {
    daemon::runtime()?.block_on(async {
        let mut client = PrivateClient::connect(run_dir).await?;
        client.open(&OpenSpec { max: Some(1), ..OpenSpec::default() }).await.map(drop)
    })
}

fn daemon_and_pool(pool: Result<()>) -> Check {
    let name = "pool";
    match pool {
        Ok(()) => Check::ok(name, "the daemon opens pools for this user"),
        Err(error) => {
            let advice = match error.kind() {
                Kind::Unavailable if !rustix::process::geteuid().is_root() => {
                    "have root start the daemon ('systemctl start loopengine')"
                }
                Kind::Quota => "end a pool ('loopengine list' lists them), or have root raise the limit",
                _ => error.next_step().unwrap_or("read the log of the daemon"),
            };
            Check::problem(name, error.message(), advice)
        }
    }
}

fn user_namespaces() -> Check {
    let name = "user namespaces";
    // Settings of Debian, AppArmor and the kernel. A missing setting forbids nothing.
    let forbidden = [
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ];
    let set_to = |setting: &str| fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/"))).ok();
    match forbidden.iter().find(|(setting, no, _)| set_to(setting).is_some_and(|value| value.trim() == *no)) {
        None => Check::ok(name, "plain users can create them"),
        Some((setting, no, yes)) => Check::problem(
            name,
            format!("{setting} is {no}"),
            format!("have root run 'sysctl {setting}={yes}'"),
        ),
    }
}

fn fuse_drivers() -> Check {
    let name = "FUSE";
    if let Err(error) = mount::check_fuse() {
        return from(name, &error);
    }
    let present: Vec<&str> =
        ["fuse2fs", "squashfuse"].into_iter().filter(|program| is_installed(program)).collect();
    match present.is_empty() {
        true => Check::warning(
            name,
            "no FUSE driver (fuse2fs, squashfuse) is installed",
            "have root run 'apt install fuse2fs squashfuse', or give another driver with --fuse FS=PROGRAM",
        ),
        false => Check::ok(name, format!("{} can mount for this user", present.join(" and "))),
    }
}

fn from(name: &str, error: &Error) -> Check {
    Check::problem(name, error.message(), error.next_step().unwrap_or("read the log of the system"))
}

fn podman() -> Check {
    match is_installed("podman") {
        true => Check::ok("podman", "is installed"),
        false => Check::problem("podman", "is not installed", "run 'apt install podman'"),
    }
}

fn runtime() -> Check {
    let present: Vec<&str> = ["crun", "runc"].into_iter().filter(|program| is_installed(program)).collect();
    match present.is_empty() {
        true => Check::problem("runtime", "neither crun nor runc is installed", "run 'apt install crun'"),
        false => Check::ok("runtime", present.join(" and ")),
    }
}

fn oci_socket(run_dir: &Path) -> Check {
    let socket = run_dir.join(OCI_SOCKET);
    let shown = socket.display();
    match socket.exists() {
        true => Check::ok("runtime's socket", format!("{shown} exists; see 'loopengine oci --help'")),
        false => Check::problem("runtime's socket", format!("{shown} is missing"), "restart the daemon"),
    }
}

fn not_for_users() -> Check {
    let advice = "as this user, use 'loopengine run -- CMD' instead of a container";
    Check::problem("containers", "only root can create pools for containers", advice)
}

fn kubernetes() -> Check {
    let advice = "prefer Podman, runc or crun ('loopengine doctor --for podman')";
    Check::warning("pods", "loopengine is not tested with a kubelet, and has no device plugin", advice)
}
