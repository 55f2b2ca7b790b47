//! `loopengine limit`: how many private loop devices users may have.

use std::path::Path;

use crate::control::PrivateClient;
use crate::error::Result;

use super::table::Table;
use super::{daemon, out};

/// Show or change how many private loop devices users may have.
///
/// Without a user, lists the default, and every user that has a limit of its own or devices; plain
/// users see themselves. With a user and a number, gives that user a limit of its own, at once and until
/// the daemon ends; what a user has, it keeps. The default is in the configuration, see
/// loopengine-serve(1).
///
/// A private pool takes as many devices as it may have from its user's limit, for as long as it is there.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The user's number.
    #[arg(requires = "devices")]
    uid: Option<u32>,

    /// Devices that all its pools together may have; 'default': as many as everybody.
    #[arg(value_name = "N|default", value_parser = parse_devices)]
    devices: Option<Devices>,

    /// Print JSON, with a user its own limit only; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Devices {
    Default,
    AtMost(u32),
}

fn parse_devices(text: &str) -> std::result::Result<Devices, String> {
    match text {
        "default" => Ok(Devices::Default),
        number => number.parse().map(Devices::AtMost).map_err(|_| "give a number, or 'default'".to_owned()),
    }
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let limits = daemon::runtime()?.block_on(async {
            let mut client = PrivateClient::connect(run_dir).await?;
            if let (Some(uid), Some(devices)) = (self.uid, self.devices) {
                let max = match devices {
                    Devices::Default => None,
                    Devices::AtMost(max) => Some(max),
                };
                client.set_limit(uid, max).await?;
                if !self.json {
                    return Ok(None);
                }
            }
            client.limits().await.map(Some)
        })?;
        let Some(mut limits) = limits else { return Ok(()) };
        limits.retain(|limit| self.uid.is_none() || limit.uid == self.uid);
        if self.json {
            return out::json(&limits).map(drop);
        }
        let mut table = Table::new(&["USER", "MAX", "DEVICES", "POOLS"], &[false, true, true, true]);
        for limit in limits {
            table.row(vec![
                limit.uid.map_or_else(|| "default".to_owned(), |uid| uid.to_string()),
                limit.max_devices.map_or_else(|| "none".to_owned(), |max| max.to_string()),
                limit.devices.to_string(),
                limit.pools.to_string(),
            ]);
        }
        out::print(&table.render()).map(drop)
    }
}
