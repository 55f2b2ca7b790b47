// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue of one device on its worker: accepts requests, submits their operations, completes
//! them.
//!
//! Knows the image's geometry and the meaning of results. Does not know the driver (the transport
//! does) or other devices. Never blocks.

mod coalesced;
mod held;
mod sync_policy;

use std::sync::Arc;

use io_uring::{cqueue, squeue};

use held::Held;
use sync_policy::SyncPolicy;

use super::stats::QueueStats;
use super::transport::{QueueSlot, Transport};
use super::{RoundClock, Throttle, translate};
use crate::error::{Error, Kind, Result};
use crate::image::{DiscardQueue, FlushQueue, Geometry, Image, QuietMoment};
use crate::request::{Op, PendingRequest, Request, Tag};
use crate::ring::{EventKind, InFlight, Ring, Token};

/// How often one interrupted or refused operation is retried.
const RETRIES: u8 = 16;

/// The operation in progress for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its data is being transferred.
    Transfer,
    /// Transfer and commit are one linked chain: a completion arrives only if it breaks.
    Linked,
    /// The file system zeroes or allocates its range.
    Zeroing,
    /// Zeroes are being written to its range.
    WritingZeroes,
    /// The zeroed range is being made durable.
    Syncing,
    /// It waits for one operation that completes several requests.
    Coalesced,
}

/// A request that is in flight.
#[derive(Debug)]
struct ActiveRequest {
    pending: PendingRequest,
    request: Request,
    stage: Stage,
    /// It modifies the image, and is not durable when it ends.
    plain: bool,
    done: u32,
    retries: u8,
    /// Arrival time, for sampled requests.
    arrived_ns: Option<u64>,
}

/// One queue of one device.
#[derive(Debug)]
pub struct DeviceQueue<T> {
    queue_slot: QueueSlot,
    transport: T,
    /// Keeps the image open while anything may be in flight.
    image: Arc<Image>,
    geometry: Geometry,
    linked_commit: bool,
    in_flight: InFlight<ActiveRequest>,
    linked: usize,
    flushes: FlushQueue,
    discards: DiscardQueue,
    /// Offset and length of the hole being punched.
    punch: Option<(u64, u64)>,
    coalesced_retries: u8,
    arrived: Vec<Request>,
    held: Held,
    completed_tags: Vec<Tag>,
    sync: SyncPolicy,
    /// Before the fdatasync in flight.
    quiet_moment: Option<QuietMoment>,
    stats: QueueStats,
}

