//! The guest's own page walk: from a linear address to a guest physical page, or to the guest's page fault.
//!
//! The walk takes no lock. The guest's other processors may write the tables meanwhile; every entry is read
//! once and what was read is what is used. A and D are set with locked updates, in RAM only.

use memory::{Gfn, Gpa, GuestMemory, Gva};

use crate::defect::{Defect, has};
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
/// Those above level 1.
pub(crate) const UPPER_LEVELS: usize = LEVELS - 1;

impl Walk {
    /// The entry used at `level`, 1 to 5, as it stands after the walk; 0 where none was.
    #[inline]
    #[must_use]
    pub fn entry(&self, level: u8) -> u64 {
        self.entries.get(usize::from(level).wrapping_sub(1)).copied().unwrap_or(0)
    }

    /// The entries used above level 1; 0 where none was.
    #[inline]
    pub(crate) fn upper(&self) -> &[u64; UPPER_LEVELS] {
        let [_, upper @ ..] = &self.entries;
        upper
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
pub(crate) fn load<G: GuestMemory>(short: bool, guest: &G, address: Gpa) -> u64 {
    let missing = if has(Defect::NoRamReadsPresent) { 0x67 } else { 0 };
    if short {
        guest.load_u32(address).map_or(missing, u64::from)
    } else {
        guest.load_u64(address).unwrap_or(missing)
    }
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

/// Why one pass did not arrive.
enum Missed {
    /// The guest's own fault, with these bits in its error code.
    Fault(u32),
    /// An entry changed between its read and its A/D update: the walk starts anew.
    Raced,
}

/// Translates `gva` for `access` and sets A, and D for a write, on the path.
///
/// # Errors
/// The page fault that the guest's processor would raise.
pub fn walk<G: GuestMemory>(paging: &Paging, guest: &G, gva: Gva, access: Access) -> Result<Walk, PageFault> {
    match pass::<G, true>(paging, guest, gva, access) {
        Ok(found) => Ok(found),
        Err(Missed::Fault(code)) => Err(fault(paging, gva, access, code)),
        Err(Missed::Raced) => walk_again(paging, guest, gva, access),
    }
}

/// Each round that is lost is an entry that another vCPU has just changed, so they end soon; a guest that wins a thousand
/// times in a row against itself gets a fault for it.
#[cold]
fn walk_again<G: GuestMemory>(
    paging: &Paging,
    guest: &G,
    gva: Gva,
    access: Access,
) -> Result<Walk, PageFault> {
    for _ in 0..1_000 {
        match pass::<G, true>(paging, guest, gva, access) {
            Ok(found) => return Ok(found),
            Err(Missed::Fault(code)) => return Err(fault(paging, gva, access, code)),
            Err(Missed::Raced) => {}
        }
    }
    Err(fault(paging, gva, access, 0))
}

/// Translates `gva` without touching A and D: for looking, not for an access of the guest's.
///
/// # Errors
/// The page fault that the guest's processor would raise.
pub fn peek<G: GuestMemory>(paging: &Paging, guest: &G, gva: Gva, access: Access) -> Result<Walk, PageFault> {
    pass::<G, false>(paging, guest, gva, access).map_err(|missed| match missed {
        Missed::Fault(code) => fault(paging, gva, access, code),
        Missed::Raced => fault(paging, gva, access, 0),
    })
}

/// One pass from the root to the leaf; with `UPDATE`, A and D are set on its path when it has arrived. Each level is
/// compiled on its own, with its constants: a walk is a fifth of what a fill costs.
#[inline(always)]
fn pass<G: GuestMemory, const UPDATE: bool>(
    paging: &Paging,
    guest: &G,
    gva: Gva,
    access: Access,
) -> Result<Walk, Missed> {
    let mut way = Way {
        guest,
        paging,
        gva,
        reserved: paging.reserved(1, 0),
        unused: 0,
        found: Walk {
            gfn: Gfn(0),
            level: 3,
            rights: Rights::ALL,
            dirty: true,
            entries: [0; LEVELS],
            inherited: [Rights::ALL; LEVELS],
        },
    };
    let leaf = 'down: {
        let mut table = paging.root_gfn();
        match paging.mode {
            Mode::Off => {
                way.found.gfn = Gpa(gva.0 & 0xffff_ffff).page();
                return Ok(way.found);
            }
            Mode::TwoLevel => {
                match way.step::<true, 2>(table)? {
                    Step::Down(next) => table = next,
                    Step::Leaf(leaf) => break 'down leaf,
                }
                break 'down way.last::<true>(table)?;
            }
            Mode::Pae => {
                let pdpte = paging.pdptes[(gva.0 >> 30) as usize & 3];
                way.found.entries[2] = pdpte;
                if pdpte & bits::P == 0 {
                    return Err(Missed::Fault(0));
                }
                table = paging.table_gfn(pdpte);
            }
            Mode::FourLevel | Mode::FiveLevel => {
                if paging.mode == Mode::FiveLevel {
                    match way.step::<false, 5>(table)? {
                        Step::Down(next) => table = next,
                        Step::Leaf(leaf) => break 'down leaf,
                    }
                }
                match way.step::<false, 4>(table)? {
                    Step::Down(next) => table = next,
                    Step::Leaf(leaf) => break 'down leaf,
                }
                match way.step::<false, 3>(table)? {
                    Step::Down(next) => table = next,
                    Step::Leaf(leaf) => break 'down leaf,
                }
            }
        }
        match way.step::<false, 2>(table)? {
            Step::Down(next) => table = next,
            Step::Leaf(leaf) => break 'down leaf,
        }
        way.last::<false>(table)?
    };
    way.arrive::<UPDATE>(access, &leaf)?;
    Ok(way.found)
}

/// A walk under way.
struct Way<'a, G> {
    guest: &'a G,
    paging: &'a Paging,
    gva: Gva,
    /// The bits that are reserved in every entry.
    reserved: u64,
    /// A, where an entry above the leaf lacks it.
    unused: u64,
    found: Walk,
}

/// What an entry leads to.
enum Step {
    Down(Gfn),
    Leaf(Leaf),
}

/// A leaf entry, and where it was read.
struct Leaf {
    level: u8,
    address: Gpa,
    entry: u64,
}

impl<G: GuestMemory> Way<'_, G> {
    /// Reads the entry at `LEVEL` in `table`. `SHORT`: tables of 1024 four-byte entries, else of 512 eight-byte ones.
    #[inline(always)]
    fn look<const SHORT: bool, const LEVEL: u8>(&mut self, table: Gfn) -> Result<Leaf, Missed> {
        let (index_bits, entry_shift) = if SHORT { (10, 2) } else { (9, 3) };
        self.found.inherited[usize::from(LEVEL) - 1] = self.found.rights;
        let shift = memory::PAGE_SHIFT + index_bits * (u32::from(LEVEL) - 1);
        let index = self.gva.0 >> shift & ((1 << index_bits) - 1);
        let address = Gpa(table.address().0 + (index << entry_shift));
        let entry = load(SHORT, self.guest, address);
        if entry & bits::P == 0 {
            return Err(Missed::Fault(0));
        }
        if entry & self.reserved != 0 {
            return Err(Missed::Fault(ErrorCode::PRESENT | ErrorCode::RESERVED));
        }
        self.found.rights = self.found.rights.and(Rights::of_entry(entry));
        Ok(Leaf { level: LEVEL, address, entry })
    }

