// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The buffers of a ring: the table of registered buffers, and provided buffers for arriving tags.
//!
//! Knows nothing of devices. Data never passes through here.

use std::hash::{BuildHasher, RandomState};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::{Error, Kind, Result};

/// Slots in the table of registered buffers: the kernel's limit.
pub const BUFFER_SLOTS: u16 = 16_384;
/// Slots at the end, reserved for requests whose own slot is in use.
const SPARE_SLOTS: u16 = 256;

/// Allocation of the slots of the table of registered buffers.
///
/// Every tag of every device has a slot that the driver fills. With more tags than slots, several
/// tags share a slot. If two of them are in flight at once, the later one falls back to a spare
/// slot, which the worker fills.
#[derive(Debug)]
pub struct BufferSlots {
    shared: u16,
    spare: Vec<u16>,
}

impl BufferSlots {
    /// A table with this many slots.
    pub fn new(slots: u16) -> Self {
        let spare = SPARE_SLOTS.min(slots / 2).max(1);
        Self { shared: slots - spare, spare: (slots - spare..slots).rev().collect() }
    }

    /// The slot that the driver fills for the `n`th tag, over all devices.
    pub fn auto_slot_of(&self, n: usize) -> u16 {
        (n % usize::from(self.shared)) as u16
    }

    /// A spare slot, if one is free; return it with [`BufferSlots::release`].
    pub fn take(&mut self) -> Option<u16> {
        self.spare.pop()
    }

    /// Returns a spare slot.
    pub fn release(&mut self, slot: u16) {
        debug_assert!(slot >= self.shared && !self.spare.contains(&slot));
        self.spare.push(slot);
    }
}

/// Bytes of one arrival buffer: 128 tags, the driver's maximum.
const ARRIVAL_BYTES: usize = 256;
const PAGE: usize = 4096;
/// Address spaces, in bits: of most machines, and the smallest.
const ADDRESS_BITS: [u32; 2] = [46, 37];
/// How many addresses are tried in each.
const ADDRESS_TRIES: u32 = 8;

/// A ring of provided buffers, shared by all multishot fetches of an io_uring.
///
/// The memory holds the descriptor ring, then the buffers. It lies where other processes map nothing.
/// When the daemon is killed, Linux 7.0 to 7.3 may hand out tags once more, from a kernel thread that
/// still has the address space of whichever process ran before: it writes them to the same address
/// there. `engine/doc/design/data-path.md` tells more.
#[derive(Debug)]
pub struct ArrivalBuffers {
    memory: NonNull<u8>,
    bytes: usize,
    entries: u16,
    tail: u16,
}

// SAFETY: the memory is owned by this value alone; the kernel's writes to it are announced by CQEs
// that only the owning worker reads.
unsafe impl Send for ArrivalBuffers {}

impl ArrivalBuffers {
    /// Allocates `entries` buffers (a power of two, at most 1024) and provides all of them to the
    /// kernel.
    pub fn new(entries: u16) -> Result<Self> {
        assert!(entries.is_power_of_two() && entries <= 1024);
        let bytes = usize::from(entries) * (size_of::<BufRingEntry>() + ARRIVAL_BYTES);
        let bytes = bytes.next_multiple_of(PAGE);
        let memory = map_remotely(bytes)?;
        let mut buffers = Self { memory, bytes, entries, tail: 0 };
        for id in 0..entries {
            buffers.provide(id);
        }
        Ok(buffers)
    }

    /// Address and number of entries, for registration. Valid for as long as `self` lives.
    pub fn registration(&self) -> (u64, u16) {
        (self.memory.as_ptr() as u64, self.entries)
    }

    fn buffer(&self, id: u16) -> NonNull<u8> {
        let start = usize::from(self.entries) * size_of::<BufRingEntry>() + usize::from(id) * ARRIVAL_BYTES;
        // SAFETY: `id` is below `entries` (checked by the callers), so the place is inside
        // `memory`.
        unsafe { self.memory.add(start) }
    }

