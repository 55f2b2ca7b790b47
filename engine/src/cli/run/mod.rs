//! `loopengine run`: a command with loop devices of its own.
//!
//! The process asks the daemon for a pool, changes its own surroundings (`userns`, `dev`, `sysfs`),
//! installs the filter, gives its listener to the daemon, and becomes the command. So there is no
//! process in between: signals, job control and the exit status are the command's own, and whatever
//! fails on the way leaves nothing behind, since all of it ends with the process. Beside it stays a
//! process that mounts (`mounter`), keeps mounts with misleading names out, and ends with the pool.

mod dev;
pub(super) mod mount_processes;
pub(super) mod mounter;
mod notice;
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
use crate::instance::MAX_DEVICES;
use crate::intercept::filter;
use crate::private::{LIBUDEV, NO_UDEV, OpenSpec, RESERVED_MAX};
use crate::sys;

use super::{cannot_run, daemon, fuse, number};

pub(super) use userns::user_name;

/// Run a command with loop devices of its own.
///
/// The command and its children see a /dev/loop-control with /dev/loop0, /dev/loop1 and so on that
/// nobody else sees, and with which it sees nobody else's. losetup, lsblk and other programs use them as
/// they are. The daemon serves them; they end with the last process of the command.
///
/// Root keeps its rights. A plain user, or with '--user' anybody, becomes root of a user namespace of
/// its own, with the ranges of /etc/subuid and /etc/subgid if there are any for it.
///
/// The command gets a mount namespace: what is mounted in there is not seen outside. Its /dev has what
/// the machine's /dev had at the start, except loop devices and disks of ublk.
///
/// Where the machine mounts a loop device of its own, swaps on it, or has a link to it in /dev/disk, the
/// command has no loop device of that number. So the first one is not always /dev/loop0; 'losetup -f' prints
/// it. What the machine mounts later comes in too, except a loop device with another such number: a name
/// means one device.
///
/// The command's environment has SYSTEMD_DEVICE_VERIFY_SYSFS=0: without it libudev takes no /sys/block but
/// the kernel's own; and DM_DISABLE_UDEV=1 and MDADM_NO_UDEV=1: device mapper's tools and mdadm make nodes in the
/// command's /dev themselves. As root of the machine, cryptsetup, veritysetup, LVM, kpartx, dmsetup and mdadm work
/// upon the loop devices, and what they leave ends with the command. A plain user may not map devices.
///
/// If the daemon stops or is killed, the devices are gone for good. The command's terminal gets a line that
/// says so. From then on losetup fails with "Function not implemented" (ENOSYS), and in a user namespace, or
/// with '--fuse', so does every mount(2). Exit the command, and start 'loopengine run' again.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Loop devices at the most [default: 8, or what the user's limit leaves].
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    max: Option<u32>,

    /// The pool's name, for lists [default: a number].
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Use a user namespace, even as root.
    #[arg(long)]
    user: bool,

    /// File systems that the kernel mounts, instead of a program of FUSE, when mount(8) mounts one of the
    /// devices in a user namespace: always nosuid and nodev, and while it is mounted nobody can write to
    /// the device; a remount is refused. For those that the administrator allows (kernel_mounts in
    /// loopengine.toml); for root, ext2, ext3, ext4, xfs, squashfs, erofs and vfat.
    #[arg(long, value_name = "FS,…", value_delimiter = ',', value_parser = parse_file_system)]
    mount: Vec<String>,

    /// File systems that a program of FUSE mounts when mount(8) mounts one of the devices, with the
    /// command's own rights [default in a user namespace, where installed: as with 'loopengine mount', except
    /// ntfs; root of the machine without this option: the kernel mounts].
    #[arg(long, value_name = "FS=PROGRAM,…", value_delimiter = ',', value_parser = parse_fuse)]
    fuse: Vec<(String, String)>,

    /// The command, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) fn parse_fuse(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((kind, program)) if is_file_system(kind) && !program.is_empty() => {
            Ok((kind.to_owned(), program.to_owned()))
        }
        _ => Err("write it like ext4=fuse2fs".to_owned()),
    }
}

/// A name of a file system.
pub(super) fn parse_file_system(name: &str) -> std::result::Result<String, String> {
    is_file_system(name).then(|| name.to_owned()).ok_or_else(|| "write it like ext4,xfs".to_owned())
}

