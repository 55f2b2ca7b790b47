// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files that leave a machine whose disk nobody sees: a line each with name and length, then the bytes.
//!
//! Knows nothing of what is in them. One side is `send`, in the machine; the other, outside, is `Inbox`.

use std::fs::File;
use std::io::{Result, Write};

/// Environment variable that names the device to write to; without it nothing is sent.
pub const VARIABLE: &str = "LOOPBENCH_HANDOVER";

/// Hands a file on, if somebody waits for it.
pub fn send(name: &str, bytes: &[u8]) -> Result<()> {
    let Some(device) = std::env::var_os(VARIABLE) else { return Ok(()) };
    write(&mut File::options().append(true).open(device)?, name, bytes)
}

fn write(to: &mut impl Write, name: &str, bytes: &[u8]) -> Result<()> {
    to.write_all(format!("{name} {}\n", bytes.len()).as_bytes())?;
    to.write_all(bytes)
}

/// What has come so far and was not taken out.
#[derive(Default)]
pub struct Inbox(pub Vec<u8>);

impl Inbox {
    /// The next file that has come in whole: its name and what is in it.
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
    fn files_come_out_whole_and_in_order_however_they_arrive() {
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
