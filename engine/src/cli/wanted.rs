//! How a command gets a private pool of loop devices from the daemon.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::{daemon, number};
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::private::{OpenSpec, OpenedPool, RESERVED_MAX};
use crate::sys::loop_names;

/// What is asked of a new pool; the daemon has a default for what is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(super) struct Wanted {
    /// Its name [default: one that is free].
    #[arg(long)]
    pub(super) name: Option<String>,

    /// Devices that it may have [default: 8, or as many as the user may still have].
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    pub(super) max: Option<u32>,

    /// User whom the nodes belong to, and whose limit they count for; only root may name another
    /// [default: the caller].
    #[arg(long)]
    pub(super) uid: Option<u32>,

    /// Group of the nodes; only root may name another [default: the caller's].
    #[arg(long)]
    pub(super) gid: Option<u32>,

    /// Permission bits of the nodes, octal [default: 0660].
    #[arg(long, value_name = "BITS", value_parser = parse_mode)]
    pub(super) mode: Option<u32>,
}

/// Permission bits, octal.
pub(super) fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = digits.then(|| u32::from_str_radix(text, 8).ok()).flatten().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("'{text}' are no permission bits; give an octal number up to 777"))
}

impl Wanted {
    fn spec(&self) -> OpenSpec {
        let Wanted { name, max, uid, gid, mode } = self.clone();
        OpenSpec { name, max, uid, gid, mode, ..OpenSpec::default() }
    }
}

/// Opens a pool; answers its name and the mount of its directory, which is attached nowhere yet.
pub(super) fn open_pool(run_dir: &Path, wanted: &Wanted) -> Result<(String, OwnedFd)> {
    let opened = open(run_dir, &wanted.spec())?;
    opened.mounts.into_iter().next().map(|mount| (opened.name, mount)).ok_or_else(without_mounts)
}

/// Opens a pool for containers; answers its name, and the mounts of its nodes and of what is shown
/// of it in /sys. The kernel may mount these file systems for the containers.
pub(super) fn open_for_containers(
    run_dir: &Path,
    wanted: &Wanted,
    mounts: &[String],
) -> Result<(String, [OwnedFd; 2])> {
    let kernel_mounts = (!mounts.is_empty()).then(|| mounts.to_vec());
    // What containers are made of is mounted here, and the names of these mounts are seen in them.
    let reserved = Some(loop_names::named().into_iter().take(RESERVED_MAX).collect());
    let spec = OpenSpec { container: Some(true), kernel_mounts, reserved, ..wanted.spec() };
    let opened = open(run_dir, &spec)?;
    let [nodes, _dev, sys] = <[_; 3]>::try_from(opened.mounts).map_err(|_| without_mounts())?;
    Ok((opened.name, [nodes, sys]))
}

fn open(run_dir: &Path, spec: &OpenSpec) -> Result<OpenedPool> {
    daemon::runtime()?.block_on(async {
        let mut client = PrivateClient::connect(run_dir).await?;
        client.open(spec).await
    })
}

fn without_mounts() -> Error {
    Error::new(Kind::Internal, "the daemon answered without the mounts of the pool")
        .hint("restart it, so that it is of the same version as this program")
}
