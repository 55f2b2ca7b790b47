// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine metrics`: measurements for Prometheus, printed once or served over HTTP.
//!
//! Asks the daemon through its sockets, as other commands do: whoever reads the metrics never talks to
//! the daemon itself. `text` writes the format, `server` speaks HTTP.

mod server;
mod text;

use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use crate::control::{Client, PrivateClient};
use crate::counters::DaemonCounters;
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::{DeviceInfo, DeviceStats, InstanceInfo};
use crate::private::{Limit, PoolInfo};

use super::{daemon, out};
use server::ListenAddress;
use text::TextFormat;

/// Deadline of the questions to the daemon: less than Prometheus waits for a scrape.
const ANSWER_MAX: Duration = Duration::from_secs(8);

/// Print or serve metrics.
///
/// Prints metrics of the daemon, its devices, instances, private pools and users once, in the text
/// format of Prometheus. With '--listen', serves them over HTTP at /metrics, in that format or as
/// OpenMetrics, until it is interrupted. Needs root, as 'list' does; loopengine-metrics.service runs
/// it with few privileges.
#[derive(Debug, clap::Args)]
pub(super) struct MetricsArgs {
    /// Serve on this address: unix:PATH, a socket for root only, or a loopback address with a port,
    /// such as 127.0.0.1:9753, which every local user can read.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<ListenAddress>,
}

impl MetricsArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        daemon::runtime()?.block_on(async {
            match &self.listen {
                Some(address) => server::serve(address, run_dir).await,
                None => {
                    let snapshot = Snapshot::take(run_dir).await?;
                    out::print(&TextFormat::Prometheus.render(Some(&snapshot))?).map(drop)
                }
            }
        })
    }
}

/// What the daemon answers at one moment.
#[derive(Debug, Default)]
struct Snapshot {
    counters: DaemonCounters,
    instances: Vec<InstanceInfo>,
    devices: Vec<DeviceInfo>,
    stats: Vec<DeviceStats>,
    pools: Vec<PoolInfo>,
    limits: Vec<Limit>,
}

impl Snapshot {
    async fn take(run_dir: &Path) -> Result<Snapshot> {
        match timeout(ANSWER_MAX, Snapshot::ask(run_dir)).await {
            Ok(snapshot) => snapshot,
            Err(_) => Err(Error::new(Kind::Deadline, "the daemon did not answer in time")),
        }
    }

    async fn ask(run_dir: &Path) -> Result<Snapshot> {
        let mut client = Client::connect(run_dir).await?;
        let mut private = PrivateClient::connect(run_dir).await?;
        Ok(Snapshot {
            counters: client.counters().await?,
            instances: client.instances().await?,
            devices: client.devices(&Selector::All).await?,
            stats: client.stats(&Selector::All).await?,
            pools: private.list().await?,
            limits: private.limits().await?,
        })
    }
}
