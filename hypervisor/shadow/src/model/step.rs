//! What a random guest does: one step a number.
//!
//! Any number is a step, so a sequence can be cut and changed at will: a property test shrinks it, a fuzzer mutates it.
//! A smaller number is mostly a simpler step.

use core::fmt;

use crate::{Access, Kind, Mode};

/// Guest pages that are tables of any level, and data.
pub const PAGES: u64 = 10;
/// Guest pages that hold PDPTEs.
pub const PDPTS: u64 = 2;
/// Words of a page that are ever anything but 0, for tables of both formats.
pub const SPOTS: [u64; 4] = [0, 1, 256, 511];

/// Page `p` of the pool; they lie in two blocks of 2 MiB. Behind the [`PAGES`] tables come the [`PDPTS`].
pub fn pool(p: u64) -> u64 {
    0x20_0000 + (p & 1) * 0x20_0000 + (p >> 1) * 0x1000
}

/// The page of the pool that `gpa` lies in.
pub fn pool_page(gpa: u64) -> Option<u64> {
    (0..PAGES + PDPTS).find(|&p| pool(p) == gpa & !0xfff)
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The page of the pool.
    pub page: u64,
    /// Its word: a number for [`SPOTS`]. (Of four-byte entries, the lower half in the first two words, the upper one in
    /// the others.)
    pub spot: u64,
}

/// A linear address: an index of [`SPOTS`] for each level, the leaf's first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct At(pub u64);

impl At {
    /// The address that the vCPU accessed last.
    pub const RECENT: At = At(1 << 10);
}

/// What the guest's control registers are changed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    pub wp: bool,
    pub smep: bool,
    pub smap: bool,
    pub nxe: bool,
    pub pse: bool,
}

/// What a store is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// A device, or the emulator: through the write tracker.
    Device(Place),
    /// The guest, wherever the address leads: if that is a table, to one of its words.
    Guest(At, Place),
}

/// What an edit does to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Toggle(u64),
    Value(u64),
}

/// What happens between the walk and the fill of one fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// Another vCPU, or a device, stores.
    Store(Store, u64),
    /// The cache shrinks.
    Reclaim(u32),
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An access of the guest's.
    Access(At, Access),
    /// A store, of an entry mostly.
    Store(Store, u64),
    /// One bit of an entry changes, as a kernel does for mprotect or for ageing.
    Toggle(Place, u64),
    /// An entry that translates the address accessed last changes: one bit of it, or all.
    Edit {
        /// How many levels above the leaf.
        above: u64,
        change: Change,
    },
    /// INVLPG.
    Invlpg(At),
    /// MOV to CR3: the page of the pool, the PCID, and whether what is cached is kept (bit 63).
    Cr3 { page: u64, pcid: u64, keep: bool },
    /// MOV to CR0 and CR4, WRMSR to EFER.
    Bits(Bits),
    /// Another paging mode, with CR3 at a page of the pool.
    Mode(Mode, u64),
    /// CR4.PCIDE is set or cleared.
    Pcide(bool),
    /// INVPCID.
    Invpcid { kind: u64, pcid: u64, at: At },
    /// CR4.PGE is toggled twice, as kernels do to flush global pages.
    Pge,
    /// The cache shrinks.
    Reclaim(u32),
    /// Another vCPU's turn.
    Switch,
    /// A fault, and something between its walk and its fill.
    Race(At, Access, Meanwhile),
    /// Another vCPU's store, in the middle of what the MMU does next.
    Late { after: u32, vcpu: u64, at: At, spot: u64, value: u64 },
    /// The processor walks an address unasked.
    Speculate(At),
    /// The frames in the stash go back: the next operation finds too few.
    Drain,
    /// The vCPU moves to another core.
    Move,
}

/// Takes numbers out of a number.
struct Digits(u64);

impl Digits {
    /// A number below `n`.
    fn take(&mut self, n: u64) -> u64 {
        let digit = self.0 % n;
        self.0 /= n;
        digit
    }

    fn yes(&mut self) -> bool {
        self.take(2) == 1
    }

    fn place(&mut self) -> Place {
        Place { page: self.take(PAGES), spot: [0, 0, 1, 1, 2, 3][self.take(6) as usize] }
    }

    fn at(&mut self) -> At {
        if self.take(3) == 0 {
            return At::RECENT;
        }
        let mut at = 0;
        for level in 0..5 {
            let spot = if level < 3 { [0, 0, 0, 1, 1, 2, 3][self.take(7) as usize] } else { self.take(2) };
            at |= spot << (2 * level);
        }
        At(at)
    }

    fn access(&mut self) -> Access {
        let kind = [Kind::Read, Kind::Write, Kind::Fetch][self.take(3) as usize];
        let user = self.yes();
        Access { kind, user, smap_overridden: self.take(4) == 3 && !user && kind != Kind::Fetch }
    }

