//! The frame allocator's marks as the manifest wants them, and the shadow budget among them.
//!
//! A budget (`shadow_frames`) is made by the marks alone: all frames but the budget's count as kept, so that claims
//! fail and reclaim starts as if the machine were that small. What is free changes with the RAM of every guest that comes
//! or goes, and the allocator moves the marks with it.

use machine::manifest::HypervisorConfig;
use memory::Marks;

use crate::host::frames;

/// Frames that the hypervisor takes for each vCPU when it is made: VMCS, extended state, virtual APIC.
const VCPU_FRAMES: u64 = 3;

/// Sets the marks, once all guests have their RAM and before any of their `vcpus` is made: what those take is beside a
/// budget.
pub fn apply(config: &HypervisorConfig, vcpus: u64) {
    let allocator = frames::allocator();
    let default = allocator.marks();
    let applied = match config.shadow_frames {
        Some(budget) => {
            let least = default.min_frames();
            budget_marks(allocator.free_frames(), u64::from(budget) + VCPU_FRAMES * vcpus, least)
                .and_then(|marks| allocator.set_budget(marks, least))
        }
        None => {
            let pick = |own: Option<u32>, default| own.map_or(default, u64::from);
            let marks = Marks::new(
                pick(config.min_frames, default.min_frames()),
                pick(config.low_frames, default.low_frames()),
                pick(config.high_frames, default.high_frames()),
            );
            marks.and_then(|marks| allocator.set_marks(marks))
        }
    };
    if let Err(error) = applied {
        log::warn!("the manifest's marks are not used: {error}");
    }
}

/// The marks that leave `budget_frames` of `available_frames` to the shadow
/// pages, and never less than `least_frames` free.
fn budget_marks(
    available_frames: u64,
    budget_frames: u64,
    least_frames: u64,
) -> Result<Marks, memory::MarksError> {
    let min = available_frames.saturating_sub(budget_frames).max(least_frames);
    let step = (budget_frames / 16).clamp(8, 256);
    Marks::new(min, min + step, min + 2 * step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_what_lies_between_the_mark_and_what_there_is() {
        let marks = budget_marks(10_000, 800, 100).unwrap();
        assert_eq!((marks.min_frames(), marks.low_frames(), marks.high_frames()), (9_200, 9_250, 9_300));
        // A budget larger than the machine is none.
        assert_eq!(budget_marks(10_000, 20_000, 100).unwrap().min_frames(), 100);
    }
}
