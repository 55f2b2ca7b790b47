// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine of loopengine: it serves image files as block devices over io_uring and ublk, or as files over FUSE.
//!
//! ```text
//!  frontend ── a queue of a device, over ublk or FUSE ──┐
//!     Request                                           │ instance: devices by name and number,
//!  worker ──── one io_uring per queue index             │ limits, claims, state, recovery
//!     ring ─── submissions and completions              │
//!  image ───── a file: identity, geometry, discards ────┘
//! ```
//!
//! An arrow points down only: `instance` → `frontend` → `worker` → `ring` → `request`, and `image` → `request`. The crate
//! knows neither sockets nor command lines, nor private pools.
//!
//! ```
//! use loopengine_core::kernels::PRIVATE;
//!
//! // Private pools need Linux 6.9.
//! assert!(PRIVATE.is_in("6.12.0") && !PRIVATE.is_in("6.1.0"));
//! ```

#![warn(missing_docs)]

pub mod accounts;
pub mod broken_kernels;
pub mod counters;
pub mod error;
pub mod failures;
pub mod frontend;
pub mod hash;
pub mod image;
pub mod instance;
pub mod kernels;
pub mod limits;
pub mod parallel;
pub mod request;
pub mod ring;
pub mod sandbox;
pub mod sys;
pub mod worker;

pub use error::{Error, Kind, Result};
