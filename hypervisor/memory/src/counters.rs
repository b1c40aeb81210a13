//! Counters: one block per core, one writer per block, read by anyone without a lock.
//!
//! A core counts into its own block only, by plain stores; whoever asks adds the blocks up. Events are
//! independent of each other and their sum is as old as its oldest part. The number of live shadow pages is
//! a difference, and summing differences while pages move between cores gives numbers that never were: it is
//! kept by [`population`] instead.

mod event;
mod exits;
pub mod population;

use alloc::boxed::Box;
use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use event::Event;
use event::{EXIT_REASONS, ExitCounter};
pub use exits::ExitCounts;
pub use population::Population;
use population::Slot;

/// One core's counters, on cache lines of their own (128 bytes: processors fetch lines in pairs).
#[repr(align(128))]
struct Block {
    shadow_pages: Slot,
    events: [AtomicU64; Event::ALL.len()],
    exits: [AtomicU64; EXIT_REASONS],
    /// Set once the block has its writer.
    taken: AtomicBool,
}

impl Block {
    fn new() -> Self {
        Self {
            shadow_pages: Slot::new(),
            events: [const { AtomicU64::new(0) }; Event::ALL.len()],
            exits: [const { AtomicU64::new(0) }; EXIT_REASONS],
            taken: AtomicBool::new(false),
        }
    }
}

/// Adds to a counter that only the caller writes. A load and a store, not a locked addition: it is the
/// caller's own line.
#[inline]
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

/// The counters of all cores, or of one guest's virtual processors.
pub struct Counters {
    blocks: Box<[Block]>,
}

/// A counter's sum over all cores, with what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Total {
    /// Its name: one word in lower case, with underscores, unique.
    pub name: &'static str,
    /// One line that says what was counted.
    pub description: &'static str,
    /// The sum over all cores since the start.
    pub sum: u64,
}

impl Counters {
    /// Blocks for cores `0..cores`, all zero.
    #[must_use]
    pub fn new(cores: usize) -> Self {
        Self { blocks: (0..cores).map(|_| Block::new()).collect() }
    }

    /// The writer of `core`'s block, to be kept by that core. `None` if there is no such core or the writer
    /// was handed out already: a block has one writer.
    #[must_use]
    pub fn writer(&self, core: usize) -> Option<Writer<'_>> {
        let block = self.blocks.get(core)?;
        let taken = block.taken.swap(true, Ordering::Relaxed);
        (!taken).then(|| Writer { block, allocated: Cell::new(0), freed: Cell::new(0) })
    }

    /// How many shadow pages live, over all cores, without a lock.
    #[must_use]
    pub fn shadow_pages(&self) -> Population {
        population::query(|| self.blocks.iter().map(|block| &block.shadow_pages))
    }

    /// The sum of one event over all cores.
    #[must_use]
    pub fn event(&self, event: Event) -> u64 {
        self.sum(|block| &block.events[event as usize])
    }

    /// How many exits there were for a basic exit reason, over all cores; those unknown are told as one.
    #[must_use]
    pub fn exits(&self, basic_reason: u16) -> u64 {
        let shown = ExitCounter::new(basic_reason);
        let shown =
            ExitCounter::all().find(|(exit, ..)| shown.counts_as(*exit)).map_or(shown, |(exit, ..)| exit);
        self.exits_as(shown)
    }

    fn exits_as(&self, shown: ExitCounter) -> u64 {
        let counted = ExitCounter::each().filter(|exit| exit.counts_as(shown));
        counted.fold(0, |sum, exit| sum.wrapping_add(self.sum(|block| &block.exits[exit.index()])))
    }

    /// What one core has counted of each reason so far; zeros for a core that is none.
    #[must_use]
    pub fn exits_on(&self, core: usize) -> ExitCounts {
        self.blocks.get(core).map_or_else(ExitCounts::default, |block| {
            ExitCounts(core::array::from_fn(|index| block.exits[index].load(Ordering::Relaxed)))
        })
    }

    /// Every counter in turn: events, exits by reason, in the order they are
    /// declared. For the console and dumps; takes no lock.
    pub fn totals(&self) -> impl Iterator<Item = Total> + '_ {
        let events = Event::ALL.into_iter().map(|event| Total {
            name: event.name(),
            description: event.description(),
            sum: self.event(event),
        });
        let exits = ExitCounter::all().map(|(exit, name, description)| Total {
            name,
            description,
            sum: self.exits_as(exit),
        });
        events.chain(exits)
    }

    fn sum(&self, counter: impl Fn(&Block) -> &AtomicU64) -> u64 {
        self.blocks.iter().fold(0, |sum, block| sum.wrapping_add(counter(block).load(Ordering::Relaxed)))
    }
}

