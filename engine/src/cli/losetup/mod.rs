// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine losetup`: losetup(8) for a private pool, without ioctls.
//!
//! Knows the behaviour, messages and exit codes of losetup. Accesses the pool through
//! [`LoopDevices`].

mod create;
mod options;
pub(super) mod remote;
mod table;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use options::{Action, LosetupRequest};

use crate::loops::{Answer, DeviceEntry, Errno, LoopOp, LoopReply, LoopStatus};

pub use options::LosetupArgs;
pub use table::Row;

/// Name of losetup in messages.
const NAME: &str = "losetup";

/// The devices of a pool.
pub trait LoopDevices {
    /// Directory of loopN, without a slash at the end.
    fn directory(&self) -> &str;
    /// Lists all devices.
    fn entries(&mut self) -> Answer<Vec<DeviceEntry>>;
    /// Executes an operation.
    fn execute(&mut self, op: LoopOp) -> Answer<LoopReply>;
}

/// An error is the message that losetup prints after its name.
type LosetupResult<T = ()> = Result<T, String>;

/// The message for a clap error, with a newline; `last` is the last word of the command line. The
/// exit code is 1.
pub fn usage_error(error: &clap::Error, last: &OsStr) -> String {
    format!("{NAME}: {}\n", options::usage(error, last))
}

/// Executes `args`. Returns the exit code.
pub fn run(
    args: LosetupArgs,
    devices: &mut dyn LoopDevices,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<u8> {
    let done = match args.request() {
        Ok(request) => Losetup { devices, out, err }.run(&request),
        Err(message) => Ok(Err(message)),
    };
    let code = match done? {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(message) => {
            // losetup prints nothing for "-O ''".
            if message != "unknown column: " {
                writeln!(err, "{NAME}: {message}")?;
            }
            1
        }
    };
    out.flush().map(|()| code)
}

struct Losetup<'a> {
    devices: &'a mut dyn LoopDevices,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
}

