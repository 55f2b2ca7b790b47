// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `losetup FILE`: finds or creates a device, and binds it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use super::{BackingFile, Losetup, LosetupRequest, LosetupResult, NAME, reason};
use crate::loops::{Answer, Errno, LoopConfig, LoopInfo, LoopOp, NAME_BYTES, flag};

/// Retries if another process takes the free device, and the pause between them.
const TRIES: u32 = 64;
const PAUSE: Duration = Duration::from_millis(200);

impl Losetup<'_> {
    pub(super) fn create(
        &mut self,
        request: &LosetupRequest,
        device: Option<&OsStr>,
        file: &OsStr,
    ) -> io::Result<LosetupResult<bool>> {
        let number = match self.bind(request, device, file) {
            Ok(number) => number,
            Err(message) => return Ok(Err(message)),
        };
        if request.show {
            writeln!(self.out, "{}", self.path(number))?;
        }
        let smaller = "file is smaller than 512 bytes; the loop device may be useless or invisible for \
                       system tools.";
        let uneven = "file does not end on a 512-byte sector boundary; the remaining end of the file will \
                      be ignored.";
        let warning = match device_bytes(request, file) {
            Some(0..512) => smaller,
            Some(bytes) if bytes % 512 > 0 => uneven,
            _ => return Ok(Ok(true)),
        };
        writeln!(self.err, "{NAME}: {}: Warning: {warning}", file.display())?;
        Ok(Ok(true))
    }

    fn bind(&mut self, request: &LosetupRequest, device: Option<&OsStr>, file: &OsStr) -> LosetupResult<u32> {
        let given = device.map(|name| self.number(name)).transpose()?;
        if request.no_overlap
            && let Some(number) = self.overlap(request, given.is_some(), file)?
        {
            return Ok(number);
        }
        if let Some(number) = given {
            // The device may exist or not; binding it reports errors.
            let _ = self.devices.execute(LoopOp::Add(number.cast_signed()));
        }
        let shown = file.display();
        let path = Path::new(file);
        let full = match path.canonicalize() {
            Ok(full) => full,
            Err(error) => return Err(format!("{shown}: failed to set up loop device: {}", message(&error))),
        };
        let mut tries = 0;
        loop {
            let number = match given {
                Some(number) => number,
                None => self.find_free()?,
            };
            let Err(error) = self.configure(request, number, &full) else { return Ok(number) };
            if matches!(error, Errno::BUSY | Errno::AGAIN) && given.is_none() && tries < TRIES {
                tries += 1;
                sleep(PAUSE);
                continue;
            }
            return Err(format!("{shown}: failed to set up loop device: {}", reason(error)));
        }
    }

    fn configure(&mut self, request: &LosetupRequest, number: u32, path: &Path) -> Answer<()> {
        let (file, read_only) = open(path, request.flags & flag::READ_ONLY != 0)?;
        let mut file_name = [0; NAME_BYTES];
        let name = request.reference.as_deref().unwrap_or(path.as_os_str()).as_bytes();
        for (to, from) in file_name.iter_mut().take(NAME_BYTES - 1).zip(name) {
            *to = *from;
        }
        let info = LoopInfo {
            offset: request.offset.unwrap_or(0),
            size_limit: request.size_limit,
            flags: request.flags | if read_only { flag::READ_ONLY } else { 0 },
            file_name,
            ..LoopInfo::default()
        };
        let block_size = u32::try_from(request.block_size).map_err(|_| Errno::INVAL)?;
        self.devices.execute(LoopOp::Configure(number, LoopConfig { file, block_size, info })).map(drop)
    }

    /// A device with exactly this range, for reuse. An error if a device overlaps it.
    fn overlap(
        &mut self,
        request: &LosetupRequest,
        has_device: bool,
        name: &OsStr,
    ) -> LosetupResult<Option<u32>> {
        let file = BackingFile::of(name);
        let shown = name.display();
        let (offset, limit) = (request.offset.unwrap_or(0), request.size_limit);
        for row in self.used()? {
            let Some(bound) = row.entry.bound.as_ref().filter(|_| file.backs(&row, None)) else { continue };
            let same = bound.offset == offset && bound.size_limit == limit;
            let behind = bound.size_limit > 0 && offset >= bound.offset.saturating_add(bound.size_limit);
            let before = limit > 0 && offset.saturating_add(limit) <= bound.offset;
            if !same && (behind || before) {
                continue;
            }
            if !same || has_device {
                return Err(format!("{shown}: overlapping loop device exists"));
            }
            if bound.flags & flag::READ_ONLY != 0 && request.flags & flag::READ_ONLY == 0 {
                return Err(format!("{shown}: overlapping read-only loop device exists"));
            }
            let number = row.entry.number;
            let kept = self.status(number).and_then(|status| {
                let info = LoopInfo { flags: status.info.flags & !flag::AUTOCLEAR, ..status.info };
                self.devices.execute(LoopOp::SetStatus(number, info))
            });
            return match kept {
                Ok(_) => Ok(Some(number)),
                Err(_) => Err(format!("{shown}: failed to re-use loop device")),
            };
        }
        Ok(None)
    }
}

/// Opens for writing if requested and possible. True: read-only.
fn open(path: &Path, read_only: bool) -> Answer<(OwnedFd, bool)> {
    let open = |write: bool| {
        // Avoids blocking on a pipe; irrelevant for files and block devices.
        let flags = libc::O_NONBLOCK;
        std::fs::OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    if !read_only {
        match open(true).map_err(errno) {
            Ok(file) => return Ok((file.into(), false)),
            Err(Errno::ROFS | Errno::ACCESS) => {}
            Err(error) => return Err(error),
        }
    }
    open(false).map(|file| (file.into(), true)).map_err(errno)
}

/// Bytes of the file in the device. None: no warning needed.
fn device_bytes(request: &LosetupRequest, file: &OsStr) -> Option<u64> {
    if request.size_limit > 0 {
        return Some(request.size_limit);
    }
    let meta = Path::new(file).metadata().ok().filter(|meta| !meta.file_type().is_block_device())?;
    Some(meta.len().wrapping_sub(request.offset.unwrap_or(0)))
}

fn message(error: &io::Error) -> String {
    Errno::from_io_error(error).map_or_else(|| error.to_string(), reason)
}
