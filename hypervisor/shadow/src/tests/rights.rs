//! Rights: modes x page sizes x entries x control bits x accesses, each after each other.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PT, TOP, guest};
use crate::model::machine::{FETCH, Landed, Machine, READ, WRITE, attempt, by_user};
use crate::model::reference::{Controls, Path, permitted};
use crate::paging::bits;
use crate::{Access, Kind, Mode, Paging};

#[test]
fn a_supervisor_write_under_wp_0_takes_the_page_from_the_user() {
    let mut machine = guest();
    machine.poke(PT, 0x20_0000 | (FLAGS & !bits::W));
    machine.set_paging(Paging { wp: false, ..machine.cpu.paging });
    assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
    assert!(matches!(machine.access(Gva(TOP), by_user(WRITE)), Landed::Fault(_)));
    assert_eq!(machine.access(Gva(TOP), by_user(READ)), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
}

/// All kinds of access there are.
const ACCESSES: [Access; 8] = [
    READ,
    Access { smap_overridden: true, ..READ },
    WRITE,
    Access { smap_overridden: true, ..WRITE },
    FETCH,
    by_user(READ),
    by_user(WRITE),
    by_user(FETCH),
];

/// The tables, top first; all translate index 0 only.
const TABLES: [u64; 5] = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000];
/// What the leaf maps.
const DATA: u64 = 0x40_0000;

/// One way to translate address 0: a mode, and the size of the page.
#[derive(Clone, Copy, Debug)]
struct Shape {
    mode: Mode,
    /// Levels with entries that carry rights.
    levels: usize,
    large: bool,
}

const SHAPES: [Shape; 8] = [
    Shape { mode: Mode::TwoLevel, levels: 2, large: false },
    Shape { mode: Mode::TwoLevel, levels: 1, large: true },
    Shape { mode: Mode::Pae, levels: 2, large: false },
    Shape { mode: Mode::Pae, levels: 1, large: true },
    Shape { mode: Mode::FourLevel, levels: 4, large: false },
    Shape { mode: Mode::FourLevel, levels: 3, large: true },
    Shape { mode: Mode::FiveLevel, levels: 5, large: false },
    Shape { mode: Mode::FiveLevel, levels: 4, large: true },
];

/// What three bits of `n` say of an entry: R/W, U/S, XD.
fn rights(n: u64) -> u64 {
    (n & 3) << 1 | (n >> 2) << 63
}

impl Shape {
    fn put(self, machine: &mut Machine, table: u64, value: u64) {
        machine.mmu.before_write(&machine.host, Gpa(table).page());
        match self.mode {
            Mode::TwoLevel => machine.poke_u32(table, value as u32),
            _ => machine.poke(table, value),
        }
    }

    /// Writes the tables: the leaf says `leaf`, the entry above it `upper`, those above that everything.
    fn build(self, machine: &mut Machine, upper: u64, leaf: u64) {
        for (i, pair) in TABLES[..self.levels].windows(2).enumerate() {
            let flags = if i + 2 == self.levels { upper } else { bits::W | bits::U };
            self.put(machine, pair[0], pair[1] | flags | bits::P);
        }
        let size = if self.large { bits::PS } else { 0 };
        self.put(machine, TABLES[self.levels - 1], DATA | leaf | bits::P | size);
    }

    fn paging(self, controls: u8) -> Paging {
        let bit = |n: u8| controls >> n & 1 != 0;
        Paging {
            mode: self.mode,
            cr3: TABLES[0],
            pcid: None,
            pdptes: [TABLES[0] | bits::P, 0, 0, 0],
            wp: bit(0),
            smep: bit(1),
            smap: bit(2),
            nxe: bit(3),
            pse: true,
            gib_pages: true,
            physical_address_bits: 40,
        }
    }

    /// The error code of the fault, or none.
    fn expected(self, paging: &Paging, entries: &[u64], access: Access) -> Option<u32> {
        let has_xd = self.mode != Mode::TwoLevel;
        let path = entries.iter().fold(Path::OPEN, |path, &entry| path.through(entry));
        let reserved = has_xd && !paging.nxe && path.any_xd;
        let controls =
            Controls { wp: paging.wp, smep: paging.smep, smap: paging.smap, xd: has_xd && paging.nxe };
        if !reserved && permitted(controls, path, attempt(access)) {
            return None;
        }
        let fetch = access.kind == Kind::Fetch && (paging.smep || has_xd && paging.nxe);
        Some(
            1 | u32::from(access.kind == Kind::Write) << 1
                | u32::from(access.user) << 2
                | u32::from(reserved) << 3
                | u32::from(fetch) << 4,
        )
    }

    /// One access, which must come to what the entries say.
    fn check(self, machine: &mut Machine, entries: &[u64], access: Access) -> Landed {
        let paging = machine.cpu.paging;
        let landed = machine.access(Gva(0), access);
        let case = || format!("{self:?} {paging:?} {entries:x?} {access:?}");
        match self.expected(&paging, entries, access) {
            None => assert_eq!(landed, Landed::Ram(Gpa(DATA)), "{}", case()),
            Some(code) => match landed {
                Landed::Fault(fault) => assert_eq!(fault.code.0, code, "{}", case()),
                _ => panic!("{landed:?} {}", case()),
            },
        }
        landed
    }

    /// Every access after every other, under every setting of the control bits.
    fn try_all(self, upper: u64, leaf: u64) {
        let mut machine = Machine::new(3, 64);
        let entries = [upper, leaf];
        let entries = if self.levels == 1 { &entries[1..] } else { &entries[..] };
        for controls in 0..16 {
            self.build(&mut machine, upper, leaf);
            let paging = self.paging(controls);
            machine.set_paging(paging);
            let mut written = false;
            for pair in ACCESSES.iter().flat_map(|first| ACCESSES.iter().map(move |second| [first, second])) {
                for &access in pair {
                    let landed = self.check(&mut machine, entries, access);
                    written |= access.kind == Kind::Write && matches!(landed, Landed::Ram(_));
                    let dirty = machine.peek(TABLES[self.levels - 1]) & bits::D != 0;
                    assert_eq!(
                        dirty, written,
                        "D is set by writes that land: {paging:?} {entries:x?} {pair:?}"
                    );
                }
            }
            machine.audit();
        }
    }
}

#[test]
fn h15_every_combination_of_rights() {
    for shape in SHAPES {
        let entries = if shape.mode == Mode::TwoLevel { 4 } else { 8 };
        let uppers = if shape.levels == 1 { 1 } else { entries };
        for upper in 0..uppers {
            for leaf in 0..entries {
                shape.try_all(rights(upper), rights(leaf));
            }
        }
    }
}

#[test]
fn h15_nothing_of_one_setting_of_the_control_bits_is_left_under_another() {
    // The tables stay as they are: the shadow alone must tell the settings apart.
    for shape in SHAPES.into_iter().filter(|shape| shape.levels != 5 && !shape.large) {
        let entries = if shape.mode == Mode::TwoLevel { 4 } else { 8 };
        for leaf in (0..entries).map(rights) {
            let mut machine = Machine::new(3, 256);
            let upper = bits::W | bits::U;
            shape.build(&mut machine, upper, leaf | bits::A | bits::D);
            for (before, after) in (0..16).flat_map(|before| (0..16).map(move |after| (before, after))) {
                for controls in [before, after] {
                    machine.set_paging(shape.paging(controls));
                    for access in ACCESSES {
                        shape.check(&mut machine, &[upper, leaf], access);
                    }
                }
            }
            machine.audit();
        }
    }
}
