// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reusable memory for the data of requests, aligned for direct I/O.
//!
//! A reused buffer keeps its old content until it is overwritten. Readers read only what was filled
//! in for their request.

use crossbeam::queue::ArrayQueue;

use super::MAX_REQUEST;

/// The alignment that every file system and disk accepts.
const ALIGN: usize = 4096;
/// Buffer sizes, and how many of each are kept: at most 45 MiB per instance.
const KEPT: [(usize, usize); 3] = [(4 << 10, 512), (128 << 10, 64), (MAX_REQUEST as usize, 32)];

/// One request's memory.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start, len }
    }

    /// Its address: a multiple of 4096.
    pub(super) fn address(&mut self) -> usize {
        self.bytes[self.start..].as_mut_ptr() as usize
    }

    /// Its first `len` bytes.
    pub(super) fn filled(&self, len: usize) -> &[u8] {
        &self.bytes[self.start..][..len.min(self.len)]
    }

    fn fill(&mut self, data: &[u8]) {
        self.bytes[self.start..][..data.len()].copy_from_slice(data);
    }
}

/// The unused buffers.
#[derive(Debug)]
pub(super) struct BufferPool([ArrayQueue<Buffer>; KEPT.len()]);

impl BufferPool {
    pub(super) fn new() -> Self {
        Self(KEPT.map(|(_, number)| ArrayQueue::new(number)))
    }

    /// A buffer for `len` bytes; none if that exceeds a request.
    pub(super) fn take(&self, len: usize) -> Option<Buffer> {
        let class = KEPT.iter().position(|(size, _)| len <= *size)?;
        Some(self.0[class].pop().unwrap_or_else(|| Buffer::new(KEPT[class].0)))
    }

    /// A buffer with this content.
    pub(super) fn take_filled(&self, data: &[u8]) -> Option<Buffer> {
        let mut buffer = self.take(data.len())?;
        buffer.fill(data);
        Some(buffer)
    }

    /// Keeps a buffer for reuse, if there is space.
    pub(super) fn give(&self, buffer: Buffer) {
        if let Some(class) = KEPT.iter().position(|(size, _)| buffer.len == *size) {
            let _ = self.0[class].push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_large_enough_and_reused() {
        let buffers = BufferPool::new();
        for len in [0, 1, 4096, 4097, 128 << 10, 1 << 20] {
            let mut buffer = buffers.take(len).unwrap();
            let address = buffer.address();
            assert!(address.is_multiple_of(ALIGN) && buffer.len >= len, "{len}: {address:#x}");
            buffers.give(buffer);
            assert_eq!(buffers.take(len).unwrap().address(), address);
        }
        assert!(buffers.take((1 << 20) + 1).is_none());
        assert_eq!(buffers.take_filled(b"abc").unwrap().filled(3), b"abc");
    }
}
