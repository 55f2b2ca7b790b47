//! loopengine serves image files as fast, private block devices.
//!
//! ```text
//!  reader or writer of /run/loopengine/default/loop0      loopengine attach, list, … · varlinkctl
//!         |  block layer, one hardware queue a CPU group       |  varlink calls
//!         v                                                    v
//!   frontend         queue q of any device of the pool,      control      (never on an I/O thread)
//!     ublk | fuse    a block device or a file                     |
//!         |  Request{op, offset, len, tag}                     |
//!         v                                                    v
//!   worker           ONE io_uring per queue index            instance → device → image
//!         |  READ/WRITE, FSYNC, FALLOCATE                      |  (who owns what, quotas, lifetime)
//!         v                                                    |
//!   image            O_DIRECT file, geometry  <----------------+  crossbeam channel: add, remove,
//!         |  CQE                                                  resize; never once per I/O
//!         v
//!   Completion, exactly once → commit (batched or linked) → block layer
//! ```
//!
//! To follow one request: [`frontend::ublk`] (`batch.rs` or `per_io.rs`, `memory.rs`) or
//! [`frontend::fuse`] (`handler.rs`, `lane.rs`, `queue.rs`), [`worker`] (`mod.rs`, `queue.rs`, `translate.rs`), [`ring`], [`request`]. ARCHITECTURE.md says
//! what each room knows and does not know.

#![warn(missing_docs)]

pub mod cli;
pub mod config;
pub mod control;
pub mod received;

pub use loopengine_core::{
    Error, Kind, Result, accounts, error, failures, frontend, hash, image, instance, kernels, limits,
    request, ring, sandbox, sys, worker,
};
pub use loopengine_private::{intercept, kernel_mounts, loopfs, loops, private};
