//! What a machine needs for one purpose, and what of it is there for the user who asks.
//!
//! From the kernel upwards: what cannot help yet, because something below it is missing, is not advised. Whether
//! there can be a pool is not guessed: one is opened, and ends at once.

use std::fs;
use std::path::Path;

use super::Check;
use crate::cli::daemon;
use crate::cli::fuse::is_here;
use crate::cli::mount;
use crate::control::{OCI_SOCKET, PrivateClient};
use crate::error::{Error, Kind, Result};
use crate::kernels::{self, BLOCK_DEVICES, Feature, PRIVATE};
use crate::private::OpenSpec;

/// A purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Goal {
    /// 'loopengine run': a command with loop devices of its own.
    Run,
    /// 'loopengine mount': the file system in an image.
    Mount,
    /// Containers of Podman with loop devices of their own.
    Podman,
    /// Pods with loop devices of their own.
    Kubernetes,
}

/// All that these purposes need.
pub(super) fn checks(goals: &[Goal], run_dir: &Path) -> Vec<Check> {
    let pool = try_pool(run_dir);
    // A pool that is there needs no release: a distribution may have added to its kernel.
    if pool.is_err()
        && let Some(missing) = missing(&PRIVATE)
    {
        return vec![missing];
    }
    let root = rustix::process::geteuid().is_root();
    let mut checks = vec![Check::ok(PRIVATE.name, there(&PRIVATE)), daemon_and_pool(pool)];
    for goal in goals {
        let more = match goal {
            Goal::Run | Goal::Mount if root => vec![],
            Goal::Run => vec![user_namespaces(), programs()],
            Goal::Mount => vec![programs()],
            Goal::Podman if root => vec![podman(), runtime(), oci_socket(run_dir)],
            Goal::Kubernetes if root => vec![oci_socket(run_dir), kubernetes()],
            Goal::Podman | Goal::Kubernetes => vec![not_for_users()],
        };
        let more: Vec<_> = more.into_iter().filter(|check| !checks.contains(check)).collect();
        checks.extend(more);
    }
    checks
}

/// A line for each feature that this kernel has, or lacks.
pub(super) fn features() -> Vec<Check> {
    let line = |feature: &Feature| match feature.missing() {
        None => Check::ok(feature.name, there(feature)),
        Some(_) => {
            let advice = format!("boot Linux {} or newer for: {}", feature.version(), feature.by);
            Check::warning(feature.name, needs(feature), advice)
        }
    };
    kernels::ALL.iter().map(line).collect()
}

fn there(feature: &Feature) -> String {
    format!("Linux {} has them (from {} on)", kernels::release(), feature.version())
}

fn needs(feature: &Feature) -> String {
    format!("need Linux {} here: this is {}", feature.version(), kernels::release())
}

fn missing(feature: &Feature) -> Option<Check> {
    feature.missing()?;
    let root = rustix::process::geteuid().is_root();
    let advice = match BLOCK_DEVICES.missing() {
        None if root => "boot such a kernel; what works with this one is 'loopengine attach IMAGE', for root",
        Some(_) if root => {
            "boot such a kernel; what works with this one is 'loopengine serve --frontend fuse'"
        }
        _ if is_here("fuse2fs") && mount::check_fuse().is_ok() => {
            "what works with this kernel: 'loopengine mount IMAGE DIR', by a program of FUSE"
        }
        _ => "have such a kernel booted: with this one only root can attach images",
    };
    Some(Check::problem(feature.name, needs(feature), advice))
}

/// Opens a pool of one device; it ends with its mounts, which are mounted nowhere.
fn try_pool(run_dir: &Path) -> Result<()> {
    daemon::runtime()?.block_on(async {
        let mut client = PrivateClient::connect(run_dir).await?;
        client.open(&OpenSpec { max: Some(1), ..OpenSpec::default() }).await.map(drop)
    })
}

fn daemon_and_pool(pool: Result<()>) -> Check {
    let name = "pool";
    match pool {
        Ok(()) => Check::ok(name, "the daemon makes pools for this user"),
        Err(error) => {
            let advice = match error.kind() {
                Kind::Unavailable if !rustix::process::geteuid().is_root() => {
                    "have root start the daemon ('systemctl start loopengine')"
                }
                Kind::Quota => "end a pool ('loopengine list' shows them), or have root raise the limit",
                _ => error.next_step().unwrap_or("look at the daemon's log"),
            };
            Check::problem(name, error.message(), advice)
        }
    }
}

fn user_namespaces() -> Check {
    let name = "user namespaces";
    // Debian's, AppArmor's and the kernel's own; what a system does not have does not forbid.
    let forbidden = [
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user.max_user_namespaces", "0", "10000"),
    ];
    let set_to = |setting: &str| fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/"))).ok();
    match forbidden.iter().find(|(setting, no, _)| set_to(setting).is_some_and(|value| value.trim() == *no)) {
        None => Check::ok(name, "allowed to plain users"),
        Some((setting, no, yes)) => Check::problem(
            name,
            format!("{setting} is {no}"),
            format!("have root run 'sysctl {setting}={yes}'"),
        ),
    }
}

fn programs() -> Check {
    let name = "FUSE";
    if let Err(error) = mount::check_fuse() {
        return from(name, &error);
    }
    let present: Vec<&str> =
        ["fuse2fs", "squashfuse"].into_iter().filter(|program| is_here(program)).collect();
    match present.is_empty() {
        true => Check::warning(
            name,
            "neither fuse2fs nor squashfuse is installed",
            "have root run 'apt install fuse2fs squashfuse', or name a program with --fuse FS=PROGRAM",
        ),
        false => Check::ok(name, format!("{} mount for this user", present.join(" and "))),
    }
}

fn from(name: &str, error: &Error) -> Check {
    Check::problem(name, error.message(), error.next_step().unwrap_or("look at the system's log"))
}

fn podman() -> Check {
    match is_here("podman") {
        true => Check::ok("podman", "is installed"),
        false => Check::problem("podman", "is not installed", "run 'apt install podman'"),
    }
}

fn runtime() -> Check {
    let present: Vec<&str> = ["crun", "runc"].into_iter().filter(|program| is_here(program)).collect();
    match present.is_empty() {
        true => Check::problem("runtime", "neither crun nor runc is installed", "run 'apt install crun'"),
        false => Check::ok("runtime", present.join(" and ")),
    }
}

fn oci_socket(run_dir: &Path) -> Check {
    let socket = run_dir.join(OCI_SOCKET);
    let shown = socket.display();
    match socket.exists() {
        true => Check::ok("runtime's socket", format!("{shown} is there; 'loopengine oci --help' goes on")),
        false => Check::problem("runtime's socket", format!("{shown} is missing"), "restart the daemon"),
    }
}

fn not_for_users() -> Check {
    let advice = "as this user, 'loopengine run -- CMD' gives a command loop devices without a container";
    Check::problem("containers", "only root makes pools for containers", advice)
}

fn kubernetes() -> Check {
    let advice = "use Podman, runc or crun where it must work ('loopengine doctor --for podman')";
    Check::warning("pods", "no kubelet was tried, and no device plugin is part of loopengine", advice)
}
