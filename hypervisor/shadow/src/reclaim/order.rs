//! Which guest gives next, and which of its pages: pure functions of what is seen, so that the order can be read,
//! and tested against golden lists.
//!
//! KVM's shrinker took the first guest's oldest pages, whether in use or not, and was removed in 2024.

use crate::pages::{PageId, Shelf};

/// The classes of victims, in the order in which they go: cheapest to miss first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Nothing points to it, and it is no root: only a future link could use it.
    Parentless,
    /// A root that no vCPU runs on; its subtree becomes parentless.
    IdleRoot,
    /// A leaf table that no processor walked through since the hand last passed it.
    ColdLeaf,
    /// An upper table that no processor walked through since then; so nothing below it is in use.
    ColdUpper,
    /// A leaf table in use.
    HotLeaf,
    /// An upper table in use.
    HotUpper,
}

/// What the order asks of a guest's pages.
pub(crate) trait View {
    /// The page of `shelf` that was used longest ago.
    fn oldest(&self, shelf: Shelf) -> Option<PageId>;
    /// The page of the same shelf that was used next after `page`.
    fn newer(&self, page: PageId) -> Option<PageId>;
    /// Whether a vCPU runs on it.
    fn is_loaded(&self, page: PageId) -> bool;
    /// Whether a processor walked through it since this was last asked.
    fn was_walked(&mut self, page: PageId) -> bool;
    /// Makes it the newest of its shelf, for this reclaim.
    fn spare(&mut self, page: PageId);
    /// Whether this reclaim has spared it.
    fn is_spared(&self, page: PageId) -> bool;
}

/// The next page of `shelf` that was not walked through. The shelf is a clock whose hand stays where it is, at the oldest,
/// while those that were walked through are moved out of its way. Each is judged once a reclaim, so by what happened
/// during a full turn (H25).
fn cold<V: View>(view: &mut V, shelf: Shelf) -> Option<PageId> {
    while let Some(page) = view.oldest(shelf).filter(|&page| !view.is_spared(page)) {
        if !view.was_walked(page) {
            return Some(page);
        }
        view.spare(page);
    }
    None
}

/// The page that goes next, and why it; `None` if all that are left are loaded roots.
pub(crate) fn next_victim<V: View>(view: &mut V) -> Option<(Class, PageId)> {
    if let Some(page) = view.oldest(Shelf::Parentless) {
        return Some((Class::Parentless, page));
    }
    let mut root = view.oldest(Shelf::Roots);
    while let Some(page) = root {
        if !view.is_loaded(page) {
            return Some((Class::IdleRoot, page));
        }
        root = view.newer(page);
    }
    if let Some(page) = cold(view, Shelf::Leaves) {
        return Some((Class::ColdLeaf, page));
    }
    if let Some(page) = cold(view, Shelf::Uppers) {
        return Some((Class::ColdUpper, page));
    }
    let hot = |shelf, class| view.oldest(shelf).map(|page| (class, page));
    hot(Shelf::Leaves, Class::HotLeaf).or_else(|| hot(Shelf::Uppers, Class::HotUpper))
}

/// A guest's part of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Frames that its shadow MMU holds.
    pub held_frames: u64,
    /// Frames that reclaim for others leaves to it: its guarantee, or what it needs to go on.
    pub kept_frames: u64,
}