impl<T: Transport> DeviceQueue<T> {
    /// Registers the queue's files and asks the driver for requests.
    pub fn new(
        queue_slot: QueueSlot,
        mut transport: T,
        image: Arc<Image>,
        throttle: Arc<Throttle>,
        linked_commit: bool,
        ring: &mut Ring,
    ) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let depth = transport.depth();
        let geometry = image.geometry();
        ring.set_file(queue_slot.frontend_file().0, transport.file())?;
        ring.set_file(queue_slot.image_file().0, image.fd().as_raw_fd())?;
        transport.arm(queue_slot, ring)?;
        Ok(Self {
            queue_slot,
            transport,
            image,
            geometry,
            linked_commit,
            in_flight: InFlight::new(depth),
            linked: 0,
            flushes: FlushQueue::new(depth),
            discards: DiscardQueue::new(depth, geometry.discard_granularity),
            punch: None,
            coalesced_retries: 0,
            arrived: Vec::with_capacity(usize::from(depth)),
            held: Held::new(throttle),
            completed_tags: Vec::with_capacity(usize::from(depth)),
            sync: SyncPolicy::default(),
            quiet_moment: None,
            stats: QueueStats::default(),
        })
    }

    /// Marks the queue as failed: requests may hang.
    pub fn set_failed(&mut self) {
        self.stats.failed = true;
    }

    /// Its slot on the ring.
    pub fn queue_slot(&self) -> QueueSlot {
        self.queue_slot
    }

    /// A copy of its statistics.
    pub fn stats(&self) -> QueueStats {
        let in_flight = (self.busy() + self.held.count()) as u64;
        QueueStats { in_flight, fallbacks: self.transport.fallbacks(), ..self.stats.clone() }
    }

    /// Adopts the image's new size.
    pub fn set_geometry(&mut self, geometry: Geometry) {
        self.geometry = geometry;
        self.stats.degraded = false;
    }

    /// Replaces the image. The file table keeps the old file until the operations in flight on it
    /// end. Retries go to the new file, and modifications in flight count there when they end.
    /// Therefore it must be the same file, with the same `Durability`, or read-only, or the old image
    /// must have had size 0.
    pub fn replace(&mut self, image: Arc<Image>, ring: &mut Ring) -> Result<()> {
        use std::os::fd::AsRawFd;
        ring.set_file(self.queue_slot.image_file().0, image.fd().as_raw_fd())?;
        if self.busy() == 0 {
            self.discards = DiscardQueue::new(self.transport.depth(), image.geometry().discard_granularity);
        }
        self.set_geometry(image.geometry());
        self.image = image;
        Ok(())
    }

    /// Requests in flight, without those whose chain may have ended.
    pub fn busy(&self) -> usize {
        self.in_flight.len() - self.linked
    }

    /// Nothing of it is in flight at the driver or the image: it can be dropped.
    pub fn is_idle(&self) -> bool {
        self.transport.is_drained() && self.busy() == 0 && self.held.count() == 0
    }

    /// Unregisters its files and abandons the requests that the driver ended.
    pub fn close(mut self, ring: &mut Ring) -> Result<()> {
        for active in self.in_flight.drain() {
            if active.plain {
                self.image.durability().end();
            }
            active.pending.abandon();
        }
        ring.clear_file(self.queue_slot.image_file().0)?;
        ring.clear_file(self.queue_slot.frontend_file().0)
    }

    /// Handles one completion of this queue.
    pub fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        clock: &RoundClock,
    ) -> Result<()> {
        match token.kind {
            EventKind::Data => self.on_data(token.tag, entry.result(), ring, clock),
            EventKind::Flush => self.on_flush(entry.result(), ring, clock),
            EventKind::Punch => self.on_punch(entry.result(), ring, clock),
            _ => {
                self.transport.on_event(token, entry, ring, &mut self.arrived)?;
                if self.arrived.is_empty() {
                    return Ok(());
                }
                self.stats.batches += 1;
                let arrived = std::mem::take(&mut self.arrived);
                let outcome = self.accept_all(&arrived, ring, clock);
                self.arrived = arrived;
                self.arrived.clear();
                outcome
            }
        }
    }

    /// Ends a round: commits all completions together.
    pub fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        self.transport.submit_commits(ring)
    }

    /// Requests wait for a buffer slot of the ring.
    pub fn is_waiting_for_buffer(&self) -> bool {
        self.transport.is_waiting_for_buffer()
    }

    /// Retries them.
    pub fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        self.transport.retry_waiting(ring)
    }

    /// Accepts a request.
    fn accept(
        &mut self,
        request: Request,
        isolated: bool,
        ring: &mut Ring,
        clock: &RoundClock,
    ) -> Result<()> {
        let tag = request.tag;
        if self.in_flight.get_mut(tag).is_some_and(|active| active.stage == Stage::Linked) {
            // The driver reuses the tag, so its chain has completed.
            self.complete_linked(tag);
        }
        let rejection = self.rejection(&request);
        let request = self.count_change(request, rejection.is_some());
        let plain = rejection.is_none() && request.op.is_plain_change();
        let sampled = self.stats.arrived();
        let transfers = matches!(request.op, Op::Read | Op::Write { .. });
        let mut active = ActiveRequest {
            pending: PendingRequest::new(tag),
            request,
            stage: if transfers { Stage::Transfer } else { Stage::Coalesced },
            plain,
            done: 0,
            retries: 0,
            arrived_ns: (sampled && transfers).then(|| clock.now_ns()),
        };
        // Nobody sees the end of a chain: a flush could not tell that the write has ended.
        let end_matters = plain && self.image.durability().is_in_row();
        let linked = transfers
            && isolated
            && self.linked_commit
            && !(sampled || end_matters || self.image.may_block());
        let commit = match (linked, rejection) {
            (true, None) => self.transport.linked_commit(tag, request.len),
            _ => None,
        };
        if commit.is_some() {
            active.stage = Stage::Linked;
        }
        if let Err((_, active)) = self.in_flight.begin(tag, active) {
            active.pending.abandon();
            return Err(Error::new(Kind::Internal, format!("the driver handed out tag {tag} twice")));
        }
        if commit.is_some() {
            self.linked += 1;
            // Success produces no completion: counted now, undone on failure.
            self.stats.completed(request.op, request.len, 0, &self.image);
        }
        if let Some(errno) = rejection {
            return self.complete(tag, -errno, ring, clock);
        }
        match (request.op, commit) {
            (Op::Read | Op::Write { .. }, Some(commit)) => {
                let transfer = self
                    .transfer(&request, 0)
                    .flags(squeue::Flags::FIXED_FILE | squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS);
                ring.push_chain(&[transfer, commit])
            }
            (Op::Read | Op::Write { .. }, None) => ring.push(&self.transfer(&request, 0)),
            // Started at the end of the round.
            (Op::Flush, _) => {
                self.flushes.push(tag);
                Ok(())
            }
            (Op::Discard, _) => {
                self.discards.push(tag, self.geometry.offset + request.offset, u64::from(request.len));
                self.start_punch(ring, clock)
            }
            (op @ (Op::WriteZeroes { .. } | Op::Reserve), _) => {
                self.set_stage(tag, Stage::Zeroing);
                let offset = self.geometry.offset + request.offset;
                self.stats.punts += 1;
                let zero =
                    translate::allocate(op, self.queue_slot.image_file(), offset, u64::from(request.len));
                ring.push(&self.token(zero, EventKind::Data, tag))
            }
            (Op::Unknown(_), _) => self.complete(tag, -libc::EOPNOTSUPP, ring, clock),
        }
    }

    /// The errno for a request that cannot be accepted.
    fn rejection(&self, request: &Request) -> Option<i32> {
        let modifies = !matches!(request.op, Op::Read | Op::Flush);
        let end = request.offset.checked_add(u64::from(request.len));
        if modifies && self.geometry.read_only {
            Some(libc::EPERM)
        } else if end.is_none_or(|end| end > self.geometry.size) {
            Some(libc::EIO)
        } else {
            None
        }
    }

    fn token(&self, entry: squeue::Entry, step: EventKind, tag: Tag) -> squeue::Entry {
        let async_flag = if self.image.may_block() { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        entry
            .user_data(Token::pack(step, self.queue_slot.id, tag))
            .flags(squeue::Flags::FIXED_FILE | async_flag)
    }

    fn transfer(&self, request: &Request, done: u32) -> squeue::Entry {
        let data = self.transport.data(request.tag);
        let offset = self.geometry.offset + request.offset;
        let entry =
            translate::transfer(request.op, self.queue_slot.image_file(), data, offset, done, request.len);
        self.token(entry, EventKind::Data, request.tag)
    }

    fn set_stage(&mut self, tag: Tag, stage: Stage) {
        if let Some(active) = self.in_flight.get_mut(tag) {
            active.stage = stage;
        }
    }

    fn complete_linked(&mut self, tag: Tag) {
        if let Some(active) = self.in_flight.finish(tag) {
            self.linked -= 1;
            self.end_plain(&active);
            active.pending.abandon();
        }
    }

    /// Handles the result of an operation on the image.
    fn on_data(&mut self, tag: Tag, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        let Some(active) = self.in_flight.get_mut(tag) else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} completed but is not in flight")));
        };
        if active.stage == Stage::Linked {
            // The transfer broke the chain and cancelled its commit: complete without a chain.
            active.stage = Stage::Transfer;
            self.linked -= 1;
            self.stats.undo_completed(active.request.op, active.request.len);
        }
        let (request, stage) = (active.request, active.stage);
        let interrupted = matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR);
        let moves = matches!(stage, Stage::Transfer | Stage::WritingZeroes);
        if interrupted || moves && result == -libc::EINVAL && self.image.disable_direct_io() {
            active.retries += 1;
            if active.retries > RETRIES {
                return self.complete(tag, -libc::EIO, ring, clock);
            }
            self.stats.punts += 1;
            return self.resubmit(tag, ring);
        }
        match stage {
            Stage::Transfer | Stage::WritingZeroes if result > 0 => {
                active.done = active.done.saturating_add(result.unsigned_abs()).min(request.len);
                if active.done < request.len {
                    // The image ends within a block (direct I/O stops nowhere else).
                    if !active.done.is_multiple_of(self.geometry.block_size) {
                        self.stats.degraded |= request.op == Op::Read;
                        return self.complete(tag, -libc::EIO, ring, clock);
                    }
                    return self.resubmit(tag, ring);
                }
                match (stage, request.op) {
                    (Stage::WritingZeroes, Op::WriteZeroes { fua, .. }) => {
                        self.on_zeroed(tag, fua, ring, clock)
                    }
                    _ => self.complete(tag, request.len.cast_signed(), ring, clock),
                }
            }
            Stage::Transfer | Stage::WritingZeroes if result == 0 => {
                // Nothing was transferred: the image is shorter than the device (read), or the file
                // system is full (write). Never reported as success.
                self.stats.degraded |= request.op == Op::Read;
                self.complete(tag, -libc::EIO, ring, clock)
            }
            Stage::Zeroing if result == 0 => match request.op {
                Op::WriteZeroes { fua, .. } => self.on_zeroed(tag, fua, ring, clock),
                _ => self.complete(tag, 0, ring, clock),
            },
            Stage::Zeroing
                if request.op != Op::Reserve && matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS) =>
            {
                active.stage = Stage::WritingZeroes;
                self.resubmit(tag, ring)
            }
            _ => self.complete(tag, result, ring, clock),
        }
    }

    /// Resubmits the rest of a request.
    fn resubmit(&mut self, tag: Tag, ring: &mut Ring) -> Result<()> {
        self.stats.resubmits += 1;
        let Some(active) = self.in_flight.get_mut(tag) else { return Ok(()) };
        let (request, stage, done) = (active.request, active.stage, active.done);
        let (image, offset) = (self.queue_slot.image_file(), self.geometry.offset + request.offset);
        let entry = match (stage, request.op) {
            (Stage::WritingZeroes, _) => {
                translate::write_zeroes(image, offset + u64::from(done), request.len - done)
            }
            (Stage::Syncing, _) => translate::sync(image),
            (_, op @ (Op::WriteZeroes { .. } | Op::Reserve)) => {
                translate::allocate(op, image, offset, u64::from(request.len))
            }
            _ => self.transfer(&request, done),
        };
        ring.push(&self.token(entry, EventKind::Data, tag))
    }

    /// Completes a zeroed range, after an fdatasync for FUA.
    fn on_zeroed(&mut self, tag: Tag, fua: bool, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        if !fua {
            return self.complete(tag, 0, ring, clock);
        }
        self.set_stage(tag, Stage::Syncing);
        ring.push(&self.token(translate::sync(self.queue_slot.image_file()), EventKind::Data, tag))
    }

    /// Completes a request.
    fn complete(&mut self, tag: Tag, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        let Some(active) = self.in_flight.finish(tag) else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} was completed twice")));
        };
        self.end_plain(&active);
        self.stats.completed(active.request.op, active.request.len, result, &self.image);
        if let Some(arrived_ns) = active.arrived_ns {
            self.stats.record_latency(clock.now_ns().saturating_sub(arrived_ns));
        }
        self.transport.complete(active.pending.complete(result), ring)
    }
}
