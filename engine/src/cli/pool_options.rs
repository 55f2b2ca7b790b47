// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options of a new private pool, and the calls that open one.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::pool_use::PoolUse;
use super::{daemon, number};
use tokio::runtime::Runtime;

use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::frontend::BackendKind;
use crate::instance::MAX_DEVICES;
use crate::private::{OpenSpec, OpenedPool, PoolInfo, RESERVED_MAX};
use crate::sys::{loop_names, processes};

/// Time for a pool with the wanted name to end.
const END_MAX: Duration = Duration::from_secs(3);
/// A connection may not make many calls.
const PAUSE: Duration = Duration::from_millis(100);

/// Options of a new pool. The daemon has defaults for missing ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(super) struct PoolOptions {
    /// Name of the pool [default: a free name].
    #[arg(long)]
    pub(super) name: Option<String>,

    /// Maximum number of devices [default: 8, or the rest of the user's limit].
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    pub(super) max: Option<u32>,

    /// Owner of the nodes, whose limit the devices count against. Only root can give another user
    /// [default: the caller].
    #[arg(long)]
    pub(super) uid: Option<u32>,

    /// Group of the nodes. Only root can give another group [default: the caller's].
    #[arg(long)]
    pub(super) gid: Option<u32>,

    /// Permission bits of the nodes, octal [default: 0660].
    #[arg(long, value_name = "BITS", value_parser = parse_mode)]
    pub(super) mode: Option<u32>,

    /// What serves the devices: ublk, or the kernel's loop driver [default: ublk from Linux 7.0 on,
    /// if the daemon uses it, otherwise loop].
    #[arg(long, value_name = "ublk|loop")]
    pub(super) backend: Option<BackendKind>,
}

/// Permission bits, octal.
pub(super) fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = digits.then(|| u32::from_str_radix(text, 8).ok()).flatten().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("'{text}' are not permission bits; give an octal number up to 777"))
}

impl PoolOptions {
    fn spec(&self) -> OpenSpec {
        let PoolOptions { name, max, uid, gid, mode, backend } = self.clone();
        OpenSpec { name, max, uid, gid, mode, backend, ..OpenSpec::default() }
    }
}

/// Opens a pool. Returns its name and the detached mount of its directory.
pub(super) fn open_pool(run_dir: &Path, options: &PoolOptions) -> Result<(String, OwnedFd)> {
    let opened = open(run_dir, &options.spec())?;
    opened.mounts.into_iter().next().map(|mount| (opened.name, mount)).ok_or_else(missing_mounts)
}

/// Opens a pool for containers, for which the kernel can mount the file systems `mounts`. Returns
/// its name and the mounts of its nodes and of its part of /sys.
pub(super) fn open_for_containers(
    run_dir: &Path,
    options: &PoolOptions,
    mounts: &[String],
) -> Result<(String, [OwnedFd; 2])> {
    let kernel_mounts = (!mounts.is_empty()).then(|| mounts.to_vec());
    // The host mounts container images here, and containers see the device names of these mounts.
    let reserved = Some(loop_names::named().into_iter().take(RESERVED_MAX).collect());
    let spec = OpenSpec { container: Some(true), kernel_mounts, reserved, ..options.spec() };
    let opened = open(run_dir, &spec)?;
    let [nodes, _dev, sys] = <[_; 3]>::try_from(opened.mounts).map_err(|_| missing_mounts())?;
    Ok((opened.name, [nodes, sys]))
}

fn open(run_dir: &Path, spec: &OpenSpec) -> Result<OpenedPool> {
    let runtime = daemon::runtime()?;
    let mut client = runtime.block_on(PrivateClient::connect(run_dir))?;
    open_waiting(&runtime, &mut client, spec)
}

/// Opens a pool, also if one of that name is about to end.
pub(super) fn open_waiting(
    runtime: &Runtime,
    client: &mut PrivateClient,
    spec: &OpenSpec,
) -> Result<OpenedPool> {
    let until = Instant::now() + END_MAX;
    loop {
        let error = match runtime.block_on(client.open(spec)) {
            Err(error) if error.kind() == Kind::Exists => error,
            opened => return opened,
        };
        // The pool of a command that has just ended has its name for a moment.
        let pools = runtime.block_on(client.list())?;
        match named(pools, spec.name.as_deref()) {
            Some(pool) if !is_ending(&pool) || Instant::now() >= until => {
                let message = format!("private pool {} exists ({})", pool.name, PoolUse::owner(&pool));
                return Err(Error::new(Kind::Exists, message).hint("choose another --name"));
            }
            None if Instant::now() >= until => return Err(error),
            _ => std::thread::sleep(PAUSE),
        }
    }
}

/// The pool whose name was refused. Names of plain users start with the number of the user, and in a
/// user namespace that is not known.
fn named(pools: Vec<PoolInfo>, name: Option<&str>) -> Option<PoolInfo> {
    let name = name?;
    let is_own = |pool: &&PoolInfo| pool.name.split_once('.').is_some_and(|(_, own)| own == name);
    pools.iter().find(|pool| pool.name == name).or_else(|| pools.iter().find(is_own)).cloned()
}

/// Whether its command has ended, and the pool ends with it.
fn is_ending(pool: &PoolInfo) -> bool {
    let has_ended = |pid| processes::started(pid) != pool.pid_start_ticks;
    pool.ending || pool.supervised && pool.pid.is_some_and(has_ended)
}

fn missing_mounts() -> Error {
    Error::new(Kind::Internal, "the reply of the daemon lacks the mounts of the pool")
        .hint("restart the daemon: its version differs from this program's")
}