    /// What an entry may say. Mostly a present one that leads into the pool.
    fn value(&mut self) -> u64 {
        const ALL: u64 = 0x67; // P, W, U, A, D
        let target = match self.take(14) {
            n @ 0..10 => pool(n),
            10 => self.take(4) << 21,
            11 => 0xfee0_0000,
            // No RAM; the upper half is an entry of its own in a table of four-byte ones.
            12 => 0x7_0000_0000,
            _ => 0x30_0000,
        };
        let flags = match self.take(20) {
            0..8 => ALL,
            8 => ALL & !2,
            9 | 18 | 19 => ALL & !4,
            10 => ALL & !0x40,
            11 => ALL & !0x20,
            12 => ALL | 1 << 63,
            13 | 14 => ALL | 0x80,
            15 => ALL | 0x100,
            16 => return 0,
            _ => ALL | 1 << 45,
        };
        // A large page's address is aligned to it, mostly: the bits below are reserved.
        if flags & 0x80 != 0 && self.take(8) != 7 { target & !0x1f_ffff | flags } else { target | flags }
    }

    fn store(&mut self) -> Store {
        let place = self.place();
        if self.yes() { Store::Guest(self.at(), place) } else { Store::Device(place) }
    }

    fn pcid(&mut self) -> u64 {
        self.take(3)
    }
}

/// The bits that [`Step::Toggle`] changes; the last is reserved in PAE tables, and nobody's in others.
const TOGGLED: [u64; 7] = [1 << 1, 1 << 2, 1 << 63, 1 << 5, 1 << 6, 1 << 8, 1 << 52];
/// All modes.
pub const MODES: [Mode; 5] = [Mode::FourLevel, Mode::Pae, Mode::TwoLevel, Mode::FiveLevel, Mode::Off];

impl Step {
    /// The step that a number stands for.
    pub fn decode(number: u64) -> Step {
        let mut digits = Digits(number);
        match digits.take(64) {
            0..16 => Step::Access(digits.at(), digits.access()),
            16..21 => Step::Edit {
                above: [0, 0, 0, 1, 2, 3][digits.take(6) as usize],
                change: match digits.take(3) {
                    2 => Change::Value(digits.value()),
                    _ => Change::Toggle(TOGGLED[digits.take(7) as usize]),
                },
            },
            21..29 => Step::Store(digits.store(), digits.value()),
            29..35 => Step::Toggle(digits.place(), TOGGLED[digits.take(7) as usize]),
            35..41 => Step::Invlpg(digits.at()),
            41..47 => Step::Cr3 { page: digits.take(PAGES), pcid: digits.pcid(), keep: digits.yes() },
            47 => Step::Bits(Bits {
                wp: !digits.yes(),
                smep: digits.yes(),
                smap: digits.yes(),
                nxe: !digits.yes(),
                pse: !digits.yes(),
            }),
            48 => Step::Mode(MODES[digits.take(5) as usize], digits.take(PAGES)),
            49 => Step::Pcide(!digits.yes()),
            50 => Step::Invpcid { kind: digits.take(4), pcid: digits.pcid(), at: digits.at() },
            51 => Step::Pge,
            52 => Step::Reclaim(1 + digits.take(24) as u32),
            53..56 => Step::Switch,
            56..58 => {
                let (at, access) = (digits.at(), digits.access());
                let meanwhile = match digits.take(8) {
                    7 => Meanwhile::Reclaim(1 + digits.take(24) as u32),
                    _ => Meanwhile::Store(digits.store(), digits.value()),
                };
                Step::Race(at, access, meanwhile)
            }
            58..60 => Step::Late {
                after: digits.take(40) as u32,
                vcpu: digits.take(4),
                at: digits.at(),
                spot: digits.take(4),
                value: digits.value(),
            },
            60 | 61 => Step::Speculate(digits.at()),
            62 => Step::Drain,
            _ => Step::Move,
        }
    }
}

impl At {
    /// The linear address, in a mode's format (not of [`At::RECENT`]). In the tables of either format it goes by [`SPOTS`] alone.
    pub fn linear(self, mode: Mode) -> u64 {
        let spot = |level: u32| SPOTS[(self.0 >> (2 * level) & 3) as usize];
        // A 4-byte entry: the lower half of the first two words, the upper half of the others.
        let short = |level: u32| [0, 2, 513, 1023][(self.0 >> (2 * level) & 3) as usize];
        match mode {
            Mode::Off => spot(0) << 12,
            Mode::TwoLevel => short(1) << 22 | short(0) << 12,
            Mode::Pae => (self.0 >> 4 & 3) << 30 | spot(1) << 21 | spot(0) << 12,
            Mode::FourLevel => (0..4).map(|level| spot(level) << (12 + 9 * level)).sum(),
            Mode::FiveLevel => (0..5).map(|level| spot(level) << (12 + 9 * level)).sum(),
        }
    }
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == At::RECENT { write!(f, "recent") } else { write!(f, "at {:o}", self.0) }
    }
}
