//! The guest's own page walk: from a linear address to a guest physical page, or to the guest's page fault.
//!
//! The walk takes no lock. The guest's other processors may write the tables meanwhile; every entry is read
//! once and what was read is what is used. A and D are set with locked updates, in RAM only.

use memory::{Gfn, Gpa, GuestMemory, Gva};

use crate::paging::{Mode, Paging, Rights, bits};

/// An access whose translation is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What is done.
    pub kind: Kind,
    /// An explicit access at CPL 3.
    pub user: bool,
    /// SMAP does not apply: EFLAGS.AC is set and the access is explicit.
    pub smap_overridden: bool,
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// A page-fault error code. Intel SDM Vol. 3, "Interrupt 14 - Page-Fault Exception (#PF)".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// The fault was a rights violation, not a non-present entry.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access was a user one.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set.
    pub const RESERVED: u32 = 1 << 3;
    /// The access was a fetch (reported while NX or SMEP is on).
    pub const FETCH: u32 = 1 << 4;

    /// Whether `bit` is set.
    #[must_use]
    pub const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// The kind of access that the code tells of.
    #[must_use]
    pub const fn kind(self) -> Kind {
        if self.has(Self::FETCH) {
            Kind::Fetch
        } else if self.has(Self::WRITE) {
            Kind::Write
        } else {
            Kind::Read
        }
    }
}

/// The guest's own page fault: inject it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// Goes to CR2.
    pub address: Gva,
    /// The error code to push.
    pub code: ErrorCode,
}

/// What a successful walk found.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// The guest physical page of the address.
    pub gfn: Gfn,
    /// The level of the guest's leaf entry: 1, 2 or 3; with paging off, 3.
    pub level: u8,
    /// What the entries on the path permit together.
    pub rights: Rights,
    /// The leaf's D bit, after the walk.
    pub dirty: bool,
    /// The entry used at level `l`, as it stands after the walk, in `entries[l - 1]`: see [`Walk::entry`]. (A small
    /// struct: it is handed from the walk, which takes no lock, to the fill, which does.)
    entries: [u64; LEVELS],
    /// What the entries above level `l` permit, in `inherited[l - 1]`.
    inherited: [Rights; LEVELS],
}

/// Levels of the deepest paging mode.
const LEVELS: usize = 5;

impl Walk {
    /// The entry used at `level`, 1 to 5, as it stands after the walk; 0 where none was.
    #[inline]
    #[must_use]
    pub fn entry(&self, level: u8) -> u64 {
        self.entries.get(usize::from(level).wrapping_sub(1)).copied().unwrap_or(0)
    }

    /// What the entries above `level` permit: the rights of the role of that level's table.
    #[inline]
    #[must_use]
    pub fn inherited(&self, level: u8) -> Rights {
        self.inherited.get(usize::from(level).wrapping_sub(1)).copied().unwrap_or(Rights::ALL)
    }
}

fn fault(paging: &Paging, address: Gva, access: Access, code: u32) -> PageFault {
    let mut code = code;
    match access.kind {
        Kind::Write => code |= ErrorCode::WRITE,
        // The I/D flag exists only where NX (with PAE tables) or SMEP can make a fetch special.
        Kind::Fetch if paging.smep || (paging.nxe && paging.mode != Mode::TwoLevel) => {
            code |= ErrorCode::FETCH;
        }
        Kind::Fetch | Kind::Read => {}
    }
    if access.user {
        code |= ErrorCode::USER;
    }
    PageFault { address, code: ErrorCode(code) }
}

