//! Random guests that flush little: every access must be one that a TLB may still give.
//!
//! The oracle keeps, for every entry, the values it had and when each was overwritten. An access that lands must
//! land where some choice of values leads that a processor may hold: the present ones, and old ones that no flush
//! of the address came after. A fault must be what the tables say now.

use memory::{Gpa, GuestMemory, Gva};
use proptest::prelude::*;

use super::architecture::{Controls, Path, permitted};
use super::machine::{Landed, Machine, WRITE, config, random_guests};
use crate::paging::bits;
use crate::{Access, Config, Kind, Mode, PAGES_MIN, Paging, walk};

const PAGES: u64 = 10;
const ADDRESSES: u64 = 16;
const ALL: u64 = bits::P | bits::W | bits::U | bits::A | bits::D;

/// What a toggle changes; the last is reserved in PAE tables, and nobody's in others.
const TOGGLED: [u64; 6] = [bits::W, bits::U, bits::NX, bits::A, bits::D, 1 << 52];

/// Page `p` of the pool of tables, which lies in two blocks.
fn pool(p: u64) -> u64 {
    0x20_0000 + (p & 1) * 0x20_0000 + (p >> 1) * 0x1000
}

#[derive(Clone, Debug)]
enum Step {
    /// A device writes an entry.
    Device {
        page: u64,
        spot: u64,
        value: u64,
    },
    /// A device, as a kernel does for mprotect or for ageing, changes one bit of an entry.
    Toggle {
        page: u64,
        spot: u64,
        bit: u64,
    },
    /// The guest writes the page at an address; if that is a table, an entry.
    Store {
        at: u64,
        spot: u64,
        value: u64,
    },
    Access(u64, Access),
    Invlpg(u64),
    Flush,
    /// MOV to CR3.
    Root(u64),
    /// CR0.WP, CR4.SMEP, CR4.SMAP, EFER.NXE.
    Bits {
        wp: bool,
        smep: bool,
        smap: bool,
        nxe: bool,
    },
    Reclaim(u32),
    /// The other vCPU runs, on its own root.
    Switch,
    /// A fault, and before its fill a write by the other vCPU.
    Race {
        at: u64,
        access: Access,
        page: u64,
        spot: u64,
        value: u64,
    },
}

fn value() -> impl Strategy<Value = u64> {
    let target = prop_oneof![
        10 => (0..PAGES).prop_map(pool),
        1 => (0..4_u64).prop_map(|b| b << 21),
        1 => Just(0xfee0_0000_u64),
    ];
    let flags = prop_oneof![
        8 => Just(ALL),
        1 => Just(ALL & !bits::W),
        1 => Just(ALL & !bits::U),
        1 => Just(ALL & !bits::D),
        1 => Just(ALL & !bits::A),
        1 => Just(ALL | bits::NX),
        2 => Just(ALL | bits::PS),
        2 => Just(0_u64),
    ];
    (target, flags).prop_map(|(target, flags)| if flags == 0 { 0 } else { target | flags })
}

fn access() -> impl Strategy<Value = Access> {
    (prop_oneof![Just(Kind::Read), Just(Kind::Write), Just(Kind::Fetch)], any::<bool>())
        .prop_map(|(kind, user)| Access { kind, user, smap_overridden: false })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..PAGES, 0..4_u64, value()).prop_map(|(page, spot, value)| Step::Device { page, spot, value }),
        4 => (0..ADDRESSES, 0..4_u64, value()).prop_map(|(at, spot, value)| Step::Store { at, spot, value }),
        4 => (0..PAGES, 0..4_u64, prop::sample::select(TOGGLED.to_vec()))
            .prop_map(|(page, spot, bit)| Step::Toggle { page, spot, bit }),
        12 => (0..ADDRESSES, access()).prop_map(|(at, access)| Step::Access(at, access)),
        3 => (0..ADDRESSES).prop_map(Step::Invlpg),
        1 => Just(Step::Flush),
        1 => (0..PAGES).prop_map(Step::Root),
        1 => any::<(bool, bool, bool, bool)>()
            .prop_map(|(wp, smep, smap, nxe)| Step::Bits { wp, smep, smap, nxe }),
        1 => (1..30_u32).prop_map(Step::Reclaim),
        1 => Just(Step::Switch),
    ]
}

fn step_or_race() -> impl Strategy<Value = Step> {
    let race = (0..ADDRESSES, access(), 0..PAGES, 0..4_u64, value())
        .prop_map(|(at, access, page, spot, value)| Step::Race { at, access, page, spot, value });
    prop_oneof![15 => step(), 1 => race]
}

/// Address number `at`: few indices at each level, so that paths meet.
fn address(mode: Mode, at: u64) -> Gva {
    let (three, two, one, zero) = (at >> 3 & 1, at >> 2 & 1, at >> 1 & 1, at & 1);
    Gva(match mode {
        Mode::FiveLevel => three << 48 | three << 39 | two << 30 | one << 21 | zero << 12,
        Mode::FourLevel => three << 39 | two << 30 | one << 21 | zero << 12,
        Mode::Pae => (at >> 2 & 3) << 30 | one << 21 | zero << 12,
        // Both halves of the directory and of a table: all quadrants.
        Mode::TwoLevel => (three * 512 + two) << 22 | (one * 512 + zero) << 12,
        Mode::Off => at << 12,
    })
}

