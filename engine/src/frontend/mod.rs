//! Doors through which requests come in.

pub mod ublk;
