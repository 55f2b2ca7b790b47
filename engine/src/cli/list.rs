//! `loopengine list`: the devices.

use std::path::Path;

use crate::error::Result;
use crate::instance::Selector;
use crate::instance::spec::{DeviceInfo, DeviceState};

use super::table::Table;
use super::{daemon, out, size};

/// List devices.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only those of this instance.
    #[arg(short, long, value_name = "NAME")]
    instance: Option<String>,

    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let which = self.instance.map_or(Selector::All, Selector::Instance);
        let devices = daemon::ask(run_dir, async |client| client.devices(&which).await)?;
        if self.json {
            return out::json(&devices).map(drop);
        }
        out::print(&table(devices)).map(drop)
    }
}

fn table(devices: Vec<DeviceInfo>) -> String {
    let heads =
        ["DEVICE", "SIZE", "MODE", "BLOCK", "QUEUES", "DEPTH", "PATH", "STATE", "NODE", "IMAGE", "REASON"];
    // Only where there is one.
    let explained = devices.iter().any(|device| device.reason.is_some());
    let heads = &heads[..heads.len() - usize::from(!explained)];
    let mut table = Table::new(heads, &[false, true, false, true, true, true]);
    for device in devices {
        let mode = if device.read_only { "ro" } else { "rw" };
        let mode = if device.buffered { format!("{mode},buffered") } else { mode.to_owned() };
        let state = match device.state {
            DeviceState::Live => "live",
            DeviceState::Degraded => "degraded",
            DeviceState::Stuck => "stuck",
        };
        let mut row = vec![
            device.path,
            size::show(device.size),
            mode,
            device.block_size.to_string(),
            device.queues.to_string(),
            device.depth.to_string(),
            device.data_path.as_str().to_owned(),
            state.to_owned(),
            device.node,
            device.image,
        ];
        row.extend(explained.then(|| device.reason.unwrap_or_default()));
        table.row(row);
    }
    table.render()
}
