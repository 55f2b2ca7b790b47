// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake pool in memory, and what losetup prints for it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;

use super::super::{LoopDevices, run, usage_error};
use super::{Ran, parse};
use crate::loops::{
    Answer, Bound, DeviceEntry, Errno, LoopConfig, LoopInfo, LoopOp, LoopReply, LoopStatus, flag,
};

/// A fake pool in memory.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) entries: BTreeMap<u32, (DeviceEntry, Option<LoopStatus>)>,
    /// The errors of the next calls of an operation.
    pub(super) fails: Vec<(&'static str, Errno)>,
    pub(super) calls: Vec<String>,
    pub(super) max: u32,
}

impl Fake {
    pub(super) fn of(max: u32) -> Fake {
        Fake { max, ..Fake::default() }
    }

    fn call(&mut self, name: &'static str, call: String) -> Answer<()> {
        self.calls.push(call);
        match self.fails.iter().position(|(fails, _)| *fails == name) {
            Some(at) => Err(self.fails.remove(at).1),
            None => Ok(()),
        }
    }

    fn bound(&mut self, number: u32) -> Answer<&mut (DeviceEntry, Option<LoopStatus>)> {
        let device = self.entries.get_mut(&number).ok_or(Errno::NOENT)?;
        if device.0.bound.is_some() { Ok(device) } else { Err(Errno::NXIO) }
    }

    pub(super) fn flags(&self, number: u32) -> u32 {
        self.entries[&number].0.bound.as_ref().unwrap().flags
    }

    pub(super) fn ran(&mut self, words: &[&str]) -> Ran {
        let last = OsString::from(words.last().unwrap_or(&""));
        let words = std::iter::once("losetup").chain(words.iter().copied()).map(OsString::from);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = match parse(words) {
            Ok(args) => run(args, self, &mut out, &mut err).unwrap(),
            Err(error) => {
                err.extend(usage_error(&error, &last).bytes());
                1
            }
        };
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { out: text(out), err: text(err), code: code.into() }
    }

    #[track_caller]
    pub(super) fn does(&mut self, words: &[&str], out: &str) {
        assert_eq!(self.ran(words), Ran { out: out.to_owned(), err: String::new(), code: 0 }, "{words:?}");
    }

    #[track_caller]
    pub(super) fn fails(&mut self, words: &[&str], err: &str) {
        let err = format!("losetup: {err}\n");
        assert_eq!(self.ran(words), Ran { out: String::new(), err, code: 1 }, "{words:?}");
    }
}

pub(super) fn entry(number: u32) -> DeviceEntry {
    DeviceEntry {
        number,
        rdev: rustix::fs::makedev(259, number),
        generation: 1,
        size: 0,
        block_size: 512,
        bound: None,
        partitions: Vec::new(),
    }
}

impl LoopDevices for Fake {
    fn directory(&self) -> &str {
        "/dev"
    }

    fn entries(&mut self) -> Answer<Vec<DeviceEntry>> {
        Ok(self.entries.values().map(|(entry, _)| entry.clone()).rev().collect())
    }

    fn execute(&mut self, op: LoopOp) -> Answer<LoopReply> {
        let unsigned = |number: i32| u32::try_from(number).map_err(|_| Errno::INVAL);
        let done = match op {
            LoopOp::GetFree => return self.get_free().map(LoopReply::Number),
            LoopOp::Add(number) => return self.add(unsigned(number)?).map(LoopReply::Number),
            LoopOp::Remove(number) => return self.remove(unsigned(number)?).map(LoopReply::Number),
            LoopOp::Status(number) => return self.status(number).map(LoopReply::Status),
            LoopOp::Configure(number, with) => self.configure(number, with),
            LoopOp::Clear(number) => self.clear(number),
            LoopOp::SetStatus(number, info) => self.set_status(number, &info),
            LoopOp::SetCapacity(number) => self.set_capacity(number),
            LoopOp::SetDirectIo(number, on) => self.set_direct_io(number, on),
            LoopOp::SetBlockSize(number, bytes) => self.set_block_size(number, bytes),
            other => panic!("unexpected operation {other:?}"),
        };
        done.map(|()| LoopReply::Done)
    }
}

impl Fake {
    fn status(&mut self, number: u32) -> Answer<LoopStatus> {
        self.call("status", format!("status {number}"))?;
        self.bound(number)?.1.ok_or(Errno::PERM)
    }

    fn set_status(&mut self, number: u32, info: &LoopInfo) -> Answer<()> {
        self.call("set_status", format!("set_status {number}"))?;
        self.bound(number)?.0.bound.as_mut().unwrap().flags = info.flags;
        Ok(())
    }

    fn get_free(&mut self) -> Answer<u32> {
        self.call("get_free", "get_free".to_owned())?;
        let free = self.entries.values().find(|(entry, _)| entry.bound.is_none());
        if let Some((entry, _)) = free {
            return Ok(entry.number);
        }
        let number = self.entries.len() as u32;
        self.add(number)
    }

    pub(super) fn add(&mut self, number: u32) -> Answer<u32> {
        if self.entries.contains_key(&number) {
            return Err(Errno::EXIST);
        } else if number >= self.max {
            return Err(Errno::NOSPC);
        }
        self.entries.insert(number, (entry(number), None));
        Ok(number)
    }

    fn remove(&mut self, number: u32) -> Answer<u32> {
        match self.entries.get(&number) {
            None => Err(Errno::NODEV),
            Some((entry, _)) if entry.bound.is_some() => Err(Errno::BUSY),
            Some(_) => self.entries.remove(&number).map(|_| number).ok_or(Errno::NODEV),
        }
    }

    fn configure(&mut self, number: u32, with: LoopConfig) -> Answer<()> {
        self.call("configure", format!("configure {number} {}", with.block_size))?;
        let (entry, known) = self.entries.get_mut(&number).ok_or(Errno::NOENT)?;
        if entry.bound.is_some() {
            return Err(Errno::BUSY);
        }
        let stat = rustix::fs::fstat(&with.file).unwrap();
        let path = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&with.file)));
        let info = with.info;
        entry.bound = Some(Bound {
            backing_file: path.unwrap(),
            image_device: stat.st_dev,
            image_inode: stat.st_ino,
            offset: info.offset,
            size_limit: info.size_limit,
            flags: info.flags,
        });
        entry.block_size = with.block_size.max(512);
        *known = Some(LoopStatus { number, device: stat.st_dev, inode: stat.st_ino, rdevice: 0, info });
        Ok(())
    }

    fn clear(&mut self, number: u32) -> Answer<()> {
        self.call("clear", format!("clear {number}"))?;
        *self.bound(number)? = (entry(number), None);
        Ok(())
    }

    fn set_capacity(&mut self, number: u32) -> Answer<()> {
        self.call("set_capacity", format!("set_capacity {number}"))?;
        self.bound(number).map(drop)
    }

    fn set_direct_io(&mut self, number: u32, on: bool) -> Answer<()> {
        self.call("set_direct_io", format!("set_direct_io {number} {on}"))?;
        let flags = &mut self.bound(number)?.0.bound.as_mut().unwrap().flags;
        *flags = if on { *flags | flag::DIRECT_IO } else { *flags & !flag::DIRECT_IO };
        Ok(())
    }

    fn set_block_size(&mut self, number: u32, bytes: u64) -> Answer<()> {
        self.call("set_block_size", format!("set_block_size {number} {bytes}"))?;
        self.bound(number)?.0.block_size = u32::try_from(bytes).map_err(|_| Errno::INVAL)?;
        Ok(())
    }
}
