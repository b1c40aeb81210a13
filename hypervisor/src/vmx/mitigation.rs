//! What is done at VM entry and exit against speculation across the boundary.

/// The choice for one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Mitigations {
    /// VERW before entry, so that the guest finds nothing of ours in the processor's buffers.
    pub clear_buffers_on_entry: bool,
    /// Fill the return stack buffer after exit, so that our returns are not predicted by the guest's calls.
    /// About 70 instructions.
    pub fill_return_stack_on_exit: bool,
}

/// CPUID.7.0:EDX: VERW clears buffers.
const MD_CLEAR: u32 = 1 << 10;
/// CPUID.7.0:EDX: IBRS and IBPB.
const IBRS_IBPB: u32 = 1 << 26;

/// IA32_ARCH_CAPABILITIES: IBRS may stay on for good ("enhanced IBRS").
const IBRS_ALL: u64 = 1 << 1;
/// IA32_ARCH_CAPABILITIES: not affected by MDS, TAA, SBDR/SSDP, FBSDP, PSDP.
const BUFFERS_SAFE: u64 = 1 << 5 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15;

impl Mitigations {
    /// Chooses from CPUID.7.0:EDX and IA32_ARCH_CAPABILITIES (0 where the MSR does not exist).
    ///
    /// A processor whose microcode enumerates neither defence gets none: without them the hole that each closes
    /// a part of is open anyway.
    #[must_use]
    pub const fn choose(leaf_7_edx: u32, arch_capabilities: u64) -> Self {
        Self {
            clear_buffers_on_entry: leaf_7_edx & MD_CLEAR != 0
                && arch_capabilities & BUFFERS_SAFE != BUFFERS_SAFE,
            fill_return_stack_on_exit: leaf_7_edx & IBRS_IBPB != 0 && arch_capabilities & IBRS_ALL == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_by_what_the_processor_enumerates() {
        assert_eq!(Mitigations::choose(0, 0), Mitigations::default());
        let old = Mitigations::choose(MD_CLEAR | IBRS_IBPB, 0);
        assert!(old.clear_buffers_on_entry && old.fill_return_stack_on_exit);
        let new = Mitigations::choose(MD_CLEAR | IBRS_IBPB, BUFFERS_SAFE | IBRS_ALL);
        assert_eq!(new, Mitigations::default());
        // One hole of the five is enough.
        assert!(Mitigations::choose(MD_CLEAR, BUFFERS_SAFE & !(1 << 14)).clear_buffers_on_entry);
    }
}