/// Whether `rights` permit `access`. Intel SDM Vol. 3, "Determination of Access Rights".
#[must_use]
pub fn permits(paging: &Paging, rights: Rights, access: Access) -> bool {
    let user_page = rights.has(Rights::USER);
    if access.user {
        return user_page
            && match access.kind {
                Kind::Read => true,
                Kind::Write => rights.has(Rights::WRITE),
                Kind::Fetch => rights.has(Rights::EXECUTE),
            };
    }
    match access.kind {
        Kind::Fetch => rights.has(Rights::EXECUTE) && !(paging.smep && user_page),
        kind => {
            !(paging.smap && user_page && !access.smap_overridden)
                && (kind == Kind::Read || rights.has(Rights::WRITE) || !paging.wp)
        }
    }
}

/// Reads the entry at `address`; what is no RAM reads as not present (H11, H18: nothing is ever written there).
#[inline(always)]
fn load<G: GuestMemory>(short: bool, guest: &G, address: Gpa) -> u64 {
    if short { guest.load_u32(address).map_or(0, u64::from) } else { guest.load_u64(address).unwrap_or(0) }
}

/// Reads entry `index` of the guest table `table` as it now stands.
pub(crate) fn load_entry<G: GuestMemory>(paging: &Paging, guest: &G, table: Gfn, index: u64) -> u64 {
    load(paging.mode == Mode::TwoLevel, guest, paging.entry_address(table, index))
}

fn set_bits<G: GuestMemory>(short: bool, guest: &G, address: Gpa, old: u64, new: u64) -> bool {
    if short {
        guest.compare_exchange_u32(address, old as u32, new as u32) == Ok(true)
    } else {
        guest.compare_exchange_u64(address, old, new) == Ok(true)
    }
}

/// Translates `gva` for `access` and sets A, and D for a write, on the path.
///
/// # Errors
/// The page fault that the guest's processor would raise.
pub fn walk<G: GuestMemory>(paging: &Paging, guest: &G, gva: Gva, access: Access) -> Result<Walk, PageFault> {
    match walk_once(paging, guest, gva, access, true) {
        Some(result) => result,
        None => walk_again(paging, guest, gva, access),
    }
}

/// An entry changed between its read and its A/D update: the walk starts anew. A guest that keeps changing it holds up
/// only itself: after a few rounds the fault is simply taken again.
#[cold]
fn walk_again<G: GuestMemory>(
    paging: &Paging,
    guest: &G,
    gva: Gva,
    access: Access,
) -> Result<Walk, PageFault> {
    for _ in 0..4 {
        if let Some(result) = walk_once(paging, guest, gva, access, true) {
            return result;
        }
    }
    Err(fault(paging, gva, access, 0))
}

/// Translates `gva` without touching A and D: for looking, not for an access of the guest's.
///
/// # Errors
/// The page fault that the guest's processor would raise.
pub fn peek<G: GuestMemory>(paging: &Paging, guest: &G, gva: Gva, access: Access) -> Result<Walk, PageFault> {
    walk_once(paging, guest, gva, access, false).unwrap_or_else(|| Err(fault(paging, gva, access, 0)))
}

/// One pass; `None` if an entry changed under it.
fn walk_once<G: GuestMemory>(
    paging: &Paging,
    guest: &G,
    gva: Gva,
    access: Access,
    update: bool,
) -> Option<Result<Walk, PageFault>> {
    let mut found = Walk {
        gfn: Gfn(0),
        level: 3,
        rights: Rights::ALL,
        dirty: true,
        entries: [0; LEVELS],
        inherited: [Rights::ALL; LEVELS],
    };
    let (level, table) = match paging.mode {
        Mode::Off => {
            found.gfn = Gpa(gva.0 & 0xffff_ffff).page();
            return Some(Ok(found));
        }
        Mode::TwoLevel => {
            return follow::<G, true>(paging, guest, gva, access, update, found, 2, paging.root_gfn());
        }
        Mode::Pae => {
            let pdpte = paging.pdptes[(gva.0 >> 30) as usize & 3];
            found.entries[2] = pdpte;
            if pdpte & bits::P == 0 {
                return Some(Err(fault(paging, gva, access, 0)));
            }
            (2, paging.table_gfn(pdpte))
        }
        Mode::FourLevel => (4, paging.root_gfn()),
        Mode::FiveLevel => (5, paging.root_gfn()),
    };
    follow::<G, false>(paging, guest, gva, access, update, found, level, table)
}

