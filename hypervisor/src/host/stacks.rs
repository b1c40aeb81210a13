//! Stacks: each at the top of its own slot of address space, the rest of the slot unmapped, so that what runs
//! over faults.

use memory::PAGE_SIZE;

use super::STACKS;
use super::cores::CORES_MAX;

/// What a stack is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Use {
    /// All ordinary work.
    Main = 0,
    /// Non-maskable interrupts (IST 1).
    Nmi = 1,
    /// Double faults (IST 2).
    DoubleFault = 2,
    /// Machine checks (IST 3).
    MachineCheck = 3,
}

impl Use {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Main, Self::Nmi, Self::DoubleFault, Self::MachineCheck];

    /// The name for reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Nmi => "NMI",
            Self::DoubleFault => "double fault",
            Self::MachineCheck => "machine check",
        }
    }

    /// Size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Main => 64 * 1024,
            Self::Nmi | Self::DoubleFault | Self::MachineCheck => 8 * 1024,
        }
    }
}

/// Address space of one stack with its guard.
const SLOT_BYTES: u64 = 256 * 1024;
const SLOTS_PER_CORE: u64 = 4;

/// Where a stack ends: its first address is below this.
#[must_use]
pub const fn top(core: usize, purpose: Use) -> u64 {
    STACKS + (core as u64 * SLOTS_PER_CORE + purpose as u64 + 1) * SLOT_BYTES
}

/// Where a stack's lowest byte is.
#[must_use]
pub const fn bottom(core: usize, purpose: Use) -> u64 {
    top(core, purpose) - purpose.bytes()
}

/// What an address in the stacks' range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a stack.
    Stack(usize, Use),
    /// In the hole below one: it overflowed.
    Guard(usize, Use),
}

/// Which stack an address belongs to.
#[must_use]
pub fn locate(address: u64) -> Option<Place> {
    let slot = address.checked_sub(STACKS)? / SLOT_BYTES;
    let core = usize::try_from(slot / SLOTS_PER_CORE).ok().filter(|&core| core < CORES_MAX)?;
    let purpose = Use::ALL[(slot % SLOTS_PER_CORE) as usize];
    Some(if address >= bottom(core, purpose) {
        Place::Stack(core, purpose)
    } else {
        Place::Guard(core, purpose)
    })
}

const _: () = assert!(Use::Main.bytes() + PAGE_SIZE <= SLOT_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_and_guards_are_told_apart() {
        let top = top(3, Use::Nmi);
        assert_eq!(locate(top - 8), Some(Place::Stack(3, Use::Nmi)));
        assert_eq!(locate(bottom(3, Use::Nmi)), Some(Place::Stack(3, Use::Nmi)));
        assert_eq!(locate(bottom(3, Use::Nmi) - 1), Some(Place::Guard(3, Use::Nmi)));
        assert_eq!(locate(top), Some(Place::Guard(3, Use::DoubleFault)));
        assert_eq!(locate(STACKS - 1), None);
        assert_eq!(locate(u64::MAX), None);
        assert_eq!(locate(0), None);
    }
}
