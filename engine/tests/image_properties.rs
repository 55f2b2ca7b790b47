//! The pure parts of the room `image`, against models that are too simple to be wrong.

use std::collections::VecDeque;

use loopengine::Kind;
use loopengine::image::{DiscardQueue, Facts, FlushQueue, Geometry, Source};
use proptest::prelude::*;

// ---- geometry ----

/// Facts of a regular file on a common file system.
fn facts(size: u64) -> Facts {
    Facts {
        size,
        block_device: false,
        offset_align: 512,
        mem_align: 4,
        physical_block_size: 4096,
        discard_granularity: 4096,
        can_punch: true,
    }
}

fn power_of_two(most: u32) -> impl Strategy<Value = u32> {
    (0..=most).prop_map(|shift| 1 << shift)
}

/// Numbers of all magnitudes, the round ones and their neighbours above all.
fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..20_000u64,
        (0..64u32, 0..3u64).prop_map(|(shift, more)| (1u64 << shift).wrapping_sub(1) + more),
        (0..1u64 << 51).prop_map(|blocks| blocks * 4096),
        Just(u64::MAX),
        Just(i64::MAX as u64),
    ]
}

prop_compose! {
    fn any_facts()(
        size in bytes(),
        block_device: bool,
        offset_align in prop_oneof![9 => power_of_two(12), 1 => any::<u32>()],
        mem_align in prop_oneof![9 => power_of_two(12), 1 => any::<u32>()],
        physical_block_size in prop_oneof![power_of_two(31), any::<u32>()],
        discard_granularity in prop_oneof![power_of_two(31), any::<u32>()],
        can_punch: bool,
    ) -> Facts {
        Facts {
            size, block_device, offset_align, mem_align,
            physical_block_size, discard_granularity, can_punch,
        }
    }
}

