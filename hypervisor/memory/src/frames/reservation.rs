//! Frames taken before work begins, so that nothing fails half-way.

use super::{Claim, FrameAllocator, Owner};
use crate::address::Pfn;

/// A reservation could not be had: this many more frames must become free first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedFrames(pub u64);

/// Up to `N` frames set aside for one operation, already owned by the owner they were reserved for. Those
/// not taken go back when it is dropped.
pub struct Reservation<'a, const N: usize = 8> {
    allocator: &'a FrameAllocator,
    core: usize,
    owner: Owner,
    frames: [Pfn; N],
    left: usize,
}

impl<const N: usize> Reservation<'_, N> {
    /// Takes one of the frames; `None` when all are taken.
    pub fn take(&mut self) -> Option<Pfn> {
        self.left = self.left.checked_sub(1)?;
        Some(self.frames[self.left])
    }

    /// Frames not yet taken.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Gives the frames not taken back, on the core that reserved them.
    pub fn release(self) {}
}

impl<const N: usize> Drop for Reservation<'_, N> {
    fn drop(&mut self) {
        while let Some(pfn) = self.take() {
            let freed = self.allocator.free(self.core, pfn, self.owner);
            debug_assert_eq!(freed, Ok(()), "a reserved frame changed hands");
        }
    }
}

impl FrameAllocator {
    /// Sets `frames` (at most `N`) frames aside for `owner`: all or none.
    ///
    /// # Errors
    /// [`NeedFrames`] when the marks do not allow as many.
    ///
    /// # Panics
    /// If `frames` is more than `N`: the caller's operation is larger than it says.
    pub fn reserve<const N: usize>(
        &self,
        core: usize,
        owner: Owner,
        claim: Claim,
        frames: usize,
    ) -> Result<Reservation<'_, N>, NeedFrames> {
        assert!(frames <= N, "a reservation of {frames} frames where {N} is the most");
        let mut taken = [0; N];
        self.stock.take(core, claim, &mut taken[..frames])?;
        let mut reservation = Reservation { allocator: self, core, owner, frames: [Pfn(0); N], left: frames };
        for (place, &index) in reservation.frames.iter_mut().zip(&taken[..frames]) {
            *place = self.hand_out(index, owner);
        }
        Ok(reservation)
    }
}
