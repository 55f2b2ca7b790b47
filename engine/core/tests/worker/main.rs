// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real worker, ring and image, compared with a model in memory; only the driver is a fake. Needs
//! io_uring, but neither root nor ublk.

mod fake;
mod limits;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fake::{DEPTH, LEN_MAX, User, device};
use loopengine_core::Kind;
use loopengine_core::image::{Image, ImageSpec};
use loopengine_core::request::{Op, Request, Tag};
use loopengine_core::ring::{RingSizes, SlotId};
use loopengine_core::worker::{IoLimits, NewQueue, Throttle, WorkerHandle, WorkerOptions};
use proptest::prelude::*;

/// Size of the device in bytes. The file has as many before and after it, which must not change.
const SIZE: u64 = 512 * 1024;
const MARGIN: u8 = 0xee;
const SLOT: SlotId = SlotId { index: 3, generation: 1 };
const SHOWN: ImageSpec = ImageSpec {
    offset: SIZE,
    size_limit: SIZE,
    block_size: 0,
    read_only: false,
    buffered: true,
    loop_semantics: false,
    durable: false,
};
const DIRECT: ImageSpec = ImageSpec { buffered: false, ..SHOWN };

/// A worker with one device.
struct Bed {
    worker: WorkerHandle<fake::Fake>,
    user: User,
    image: Arc<Image>,
    throttle: Arc<Throttle>,
    file: File,
}

impl Bed {
    /// None where the file system has no direct I/O.
    fn new(source: ImageSpec, linked: bool) -> Option<Bed> {
        let path = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        path.as_file().write_all_at(&vec![MARGIN; 3 * SIZE as usize], 0).unwrap();
        path.as_file().write_all_at(&vec![0; SIZE as usize], SIZE).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(path.path()).unwrap();
        let image = match Image::open(file.try_clone().unwrap().into(), &source, "worker.img") {
            Err(error) if error.kind() == Kind::Unsupported => {
                println!("skipped: {error}");
                return None;
            }
            image => Arc::new(image.unwrap()),
        };
        let options = WorkerOptions { linked_commit: linked, partscan: false, blocking_sync: true };
        let worker =
            WorkerHandle::start("test".into(), RingSizes::for_devices(8), options, Vec::new()).unwrap();
        let (transport, user) = device(linked);
        let throttle = Arc::<Throttle>::default();
        worker
            .add(NewQueue { slot: SLOT, transport, image: image.clone(), throttle: throttle.clone() })
            .unwrap();
        Some(Bed { worker, user, image, throttle, file })
    }

    /// Ends the device. There may be no surplus completions.
    fn end(self) {
        self.user.stop([]);
        self.worker.remove(SLOT).unwrap();
        assert!(self.user.left_over().is_empty());
        let mut margin = vec![0; SIZE as usize];
        for start in [0, 2 * SIZE] {
            self.file.read_exact_at(&mut margin, start).unwrap();
            assert!(margin.iter().all(|byte| *byte == MARGIN), "bytes outside of the device have changed");
        }
    }
}

fn request(tag: Tag, op: Op, offset: u64, len: u64) -> Request {
    Request { tag, op, offset, len: len as u32 }
}

const WRITE: Op = Op::Write { fua: false };

/// The expected content of the device.
struct Model {
    bytes: Vec<u8>,
    /// Discarded: as before, or zero.
    loose: Vec<bool>,
    /// Requests to reserve blocks, which statistics do not count.
    reserved: u64,
}

impl Model {
    fn answered(&mut self, request: &Request, written: &[u8], answer: &fake::Answer) {
        let range = request.offset as usize..request.offset as usize + request.len as usize;
        let transfers = matches!(request.op, Op::Read | Op::Write { .. });
        let expected = if transfers { request.len.cast_signed() } else { 0 };
        assert_eq!(answer.result, expected, "{request:?}");
        match request.op {
            Op::Read => {
                for (index, got) in range.zip(&answer.data) {
                    let zeroed = self.loose[index] && *got == 0;
                    assert!(*got == self.bytes[index] || zeroed, "{request:?}: wrong byte {index}");
                    (self.bytes[index], self.loose[index]) = (*got, false);
                }
            }
            Op::Write { .. } => {
                self.bytes[range.clone()].copy_from_slice(written);
                self.loose[range].fill(false);
            }
            Op::WriteZeroes { .. } => {
                self.bytes[range.clone()].fill(0);
                self.loose[range].fill(false);
            }
            Op::Discard => self.loose[range].fill(true),
            Op::Reserve => self.reserved += 1,
            Op::Flush | Op::Unknown(_) => {}
        }
    }
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Read),
        4 => any::<bool>().prop_map(|fua| Op::Write { fua }),
        1 => Just(Op::Flush),
        2 => Just(Op::Discard),
        2 => any::<(bool, bool)>().prop_map(|(unmap, fua)| Op::WriteZeroes { unmap, fua }),
        1 => Just(Op::Reserve),
    ]
}

