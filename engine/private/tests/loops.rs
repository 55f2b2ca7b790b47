// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests the module `loops` on the real driver. Needs ublk, root and Linux 7.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loopengine_core::instance::spec::{BackendKind, InstanceSpec};
use loopengine_core::instance::{Engine, EngineConfig, Tuning};
use loopengine_private::loops::{
    Answer, Errno, LoopCaller, LoopConfig, LoopInfo, LoopOp, LoopStatus, OwnerCaller, Pool, PoolSpec, Pools,
    flag,
};

/// A caller with a descriptor that can be replaced.
struct Hand(std::sync::Mutex<Option<File>>);

impl LoopCaller for Hand {
    fn can_write(&self) -> bool {
        true
    }
    fn is_admin(&self) -> bool {
        true
    }
    fn is_waiting(&self) -> bool {
        true
    }
    fn replace_descriptor(&self, file: OwnedFd) -> Answer<()> {
        *self.0.lock().unwrap() = Some(file.into());
        Ok(())
    }
    fn has_descriptor(&self) -> bool {
        true
    }
}

fn node(rdev: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap();
    PathBuf::from("/dev").join(link.file_name().unwrap())
}

fn engine() -> Option<(tempfile::TempDir, Engine)> {
    let dir = tempfile::tempdir().unwrap();
    let config = EngineConfig {
        run_dir: dir.path().to_owned(),
        default_instance: InstanceSpec {
            name: "default".into(),
            max_devices: 8,
            workers: 0,
            cpus: None,
            backend: None,
        },
        backends: vec![BackendKind::Ublk],
        tuning: Tuning { linked_commit: true },
        dev_links: false,
    };
    match Engine::start(config) {
        Ok(engine) => Some((dir, engine)),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn pool(pools: &Pools, max: u32) -> Option<Arc<Pool>> {
    let spec = PoolSpec {
        name: format!("t{}", std::process::id()),
        max,
        uid: 0,
        gid: 0,
        mode: 0o660,
        fixed: false,
        intercepted: false,
        reserved: BTreeSet::new(),
        backend: None,
    };
    match pools.open(&spec) {
        Ok(pool) => Some(pool),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn image(bytes: &[u8], size: u64) -> File {
    let mut file = tempfile::tempfile_in("/tmp").unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(size).unwrap();
    file
}

fn open(pool: &Pool, number: u32) -> File {
    let entry = pool.entry(number).unwrap();
    File::options().read(true).write(true).open(node(entry.rdev)).unwrap()
}

fn read(file: &mut File, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(0)).unwrap();
    let read = file.read(&mut bytes).unwrap();
    bytes.truncate(read);
    bytes
}

fn number(pool: &Pool, op: LoopOp) -> Answer<u32> {
    pool.execute(op, &OwnerCaller::with_timeout(Duration::from_secs(60)))?.number()
}

fn free(pool: &Pool) -> Answer<u32> {
    number(pool, LoopOp::GetFree)
}

fn status(pool: &Pool, number: u32) -> Answer<LoopStatus> {
    pool.execute(LoopOp::Status(number), &OwnerCaller::with_timeout(Duration::from_secs(60)))?.status()
}

fn configure(file: &File, info: LoopInfo) -> LoopConfig {
    LoopConfig { file: file.try_clone().unwrap().into(), block_size: 0, info }
}

fn until(what: &str, condition: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(5), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

#[test]
fn binds_in_place_and_replaces_the_disk() {
    let Some((_dir, engine)) = engine() else { return };
    let pools = Pools::new(&engine);
    let Some(pool) = pool(&pools, 2) else { return };
    let start = Instant::now();
    assert_eq!(free(&pool), Ok(0));
    println!("first device: {:?}", start.elapsed());
    assert_eq!(free(&pool), Ok(0));
    let mut device = open(&pool, 0);
    assert_eq!(read(&mut device, 512), b"");
    let first = image(b"first", 1 << 20);
    let hand = Hand(Default::default());
    let start = Instant::now();
    pool.execute(LoopOp::Configure(0, configure(&first, LoopInfo::default())), &hand).unwrap();
    println!("configure: {:?}", start.elapsed());
    assert!(hand.0.lock().unwrap().is_none());
    assert_eq!(read(&mut device, 5), b"first");
    assert_eq!(device.seek(SeekFrom::End(0)).unwrap(), 1 << 20);
    assert_eq!(
        pool.execute(LoopOp::Configure(0, configure(&first, LoopInfo::default())), &hand),
        Err(Errno::BUSY)
    );
    assert_eq!(status(&pool, 0).unwrap().info.flags, 0);
    device.seek(SeekFrom::Start(4096)).unwrap();
    device.write_all(&[7; 4096]).unwrap();
    device.sync_all().unwrap();
    let mut copy = first.try_clone().unwrap();
    copy.seek(SeekFrom::Start(4096)).unwrap();
    let mut seen = [0; 4096];
    copy.read_exact(&mut seen).unwrap();
    assert_eq!(seen, [7; 4096]);

    // Cleared while open, and bound again through the same descriptor.
    let rdev = pool.entry(0).unwrap().rdev;
    pool.execute(LoopOp::Clear(0), &hand).unwrap();
    assert_eq!(status(&pool, 0).unwrap_err(), Errno::NXIO);
    let second = image(b"second", 2 << 20);
    pool.execute(LoopOp::Configure(0, configure(&second, LoopInfo::default())), &hand).unwrap();
    let mut fresh = hand.0.lock().unwrap().take().unwrap();
    assert_eq!(read(&mut fresh, 6), b"second");
    assert_eq!(read(&mut device, 5), b"first");
    assert_ne!(pool.entry(0).unwrap().rdev, rdev);
    drop(device);

    // Cleared, and closed.
    pool.execute(LoopOp::Clear(0), &hand).unwrap();
    drop(fresh);
    let took = until("autoclear", || pool.entry(0).unwrap().size == 0);
    println!("autoclear: {took:?}");
    assert_eq!(free(&pool), Ok(0));
    assert_eq!(read(&mut open(&pool, 0), 512), b"");

    assert_eq!(number(&pool, LoopOp::Add(5)), Ok(5));
    assert_eq!(number(&pool, LoopOp::Add(5)), Err(Errno::EXIST));
    assert_eq!(number(&pool, LoopOp::Add(-1)), Err(Errno::NOSPC));
    assert_eq!(number(&pool, LoopOp::Remove(5)), Ok(0));
    assert_eq!(number(&pool, LoopOp::Remove(5)), Err(Errno::NODEV));
    let start = Instant::now();
    pool.end(false);
    until("the end", || pools.all().is_empty());
    println!("end: {:?}", start.elapsed());
    engine.shutdown(true);
}

#[test]
fn supports_block_sizes_and_offsets() {
    let Some((_dir, engine)) = engine() else { return };
    let pools = Pools::new(&engine);
    let Some(pool) = pool(&pools, 4) else { return };
    let file = image(b"x", (1 << 20) + 700);
    let hand = Hand(Default::default());
    assert_eq!(free(&pool), Ok(0));
    let with = LoopConfig { block_size: 4096, ..configure(&file, LoopInfo::default()) };
    pool.execute(LoopOp::Configure(0, with), &hand).unwrap();
    let mut device = hand.0.lock().unwrap().take().unwrap();
    assert_eq!(rustix::fs::ioctl_blksszget(&device).unwrap(), 4096);
    assert_eq!(device.seek(SeekFrom::End(0)).unwrap(), (1 << 20) + 512);
    let info = LoopInfo { offset: 100, size_limit: 5000, ..LoopInfo::default() };
    pool.execute(LoopOp::SetStatus(0, info), &hand).unwrap();
    assert_eq!(device.seek(SeekFrom::End(0)).unwrap(), 4608);
    pool.execute(LoopOp::SetBlockSize(0, 512), &hand).unwrap();
    let mut device = hand.0.lock().unwrap().take().unwrap();
    assert_eq!(device.seek(SeekFrom::End(0)).unwrap(), 4608);
    assert_eq!(pool.execute(LoopOp::SetBlockSize(0, 1000), &hand), Err(Errno::INVAL));
    assert_eq!(status(&pool, 0).unwrap().info.offset, 100);
    let info = LoopInfo { flags: flag::AUTOCLEAR, ..LoopInfo::default() };
    pool.execute(LoopOp::SetStatus(0, info), &hand).unwrap();
    file.set_len(1 << 21).unwrap();
    pool.execute(LoopOp::SetCapacity(0), &hand).unwrap();
    assert_eq!(device.seek(SeekFrom::End(0)).unwrap(), 1 << 21);
    drop(device);
    until("autoclear", || pool.entry(0).unwrap().bound.is_none());

    // Stacked devices, and cycles of them.
    assert_eq!(free(&pool), Ok(0));
    pool.execute(LoopOp::Configure(0, configure(&file, LoopInfo::default())), &hand).unwrap();
    let zero = open(&pool, 0);
    assert_eq!(free(&pool), Ok(1));
    pool.execute(LoopOp::Configure(1, configure(&zero, LoopInfo::default())), &hand).unwrap();
    let mut one = open(&pool, 1);
    one.write_all(&[9; 4096]).unwrap();
    one.sync_all().unwrap();
    assert_eq!(free(&pool), Ok(2));
    let two = open(&pool, 2);
    assert_eq!(
        pool.execute(LoopOp::Configure(2, configure(&two, LoopInfo::default())), &hand),
        Err(Errno::BADF)
    );
    pool.end(true);
    until("the end", || pools.all().is_empty());
    engine.shutdown(true);
}

#[test]
fn replaces_a_disk_a_thousand_times() {
    let Some((_dir, engine)) = engine() else { return };
    let pools = Pools::new(&engine);
    let Some(pool) = pool(&pools, 2) else { return };
    let file = image(b"x", 1 << 20);
    let hand = Hand(Default::default());
    let rounds = if std::env::var_os("LOOPENGINE_VM_FULL").is_some() { 1000 } else { 50 };
    let start = Instant::now();
    let mut numbers = std::collections::BTreeSet::new();
    for _ in 0..rounds {
        let number = free(&pool).unwrap();
        let device = open(&pool, number);
        numbers.insert(pool.entry(number).unwrap().rdev);
        let info = LoopInfo { flags: flag::AUTOCLEAR, ..LoopInfo::default() };
        pool.execute(LoopOp::Configure(number, configure(&file, info)), &hand).unwrap();
        drop(device);
        until("autoclear", || pool.entries().iter().all(|entry| entry.bound.is_none()));
    }
    println!("{} ms a life, device numbers {numbers:?}", start.elapsed().as_millis() / rounds);
    assert!(numbers.len() <= 2, "{numbers:?}");
    pool.end(true);
    engine.shutdown(true);
}
