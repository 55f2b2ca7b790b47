//! A pool that keeps books only, and whose nodes are regular files.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use loopengine_private::intercept::{Loops, Node};
use loopengine_private::loops::{Answer, Caller, Configure, Errno, Info, LoopOp, LoopReply, Status};

/// The number whose LOOP_CTL_ADD panics.
pub const PANICS: i32 = 1313;

#[derive(Default)]
pub struct Fake {
    /// Inode to number.
    nodes: Mutex<BTreeMap<u64, u32>>,
    bound: Mutex<BTreeMap<u32, Status>>,
    /// What was done, in words.
    pub log: Mutex<Vec<String>>,
    /// LOOP_SET_CAPACITY waits while this is shut, and does nothing for who does not wait any more.
    shut: Mutex<bool>,
    opened: Condvar,
    /// What LOOP_SET_BLOCK_SIZE puts onto the caller's descriptor.
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

    /// Waits until this has been logged so many times.
    pub fn wait_for(&self, what: &str, times: usize) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.count(what) < times {
            assert!(Instant::now() < until, "no {what}: {:?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The fake as a pool.
/// Of disks that lie upon the devices, in this test.
pub const OWN_MAJOR: u32 = 253;

pub struct Pretend(pub Arc<Fake>);

fn allowed(caller: &dyn Caller) -> Answer<()> {
    if caller.writes() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}

impl Loops for Pretend {
    fn find(&self, node: &Node) -> Option<u32> {
        self.0.nodes.lock().unwrap().get(&node.inode).copied()
    }

    fn refresh_descriptor(&self, _number: u32, _node: &Node, _caller: &dyn Caller) -> Answer<()> {
        Ok(())
    }

    fn may_make(&self, rdev: u64) -> bool {
        rustix::fs::major(rdev) == OWN_MAJOR
    }

    fn sequence(&self, _node: &Node) -> Answer<u64> {
        Ok(7)
    }

    fn has_part(&self, _node: &Node) -> bool {
        false
    }

    fn execute(&self, op: LoopOp, caller: &dyn Caller) -> Answer<LoopReply> {
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

    fn configure(&self, number: u32, with: Configure, caller: &dyn Caller) -> Answer<()> {
        let mut bound = self.0.bound.lock().unwrap();
        if bound.contains_key(&number) {
            return Err(Errno::BUSY);
        }
        if with.info.offset > i64::MAX as u64 {
            return Err(Errno::OVERFLOW);
        }
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        let meta = File::from(with.file).metadata().unwrap();
        let status = Status { number, device: meta.dev(), inode: meta.ino(), rdevice: 0, info: with.info };
        self.0.log(format!("configure {number} {} {}", with.block_size, meta.ino()));
        bound.insert(number, status);
        Ok(())
    }

    fn clear(&self, number: u32) -> Answer<()> {
        self.0.log(format!("clear {number}"));
        self.0.bound.lock().unwrap().remove(&number).map(drop).ok_or(Errno::NXIO)
    }

    fn status(&self, number: u32) -> Answer<Status> {
        self.0.log("status");
        self.0.bound.lock().unwrap().get(&number).copied().ok_or(Errno::NXIO)
    }

    fn set_status(&self, number: u32, info: &Info, caller: &dyn Caller) -> Answer<()> {
        allowed(caller)?;
        self.0.log("set_status");
        let mut bound = self.0.bound.lock().unwrap();
        bound.get_mut(&number).ok_or(Errno::NXIO)?.info = *info;
        Ok(())
    }

    fn set_capacity(&self, caller: &dyn Caller) -> Answer<()> {
        allowed(caller)?;
        self.0.log("asked for capacity");
        let mut shut = self.0.shut.lock().unwrap();
        while *shut {
            shut = self.0.opened.wait(shut).unwrap();
        }
        drop(shut);
        self.0.log(if caller.waits() { "capacity set" } else { "nobody waits" });
        Ok(())
    }

    fn set_direct_io(&self, on: bool, caller: &dyn Caller) -> Answer<()> {
        allowed(caller)?;
        self.0.log(format!("direct {on}"));
        Ok(())
    }

    fn set_block_size(&self, bytes: u64, caller: &dyn Caller) -> Answer<()> {
        allowed(caller)?;
        self.0.log(format!("block size {bytes}"));
        assert!(caller.has_descriptor());
        match &*self.0.spare.lock().unwrap() {
            Some(path) => caller.replace(File::open(path).unwrap().into()),
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