prop_compose! {
    fn any_source()(
        offset in prop_oneof![Just(0), bytes()],
        size_limit in prop_oneof![Just(0), bytes()],
        block_size in prop_oneof![Just(0), power_of_two(13), any::<u32>()],
        read_only: bool,
        buffered: bool,
    ) -> Source {
        Source { offset, size_limit, block_size, read_only, buffered }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn geometry_is_sound_or_a_clear_error(facts in any_facts(), source in any_source()) {
        match Geometry::compute(&facts, &source, "IMAGE") {
            Ok(g) => {
                let block = u64::from(g.block_size);
                prop_assert!((512..=4096).contains(&block) && block.is_power_of_two());
                prop_assert!(g.block_size >= facts.offset_align);
                prop_assert!(source.block_size == 0 || g.block_size == source.block_size);
                prop_assert_eq!(g.offset, source.offset);
                prop_assert_eq!(g.offset % block, 0);
                prop_assert!(g.size > 0);
                prop_assert_eq!(g.size % block, 0);
                // Nothing behind the end is shown, and less than a block is left out.
                let end = u128::from(g.offset) + u128::from(g.size);
                prop_assert!(end <= u128::from(facts.size));
                prop_assert!(source.size_limit == 0 || g.size <= source.size_limit);
                let more = u128::from(g.size) + u128::from(block);
                prop_assert!(
                    end + u128::from(block) > u128::from(facts.size)
                        || (source.size_limit != 0 && more > u128::from(source.size_limit))
                );
                prop_assert!(g.physical_block_size.is_power_of_two());
                prop_assert!(g.physical_block_size >= g.block_size);
                prop_assert_eq!(g.offset % u64::from(g.physical_block_size), 0);
                prop_assert!(g.dma_align.is_power_of_two());
                prop_assert!((512..=4096).contains(&g.dma_align) && g.dma_align >= facts.mem_align);
                prop_assert!(g.discard_granularity.is_power_of_two());
                prop_assert!(g.discard_granularity >= g.block_size);
                prop_assert!(!(g.read_only && (g.can_discard || g.can_write_zeroes)));
            }
            Err(error) => {
                prop_assert!(matches!(error.kind(), Kind::Invalid | Kind::Unsupported));
                prop_assert!(error.next_step().is_some(), "{error}: what next?");
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}

#[test]
fn geometry_of_common_images() {
    let compute = |facts: &Facts, source: Source| Geometry::compute(facts, &source, "IMAGE");
    let plain = Source::default();

    let g = compute(&facts(1 << 30), plain).unwrap();
    assert_eq!((g.size, g.offset, g.block_size), (1 << 30, 0, 512));
    assert_eq!((g.physical_block_size, g.dma_align), (4096, 512));
    assert!(g.can_discard && g.can_write_zeroes && !g.read_only);

    // Odd sizes lose their last partial block.
    assert_eq!(compute(&facts(1_000_001), plain).unwrap().size, 999_936);
    // A partition's offset lessens what is promised about physical blocks.
    let offset = Source {
        offset: 63 * 512,
        ..plain
    };
    let g = compute(&facts(1 << 20), offset).unwrap();
    assert_eq!((g.size, g.physical_block_size), ((1 << 20) - 63 * 512, 512));
    // The largest sparse file there is.
    let g = compute(&facts(i64::MAX as u64), plain).unwrap();
    assert_eq!(g.size, i64::MAX as u64 - 511);
    // A file system with 4K sectors.
    let large = Facts {
        offset_align: 4096,
        ..facts(1 << 20)
    };
    assert_eq!(compute(&large, plain).unwrap().block_size, 4096);
    // A block device zeroes, even if it cannot punch.
    let device = Facts {
        block_device: true,
        can_punch: false,
        ..facts(1 << 20)
    };
    let g = compute(&device, plain).unwrap();
    assert!(g.can_write_zeroes && !g.can_discard);
}

#[test]
fn geometry_errors_say_what_and_what_next() {
    let plain = Source::default();
    let large = Facts {
        offset_align: 4096,
        ..facts(1 << 20)
    };
    let huge = Facts {
        offset_align: 65536,
        ..facts(1 << 20)
    };
    let cases = [
        (facts(0), plain, Kind::Invalid, "IMAGE is empty"),
        (
            facts(511),
            plain,
            Kind::Invalid,
            "511 bytes of IMAGE are less than one block",
        ),
        (
            facts(4096),
            Source {
                offset: 4096,
                ..plain
            },
            Kind::Invalid,
            "not within IMAGE",
        ),
        (
            facts(4096),
            Source {
                offset: u64::MAX - 511,
                ..plain
            },
            Kind::Invalid,
            "not within",
        ),
        (
            facts(4096),
            Source {
                offset: u64::MAX,
                ..plain
            },
            Kind::Invalid,
            "not a multiple",
        ),
        (
            facts(4096),
            Source {
                offset: 100,
                ..plain
            },
            Kind::Invalid,
            "not a multiple",
        ),
        (
            facts(4096),
            Source {
                size_limit: 100,
                ..plain
            },
            Kind::Invalid,
            "100 bytes of IMAGE",
        ),
        (
            facts(4096),
            Source {
                block_size: 1000,
                ..plain
            },
            Kind::Invalid,
            "block size 1000",
        ),
        (
            facts(4096),
            Source {
                block_size: 256,
                ..plain
            },
            Kind::Invalid,
            "block size 256",
        ),
        (
            facts(8192),
            Source {
                block_size: 8192,
                ..plain
            },
            Kind::Invalid,
            "block size 8192",
        ),
        (
            large,
            Source {
                block_size: 512,
                ..plain
            },
            Kind::Invalid,
            "--block-size 4096 or",
        ),
        (
            large,
            Source {
                offset: 512,
                ..plain
            },
            Kind::Invalid,
            "--buffered",
        ),
        (huge, plain, Kind::Unsupported, "attach with --buffered"),
    ];
    for (facts, source, kind, text) in cases {
        let error = Geometry::compute(&facts, &source, "IMAGE").unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "'{error}' lacks '{text}'");
        assert!(error.next_step().is_some(), "{error}");
    }
}

// ---- discards ----

/// What may happen to a queue of discards.
#[derive(Clone, Debug)]
enum Step {
    Push { offset: u64, len: u64 },
    Next,
    Done,
}

/// On a device of 256 bytes, so that everything touches everything.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..256u64, 0..40u64).prop_map(|(offset, len)| Step::Push { offset, len }),
        2 => Just(Step::Next),
        2 => Just(Step::Done),
    ];
    prop::collection::vec(step, 0..120)
}

/// The naive model: all waiting requests, in order of arrival.
type Waiting = Vec<(u16, u64, u64)>;

/// The oldest request and everything that touches it, over any number of steps.
fn connected(waiting: &Waiting) -> Waiting {
    let mut run: Waiting = waiting.first().copied().into_iter().collect();
    loop {
        let more = waiting
            .iter()
            .find(|w| !run.contains(w) && run.iter().any(|r| w.1 <= r.1 + r.2 && r.1 <= w.1 + w.2));
        match more {
            Some(more) => run.push(*more),
            None => return run,
        }
    }
}

fn sorted(mut tags: Vec<u16>) -> Vec<u16> {
    tags.sort_unstable();
    tags
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn discards_match_the_model(granularity in 1..20u32, steps in steps()) {
        const DEPTH: u16 = 16;
        let mut queue = DiscardQueue::new(DEPTH, granularity);
        let mut free: VecDeque<u16> = (0..DEPTH).collect();
        let mut waiting: Waiting = Vec::new();
        let mut flying: Waiting = Vec::new();
        let grain = u64::from(granularity);
        // In the end everything is answered.
        let drain = (0..=DEPTH).flat_map(|_| [Step::Done, Step::Next]);

        for step in steps.into_iter().chain(drain) {
            match step {
                Step::Push { offset, len } => {
                    let Some(tag) = free.pop_front() else { continue };
                    queue.push(tag, offset, len);
                    waiting.push((tag, offset, len));
                }
                Step::Next => {
                    let punch = queue.next();
                    if !flying.is_empty() || waiting.is_empty() {
                        prop_assert_eq!(punch, None);
                        continue;
                    }
                    let punch = punch.expect("something waits");
                    flying = connected(&waiting);
                    waiting.retain(|w| !flying.contains(w));
                    // Byte by byte: exactly the blocks that the union fills.
                    let wanted = |byte: u64| {
                        flying.iter().any(|f| (f.1..f.1 + f.2).contains(&byte))
                    };
                    for byte in 0..320 {
                        let block = byte - byte % grain;
                        let whole = (block..block + grain).all(wanted);
                        let punched = (punch.offset..punch.offset + punch.len).contains(&byte);
                        prop_assert_eq!(whole, punched, "byte {} of {:?}", byte, flying);
                    }
                }
                Step::Done => {
                    let tags: Vec<u16> = queue.done().collect();
                    let expected = flying.drain(..).map(|f| f.0).collect();
                    prop_assert_eq!(sorted(tags.clone()), sorted(expected));
                    free.extend(tags);
                }
            }
            prop_assert_eq!(queue.in_flight(), !flying.is_empty());
            prop_assert_eq!(queue.is_empty(), flying.is_empty() && waiting.is_empty());
        }
        prop_assert_eq!(free.len(), usize::from(DEPTH), "a tag was not answered");
    }
}

#[test]
fn merged_discards_free_the_block_across_the_seam() {
    let mut queue = DiscardQueue::new(4, 4096);
    queue.push(0, 1024, 5120); // ends in the middle of the second block
    queue.push(1, 6144, 2048); // ends where the second block does
    let punch = queue.next().unwrap();
    assert_eq!((punch.offset, punch.len), (4096, 4096));
    assert!(queue.next().is_none(), "one at a time");
    assert_eq!(sorted(queue.done().collect()), [0, 1]);

    // Too small for any block: nothing to punch, but an answer.
    queue.push(2, 512, 512);
    assert_eq!(queue.next().unwrap().len, 0);
    assert_eq!(queue.done().collect::<Vec<_>>(), [2]);
    assert!(queue.is_empty());
}

#[test]
fn the_oldest_discard_goes_first() {
    let mut queue = DiscardQueue::new(4, 512);
    queue.push(0, 1 << 20, 512);
    queue.push(1, 0, 512);
    assert_eq!(queue.next().unwrap().offset, 1 << 20);
    assert_eq!(queue.done().collect::<Vec<_>>(), [0]);
}

#[test]
fn discards_at_the_end_of_all_numbers_do_not_overflow() {
    let mut queue = DiscardQueue::new(4, 4096);
    queue.push(0, u64::MAX - 100, u64::MAX);
    assert_eq!(queue.next().unwrap().len, 0);
    assert_eq!(queue.done().count(), 1);
    queue.push(0, u64::MAX - 8191, u64::MAX);
    let punch = queue.next().unwrap();
    assert_eq!((punch.offset, punch.len), (u64::MAX - 8191, 4096));
}

// ---- flushes ----

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// Time is the number of the step. Each flush must be answered by an fsync that began at or
    /// after its arrival, exactly once, and by the first such.
    #[test]
    fn flushes_are_answered_by_an_fsync_that_began_later(
        steps in prop::collection::vec(0..3u8, 0..200),
    ) {
        const DEPTH: u16 = 16;
        let mut queue = FlushQueue::new(DEPTH);
        let mut arrived: [Option<usize>; DEPTH as usize] = [None; DEPTH as usize];
        let mut began: Option<usize> = None;
        let drain = [1, 2, 1, 2];

        for (now, step) in steps.into_iter().chain(drain).enumerate() {
            match step {
                0 => {
                    let Some(tag) = arrived.iter().position(Option::is_none) else { continue };
                    queue.push(tag as u16);
                    arrived[tag] = Some(now);
                }
                1 => {
                    let should = began.is_none() && arrived.iter().any(Option::is_some);
                    prop_assert_eq!(queue.start(), should);
                    if should {
                        began = Some(now);
                    }
                }
                _ => {
                    let answered: Vec<u16> = queue.done().collect();
                    let mut expected = Vec::new();
                    if let Some(began) = began.take() {
                        for (tag, arrival) in arrived.iter_mut().enumerate() {
                            if arrival.is_some_and(|arrival| arrival <= began) {
                                *arrival = None;
                                expected.push(tag as u16);
                            }
                        }
                    }
                    prop_assert_eq!(sorted(answered), expected);
                }
            }
            prop_assert_eq!(queue.in_flight(), began.is_some());
            prop_assert_eq!(queue.is_empty(), arrived.iter().all(Option::is_none));
        }
        prop_assert!(queue.is_empty(), "a flush was not answered");
    }
}
