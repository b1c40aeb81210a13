//! What a guest's control registers say about its paging, and the formats of its page-table entries.

use crate::defect::{Defect, has};
use memory::{Gfn, Gpa, Gva};

/// log2 of the bytes that a table at level 1 maps.
pub(crate) const BLOCK_SHIFT: u32 = memory::BLOCK_SIZE.trailing_zeros();

/// An entry of a guest's or a shadow table: the bits that all formats share.
/// Intel SDM Vol. 3, "Paging", tables "Format of ... Entry".
pub mod bits {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty (leaf entries).
    pub const D: u64 = 1 << 6;
    /// Page size: a leaf entry above level 1.
    pub const PS: u64 = 1 << 7;
    /// No execute.
    pub const NX: u64 = 1 << 63;
    /// The page-frame field, bits 51:12.
    pub const FRAME: u64 = 0x000f_ffff_ffff_f000;
}

/// How a guest translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Mode {
    /// CR0.PG = 0: a linear address is a guest physical one.
    #[default]
    Off = 0,
    /// 32-bit paging: two levels of 1024 four-byte entries.
    TwoLevel = 1,
    /// PAE paging: four PDPTE registers, then two levels.
    Pae = 2,
    /// 4-level paging.
    FourLevel = 3,
    /// 5-level paging.
    FiveLevel = 4,
}

impl Mode {
    /// The level of the shadow root: modes of up to 32 bits are all shadowed in the PAE format.
    #[must_use]
    pub const fn root_level(self) -> u8 {
        match self {
            Mode::Off | Mode::TwoLevel | Mode::Pae => 3,
            Mode::FourLevel => 4,
            Mode::FiveLevel => 5,
        }
    }

    /// Whether the shadow of this mode is in the PAE format: four PDPTEs, root below 4 GiB.
    #[must_use]
    pub const fn shadow_is_pae(self) -> bool {
        self.root_level() == 3
    }
}

/// What translation depends on. Rebuilt when a control register changes, read at every fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Paging {
    /// The paging mode.
    pub mode: Mode,
    /// CR3 as the guest wrote it, without the PCID.
    pub cr3: u64,
    /// The current PCID; `None` while CR4.PCIDE is clear.
    pub pcid: Option<u16>,
    /// The PDPTE registers (mode [`Mode::Pae`] only), as loaded by [`crate::walk::load_pdptes`].
    pub pdptes: [u64; 4],
    /// EFER.NXE.
    pub nxe: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PSE: 4 MiB pages in mode [`Mode::TwoLevel`].
    pub pse: bool,
    /// 1 GiB pages, as CPUID tells the guest.
    pub gib_pages: bool,
    /// The guest's MAXPHYADDR, in bits (36 to 52).
    pub physical_address_bits: u8,
}

impl Paging {
    /// The guest physical page of the top table (of the PDPT in PAE mode).
    #[must_use]
    pub fn root_gfn(&self) -> Gfn {
        match self.mode {
            Mode::Off => Gfn(0),
            Mode::TwoLevel | Mode::Pae => Gpa(self.cr3 & 0xffff_f000).page(),
            Mode::FourLevel | Mode::FiveLevel => Gpa(self.cr3 & bits::FRAME).page(),
        }
    }

    /// The bits of an entry at `level` that must be 0, given its PS bit.
    ///
    /// Intel SDM Vol. 3, "Paging", "Reserved bits": address bits at and above MAXPHYADDR, bit 63 while NXE
    /// is off, PS where the level has no pages, the low address bits of a large page (PAT excepted).
    #[must_use]
    pub fn reserved(&self, level: u8, entry: u64) -> u64 {
        if self.mode == Mode::TwoLevel {
            // PSE-36: bits 20:13 hold address bits 39:32, and bit 21 is reserved.
            return if level == 2 && self.pse && entry & bits::PS != 0 {
                let top = 32_u32.max(u32::from(self.physical_address_bits).min(40)) - 32;
                (1 << 21) | (0xff_u64 << (13 + top) & 0x1f_e000)
            } else {
                0
            };
        }
        let mut mask = bits::FRAME & !((1_u64 << self.physical_address_bits) - 1);
        if has(Defect::AddressBitsAccepted) {
            mask = 0;
        }
        if !self.nxe {
            mask |= bits::NX;
        }
        if self.mode == Mode::Pae {
            mask |= 0x7ff0_0000_0000_0000;
        }
        if entry & bits::PS != 0 {
            mask |= match level {
                2 => 0x1f_e000,
                3 if self.gib_pages && self.mode != Mode::Pae => 0x3fff_e000,
                3.. => bits::PS,
                _ => 0,
            };
        }
        mask
    }