/// Of guests with these shares, the place of the one that gives next: who has most beyond what it may keep, the last
/// of equals; `None` if nobody has any (H26).
///
/// So guests are cut down to one level, from the top: who holds less than an equal part of what there is loses nothing,
/// whatever the others want.
#[must_use]
pub fn next_guest(shares: impl Iterator<Item = Share>) -> Option<usize> {
    let excess = shares.map(|share| share.held_frames.saturating_sub(share.kept_frames)).enumerate();
    excess.filter(|&(_, excess)| excess > 0).max_by_key(|&(_, excess)| excess).map(|(place, _)| place)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Pages by number, shelf by shelf, the oldest first.
    #[derive(Default)]
    struct Toy {
        shelves: [VecDeque<u32>; 4],
        loaded: Vec<u32>,
        walked: Vec<u32>,
        spared: Vec<u32>,
        /// Pages that become parentless when another one goes: (that one, they).
        below: Vec<(u32, u32)>,
    }

    impl View for Toy {
        fn oldest(&self, shelf: Shelf) -> Option<PageId> {
            self.shelves[shelf as usize].front().copied().map(PageId)
        }
        fn newer(&self, page: PageId) -> Option<PageId> {
            let shelf = self.shelves.iter().find(|shelf| shelf.contains(&page.0))?;
            let place = shelf.iter().position(|&at| at == page.0)?;
            shelf.get(place + 1).copied().map(PageId)
        }
        fn is_loaded(&self, page: PageId) -> bool {
            self.loaded.contains(&page.0)
        }
        fn was_walked(&mut self, page: PageId) -> bool {
            let before = self.walked.len();
            self.walked.retain(|&at| at != page.0);
            self.walked.len() != before
        }
        fn spare(&mut self, page: PageId) {
            let shelf = self.shelves.iter_mut().find(|shelf| shelf.contains(&page.0)).unwrap();
            shelf.retain(|&at| at != page.0);
            shelf.push_back(page.0);
            self.spared.push(page.0);
        }
        fn is_spared(&self, page: PageId) -> bool {
            self.spared.contains(&page.0)
        }
    }

    impl Toy {
        /// Takes up to `count` pages in one reclaim.
        fn take(&mut self, count: usize) -> Vec<(Class, u32)> {
            self.spared.clear();
            let mut order = Vec::new();
            while order.len() < count
                && let Some((class, page)) = next_victim(self)
            {
                self.shelves.iter_mut().for_each(|shelf| shelf.retain(|&at| at != page.0));
                order.push((class, page.0));
                for &(_, child) in self.below.iter().filter(|&&(parent, _)| parent == page.0) {
                    let shelf = self.shelves.iter_mut().find(|shelf| shelf.contains(&child)).unwrap();
                    shelf.retain(|&at| at != child);
                    self.shelves[Shelf::Parentless as usize].push_back(child);
                }
            }
            order
        }
    }

    #[test]
    fn the_order_of_pages_is_golden() {
        use Class::{ColdLeaf, ColdUpper, HotLeaf, HotUpper, IdleRoot, Parentless};
        let mut toy = Toy {
            shelves: [[1, 2].into(), [10, 11, 12].into(), [30, 31, 32].into(), [20, 21, 22, 23, 24].into()],
            loaded: vec![11],
            walked: vec![20, 22, 24, 30, 32],
            ..Toy::default()
        };
        let golden = [
            (Parentless, 1),
            (Parentless, 2),
            (IdleRoot, 10),
            (IdleRoot, 12),
            (ColdLeaf, 21),
            (ColdLeaf, 23),
            (ColdUpper, 31),
            (HotLeaf, 20),
            (HotLeaf, 22),
            (HotLeaf, 24),
            (HotUpper, 30),
            (HotUpper, 32),
        ];
        assert_eq!(toy.take(usize::MAX), golden);
        assert_eq!(toy.shelves[Shelf::Roots as usize], [11], "a loaded root stays");
    }

    #[test]
    fn the_hand_goes_on_where_the_last_reclaim_left_it() {
        let mut toy = Toy {
            shelves: [[].into(), [].into(), [].into(), [20, 21, 22, 23].into()],
            walked: vec![20, 22],
            ..Toy::default()
        };
        assert_eq!(toy.take(1), [(Class::ColdLeaf, 21)]);
        // 20 was spared and not used again since: it is still judged after those that were not looked at yet.
        assert_eq!(toy.take(1), [(Class::ColdLeaf, 23)]);
        assert_eq!(toy.take(1), [(Class::ColdLeaf, 20)]);
        toy.walked.push(22);
        assert_eq!(toy.take(2), [(Class::HotLeaf, 22)]);
    }

    #[test]
    fn a_turn_ends_also_where_the_first_one_spared_has_gone() {
        use Class::{ColdUpper, HotLeaf, HotUpper, Parentless};
        let mut toy = Toy {
            shelves: [[].into(), [].into(), [30, 31, 32, 33].into(), [20].into()],
            walked: vec![20, 30, 32, 33],
            // 30 hangs below 31, through which nobody walked: by a pointer that is still cached.
            below: vec![(31, 30)],
            ..Toy::default()
        };
        let golden = [(ColdUpper, 31), (Parentless, 30), (HotLeaf, 20), (HotUpper, 32), (HotUpper, 33)];
        assert_eq!(toy.take(usize::MAX), golden);
    }

    #[test]
    fn the_order_of_guests_is_golden() {
        let share = |held_frames, kept_frames| Share { held_frames, kept_frames };
        let mut shares = [share(100, 80), share(500, 450), share(300, 80), share(300, 84), share(60, 80)];
        let mut order = Vec::new();
        while let Some(place) = next_guest(shares.iter().copied()) {
            order.push(place);
            shares[place].held_frames -= 40.min(shares[place].held_frames - shares[place].kept_frames);
        }
        assert_eq!(order, [2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 1, 2, 0, 3, 1]);
        assert_eq!(next_guest(core::iter::empty()), None);
    }

    /// Frames that come free with a batch.
    const BATCH: u64 = 64;

    proptest! {
        /// Reclaim, batch by batch, until so many frames are free or nobody has any to give: each guest's share is what
        /// it has beyond the others, wherever it stands in the list, and nobody goes below what it may keep.
        #[test]
        fn h26_everybody_gives_by_its_excess(
            guests in prop::collection::vec((0u64..5000, 0u64..2000), 1..8),
            wanted in 1u64..20_000,
        ) {
            let mut shares: Vec<Share> =
                guests.iter().map(|&(held_frames, kept_frames)| Share { held_frames, kept_frames }).collect();
            let mut freed = 0;
            let mut batches = 0;
            while freed < wanted && let Some(victim) = next_guest(shares.iter().copied()) {
                let victim = &mut shares[victim];
                let batch = BATCH.min(victim.held_frames - victim.kept_frames);
                victim.held_frames -= batch;
                freed += batch;
                batches += 1;
            }
            prop_assert!(batches <= 40_000 / BATCH + 8);
            let excess: Vec<u64> =
                shares.iter().map(|share| share.held_frames.saturating_sub(share.kept_frames)).collect();
            let most = excess.iter().copied().max().unwrap_or(0);
            prop_assert!(freed >= wanted || most == 0);
            for (i, &(before, kept)) in guests.iter().enumerate() {
                let held = shares[i].held_frames;
                prop_assert!(held == before || held >= kept);
                // Who gave has no less left than those who have most, but for the last batch.
                prop_assert!(held == before || excess[i] + BATCH >= most, "{:?} of {:?}", shares, guests);
            }
        }
    }
}
