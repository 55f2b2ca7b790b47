//! What a CQE is about, packed into its 64 bits of user data.
//!
//! Knows the layout only: kind (8 bits), generation (24), device slot (16), tag (16). The
//! generation tells a late CQE of a device that is gone from one of the slot's next tenant.

use crate::request::Tag;

/// Which step of which machinery has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The worker's own eventfd: a message waits.
    Wake = 0,
    /// A read, write or zeroing of the image for one request.
    Data = 1,
    /// The fsync of a device's queue.
    Flush = 2,
    /// The punched hole of a device's queue.
    Punch = 3,
    /// The frontend's own: requests have arrived.
    Fetch = 4,
    /// The frontend's own: results were taken.
    Commit = 5,
    /// The frontend's own: tags were announced.
    Prepare = 6,
    /// The frontend's own: a request's pages became a registered buffer.
    Register = 7,
    /// The frontend's own: they ceased to be one.
    Unregister = 8,
    /// Nothing: a no-op.
    Idle = 9,
}

impl Step {
    fn from_bits(bits: u8) -> Option<Step> {
        use Step::*;
        [Wake, Data, Flush, Punch, Fetch, Commit, Prepare, Register, Unregister, Idle]
            .get(usize::from(bits))
            .copied()
    }
}

/// Which queue of which device on this ring: slot and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId {
    /// Place in the worker's table of devices, and in its table of files.
    pub index: u16,
    /// How often the place was let before, modulo 2^24.
    pub generation: u32,
}

/// One CQE's subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Which step.
    pub step: Step,
    /// Of which device.
    pub slot: SlotId,
    /// Of which request, or a number of the step's own.
    pub tag: Tag,
}

impl Token {
    /// Packs a token.
    pub const fn pack(step: Step, slot: SlotId, tag: Tag) -> u64 {
        (step as u64) << 56
            | ((slot.generation & 0xff_ffff) as u64) << 32
            | (slot.index as u64) << 16
            | tag as u64
    }

    /// Unpacks what [`Token::pack`] packed; none for anything else.
    pub fn unpack(bits: u64) -> Option<Token> {
        let slot = SlotId { index: (bits >> 16) as u16, generation: (bits >> 32) as u32 & 0xff_ffff };
        Some(Token { step: Step::from_bits((bits >> 56) as u8)?, slot, tag: bits as u16 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpack_inverts_pack(step in 0u8..10, index: u16, generation in 0u32..1 << 24, tag: u16) {
            let step = Step::from_bits(step).unwrap();
            let slot = SlotId { index, generation };
            prop_assert_eq!(Token::unpack(Token::pack(step, slot, tag)), Some(Token { step, slot, tag }));
        }

        #[test]
        fn any_bits_are_survived(bits: u64) {
            if let Some(token) = Token::unpack(bits) {
                prop_assert_eq!(Token::pack(token.step, token.slot, token.tag), bits);
            }
        }
    }
}
