//! What is done at VM entry, at VM exit and at a change of guests against speculation across the boundary.
//!
//! The L1D cache needs no flush: a spte that maps nothing holds no frame number that could be speculated with.
//! Guests never share a physical core at one time: see `schedule`.

use core::fmt;

use x86_64::registers::model_specific::Msr;

use super::msr::{PRED_CMD, SPEC_CTRL};

/// The choice for one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Mitigations {
    /// VERW before entry, so that the guest finds nothing of ours in the processor's buffers.
    pub clear_buffers_on_entry: bool,
    /// Fill the return stack buffer after exit, so that our returns are not predicted by the guest's calls.
    /// About 70 instructions.
    pub fill_return_stack_on_exit: bool,
    /// Set SPEC_CTRL.IBRS after each exit and give the guest its own value before each entry, so that our indirect
    /// branches are not predicted by the guest's. Processors with enhanced IBRS keep it set instead.
    pub restrict_on_exit: bool,
    /// SPEC_CTRL exists.
    pub speculation_control: bool,
    /// IBPB when another guest gets the core, so that the one does not train the other's branches.
    pub barrier_at_guest_change: bool,
}

/// CPUID.7.0:EDX: VERW clears buffers.
const MD_CLEAR: u32 = 1 << 10;
/// CPUID.7.0:EDX: IBRS and IBPB.
const IBRS_IBPB: u32 = 1 << 26;

/// IA32_ARCH_CAPABILITIES: IBRS may stay on for good ("enhanced IBRS").
const IBRS_ALL: u64 = 1 << 1;
/// IA32_ARCH_CAPABILITIES: not affected by MDS, TAA, SBDR/SSDP, FBSDP, PSDP.
const BUFFERS_SAFE: u64 = 1 << 5 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15;

/// SPEC_CTRL: indirect branch restricted speculation.
pub const IBRS: u64 = 1 << 0;
/// PRED_CMD: forget what indirect branches were trained with.
const IBPB: u64 = 1 << 0;

impl Mitigations {
    /// Chooses from CPUID.7.0:EDX and IA32_ARCH_CAPABILITIES (0 where the MSR does not exist).
    ///
    /// A processor whose microcode enumerates neither defence gets none: without them the hole that each closes
    /// a part of is open anyway.
    #[must_use]
    pub const fn choose(leaf_7_edx: u32, arch_capabilities: u64) -> Self {
        let ibrs = leaf_7_edx & IBRS_IBPB != 0;
        let enhanced = arch_capabilities & IBRS_ALL != 0;
        Self {
            clear_buffers_on_entry: leaf_7_edx & MD_CLEAR != 0
                && arch_capabilities & BUFFERS_SAFE != BUFFERS_SAFE,
            fill_return_stack_on_exit: ibrs && !enhanced,
            restrict_on_exit: ibrs && !enhanced,
            speculation_control: ibrs,
            barrier_at_guest_change: ibrs,
        }
    }

    /// What SPEC_CTRL holds while a guest that believes in `guest` has the core, from entry to exit.
    #[must_use]
    pub const fn guest_value(self, guest: u64) -> u64 {
        if self.restrict_on_exit { guest } else { guest | IBRS }
    }

    /// The core goes to a guest whose SPEC_CTRL is `guest`. `another`: to another guest than before.
    pub fn switch(self, guest: u64, another: bool) {
        if self.barrier_at_guest_change && another {
            self.barrier();
        }
        if self.speculation_control && !self.restrict_on_exit {
            write(SPEC_CTRL, self.guest_value(guest));
        }
    }

    /// A guest's own IBPB.
    pub fn barrier(self) {
        if self.barrier_at_guest_change {
            write(PRED_CMD, IBPB);
        }
    }
}

impl fmt::Display for Mitigations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chosen = [
            (self.clear_buffers_on_entry, "VERW at entry"),
            (self.fill_return_stack_on_exit, "return stack filled at exit"),
            (self.restrict_on_exit, "IBRS at exit"),
            (self.speculation_control && !self.restrict_on_exit, "IBRS always on"),
            (self.barrier_at_guest_change, "IBPB at a change of guests"),
        ];
        let mut separator = "";
        for (_, name) in chosen.iter().filter(|(chosen, _)| *chosen) {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            f.write_str("the processor enumerates no defence that is needed")
        } else {
            Ok(())
        }
    }
}

/// The host's value again, where an exit has not written it.
pub(super) fn restrict() {
    write(SPEC_CTRL, IBRS);
}

fn write(index: u32, value: u64) {
    // SAFETY: the caller has established that the MSR exists; both only restrain speculation.
    unsafe { Msr::new(index).write(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_by_what_the_processor_enumerates() {
        assert_eq!(Mitigations::choose(0, 0), Mitigations::default());
        let old = Mitigations::choose(MD_CLEAR | IBRS_IBPB, 0);
        assert!(old.clear_buffers_on_entry && old.fill_return_stack_on_exit && old.restrict_on_exit);
        assert!(old.barrier_at_guest_change);
        // Enhanced IBRS costs nothing at entry and exit.
        let new = Mitigations::choose(MD_CLEAR | IBRS_IBPB, BUFFERS_SAFE | IBRS_ALL);
        let kept = Mitigations {
            speculation_control: true,
            barrier_at_guest_change: true,
            ..Mitigations::default()
        };
        assert_eq!(new, kept);
        // One hole of the five is enough.
        assert!(Mitigations::choose(MD_CLEAR, BUFFERS_SAFE & !(1 << 14)).clear_buffers_on_entry);
    }

    #[test]
    fn enhanced_ibrs_stays_on_whatever_the_guest_says() {
        assert_eq!(Mitigations::choose(IBRS_IBPB, IBRS_ALL).guest_value(4), 5);
        assert_eq!(Mitigations::choose(IBRS_IBPB, 0).guest_value(4), 4);
    }
}
