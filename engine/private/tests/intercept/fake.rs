// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake pool that only records operations. Its nodes are regular files.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use loopengine_core::sys::process::ProcFds;
use loopengine_private::intercept::mounts::MountRequest;
use loopengine_private::intercept::{FdNode, MountHandler, PoolOps};
use loopengine_private::loops::{
    Answer, Errno, LoopCaller, LoopConfig, LoopInfo, LoopOp, LoopReply, LoopStatus,
};

/// The number whose LOOP_CTL_ADD panics.
pub const PANICS: i32 = 1313;

#[derive(Default)]
pub struct Fake {
    /// Inode to number.
    nodes: Mutex<BTreeMap<u64, u32>>,
    bound: Mutex<BTreeMap<u32, LoopStatus>>,
    /// The recorded operations.
    pub log: Mutex<Vec<String>>,
    /// LOOP_SET_CAPACITY blocks while this is shut, and has no effect if its caller is gone.
    shut: Mutex<bool>,
    opened: Condvar,
    /// LOOP_SET_BLOCK_SIZE replaces the caller's descriptor by this file.
    pub spare: Mutex<Option<PathBuf>>,
}

impl Fake {
    pub fn add_node(&self, path: &Path, number: u32) {
        self.nodes.lock().unwrap().insert(std::fs::metadata(path).unwrap().ino(), number);
    }

