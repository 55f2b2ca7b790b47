//! loopengine serves image files as fast, private block devices.
pub mod error;
pub mod image;
pub mod instance;
pub mod request;

pub use error::{Error, Kind, Result};
