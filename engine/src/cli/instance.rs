//! `loopengine instance`: pools of devices with limits and workers of their own.

use std::path::Path;

use crate::config::MAX_DEVICES;
use crate::error::Result;
use crate::instance::{self, spec::InstanceSpec};

use super::list::pools;
use super::pool::{Mount, Open};
use super::table::Table;
use super::{complete, daemon, number, out};

/// Create, list and remove instances.
///
/// An instance is a pool of devices with numbers from 0, worker threads and limits of its own: the
/// load of one does not stall another. The instance 'default' always exists.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    Create(Create),
    List(List),
    Remove(Remove),
    Mount(Mount),
    Open(Open),
}

/// Create an instance.
#[derive(Debug, clap::Args)]
pub(super) struct Create {
    /// Its name: 1 to 64 of letters, digits, '.', '_' and '-', not starting with '.' or '-'.
    name: String,

    /// Devices that it may have.
    #[arg(long, value_name = "N", default_value_t = MAX_DEVICES, value_parser = number::within(1..=instance::MAX_DEVICES))]
    max: u32,

    /// Worker threads; 0: one for each CPU that it may use, two at least.
    #[arg(long, value_name = "N", default_value = "0")]
    workers: u32,

    /// CPUs that its workers may run on, as in '0-3,8' [default: all].
    #[arg(long, value_name = "LIST")]
    cpus: Option<String>,

    /// Print the instance as JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// List instances.
///
/// Below them, how many private pools there are, which belong to no instance.
#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// Remove an instance.
///
/// Fails if it has devices, unless '--force' is given. The instance 'default' cannot
/// be removed.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// Its name.
    #[arg(add = complete::instances())]
    name: String,

    /// Also if it has devices. Whoever uses them gets input/output errors.
    #[arg(short, long)]
    force: bool,
}

impl Command {
    pub(super) fn run(self, run_dir: &Path) -> Result<u8> {
        let done = match self {
            Command::Open(args) => return args.run(run_dir),
            Command::Create(args) => args.run(run_dir),
            Command::List(args) => args.run(run_dir),
            Command::Mount(args) => args.run(run_dir),
            Command::Remove(args) => {
                daemon::ask(run_dir, async |client| client.remove_instance(&args.name, args.force).await)
            }
        };
        done.map(|()| 0)
    }
}

impl Create {
    fn run(self, run_dir: &Path) -> Result<()> {
        let spec =
            InstanceSpec { name: self.name, max_devices: self.max, workers: self.workers, cpus: self.cpus };
        let created = daemon::ask(run_dir, async |client| client.create_instance(&spec).await)?;
        if self.json { out::json(&created).map(drop) } else { Ok(()) }
    }
}

impl List {
    fn run(self, run_dir: &Path) -> Result<()> {
        let instances = daemon::ask(run_dir, async |client| client.instances().await)?;
        if self.json {
            return out::json(&instances).map(drop);
        }
        let heads = ["NAME", "DEVICES", "MAX", "WORKERS", "CPUS", "DIRECTORY"];
        let mut table = Table::new(&heads, &[false, true, true, true]);
        for instance in instances {
            table.row(vec![
                instance.name,
                instance.devices.to_string(),
                instance.max_devices.to_string(),
                instance.workers.to_string(),
                instance.cpus.unwrap_or_else(|| "all".to_owned()),
                instance.directory,
            ]);
        }
        // As systemctl does. Pools belong to no instance, and are many.
        let pools = pools(run_dir).unwrap_or_default();
        let devices: u32 = pools.iter().map(|pool| pool.devices).sum();
        let more = match pools.len() {
            0 => String::new(),
            count => format!(
                "\n{count} private pool{} with {devices} device{}: 'loopengine list --all' shows them\n",
                if count == 1 { "" } else { "s" },
                if devices == 1 { "" } else { "s" },
            ),
        };
        out::print(&(table.render() + &more)).map(drop)
    }
}
