//! The ublk driver: the only room that names libublk.
//!
//! Knows the driver's commands, flags and memory layout. Does not know instances or what an image
//! is beyond its geometry.
//!
//! From libublk come the driver's types and numbers (`libublk::sys`). Its control commands are
//! issued here by a small shim of our own: libublk retries with legacy opcodes, which hides the
//! driver's true errno, refuses flags it does not know (NO_AUTO_PART_SCAN), has no TRY_STOP, and
//! puts no deadline on anything.

mod batch;
mod control;
mod device;
mod fallback;
mod features;
mod found;
mod memory;
mod per_io;

pub use batch::Batch;
pub use control::{NODE as CONTROL_NODE, present_devices};
pub use device::{Alone, Device};
pub use features::Granted;
pub use per_io::PerIo;
