//! Makes the ublk devices of one pool, and gives used ones a new life.
//!
//! Knows workers, their slots, and the order in which a device comes and goes. Does not know numbers,
//! files or limits. A device that was used is never bound again: it makes way for a new one, which
//! takes over its device number, so that nothing cached, and no name that somebody kept, leads from
//! one file to the next or from one tenant to another.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::closer::Closer;
use super::disk::Disk;
use super::used::{Drawer, Slots};
use crate::error::{Error, Kind, Result};
use crate::frontend::ublk::StartLock;
use crate::frontend::{Backend, DeviceParameters, StopMode};
use crate::image::Image;
use crate::instance::instance::EngineContext;
use crate::instance::served::{Served, StartMode, Workers};

/// Queue depth of a loop device.
const DEPTH: u16 = 128;
/// Logical block size of a disk, unless another is asked for.
const USUAL: u32 = 512;
/// Disks that hold lower numbers while one appears under its predecessor's.
const FILLERS_MAX: usize = 256;
/// How long the kernel may take to free a number, and between two looks.
const NUMBER_MAX: Duration = Duration::from_secs(2);
const NUMBER_PAUSE: Duration = Duration::from_millis(20);
/// Its slot on the workers stays taken: something of it may yet be in flight.
const STAYS: &str = "a disk cannot be released";

/// Unbound disks that are kept where their numbers may be any.
const SPARES_MAX: usize = 2;

/// Makes devices for one pool.
#[derive(Debug)]
pub struct Maker {
    shared: EngineContext,
    backend: Backend,
    workers: Workers,
    slots: Arc<Slots>,
    /// What has made way, until the driver has freed it.
    drawer: Drawer,
    /// One that has not appeared yet: whether a disk can be replaced is only found out by trying, often.
    standby: Mutex<Option<Served>>,
    /// Device numbers of all that have appeared.
    present: Mutex<BTreeSet<u64>>,
    /// Held by each disk of a partition, so that their number has a bound.
    pub(super) partitions: Arc<()>,
    /// Nobody's any more: kept with their device numbers, for the next who needs one.
    spares: Mutex<Vec<Disk>>,
    /// If they must not change: the device numbers of all disks.
    fixed: OnceLock<Vec<u64>>,
    closer: Closer,
}

/// Why a disk was not recycled.
#[derive(Debug)]
pub enum Unrecycled {
    /// Somebody has it open: here it is.
    InUse(Disk),
    /// It is gone, and has no successor.
    Lost(Error),
}

impl Maker {
    /// For a pool with these workers.
    pub fn new(shared: EngineContext, backend: Backend, workers: Workers) -> Maker {
        let slots = Arc::<Slots>::default();
        Maker {
            shared,
            backend,
            workers,
            drawer: Drawer::new(Arc::clone(&slots)),
            slots,
            standby: Mutex::default(),
            present: Mutex::default(),
            partitions: Arc::default(),
            spares: Mutex::default(),
            fixed: OnceLock::new(),
            closer: Closer::default(),
        }
    }

    /// Has files of this pool closed together with those of the user's other pools.
    pub fn close_with(&mut self, closer: Closer) {
        self.closer = closer;
    }

    /// Drops what holds a backing file, without waiting for that.
    pub fn close(&self, holder: impl Send + 'static) {
        self.closer.close(holder);
    }

    /// The user has too many files that do not close.
    pub fn is_closing_many(&self) -> bool {
        self.closer.is_full()
    }

    /// Makes so many disks, and from now on none under any other number.
    pub fn fix(&self, disks: usize) -> Result<()> {
        let made = (0..disks).map(|_| self.fresh(USUAL)).collect::<Result<Vec<_>>>();
        // In their order, since the last one is taken first.
        let mut made = made?;
        made.sort_by_key(|disk| std::cmp::Reverse(disk.rdev));
        let mut numbers: Vec<u64> = made.iter().map(|disk| disk.rdev).collect();
        numbers.reverse();
        self.spares().extend(made);
        self.fixed
            .set(numbers)
            .map_err(|_| Error::new(Kind::Internal, "the disks of a pool were fixed twice"))
    }

    /// Device numbers of all disks, if they must not change.
    pub fn fixed(&self) -> Option<&[u64]> {
        self.fixed.get().map(Vec::as_slice)
    }