/// Rounds of requests that are in flight together: operation, first sector, sectors, fill.
fn any_rounds() -> impl Strategy<Value = Vec<Vec<(Op, u64, u64, u8)>>> {
    let sectors = SIZE / 512;
    let one = (any_op(), 0..sectors, 1..=LEN_MAX as u64 / 512, any::<u8>());
    prop::collection::vec(prop::collection::vec(one, 1..usize::from(DEPTH)), 1..10)
}

fn like_the_model(source: ImageSpec, linked: bool, limits: IoLimits, rounds: Vec<Vec<(Op, u64, u64, u8)>>) {
    let Some(bed) = Bed::new(source, linked) else { return };
    bed.throttle.set(limits);
    let unit = u64::from(bed.image.geometry().block_size);
    let mut model = Model { bytes: vec![0; SIZE as usize], loose: vec![false; SIZE as usize], reserved: 0 };
    let everything = (0..SIZE / LEN_MAX as u64).map(|part| (Op::Read, part * 128, 128, 0)).collect();
    for round in rounds.into_iter().chain([everything]) {
        let mut flying: BTreeMap<Tag, (Request, Vec<u8>)> = BTreeMap::new();
        for (tag, (op, sector, sectors, fill)) in (0..).zip(round) {
            let offset = sector * 512 / unit * unit;
            let len = (sectors * 512).next_multiple_of(unit).min(SIZE - offset);
            let (offset, len) = if op == Op::Flush { (0, 0) } else { (offset, len) };
            // Two requests in flight on the same bytes may complete in either order.
            let free = |(other, _): &(Request, Vec<u8>)| {
                offset + len <= other.offset || other.offset + u64::from(other.len) <= offset
            };
            if flying.values().all(free) {
                let data = if matches!(op, Op::Write { .. }) { vec![fill; len as usize] } else { Vec::new() };
                flying.insert(tag, (request(tag, op, offset, len), data));
            }
        }
        bed.user.send(flying.values().cloned());
        while !flying.is_empty() {
            let answer = bed.user.answer();
            let (request, data) = flying.remove(&answer.tag).expect("one answer to each request");
            model.answered(&request, &data, &answer);
        }
    }
    let stats = bed.worker.stats(SLOT).unwrap();
    let ended = stats.reads + stats.writes + stats.flushes + stats.discards + model.reserved;
    assert_eq!((stats.errors, stats.in_flight, ended), (0, 0, stats.requests));
    bed.end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_the_model(linked: bool, direct: bool, rounds in any_rounds()) {
        like_the_model(if direct { DIRECT } else { SHOWN }, linked, IoLimits::default(), rounds);
    }

    #[test]
    fn with_limits_behaves_like_the_model(linked: bool, by_bytes: bool, rounds in any_rounds()) {
        let limits = match by_bytes {
            true => IoLimits { iops: 0, bytes: 100 << 20 },
            false => IoLimits { iops: 2000, bytes: 0 },
        };
        like_the_model(SHOWN, linked, limits, rounds);
    }
}

#[test]
fn discards_free_blocks() {
    let Some(bed) = Bed::new(SHOWN, true) else { return };
    if !bed.image.geometry().can_discard {
        println!("skipped: this file system cannot punch holes");
        return;
    }
    bed.file.sync_all().unwrap();
    let before = bed.file.metadata().unwrap().blocks();
    let discards = (0..8).map(|n| (request(n, Op::Discard, u64::from(n) * SIZE / 8, SIZE / 8), Vec::new()));
    bed.user.send(discards);
    (0..8).for_each(|_| assert_eq!(bed.user.answer().result, 0));
    assert_eq!(before - bed.file.metadata().unwrap().blocks(), SIZE / 512);
    bed.end();
}

