// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writers that record their acknowledged writes, to detect losses after a fault.
//!
//! Every 512-byte sector contains its block and round. After the fault, each must have the last
//! acknowledged round, or one that was in flight.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::disk::Disk;
use crate::harness::{At, Res, ensure, fail};
use crate::model::{Numbers, pattern};
use crate::tools;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// The rounds of one block; 0: never written.
#[derive(Clone, Copy, Default)]
struct Entry {
    acknowledged: u64,
    attempted: u64,
}

struct Book {
    first_block: u64,
    entries: Vec<Entry>,
    errors: Vec<std::io::Error>,
}

/// What to do when a write fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnError {
    /// The writer ends.
    End,
    /// It continues with other blocks.
    GoOn,
}

/// Running writers on a device, each with blocks of its own.
pub(crate) struct Writers {
    threads: Vec<JoinHandle<Res<Book>>>,
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
}

/// The records of all writers.
pub(crate) struct Ledger {
    books: Vec<Book>,
}

impl Writers {
    /// Starts `count` writers on the first `bytes` of a device.
    pub(crate) fn start(device: &str, bytes: u64, count: u64, on_error: OnError) -> Res<Writers> {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let failed = Arc::new(AtomicU64::new(0));
        let blocks = bytes / BLOCK as u64 / count;
        let mut threads = Vec::new();
        for number in 0..count {
            let disk = Disk::open(device)?;
            let (stop, counts) = (stop.clone(), (written.clone(), failed.clone()));
            threads.push(std::thread::spawn(move || {
                let work = number * blocks..(number + 1) * blocks;
                write(&disk, work, on_error, &stop, &counts)
            }));
        }
        Ok(Writers { threads, stop, written, failed })
    }

    /// Waits until this many more writes are acknowledged.
    pub(crate) fn progress(&self, more: u64, deadline: Duration) -> Res {
        let goal = self.written.load(Ordering::Relaxed) + more;
        let reached = tools::until(deadline, || (self.written.load(Ordering::Relaxed) >= goal).then_some(()));
        ensure!(reached.is_some(), "no {more} writes in {deadline:?}");
        Ok(())
    }

    /// Waits until this many writes have failed.
    pub(crate) fn failures(&self, count: u64, deadline: Duration) -> Res {
        let reached = tools::until(deadline, || (self.failed.load(Ordering::Relaxed) >= count).then_some(()));
        ensure!(reached.is_some(), "no {count} failures in {deadline:?}");
        Ok(())
    }

    /// Ends the writers after their current writes; returns the ledger.
    pub(crate) fn stop(mut self, deadline: Duration) -> Res<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        let ended = tools::until(deadline, || threads.iter().all(JoinHandle::is_finished).then_some(()));
        ensure!(ended.is_some(), "a write did not end in {deadline:?}");
        let mut books = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(book) => books.push(book?),
                Err(_) => fail!("a writer panicked"),
            }
        }
        Ok(Ledger { books })
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn write(
    disk: &Disk,
    work: Range<u64>,
    on_error: OnError,
    stop: &AtomicBool,
    (written, failed): &(Arc<AtomicU64>, Arc<AtomicU64>),
) -> Res<Book> {
    let (first_block, blocks) = (work.start, work.end - work.start);
    let mut numbers = Numbers::new(first_block);
    let mut book =
        Book { first_block, entries: vec![Entry::default(); usize::try_from(blocks)?], errors: Vec::new() };
    for round in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let index = numbers.below(blocks);
        let entry = &mut book.entries[usize::try_from(index)?];
        // Only one attempt per block may be open: a second would hide the effect of the first.
        if entry.attempted != entry.acknowledged {
            continue;
        }
        entry.attempted = round;
        let block = first_block + index;
        let result = disk.try_write(block * BLOCK as u64, &content(block, round));
        match result {
            Ok(BLOCK) => {
                entry.acknowledged = round;
                written.fetch_add(1, Ordering::Relaxed);
            }
            Ok(short) => fail!("wrote only {short} of {BLOCK} bytes"),
            Err(error) => {
                book.errors.push(error);
                failed.fetch_add(1, Ordering::Relaxed);
                if on_error == OnError::End || book.errors.len() > 10_000 {
                    break;
                }
            }
        }
    }
    Ok(book)
}

impl Ledger {
    /// Errors of the writers.
    pub(crate) fn errors(&self) -> Vec<String> {
        let all = self.books.iter().flat_map(|book| &book.errors);
        all.map(ToString::to_string).collect()
    }

    /// Blocks with an acknowledged write.
    pub(crate) fn acknowledged(&self) -> usize {
        let all = self.books.iter().flat_map(|book| &book.entries);
        all.filter(|entry| entry.acknowledged > 0).count()
    }

    /// Compares with the content of `path`, a device, or an image at `offset`.
    pub(crate) fn check(&self, path: &str, offset: u64) -> Res {
        let disk = Disk::open_read(path)?;
        for book in &self.books {
            for (index, entry) in book.entries.iter().enumerate() {
                if entry.attempted > 0 {
                    let block = book.first_block + index as u64;
                    let data = disk.read(offset + block * BLOCK as u64, BLOCK)?;
                    check_block(block, *entry, &data).at(path)?;
                }
            }
        }
        Ok(())
    }
}

fn check_block(block: u64, entry: Entry, data: &[u8]) -> Res {
    let before = match entry.acknowledged {
        0 => vec![0; BLOCK],
        round => content(block, round),
    };
    let after = content(block, entry.attempted);
    for at in (0..BLOCK).step_by(SECTOR) {
        let sector = &data[at..at + SECTOR];
        if sector != &before[at..at + SECTOR] && sector != &after[at..at + SECTOR] {
            let round = u64::from_le_bytes(sector[8..16].try_into()?);
            fail!(
                "block {block}, byte {at}: acknowledged round {}, attempted {}, found {round}",
                entry.acknowledged,
                entry.attempted
            );
        }
    }
    Ok(())
}

fn content(block: u64, round: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(BLOCK);
    for sector in 0..(BLOCK / SECTOR) as u64 {
        data.extend(block.to_le_bytes());
        data.extend(round.to_le_bytes());
        data.extend(pattern(block ^ (round << 20) ^ (sector << 56), SECTOR - 16));
    }
    data
}
