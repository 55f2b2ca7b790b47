// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cached, direct and durable I/O.

use super::*;

/// Cached and direct I/O see each other's writes, whichever was opened first.
pub(super) fn cached_and_direct(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    for direct_first in [false, true] {
        // Only a direct open without cached users bypasses the cache completely.
        let (cached, direct) = if direct_first {
            let direct = Disk::open(&device)?;
            (open(&device)?, direct)
        } else {
            (open(&device)?, Disk::open(&device)?)
        };
        for round in 0..200_u64 {
            let at = round * 4096 % MIB + if round % 3 == 0 { 512 } else { 0 };
            let (one, two) = (pattern(2 * round, 2048), pattern(2 * round + 1, 2048));
            cached.write_all_at(&one, at)?;
            same("direct after cached", &direct.read(at, 2048)?, &one)?;
            direct.write(at, &two)?;
            let mut seen = vec![0; 2048];
            cached.read_exact_at(&mut seen, at)?;
            same("cached after direct", &seen, &two)?;
        }
        drop((cached, direct));
    }
    // Under direct load, another program can open, read and close.
    let job = format!(
        "[direct]\nfilename={device}\nioengine=libaio\ndirect=1\nrw=randwrite\nbs=4k\niodepth=32\n\
         size=4m\noffset=4m\ntime_based\nruntime=3\n"
    );
    let mut work = fio::start(ctx, &job)?;
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..20 {
        let mut seen = vec![0; 4096];
        open(&device)?.read_exact_at(&mut seen, 0)?;
    }
    ensure!(work.alive(), "fio ended early");
    work.finish(RUN)?.clean()?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// fio writes and verifies through the page cache, by mapped memory too.
pub(super) fn cached_load(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    // One kind of cached I/O at a time: fio 3.33 fails with two, on any file.
    for cached in [
        "[cached]\nrw=randwrite\nioengine=psync\nbssplit=512/20:3k/10:4k/40:40k/20:1m/10\nfsync=50\n",
        "[mapped]\nrw=randwrite\nioengine=mmap\nbs=4k\noffset=16m\n",
    ] {
        let jobs = format!(
            "[global]
filename={device}
verify=crc32c
verify_fatal=1
do_verify=1
invalidate=1
thread
size=16m
{cached}
[direct]
ioengine=io_uring
direct=1
rw=randwrite
iodepth=16
bssplit=512/20:4k/50:256k/30
offset=32m
[threads]
ioengine=psync
direct=1
rw=randwrite
bs=4k
size=4m
offset=48m
offset_increment=4m
numjobs=4
"
        );
        fio::run(ctx, &jobs, RUN)?;
    }
    let shown = std::fs::read(&device)?;
    let stats = daemon.stats(&device)?;
    ensure!(stats["errors"] == 0, "errors counted: {stats}");
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &shown)?;
    daemon.stop()
}

/// Many requests for one tag: none is lost.
pub(super) fn more_requests_than_tags(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    for words in [&["--depth", "1", "--queues", "1"][..], &["--depth", "2"]] {
        let device = daemon.attach(&[words, &[&image]].concat())?;
        let jobs = format!(
            "[global]\nfilename={device}\ndirect=1\nverify=crc32c\nverify_fatal=1\ndo_verify=1\nthread\n\
             rw=randwrite\nbs=4k\nsize=1m\n\
             [alone]\nioengine=psync\nnumjobs=16\noffset_increment=1m\n\
             [deep]\nioengine=libaio\niodepth=128\noffset=16m\nsize=8m\n"
        );
        fio::run(ctx, &jobs, RUN).at(format!("{words:?}"))?;
        daemon.detach(&device)?;
    }
    daemon.stop()
}

/// O_DSYNC and O_SYNC, cached and direct: each is durable before it returns.
pub(super) fn durable(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    for flags in [libc::O_SYNC, libc::O_DSYNC, libc::O_SYNC | libc::O_DIRECT, libc::O_DSYNC | libc::O_DIRECT]
    {
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&device)?;
        for round in 0..3 {
            let below = store.disk.flushes()?;
            let data = disk::Aligned::of(&pattern(round, 4096));
            file.write_all_at(data.get(), round * 4096)?;
            ensure!(store.disk.flushes()? > below, "flags {flags:#o}: no flush reached the store");
        }
    }
    daemon.detach(&device)?;
    daemon.stop()
}

/// The store is full: fsync reports failed cached writes, and earlier data stays.
pub(super) fn full_store(ctx: &Ctx) -> Res {
    let shape = crate::store::Shape { size_mib: 64, ..Default::default() };
    let store = Store::new(ctx, "ext4", &shape)?;
    let image = store.sparse("image", 32 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    let first = pattern(7, 4 << 20);
    file.write_all_at(&first, 0)?;
    file.sync_all()?;
    let filler = store.path("filler");
    tools::sh(format!("fallocate -l $(( $(stat -f -c '%a * %S' {image}) - 2097152 )) {filler}"))?;
    let _ = file.write_all_at(&pattern(8, 16 << 20), 8 * MIB);
    match file.sync_all() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EIO)) => {}
        other => fail!("fsync on a full store: {other:?}"),
    }
    drop(file);
    daemon.check_alive()?;
    same("earlier data", &disk::read_all(&device, 0, 4 * MIB)?, &first)?;
    std::fs::remove_file(&filler)?;
    tools::ok(&["sync", "-f", &image])?;
    let second = pattern(9, 32 << 20);
    disk::write_all(&device, &second).at("write once there is space again")?;
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &second)?;
    daemon.stop()
}
