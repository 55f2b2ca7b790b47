// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Merging of discards and coalescing of flushes, against naive models.

use std::collections::VecDeque;

use loopengine_core::image::{DiscardQueue, FlushQueue};
use proptest::prelude::*;

/// An event of a queue of discards.
#[derive(Clone, Debug)]
enum Step {
    Push { offset: u64, len: u64 },
    Next,
    Done,
}

/// On a device of 256 bytes, so that requests often touch.
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

/// The oldest request and all that touch it, directly or not.
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
        // In the end all requests are complete.
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

    // Smaller than a block: nothing to punch, but a completion.
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
fn discards_do_not_overflow() {
    let mut queue = DiscardQueue::new(4, 4096);
    queue.push(0, u64::MAX - 100, u64::MAX);
    assert_eq!(queue.next().unwrap().len, 0);
    assert_eq!(queue.done().count(), 1);
    queue.push(0, u64::MAX - 8191, u64::MAX);
    let punch = queue.next().unwrap();
    assert_eq!((punch.offset, punch.len), (u64::MAX - 8191, 4096));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// Time is the number of the step. The first fsync that starts at or after the arrival of a
    /// flush must complete it, exactly once.
    #[test]
    fn completes_flushes_with_a_later_fsync(
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
