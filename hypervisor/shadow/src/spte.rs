//! Shadow page-table entries: what the processor really reads.

use memory::Pfn;

use crate::defect::{Defect, has};
use crate::paging::{Rights, bits};

/// A shadow entry that maps nothing: no frame number in it (H21, L1TF).
pub const EMPTY: u64 = 0;

/// The mark of a page that is no RAM: present, with every page-frame bit set. A processor whose MAXPHYADDR is
/// below 52 finds a reserved bit set and says so in the error code; no cacheable frame has this number.
pub const MMIO: u64 = bits::P | bits::FRAME;

/// A software bit: the leaf maps no page of the guest's RAM and is in no reverse map (see [`Spte::Device`]).
const DEVICE: u64 = 1 << 9;

/// What an spte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spte {
    /// Maps nothing.
    Empty,
    /// Marks a page that is no RAM.
    Mmio,
    /// Maps the page that stands for a device (the APIC-access page), at level 1.
    Device(Pfn),
    /// Maps a page: 4 KiB at level 1, 2 MiB at level 2.
    Leaf(Pfn),
    /// Points to the shadow table in this frame.
    Table(Pfn),
}

/// Reads `raw`, found at `level`.
#[must_use]
pub const fn decode(level: u8, raw: u64) -> Spte {
    if raw == EMPTY {
        Spte::Empty
    } else if raw & MMIO == MMIO {
        Spte::Mmio
    } else {
        let pfn = Pfn((raw & bits::FRAME) >> memory::PAGE_SHIFT);
        if raw & DEVICE != 0 {
            Spte::Device(pfn)
        } else if level == 1 || raw & bits::PS != 0 {
            Spte::Leaf(pfn)
        } else {
            Spte::Table(pfn)
        }
    }
}

/// A leaf that maps `pfn` with `rights`. A is set (a cached translation has A set in the guest's entry); D is
/// set where it is writable, because the guest's entry has it. Write-back always: the guest's PAT, PCD and
/// PWT never reach it (H32). Never global.
#[must_use]
pub const fn leaf(pfn: Pfn, level: u8, rights: Rights) -> u64 {
    let rights = rights.bits() as u64;
    // W and U stand in an entry where `Rights` has them; D is W's, and NX is what EXECUTE is not.
    pfn.0 << memory::PAGE_SHIFT
        | bits::P
        | bits::A
        | rights & (bits::W | bits::U)
        | (rights & bits::W) << (bits::D.trailing_zeros() - bits::W.trailing_zeros())
        | (!rights & Rights::EXECUTE.bits() as u64) << bits::NX.trailing_zeros()
        | if level > 1 { bits::PS } else { 0 }
}

/// A leaf at level 1 that maps `pfn`, the page that stands for a device, with `rights`.
#[must_use]
pub const fn device(pfn: Pfn, rights: Rights) -> u64 {
    leaf(pfn, 1, rights) | DEVICE
}

/// An entry that points to the shadow table in `pfn`. Rights are kept in the leaves alone (they hold what all
/// levels permit together), so this permits everything. A PDPTE reserves the bits W, U and A.
#[must_use]
pub const fn table(pfn: Pfn, pdpte: bool) -> u64 {
    let raw = pfn.0 << memory::PAGE_SHIFT | bits::P;
    if pdpte { raw } else { raw | bits::W | bits::U | bits::A }
}

/// Whether `old`, found at the level of the leaf `new`, maps the frame that `new` maps. (The mark's frame is none, and
/// the page that stands for a device is no guest's RAM.)
#[must_use]
pub const fn same_frame(old: u64, new: u64) -> bool {
    old != EMPTY && (old ^ new) & (bits::FRAME | bits::PS) == 0
}

/// Whether the change from `old` to `new` takes something away that a TLB may hold: then a flush is due. U counts both
/// ways, since SMEP and SMAP keep the supervisor off a page that the user may use.
#[must_use]
pub fn narrows(old: u64, new: u64) -> bool {
    let user = if has(Defect::UserBitWidensOnly) { old & !new & bits::U } else { (old ^ new) & bits::U };
    old & bits::P != 0
        && (old & !new & (bits::P | bits::W) != 0
            || new & !old & bits::NX != 0
            || (old ^ new) & (bits::FRAME | bits::PS) != 0
            || user != 0)
}
