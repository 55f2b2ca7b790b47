//! One queue of one device on its worker: takes requests on, has them done, answers them.
//!
//! Knows the image's geometry and what the kernel's answers mean. Does not know the driver (that
//! is the transport) nor other devices. Nothing here waits.

use std::sync::Arc;

use io_uring::{cqueue, squeue};

use super::stats::QueueStats;
use super::translate;
use super::transport::{Place, Transport};
use crate::error::{Error, Kind, Result};
use crate::image::{DiscardQueue, FlushQueue, Geometry, Image};
use crate::request::{Op, Owed, Request, Tag};
use crate::ring::{InFlight, Ring, Step, Token};

/// Times that an interrupted or refused operation of one request is sent again.
const RETRIES: u8 = 16;

/// What is being done for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its data is transferred.
    Transfer,
    /// Transfer and commit went as one chain: no completion comes unless it breaks.
    Linked,
    /// The file system zeroes its range, or reserves blocks for it.
    Zeroing,
    /// Zeroes are written over its range.
    WritingZeroes,
    /// What was zeroed is made durable.
    Syncing,
    /// It waits with others for one operation of the whole queue.
    Gathered,
}

/// A request that is in flight.
#[derive(Debug)]
struct Active {
    owed: Owed,
    request: Request,
    stage: Stage,
    done: u32,
    retries: u8,
    /// When it arrived, if it is one of the sample.
    arrived_ns: Option<u64>,
}

/// One queue of one device.
#[derive(Debug)]
pub struct DeviceQueue<T> {
    place: Place,
    transport: T,
    /// Keeps the image's file open for as long as anything may be in flight.
    image: Arc<Image>,
    geometry: Geometry,
    linked_commit: bool,
    active: InFlight<Active>,
    linked: usize,
    flushes: FlushQueue,
    discards: DiscardQueue,
    /// The hole that is being punched: offset and length.
    punch: Option<(u64, u64)>,
    gathered_retries: u8,
    arrived: Vec<Request>,
    finished: Vec<Tag>,
    stats: QueueStats,
}

