// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A minimal FUSE server: one directory with one file, `image`, and requests that it never answers.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

/// Which requests the server never answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hang {
    /// Requests of close(2).
    Flush,
    /// Reads and writes after this many of them, and requests of close(2).
    Transfers(u32),
}

/// A server with a mounted file system.
pub(super) struct Server {
    device: File,
    owner: u32,
    hang: Hang,
}

const SIZE: u64 = 8 << 20;
const MAX_WRITE: u32 = 1 << 17;
const HEADER: usize = 40;
/// Inode numbers.
const ROOT: u64 = 1;
const IMAGE: u64 = 2;

const ENOENT: i32 = -2;
const ENOSYS: i32 = -38;

impl Server {
    /// Mounts the file system on `directory`, which is created if missing; `owner` owns the file.
    pub(super) fn mount(directory: &Path, owner: u32, hang: Hang) -> Result<Server> {
        std::fs::create_dir_all(directory)?;
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let fd = device.as_raw_fd();
        let options = format!("fd={fd},rootmode=40755,user_id=0,group_id=0,allow_other");
        let options = CString::new(options)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("hostile", directory, "fuse", flags, options.as_c_str())
            .context("cannot mount a FUSE file system")?;
        Ok(Server { device, owner, hang })
    }

    /// Serves until the file system is unmounted.
    pub(super) fn serve(mut self) -> Result<()> {
        let mut request = vec![0; MAX_WRITE as usize + (1 << 16)];
        loop {
            let length = match self.device.read(&mut request) {
                Ok(length) => length,
                // The kernel withdrew the request (ENOENT), or a signal arrived.
                Err(error) if matches!(error.raw_os_error(), Some(2 | 4)) => continue,
                Err(_) => return Ok(()),
            };
            if let Some(answer) = self.answer(&request[..length]) {
                // Withdrawn meanwhile.
                let _ = self.device.write(&answer);
            }
        }
    }

    fn answer(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap_or_default());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap_or_default());
        let (opcode, unique, node) = (word(4), long(8), long(16));
        let payload = match opcode {
            1 if request[HEADER..].starts_with(b"image\0") => {
                Ok([longs(&[IMAGE, 0, 0, 0, 0]), self.attributes(IMAGE)].concat())
            }
            1 => Err(ENOENT),
            // FORGET and BATCH_FORGET have no reply.
            2 | 42 => return None,
            // GETATTR, SETATTR.
            3 | 4 => Ok([longs(&[0, 0]), self.attributes(node)].concat()),
            // OPEN, OPENDIR.
            14 | 27 => Ok(longs(&[0, 0])),
            15 | 16 if self.hangs() => return None,
            15 => Ok(vec![0; word(HEADER + 16) as usize]),
            16 => Ok(longs(&[u64::from(word(HEADER + 16))])),
            25 => return None,
            // STATFS, RELEASE, FSYNC, RELEASEDIR.
            17 => Ok(vec![0; 80]),
            18 | 20 | 29 => Ok(Vec::new()),
            26 => Ok(init()),
            _ => Err(ENOSYS),
        };
        let (error, payload) = payload.map_or_else(|error| (error, Vec::new()), |payload| (0, payload));
        let mut answer = u32::try_from(16 + payload.len()).ok()?.to_ne_bytes().to_vec();
        answer.extend(error.to_ne_bytes());
        answer.extend(unique.to_ne_bytes());
        answer.extend(payload);
        Some(answer)
    }

    /// Whether the current transfer gets no reply.
    fn hangs(&mut self) -> bool {
        match &mut self.hang {
            Hang::Flush => false,
            Hang::Transfers(left) => {
                let hangs = *left == 0;
                *left = left.saturating_sub(1);
                hangs
            }
        }
    }

    /// `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, links, size) = if node == ROOT { (0o040_755, 2, 0) } else { (0o100_600, 1, SIZE) };
        let words = [0, 0, 0, mode, links, self.owner, self.owner, 0, 4096, 0];
        let words: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        [longs(&[node, size, size / 512, 0, 0, 0]), words].concat()
    }
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// `struct fuse_init_out` of protocol 7.31, without features.
fn init() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0..4].copy_from_slice(&7_u32.to_ne_bytes());
    bytes[4..8].copy_from_slice(&31_u32.to_ne_bytes());
    bytes[20..24].copy_from_slice(&MAX_WRITE.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_the_sizes_of_the_protocol() {
        let device = File::open("/dev/null").unwrap();
        let mut server = Server { device, owner: 0, hang: Hang::Transfers(1) };
        let request = |opcode: u32, rest: &[u8]| {
            let mut bytes = vec![0; HEADER];
            bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            bytes.extend(rest);
            bytes
        };
        let mut size = |opcode, rest: &[u8]| server.answer(&request(opcode, rest)).map(|bytes| bytes.len());
        assert_eq!(size(26, &[0; 64]), Some(16 + 64));
        assert_eq!(size(1, b"image\0"), Some(16 + 128));
        assert_eq!(size(1, b"other\0"), Some(16));
        assert_eq!(size(3, &[0; 16]), Some(16 + 104));
        assert_eq!(size(14, &[0; 8]), Some(16 + 16));
        assert_eq!(size(16, &[0; 40]), Some(16 + 8));
        assert_eq!(size(15, &[0; 40]), None, "the second transfer hangs");
        assert_eq!(size(25, &[0; 24]), None, "a close hangs");
    }
}
