// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The manual pages that the program contains, and the definitions that they are generated from.
//!
//! The test `fresh` generates the files in `share/man`, and compares [`PAGES`] with them.

use zlink::idl;
use zlink::introspect::CustomType;

use crate::instance::spec::*;
use crate::private::Limit;
use crate::sys::processes::Process;

use super::create::ImageInfo;
use super::doctor::{Check, Verdict};
use super::list::{InstanceDevice, ListedPool, Listing, LoopDevice};

pub use super::examples::{Example, files, of as examples};
pub use super::{EXIT_CODES, RUN_EXIT_CODES, command};

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../share/man/", $name)))),*]
    };
}

/// File names and contents of all manual pages.
pub const PAGES: &[(&str, &str)] = embedded![
    "loopengine-attach.1",
    "loopengine-create.1",
    "loopengine-detach.1",
    "loopengine-doctor.1",
    "loopengine-features.1",
    "loopengine-find.1",
    "loopengine-install.1",
    "loopengine-instance-create.1",
    "loopengine-instance-list.1",
    "loopengine-instance-mount.1",
    "loopengine-instance-open.1",
    "loopengine-instance-remove.1",
    "loopengine-instance.1",
    "loopengine-json.7",
    "loopengine-limit.1",
    "loopengine-list.1",
    "loopengine-loopfs.7",
    "loopengine-losetup.1",
    "loopengine-mount.1",
    "loopengine-oci-hook.1",
    "loopengine-oci-print-cdi.1",
    "loopengine-oci-print-config.1",
    "loopengine-oci-print-profile.1",
    "loopengine-oci.1",
    "loopengine-podman-setup.1",
    "loopengine-recover.1",
    "loopengine-resize.1",
    "loopengine-run.1",
    "loopengine-serve.1",
    "loopengine-stats.1",
    "loopengine-umount.1",
    "loopengine.1",
    "mount.loop.8",
];

/// All types in the output of `--json`, with their descriptions.
pub const JSON_TYPES: &[&idl::CustomType<'static>] = &[
    InstanceInfo::CUSTOM_TYPE,
    Listing::CUSTOM_TYPE,
    InstanceDevice::CUSTOM_TYPE,
    ListedPool::CUSTOM_TYPE,
    LoopDevice::CUSTOM_TYPE,
    Process::CUSTOM_TYPE,
    DeviceInfo::CUSTOM_TYPE,
    ImageInfo::CUSTOM_TYPE,
    IoMode::CUSTOM_TYPE,
    BackendKind::CUSTOM_TYPE,
    DeviceState::CUSTOM_TYPE,
    DeviceStats::CUSTOM_TYPE,
    LatencySummary::CUSTOM_TYPE,
    Limit::CUSTOM_TYPE,
    Features::CUSTOM_TYPE,
    Check::CUSTOM_TYPE,
    Verdict::CUSTOM_TYPE,
];