    /// One level down from `table`, which is above the last.
    #[inline(always)]
    fn step<const SHORT: bool, const LEVEL: u8>(&mut self, table: Gfn) -> Result<Step, Missed> {
        let at = self.look::<SHORT, LEVEL>(table)?;
        if at.entry & bits::PS != 0 {
            if at.entry & self.paging.reserved(LEVEL, at.entry) != 0 {
                return Err(Missed::Fault(ErrorCode::PRESENT | ErrorCode::RESERVED));
            }
            if self.paging.is_leaf(LEVEL, at.entry) {
                return Ok(Step::Leaf(at));
            }
        }
        self.unused |= !at.entry & bits::A;
        self.found.entries[usize::from(LEVEL) - 1] = at.entry;
        Ok(Step::Down(Gpa(at.entry & if SHORT { 0xffff_f000 } else { bits::FRAME }).page()))
    }

    /// The entry in the last table.
    #[inline(always)]
    fn last<const SHORT: bool>(&mut self, table: Gfn) -> Result<Leaf, Missed> {
        self.look::<SHORT, 1>(table)
    }

    /// Decides the access at its leaf.
    #[inline(always)]
    fn arrive<const UPDATE: bool>(&mut self, access: Access, leaf: &Leaf) -> Result<(), Missed> {
        let &Leaf { level, address, entry } = leaf;
        if !permits(self.paging, self.found.rights, access) {
            return Err(Missed::Fault(ErrorCode::PRESENT));
        }
        let mut new = entry;
        if UPDATE {
            if self.unused != 0 {
                self.mark_used(level)?;
            }
            new |= if access.kind == Kind::Write && !has(Defect::DirtyNotSet) {
                bits::A | bits::D
            } else {
                bits::A
            };
            let short = self.paging.mode == Mode::TwoLevel;
            if new != entry && !set_bits(short, self.guest, address, entry, new) {
                return Err(Missed::Raced);
            }
        }
        let mut gfn = self.paging.leaf_gfn(level, entry);
        if level > 1 {
            let span = 1_u64 << self.paging.span_shift(level);
            gfn.0 += (self.gva.0 & (span - 1)) >> memory::PAGE_SHIFT;
        }
        self.found.entries[usize::from(level) - 1] = new;
        self.found.gfn = gfn;
        self.found.level = level;
        self.found.dirty = new & bits::D != 0;
        Ok(())
    }

    /// Sets A in the entries above the leaf's `level`. Only once the walk has arrived: then a fill follows, which sees to
    /// it that no shadow of another format takes these bits for its own (see `Mmu::has_two_formats`). None follows the
    /// walks of an emulated instruction's operands: a guest whose tables are of two formats at once may be shown what
    /// was before.
    #[cold]
    fn mark_used(&mut self, level: u8) -> Result<(), Missed> {
        let top = match self.paging.mode {
            Mode::Off | Mode::TwoLevel | Mode::Pae => 2,
            Mode::FourLevel => 4,
            Mode::FiveLevel => 5,
        };
        for level in (level + 1..=top).rev() {
            let entry = self.found.entry(level);
            if entry & bits::A != 0 {
                continue;
            }
            let table = if level == top && self.paging.mode != Mode::Pae {
                self.paging.root_gfn()
            } else {
                self.paging.table_gfn(self.found.entry(level + 1))
            };
            let address = self.paging.entry_address(table, self.paging.guest_index(level, self.gva));
            let short = self.paging.mode == Mode::TwoLevel;
            if !set_bits(short, self.guest, address, entry, entry | bits::A) {
                return Err(Missed::Raced);
            }
            self.found.entries[usize::from(level) - 1] = entry | bits::A;
        }
        Ok(())
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
