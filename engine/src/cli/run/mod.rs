// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine run`: run a command with private loop devices.
//!
//! The process opens a pool at the daemon, sets up its namespaces (`userns`, `dev`, `sysfs`),
//! installs the filter, sends its listener to the daemon, and executes the command. No process
//! stays between caller and command, so signals, job control and exit status are those of the
//! command. After a failure, the end of the process cleans everything up. A second process, the
//! `mounter`, mounts file systems for the command, keeps mounts with misleading names out, and ends
//! with the pool.

mod caller_root;
mod covered_nodes;
mod dev;
mod devtmpfs;
mod end_notice;
pub(super) mod mount_processes;
pub(super) mod mounter;
mod sysfs;
mod userns;

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountPropagationFlags, MoveMountFlags, mount_change, move_mount};

use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::frontend::BackendKind;
use crate::instance::MAX_DEVICES;
use crate::intercept::filter;
use crate::private::{LIBUDEV, Mounter, NO_UDEV, OpenSpec, RESERVED_MAX};
use crate::sys;

use super::pool_options::open_waiting;
use super::{cannot_run, daemon, fuse_drivers, number};

pub(super) use userns::user_name;

/// Run a command with private loop devices.
///
/// The command and its children see a private /dev/loop-control, /dev/loop0, /dev/loop1 and so on.
/// No other process sees these devices, and the command sees no loop devices of others. losetup,
/// lsblk and similar programs work unmodified. The devices end with the last process of the
/// command.
///
/// Root keeps its privileges. A plain user becomes root of a new user namespace, which uses the
/// ranges in /etc/subuid and /etc/subgid if there are any. '--user' does the same for root. 'run'
/// appends the directories of losetup and mkfs to PATH.
///
/// The command gets its own mount namespace; its mounts are not visible outside. Its /dev contains
/// the entries of the host's /dev, without loop devices and ublk disks. A devtmpfs that root of the
/// host mounts is a bind mount of this /dev.
///
/// The pool omits device numbers that the host uses: for a mounted loop device, for swap, or for a
/// link in /dev/disk. So the first device may not be /dev/loop0; 'losetup -f' prints it. Later
/// mounts of the host propagate into the namespace, except mounts of loop devices whose name the
/// pool has.
///
/// The environment variable SYSTEMD_DEVICE_VERIFY_SYSFS=0 makes libudev accept the private
/// /sys/block. DM_DISABLE_UDEV=1 and MDADM_NO_UDEV=1 make device-mapper tools and mdadm create
/// nodes in the private /dev. For root of the host, cryptsetup, veritysetup, LVM, kpartx, dmsetup
/// and mdadm work on the loop devices; their devices end with the command. A plain user cannot
/// create mappings.
///
/// If the daemon ends, the devices are lost, and a line on the command's terminal reports it.
/// losetup then fails with "Function not implemented" (ENOSYS), and every mount(2) fails too. Exit
/// the command and start 'loopengine run' again.
#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// Maximum number of devices [default: 8, or the rest of the user's limit].
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    max: Option<u32>,

    /// Name of the pool [default: a number].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// What serves the devices: ublk, or the kernel's loop driver [default: ublk from Linux 7.0 on,
    /// if the daemon uses it, otherwise loop].
    #[arg(long, value_name = "ublk|loop")]
    backend: Option<BackendKind>,

    /// Use a user namespace even as root.
    #[arg(long)]
    user: bool,

    /// In a user namespace, let the kernel mount these file systems instead of a FUSE driver. The
    /// administrator must allow them (kernel_mounts in loopengine.toml); root can use ext2, ext3,
    /// ext4, xfs, squashfs, erofs and vfat. Mounts are nosuid and nodev. Nobody can write to a
    /// mounted device, or remount it.
    #[arg(long, value_name = "FS,…", value_delimiter = ',', value_parser = parse_file_system)]
    mount: Vec<String>,

    /// Let these FUSE drivers mount, with the privileges of the command [default in a user
    /// namespace: the installed drivers of 'loopengine mount', except ntfs; for root of the host:
    /// the kernel mounts].
    #[arg(long, value_name = "FS=PROGRAM,…", value_delimiter = ',', value_parser = parse_fuse)]
    fuse: Vec<(String, String)>,

    /// Command and arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) fn parse_fuse(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((kind, program)) if is_file_system(kind) && !program.is_empty() => {
            Ok((kind.to_owned(), program.to_owned()))
        }
        _ => Err("give FS=PROGRAM, for example ext4=fuse2fs".to_owned()),
    }
}

/// Parses the name of a file system.
pub(super) fn parse_file_system(name: &str) -> std::result::Result<String, String> {
    is_file_system(name)
        .then(|| name.to_owned())
        .ok_or_else(|| "give file systems, for example ext4,xfs".to_owned())
}

fn is_file_system(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    (1..=32).contains(&name.len()) && name.bytes().all(fits)
}

impl RunArgs {
    /// The rules for mounts by FUSE drivers and by the kernel.
    fn rules(&self, user: bool) -> mounter::MountRules {
        // In an existing user namespace (a container), the kernel mounts no disk even for root.
        let root = !user && sys::userns::is_initial();
        // The first matching rule applies.
        let usual = if root { Vec::new() } else { fuse_drivers::installed_for_devices() };
        let fuse = self.fuse.iter().cloned().chain(usual).collect();
        mounter::MountRules { fuse, kernel: self.mount.clone(), root }
    }

