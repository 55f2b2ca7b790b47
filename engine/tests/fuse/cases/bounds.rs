// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bounds and holes of a file: writes past the end fail, fallocate works within the size, and holes
//! are those of the image.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::model::pattern;
use crate::store::Store;
use crate::tools;

/// More dirty data than one FUSE file system can have on any machine of the lab.
const BOUND: u64 = 4 << 30;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("bounds::endless_writes_end", Needs::Ublk, 180, endless_writes_end),
        case("bounds::writes_past_the_end_end_soon", Needs::Ublk, 120, past_the_end),
        case("bounds::fallocate_within_the_size", Needs::Ublk, 90, fallocate_reserves),
        case("bounds::holes_are_those_of_the_image", Needs::Ublk, 90, holes),
        case("bounds::cached_data_is_no_hole", Needs::Ublk, 90, cached_data),
        case("bounds::truncation_to_zero", Needs::Ublk, 60, truncated_to_zero),
        case("bounds::qemu_img_creates", Needs::Ublk, 90, qemu_img),
    ]
}

fn open(device: &str) -> Res<File> {
    OpenOptions::new().read(true).write(true).open(device).at(device)
}

/// `dd` without a count ends with ENOSPC, as on a block device; with the right count it succeeds.
fn endless_writes_end(ctx: &Ctx) -> Res {
    const SIZE: u64 = 8 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", SIZE)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let of = format!("of={device}");
    for extra in [&[][..], &["conv=notrunc"]] {
        let words = [&["timeout", "60", "dd", "if=/dev/zero", &of, "bs=1M"], extra].concat();
        let done = tools::run_for(Duration::from_secs(90), &words)?;
        ensure!(done.code == 1 && done.err.contains("No space left on device"), "{words:?}: {done:?}");
    }
    let shown = tools::until(Duration::from_secs(5), || (disk::size(&device).ok()? == SIZE).then_some(()));
    ensure!(shown.is_some(), "the size is {}", disk::size(&device)?);
    ensure!(std::fs::metadata(&image)?.len() == SIZE, "the image grew");
    // The first sync reports writes that failed before, as on any file system.
    let _ = std::fs::File::options().write(true).open(&device)?.sync_all();
    for extra in [&[][..], &["conv=notrunc", "oflag=direct"], &["conv=notrunc,fsync"]] {
        let exact = [&["dd", "if=/dev/urandom", &of, "bs=1M", "count=8"], extra].concat();
        tools::ok(&exact)?;
    }
    let data = std::fs::read(&device)?;
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &data)?;
    daemon.stop()
}