    /// Whether `entry` at `level` is a leaf.
    #[must_use]
    pub fn is_leaf(&self, level: u8, entry: u64) -> bool {
        level == 1
            || (entry & bits::PS != 0
                && match self.mode {
                    Mode::TwoLevel => self.pse,
                    _ => level <= 3,
                })
    }

    /// The first guest physical page that the leaf `entry` at `level` maps.
    #[must_use]
    pub fn leaf_gfn(&self, level: u8, entry: u64) -> Gfn {
        if self.mode == Mode::TwoLevel {
            return if level == 1 {
                Gpa(entry & 0xffff_f000).page()
            } else {
                Gpa(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32).page()
            };
        }
        let size = 1_u64 << (9 * (level - 1));
        Gfn(Gpa(entry & bits::FRAME).page().0 & !(size - 1))
    }

    /// The guest physical page of the table that the non-leaf `entry` points to.
    #[must_use]
    pub fn table_gfn(&self, entry: u64) -> Gfn {
        match self.mode {
            Mode::TwoLevel => Gpa(entry & 0xffff_f000).page(),
            _ => Gpa(entry & bits::FRAME).page(),
        }
    }

    /// log2 of the bytes that one guest entry at `level` maps.
    #[must_use]
    pub fn span_shift(&self, level: u8) -> u32 {
        match self.mode {
            Mode::TwoLevel => 12 + 10 * (u32::from(level) - 1),
            _ => 12 + 9 * (u32::from(level) - 1),
        }
    }

    /// The index of the entry for `gva` in the guest's table at `level`.
    #[must_use]
    pub fn guest_index(&self, level: u8, gva: Gva) -> u64 {
        let mask = if self.mode == Mode::TwoLevel { 0x3ff } else { 0x1ff };
        (gva.0 >> self.span_shift(level)) & mask
    }

    /// Where entry `index` of the guest table `table` lies.
    #[must_use]
    pub fn entry_address(&self, table: Gfn, index: u64) -> Gpa {
        let size = if self.mode == Mode::TwoLevel { 4 } else { 8 };
        Gpa(table.address().0 + index * size)
    }
}

/// What a translation permits: the conjunction over the entries on its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rights(u8);

impl Rights {
    /// Fetches are permitted.
    pub const EXECUTE: Rights = Rights(1);
    /// Writes are permitted.
    pub const WRITE: Rights = Rights(2);
    /// User accesses are permitted.
    pub const USER: Rights = Rights(4);
    /// Everything is permitted.
    pub const ALL: Rights = Rights(7);

    /// The rights that one entry leaves.
    #[must_use]
    pub const fn of_entry(entry: u64) -> Rights {
        Rights((entry & (bits::W | bits::U)) as u8 | (entry & bits::NX == 0) as u8)
    }

    /// From the low three bits of `raw`.
    #[must_use]
    pub const fn from_bits(raw: u8) -> Rights {
        Rights(raw & 7)
    }

    /// As three bits.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// What both permit.
    #[must_use]
    pub const fn and(self, other: Rights) -> Rights {
        Rights(self.0 & other.0)
    }

    /// Without `other`.
    #[must_use]
    pub const fn without(self, other: Rights) -> Rights {
        Rights(self.0 & !other.0)
    }

    /// Whether all of `other` is permitted.
    #[must_use]
    pub const fn has(self, other: Rights) -> bool {
        self.0 & other.0 == other.0
    }
}