/// Where entry number `spot` of the pool's page `page` lies.
fn entry_at(mode: Mode, page: u64, spot: u64) -> u64 {
    page + match mode {
        Mode::TwoLevel => 4 * ((spot >> 1) * 512 + (spot & 1)),
        _ => 8 * (spot & 1),
    }
}

/// What one vCPU's TLB may still hold: from when on.
#[derive(Clone, Copy, Default)]
struct Since {
    flush: u64,
    invlpg: [u64; ADDRESSES as usize],
}

struct Oracle {
    mode: Mode,
    now: u64,
    since: Since,
    /// Of the vCPU that waits.
    parked: Since,
    /// (when overwritten, where, the value until then)
    old: Vec<(u64, u64, u64)>,
}

/// An access that landed.
#[derive(Clone, Copy)]
struct Question {
    at: u64,
    access: Access,
    landed: u64,
}

impl Oracle {
    fn load(&self, machine: &Machine, gpa: u64) -> u64 {
        match self.mode {
            Mode::TwoLevel => machine.host.ram.load_u32(Gpa(gpa)).map_or(0, u64::from),
            _ => machine.host.ram.load_u64(Gpa(gpa)).unwrap_or(0),
        }
    }

    fn write(&mut self, machine: &Machine, gpa: u64, value: u64) {
        self.old.push((self.now, gpa, self.load(machine, gpa)));
        let aligned = |size: u64| value & !(((1 << size) - 1) & bits::FRAME);
        let large = value & bits::PS != 0;
        match self.mode {
            Mode::TwoLevel => machine.poke_u32(gpa, if large { aligned(22) } else { value } as u32),
            _ => machine.poke(gpa, if large { aligned(21) } else { value }),
        }
    }

    fn device_write(&mut self, machine: &mut Machine, gpa: u64, value: u64) {
        machine.mmu.before_write(&machine.host, Gpa(gpa).page());
        self.write(machine, gpa, value);
    }

    /// When the leaf of `span_shift` bits that covers address `at` was last flushed: with the whole of a large
    /// page, whichever of its addresses INVLPG named.
    fn last_flush(&self, at: u64, span_shift: u32) -> u64 {
        let page = |at| address(self.mode, at).0 >> span_shift;
        (0..ADDRESSES)
            .filter(|&other| page(other) == page(at))
            .map(|other| self.since.invlpg[other as usize])
            .fold(self.since.flush, u64::max)
    }

    /// Whether the table at `table` leads where the access landed, by values that a TLB may hold.
    fn allows(&self, machine: &Machine, q: Question, level: u8, table: u64, path: Path) -> bool {
        let paging = &machine.cpu.paging;
        let gva = address(self.mode, q.at);
        let gpa = paging.entry_address(Gpa(table).page(), paging.guest_index(level, gva)).0;
        let present = core::iter::once((u64::MAX, self.load(machine, gpa)));
        let old = self.old.iter().filter(|old| old.1 == gpa).map(|old| (old.0, old.2));
        present.chain(old).any(|(until, value)| {
            if value & (bits::P | bits::A) != bits::P | bits::A || value & paging.reserved(level, value) != 0
            {
                return false; // no processor caches it
            }
            let leaf = paging.is_leaf(level, value);
            let span_shift = if leaf { paging.span_shift(level) } else { 12 };
            if until <= self.last_flush(q.at, span_shift) {
                return false;
            }
            let path = path.through(value);
            if !leaf {
                let below = paging.table_gfn(value).address().0;
                return self.allows(machine, q, level - 1, below, path);
            }
            let base = paging.leaf_gfn(level, value).address().0;
            let controls = Controls {
                wp: paging.wp,
                smep: paging.smep,
                smap: paging.smap,
                xd: paging.nxe && self.mode != Mode::TwoLevel,
            };
            base + (gva.0 & ((1 << span_shift) - 1)) == q.landed
                && permitted(controls, path, q.access)
                && (q.access.kind != Kind::Write || value & bits::D != 0)
        })
    }

    fn check(&self, machine: &mut Machine, at: u64, access: Access) -> Landed {
        let gva = address(self.mode, at);
        let expected = machine.expected(gva, access);
        let found = machine.access(gva, access);
        match found {
            Landed::Fault(_) => assert_eq!(found, expected, "{gva:?} {access:?}: a fault is never stale"),
            Landed::Ram(gpa) | Landed::Mmio(gpa) => {
                let q = Question { at, access, landed: gpa.0 };
                let paging = machine.cpu.paging;
                let allowed = match self.mode {
                    Mode::Off => gva.0 == gpa.0,
                    Mode::Pae => {
                        let pdpte = paging.pdptes[(gva.0 >> 30) as usize];
                        pdpte & bits::P != 0 && self.allows(machine, q, 2, pdpte & bits::FRAME, Path::OPEN)
                    }
                    Mode::TwoLevel => self.allows(machine, q, 2, paging.cr3, Path::OPEN),
                    Mode::FourLevel => self.allows(machine, q, 4, paging.cr3, Path::OPEN),
                    Mode::FiveLevel => self.allows(machine, q, 5, paging.cr3, Path::OPEN),
                };
                assert!(allowed, "{gva:?} {access:?} landed at {gpa:?}; the tables say {expected:?}");
            }
        }
        found
    }
}