    /// What all pools and instances share.
    pub fn shared(&self) -> &EngineContext {
        &self.shared
    }

    /// A new disk without a size.
    pub fn make(&self, block_size: u32) -> Result<Disk> {
        let fixed = self.fixed().is_some();
        let spare = if block_size == USUAL || fixed { self.spares().pop() } else { None };
        match spare {
            Some(spare) if spare.block_size == block_size => Ok(spare),
            Some(spare) => self.succeed(spare, block_size).map_err(|unchanged| match unchanged {
                Unrecycled::InUse(spare) => {
                    self.keep(spare);
                    Error::new(Kind::Busy, "the disk beside a pool's devices is in use")
                }
                Unrecycled::Lost(error) => error,
            }),
            None if fixed => Err(Error::new(Kind::Quota, "the pool has no disk left beside its devices")),
            None => self.fresh(block_size),
        }
    }

    fn fresh(&self, block_size: u32) -> Result<Disk> {
        let served = self.prepare(block_size)?;
        if let Err(error) = served.start_deferred() {
            self.discard(&served);
            return Err(error);
        }
        self.appeared(served, block_size)
    }

    fn appeared(&self, served: Served, block_size: u32) -> Result<Disk> {
        match served.device().device_number() {
            Ok(rdev) => {
                lock(&self.present).insert(rdev);
                Ok(Disk { served: Box::new(served), rdev, block_size })
            }
            Err(error) => {
                self.discard(&served);
                Err(error)
            }
        }
    }

    /// A disk that has yet to appear.
    fn prepare(&self, block_size: u32) -> Result<Served> {
        let standby = if block_size == USUAL { self.standby().take() } else { None };
        if let Some(served) = standby {
            return Ok(served);
        }
        let parameters = DeviceParameters {
            io_mode: self.backend.best_io_mode(),
            queues: self.workers.len() as u16,
            depth: DEPTH,
            owner_cookie: self.shared.new_owner_cookie(),
            // Its users are not told of a new daemon, and could not use it.
            recoverable: false,
            partscan: false,
        };
        let image = Image::unbound(block_size)?;
        // Numbers at the driver are few and everybody's: what is to be free again is, before another is taken.
        self.drawer.empty();
        let device = self.backend.add(0, parameters)?;
        let (served, begun) =
            Served::start(device, &self.workers, self.slots.take(), image, StartMode::Deferred);
        if let Err(error) = begun {
            self.discard(&served);
            return Err(error);
        }
        Ok(served)
    }

    /// Has a disk that nobody has open any more make way for a new one without a size.
    pub fn recycle(&self, disk: Disk) -> std::result::Result<Disk, Unrecycled> {
        self.succeed(disk, USUAL)
    }

    fn succeed(&self, disk: Disk, block_size: u32) -> std::result::Result<Disk, Unrecycled> {
        let next = match self.prepare(block_size) {
            Ok(next) => next,
            Err(error) => {
                tracing::warn!(%error, "a used disk waits for its successor");
                return Err(Unrecycled::InUse(disk));
            }
        };
        let alone = StartLock::acquire();
        match disk.served.try_stop(&alone) {
            Ok(()) => drop(lock(&self.present).remove(&disk.rdev)),
            Err(error) if error.kind() == Kind::Busy => {
                drop(alone);
                self.unneeded(next, block_size);
                return Err(Unrecycled::InUse(disk));
            }
            // Stopped, but without a successor: neither is there any more.
            Err(error) => {
                drop(alone);
                self.discard(&disk.served);
                self.discard(&next);
                return Err(Unrecycled::Lost(error));
            }
        }
        let mut fillers = Vec::new();
        let next = self.take_place(next, &disk, block_size, &mut fillers, &alone);
        drop(alone);
        fillers.iter().for_each(|served| self.discard(served));
        match disk.served.remove_queues() {
            Ok(()) => {
                // Its file is not open longer than it is shown.
                self.close(disk.served.take_image());
                self.drawer.put(disk.served);
            }
            Err(error) => {
                tracing::error!(%error, "{STAYS}");
                self.close(disk);
            }
        }
        next.map_err(Unrecycled::Lost)
    }

