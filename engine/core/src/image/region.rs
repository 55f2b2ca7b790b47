// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bounded reads of the part of a file that a device maps.
//!
//! Handles alignment (the file may be open with O_DIRECT) and ends; does not know the content.

use std::io;
use std::os::fd::BorrowedFd;

/// Maximum alignment of direct I/O for offsets, lengths and memory.
const ALIGN: u64 = 4096;
/// Maximum bytes per read.
const CHUNK: usize = 64 << 10;

/// A readable part of a file. Reads may block as long as the file does.
#[derive(Debug)]
pub struct Region<'a> {
    file: BorrowedFd<'a>,
    offset: u64,
    size: u64,
    memory: Vec<u8>,
    /// First byte of `memory` that is aligned.
    start: usize,
}

impl<'a> Region<'a> {
    /// The `size` bytes of `file` from `offset`. Bytes beyond the end of the file are never read.
    pub fn new(file: BorrowedFd<'a>, offset: u64, size: u64) -> Region<'a> {
        let memory = vec![0; CHUNK + ALIGN as usize];
        let start = memory.as_ptr().align_offset(ALIGN as usize);
        Region { file, offset, size: size.min(u64::MAX - offset), memory, start }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `into` from byte `at` on. False: the region or the file ends before.
    pub fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<bool> {
        let end = at.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Ok(false);
        }
        let mut position = self.offset + at;
        let mut rest = into;
        while !rest.is_empty() {
            let skip = (position % ALIGN) as usize;
            let wanted = (skip + rest.len()).next_multiple_of(ALIGN as usize).min(CHUNK);
            let page = self.memory.get_mut(self.start..self.start + wanted).unwrap_or_default();
            let file = self.file;
            let from = position - skip as u64;
            let got = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *page, from));
            let got = match got {
                Ok(got) => got,
                // Offsets above 2^63: no file is that long.
                Err(rustix::io::Errno::INVAL) if i64::try_from(from).is_err() => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let Some(new) = page.get(skip..got).filter(|new| !new.is_empty()) else { return Ok(false) };
            let count = new.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&new[..count]);
            rest = later;
            position += count as u64;
        }
        Ok(true)
    }

    /// Reads `N` bytes from byte `at` on, if possible.
    pub fn bytes<const N: usize>(&mut self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes).ok()?.then_some(bytes)
    }
}

/// The little-endian number of `N` bytes at `at`; 0 where there is none.
pub(super) fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + N.min(8)).unwrap_or_default();
    part.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}
