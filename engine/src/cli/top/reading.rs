// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon answers at one moment: one call to each of its sockets, with a deadline.

use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::time::timeout;

use crate::control::{Client, PrivateClient};
use crate::error::{Error, Kind, Result};
use crate::instance::activity::DeviceActivity;

/// Deadline of the calls. Workers that do not answer take the daemon 5 s each.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// All devices that the caller can see.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) at: Option<SystemTime>,
    /// Devices of instances.
    pub(super) devices: Vec<DeviceActivity>,
    /// Bound devices of private pools.
    pub(super) private: Vec<DeviceActivity>,
}

impl Reading {
    /// Connects each time: a connection counts for the user, and does not outlive the daemon.
    pub(super) async fn take(run_dir: &Path) -> Result<Reading> {
        match timeout(ANSWER_MAX, Reading::ask(run_dir)).await {
            Ok(reading) => reading,
            Err(_) => Err(Error::new(Kind::Deadline, "the daemon did not answer in time")),
        }
    }

    async fn ask(run_dir: &Path) -> Result<Reading> {
        let devices = async { Client::connect(run_dir).await?.activity().await };
        let devices = match devices.await {
            Err(error) if error.kind() != Kind::Denied => return Err(error),
            devices => devices,
        };
        let private = async { PrivateClient::connect(run_dir).await?.activity().await };
        let (devices, private) = match (devices, private.await) {
            // The daemon serves no pools.
            (devices, Err(error)) if error.kind() == Kind::Unavailable => (devices?, Vec::new()),
            // Only root can list instances: these are the pools of this user.
            (devices, private) => (devices.unwrap_or_default(), private?),
        };
        Ok(Reading { at: Some(SystemTime::now()), devices, private })
    }
}
