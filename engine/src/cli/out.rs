//! Standard output that never panics, and JSON on it.

use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Error, Kind, Result};

/// Writes `text` as it is. False: nobody reads any more, which is no failure.
pub(super) fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::os(error, "cannot write to standard output").with_kind(Kind::Io)),
    }
}

/// Writes `value` as JSON for people and programs.
pub(super) fn json(value: &impl Serialize) -> Result<bool> {
    encode(serde_json::to_string_pretty(value))
}

/// Writes `value` as one line of JSON.
pub(super) fn json_line(value: &impl Serialize) -> Result<bool> {
    encode(serde_json::to_string(value))
}

fn encode(text: serde_json::Result<String>) -> Result<bool> {
    let text = text.map_err(|error| Error::new(Kind::Internal, format!("cannot encode: {error}")))?;
    print(&(text + "\n"))
}
