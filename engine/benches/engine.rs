// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine's own cost per request, step by step: translation, completion, the in-flight table,
//! the ring, and for comparison a call of the control socket.
//!
//! Uses the library's public items. The driver is a fake: it delivers given requests and counts
//! completions. The image is real, in the page cache.

use std::fs::File;
use std::hint::black_box;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use io_uring::{cqueue, opcode, squeue, types};
use loopengine::control::codec;
use loopengine::error::Result;
use loopengine::image::{Image, ImageSpec};
use loopengine::instance::spec::{AttachSpec, IoMode};
use loopengine::request::{Completion, Op, Request, Tag};
use loopengine::ring::{EventKind, InFlight, Ring, RingSizes, SlotId, Token};
use loopengine::worker::translate;
use loopengine::worker::{Data, DeviceQueue, QueueSlot, RoundClock, Transport};

/// Requests per round, as for a busy queue.
const BATCH: u16 = 32;
const DEPTH: u16 = 128;
const BLOCK: u32 = 4096;
const IMAGE_LEN: u64 = 1 << 20;
const SLOT: SlotId = SlotId { index: 0, generation: 1 };

fn small_ring() -> Ring {
    Ring::new(&RingSizes { submissions: 256, completions: 1024, files: 8, buffers: 64, arrivals: 8 }, false)
        .expect("a ring: Linux 6.1 or newer, io_uring allowed")
}

fn nop(step: EventKind) -> squeue::Entry {
    opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE).user_data(Token::pack(step, SLOT, 0))
}

/// `BATCH` adjacent requests of one kind.
fn batch(op: Op, first_byte: u64) -> Vec<Request> {
    let offset = |tag: Tag| first_byte + u64::from(tag) * u64::from(BLOCK);
    (0..BATCH).map(|tag| Request { tag, op, offset: offset(tag), len: BLOCK }).collect()
}

/// A driver that delivers the same requests each time.
struct Fake {
    file: File,
    buffers: Vec<u8>,
    address: usize,
    requests: Vec<Request>,
    completed: usize,
}

impl Transport for Fake {
    fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }
    fn depth(&self) -> u16 {
        DEPTH
    }
    fn arm(&mut self, _: QueueSlot, _: &mut Ring) -> Result<()> {
        self.address = self.buffers.as_mut_ptr() as usize;
        Ok(())
    }
    fn on_event(
        &mut self,
        _: Token,
        _: &cqueue::Entry,
        _: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        arrived.extend_from_slice(&self.requests);
        Ok(())
    }
    fn data(&self, tag: Tag) -> Data {
        Data::Memory(self.address + usize::from(tag) * BLOCK as usize)
    }
    fn complete(&mut self, completion: Completion, _: &mut Ring) -> Result<()> {
        black_box(completion);
        self.completed += 1;
        Ok(())
    }
    fn submit_commits(&mut self, _: &mut Ring) -> Result<usize> {
        self.completed = 0;
        Ok(0)
    }
    fn linked_commit(&mut self, _: Tag, _: u32) -> Option<squeue::Entry> {
        None
    }
    fn is_drained(&self) -> bool {
        self.completed == 0
    }
    fn fallbacks(&self) -> u64 {
        0
    }
    fn is_waiting_for_buffer(&self) -> bool {
        false
    }
    fn retry_waiting(&mut self, _: &mut Ring) -> Result<()> {
        Ok(())
    }
}

/// A queue over a temporary image, and its ring. The queue is dropped last: its buffers are the
/// ring's.
struct Bed {
    ring: Ring,
    arrival: cqueue::Entry,
    clock: RoundClock,
    queue: DeviceQueue<Fake>,
}

impl Bed {
    fn new(requests: Vec<Request>) -> Bed {
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary file");
        file.set_len(IMAGE_LEN).expect("space for an image");
        let source = ImageSpec { buffered: true, ..ImageSpec::default() };
        let own = file.try_clone().expect("a descriptor");
        let image = Arc::new(Image::open(file.into(), &source, "bench.img").expect("an image"));
        let buffers = vec![0xa5; usize::from(DEPTH) * BLOCK as usize];
        let fake = Fake { file: own, buffers, address: 0, requests, completed: 0 };
        let mut ring = small_ring();
        let queue = DeviceQueue::new(QueueSlot { id: SLOT }, fake, image, Arc::default(), false, &mut ring)
            .expect("a queue on the ring");
        ring.push(&nop(EventKind::Fetch)).expect("space in the ring");
        ring.enter(1).expect("a completion");
        let arrival = ring.next_completion().expect("the no-op");
        Bed { ring, arrival, clock: RoundClock::start(), queue }
    }

    fn event(&mut self, entry: &cqueue::Entry) {
        let token = Token::unpack(entry.user_data()).expect("a token of ours");
        self.queue.on_event(token, entry, &mut self.ring, &self.clock).expect("a queue that works");
    }

    /// Requests arrive: the queue accepts all, and completes those that need no image.
    fn arrive(&mut self) {
        let arrival = self.arrival.clone();
        self.event(&arrival);
    }