fn is_file_system(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    (1..=32).contains(&name.len()) && name.bytes().all(fits)
}

impl Args {
    /// What mounts what.
    fn ways(&self, user: bool) -> mounter::Ways {
        // Also for root of a user namespace the kernel mounts no disk, if that is there already: a container's.
        let root = !user && sys::userns::is_initial();
        // The first that fits counts.
        let usual = if root { Vec::new() } else { fuse::for_devices() };
        let fuse = self.fuse.iter().cloned().chain(usual).collect();
        mounter::Ways { fuse, kernel: self.mount.clone(), root }
    }

    /// Answers only if it fails.
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let user = self.user || !rustix::process::geteuid().is_root();
        let ways = self.ways(user);
        let runtime = daemon::runtime()?;
        // Connected as who we are now: inside a user namespace everybody would be the same.
        let mut client = runtime.block_on(PrivateClient::connect(run_dir))?;
        match user {
            true => userns::enter()?,
            false => own_mounts()?,
        }
        // What is mounted here from now on under the name of another loopN is kept out by the mounter.
        let reserved = sys::loop_names::named();
        let asked = OpenSpec {
            name: self.name,
            max: self.max,
            dev_and_sys: Some(true),
            kernel_mounts: (!self.mount.is_empty()).then_some(self.mount),
            reserved: Some(reserved.iter().copied().take(RESERVED_MAX).collect()),
            ..OpenSpec::default()
        };
        let opened = runtime.block_on(client.open(&asked))?;
        let Ok([loopfs, dev, sys]) = <[_; 3]>::try_from(opened.mounts) else {
            let message = "the daemon answered without the mounts of the pool";
            return Err(Error::new(Kind::Internal, message)
                .hint("restart it, so that it is of the same version as this program"));
        };
        dev::show(dev, loopfs)?;
        sysfs::show(sys)?;
        // Root of the machine has the kernel mount, as without a filter.
        let mounts = !ways.root || !ways.fuse.is_empty();
        let caches = !ways.root;
        let mounter = mounter::start(ways, &opened.name, reserved)?;
        let listener = filter(filter::FilterOptions { mounts, caches })?;
        runtime.block_on(client.supervise(&opened.name, listener, namespace()?, Some(mounter)))?;
        drop((client, runtime));
        become_command(&self.command)
    }
}

/// Mounts of the machine come in, ours do not get out.
fn own_mounts() -> Result<()> {
    let entered = sys::mntns::enter_own();
    entered.map_err(|error| Error::os(error, "cannot enter a mount namespace of its own").hint(NAMESPACES))
}

const NAMESPACES: &str =
    "see that this system allows namespaces (user.max_user_namespaces, and what confines this process)";

fn slave() -> rustix::io::Result<()> {
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
}

/// Mounts on `path` what is mounted nowhere yet.
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
            true => error.hint("the kernel allows one such filter: this runs under 'loopengine run', or in a container that has one, already"),
            false => error,
        }
    })
}

/// The user namespace that we are in.
fn namespace() -> Result<OwnedFd> {
    let opened = std::fs::File::open("/proc/self/ns/user");
    opened
        .map(OwnedFd::from)
        .map_err(|error| Error::os(error, "cannot open our user namespace").hint("mount proc on /proc"))
}

/// Comes back only if it cannot, with the exit code.
fn become_command(words: &[OsString]) -> Result<u8> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::new(Kind::Invalid, "no command to run"));
    };
    let mut command = Command::new(program);
    command.args(arguments).envs(NO_UDEV).env(LIBUDEV.0, LIBUDEV.1);
    Ok(cannot_run(program, command.exec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_by_program() {
        assert_eq!(parse_file_system("xfs"), Ok("xfs".into()));
        assert!(parse_file_system("").is_err() && parse_file_system("a/b").is_err());
        assert_eq!(parse_fuse("ext4=fuse2fs"), Ok(("ext4".into(), "fuse2fs".into())));
        for bad in ["", "ext4", "ext4=", "=x", "EXT4=x", "a/b=x"] {
            assert!(parse_fuse(bad).is_err(), "{bad}");
        }
    }
}