/// CR3 number `k`. In PAE mode there are two values of CR3 only: most reloads change PDPTEs alone.
fn registers(paging: Paging, k: u64) -> Paging {
    if paging.mode != Mode::Pae {
        return Paging { cr3: pool(k), ..paging };
    }
    let pdpte = |i: u64| if (k + i) % 5 == 4 { 0 } else { pool((k + i) % PAGES) | bits::P };
    Paging { cr3: pool(k & 1), pdptes: core::array::from_fn(|i| pdpte(i as u64)), ..paging }
}

fn run(mode: Mode, pages_max: u32, split_executable: bool, steps: &[Step]) {
    let mut machine = Machine::configured(4, Config { split_executable, ..config(pages_max, 2) });
    let mut paging = Paging {
        mode,
        nxe: true,
        wp: true,
        pse: true,
        gib_pages: true,
        physical_address_bits: 40,
        ..Paging::default()
    };
    paging = registers(paging, 0);
    let mut oracle =
        Oracle { mode, now: 1, since: Since::default(), parked: Since::default(), old: Vec::new() };
    for page in 0..PAGES {
        for spot in 0..4 {
            oracle.write(&machine, entry_at(mode, pool(page), spot), pool((page + spot + 1) % PAGES) | ALL);
        }
    }
    oracle.old.clear();
    machine.set_paging(paging);
    machine.next_vcpu();
    machine.set_paging(paging);
    for step in steps {
        oracle.now += 1;
        match *step {
            Step::Device { page, spot, value } => {
                oracle.device_write(&mut machine, entry_at(mode, pool(page), spot), value);
            }
            Step::Toggle { page, spot, bit } => {
                let gpa = entry_at(mode, pool(page), spot);
                let value = oracle.load(&machine, gpa) ^ bit;
                oracle.device_write(&mut machine, gpa, value);
            }
            Step::Race { at, access, page, spot, value } => {
                let gva = address(mode, at);
                let found = walk::walk(&machine.cpu.paging, &machine.host.ram, gva, access);
                oracle.device_write(&mut machine, entry_at(mode, pool(page), spot), value);
                if let Ok(found) = found {
                    machine.ready();
                    machine.mmu.fill(&machine.host, &machine.cpu, gva, access, &found);
                }
            }
            Step::Store { at, spot, value } => {
                if let Landed::Ram(gpa) = oracle.check(&mut machine, at, WRITE)
                    && (0..PAGES).any(|p| pool(p) == gpa.0)
                {
                    oracle.write(&machine, entry_at(mode, gpa.0, spot), value);
                }
            }
            Step::Access(at, access) => {
                oracle.check(&mut machine, at, access);
            }
            Step::Invlpg(at) => {
                machine.invlpg(address(mode, at));
                oracle.since.invlpg[at as usize] = oracle.now;
            }
            Step::Flush => {
                machine.flush();
                oracle.since.flush = oracle.now;
            }
            Step::Root(k) => {
                paging = registers(paging, k);
                machine.set_paging(paging);
                oracle.since.flush = oracle.now;
            }
            Step::Bits { wp, smep, smap, nxe } => {
                paging = Paging { wp, smep, smap, nxe, ..paging };
                machine.set_paging(paging);
                oracle.since.flush = oracle.now;
            }
            Step::Reclaim(pages) => {
                machine.mmu.reclaim(&machine.host, pages);
            }
            Step::Switch => {
                machine.next_vcpu();
                core::mem::swap(&mut oracle.since, &mut oracle.parked);
                paging = machine.cpu.paging;
            }
        }
        machine.audit();
    }
}

proptest! {
    #![proptest_config(random_guests(150))]

    #[test]
    fn four_level(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::FourLevel, 256, false, &steps);
    }

    #[test]
    fn four_level_in_the_smallest_cache(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::FourLevel, PAGES_MIN, false, &steps);
    }

    #[test]
    fn four_level_with_executable_pages_split(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::FourLevel, 64, true, &steps);
    }

    #[test]
    fn five_level(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::FiveLevel, 64, false, &steps);
    }

    #[test]
    fn pae(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::Pae, 256, false, &steps);
    }

    #[test]
    fn pae_in_the_smallest_cache(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::Pae, PAGES_MIN, false, &steps);
    }

    #[test]
    fn two_level(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::TwoLevel, 256, false, &steps);
    }

    #[test]
    fn two_level_in_the_smallest_cache(steps in prop::collection::vec(step(), 1..100)) {
        run(Mode::TwoLevel, PAGES_MIN, false, &steps);
    }

    #[test]
    fn four_level_with_races(steps in prop::collection::vec(step_or_race(), 1..100)) {
        run(Mode::FourLevel, 256, false, &steps);
    }
}
