// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine list`: devices of instances; with `--all`, and for plain users, pools too.
//!
//! Formats the lists. `listing` collects the devices and their users.

mod listing;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) use listing::{ImageQuery, gather, pools};
pub(crate) use listing::{InstanceDevice, ListedPool, Listing, LoopDevice};

use crate::error::{Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::{DeviceInfo, DeviceState};
use crate::sys::processes::Process;

use super::table::Table;
use super::{complete, daemon, out, size};

/// List devices.
///
/// For root, lists the devices of instances. With '--all', lists private pools too, with owner,
/// age, mount points and processes. Plain users see only their own pools, in the same format.
#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    /// List only the devices of this instance.
    #[arg(short, long, value_name = "NAME", add = complete::instances())]
    instance: Option<String>,

    /// List devices of instances, private pools and their tenants.
    #[arg(short, long, conflicts_with = "instance")]
    all: bool,

    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// What a plain user does not see, and the next step.
pub(super) const ROOT_ONLY: &str = "run this as root to see devices of instances, and pools of others";

impl ListArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if !self.all {
            let named = self.instance.is_some();
            let which = self.instance.map_or(Selector::All, Selector::Instance);
            match daemon::ask(run_dir, async |client| client.devices(&which).await) {
                // Only root can list instances. List the pools of this user.
                Err(error) if error.kind() == Kind::Denied && !named => {}
                devices if self.json => return out::json(&devices?).map(drop),
                devices => return out::print(&table(devices?)).map(drop),
            }
        }
        let found = gather(run_dir, None)?;
        if found.pools.is_empty() && !self.json && !rustix::process::geteuid().is_root() {
            out::message(format_args!("this user has no private pool; {ROOT_ONLY}"));
        }
        show(&found, self.json)
    }
}

/// Prints a listing.
pub(super) fn show(listing: &Listing, json: bool) -> Result<()> {
    let printed = if json { out::json(listing) } else { out::print(&wide(listing)) };
    printed.map(drop)
}

/// One row per bound device, and per pool without bound devices.
fn wide(listing: &Listing) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let heads = [
        "KIND",
        "NAME",
        "DEVICE",
        "SIZE",
        "USER",
        "PID",
        "COMMAND",
        "CONTAINER",
        "AGE",
        "MOUNTED ON",
        "IMAGE",
    ];
    let right = &[false, false, false, true, false, true, false, false, true];
    let mut table = Table::new(&heads, right);
    for InstanceDevice { device, mounted_on, open_in } in &listing.devices {
        let row = ["instance".to_owned(), device.instance.clone(), format!("loop{}", device.number)];
        let user = ["root".to_owned(), pid(open_in.first()), command(open_in.first()), "-".to_owned()];
        let rest = [age(device.since_unix_seconds, now), list(mounted_on), device.image.clone()];
        table.row(row.into_iter().chain([size::show(device.size)]).chain(user).chain(rest).collect());
    }
    for pool in &listing.pools {
        let user = pool.user.clone().unwrap_or_else(|| pool.uid.to_string());
        // The short form that docker and podman use.
        let container = pool.container.as_deref().map_or("-".to_owned(), |id| id.chars().take(12).collect());
        let mut row = |device: Option<&LoopDevice>| {
            let process = pool.process.as_ref().or_else(|| device?.open_in.first());
            table.row(vec![
                "pool".to_owned(),
                pool.name.clone(),
                device.map_or("-".to_owned(), |device| format!("loop{}", device.number)),
                device.map_or("-".to_owned(), |device| size::show(device.size_bytes)),
                user.clone(),
                pid(process),
                command(process),
                container.clone(),
                age(pool.since_unix_seconds, now),
                device.map_or("-".to_owned(), |device| list(&device.mounted_on)),
                device.and_then(|device| device.image.clone()).unwrap_or_else(|| "-".to_owned()),
            ]);
        };
        let bound: Vec<_> = pool.devices.iter().filter(|device| device.image.is_some()).collect();
        match bound.is_empty() {
            true => row(None),
            false => bound.into_iter().for_each(|device| row(Some(device))),
        }
    }
    table.render()
}

fn pid(process: Option<&Process>) -> String {
    process.map_or("-".to_owned(), |process| process.pid.to_string())
}

fn command(process: Option<&Process>) -> String {
    process.map_or("-".to_owned(), |process| process.command.clone())
}

fn list(directories: &[String]) -> String {
    if directories.is_empty() { "-".to_owned() } else { directories.join(", ") }
}

/// An age in its largest unit.
fn age(since: Option<u64>, now: u64) -> String {
    let Some(since) = since else { return "-".to_owned() };
    match now.saturating_sub(since) {
        seconds @ ..120 => format!("{seconds}s"),
        seconds @ ..7_200 => format!("{}m", seconds / 60),
        seconds @ ..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn table(devices: Vec<DeviceInfo>) -> String {
    let mut heads =
        vec!["DEVICE", "SIZE", "MODE", "BLOCK", "QUEUES", "DEPTH", "PATH", "STATE", "NODE", "IMAGE"];
    // Columns only if a device has a value.
    let explained = devices.iter().any(|device| device.reason.is_some());
    let shared = devices.iter().any(|device| !device.shared_with.is_empty());
    let limited = devices.iter().any(|device| (device.iops, device.bytes_per_second) != (0, 0));
    heads.extend(limited.then_some("LIMITS"));
    heads.extend(explained.then_some("REASON"));
    heads.extend(shared.then_some("SHARED WITH"));
    let mut table = Table::new(&heads, &[false, true, false, true, true, true]);
    for device in devices {
        let mode = if device.read_only { "ro" } else { "rw" };
        let mode = if device.buffered { format!("{mode},buffered") } else { mode.to_owned() };
        let mode = if device.durable { format!("{mode},durable") } else { mode };
        let state = match device.state {
            DeviceState::Live => "live",
            DeviceState::Degraded => "degraded",
            DeviceState::Stuck => "stuck",
        };
        let limits = limits(&device);
        let mut row = vec![
            device.path,
            size::show(device.size),
            mode,
            device.block_size.to_string(),
            device.queues.to_string(),
            device.depth.to_string(),
            device.io_mode.as_str().to_owned(),
            state.to_owned(),
            device.node,
            device.image,
        ];
        row.extend(limited.then_some(limits));
        row.extend(explained.then(|| device.reason.unwrap_or_default()));
        row.extend(shared.then(|| device.shared_with.join(", ")));
        table.row(row);
    }
    table.render()
}

fn limits(device: &DeviceInfo) -> String {
    let iops = (device.iops > 0).then(|| format!("{} IOPS", device.iops));
    let bytes = (device.bytes_per_second > 0).then(|| size::show_rate(device.bytes_per_second));
    let limits: Vec<String> = iops.into_iter().chain(bytes).collect();
    list(&limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_ages() {
        let shown = |seconds: u64| age(Some(1000), 1000 + seconds);
        assert_eq!([0, 119, 120, 7199].map(shown), ["0s", "119s", "2m", "119m"]);
        assert_eq!([7200, 172_799, 172_800].map(shown), ["2h", "47h", "2d"]);
        assert_eq!((age(Some(5), 4), age(None, 4)), ("0s".to_owned(), "-".to_owned()), "clocks are set back");
    }
}
