// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The names of backends and I/O modes, on every surface: messages, JSON, the command line.

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

/// How requests and their data travel between the kernel and the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "kebab-case")]
#[zlink(rename_all = "lowercase")]
pub enum IoMode {
    /// Data is copied to a buffer of the daemon and back (Linux 6.5).
    Copy,
    /// The request's pages are the buffer; one command per request (Linux 6.16).
    Auto,
    /// The request's pages are the buffer; commands in batches (Linux 7.0).
    Batch,
    /// The kernel's loop driver does all I/O; the daemon does none.
    Loop,
    /// Through FUSE, to a file instead of a block device: data is copied to a buffer of the daemon
    /// and back.
    Fuse,
}

impl IoMode {
    /// The backend of devices with this mode.
    pub fn backend(self) -> BackendKind {
        match self {
            IoMode::Copy | IoMode::Auto | IoMode::Batch => BackendKind::Ublk,
            IoMode::Loop => BackendKind::Loop,
            IoMode::Fuse => BackendKind::Fuse,
        }
    }

    /// The word used on the command line and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            IoMode::Copy => "copy",
            IoMode::Auto => "auto",
            IoMode::Batch => "batch",
            IoMode::Loop => "loop",
            IoMode::Fuse => "fuse",
        }
    }
}

impl std::str::FromStr for BackendKind {
    type Err = String;

    fn from_str(word: &str) -> Result<BackendKind, String> {
        let all = [BackendKind::Ublk, BackendKind::Loop, BackendKind::Fuse];
        let found = all.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| format!("'{word}' is none of ublk, loop and fuse"))
    }
}

/// How devices appear to their users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub enum BackendKind {
    /// Block devices of the ublk driver.
    Ublk,
    /// Block devices of the kernel's loop driver.
    Loop,
    /// Files of a FUSE file system.
    Fuse,
}

impl BackendKind {
    /// The name of its disk with this id at the driver.
    pub fn disk(self, id: u32) -> String {
        match self {
            BackendKind::Loop => format!("loop{id}"),
            BackendKind::Ublk | BackendKind::Fuse => format!("ublkb{id}"),
        }
    }

    /// The backend of the disk with this name, and its id at the driver.
    pub fn of_disk(disk: &str) -> Option<(BackendKind, u32)> {
        let id = |prefix: &str| disk.strip_prefix(prefix)?.parse().ok();
        let ublk = id("ublkb").map(|id| (BackendKind::Ublk, id));
        ublk.or_else(|| id("loop").map(|id| (BackendKind::Loop, id)))
    }

    /// The word used on the command line and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            BackendKind::Ublk => "ublk",
            BackendKind::Loop => "loop",
            BackendKind::Fuse => "fuse",
        }
    }
}