    /// The operations on the image complete, and so do all requests. Returns the engine's time for
    /// that.
    fn complete(&mut self) -> Duration {
        self.ring.enter(usize::from(BATCH)).expect("completions");
        let mut spent = Duration::ZERO;
        let mut left = usize::from(BATCH);
        loop {
            let start = Instant::now();
            while let Some(entry) = self.ring.next_completion() {
                left = left.saturating_sub(1);
                self.event(&entry);
            }
            self.queue.submit_commits(&mut self.ring).expect("commits submitted");
            spent += start.elapsed();
            if left == 0 {
                assert!(self.queue.is_idle(), "every request was completed");
                return spent;
            }
            self.ring.enter(left).expect("completions");
        }
    }
}

fn translation(c: &mut Criterion) {
    let image = types::Fixed(2);
    let mut group = c.benchmark_group("translation");
    group.throughput(Throughput::Elements(1));
    let cases = [
        ("read, copied", Op::Read, Data::Memory(0x1000)),
        ("read, registered", Op::Read, Data::Registered(7)),
        ("write, registered", Op::Write { fua: true }, Data::Registered(7)),
    ];
    for (name, op, data) in cases {
        group.bench_function(name, |b| {
            b.iter(|| {
                translate::transfer(black_box(op), image, black_box(data), black_box(1 << 20), 0, BLOCK)
            });
        });
    }
    group.bench_function("write-zeroes", |b| {
        let op = Op::WriteZeroes { unmap: true, fua: false };
        b.iter(|| translate::allocate(black_box(op), image, black_box(1 << 20), u64::from(BLOCK)));
    });
    group.finish();
}

fn completion(c: &mut Criterion) {
    let mut group = c.benchmark_group("completion");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    group.bench_function("32 reads, engine only", |b| {
        let mut bed = Bed::new(batch(Op::Read, 0));
        b.iter_custom(|rounds| {
            let round = |_| {
                bed.arrive();
                bed.complete()
            };
            (0..rounds).map(round).sum()
        });
    });
    let round_trips =
        [("32 reads, round trip", Op::Read), ("32 writes, round trip", Op::Write { fua: false })];
    for (name, op) in round_trips {
        group.bench_function(name, |b| {
            let mut bed = Bed::new(batch(op, 0));
            b.iter(|| {
                bed.arrive();
                bed.complete()
            });
        });
    }
    // Beyond the end: accepted and completed, without an operation in between.
    group.bench_function("32 refusals", |b| {
        let mut bed = Bed::new(batch(Op::Read, IMAGE_LEN));
        b.iter(|| {
            bed.arrive();
            bed.queue.submit_commits(&mut bed.ring).expect("commits submitted");
        });
        assert!(bed.queue.is_idle(), "every request was completed");
    });
    group.finish();
}

fn inflight(c: &mut Criterion) {
    let mut group = c.benchmark_group("in-flight table");
    group.throughput(Throughput::Elements(u64::from(DEPTH)));
    group.bench_function("begin and finish, 128 tags", |b| {
        let mut table = InFlight::new(DEPTH);
        b.iter(|| {
            for tag in 0..DEPTH {
                table.begin(black_box(tag), u64::from(tag)).expect("a free tag");
            }
            for tag in (0..DEPTH).rev() {
                black_box(table.finish(black_box(tag)));
            }
        });
    });
    group.finish();
}

fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    group.throughput(Throughput::Elements(u64::from(BATCH)));
    group.bench_function("32 no-ops", |b| {
        let mut ring = small_ring();
        let entry = nop(EventKind::Nop);
        b.iter(|| {
            for _ in 0..BATCH {
                ring.push(&entry).expect("space in the ring");
            }
            ring.enter(usize::from(BATCH)).expect("completions");
            assert_eq!(std::iter::from_fn(|| ring.next_completion()).count(), usize::from(BATCH));
        });
    });
    group.finish();
}

fn control(c: &mut Criterion) {
    let spec = AttachSpec {
        instance: "default".into(),
        path: "/srv/images/root.img".into(),
        number: Some(3),
        read_only: false,
        offset: 1 << 20,
        size_limit: 0,
        block_size: 4096,
        buffered: false,
        queues: 4,
        depth: 128,
        io_mode: Some(IoMode::Batch),
        partscan: false,
        durable: false,
        iops: 0,
        bytes_per_second: 0,
    };
    let message = codec::encode_attach(&spec).expect("a call");
    let mut group = c.benchmark_group("control codec");
    group.throughput(Throughput::Bytes(message.len() as u64));
    group.bench_function("encode an attach", |b| b.iter(|| codec::encode_attach(black_box(&spec))));
    group.bench_function("decode an attach", |b| {
        b.iter(|| codec::decode_call(black_box(&message)).expect("a valid call"));
    });
    group.bench_function("encode and decode an attach", |b| {
        b.iter(|| codec::decode_call(&codec::encode_attach(black_box(&spec)).expect("a call")));
    });
    group.finish();
}

criterion_group!(benches, translation, completion, inflight, ring, control);
criterion_main!(benches);
