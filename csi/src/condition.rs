// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a volume is as its record says.

use loopengine::Error;
use loopengine::instance::spec::{DeviceInfo, DeviceState};

use crate::messages::VolumeCondition;
use crate::record::Found;
use crate::{Driver, engine};

impl Driver {
    pub(crate) fn condition(
        &self,
        id: &str,
        found: &Found,
        devices: &Result<Vec<DeviceInfo>, Error>,
    ) -> VolumeCondition {
        let fault = match found {
            Found::Nothing => Some(format!("there is no volume {id:?}")),
            Found::Damaged(why) => Some(why.clone()),
            Found::Record(record) => self.volumes.fault(record),
        };
        let fault = fault.or_else(|| match devices {
            Err(error) => Some(format!("the engine does not answer: {error}")),
            Ok(devices) => {
                let device = engine::find(devices.iter(), &self.volumes.image(id))?;
                let reason =
                    device.reason.clone().unwrap_or_else(|| format!("{} is not served", device.path));
                (device.state != DeviceState::Live).then_some(reason)
            }
        });
        let abnormal = fault.is_some();
        VolumeCondition { abnormal, message: fault.unwrap_or_else(|| "the volume is whole".to_owned()) }
    }
}
