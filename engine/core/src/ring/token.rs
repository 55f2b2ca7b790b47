// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The subject of a CQE, packed into its 64 bits of user data.
//!
//! Knows the layout only: kind (8 bits), generation (24), device slot (16), tag (16). The
//! generation distinguishes a late CQE of a removed device from those of the slot's next device.

use crate::request::Tag;

/// Which kind of operation has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// The worker's eventfd: a message is pending.
    Wake = 0,
    /// A read, write or zeroing of the image for one request.
    Data = 1,
    /// The fdatasync of a device's queue.
    Flush = 2,
    /// The hole punch of a device's queue.
    Punch = 3,
    /// Frontend: requests have arrived.
    Fetch = 4,
    /// Frontend: a commit has completed.
    Commit = 5,
    /// Frontend: the tags were prepared.
    Prepare = 6,
    /// Frontend: a request's pages were registered as a buffer.
    Register = 7,
    /// Frontend: the buffer was unregistered.
    Unregister = 8,
    /// A no-op.
    Nop = 9,
}

impl EventKind {
    fn from_bits(bits: u8) -> Option<EventKind> {
        use EventKind::*;
        [Wake, Data, Flush, Punch, Fetch, Commit, Prepare, Register, Unregister, Nop]
            .get(usize::from(bits))
            .copied()
    }
}

/// Which queue of which device on this ring: slot and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId {
    /// Index in the worker's table of devices, and in its table of files.
    pub index: u16,
    /// How often the slot was allocated before, modulo 2^24.
    pub generation: u32,
}

/// One CQE's subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The kind.
    pub kind: EventKind,
    /// The device's slot.
    pub slot: SlotId,
    /// The request's tag, or a number whose meaning depends on the kind.
    pub tag: Tag,
}

impl Token {
    /// Packs a token.
    pub const fn pack(kind: EventKind, slot: SlotId, tag: Tag) -> u64 {
        (kind as u64) << 56
            | ((slot.generation & 0xff_ffff) as u64) << 32
            | (slot.index as u64) << 16
            | tag as u64
    }

    /// Unpacks what [`Token::pack`] packed; none for anything else.
    pub fn unpack(bits: u64) -> Option<Token> {
        let slot = SlotId { index: (bits >> 16) as u16, generation: (bits >> 32) as u32 & 0xff_ffff };
        Some(Token { kind: EventKind::from_bits((bits >> 56) as u8)?, slot, tag: bits as u16 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpack_inverts_pack(kind in 0u8..10, index: u16, generation in 0u32..1 << 24, tag: u16) {
            let kind = EventKind::from_bits(kind).unwrap();
            let slot = SlotId { index, generation };
            prop_assert_eq!(Token::unpack(Token::pack(kind, slot, tag)), Some(Token { kind, slot, tag }));
        }

        #[test]
        fn unpack_accepts_any_bits(bits: u64) {
            if let Some(token) = Token::unpack(bits) {
                prop_assert_eq!(Token::pack(token.kind, token.slot, token.tag), bits);
            }
        }
    }
}
