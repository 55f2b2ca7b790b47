// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine limit`: show or set how many private loop devices a user can have, and how much I/O
//! a device can do.

use std::path::Path;

use crate::accounts;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::IoLimitsSpec;
use crate::private::Limit;

use super::run::user_name;
use super::table::Table;
use super::{complete, daemon, detach, out, size};

/// Show or set the limits of users on private loop devices, or of the I/O of a device.
///
/// Without USER, lists the default and every user with limits of their own or with devices; plain
/// users see only themselves. With USER, shows the limits of that user. With N, sets the device limit of that
/// user until the daemon ends. Existing devices stay.
///
/// '[private]' and '[[private.user]]' in the configuration set permanent limits, see
/// loopengine-serve(1). A reload that changes the limit of a user overrides the limit set by this
/// command.
///
/// The maximum size of a pool counts against the limit of its user while the pool exists.
///
/// With '--device', shows or sets the limits of the I/O of a device of an instance. They apply at
/// once, and outlive the daemon. Requests beyond a limit wait. After a pause, the device may serve at
/// once as much as the limit allows in 50 ms. Needs root.
#[allow(rustdoc::broken_intra_doc_links, reason = "clap prints the text")]
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// User: a name in /etc/passwd, or a number.
    #[arg(value_name = "USER", value_parser = parse_user, add = complete::users())]
    user: Option<u32>,

    /// Maximum number of devices in all pools of the user; 'default': the limit in the
    /// configuration.
    #[arg(value_name = "N|default", value_parser = parse_devices)]
    devices: Option<NewLimit>,

    /// Device: a path, NAME/loopN, or loopN of the instance 'default'.
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["user", "devices"], add = complete::devices())]
    device: Option<String>,

    /// Maximum number of requests per second, not counting flushes; 'none': no limit.
    #[arg(long, value_name = "N|none", requires = "device", value_parser = parse_iops)]
    iops: Option<u64>,

    /// Maximum number of bytes per second, read and written together, for example 100M; 'none': no
    /// limit.
    #[arg(long, value_name = "SIZE|none", requires = "device", value_parser = parse_bandwidth)]
    bandwidth: Option<u64>,

    /// Print JSON, with USER only that limit; see loopengine-json(7).
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NewLimit {
    Default,
    AtMost(u32),
}

fn parse_user(text: &str) -> std::result::Result<u32, String> {
    accounts::uid_of(text).map_err(|error| error.to_string())
}

fn parse_devices(text: &str) -> std::result::Result<NewLimit, String> {
    match text {
        "default" => Ok(NewLimit::Default),
        number => number
            .parse()
            .map(NewLimit::AtMost)
            .map_err(|_| format!("give a number up to {}, or 'default'", u32::MAX)),
    }
}

fn parse_iops(text: &str) -> std::result::Result<u64, String> {
    match text {
        "none" => Ok(0),
        number => {
            number.parse().ok().filter(|iops| *iops > 0).ok_or("give a number from 1, or 'none'".into())
        }
    }
}

fn parse_bandwidth(text: &str) -> std::result::Result<u64, String> {
    if text == "none" { Ok(0) } else { size::parse_rate(text) }
}

impl LimitArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        match self.device.clone() {
            Some(device) => self.of_device(device, run_dir),
            None => self.of_users(run_dir),
        }
    }

    fn of_device(self, device: String, run_dir: &Path) -> Result<()> {
        let Selector::Device(device) = detach::device(device) else {
            return Err(Error::new(Kind::Internal, "not a device"));
        };
        let spec = IoLimitsSpec { device, iops: self.iops, bytes_per_second: self.bandwidth };
        let device = daemon::ask(run_dir, async |client| client.set_io_limits(&spec).await)?;
        if self.json {
            return out::json(&device).map(drop);
        }
        let mut table = Table::new(&["DEVICE", "IOPS", "BANDWIDTH"], &[false, true, true]);
        let iops = if device.iops == 0 { "none".to_owned() } else { device.iops.to_string() };
        table.row(vec![device.path, iops, size::show_rate(device.bytes_per_second)]);
        out::print(&table.render()).map(drop)
    }

    fn of_users(self, run_dir: &Path) -> Result<()> {
        let limits = daemon::runtime()?.block_on(async {
            let mut client = PrivateClient::connect(run_dir).await?;
            if let (Some(uid), Some(devices)) = (self.user, self.devices) {
                let max = match devices {
                    NewLimit::Default => None,
                    NewLimit::AtMost(max) => Some(max),
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

/// The limits of one user. A user that is not listed has the default limits and no devices.
fn of(uid: u32, limits: &[Limit]) -> Result<Limit> {
    let own = rustix::process::getuid().as_raw();
    if own != 0 && own != uid {
        let message = format!("only root can see the limits of user {uid}");
        return Err(Error::new(Kind::Denied, message).hint("run this as root"));
    }
    let limit = |wanted| limits.iter().find(|limit| limit.uid == wanted).cloned();
    let nobody = Limit { uid: None, max_devices: None, devices: 0, pools: 0, max_pools: None };
    let usual = if uid == 0 { nobody } else { limit(None).unwrap_or(nobody) };
    Ok(limit(Some(uid)).unwrap_or(Limit { uid: Some(uid), ..usual }))
}
