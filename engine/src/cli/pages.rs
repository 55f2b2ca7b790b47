// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The manual pages that the program contains.
//!
//! The tests in `fresh` generate the files in `share/man`, and compare [`PAGES`] with them.

#[cfg(test)]
mod json;
#[cfg(test)]
pub(super) mod man;

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../share/man/", $name)))),*]
    };
}

/// File names and contents of all manual pages.
pub const PAGES: &[(&str, &str)] = embedded![
    "loopengine-attach.1",
    "loopengine-create.1",
    "loopengine-csi.1",
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
    "loopengine-metrics.1",
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
    "loopengine-top.1",
    "loopengine-umount.1",
    "loopengine.1",
    "mount.loop.8",
];