/// The walk from `table` at `level` down. `SHORT`: tables of 1024 four-byte entries, else of 512 eight-byte ones.
/// What depends on the format is a constant in each of the two: this is half of what a fill costs.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the loop of `walk_once`, apart only to be compiled twice")]
fn follow<G: GuestMemory, const SHORT: bool>(
    paging: &Paging,
    guest: &G,
    gva: Gva,
    access: Access,
    update: bool,
    mut found: Walk,
    mut level: u8,
    mut table: Gfn,
) -> Option<Result<Walk, PageFault>> {
    let (index_bits, entry_shift) = if SHORT { (10, 2) } else { (9, 3) };
    let always_reserved = paging.reserved(1, 0);
    let mut shift = 12 + index_bits * (u32::from(level) - 1);
    loop {
        let slot = usize::from(level) - 1;
        found.inherited[slot] = found.rights;
        let index = gva.0 >> shift & ((1 << index_bits) - 1);
        let address = Gpa(table.address().0 + (index << entry_shift));
        let entry = load(SHORT, guest, address);
        if entry & bits::P == 0 {
            return Some(Err(fault(paging, gva, access, 0)));
        }
        let large = level > 1 && entry & bits::PS != 0;
        if entry & always_reserved != 0 || large && entry & paging.reserved(level, entry) != 0 {
            return Some(Err(fault(paging, gva, access, ErrorCode::PRESENT | ErrorCode::RESERVED)));
        }
        found.rights = found.rights.and(Rights::of_entry(entry));
        let leaf = level == 1 || large && paging.is_leaf(level, entry);
        if leaf && !permits(paging, found.rights, access) {
            return Some(Err(fault(paging, gva, access, ErrorCode::PRESENT)));
        }
        let mut new = entry | bits::A;
        if leaf && access.kind == Kind::Write {
            new |= bits::D;
        }
        if update && new != entry && !set_bits(SHORT, guest, address, entry, new) {
            return None;
        }
        found.entries[slot] = if update { new } else { entry };
        if leaf {
            let within = (gva.0 & ((1 << shift) - 1)) >> memory::PAGE_SHIFT;
            found.gfn = Gfn(paging.leaf_gfn(level, entry).0 + within);
            found.level = level;
            found.dirty = found.entries[slot] & bits::D != 0;
            return Some(Ok(found));
        }
        table = Gpa(entry & if SHORT { 0xffff_f000 } else { bits::FRAME }).page();
        level -= 1;
        shift -= index_bits;
    }
}

/// A present PDPTE has a reserved bit set: MOV to CR3 (or the CR0/CR4 change) raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedPdpte;

/// Loads the four PDPTE registers from CR3, as the processor does at the CR3, CR0 and CR4 writes that the SDM
/// lists (Vol. 3, "PDPTE Registers").
///
/// # Errors
/// [`ReservedPdpte`] if one is present with a reserved bit: the registers keep their old values.
pub fn load_pdptes<G: GuestMemory>(
    guest: &G,
    cr3: u64,
    physical_address_bits: u8,
) -> Result<[u64; 4], ReservedPdpte> {
    let reserved = !((1_u64 << physical_address_bits) - 1) | 0x1e6;
    let base = cr3 & 0xffff_ffe0;
    let mut pdptes = [0; 4];
    for (i, pdpte) in pdptes.iter_mut().enumerate() {
        let value = guest.load_u64(Gpa(base + 8 * i as u64)).unwrap_or(0);
        if value & bits::P != 0 && value & reserved != 0 {
            return Err(ReservedPdpte);
        }
        *pdpte = value;
    }
    Ok(pdptes)
}