#[test]
fn degrades_a_device_of_a_shrunken_image() {
    for linked in [false, true] {
        let Some(bed) = Bed::new(SHOWN, linked) else { return };
        // The first request is timed and therefore never linked, so send another one first.
        assert_eq!(bed.user.ask(request(0, WRITE, 0, 8192), &[7; 8192]).result, 8192);
        bed.file.set_len(SIZE + 4096).unwrap();
        let straddling = bed.user.ask(request(1, Op::Read, 0, 8192), &[]);
        assert_eq!(straddling.result, -libc::EIO);
        assert_eq!(bed.user.ask(request(2, Op::Read, 65536, 4096), &[]).result, -libc::EIO);
        assert_eq!(bed.user.ask(request(1, Op::Read, 0, 4096), &[]).data, [7; 4096]);
        let stats = bed.worker.stats(SLOT).unwrap();
        assert!(stats.degraded);
        assert_eq!((stats.reads, stats.read_bytes, stats.errors, stats.resubmits), (1, 4096, 2, 1));

        let smaller = bed.image.current_geometry().unwrap();
        assert_eq!(smaller.size, 4096);
        bed.worker.resize(SLOT, smaller).unwrap();
        assert_eq!(bed.user.ask(request(0, WRITE, 4096, 4096), &[1; 4096]).result, -libc::EIO);
        assert_eq!(bed.file.metadata().unwrap().len(), SIZE + 4096, "it was written to, past the end");
        assert!(!bed.worker.stats(SLOT).unwrap().degraded);
        bed.file.set_len(2 * SIZE).unwrap();
        bed.file.write_all_at(&vec![MARGIN; SIZE as usize], 2 * SIZE).unwrap();
        bed.end();
    }
}

#[test]
fn refuses_unsupported_operations() {
    let Some(bed) = Bed::new(SHOWN, true) else { return };
    let zeroes = Op::WriteZeroes { unmap: true, fua: false };
    for op in [Op::Read, WRITE, Op::Discard, zeroes] {
        for offset in [SIZE - 512, SIZE, u64::MAX - 512, u64::MAX] {
            assert_eq!(bed.user.ask(request(5, op, offset, 1024), &[]).result, -libc::EIO, "{op:?} {offset}");
        }
    }
    assert_eq!(bed.user.ask(request(5, Op::Unknown(77), 0, 512), &[]).result, -libc::EOPNOTSUPP);
    let stats = bed.worker.stats(SLOT).unwrap();
    assert_eq!((stats.errors, stats.degraded), (17, false));
    bed.end();
}

#[test]
fn refuses_writes_to_a_read_only_device() {
    let Some(bed) = Bed::new(ImageSpec { read_only: true, ..SHOWN }, true) else { return };
    let zeroes = Op::WriteZeroes { unmap: false, fua: true };
    for op in [WRITE, Op::Write { fua: true }, Op::Discard, zeroes] {
        assert_eq!(bed.user.ask(request(1, op, 0, 4096), &[9; 4096]).result, -libc::EPERM, "{op:?}");
    }
    assert_eq!(bed.user.ask(request(1, Op::Read, 0, 4096), &[9; 4096]).data, [0; 4096]);
    assert_eq!(bed.user.ask(request(1, Op::Flush, 0, 0), &[]).result, 0);
    bed.end();
}

/// A flush after durable writes needs no fdatasync; after any other change, on whatever queue, it does.
#[test]
fn syncs_only_what_is_not_durable() {
    for linked in [false, true] {
        let Some(bed) = Bed::new(SHOWN, linked) else { return };
        let other = SlotId { index: 4, generation: 1 };
        let (transport, neighbour) = device(linked);
        bed.worker
            .add(NewQueue { slot: other, transport, image: bed.image.clone(), throttle: Arc::default() })
            .unwrap();
        let syncs = |slot| bed.worker.stats(slot).unwrap().syncs;
        let write = |user: &User, byte: u8| {
            assert_eq!(user.ask(request(1, WRITE, 8192, 4096), &[byte; 4096]).result, 4096);
        };
        let flush = |user: &User| assert_eq!(user.ask(request(2, Op::Flush, 0, 0), &[]).result, 0);
        flush(&bed.user);
        assert_eq!(syncs(SLOT), 1, "nobody knows what was written before");
        flush(&bed.user);
        assert_eq!(syncs(SLOT), 1, "nothing was written");
        // A row of lone writes, each with a flush.
        for round in 0..20 {
            write(&bed.user, round);
            flush(&bed.user);
        }
        let row = syncs(SLOT);
        assert!((3..=6).contains(&row), "{row} syncs for twenty lone writes");
        // The second of two writes is not durable itself.
        for byte in [30, 31] {
            write(&bed.user, byte);
        }
        flush(&bed.user);
        assert_eq!(syncs(SLOT), row + 1);
        for op in [Op::Discard, Op::WriteZeroes { unmap: false, fua: true }, Op::Reserve] {
            assert_eq!(bed.user.ask(request(1, op, 0, 8192), &[]).result, 0, "{op:?}");
            flush(&bed.user);
        }
        assert_eq!(syncs(SLOT), row + 4);
        flush(&bed.user);
        assert_eq!(syncs(SLOT), row + 4);
        // Another queue of the device, or another device on the same file.
        write(&neighbour, 31);
        write(&neighbour, 32);
        // A driver reuses the tag of a chain that has gone through.
        assert_eq!(neighbour.ask(request(1, Op::Read, 8192, 4096), &[]).data, [32; 4096]);
        flush(&bed.user);
        assert_eq!((syncs(SLOT), syncs(other)), (row + 5, 0));
        flush(&neighbour);
        assert_eq!(syncs(other), 0);
        // A truncation or extension.
        bed.image.set_length(3 * SIZE).unwrap();
        flush(&neighbour);
        assert_eq!(syncs(other), 1);
        neighbour.stop([]);
        bed.worker.remove(other).unwrap();
        bed.end();
    }
}

