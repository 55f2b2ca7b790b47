// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private pools of loop devices: an own loop-control and loopN for a user, a command or a container.
//!
//! ```text
//!  private ──┬─ intercept ──── ioctls, mounts and mknod of a tenant, by a seccomp filter
//!            ├─ loopfs ─────── the nodes of a pool, as a FUSE file system
//!            ├─ kernel_mounts  mounts by the kernel, in confined processes
//!            └─ loops ──────── a pool: the operations of loop(4) on ublk disks
//! ```
//!
//! `intercept`, `loopfs` and `loops` share the threads of `event_threads`. The crate knows neither
//! sockets nor command lines.
//!
//! ```
//! use loopengine_private::loops::{Errno, Quotas};
//!
//! let quotas = Quotas::new(1);
//! let device = quotas.charge(1000).unwrap();
//! assert_eq!(quotas.charge(1000).unwrap_err(), Errno::NOSPC);
//! drop(device);
//! assert!(quotas.charge(1000).is_ok());
//! ```

#![warn(missing_docs)]

mod event_threads;
pub mod intercept;
pub mod kernel_mounts;
pub mod loopfs;
pub mod loops;
pub mod private;

use loopengine_core::{
    Result, accounts, counters, error, failures, frontend, image, instance, limits, parallel, ring, sandbox,
    sys,
};
