//! Which pages reclaim took lately, so that one that is soon made again is known: that is thrash.

use alloc::vec;
use alloc::vec::Vec;

use memory::Gfn;

use crate::role::Role;

/// Multiplier of Fibonacci hashing: 2^64 over the golden ratio, odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What reclaim took from one guest. Remembers about as many pages as the guest may have; of two whose hashes fall
/// on one place the later one.
#[derive(Debug)]
pub(crate) struct Ghosts {
    /// Upper half: which page, by hash, 0 if none. Lower half: its number among all that were taken.
    places: Vec<u64>,
    /// How many pages were taken so far.
    taken: u32,
}

impl Ghosts {
    /// Places for a guest with up to `pages_max` shadow pages.
    pub const fn places(pages_max: usize) -> usize {
        pages_max.next_power_of_two()
    }

    pub fn new(pages_max: u32) -> Ghosts {
        Ghosts { places: vec![0; Self::places(pages_max as usize)], taken: 0 }
    }

    /// The place for a page, and its mark in the upper half.
    fn place(&self, gfn: Gfn, role: Role) -> (usize, u64) {
        let hash = (gfn.0 ^ u64::from(role.bits()) << 32).wrapping_mul(GOLDEN);
        let hash = (hash ^ hash >> 32).wrapping_mul(GOLDEN);
        ((hash >> 8) as usize & (self.places.len() - 1), (hash | 1 << 32) >> 32 << 32)
    }

    /// Reclaim takes the page.
    pub fn leave(&mut self, gfn: Gfn, role: Role) {
        let (place, mark) = self.place(gfn, role);
        self.taken = self.taken.wrapping_add(1);
        self.places[place] = mark | u64::from(self.taken);
    }

    /// The page is made again: how many pages went with it and since, or `None` if reclaim did not take it, or so long
    /// ago that it is forgotten. It is no ghost any more.
    pub fn recall(&mut self, gfn: Gfn, role: Role) -> Option<u32> {
        let (place, mark) = self.place(gfn, role);
        let ghost = self.places[place];
        if ghost >> 32 << 32 != mark {
            return None;
        }
        self.places[place] = 0;
        Some(self.taken.wrapping_sub(ghost as u32) + 1)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::paging::Paging;

    #[test]
    fn a_page_is_known_once_and_with_its_distance() {
        let role = Role::root(&Paging::default(), 0);
        let mut ghosts = Ghosts::new(100);
        assert_eq!(ghosts.recall(Gfn(7), role), None);
        ghosts.leave(Gfn(7), role);
        assert_eq!(ghosts.recall(Gfn(8), role), None);
        assert_eq!(ghosts.recall(Gfn(7), role.with_quadrant(1)), None, "another role is another page");
        ghosts.leave(Gfn(8), role);
        ghosts.leave(Gfn(9), role);
        assert_eq!(ghosts.recall(Gfn(7), role), Some(3));
        assert_eq!(ghosts.recall(Gfn(7), role), None);
        assert_eq!(ghosts.recall(Gfn(9), role), Some(1));
    }

    #[test]
    fn neighbours_spread_over_the_places() {
        let role = Role::root(&Paging::default(), 0);
        let mut ghosts = Ghosts::new(256);
        (0..128).for_each(|gfn| ghosts.leave(Gfn(gfn), role));
        let known = (0..128).filter(|&gfn| ghosts.recall(Gfn(gfn), role).is_some()).count();
        // Of 128 in 256 places at random some 100 keep their own.
        assert!(known > 90, "{known}");
    }
}