/// The one writer of a block. It may move between cores with its owner but not be shared (it is not `Sync`),
/// and is not for NMI and machine-check handlers.
pub struct Writer<'a> {
    block: &'a Block,
    /// The counts themselves; the block's are what others see of them.
    allocated: Cell<u64>,
    freed: Cell<u64>,
}

impl Writer<'_> {
    /// Counts one shadow page at commit, before another core can come to free it.
    #[inline]
    pub fn shadow_page_allocated(&self) {
        let count = self.allocated.get() + 1;
        self.allocated.set(count);
        self.block.shadow_pages.publish_allocated(count);
    }

    /// Counts `pages` shadow pages whose frames are now free, whoever allocated them.
    #[inline]
    pub fn shadow_pages_freed(&self, pages: u64) {
        let count = self.freed.get() + pages;
        self.freed.set(count);
        self.block.shadow_pages.publish_freed(count);
    }

    /// Counts an event.
    #[inline]
    pub fn count(&self, event: Event) {
        self.add(event, 1);
    }

    /// Counts `times` events at once.
    #[inline]
    pub fn add(&self, event: Event, times: u64) {
        bump(&self.block.events[event as usize], times);
    }

    /// Counts an exit by its basic reason, bits 15:0 of the exit reason field.
    #[inline]
    pub fn exit(&self, basic_reason: u16) {
        bump(&self.block.exits[ExitCounter::new(basic_reason).index()], 1);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_block_has_one_writer_and_lines_of_its_own() {
        let counters = Counters::new(2);
        let writer = counters.writer(0);
        assert!(writer.is_some() && counters.writer(0).is_none());
        assert!(counters.writer(1).is_some() && counters.writer(2).is_none());
        assert_eq!((align_of::<Block>(), size_of::<Block>() % 128), (128, 0));
    }

    #[test]
    fn a_core_that_never_came_up_counts_as_zero() {
        let counters = Counters::new(64);
        for core in [0, 2] {
            let writer = counters.writer(core).unwrap();
            (0..3).for_each(|_| writer.shadow_page_allocated());
            writer.count(Event::Idle);
            writer.shadow_pages_freed(1);
        }
        assert_eq!(counters.shadow_pages(), Population::Exact(4));
        assert_eq!((counters.event(Event::Idle), counters.exits(10)), (2, 0));
    }

    #[test]
    fn sums_go_over_all_cores_and_carry_their_names() {
        let counters = Counters::new(3);
        for core in 0..3 {
            let writer = counters.writer(core).unwrap();
            writer.add(Event::ALL[0], core as u64);
            writer.exit(10);
            writer.exit(0xffff);
        }
        assert_eq!(counters.event(Event::ALL[0]), 3);
        let total = |name| counters.totals().find(|total| total.name == name).unwrap();
        assert_eq!(total("exit_cpuid").sum, 3);
        assert_eq!(total("exit_other").sum, 3);
    }

    #[test]
    fn names_are_unique_words_and_nothing_lacks_a_description() {
        let counters = Counters::new(1);
        let mut names = BTreeSet::new();
        for total in counters.totals() {
            assert!(total.name.bytes().all(|b| b == b'_' || b.is_ascii_lowercase() || b.is_ascii_digit()));
            assert!(!total.description.is_empty());
            assert!(names.insert(total.name), "{} is declared twice", total.name);
        }
    }

    proptest! {
        /// H24: whatever is freed wherever, the sum is what lives, and a delta of -1 is no 4294967295. Of the pages
        /// that live, each step frees one on another core, some, or all.
        #[test]
        fn h24_whatever_is_freed_on_whatever_core_the_sum_is_what_lives(
            steps in prop::collection::vec((0usize..4, prop_oneof![Just(0), 1u64..6, Just(u64::MAX)]), 0..300),
        ) {
            let counters = Counters::new(4);
            let writers: Vec<_> = (0..4).map(|core| counters.writer(core).unwrap()).collect();
            let mut live = 0;
            for (core, freed) in steps {
                let freed = if freed == u64::MAX { live } else { freed };
                if freed > 0 && freed <= live {
                    writers[core].shadow_pages_freed(freed);
                    live -= freed;
                } else {
                    writers[core].shadow_page_allocated();
                    live += 1;
                }
                prop_assert_eq!(counters.shadow_pages(), Population::Exact(live));
            }
        }
    }
}
