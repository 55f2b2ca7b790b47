// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ublk driver: the only module that names libublk.
//!
//! Knows the driver's commands, flags and memory layout. Does not know instances, or of images more
//! than their geometry.
//!
//! libublk provides the driver's types and numbers (`libublk::sys`). This module issues the control
//! commands itself: libublk retries with legacy opcodes, which hides the driver's errno, rejects
//! flags it does not know (NO_AUTO_PART_SCAN), lacks TRY_STOP_DEV, and sets no deadlines.

mod batch;
mod control;
mod device;
mod fallback;
mod features;
mod memory;
mod per_io;
mod query;

pub use batch::Batch;
pub use control::{NODE as CONTROL_NODE, present_devices};
pub use device::{StartLock, UblkDevice};
pub use features::DriverFeatures;
pub use per_io::PerIo;
