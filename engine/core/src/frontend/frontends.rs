// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The frontends of an engine: one that its instances use by default, and others that an instance or
//! a pool can ask for.
//!
//! Knows what a private pool needs of a kernel. Does not know devices.

use std::sync::Arc;

use rustix::process::{PidfdFlags, pidfd_open};
use rustix::thread::gettid;

use super::{BackendKind, Frontend};
use crate::error::{Error, Kind, Result};
use crate::kernels::PRIVATE;

/// A pidfd of a thread (Linux 6.9).
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

/// The frontends of an engine.
#[derive(Clone, Debug)]
pub struct Frontends {
    default: Frontend,
    /// Opened when they are asked for: a driver may be loaded later.
    others: Arc<[BackendKind]>,
}

impl Frontends {
    /// Opens the first of these frontends, which is the default.
    pub fn open(backends: &[BackendKind]) -> Result<Frontends> {
        let none = || Error::new(Kind::Internal, "an engine without a backend");
        let (default, others) = backends.split_first().ok_or_else(none)?;
        Ok(Frontends { default: Frontend::open(*default)?, others: others.into() })
    }

    /// The backend of an instance that asks for none.
    pub fn default_kind(&self) -> BackendKind {
        self.default.kind()
    }

    /// Whether an instance can ask for this backend.
    pub fn has(&self, kind: BackendKind) -> bool {
        kind == self.default_kind() || self.others.contains(&kind)
    }

    /// The frontend of this kind; the default if none is given.
    pub fn get(&self, wanted: Option<BackendKind>) -> Result<Frontend> {
        let default = self.default_kind();
        let kind = wanted.unwrap_or(default);
        if kind == default {
            return Ok(self.default.clone());
        }
        let opened = Frontend::open(kind)?;
        if self.has(kind) {
            return Ok(opened);
        }
        let (kind, default) = (kind.as_str(), default.as_str());
        let context = format!("a daemon with the default backend {default} cannot use {kind}");
        Err(Error::new(Kind::Unsupported, context)
            .hint(format!("start another daemon with --backend {kind} and its own --run-dir")))
    }

    /// Whether this engine serves the file system with this device number.
    pub fn serves(&self, device_number: u64) -> bool {
        self.default.serves(device_number)
    }

    /// The frontend of a private pool. ublk must be able to stop a device only if it is unused, and
    /// to resize it later; otherwise pools use the kernel's loop driver.
    pub fn of_pool(&self, wanted: Option<BackendKind>) -> Result<Frontend> {
        let unsupported = |context: String| {
            Error::new(Kind::Unsupported, context)
                .hint("'loopengine doctor --for run' says what works with this kernel")
        };
        // Without it nobody can serve an intercepted call.
        if pidfd_open(gettid(), PIDFD_THREAD).is_err() {
            let missing = PRIVATE.missing();
            return Err(unsupported(
                missing.unwrap_or_else(|| "this kernel has no pidfds of threads (PIDFD_THREAD)".to_owned()),
            ));
        }
        let supports_pools =
            |frontend: &Frontend| matches!(frontend, Frontend::Ublk(features) if features.supports_binding());
        match wanted {
            None if supports_pools(&self.default) => Ok(self.default.clone()),
            None | Some(BackendKind::Loop) => Frontend::open(BackendKind::Loop).map_err(|error| {
                unsupported(format!("this daemon has no private devices: {}", error.message()))
            }),
            Some(BackendKind::Ublk) => {
                let missing = || {
                    unsupported("the ublk driver of this kernel does not support private pools".to_owned())
                };
                Some(self.get(wanted)?).filter(supports_pools).ok_or_else(missing)
            }
            Some(BackendKind::Fuse) => {
                let context = "a private pool has block devices, not files";
                Err(Error::new(Kind::Invalid, context).hint("ask for the backend ublk or loop"))
            }
        }
    }
}