    /// The first `bytes` of buffer `id` as tags; none if the kernel names an impossible buffer.
    pub fn tags(&self, id: u16, bytes: usize) -> Option<&[u16]> {
        if id >= self.entries || bytes > ARRIVAL_BYTES {
            return None;
        }
        // SAFETY: inside the buffer, aligned to 2 (buffers are 256 bytes apart from a page's
        // start), initialised (zeroed at birth, then written by the kernel), and left alone by the
        // kernel until `provide`, which needs `&mut self`.
        Some(unsafe { std::slice::from_raw_parts(self.buffer(id).cast::<u16>().as_ptr(), bytes / 2) })
    }

    /// Provides buffer `id` to the kernel (again).
    pub fn provide(&mut self, id: u16) {
        assert!(id < self.entries);
        let address = self.buffer(id).as_ptr() as u64;
        let index = self.tail & (self.entries - 1);
        let ring = self.memory.cast::<BufRingEntry>();
        // SAFETY: `index` is below `entries`, so the descriptor is inside `memory`; the kernel does
        // not read it before the tail has passed it. Field by field, since the first descriptor's
        // last field is the tail itself.
        unsafe {
            let entry = &mut *ring.add(usize::from(index)).as_ptr();
            entry.set_addr(address);
            entry.set_len(ARRIVAL_BYTES as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the ring's memory is page-aligned and initialised; the tail is an aligned u16
        // shared with the kernel, hence atomic; release publishes the descriptor.
        unsafe { AtomicU16::from_ptr(BufRingEntry::tail(ring.as_ptr()).cast_mut()) }
            .store(self.tail, Ordering::Release);
    }
}

impl Drop for ArrivalBuffers {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; the ring that knew the memory is closed before
        // (`Ring` drops its io_uring first) or leaks this value.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}

/// Maps zeroed memory at a random address between those that the kernel chooses for programs and their
/// heaps, and for all else.
fn map_remotely(bytes: usize) -> Result<NonNull<u8>> {
    let random = RandomState::new();
    let mut failure = Errno::NOMEM;
    for (bits, attempt) in
        ADDRESS_BITS.into_iter().flat_map(|bits| (0..ADDRESS_TRIES).map(move |n| (bits, n)))
    {
        // The second and third quarter.
        let quarter = 1_usize << (bits - 2);
        let address = quarter + random.hash_one((bits, attempt)) as usize % (2 * quarter);
        let hint = std::ptr::without_provenance_mut(address & !(PAGE - 1));
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: FIXED_NOREPLACE fails where something is mapped, so no other memory changes.
        match unsafe { mmap_anonymous(hint, bytes, protection, flags) } {
            Ok(memory) => {
                return NonNull::new(memory.cast())
                    .ok_or_else(|| Error::new(Kind::Internal, "arrival buffers: mapped at zero"));
            }
            Err(error) => failure = error,
        }
    }
    Err(Error::os(failure, "cannot map arrival buffers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_slots_run_out_and_are_reused() {
        let mut slots = BufferSlots::new(4);
        assert_eq!((slots.auto_slot_of(0), slots.auto_slot_of(1), slots.auto_slot_of(2)), (0, 1, 0));
        let (a, b) = (slots.take().unwrap(), slots.take().unwrap());
        assert!(a != b && a >= 2 && b >= 2);
        assert_eq!(slots.take(), None);
        slots.release(a);
        assert_eq!(slots.take(), Some(a));
    }

    /// Programs, heaps, libraries and stacks lie elsewhere.
    #[test]
    fn buffers_are_far_from_all_else() {
        let all: Vec<ArrivalBuffers> = (0..32).map(|_| ArrivalBuffers::new(64).unwrap()).collect();
        let own: Vec<u64> = all.iter().map(|buffers| buffers.registration().0).collect();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for start in
            maps.lines().map(|line| u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap())
        {
            let is_far = own.iter().all(|own| own.abs_diff(start) > 1 << 30);
            assert!(own.contains(&start) || is_far, "{start:x} is near {own:x?}");
        }
    }

    #[test]
    fn rejects_tags_outside_the_buffers() {
        let mut buffers = ArrivalBuffers::new(8).unwrap();
        assert_eq!(buffers.tags(7, 4), Some(&[0, 0][..]));
        assert_eq!(buffers.tags(8, 4), None);
        assert_eq!(buffers.tags(0, 258), None);
        for round in 0..100_000u32 {
            buffers.provide((round % 8) as u16);
        }
    }
}
