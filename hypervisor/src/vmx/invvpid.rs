//! INVVPID, with the next larger kind where the processor lacks one.

use core::arch::asm;

use super::capability::{Capabilities, InvvpidTypes};
use super::controls::{Controls, Feature};

/// How this processor forgets translations by VPID. Copied to each core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invvpid {
    /// `None`: VPIDs are off, so every entry and exit forgets everything by itself.
    types: Option<InvvpidTypes>,
}

/// One INVVPID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Address { vpid: u16, gva: u64 },
    Context { vpid: u16 },
    AllContexts,
}

impl Invvpid {
    /// For a processor with these capabilities and controls.
    #[must_use]
    pub const fn new(capabilities: &Capabilities, controls: &Controls) -> Self {
        Self { types: if controls.has(Feature::Vpid) { Some(capabilities.invvpid) } else { None } }
    }

    /// Forgets the translations of the linear address `gva` under `vpid`. `vpid` is not 0.
    ///
    /// A non-canonical address has no translation, and INVVPID would refuse it.
    #[inline]
    pub fn flush_address(self, vpid: u16, gva: u64) {
        run(self.for_address(vpid, gva));
    }

    /// Forgets all translations under `vpid`. `vpid` is not 0.
    #[inline]
    pub fn flush_context(self, vpid: u16) {
        run(self.for_context(vpid));
    }

    /// Forgets all translations of all VPIDs but 0.
    #[inline]
    pub fn flush_all(self) {
        run(self.types.map(|_| Operation::AllContexts));
    }

    fn for_address(self, vpid: u16, gva: u64) -> Option<Operation> {
        let types = self.types?;
        if !types.individual_address {
            return self.for_context(vpid);
        }
        is_canonical(gva).then_some(Operation::Address { vpid, gva })
    }

    fn for_context(self, vpid: u16) -> Option<Operation> {
        let types = self.types?;
        Some(if types.single_context { Operation::Context { vpid } } else { Operation::AllContexts })
    }
}

/// With 48 address bits: no guest has 5-level paging while LA57 is hidden.
const fn is_canonical(gva: u64) -> bool {
    (gva as i64) << 16 >> 16 == gva as i64
}

fn run(operation: Option<Operation>) {
    let (kind, vpid, gva): (u64, u16, u64) = match operation {
        None => return,
        Some(Operation::Address { vpid, gva }) => (0, vpid, gva),
        Some(Operation::Context { vpid }) => (1, vpid, 0),
        Some(Operation::AllContexts) => (2, 0, 0),
    };
    let descriptor: [u64; 2] = [u64::from(vpid), gva];
    // SAFETY: INVVPID only forgets cached translations, of guests; the descriptor lives across the instruction.
    unsafe {
        asm!(
            "invvpid {kind}, [{descriptor}]",
            "jbe {fail}",
            kind = in(reg) kind,
            descriptor = in(reg) &raw const descriptor,
            fail = label { failed(kind, vpid) },
            options(nostack, readonly),
        );
    }
}

#[cold]
#[inline(never)]
fn failed(kind: u64, vpid: u16) -> ! {
    // A translation that should be gone may still be cached: going on would break isolation.
    panic!("INVVPID of type {kind} for VPID {vpid} failed");
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: InvvpidTypes =
        InvvpidTypes { individual_address: true, single_context: true, all_contexts: true };

    fn with(types: InvvpidTypes) -> Invvpid {
        Invvpid { types: Some(types) }
    }

    #[test]
    fn the_narrowest_kind_there_is_serves() {
        assert_eq!(with(ALL).for_address(3, 0x1000), Some(Operation::Address { vpid: 3, gva: 0x1000 }));
        let no_address = InvvpidTypes { individual_address: false, ..ALL };
        assert_eq!(with(no_address).for_address(3, 0x1000), Some(Operation::Context { vpid: 3 }));
        let only_all = InvvpidTypes { single_context: false, ..no_address };
        assert_eq!(with(only_all).for_address(3, 0x1000), Some(Operation::AllContexts));
        assert_eq!(with(only_all).for_context(3), Some(Operation::AllContexts));
    }

    #[test]
    fn without_vpids_there_is_nothing_to_forget() {
        let none = Invvpid { types: None };
        assert_eq!((none.for_address(3, 0), none.for_context(3)), (None, None));
        none.flush_all();
    }

    #[test]
    fn a_non_canonical_address_is_never_given_to_the_instruction() {
        assert_eq!(with(ALL).for_address(3, 0x8000_0000_0000), None);
        assert!(with(ALL).for_address(3, 0xffff_8000_0000_0000).is_some());
        assert!(with(ALL).for_address(3, 0x7fff_ffff_ffff).is_some());
    }
}