    fn unneeded(&self, next: Served, block_size: u32) {
        let unneeded = match block_size {
            USUAL => self.standby().replace(next),
            _ => Some(next),
        };
        unneeded.iter().for_each(|served| self.discard(served));
    }

    /// Has a disk appear in the place of one that has stopped. The kernel gives it the lowest number that
    /// is free; where that must be its predecessor's, `fillers` take those below.
    fn take_place(
        &self,
        mut next: Served,
        old: &Disk,
        block_size: u32,
        fillers: &mut Vec<Served>,
        alone: &StartLock,
    ) -> Result<Disk> {
        let until = Instant::now() + NUMBER_MAX;
        loop {
            if let Err(error) = next.start_exclusively(alone) {
                self.discard(&next);
                return Err(error.with_kind(Kind::Internal));
            }
            let disk = self.appeared(next, block_size)?;
            if self.fixed().is_none() || disk.rdev == old.rdev {
                return Ok(disk);
            }
            // The kernel frees a number some time after its disk has gone.
            let beyond = disk.rdev > old.rdev;
            lock(&self.present).remove(&disk.rdev);
            fillers.push(*disk.served);
            if fillers.len() == FILLERS_MAX || Instant::now() >= until {
                return Err(Error::new(Kind::Internal, "the device number of a used disk is another's"));
            }
            if beyond {
                std::thread::sleep(NUMBER_PAUSE);
            }
            next = self.prepare(block_size)?;
        }
    }

    /// Takes a used disk away, if nobody has it open. A few are kept with a new life, for the next who
    /// needs one at once.
    pub fn retire(&self, disk: Disk) -> std::result::Result<(), Disk> {
        if self.fixed().is_none() && self.spares().len() >= SPARES_MAX {
            return self.remove(disk, StopMode::IfUnusedNow);
        }
        match self.recycle(disk) {
            Ok(spare) => self.keep(spare),
            Err(Unrecycled::InUse(disk)) => return Err(disk),
            Err(Unrecycled::Lost(error)) => tracing::error!(%error, "a disk was lost"),
        }
        Ok(())
    }

    /// It has a disk with this device number.
    pub fn has(&self, rdev: u64) -> bool {
        lock(&self.present).contains(&rdev)
    }

    /// Takes back one that was given out, and has shown nothing to anybody.
    pub fn give_back(&self, disk: Disk) -> std::result::Result<(), Disk> {
        if self.fixed().is_none() {
            return self.remove(disk, StopMode::Always);
        }
        self.retire(disk)
    }

    /// Takes a disk away for good.
    pub fn remove(&self, disk: Disk, when: StopMode) -> std::result::Result<(), Disk> {
        match disk.served.stop(when) {
            Ok(()) => {
                lock(&self.present).remove(&disk.rdev);
                self.release(&disk.served);
                self.close(disk);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "a disk stays");
                Err(disk)
            }
        }
    }

    /// Keeps a disk that nobody needs now, unbound and closed.
    pub fn keep(&self, disk: Disk) {
        self.spares().push(disk);
    }

    fn spares(&self) -> MutexGuard<'_, Vec<Disk>> {
        lock(&self.spares)
    }

    /// Takes away what nobody has. To be called last. Two may call: neither comes back before all is
    /// gone, for the daemon may end then.
    pub fn end(&self) {
        let mut spares = self.spares();
        for spare in spares.drain(..) {
            if let Err(spare) = self.remove(spare, StopMode::Always) {
                tracing::error!(rdev = spare.rdev, "a spare disk stays");
            }
        }
        drop(spares);
        self.drawer.empty();
        let mut standby = self.standby();
        standby.take().iter().for_each(|served| self.discard(served));
    }

    fn standby(&self) -> MutexGuard<'_, Option<Served>> {
        lock(&self.standby)
    }

    fn discard(&self, served: &Served) {
        match served.stop(StopMode::Always) {
            Ok(()) => self.release(served),
            Err(error) => tracing::error!(%error, "a disk cannot be taken away"),
        }
    }

    fn release(&self, served: &Served) {
        match served.release() {
            Ok(()) => self.slots.give_back(served.slot()),
            Err(error) => tracing::error!(%error, "{STAYS}"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
