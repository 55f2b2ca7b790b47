// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The in-flight requests of one queue, indexed by tag.
//!
//! Ensures that a tag is in flight at most once. Does not know the operations.

use crate::request::Tag;

/// At most one `T` per tag, for tags 0 .. depth. Allocates once.
#[derive(Debug)]
pub struct InFlight<T> {
    slots: Box<[Option<T>]>,
    count: usize,
}

/// The tag is outside the queue depth, or already in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidTag;

impl<T> InFlight<T> {
    /// A table for `depth` tags.
    pub fn new(depth: u16) -> Self {
        Self { slots: std::iter::repeat_with(|| None).take(usize::from(depth)).collect(), count: 0 }
    }

    /// Adds `tag`. Returns `value` if that is impossible.
    pub fn begin(&mut self, tag: Tag, value: T) -> Result<(), (InvalidTag, T)> {
        match self.slots.get_mut(usize::from(tag)) {
            Some(slot @ None) => {
                *slot = Some(value);
                self.count += 1;
                Ok(())
            }
            _ => Err((InvalidTag, value)),
        }
    }

    /// The entry of `tag`.
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        self.slots.get_mut(usize::from(tag))?.as_mut()
    }

    /// Removes `tag`.
    pub fn finish(&mut self, tag: Tag) -> Option<T> {
        let value = self.slots.get_mut(usize::from(tag))?.take();
        self.count -= usize::from(value.is_some());
        value
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Removes all entries, by tag.
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
