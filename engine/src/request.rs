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
    /// The range has blocks of its own afterwards; its content stays.
    Reserve,
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

/// The duty to answer one request, exactly once.
///
/// Whoever takes a request on holds one; [`Owed::pay`] is the only way to a [`Completion`]. One
/// that is dropped unpaid is a request that the block layer would wait for for ever: a panic
/// where debug assertions are on, an error in the log elsewhere.
#[derive(Debug)]
#[must_use = "a request that is not completed hangs its submitter"]
pub struct Owed(Tag);

impl Owed {
    /// Takes on request `tag`.
    pub fn new(tag: Tag) -> Self {
        Self(tag)
    }

    /// Answers it.
    pub fn pay(self, result: i32) -> Completion {
        let tag = self.0;
        std::mem::forget(self);
        Completion { tag, result }
    }

    /// The driver has taken the answer itself (a linked commit), or has ended the request (its
    /// device is gone).
    pub fn settled(self) {
        std::mem::forget(self);
    }
}

impl Drop for Owed {
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
    fn an_unpaid_request_is_a_panic() {
        drop(Owed::new(3));
    }

    #[test]
    fn a_paid_request_is_quiet() {
        assert_eq!(Owed::new(3).pay(-5), Completion { tag: 3, result: -5 });
        Owed::new(4).settled();
    }
}
