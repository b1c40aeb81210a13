//! The role of a shadow page: everything, beside the gfn, that decides what it must hold.

use crate::defect::{Defect, has};
use crate::paging::{Mode, Paging, Rights};

/// A role, packed so that two compare in one instruction.
///
/// Two paths with different rights to one guest table have two roles, so two shadow pages (H1).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Role(u32);

const MODE: u32 = 3;
const QUADRANT: u32 = 6;
const RIGHTS: u32 = 8;
const DIRECT: u32 = 1 << 11;
const NXE: u32 = 1 << 12;
const WP: u32 = 1 << 13;
const SMEP_NOT_WP: u32 = 1 << 14;
const SMAP_NOT_WP: u32 = 1 << 15;
const PSE: u32 = 1 << 16;
const CLEAN: u32 = 1 << 17;
const VCPU: u32 = 24;

impl Role {
    /// The role of the root for `paging`. `vcpu` keeps PAE roots apart, which hold what one vCPU's PDPTE
    /// registers hold and so are no function of memory alone.
    #[must_use]
    pub fn root(paging: &Paging, vcpu: u8) -> Role {
        let mut raw = u32::from(paging.mode.root_level())
            | (paging.mode as u32) << MODE
            | u32::from(Rights::ALL.bits()) << RIGHTS;
        if paging.nxe {
            raw |= NXE;
        }
        if paging.wp || has(Defect::RoleWithoutWp) {
            raw |= WP;
        } else {
            // SMEP and SMAP are on in hardware as the guest has them; they shape an spte only where a
            // supervisor's write to a read-only user page is allowed by CR0.WP = 0.
            raw |= if paging.smep { SMEP_NOT_WP } else { 0 };
            raw |= if paging.smap { SMAP_NOT_WP } else { 0 };
        }
        if paging.pse && paging.mode == Mode::TwoLevel {
            raw |= PSE;
        }
        match paging.mode {
            Mode::Off => raw |= DIRECT,
            Mode::Pae => raw |= u32::from(vcpu) << VCPU,
            _ => {}
        }
        Role(raw)
    }

    /// All of it, for hashing.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// The role of a table one level below, reached with `rights`.
    #[must_use]
    pub fn child(self, rights: Rights) -> Role {
        let rights = if has(Defect::RoleWithoutInheritedRights) { Rights::ALL } else { rights };
        let keep = self.0 & !(0x7 | 3 << QUADRANT | 7 << RIGHTS | 0xff << VCPU);
        Role(keep | u32::from(self.level() - 1) | u32::from(rights.bits()) << RIGHTS)
    }

    /// The role of a table one level below that has no guest table: it maps a piece of one large page.
    #[must_use]
    pub fn direct_child(self, rights: Rights) -> Role {
        Role(self.child(rights).0 | DIRECT)
    }

    /// A piece of a large page whose D is clear.
    #[must_use]
    pub const fn clean(self) -> Role {
        Role(self.0 | CLEAN)
    }

    /// With a quadrant: which part of a 32-bit guest's 1024-entry table this one of 512 entries covers.
    #[must_use]
    pub const fn with_quadrant(self, quadrant: u32) -> Role {
        Role(self.0 & !(3 << QUADRANT) | (quadrant & 3) << QUADRANT)
    }

    /// The level, 1 (leaf tables) to 5.
    #[must_use]
    pub const fn level(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// The mode whose format the guest's table has.
    #[must_use]
    pub const fn mode(self) -> Mode {
        match self.0 >> MODE & 7 {
            0 => Mode::Off,
            1 => Mode::TwoLevel,
            2 => Mode::Pae,
            3 => Mode::FourLevel,
            _ => Mode::FiveLevel,
        }
    }

    /// See [`Role::with_quadrant`].
    #[must_use]
    pub const fn quadrant(self) -> u32 {
        self.0 >> QUADRANT & 3
    }

    /// The rights inherited from the entries above.
    #[must_use]
    pub const fn rights(self) -> Rights {
        Rights::from_bits((self.0 >> RIGHTS) as u8)
    }

    /// Whether there is no guest table behind it: the page maps guest frames in order.
    #[must_use]
    pub const fn is_direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// Whether it is a root.
    #[must_use]
    pub const fn is_root(self) -> bool {
        self.level() == self.mode().root_level()
    }

    /// The paging parameters that entries of this role are read with.
    #[inline]
    #[must_use]
    pub fn paging(self, physical_address_bits: u8, gib_pages: bool) -> Paging {
        Paging {
            mode: self.mode(),
            cr3: 0,
            pcid: None,
            pdptes: [0; 4],
            nxe: self.0 & NXE != 0,
            wp: self.0 & WP != 0,
            smep: self.0 & SMEP_NOT_WP != 0,
            smap: self.0 & SMAP_NOT_WP != 0,
            pse: self.0 & PSE != 0,
            gib_pages,
            physical_address_bits,
        }
    }
}

impl core::fmt::Debug for Role {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "Role(level {} {:?} rights {:03b} quadrant {}{})",
            self.level(),
            self.mode(),
            self.rights().bits(),
            self.quadrant(),
            if self.is_direct() { " direct" } else { "" }
        )
    }
}
