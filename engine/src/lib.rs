// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon of loopengine. It serves image files as block devices. The program adds the command line.
//!
//! ```text
//!  the program          cli                         arguments, tables, exit codes
//!  this crate           control, config             sockets, the configuration
//!  loopengine-private   private → loops, loopfs …   private pools of loop devices
//!  loopengine-core      instance → frontend → worker → ring, image
//! ```
//!
//! An arrow points down only. To follow one request, read [`frontend::ublk`] (`batch.rs` or `per_io.rs`, `memory.rs`)
//! or [`frontend::fuse`] (`handler.rs`, `call_queue.rs`, `queue.rs`), then [`worker`] (`mod.rs`, `queue.rs`,
//! `translate.rs`), [`ring`], [`request`]. ARCHITECTURE.md describes the modules.
//!
//! ```
//! use loopengine::config::Config;
//!
//! let config = Config::parse("[[instance]]\nname = 'ci'\nmax_devices = 4\n", "loopengine.toml").unwrap();
//! assert_eq!(config.instances().next().unwrap().max_devices, 4);
//! ```

#![warn(missing_docs)]

pub mod config;
pub mod control;
pub mod received;

pub use loopengine_core::{
    Error, Kind, Result, accounts, broken_kernels, counters, error, failures, frontend, hash, image,
    instance, kernels, limits, request, ring, sandbox, sys, worker,
};
pub use loopengine_private::{intercept, kernel_mounts, loopfs, loops, private};