/// Writes that start past the end fail soon, each time; writes to other files succeed meanwhile.
fn past_the_end(ctx: &Ctx) -> Res {
    const SIZE: u64 = 4 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", SIZE)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let other = daemon.attach(&[&store.sparse("other", SIZE)?])?;
    let data = pattern(1, 1 << 20);
    let file = open(&device)?;
    for round in 0..2 {
        let (mut at, until) = (SIZE, Instant::now() + Duration::from_secs(40));
        let refusal = loop {
            ensure!(at < BOUND && Instant::now() < until, "round {round}: no error up to {at}");
            match file.write_at(&data, at) {
                Ok(done) => at += done as u64,
                Err(error) => break error,
            }
            open(&other)?.write_all_at(&data, 0).at("writing to another file")?;
        };
        ensure!(refusal.raw_os_error() == Some(libc::ENOSPC), "round {round}: {refusal}");
        // The size is correct again, and writes within it succeed.
        let size = || (disk::size(&device).ok()? == SIZE).then_some(());
        ensure!(tools::until(Duration::from_secs(5), size).is_some(), "the size is {}", disk::size(&device)?);
        let _ = file.sync_all();
        let again = || file.write_all_at(&data, 0).and_then(|()| file.sync_all()).ok();
        ensure!(tools::until(Duration::from_secs(5), again).is_some(), "a write within the size failed");
    }
    drop(file);
    same("within the size", &std::fs::read(&device)?[..data.len()], &data)?;
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

/// fallocate reserves blocks of the image, only within the size, and overwrites nothing.
fn fallocate_reserves(ctx: &Ctx) -> Res {
    const SIZE: u64 = 16 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", SIZE + 2 * MIB)?;
    let data = pattern(2, 1 << 20);
    OpenOptions::new().write(true).open(&image)?.write_all_at(&data, 3 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let words = [&*image, "--offset", &MIB.to_string(), "--size-limit", &SIZE.to_string()];
    let device = daemon.attach(&words)?;
    let file = open(&device)?;
    for (flags, len) in [(FallocateFlags::KEEP_SIZE, SIZE / 2), (FallocateFlags::empty(), SIZE)] {
        fallocate(&file, flags, 0, len).map_err(|error| format!("{flags:?}: {error}"))?;
        ensure!(disk::allocated(&image)? >= len, "{flags:?}: {} bytes", disk::allocated(&image)?);
    }
    ensure!(disk::allocated(&image)? < SIZE + MIB, "blocks outside the device were reserved");
    for flags in [FallocateFlags::KEEP_SIZE, FallocateFlags::empty()] {
        for (offset, len) in [(SIZE - 4096, 8192), (SIZE, 4096), (64 * MIB, 1)] {
            let refused = fallocate(&file, flags, offset, len);
            ensure!(refused == Err(Errno::NOSPC), "{flags:?} {offset} {len}: {refused:?}");
        }
    }
    tools::ok(&["fallocate", "--length", &SIZE.to_string(), &device])?;
    same("earlier data", &std::fs::read(&device)?[2 << 20..3 << 20], &data)?;
    drop(file);
    daemon.detach(&device)?;
    // More than one request can reserve.
    let device = daemon.attach(&[&store.sparse("large", 900 * MIB)?])?;
    let refused = fallocate(open(&device)?, FallocateFlags::empty(), 0, 900 * MIB);
    ensure!(matches!(refused, Ok(()) | Err(Errno::NOSPC)), "{refused:?}");
    daemon.detach(&device)?;
    daemon.stop()
}

/// The ranges of data, by SEEK_DATA and SEEK_HOLE.
fn extents(file: &File) -> Res<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        match seek(file, SeekFrom::Data(at)) {
            Ok(data) => {
                at = seek(file, SeekFrom::Hole(data))?;
                found.push((data, at));
            }
            Err(Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error.into()),
        }
        ensure!(found.len() < 1000, "no end: {found:?}");
    }
}

fn holes(ctx: &Ctx) -> Res {
    const SIZE: u64 = 16 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", SIZE + 3 * MIB)?;
    let below = OpenOptions::new().read(true).write(true).open(&image)?;
    let regular = store.sparse("regular", SIZE)?;
    let twin = open(&regular)?;
    for (at, len) in [(0, 1 << 20), (5 * MIB, 8192), (SIZE - MIB, 1 << 20)] {
        below.write_all_at(&pattern(at, len), MIB + at)?;
        twin.write_all_at(&pattern(at, len), at)?;
    }
    // Outside of the device.
    below.write_all_at(&[1; 4096], MIB + SIZE)?;
    below.sync_all()?;
    let daemon = Daemon::start(ctx)?;
    let words = [&*image, "--offset", &MIB.to_string(), "--size-limit", &SIZE.to_string()];
    let device = daemon.attach(&words)?;
    let file = File::open(&device)?;
    let (found, expected) = (extents(&file)?, extents(&twin)?);
    ensure!(found == expected, "{found:?} is not {expected:?}");
    for from in [SIZE, SIZE + 1, 1 << 40] {
        for whence in [SeekFrom::Data(from), SeekFrom::Hole(from)] {
            let found = seek(&file, whence);
            ensure!(found == Err(Errno::NXIO), "{whence:?}: {found:?}");
        }
    }
    let copy = store.path("copy");
    tools::ok(&["cp", "--sparse=auto", &device, &copy])?;
    same("copy", &std::fs::read(&copy)?, &std::fs::read(&regular)?)?;
    drop(file);
    daemon.detach(&device)?;
    // A block device has no holes.
    let device = daemon.attach(&[&store.disk.node(), "--read-only"]);
    if let Ok(device) = device {
        let size = disk::size(&device)?;
        let found = extents(&File::open(&device)?)?;
        ensure!(found == [(0, size)], "{found:?}");
        daemon.detach(&device)?;
    }
    daemon.stop()
}

