//! The table of what is in flight in one queue, indexed by tag.
//!
//! Knows that a tag is in flight at most once. Does not know what is done for it.

use crate::request::Tag;

/// At most one `T` a tag, for tags 0 .. depth. Allocates once.
#[derive(Debug)]
pub struct InFlight<T> {
    slots: Box<[Option<T>]>,
    count: usize,
}

/// The tag is beyond the queue depth, or in flight already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misplaced;

impl<T> InFlight<T> {
    /// A table for `depth` tags.
    pub fn new(depth: u16) -> Self {
        Self { slots: std::iter::repeat_with(|| None).take(usize::from(depth)).collect(), count: 0 }
    }

    /// Notes that `tag` is in flight. Hands `value` back when it may not be.
    pub fn begin(&mut self, tag: Tag, value: T) -> Result<(), (Misplaced, T)> {
        match self.slots.get_mut(usize::from(tag)) {
            Some(slot @ None) => {
                *slot = Some(value);
                self.count += 1;
                Ok(())
            }
            _ => Err((Misplaced, value)),
        }
    }

    /// What is in flight under `tag`.
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        self.slots.get_mut(usize::from(tag))?.as_mut()
    }

    /// Takes `tag` out: it is in flight no more.
    pub fn finish(&mut self, tag: Tag) -> Option<T> {
        let value = self.slots.get_mut(usize::from(tag))?.take();
        self.count -= usize::from(value.is_some());
        value
    }

    /// How many are in flight.
    pub fn len(&self) -> usize {
        self.count
    }

    /// None are.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes everything out, by tag.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.count = 0;
        self.slots.iter_mut().filter_map(Option::take)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn behaves_like_a_map(depth in 0u16..64, steps in prop::collection::vec((any::<bool>(), 0u16..70), 0..300)) {
            let mut table = InFlight::new(depth);
            let mut model = BTreeMap::new();
            for (number, (begin, tag)) in steps.into_iter().enumerate() {
                if begin {
                    let fits = tag < depth && !model.contains_key(&tag);
                    prop_assert_eq!(table.begin(tag, number).is_ok(), fits);
                    if fits {
                        model.insert(tag, number);
                    }
                } else {
                    prop_assert_eq!(table.finish(tag), model.remove(&tag));
                }
                prop_assert_eq!(table.len(), model.len());
            }
            prop_assert_eq!(table.drain().collect::<Vec<_>>(), model.into_values().collect::<Vec<_>>());
            prop_assert!(table.is_empty());
        }
    }
}
