// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The types of the data path: what a block device is asked, and what it answers.
//!
//! Imports no other module. A frontend produces a [`Request`]. The worker submits the operations on
//! the image that it needs. Each request gets exactly one [`Completion`].

/// Bytes in a sector, the unit in which the block layer counts.
pub const SECTOR: u64 = 512;

/// The operation of a [`Request`], which holds offset and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read into the request's buffer.
    Read,
    /// Write from the request's buffer; with `fua`, durable before it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make every write that completed before this request durable.
    Flush,
    /// Discard the range: its content is undefined afterwards.
    Discard,
    /// Zero the range; with `unmap` the file system may free its blocks.
    WriteZeroes {
        /// Blocks may be deallocated.
        unmap: bool,
        /// Durable before it completes.
        fua: bool,
    },
    /// Allocate blocks for the range. Its content stays.
    Reserve,
    /// An unknown operation. It fails with EOPNOTSUPP.
    Unknown(u8),
}

impl Op {
    /// Whether it changes the image, and only a flush makes the change durable for sure.
    pub fn is_plain_change(self) -> bool {
        match self {
            Op::Write { fua } => !fua,
            Op::Discard | Op::WriteZeroes { .. } | Op::Reserve => true,
            Op::Read | Op::Flush | Op::Unknown(_) => false,
        }
    }
}

/// Number of a request within its queue: 0 .. queue depth.
pub type Tag = u16;

/// Number of a queue within its device: 0 .. number of queues.
pub type QueueId = u16;

/// One request of the block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number within the queue, free for reuse after completion.
    pub tag: Tag,
    /// The operation.
    pub op: Op,
    /// First byte, relative to the start of the device.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u32,
}

/// The answer to one [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's number.
    pub tag: Tag,
    /// Bytes transferred (always all of them), 0 for operations without data, or a negative errno.
    pub result: i32,
}

/// A request that must be completed exactly once.
///
/// The code that accepts a request holds one of these. [`PendingRequest::complete`] is the only way
/// to obtain a [`Completion`]. Dropping one without completion would hang the submitter: it panics
/// with debug assertions and logs an error without.
#[derive(Debug)]
#[must_use = "a request that is not completed hangs its submitter"]
pub struct PendingRequest(Tag);

impl PendingRequest {
    /// Accepts request `tag`.
    pub fn new(tag: Tag) -> Self {
        Self(tag)
    }

    /// Completes the request.
    pub fn complete(self, result: i32) -> Completion {
        let tag = self.0;
        std::mem::forget(self);
        Completion { tag, result }
    }

    /// Forgets the request: the driver completed it (linked commit) or ended it with the device.
    pub fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        debug_assert!(false, "request {} was dropped without a completion", self.0);
        tracing::error!(tag = self.0, "a request was dropped without a completion");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped without a completion")]
    fn dropping_a_pending_request_panics() {
        drop(PendingRequest::new(3));
    }

    #[test]
    fn completed_and_abandoned_requests_drop_silently() {
        assert_eq!(PendingRequest::new(3).complete(-5), Completion { tag: 3, result: -5 });
        PendingRequest::new(4).abandon();
    }
}