impl Losetup<'_> {
    /// False: failed and printed messages. The outer error is an output error.
    fn run(&mut self, request: &LosetupRequest) -> io::Result<LosetupResult<bool>> {
        let done = match &request.action {
            Action::Show { file } => return self.show(request, file.as_deref()),
            Action::ShowOne(name) => return self.show_one(request, name),
            Action::FindFree => match self.find_free() {
                Ok(number) => return writeln!(self.out, "{}", self.path(number)).map(|()| Ok(true)),
                Err(message) => Err(message),
            },
            Action::Create { device, file } => return self.create(request, device.as_deref(), file),
            Action::Detach(names) => {
                return self.each(names, "detach", LoopOp::Clear);
            }
            Action::Remove(names) => {
                return self.each(names, "remove", |number| LoopOp::Remove(number.cast_signed()));
            }
            Action::DetachAll => return self.detach_all(),
            Action::SetCapacity(name) => self.one(name, "set capacity", LoopOp::SetCapacity),
            Action::SetDirectIo(name, on) => {
                self.one(name, "set direct io", |number| LoopOp::SetDirectIo(number, *on))
            }
            Action::SetBlockSize(name, bytes) => {
                self.one(name, "set logical block size", |number| LoopOp::SetBlockSize(number, *bytes))
            }
        };
        Ok(done.map(|()| true))
    }

    fn path(&self, number: u32) -> String {
        format!("{}/loop{number}", self.devices.directory())
    }

    fn number(&self, name: &OsStr) -> LosetupResult<u32> {
        options::number(name, self.devices.directory())
            .ok_or_else(|| format!("{}: failed to use device: {}", name.display(), reason(Errno::NODEV)))
    }

    fn find_free(&mut self) -> LosetupResult<u32> {
        let found = self.devices.execute(LoopOp::GetFree).and_then(LoopReply::number);
        found.map_err(|error| format!("cannot find an unused loop device: {}", reason(error)))
    }

    fn one(&mut self, name: &OsStr, what: &str, op: impl FnOnce(u32) -> LoopOp) -> LosetupResult {
        let number = self.number(name)?;
        let done = self.devices.execute(op(number)).map(drop);
        done.map_err(|error| format!("{}: {what} failed: {}", self.path(number), reason(error)))
    }

    /// Applies `op` to each device. Stops if the first name is invalid; otherwise continues after
    /// failures.
    fn each(
        &mut self,
        names: &[OsString],
        what: &str,
        op: impl Fn(u32) -> LoopOp,
    ) -> io::Result<LosetupResult<bool>> {
        let mut all = true;
        for (index, name) in names.iter().enumerate() {
            match self.one(name, what, &op) {
                Err(message) if index == 0 && self.number(name).is_err() => return Ok(Err(message)),
                Err(message) => {
                    writeln!(self.err, "{NAME}: {message}")?;
                    all = false;
                }
                Ok(()) => {}
            }
        }
        Ok(Ok(all))
    }

    fn detach_all(&mut self) -> io::Result<LosetupResult<bool>> {
        let rows = match self.used() {
            Ok(rows) => rows,
            Err(message) => return Ok(Err(message)),
        };
        let names: Vec<OsString> = rows.into_iter().map(|row| row.name.into()).collect();
        self.each(&names, "detach", LoopOp::Clear)
    }

    fn status(&mut self, number: u32) -> Answer<LoopStatus> {
        self.devices.execute(LoopOp::Status(number)).and_then(LoopReply::status)
    }

    fn row(&mut self, entry: DeviceEntry) -> Row {
        let status = entry.bound.as_ref().and_then(|_| self.status(entry.number).ok());
        Row { name: self.path(entry.number), entry, status }
    }

    /// The bound devices.
    fn used(&mut self) -> LosetupResult<Vec<Row>> {
        let entries = self.devices.entries();
        let mut entries =
            entries.map_err(|error| format!("failed to inspect loop devices: {}", reason(error)))?;
        entries.retain(|entry| entry.bound.is_some());
        entries.sort_by_key(|entry| entry.number);
        Ok(entries.into_iter().map(|entry| self.row(entry)).collect())
    }

    fn show(&mut self, request: &LosetupRequest, file: Option<&OsStr>) -> io::Result<LosetupResult<bool>> {
        let mut rows = match self.used() {
            Ok(rows) => rows,
            Err(message) => return Ok(Err(message)),
        };
        if let Some(file) = file {
            let file = BackingFile::of(file);
            rows.retain(|row| file.backs(row, request.offset));
        }
        match &request.table {
            Some((columns, format)) => {
                self.out.write_all(table::render(columns, &rows, *format).as_bytes())?;
            }
            None => {
                for line in rows.iter().filter_map(Row::line) {
                    writeln!(self.out, "{line}")?;
                }
            }
        }
        Ok(Ok(true))
    }

    fn show_one(&mut self, request: &LosetupRequest, name: &OsStr) -> io::Result<LosetupResult<bool>> {
        let found = self.number(name).and_then(|number| {
            let entries = self.devices.entries().unwrap_or_default();
            let entry = entries.into_iter().find(|entry| entry.number == number);
            entry.ok_or_else(|| format!("{}: failed to use device: {}", name.display(), reason(Errno::NODEV)))
        });
        let row = match found {
            Ok(entry) => self.row(entry),
            Err(message) => return Ok(Err(message)),
        };
        match (&request.table, row.line()) {
            (Some((columns, format)), _) => {
                self.out.write_all(table::render(columns, &[row], *format).as_bytes())?;
            }
            (None, Some(line)) => writeln!(self.out, "{line}")?,
            (None, None) => return Ok(Err(format!("{}: {}", row.name, reason(Errno::NOENT)))),
        }
        Ok(Ok(true))
    }
}

/// A file that devices may be bound to, by name and identity.
struct BackingFile {
    names: [PathBuf; 2],
    identity: Option<(u64, u64)>,
}

impl BackingFile {
    fn of(name: &OsStr) -> BackingFile {
        let path = Path::new(name);
        let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let identity = path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        BackingFile { names: [path.to_owned(), full], identity }
    }

    /// True if the device is bound to this file, at `offset` if given.
    fn backs(&self, row: &Row, offset: Option<u64>) -> bool {
        let Some(bound) = row.entry.bound.as_ref() else { return false };
        let same = match (self.identity, row.backing()) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.names.contains(&bound.backing_file),
        };
        same && offset.is_none_or(|offset| offset == bound.offset)
    }
}

/// The message of the C library for an error.
fn reason(error: Errno) -> String {
    let text = io::Error::from(error).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
