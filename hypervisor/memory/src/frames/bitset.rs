//! A set of small numbers that finds its greatest member quickly.

use alloc::vec;
use alloc::vec::Vec;

/// A set of numbers `0..capacity`: one bit each, and one summary bit for every 64 of them.
pub struct BitSet {
    words: Vec<u64>,
    /// Bit `w` is set while `words[w]` is not zero.
    summary: Vec<u64>,
    capacity: usize,
}

impl BitSet {
    pub fn new(capacity: usize) -> Self {
        let words = capacity.div_ceil(64);
        Self { words: vec![0; words], summary: vec![0; words.div_ceil(64)], capacity }
    }

    pub fn insert(&mut self, number: usize) {
        let word = number / 64;
        self.words[word] |= 1 << (number % 64);
        self.summary[word / 64] |= 1 << (word % 64);
    }

    pub fn remove(&mut self, number: usize) {
        let word = number / 64;
        self.words[word] &= !(1 << (number % 64));
        if self.words[word] == 0 {
            self.summary[word / 64] &= !(1 << (word % 64));
        }
    }

    /// The greatest member below `limit`.
    pub fn last_below(&self, limit: usize) -> Option<usize> {
        let last = limit.min(self.capacity).checked_sub(1)?;
        let word = last / 64;
        let here = self.words[word] & (u64::MAX >> (63 - last % 64));
        if here != 0 {
            return Some(word * 64 + highest(here));
        }
        let mut group = word / 64;
        let mut mask = (1 << (word % 64)) - 1;
        loop {
            let words = self.summary[group] & mask;
            if words != 0 {
                let word = group * 64 + highest(words);
                return Some(word * 64 + highest(self.words[word]));
            }
            group = group.checked_sub(1)?;
            mask = u64::MAX;
        }
    }
}

/// Number of the highest bit set in `word`, which is not zero.
fn highest(word: u64) -> usize {
    63 - word.leading_zeros() as usize
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_tree(
            capacity in 1usize..20_000,
            steps in prop::collection::vec((any::<bool>(), any::<usize>(), 0usize..21_000), 1..200),
        ) {
            let (mut set, mut tree) = (BitSet::new(capacity), BTreeSet::new());
            for (insert, number, limit) in steps {
                let number = number % capacity;
                if insert {
                    set.insert(number);
                    tree.insert(number);
                } else {
                    set.remove(number);
                    tree.remove(&number);
                }
                prop_assert_eq!(set.last_below(limit), tree.range(..limit).next_back().copied());
                prop_assert_eq!(set.last_below(usize::MAX), tree.last().copied());
            }
        }
    }
}
