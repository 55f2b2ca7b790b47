// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of a device's I/O: order, time and neighbours.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loopengine_core::request::{Op, Request, Tag};
use loopengine_core::ring::SlotId;
use loopengine_core::worker::{IoLimits, NewQueue};

use crate::fake::{DEPTH, device};
use crate::{Bed, SHOWN, SLOT, request};

fn reads(tags: Range<Tag>) -> impl Iterator<Item = (Request, Vec<u8>)> {
    tags.map(|tag| (request(tag, Op::Read, u64::from(tag) * 4096, 4096), Vec::new()))
}

/// Time until `count` requests are answered, and their tags.
fn answered(bed: &Bed, count: usize) -> (Duration, Vec<Tag>) {
    let start = Instant::now();
    let tags = (0..count).map(|_| bed.user.answer()).inspect(|answer| assert!(answer.result >= 0));
    let tags = tags.map(|answer| answer.tag).collect();
    (start.elapsed(), tags)
}

/// Requests beyond a limit wait, in order; flushes cost nothing; a change of the limits is noticed.
#[test]
fn holds_requests_beyond_the_limits() {
    for linked in [false, true] {
        let Some(bed) = Bed::new(SHOWN, linked) else { return };
        // The first passes, and its successors take 100 ms each, less 50 ms for the first.
        bed.throttle.set(IoLimits { iops: 10, bytes: 0 });
        let flush = (request(5, Op::Flush, 0, 0), Vec::new());
        bed.user.send(reads(0..5).chain([flush]).chain(reads(6..7)));
        let (took, tags) = answered(&bed, 7);
        assert!((Duration::from_millis(450)..Duration::from_secs(5)).contains(&took), "{took:?}");
        assert_eq!(tags, [0, 1, 2, 3, 4, 5, 6]);
        let stats = bed.worker.stats(SLOT).unwrap();
        assert_eq!((stats.requests, stats.held, stats.in_flight), (7, 6, 0));

        bed.throttle.set(IoLimits { iops: 0, bytes: 4096 });
        bed.user.send(reads(0..8));
        let (_, first) = answered(&bed, 1);
        assert_eq!(first, [0]);
        assert_eq!(bed.worker.stats(SLOT).unwrap().in_flight, 7);
        bed.throttle.set(IoLimits::default());
        let (took, _) = answered(&bed, 7);
        assert!(took < Duration::from_secs(2), "without limits, after {took:?}");
        bed.end();
    }
}

/// One device at its limit does not slow another on the same worker.
#[test]
fn a_limit_is_for_one_device() {
    let Some(bed) = Bed::new(SHOWN, true) else { return };
    let other = SlotId { index: 4, generation: 1 };
    let (transport, neighbour) = device(true);
    bed.worker
        .add(NewQueue { slot: other, transport, image: bed.image.clone(), throttle: Arc::default() })
        .unwrap();
    bed.throttle.set(IoLimits { iops: 1, bytes: 0 });
    bed.user.send(reads(0..3));
    let start = Instant::now();
    for tag in (0..DEPTH).cycle().take(500) {
        assert_eq!(neighbour.ask(request(tag, Op::Read, 0, 4096), &[]).result, 4096);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(bed.worker.stats(SLOT).unwrap().in_flight, 2);
    bed.throttle.set(IoLimits::default());
    answered(&bed, 3);
    neighbour.stop([]);
    bed.worker.remove(other).unwrap();
    bed.end();
}
