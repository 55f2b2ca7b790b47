// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes text and JSON to standard output without panics.

use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Error, Kind, Result};

/// Writes `text`. False if the reader closed the pipe, which is not an error.
pub(super) fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::os(error, "cannot write to standard output").with_kind(Kind::Io)),
    }
}

/// Writes a message to standard error. If nobody can read it, the exit code still tells.
pub(super) fn message(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "loopengine: {text}");
}

/// Writes `value` as indented JSON.
pub(super) fn json(value: &impl Serialize) -> Result<bool> {
    encode(serde_json::to_string_pretty(value))
}

/// Writes `value` as one line of JSON.
pub(super) fn json_line(value: &impl Serialize) -> Result<bool> {
    encode(serde_json::to_string(value))
}

fn encode(text: serde_json::Result<String>) -> Result<bool> {
    let text = text.map_err(|error| Error::new(Kind::Internal, format!("cannot encode JSON: {error}")))?;
    print(&(text + "\n"))
}
