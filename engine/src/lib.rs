//! loopengine serves image files as fast, private block devices.
pub mod cli;
pub mod config;
pub mod control;
pub mod error;
pub mod instance;
pub mod request;
pub mod sys;

pub use error::{Error, Kind, Result};
