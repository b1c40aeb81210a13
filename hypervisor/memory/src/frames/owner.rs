//! Whose a frame is, packed into 16 bits per frame.

use core::fmt;

/// Number of a guest, `0..=GuestId::MAX`: its place in the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(u16);

impl GuestId {
    /// The largest guest number.
    pub const MAX: u16 = 0x0fff;

    /// The guest with this number; `None` above [`GuestId::MAX`].
    #[must_use]
    pub const fn new(number: u16) -> Option<Self> {
        if number <= Self::MAX { Some(Self(number)) } else { None }
    }

    /// The guest's number, for indexing.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a frame in use is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The hypervisor itself: its tables, stacks, VMCS regions.
    Hypervisor,
    /// A guest's RAM.
    Memory(GuestId),
    /// A shadow page of a guest.
    Shadow(GuestId),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hypervisor => f.write_str("hypervisor"),
            Self::Memory(guest) => write!(f, "memory of guest {}", guest.0),
            Self::Shadow(guest) => write!(f, "shadow of guest {}", guest.0),
        }
    }
}

/// What the allocator knows of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameState {
    /// Not given to the allocator: no RAM, or set aside before it was built.
    Absent,
    /// Free, in the pool or in a core's cache.
    Free,
    /// In use.
    Owned(Owner),
}

const ABSENT: u16 = 0;
/// Free, its contents unknown.
pub(super) const FREE: u16 = 1;
const HYPERVISOR: u16 = 2;
/// Free, and filled with [`super::POISON`].
pub(super) const POISONED: u16 = 3;
const MEMORY: u16 = 0x4000;
const SHADOW: u16 = 0x8000;

impl FrameState {
    pub(super) const fn pack(self) -> u16 {
        match self {
            Self::Absent => ABSENT,
            Self::Free => FREE,
            Self::Owned(Owner::Hypervisor) => HYPERVISOR,
            Self::Owned(Owner::Memory(guest)) => MEMORY | guest.0,
            Self::Owned(Owner::Shadow(guest)) => SHADOW | guest.0,
        }
    }

    pub(super) const fn unpack(bits: u16) -> Self {
        let guest = GuestId(bits & GuestId::MAX);
        match bits {
            FREE | POISONED => Self::Free,
            HYPERVISOR => Self::Owned(Owner::Hypervisor),
            _ if bits & SHADOW != 0 => Self::Owned(Owner::Shadow(guest)),
            _ if bits & MEMORY != 0 => Self::Owned(Owner::Memory(guest)),
            _ => Self::Absent,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_state_survives_packing() {
        let mut states = vec![FrameState::Absent, FrameState::Free, FrameState::Owned(Owner::Hypervisor)];
        for number in 0..=GuestId::MAX {
            let guest = GuestId::new(number).unwrap();
            states.push(FrameState::Owned(Owner::Memory(guest)));
            states.push(FrameState::Owned(Owner::Shadow(guest)));
        }
        let mut packed: Vec<u16> = states.iter().map(|state| state.pack()).collect();
        assert!(states.iter().zip(&packed).all(|(state, &bits)| FrameState::unpack(bits) == *state));
        assert_eq!(FrameState::unpack(POISONED), FrameState::Free);
        packed.push(POISONED);
        packed.sort_unstable();
        packed.dedup();
        assert_eq!(packed.len(), states.len() + 1);
        assert_eq!(GuestId::new(GuestId::MAX + 1), None);
    }
}
