//! The frame allocator's marks as the manifest wants them, and the shadow budget among them.
//!
//! A budget (`shadow_frames`) is made by the marks alone: all frames but the budget's count as kept, so that claims
//! fail and reclaim starts as if the machine were that small. What is free changes with the RAM and the vCPUs of every
//! guest that comes or goes, and the allocator moves the marks with it.

use machine::manifest::HypervisorConfig;
use memory::Marks;
use shadow::cache::Tenant;

use super::Guest;
use crate::host::frames;

/// Sets the marks, once all `guests` have their RAM.
pub fn apply<'a>(config: &HypervisorConfig, guests: impl Iterator<Item = &'a Guest>) {
    let allocator = frames::allocator();
    let default = allocator.marks();
    let applied = match config.shadow_frames {
        Some(budget) => {
            let least = default.min_frames();
            let kept = guests.map(Tenant::unreclaimable_frames).sum();
            Marks::for_budget(allocator.free_frames(), budget.into(), kept, least)
                .and_then(|marks| allocator.set_budget(marks, least))
        }
        None => {
            let [min, low, high] =
                [config.min_frames, config.low_frames, config.high_frames].map(|mark| mark.map(u64::from));
            // Not of all there is: the guests have their RAM.
            let marks = default.with(min, low, high).and_then(|marks| marks.fits(allocator.free_frames()));
            marks.and_then(|marks| allocator.set_marks(marks))
        }
    };
    if let Err(error) = applied {
        log::warn!("the manifest's marks are not used: {error}");
    }
}