/// SEEK_DATA finds data that is only in the page cache, through every descriptor.
fn cached_data(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let (writer, reader) = (open(&device)?, File::open(&device)?);
    for round in 1..20u64 {
        let at = round * 64 * 1024;
        writer.write_all_at(&[round as u8; 4096], at)?;
        let found = seek(&reader, SeekFrom::Data(at)).at("SEEK_DATA")?;
        ensure!(found == at, "round {round}: data is at {found}, not {at}");
    }
    writer.write_all_at(&pattern(3, 4096), 7 * MIB)?;
    let copy = store.path("copy");
    tools::ok(&["cp", "--sparse=always", &device, &copy])?;
    same("copy", &std::fs::read(&copy)?, &std::fs::read(&device)?)?;
    same("its end", &std::fs::read(&copy)?[7 << 20..(7 << 20) + 4096], &pattern(3, 4096))?;
    drop((reader, writer));
    daemon.detach(&device)?;
    daemon.stop()
}

/// ftruncate to 0 discards the content, as O_TRUNC does; the size stays.
fn truncated_to_zero(ctx: &Ctx) -> Res {
    const SIZE: u64 = 8 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", SIZE)?;
    disk::write_all(&image, &pattern(4, usize::try_from(SIZE)?))?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    let other = File::open(&device)?;
    let refused = file.set_len(0).err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EBUSY), "with another opener: {refused:?}");
    drop(other);
    // Dirty pages are discarded, too.
    file.write_all_at(&[9; 8192], MIB)?;
    file.set_len(0).at("truncation to 0")?;
    file.set_len(SIZE).at("truncation back to the size")?;
    file.write_all_at(&[8; 4096], 2 * MIB)?;
    file.sync_all()?;
    let size = || (disk::size(&device).ok()? == SIZE).then_some(());
    ensure!(tools::until(Duration::from_secs(5), size).is_some(), "the size is {}", disk::size(&device)?);
    let mut expected = vec![0; usize::try_from(SIZE)?];
    expected[2 << 20..(2 << 20) + 4096].fill(8);
    same("the file", &std::fs::read(&device)?, &expected)?;
    drop(file);
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &expected)?;
    daemon.stop()
}

/// qemu-img overwrites a file of the right size, and fails on a smaller one.
fn qemu_img(ctx: &Ctx) -> Res {
    if tools::run(&["sh", "-c", "command -v qemu-img"])?.code != 0 {
        skip!("qemu-img is not installed");
    }
    let store = Store::ext4(ctx)?;
    let (image, source) = (store.sparse("image", 16 * MIB)?, store.sparse("source", 16 * MIB)?);
    OpenOptions::new().write(true).open(&source)?.write_all_at(&pattern(6, 3 << 20), 5 * MIB)?;
    disk::write_all(&image, &pattern(7, 16 << 20))?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    tools::ok(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &source, &device])?;
    tools::ok(&["qemu-img", "compare", "-f", "raw", "-F", "raw", &device, &source])?;
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &std::fs::read(&source)?)?;
    let small = daemon.attach(&[&store.sparse("small", 4 * MIB)?])?;
    let done = tools::run(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &source, &small])?;
    ensure!(done.code != 0, "16 MiB were converted into 4");
    daemon.detach(&small)?;
    daemon.stop()
}
