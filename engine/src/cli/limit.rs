//! `loopengine limit`: how many private loop devices users may have.

use std::path::Path;

use crate::accounts;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::private::Limit;

use super::private::user_name;
use super::table::Table;
use super::{daemon, out};

/// Show or change how many private loop devices users may have.
///
/// Without a user, lists the default, and every user that has limits of its own or devices; plain
/// users see themselves. With a user, shows what that one may have. With a number, too, gives that user
/// a limit of its own, at once and until the daemon ends; what a user has, it keeps. The configuration keeps
/// limits over restarts: '[private]' those of everybody, '[[private.user]]' those of one user, see
/// loopengine-serve(1). Where a reload finds another limit of a user there than before, that one holds.
///
/// A private pool takes as many devices as it may have from its user's limit, for as long as it is there.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The user: a name of /etc/passwd, or a number.
    #[arg(value_name = "USER", value_parser = parse_user)]
    user: Option<u32>,

    /// Devices that all its pools together may have; 'default': as the configuration has it.
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

fn parse_user(text: &str) -> std::result::Result<u32, String> {
    accounts::uid_of(text).map_err(|error| error.to_string())
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
            if let (Some(uid), Some(devices)) = (self.user, self.devices) {
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
        let Some(limits) = limits else { return Ok(()) };
        let limits = match self.user {
            None => limits,
            Some(uid) => vec![of(uid, &limits)?],
        };
        if self.json {
            return out::json(&limits).map(drop);
        }
        let columns = ["USER", "MAX", "DEVICES", "POOLS", "MAX-POOLS"];
        let mut table = Table::new(&columns, &[false, true, true, true, true]);
        let at_most = |max: Option<u32>| max.map_or_else(|| "none".to_owned(), |max| max.to_string());
        for limit in limits {
            let name = |uid| user_name(uid).unwrap_or_else(|| uid.to_string());
            table.row(vec![
                limit.uid.map_or_else(|| "default".to_owned(), name),
                at_most(limit.max_devices),
                limit.devices.to_string(),
                limit.pools.to_string(),
                at_most(limit.max_pools),
            ]);
        }
        out::print(&table.render()).map(drop)
    }
}

/// What one user may have. Who is not listed has nothing, and may have what everybody may.
fn of(uid: u32, limits: &[Limit]) -> Result<Limit> {
    let own = rustix::process::getuid().as_raw();
    if own != 0 && own != uid {
        let message = format!("only root may see what user {uid} may have");
        return Err(Error::new(Kind::Denied, message).hint("run this as root"));
    }
    let limit = |wanted| limits.iter().find(|limit| limit.uid == wanted).cloned();
    let nobody = Limit { uid: None, max_devices: None, devices: 0, pools: 0, max_pools: None };
    let usual = if uid == 0 { nobody } else { limit(None).unwrap_or(nobody) };
    Ok(limit(Some(uid)).unwrap_or(Limit { uid: Some(uid), ..usual }))
}