    pub fn shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }

    fn log(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    pub fn count(&self, what: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.starts_with(what)).count()
    }

    /// Waits until this has been recorded so many times.
    pub fn wait_for(&self, what: &str, times: usize) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.count(what) < times {
            assert!(Instant::now() < until, "no {what}: {:?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The fake as a pool.
/// Of stacked disks, in this test.
pub const OWN_MAJOR: u32 = 253;

pub struct Pretend(pub Arc<Fake>);

fn allowed(caller: &dyn LoopCaller) -> Answer<()> {
    if caller.can_write() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}

impl PoolOps for Pretend {
    fn find(&self, node: &FdNode) -> Option<u32> {
        self.0.nodes.lock().unwrap().get(&node.inode).copied()
    }

    fn refresh_descriptor(&self, _number: u32, _node: &FdNode, _caller: &dyn LoopCaller) -> Answer<()> {
        Ok(())
    }

    fn may_make_node(&self, rdev: u64) -> bool {
        rustix::fs::major(rdev) == OWN_MAJOR
    }

    fn disk_sequence(&self, _node: &FdNode) -> Answer<u64> {
        Ok(7)
    }

    fn is_partition(&self, _node: &FdNode) -> bool {
        false
    }

    fn execute(&self, op: LoopOp, caller: &dyn LoopCaller) -> Answer<LoopReply> {
        let done = match op {
            LoopOp::GetFree => return self.get_free().map(LoopReply::Number),
            LoopOp::Add(number) => return self.add(number).map(LoopReply::Number),
            LoopOp::Remove(number) => return self.remove(number).map(LoopReply::Number),
            LoopOp::Status(number) => return self.status(number).map(LoopReply::Status),
            LoopOp::Configure(number, with) => self.configure(number, with, caller),
            LoopOp::Clear(number) => self.clear(number),
            LoopOp::SetStatus(number, info) => self.set_status(number, &info, caller),
            LoopOp::SetCapacity(_) => self.set_capacity(caller),
            LoopOp::SetDirectIo(_, on) => self.set_direct_io(on, caller),
            LoopOp::SetBlockSize(_, bytes) => self.set_block_size(bytes, caller),
            LoopOp::ChangeFd(number, file) => self.change_fd(number, file),
            LoopOp::RereadPartitions(number) => {
                self.0.log(format!("reread {number}"));
                Ok(())
            }
            LoopOp::ChangePartition(number, change) => {
                self.0.log(format!("partition of {number}: {change:?}"));
                Ok(())
            }
        };
        done.map(|()| LoopReply::Done)
    }
}

impl Pretend {
    fn get_free(&self) -> Answer<u32> {
        self.0.log("get_free");
        Ok(7)
    }

    fn add(&self, number: i32) -> Answer<u32> {
        assert_ne!(number, PANICS, "the panic that was asked for");
        self.0.log(format!("add {number}"));
        if number == 0 { Err(Errno::EXIST) } else { Ok(number.max(5).cast_unsigned()) }
    }

    fn remove(&self, number: i32) -> Answer<u32> {
        self.0.log(format!("remove {number}"));
        if number < 0 { Err(Errno::INVAL) } else { Ok(0) }
    }

    fn configure(&self, number: u32, with: LoopConfig, caller: &dyn LoopCaller) -> Answer<()> {
        let mut bound = self.0.bound.lock().unwrap();
        if bound.contains_key(&number) {
            return Err(Errno::BUSY);
        }
        if with.info.offset > i64::MAX as u64 {
            return Err(Errno::OVERFLOW);
        }
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        let meta = File::from(with.file).metadata().unwrap();
        let status =
            LoopStatus { number, device: meta.dev(), inode: meta.ino(), rdevice: 0, info: with.info };
        self.0.log(format!("configure {number} {} {}", with.block_size, meta.ino()));
        bound.insert(number, status);
        Ok(())
    }

    fn clear(&self, number: u32) -> Answer<()> {
        self.0.log(format!("clear {number}"));
        self.0.bound.lock().unwrap().remove(&number).map(drop).ok_or(Errno::NXIO)
    }

    fn status(&self, number: u32) -> Answer<LoopStatus> {
        self.0.log("status");
        self.0.bound.lock().unwrap().get(&number).copied().ok_or(Errno::NXIO)
    }

    fn set_status(&self, number: u32, info: &LoopInfo, caller: &dyn LoopCaller) -> Answer<()> {
        allowed(caller)?;
        self.0.log("set_status");
        let mut bound = self.0.bound.lock().unwrap();
        bound.get_mut(&number).ok_or(Errno::NXIO)?.info = *info;
        Ok(())
    }

    fn set_capacity(&self, caller: &dyn LoopCaller) -> Answer<()> {
        allowed(caller)?;
        self.0.log("asked for capacity");
        let mut shut = self.0.shut.lock().unwrap();
        while *shut {
            shut = self.0.opened.wait(shut).unwrap();
        }
        drop(shut);
        self.0.log(if caller.is_waiting() { "capacity set" } else { "nobody waits" });
        Ok(())
    }

    fn set_direct_io(&self, on: bool, caller: &dyn LoopCaller) -> Answer<()> {
        allowed(caller)?;
        self.0.log(format!("direct {on}"));
        Ok(())
    }

    fn set_block_size(&self, bytes: u64, caller: &dyn LoopCaller) -> Answer<()> {
        allowed(caller)?;
        self.0.log(format!("block size {bytes}"));
        assert!(caller.has_descriptor());
        match &*self.0.spare.lock().unwrap() {
            Some(path) => caller.replace_descriptor(File::open(path).unwrap().into()),
            None => Err(Errno::INVAL),
        }
    }

    fn change_fd(&self, number: u32, file: OwnedFd) -> Answer<()> {
        let meta = File::from(file).metadata().unwrap();
        let mut bound = self.0.bound.lock().unwrap();
        bound.get_mut(&number).ok_or(Errno::NXIO)?.inode = meta.ino();
        Ok(())
    }
}

impl MountHandler for Fake {
    fn mount(&self, request: &MountRequest, _: ProcFds, _: &dyn Fn() -> bool) -> Answer<Option<()>> {
        let MountRequest { source, kind, flags, .. } = request;
        self.log(format!("mount of {kind} with {flags}: {}", String::from_utf8_lossy(source)));
        Ok(Some(()))
    }
}
