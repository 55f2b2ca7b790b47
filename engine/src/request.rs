//! The vocabulary of the data path: what a block device is asked, and what it answers.
//!
//! Imports no room. A frontend makes [`Request`]s, the worker turns them into operations on the
//! image, and exactly one [`Completion`] goes back for each.

/// Bytes in a sector, the unit in which the block layer counts.
pub const SECTOR: u64 = 512;

/// What is asked of the device. Offsets and lengths are in the [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read into the request's buffer.
    Read,
    /// Write from the request's buffer; with `fua`, durable before it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything written and completed before this is durable when it completes.
    Flush,
    /// The range's content is of no interest any more.
    Discard,
    /// The range reads as zeroes afterwards; with `unmap` its blocks may be freed.
    WriteZeroes {
        /// Blocks may be deallocated.
        unmap: bool,
        /// Durable before it completes.
        fua: bool,
    },
    /// An operation this program does not know. It is failed with EOPNOTSUPP.
    Unknown(u8),
}

/// The number of a request within its queue: 0 .. queue depth.
pub type Tag = u16;

/// The number of a queue within its device: 0 .. number of queues.
pub type QueueId = u16;

/// One request of the block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number within the queue; free again once it is completed.
    pub tag: Tag,
    /// What is asked.
    pub op: Op,
    /// First byte, counted from the start of the device.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u32,
}

/// The answer to one [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's number.
    pub tag: Tag,
    /// Bytes done (always all of them), 0 for operations without data, or a negative errno.
    pub result: i32,
}