impl<T: Transport> DeviceQueue<T> {
    /// Puts the queue's files in place and asks the driver for requests.
    pub fn new(
        place: Place,
        mut transport: T,
        image: Arc<Image>,
        linked_commit: bool,
        ring: &mut Ring,
    ) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let depth = transport.depth();
        let geometry = image.geometry();
        ring.set_file(place.frontend().0, transport.file())?;
        ring.set_file(place.image().0, image.fd().as_raw_fd())?;
        transport.arm(place, ring)?;
        Ok(Self {
            place,
            transport,
            image,
            geometry,
            linked_commit,
            active: InFlight::new(depth),
            linked: 0,
            flushes: FlushQueue::new(depth),
            discards: DiscardQueue::new(depth, geometry.discard_granularity),
            punch: None,
            gathered_retries: 0,
            arrived: Vec::with_capacity(usize::from(depth)),
            finished: Vec::with_capacity(usize::from(depth)),
            stats: QueueStats::default(),
        })
    }

    /// The driver refused something: requests may hang, and the device is not to be trusted.
    pub fn set_failed(&mut self) {
        self.stats.failed = true;
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        self.place
    }

    /// A copy of its figures.
    pub fn stats(&self) -> QueueStats {
        let in_flight = (self.active.len() - self.linked) as u64;
        QueueStats { in_flight, fallbacks: self.transport.fallbacks(), ..self.stats.clone() }
    }

    /// Takes note of the image's new size.
    pub fn set_geometry(&mut self, geometry: Geometry) {
        self.geometry = geometry;
        self.stats.degraded = false;
    }

    /// Shows another image. The file table keeps the old one's file until what is in flight on it has
    /// ended; what has to be sent again goes to the new one, so that one must be the same file, or
    /// read-only, or the old one must have had no size.
    pub fn replace(&mut self, image: Arc<Image>, ring: &mut Ring) -> Result<()> {
        use std::os::fd::AsRawFd;
        ring.set_file(self.place.image().0, image.fd().as_raw_fd())?;
        if self.active.len() == self.linked {
            self.discards = DiscardQueue::new(self.transport.depth(), image.geometry().discard_granularity);
        }
        self.set_geometry(image.geometry());
        self.image = image;
        Ok(())
    }

    /// The driver is done with it and so is the image: it can be dropped.
    pub fn is_idle(&self) -> bool {
        self.transport.is_gone() && self.active.len() == self.linked
    }

    /// Gives its files back and settles what the driver has ended by itself.
    pub fn close(mut self, ring: &mut Ring) -> Result<()> {
        for active in self.active.drain() {
            active.owed.settled();
        }
        ring.clear_file(self.place.image().0)?;
        ring.clear_file(self.place.frontend().0)
    }

    /// Takes one completion of this queue.
    pub fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        now_ns: u64,
    ) -> Result<()> {
        match token.step {
            Step::Data => self.on_data(token.tag, entry.result(), ring, now_ns),
            Step::Flush => self.on_flush(entry.result(), ring, now_ns),
            Step::Punch => self.on_punch(entry.result(), ring, now_ns),
            _ => {
                self.transport.on_event(token, entry, ring, &mut self.arrived)?;
                if self.arrived.is_empty() {
                    return Ok(());
                }
                self.stats.batches += 1;
                // A request that comes alone to an idle queue is answered fastest by a chain; many
                // at once are cheaper answered together.
                let alone = self.arrived.len() == 1 && self.active.len() == self.linked;
                let arrived = std::mem::take(&mut self.arrived);
                let taken = arrived.iter().try_for_each(|request| self.accept(*request, alone, ring, now_ns));
                self.arrived = arrived;
                self.arrived.clear();
                taken
            }
        }
    }

    /// Ends a round: answers go out together.
    pub fn flush(&mut self, ring: &mut Ring) -> Result<usize> {
        self.transport.flush(ring)
    }

    /// Requests wait for a buffer slot of the ring.
    pub fn is_starved(&self) -> bool {
        self.transport.is_starved()
    }

    /// Goes on with them.
    pub fn retry_starved(&mut self, ring: &mut Ring) -> Result<()> {
        self.transport.retry_starved(ring)
    }

    /// Takes a request on.
    fn accept(&mut self, request: Request, alone: bool, ring: &mut Ring, now_ns: u64) -> Result<()> {
        let tag = request.tag;
        if self.active.get_mut(tag).is_some_and(|active| active.stage == Stage::Linked) {
            // The tag comes round again, so its chain has gone through.
            self.settle_linked(tag);
        }
        let sampled = self.stats.arrived();
        let transfers = matches!(request.op, Op::Read | Op::Write { .. });
        let mut active = Active {
            owed: Owed::new(tag),
            request,
            stage: if transfers { Stage::Transfer } else { Stage::Gathered },
            done: 0,
            retries: 0,
            arrived_ns: (sampled && transfers).then_some(now_ns),
        };
        let refusal = self.refusal(&request);
        let linked = transfers && alone && self.linked_commit && !sampled && !self.image.holds_up();
        let commit = match (linked, refusal) {
            (true, None) => self.transport.linked_commit(tag, request.len),
            _ => None,
        };
        if commit.is_some() {
            active.stage = Stage::Linked;
        }
        if let Err((_, active)) = self.active.begin(tag, active) {
            active.owed.settled();
            return Err(Error::new(Kind::Internal, format!("the driver handed out tag {tag} twice")));
        }
        if commit.is_some() {
            self.linked += 1;
            // Its end is not seen, unless it fails: counted now, and taken back then.
            self.stats.completed(request.op, request.len, 0);
        }
        if let Some(errno) = refusal {
            return self.finish(tag, -errno, ring, now_ns);
        }
        match (request.op, commit) {
            (Op::Read | Op::Write { .. }, Some(commit)) => {
                let transfer = self
                    .transfer(&request, 0)
                    .flags(squeue::Flags::FIXED_FILE | squeue::Flags::IO_LINK | squeue::Flags::SKIP_SUCCESS);
                ring.push_chain(&[transfer, commit])
            }
            (Op::Read | Op::Write { .. }, None) => ring.push(&self.transfer(&request, 0)),
            (Op::Flush, _) => {
                self.flushes.push(tag);
                self.start_flush(ring)
            }
            (Op::Discard, _) => {
                self.discards.push(tag, self.geometry.offset + request.offset, u64::from(request.len));
                self.start_punch(ring, now_ns)
            }
            (op @ (Op::WriteZeroes { .. } | Op::Reserve), _) => {
                self.set_stage(tag, Stage::Zeroing);
                let offset = self.geometry.offset + request.offset;
                self.stats.punts += 1;
                let zero = translate::allocate(op, self.place.image(), offset, u64::from(request.len));
                ring.push(&self.token(zero, Step::Data, tag))
            }
            (Op::Unknown(_), _) => self.finish(tag, -libc::EOPNOTSUPP, ring, now_ns),
        }
    }

    /// Why a request cannot be taken on, as an errno.
    fn refusal(&self, request: &Request) -> Option<i32> {
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

    fn token(&self, entry: squeue::Entry, step: Step, tag: Tag) -> squeue::Entry {
        let apart = if self.image.holds_up() { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        entry.user_data(Token::pack(step, self.place.slot, tag)).flags(squeue::Flags::FIXED_FILE | apart)
    }

    fn transfer(&self, request: &Request, done: u32) -> squeue::Entry {
        let data = self.transport.data(request.tag);
        let offset = self.geometry.offset + request.offset;
        let entry = translate::transfer(request.op, self.place.image(), data, offset, done, request.len);
        self.token(entry, Step::Data, request.tag)
    }

    fn set_stage(&mut self, tag: Tag, stage: Stage) {
        if let Some(active) = self.active.get_mut(tag) {
            active.stage = stage;
        }
    }

    fn settle_linked(&mut self, tag: Tag) {
        if let Some(active) = self.active.finish(tag) {
            self.linked -= 1;
            active.owed.settled();
        }
    }

    /// An operation on the image for one request has ended.
    fn on_data(&mut self, tag: Tag, result: i32, ring: &mut Ring, now_ns: u64) -> Result<()> {
        let Some(active) = self.active.get_mut(tag) else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} ended and is not in flight")));
        };
        if active.stage == Stage::Linked {
            // The chain broke at the transfer: its commit was cancelled, and we go on by hand.
            active.stage = Stage::Transfer;
            self.linked -= 1;
            self.stats.uncount(active.request.op, active.request.len);
        }
        let (request, stage) = (active.request, active.stage);
        let interrupted = matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR);
        let moves = matches!(stage, Stage::Transfer | Stage::WritingZeroes);
        if interrupted || moves && result == -libc::EINVAL && self.image.leave_direct_io() {
            active.retries += 1;
            if active.retries > RETRIES {
                return self.finish(tag, -libc::EIO, ring, now_ns);
            }
            self.stats.punts += 1;
            return self.resubmit(tag, ring);
        }
        match stage {
            Stage::Transfer | Stage::WritingZeroes if result > 0 => {
                active.done = active.done.saturating_add(result.unsigned_abs()).min(request.len);
                if active.done < request.len {
                    // In the middle of a block: the image ends there (direct I/O stops nowhere else).
                    if !active.done.is_multiple_of(self.geometry.block_size) {
                        self.stats.degraded |= request.op == Op::Read;
                        return self.finish(tag, -libc::EIO, ring, now_ns);
                    }
                    return self.resubmit(tag, ring);
                }
                match (stage, request.op) {
                    (Stage::WritingZeroes, Op::WriteZeroes { fua, .. }) => {
                        self.zeroed(tag, fua, ring, now_ns)
                    }
                    _ => self.finish(tag, request.len.cast_signed(), ring, now_ns),
                }
            }
            Stage::Transfer | Stage::WritingZeroes if result == 0 => {
                // Nothing moved: the image ends before the device does (read), or the file
                // system takes no more (write). Never passed on as success.
                self.stats.degraded |= request.op == Op::Read;
                self.finish(tag, -libc::EIO, ring, now_ns)
            }
            Stage::Zeroing if result == 0 => match request.op {
                Op::WriteZeroes { fua, .. } => self.zeroed(tag, fua, ring, now_ns),
                _ => self.finish(tag, 0, ring, now_ns),
            },
            Stage::Zeroing
                if request.op != Op::Reserve && matches!(-result, libc::EOPNOTSUPP | libc::ENOSYS) =>
            {
                active.stage = Stage::WritingZeroes;
                self.resubmit(tag, ring)
            }
            _ => self.finish(tag, result, ring, now_ns),
        }
    }

    /// Goes on with a request where it stopped.
    fn resubmit(&mut self, tag: Tag, ring: &mut Ring) -> Result<()> {
        self.stats.resubmits += 1;
        let Some(active) = self.active.get_mut(tag) else { return Ok(()) };
        let (request, stage, done) = (active.request, active.stage, active.done);
        let (image, offset) = (self.place.image(), self.geometry.offset + request.offset);
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
        ring.push(&self.token(entry, Step::Data, tag))
    }

    /// A range has been zeroed; with FUA it must be durable, too.
    fn zeroed(&mut self, tag: Tag, fua: bool, ring: &mut Ring, now_ns: u64) -> Result<()> {
        if !fua {
            return self.finish(tag, 0, ring, now_ns);
        }
        self.set_stage(tag, Stage::Syncing);
        ring.push(&self.token(translate::sync(self.place.image()), Step::Data, tag))
    }

    /// Whether an operation of the whole queue was interrupted and may be sent again.
    fn try_again(&mut self, result: i32) -> bool {
        let interrupted = matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR);
        self.gathered_retries = if interrupted { self.gathered_retries.saturating_add(1) } else { 0 };
        self.stats.resubmits += u64::from(interrupted);
        interrupted && self.gathered_retries <= RETRIES
    }

    fn start_flush(&mut self, ring: &mut Ring) -> Result<()> {
        if !self.flushes.start() {
            return Ok(());
        }
        self.stats.punts += 1;
        ring.push(&self.token(translate::sync(self.place.image()), Step::Flush, 0))
    }

    fn on_flush(&mut self, result: i32, ring: &mut Ring, now_ns: u64) -> Result<()> {
        if self.try_again(result) {
            return ring.push(&self.token(translate::sync(self.place.image()), Step::Flush, 0));
        }
        self.finished.extend(self.flushes.done());
        self.finish_all(result, ring, now_ns)?;
        self.start_flush(ring)
    }

    fn start_punch(&mut self, ring: &mut Ring, now_ns: u64) -> Result<()> {
        while let Some(punch) = self.discards.next() {
            if punch.len > 0 {
                self.stats.punts += 1;
                self.punch = Some((punch.offset, punch.len));
                let entry = translate::punch(self.place.image(), punch.offset, punch.len);
                return ring.push(&self.token(entry, Step::Punch, 0));
            }
            // Less than a block: there is nothing to free.
            self.finished.extend(self.discards.done());
            self.finish_all(0, ring, now_ns)?;
        }
        Ok(())
    }

    fn on_punch(&mut self, result: i32, ring: &mut Ring, now_ns: u64) -> Result<()> {
        if let (true, Some((offset, len))) = (self.try_again(result), self.punch) {
            return ring.push(&self.token(translate::punch(self.place.image(), offset, len), Step::Punch, 0));
        }
        self.finished.extend(self.discards.done());
        self.finish_all(result, ring, now_ns)?;
        self.start_punch(ring, now_ns)
    }

    fn finish_all(&mut self, result: i32, ring: &mut Ring, now_ns: u64) -> Result<()> {
        while let Some(tag) = self.finished.pop() {
            self.finish(tag, result, ring, now_ns)?;
        }
        Ok(())
    }

    /// Answers a request.
    fn finish(&mut self, tag: Tag, result: i32, ring: &mut Ring, now_ns: u64) -> Result<()> {
        let Some(active) = self.active.finish(tag) else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} was to be answered twice")));
        };
        self.stats.completed(active.request.op, active.request.len, result);
        if let Some(arrived_ns) = active.arrived_ns {
            self.stats.timed(now_ns.saturating_sub(arrived_ns));
        }
        self.transport.complete(active.owed.pay(result), ring)
    }
}
