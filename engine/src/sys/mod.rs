//! What neither the standard library nor rustix wraps safely. Knows no other room.

pub mod mntns;
pub mod watch;
