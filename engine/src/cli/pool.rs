//! `instance mount` and `instance open`: a private pool of loop devices as a directory.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::CWD;
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount};

use crate::error::{Error, Kind, Result};
use crate::loopfs::attach::attach_mount;

use super::private::parse_file_system;
use super::wanted::{Wanted, open_for_containers, open_pool};
use super::{cannot_run, out};
use crate::private::DEV;

/// The environment variable with the number of the descriptor.
const DESCRIPTOR_ENV: &str = "LOOPENGINE_POOL_FD";

/// The descriptors below are those that every program expects.
const DESCRIPTOR_MIN: i32 = 3;

/// Mount a private pool of loop devices.
///
/// The directory gets a loop-control and a loopN for each device: a pool of its own, with numbers
/// from 0 (with '--container' without those that mounts, swap areas and /dev/disk name here), which nobody sees but who sees the directory. loopengine-loopfs(7) says what its devices
/// can do. The pool ends when it is unmounted everywhere. Prints its name.
///
/// With '--container' the directory gets a directory 'dev' with these, and others to be shown at
/// /sys/block, /sys/dev/block and /sys/class/block; 'loopengine oci print-config' gives them to a
/// container. 'umount -R' takes all of it away.
#[derive(Debug, clap::Args)]
pub(super) struct Mount {
    #[command(flatten)]
    wanted: Wanted,

    /// For containers, one after the other: all devices are there at once, their device numbers stay,
    /// and the pool does when a container has gone, with its devices unbound. Only for root.
    #[arg(long)]
    container: bool,

    /// File systems that the kernel mounts when mount(2) is called in a container for one of the devices,
    /// also without the capability that it takes: some of ext2, ext3, ext4, xfs, squashfs, erofs and vfat.
    /// Always nosuid and nodev, and while it is mounted nobody can write to the device.
    #[arg(
        long,
        value_name = "FS,…",
        value_delimiter = ',',
        value_parser = parse_file_system,
        requires = "container"
    )]
    mount: Vec<String>,

    /// Where to mount it.
    dir: PathBuf,
}

/// Give a command a private pool of loop devices.
///
/// The command inherits a file descriptor of the pool's directory, which is mounted nowhere; the
/// environment variable LOOPENGINE_POOL_FD has its number. It can move_mount(2) the directory to
/// where it likes, in a mount namespace of its own too, or use it as it is: for itself,
/// /proc/self/fd/N is the directory. The pool ends with the last descriptor and the last mount.
#[derive(Debug, clap::Args)]
pub(super) struct Open {
    #[command(flatten)]
    wanted: Wanted,

    /// The command and its arguments.
    #[arg(
        value_name = "CMD",
        required = true,
        num_args = 1..,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<OsString>,
}

impl Mount {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        // Found out before there is a pool.
        match self.dir.metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                let message = format!("{} is not a directory", self.dir.display());
                return Err(Error::new(Kind::Invalid, message));
            }
            Err(error) => return Err(Error::os(error, format!("cannot mount on {}", self.dir.display()))),
        }
        let name = match self.container {
            true => mount_for_containers(run_dir, &self.wanted, &self.mount, &self.dir)?,
            false => {
                let (name, mount) = open_pool(run_dir, &self.wanted)?;
                attach_mount(mount.as_fd(), &self.dir)?;
                name
            }
        };
        out::print(&format!("{name}\n")).map(drop)
    }
}

/// Makes a pool for containers and mounts it; the kernel may mount these file systems for them. Answers its name.
pub(super) fn mount_for_containers(
    run_dir: &Path,
    wanted: &Wanted,
    file_systems: &[String],
    dir: &Path,
) -> Result<String> {
    let (name, [nodes, sys]) = open_for_containers(run_dir, wanted, file_systems)?;
    attach_copy(&sys, dir)?;
    attach_mount(nodes.as_fd(), &dir.join(DEV)).inspect_err(|_| {
        let _ = unmount(dir, UnmountFlags::DETACH);
    })?;
    Ok(name)
}

/// The daemon keeps the mount that it makes; where it is attached it could never be unmounted.
fn attach_copy(mount: &OwnedFd, dir: &Path) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, format!("cannot mount on {}", dir.display()));
    attach_mount(mount.as_fd(), dir)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(CWD, dir, flags).map_err(cannot);
    unmount(dir, UnmountFlags::DETACH).map_err(cannot)?;
    attach_mount(copy?.as_fd(), dir)
}

impl Open {
    /// Becomes the command: comes back only if that fails, with the exit code.
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Error::new(Kind::Invalid, "no command to run"));
        };
        let (_, mount) = open_pool(run_dir, &self.wanted)?;
        let mount = inherited(mount).map_err(|error| Error::os(error, "cannot hand on a descriptor"))?;
        let error =
            Command::new(program).args(arguments).env(DESCRIPTOR_ENV, mount.as_raw_fd().to_string()).exec();
        Ok(cannot_run(program, error))
    }
}

/// The same descriptor, for whoever this process becomes.
fn inherited(descriptor: OwnedFd) -> rustix::io::Result<OwnedFd> {
    let descriptor = match descriptor.as_raw_fd() {
        number if number < DESCRIPTOR_MIN => fcntl_dupfd_cloexec(descriptor, DESCRIPTOR_MIN)?,
        _ => descriptor,
    };
    fcntl_setfd(&descriptor, FdFlags::empty())?;
    Ok(descriptor)
}