#[test]
fn removes_a_device_after_its_last_request() {
    for linked in [false, true] {
        let Some(bed) = Bed::new(SHOWN, linked) else { return };
        let ops = [WRITE, Op::Flush, Op::Write { fua: true }, Op::Read, Op::Discard];
        let last = (0..DEPTH).zip(ops.into_iter().cycle()).map(|(tag, op)| match op {
            Op::Flush => (request(tag, op, 0, 0), Vec::new()),
            _ => (request(tag, op, u64::from(tag) * 8192, 8192), vec![3; 8192]),
        });
        thread::scope(|scope| {
            let removal = scope.spawn(|| bed.worker.remove(SLOT));
            thread::sleep(Duration::from_millis(20));
            assert!(!removal.is_finished(), "the driver has not ended it yet");
            bed.user.stop(last);
            removal.join().unwrap().unwrap();
        });
        let mut answers = bed.user.left_over();
        answers.sort_by_key(|answer| answer.tag);
        assert!(answers.iter().map(|answer| answer.tag).eq(0..DEPTH), "one answer to each request");
        assert!(answers.iter().all(|answer| answer.result >= 0));

        // Its slot is free for another device.
        assert_eq!(bed.worker.stats(SLOT).unwrap_err().kind(), Kind::NotFound);
        let next = SlotId { generation: 2, ..SLOT };
        let (transport, user) = device(linked);
        bed.worker
            .add(NewQueue { slot: next, transport, image: bed.image.clone(), throttle: Arc::default() })
            .unwrap();
        assert_eq!(user.ask(request(0, Op::Read, 0, 4096), &[]).data, [3; 4096]);
        let (transport, _) = device(linked);
        assert!(
            bed.worker
                .add(NewQueue { slot: next, transport, image: bed.image.clone(), throttle: Arc::default() })
                .is_err()
        );
        // An occupied slot stays with its device.
        assert_eq!(user.ask(request(0, Op::Read, 0, 4096), &[]).data, [3; 4096]);
        user.stop([]);
        bed.worker.remove(next).unwrap();
        assert!(user.left_over().is_empty());
    }
}

/// For instance, a file starts to share blocks while it is attached: refused direct I/O is done
/// through the page cache.
#[test]
fn falls_back_to_the_page_cache() {
    for linked in [false, true] {
        let Some(bed) = Bed::new(DIRECT, linked) else { return };
        assert!(!bed.image.is_buffered() && bed.image.buffered_reason().is_none());
        assert_eq!(bed.user.ask(request(0, WRITE, 4096, 4096), &[1; 4096]).result, 4096);
        // No driver sends this, and direct I/O of all file systems refuses it.
        assert_eq!(bed.user.ask(request(1, WRITE, 5000, 100), &[9; 100]).result, 100);
        assert!(bed.image.is_buffered() && bed.image.buffered_reason().is_some());
        assert!(bed.image.take_direct_io_disabled() && !bed.image.take_direct_io_disabled());
        let mut expected = [1; 4096];
        expected[904..1004].fill(9);
        assert_eq!(bed.user.ask(request(2, Op::Read, 4096, 4096), &[]).data, expected);
        assert_eq!(bed.user.ask(request(3, Op::Flush, 0, 0), &[]).result, 0);
        assert_eq!(bed.worker.stats(SLOT).unwrap().errors, 0);
        bed.end();
    }
}
