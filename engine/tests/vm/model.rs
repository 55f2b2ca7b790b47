// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Repeatable pseudo-random bytes and numbers, the expected content of devices.
//!
//! Pure computation.

/// A sequence of numbers that depends only on its seed (splitmix64).
pub(crate) struct Numbers(u64);

impl Numbers {
    /// The sequence of a seed.
    pub(crate) fn new(seed: u64) -> Numbers {
        Numbers(seed)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// `len` bytes that depend only on `seed`. None of them is zero, so that a zero is always a change.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(numbers.next().to_le_bytes().map(|b| b.max(1)));
    }
    bytes.truncate(len);
    bytes
}
