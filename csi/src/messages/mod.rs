// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of CSI 1.12, by the numbers of its fields.
//!
//! Fields that this driver does not read are left out: secrets, contexts of publishing. All messages
//! without fields are one type, and so are those that have the same fields. A `oneof` is its
//! alternatives as optional fields, which is the same on the wire.

mod controller;
mod identity;
mod node;
mod volume;

pub use controller::*;
pub use identity::*;
pub use node::*;
pub use volume::*;

/// A message without fields.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}
