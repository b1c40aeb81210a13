//! The way to the leaf table that was used last. Page faults come in clusters: one that hits the same 2 MiB as the one
//! before needs no way down, if the guest's upper entries are the same and no pointer has been taken away since.

use memory::Gva;

use crate::defect::{Defect, has};
use crate::mmu::Mmu;
use crate::pages::PageId;
use crate::paging::BLOCK_SHIFT;
use crate::walk::{UPPER_LEVELS, Walk};

/// The last way down to level 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trail {
    /// How many pointers had been taken away before it was walked (the way down may itself take some away, of its own
    /// too): every one of its own is still there while that number is the same, and a pointer that is there leads where
    /// it led.
    cut: u64,
    root: PageId,
    /// The 2 MiB of linear addresses.
    region: u64,
    /// The guest's entries that justify its pointers.
    upper: [u64; UPPER_LEVELS],
    /// Where it ended.
    leaf: PageId,
}

impl Mmu {
    /// The shadow page at level 1 for `gva`, if the last way led there and still does.
    #[inline]
    pub(crate) fn on_trail(&self, root: PageId, gva: Gva, walk: &Walk) -> Option<PageId> {
        let trail = self.trail.as_ref()?;
        let same = (trail.cut == self.cut || has(Defect::TrailOutlivesItsPages))
            && trail.root == root
            && trail.region == gva.0 >> BLOCK_SHIFT
            && trail.upper == *walk.upper();
        same.then_some(trail.leaf)
    }

    /// The way down for `gva`, begun when `cut` pointers had been taken away, ended at `leaf`.
    #[inline]
    pub(crate) fn leave_trail(&mut self, cut: u64, root: PageId, gva: Gva, walk: &Walk, leaf: PageId) {
        let (region, upper) = (gva.0 >> BLOCK_SHIFT, *walk.upper());
        self.trail = Some(Trail { cut, root, region, upper, leaf });
    }
}
