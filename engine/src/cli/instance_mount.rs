// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `instance mount` and `instance open`: a private pool as a directory.

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

use super::pool_options::{PoolOptions, open_for_containers, open_pool};
use super::run::parse_file_system;
use super::{cannot_run, out};
use crate::private::DEV;

/// The environment variable that holds the descriptor number.
const DESCRIPTOR_ENV: &str = "LOOPENGINE_POOL_FD";

/// Lower descriptors are standard input, output and error.
const DESCRIPTOR_MIN: i32 = 3;

/// Create a private pool and mount its directory.
///
/// The directory contains loop-control and a node loopN for each device. Numbers start at 0; with
/// '--container', the pool omits numbers that mounts, swap areas and /dev/disk use on this machine.
/// loopengine-loopfs(7) describes the devices. The pool ends when its directory is unmounted
/// everywhere. Prints the name of the pool.
///
/// With '--container', DIR contains the nodes in 'dev' and directories for /sys/block,
/// /sys/dev/block and /sys/class/block. 'loopengine oci print-config' gives them to a container.
/// 'umount -R DIR' ends the pool.
#[derive(Debug, clap::Args)]
pub(super) struct PoolMount {
    #[command(flatten)]
    options: PoolOptions,

    /// Create a pool for containers, one at a time. All devices exist from the start, with fixed
    /// device numbers. When a container ends, the pool unbinds all devices and stays. Only for
    /// root.
    #[arg(long)]
    container: bool,

    /// File systems that the kernel mounts when a container calls mount(2) on a device of the pool:
    /// ext2, ext3, ext4, xfs, squashfs, erofs, vfat. The container needs no capability. Mounts are
    /// nosuid and nodev; nobody can write to a mounted device.
    #[arg(
        long,
        value_name = "FS,…",
        value_delimiter = ',',
        value_parser = parse_file_system,
        requires = "container"
    )]
    mount: Vec<String>,

    /// Mount point.
    dir: PathBuf,
}

/// Open a private pool for a command.
///
/// The command inherits a descriptor of the pool's directory, which is mounted nowhere. The
/// environment variable LOOPENGINE_POOL_FD holds its number. The command can use the directory as
/// /proc/self/fd/N, or attach it with move_mount(2) in any mount namespace. The pool ends with the
/// last descriptor and the last mount.
#[derive(Debug, clap::Args)]
pub(super) struct PoolOpen {
    #[command(flatten)]
    options: PoolOptions,

    /// Command and arguments.
    #[arg(
        value_name = "CMD",
        required = true,
        num_args = 1..,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<OsString>,
}

impl PoolMount {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        // Check this before the pool exists.
        match self.dir.metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                let message = format!("{} is not a directory", self.dir.display());
                return Err(Error::new(Kind::Invalid, message));
            }
            Err(error) => return Err(Error::os(error, format!("cannot mount on {}", self.dir.display()))),
        }
        let name = match self.container {
            true => mount_for_containers(run_dir, &self.options, &self.mount, &self.dir)?,
            false => {
                let (name, mount) = open_pool(run_dir, &self.options)?;
                attach_mount(mount.as_fd(), &self.dir)?;
                name
            }
        };
        out::print(&format!("{name}\n")).map(drop)
    }
}

/// Creates a pool for containers and mounts it. The kernel can mount `file_systems` for the
/// containers. Returns the name.
pub(super) fn mount_for_containers(
    run_dir: &Path,
    options: &PoolOptions,
    file_systems: &[String],
    dir: &Path,
) -> Result<String> {
    let (name, [nodes, sys]) = open_for_containers(run_dir, options, file_systems)?;
    attach_clone(&sys, dir)?;
    attach_mount(nodes.as_fd(), &dir.join(DEV)).inspect_err(|_| {
        let _ = unmount(dir, UnmountFlags::DETACH);
    })?;
    Ok(name)
}

/// Attaches a clone of `mount`: the daemon keeps the original, whose mount point could never be
/// unmounted.
fn attach_clone(mount: &OwnedFd, dir: &Path) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, format!("cannot mount on {}", dir.display()));
    attach_mount(mount.as_fd(), dir)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(CWD, dir, flags).map_err(cannot);
    unmount(dir, UnmountFlags::DETACH).map_err(cannot)?;
    attach_mount(copy?.as_fd(), dir)
}

impl PoolOpen {
    /// Executes the command. Returns only if that fails, with the exit code.
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(Error::new(Kind::Invalid, "no command to run"));
        };
        let (_, mount) = open_pool(run_dir, &self.options)?;
        let mount =
            inherited(mount).map_err(|error| Error::os(error, "cannot pass a descriptor to the command"))?;
        let error =
            Command::new(program).args(arguments).env(DESCRIPTOR_ENV, mount.as_raw_fd().to_string()).exec();
        Ok(cannot_run(program, error))
    }
}

/// The descriptor without close-on-exec.
fn inherited(descriptor: OwnedFd) -> rustix::io::Result<OwnedFd> {
    let descriptor = match descriptor.as_raw_fd() {
        number if number < DESCRIPTOR_MIN => fcntl_dupfd_cloexec(descriptor, DESCRIPTOR_MIN)?,
        _ => descriptor,
    };
    fcntl_setfd(&descriptor, FdFlags::empty())?;
    Ok(descriptor)
}