    /// Returns only on failure.
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let user = self.user || !rustix::process::geteuid().is_root();
        let rules = self.rules(user);
        let is_missing = |program: &str| !program.contains('/') && !fuse_drivers::is_installed(program);
        if let Some((_, program)) = self.fuse.iter().find(|(_, program)| is_missing(program)) {
            return Err(Error::new(Kind::NotFound, format!("the FUSE driver {program} is not installed"))
                .hint("install it, or give the path of a program"));
        }
        let runtime = daemon::runtime()?;
        // Connect before entering a user namespace, where all users look the same.
        let mut client = runtime.block_on(PrivateClient::connect(run_dir))?;
        match user {
            true => userns::enter()?,
            false => enter_mount_namespace()?,
        }
        // The mounter keeps out later mounts under the name of another loopN.
        let reserved = sys::loop_names::named();
        let asked = OpenSpec {
            name: self.name,
            max: self.max,
            dev_and_sys: Some(true),
            kernel_mounts: (!self.mount.is_empty()).then_some(self.mount),
            reserved: Some(reserved.iter().copied().take(RESERVED_MAX).collect()),
            backend: self.backend,
            ..OpenSpec::default()
        };
        let opened = open_waiting(&runtime, &mut client, &asked)?;
        let Ok([loopfs, dev, sys]) = <[_; 3]>::try_from(opened.mounts) else {
            let message = "the reply of the daemon lacks the mounts of the pool";
            return Err(Error::new(Kind::Internal, message)
                .hint("restart the daemon: its version differs from this program's"));
        };
        dev::mount(dev, loopfs)?;
        sysfs::mount(sys)?;
        // For root of the host the kernel mounts all but devtmpfs; otherwise only the name in
        // /proc/mounts is corrected.
        let mounts = !rules.root || !rules.fuse.is_empty();
        let (caches, names) = (!rules.root, rules.root);
        let socket = mounter::start(rules, &opened.name, reserved)?;
        let mounter = Mounter { socket, serves_mounts: mounts };
        let listener = filter(filter::FilterOptions { mounts, names, caches })?;
        runtime.block_on(client.supervise(&opened.name, listener, namespace()?, Some(mounter)))?;
        drop((client, runtime));
        exec_command(&self.command)
    }
}

/// Enters a mount namespace that receives mounts of the host and does not propagate its own.
fn enter_mount_namespace() -> Result<()> {
    let entered = sys::mntns::enter_own();
    entered.map_err(|error| Error::os(error, "cannot enter a private mount namespace").hint(NAMESPACES))
}

const NAMESPACES: &str =
    "allow namespaces on this system (user.max_user_namespaces, and the confinement of this process)";

fn make_mounts_slave() -> rustix::io::Result<()> {
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
}

/// Attaches a detached mount at `path`.
fn attach(mount: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &str) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount, "", to.as_fd(), path, flags)
}

fn filter(options: filter::FilterOptions) -> Result<OwnedFd> {
    let program = filter::program(options);
    sys::seccomp::install_with_listener(&program).map_err(|error| {
        let nested = error.raw_os_error() == Some(libc::EBUSY);
        let error = Error::os(error, "cannot install the filter for loop devices");
        match nested {
            true => error.hint("the kernel allows only one such filter; do not nest 'loopengine run', or run it in a container that has one"),
            false => error,
        }
    })
}

/// The user namespace of this process.
fn namespace() -> Result<OwnedFd> {
    let opened = std::fs::File::open("/proc/self/ns/user");
    opened.map(OwnedFd::from).map_err(|error| {
        Error::os(error, "cannot open the user namespace of this process").hint("mount proc on /proc")
    })
}

/// Executes the command. Returns only on failure, with the exit code.
fn exec_command(words: &[OsString]) -> Result<u8> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::new(Kind::Invalid, "no command to run"));
    };
    let mut command = Command::new(program);
    command.args(arguments).envs(NO_UDEV).env(LIBUDEV.0, LIBUDEV.1);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", with_system_directories(path));
    }
    Ok(cannot_run(program, command.exec()))
}

/// `path` with the directories of losetup and mkfs at its end: the command is root, and the PATH of
/// a plain user of Debian lacks them.
fn with_system_directories(mut path: OsString) -> OsString {
    let has = |path: &OsString, directory: &str| {
        std::env::split_paths(path).any(|present| present == Path::new(directory))
    };
    for directory in ["/usr/local/sbin", "/usr/sbin", "/sbin"] {
        if !has(&path, directory) {
            path.push(":");
            path.push(directory);
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_ends_with_the_missing_system_directories() {
        let path = |text: &str| with_system_directories(text.into());
        assert_eq!(path("/usr/bin:/bin"), "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin");
        assert_eq!(path("/sbin:/bin:/usr/sbin"), "/sbin:/bin:/usr/sbin:/usr/local/sbin");
        let whole = "/usr/local/sbin:/usr/sbin:/sbin:/bin";
        assert_eq!(path(whole), whole);
    }

    #[test]
    fn parses_file_systems_and_drivers() {
        assert_eq!(parse_file_system("xfs"), Ok("xfs".into()));
        assert!(parse_file_system("").is_err() && parse_file_system("a/b").is_err());
        assert_eq!(parse_fuse("ext4=fuse2fs"), Ok(("ext4".into(), "fuse2fs".into())));
        for bad in ["", "ext4", "ext4=", "=x", "EXT4=x", "a/b=x"] {
            assert!(parse_fuse(bad).is_err(), "{bad}");
        }
    }
}
