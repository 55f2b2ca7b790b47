// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes of a block device or file, read and written directly, past every cache.
//!
//! Knows alignment, and that nobody may touch memory outside a request, or after its end. Knows
//! nothing of what the bytes mean (see `model` and `ledger`).

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::{Mutex, PoisonError};

use crate::harness::{At, Res, ensure};

const ALIGN: usize = 4096;
/// What memory holds once its requests have ended.
const ENDED: u8 = 0xe5;
/// Bytes of such memory that are kept to be looked at.
const KEPT: usize = 64 << 20;

/// Memory whose requests have ended, the oldest first. Data that come late, or beside the memory of
/// their request, are found here, and not by whoever has the memory next.
static KEPT_BACK: Mutex<VecDeque<Ended>> = Mutex::new(VecDeque::new());

/// Fails if data came into memory after its requests had ended, or outside it. The memory is freed.
pub(crate) fn none_went_astray() -> Res {
    let kept = std::mem::take(&mut *KEPT_BACK.lock().unwrap_or_else(PoisonError::into_inner));
    kept.iter().try_for_each(Ended::check)
}

/// Memory of a request that has ended: zeroes around `ENDED`.
struct Ended {
    bytes: Vec<u8>,
    range: Range<usize>,
}

impl Ended {
    fn check(&self) -> Res {
        let Ended { bytes, range } = self;
        let parts = [(0..range.start, 0), (range.clone(), ENDED), (range.end..bytes.len(), 0)];
        for (part, expected) in parts {
            // A page at a time: comparing single bytes takes seconds on an emulated CPU.
            let whole = [expected; ALIGN];
            let page = bytes[part.clone()].chunks(ALIGN).position(|page| page != &whole[..page.len()]);
            if let Some(page) = page {
                let start = part.start + page * ALIGN;
                let page = &bytes[start..part.end.min(start + ALIGN)];
                let at = page.iter().position(|byte| *byte != expected).unwrap_or(0);
                crate::harness::fail!(
                    "data went astray at byte {} of memory whose request had {range:?}, and has ended: {:02x?}",
                    start + at,
                    &page[at..page.len().min(at + 32)]
                );
            }
        }
        Ok(())
    }
}

/// Memory as direct I/O wants it.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Zeroes.
    pub(crate) fn new(len: usize) -> Aligned {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Aligned { bytes, start, len }
    }

    /// A copy of `data`.
    pub(crate) fn of(data: &[u8]) -> Aligned {
        let mut copy = Aligned::new(data.len());
        copy.get_mut().copy_from_slice(data);
        copy
    }

    /// The bytes.
    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// The bytes, to be changed.
    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        self.get_mut().fill(ENDED);
        let ended =
            Ended { bytes: std::mem::take(&mut self.bytes), range: self.start..self.start + self.len };
        let mut kept = KEPT_BACK.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(ended);
        let mut bytes: usize = kept.iter().map(|ended| ended.bytes.len()).sum();
        // The oldest go unseen: a case that is busy has no time to look at all.
        while bytes > KEPT {
            bytes -= kept.pop_front().map_or(0, |oldest| oldest.bytes.len());
        }
    }
}

/// An open device or file.
pub(crate) struct Disk {
    file: File,
    path: String,
}

impl Disk {
    /// Opens for reading and writing, with direct I/O.
    pub(crate) fn open(path: &str) -> Res<Disk> {
        Disk::with(OpenOptions::new().read(true).write(true), path)
    }

    /// Opens for reading, with direct I/O.
    pub(crate) fn open_read(path: &str) -> Res<Disk> {
        Disk::with(OpenOptions::new().read(true), path)
    }

    fn with(options: &mut OpenOptions, path: &str) -> Res<Disk> {
        let file = options.custom_flags(libc::O_DIRECT).open(path).at(path)?;
        let path = path.to_string();
        Ok(Disk { file, path })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Reads as much as one call gives.
    pub(crate) fn try_read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = Aligned::new(len);
        let got = self.file.read_at(data.get_mut(), offset)?;
        Ok(data.get()[..got].to_vec())
    }

    /// Reads exactly `len` bytes.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Res<Vec<u8>> {
        let what = format!("read {len} bytes at {offset} of {}", self.path);
        let data = self.try_read(offset, len).at(&what)?;
        ensure!(data.len() == len, "{what}: only {}", data.len());
        Ok(data)
    }

    /// Writes as much as one call takes.
    pub(crate) fn try_write(&self, offset: u64, data: &[u8]) -> io::Result<usize> {
        self.file.write_at(Aligned::of(data).get(), offset)
    }

    /// Writes all of `data`.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Res {
        let what = format!("write {} bytes at {offset} of {}", data.len(), self.path);
        let done = self.try_write(offset, data).at(&what)?;
        ensure!(done == data.len(), "{what}: only {done}");
        Ok(())
    }

    /// Makes what was written durable.
    pub(crate) fn sync(&self) -> Res {
        self.file.sync_data().at(format!("sync {}", self.path))
    }
}

/// Reads a file or device whole, in pieces of 1 MiB, directly.
pub(crate) fn read_all(path: &str, offset: u64, len: u64) -> Res<Vec<u8>> {
    let disk = Disk::open_read(path)?;
    let mut all = Vec::with_capacity(usize::try_from(len)?);
    while (all.len() as u64) < len {
        let at = all.len() as u64;
        let piece = usize::try_from((len - at).min(1 << 20))?;
        all.extend(disk.read(offset + at, piece)?);
    }
    Ok(all)
}

/// Writes `data` from the start of a file or device, in pieces of 1 MiB, directly.
pub(crate) fn write_all(path: &str, data: &[u8]) -> Res {
    let disk = Disk::open(path)?;
    for (index, piece) in data.chunks(1 << 20).enumerate() {
        disk.write((index as u64) << 20, piece)?;
    }
    disk.sync()
}

/// Says where two byte strings differ first.
pub(crate) fn same(what: &str, found: &[u8], expected: &[u8]) -> Res {
    ensure!(found.len() == expected.len(), "{what}: {} bytes instead of {}", found.len(), expected.len());
    if let Some(at) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        crate::harness::fail!(
            "{what}: {wrong} bytes differ, the first at {at}: {:#04x} instead of {:#04x}",
            found[at],
            expected[at]
        );
    }
    Ok(())
}

/// Bytes that a file's blocks take.
pub(crate) fn allocated(path: &str) -> Res<u64> {
    Ok(std::fs::metadata(path).at(path)?.blocks() * 512)
}

/// Bytes of a file or block device.
pub(crate) fn size(path: &str) -> Res<u64> {
    use std::io::Seek;
    let mut file = File::open(path).at(path)?;
    file.seek(io::SeekFrom::End(0)).at(path)
}
