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
    /// The word used on the command line and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            BackendKind::Ublk => "ublk",
            BackendKind::Loop => "loop",
            BackendKind::Fuse => "fuse",
        }
    }
}
