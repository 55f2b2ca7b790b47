// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine instance`: manage instances, and open private pools.

use std::path::Path;

use crate::config::MAX_DEVICES;
use crate::error::Result;
use crate::frontend::BackendKind;
use crate::instance::{self, spec::InstanceSpec};

use super::instance_mount::{PoolMount, PoolOpen};
use super::list::pools;
use super::table::Table;
use super::{complete, daemon, number, out};

/// Manage instances, and open private pools.
///
/// An instance is a named group of devices with its own device numbers, worker threads and limits.
/// The load of one instance does not stall another. The instance 'default' always exists.
///
/// 'mount' and 'open' create private pools, which belong to no instance.
#[derive(Debug, clap::Subcommand)]
pub(super) enum InstanceCommand {
    Create(Create),
    List(List),
    Remove(Remove),
    Mount(PoolMount),
    Open(PoolOpen),
}

/// Create an instance.
#[derive(Debug, clap::Args)]
pub(super) struct Create {
    /// Name of the instance: 1 to 64 letters, digits, '.', '_' and '-'; the first is not '.' or
    /// '-'.
    name: String,

    /// Maximum number of devices.
    #[arg(long, value_name = "N", default_value_t = MAX_DEVICES, value_parser = number::within(1..=instance::MAX_DEVICES))]
    max: u32,

    /// Number of worker threads; 0: one per usable CPU, at least two.
    #[arg(long, value_name = "N", default_value = "0")]
    workers: u32,

    /// CPUs for the workers, for example 0-3,8 [default: all].
    #[arg(long, value_name = "LIST")]
    cpus: Option<String>,

    /// Backend of the instance: ublk, loop or fuse [default: that of 'serve --backend'].
    #[arg(long, value_name = "ublk|loop|fuse")]
    backend: Option<BackendKind>,

    /// Print the instance as JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// List instances.
///
/// The last line counts the private pools, which belong to no instance.
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// Remove an instance.
///
/// Refuses to remove an instance that has devices, unless '--force' is given. The instance
/// 'default' cannot be removed.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// Name of the instance.
    #[arg(add = complete::instances())]
    name: String,

    /// Detach the devices of the instance. Their users get I/O errors.
    #[arg(short, long)]
    force: bool,
}

impl InstanceCommand {
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let done = match self {
            InstanceCommand::Open(args) => return args.run(run_dir),
            InstanceCommand::Create(args) => args.run(run_dir),
            InstanceCommand::List(args) => args.run(run_dir),
            InstanceCommand::Mount(args) => args.run(run_dir),
            InstanceCommand::Remove(args) => {
                daemon::ask(run_dir, async |client| client.remove_instance(&args.name, args.force).await)
            }
        };
        done.map(|()| 0)
    }
}

impl Create {
    fn run(self, run_dir: &Path) -> Result<()> {
        let Create { name, max, workers, cpus, backend, json } = self;
        let spec = InstanceSpec { name, max_devices: max, workers, cpus, backend };
        let created = daemon::ask(run_dir, async |client| client.create_instance(&spec).await)?;
        if json { out::json(&created).map(drop) } else { Ok(()) }
    }
}

impl List {
    fn run(self, run_dir: &Path) -> Result<()> {
        let instances = daemon::ask(run_dir, async |client| client.instances().await)?;
        if self.json {
            return out::json(&instances).map(drop);
        }
        let heads = ["NAME", "DEVICES", "MAX", "BACKEND", "WORKERS", "CPUS", "DIRECTORY"];
        let mut table = Table::new(&heads, &[false, true, true, false, true]);
        for instance in instances {
            table.row(vec![
                instance.name,
                instance.devices.to_string(),
                instance.max_devices.to_string(),
                instance.backend.as_str().to_owned(),
                instance.workers.to_string(),
                instance.cpus.unwrap_or_else(|| "all".to_owned()),
                instance.directory,
            ]);
        }
        // One line, as systemctl prints: there can be many pools.
        let pools = pools(run_dir).unwrap_or_default();
        let devices: u32 = pools.iter().map(|pool| pool.devices).sum();
        let more = match pools.len() {
            0 => String::new(),
            count => format!(
                "\n{count} private pool{} with {devices} device{}: 'loopengine list --all' lists them\n",
                if count == 1 { "" } else { "s" },
                if devices == 1 { "" } else { "s" },
            ),
        };
        out::print(&(table.render() + &more)).map(drop)
    }
}
