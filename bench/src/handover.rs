// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Transfers files out of a sealed machine over a serial line: a line with name and length, then
//! the bytes.
//!
//! `send` runs inside the machine, `Inbox` outside. Knows nothing of the files' contents.

use std::fs::File;
use std::io::{Result, Write};

/// Environment variable that names the device to write to; if it is unset, nothing is sent.
pub const VARIABLE: &str = "LOOPBENCH_HANDOVER";

/// Sends a file, if this is a sealed machine.
pub fn send(name: &str, bytes: &[u8]) -> Result<()> {
    let Some(device) = std::env::var_os(VARIABLE) else { return Ok(()) };
    write(&mut File::options().append(true).open(device)?, name, bytes)
}

fn write(to: &mut impl Write, name: &str, bytes: &[u8]) -> Result<()> {
    to.write_all(format!("{name} {}\n", bytes.len()).as_bytes())?;
    to.write_all(bytes)
}

/// Bytes that have arrived and were not taken yet.
#[derive(Default)]
pub struct Inbox(pub Vec<u8>);

impl Inbox {
    /// Takes the next complete file: its name and contents.
    pub fn take(&mut self) -> Option<(String, Vec<u8>)> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let head = String::from_utf8_lossy(&self.0[..end]).into_owned();
        let (name, length) = head.split_once(' ')?;
        let file = self.0.get(end + 1..)?.get(..length.parse().ok()?)?.to_vec();
        self.0.drain(..end + 1 + file.len());
        Some((name.to_owned(), file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reassembles_files_from_any_pieces() {
        let mut sent = Vec::new();
        let files = [("a.json", &b"{\n}"[..]), ("empty", b""), ("b", b"x 3\nabc")];
        files.iter().for_each(|(name, bytes)| write(&mut sent, name, bytes).unwrap());
        let (mut inbox, mut came) = (Inbox::default(), Vec::new());
        for byte in sent {
            inbox.0.push(byte);
            came.extend(inbox.take());
        }
        let files = files.map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
        assert_eq!(came, files);
        assert!(inbox.0.is_empty() && inbox.take().is_none());
    }
}
