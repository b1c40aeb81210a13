//! Random guests: whatever they do to their tables, after a flush the shadow gives what the tables say.

use memory::{Gpa, Gva};
use proptest::prelude::*;

use super::machine::{Landed, Machine, READ, WRITE, identity, random_guests};
use crate::paging::bits;
use crate::{Access, Kind, Mode, Paging};

const BLOCKS: u64 = 4;
/// Guest frames that serve as tables of any level, and as data.
const POOL: u64 = 0x10_0000;
const POOL_PAGES: u64 = 8;

#[derive(Clone, Debug)]
enum Step {
    /// Store an entry: pool page, index, and what it says.
    Store { page: u64, index: u64, target: u64, flags: u64 },
    /// Store and INVLPG, then look.
    Edit { page: u64, index: u64, target: u64, flags: u64, at: u64, access: Access },
    /// Look after a flush.
    Check { at: u64, access: Access },
    /// Any access, for its effect.
    Touch { at: u64, access: Access },
    /// Run on another root.
    Root { page: u64 },
    /// Change CR0.WP, CR4.SMEP, CR4.SMAP.
    Bits { wp: bool, smep: bool, smap: bool },
    /// Shrink the cache.
    Reclaim { pages: u32 },
    /// A device writes an entry.
    Device { page: u64, index: u64, target: u64, flags: u64 },
}

fn entry() -> impl Strategy<Value = (u64, u64, u64, u64)> {
    // Few indices, so that paths meet; targets in the pool, in RAM, in holes.
    let target = prop_oneof![
        6 => (0..POOL_PAGES).prop_map(|p| POOL + p * 0x1000),
        2 => (0..BLOCKS * 512).prop_map(|p| p << 12),
        2 => (0..BLOCKS).prop_map(|p| p << 21),
        1 => (0..3u64).prop_map(|p| p << 30),
        1 => Just(0xfee0_0000_u64),
    ];
    let flags = prop_oneof![
        8 => (0_u64..8).prop_map(|n| {
            let chosen = [bits::W, bits::U, bits::D].into_iter().enumerate().filter(|(i, _)| n >> i & 1 != 0);
            chosen.fold(bits::P | bits::A, |flags, (_, bit)| flags | bit)
        }),
        4 => Just(bits::P | bits::W | bits::U | bits::A | bits::D),
        1 => Just(bits::P | bits::W | bits::U),
        1 => Just(bits::P | bits::W | bits::U | bits::NX),
        3 => Just(bits::P | bits::W | bits::U | bits::PS),
        1 => Just(bits::P | bits::U | bits::PS),
        2 => Just(0),
        1 => Just(bits::P | 1 << 45),
    ];
    (0..POOL_PAGES, 0_u64..4, target, flags)
}

fn access() -> impl Strategy<Value = Access> {
    (prop_oneof![Just(Kind::Read), Just(Kind::Write), Just(Kind::Fetch)], any::<bool>(), any::<bool>())
        .prop_map(|(kind, user, ac)| Access {
            kind,
            user,
            smap_overridden: !user && ac && kind != Kind::Fetch,
        })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => entry().prop_map(|(page, index, target, flags)| Step::Store { page, index, target, flags }),
        3 => (entry(), 0_u64..256, access()).prop_map(|((page, index, target, flags), at, access)|
            Step::Edit { page, index, target, flags, at, access }),
        6 => (0_u64..256, access()).prop_map(|(at, access)| Step::Check { at, access }),
        6 => (0_u64..256, access()).prop_map(|(at, access)| Step::Touch { at, access }),
        2 => (0..POOL_PAGES).prop_map(|page| Step::Root { page }),
        1 => any::<(bool, bool, bool)>().prop_map(|(wp, smep, smap)| Step::Bits { wp, smep, smap }),
        1 => (1_u32..20).prop_map(|pages| Step::Reclaim { pages }),
        1 => entry().prop_map(|(page, index, target, flags)| Step::Device { page, index, target, flags }),
    ]
}

/// An address made of two-bit indices.
fn address(mode: Mode, at: u64) -> Gva {
    let (a, b, c, d) = (at >> 6 & 3, at >> 4 & 3, at >> 2 & 3, at & 3);
    match mode {
        Mode::FourLevel => Gva(a << 39 | b << 30 | c << 21 | d << 12),
        Mode::TwoLevel => Gva(b << 22 | d << 12),
        _ => Gva(b << 30 | c << 21 | d << 12),
    }
}

fn run(mode: Mode, pages_max: u32, steps: &[Step]) {
    let mut machine = Machine::new(BLOCKS, pages_max);
    // The guest stores through a root of its own that maps RAM to itself; that root is never in the pool.
    let home = identity(&machine, 0x10000, BLOCKS);
    let mut away =
        Paging { mode, cr3: POOL, nxe: mode != Mode::TwoLevel, pse: true, gib_pages: true, ..home };
    let load = |machine: &mut Machine, away: &mut Paging| {
        if mode == Mode::Pae {
            away.pdptes = crate::walk::load_pdptes(&machine.host.ram, away.cr3, 40).unwrap_or_default();
        }
        machine.set_paging(*away);
    };
    let entry_at =
        |page: u64, index: u64| POOL + page * 0x1000 + index * if mode == Mode::TwoLevel { 4 } else { 8 };
    let write = |machine: &Machine, at: u64, value: u64| {
        if mode == Mode::TwoLevel { machine.poke_u32(at, value as u32) } else { machine.poke(at, value) }
    };
    load(&mut machine, &mut away);
    for step in steps {
        match *step {
            Step::Store { page, index, target, flags } => {
                let at = entry_at(page, index);
                machine.set_paging(home);
                assert_eq!(machine.access(Gva(at), WRITE), Landed::Ram(Gpa(at)));
                write(&machine, at, target | flags);
                load(&mut machine, &mut away);
            }
            Step::Edit { page, index, target, flags, at, access } => {
                let gva = address(mode, at);
                // With the tables reachable in the guest's own space this would be one exit; here the edit
                // comes as another processor's would: through the tracker, then INVLPG.
                let at_entry = entry_at(page, index);
                machine.mmu.before_write(&machine.host, Gpa(at_entry).page());
                write(&machine, at_entry, target | flags);
                machine.invlpg(gva);
                machine.audit();
                check(&mut machine, gva, access);
            }
            Step::Check { at, access } => {
                machine.flush();
                machine.audit();
                check(&mut machine, address(mode, at), access);
                // One address would miss most of what is stale.
                for k in 0..24 {
                    check(&mut machine, address(mode, at.wrapping_mul(k * 7 + 5) & 255), access);
                    check(&mut machine, address(mode, at ^ k), READ);
                }
                machine.audit();
            }
            Step::Touch { at, access } => {
                machine.access(address(mode, at), access);
            }
            Step::Root { page } => {
                away.cr3 = POOL + page * 0x1000;
                load(&mut machine, &mut away);
            }
            Step::Bits { wp, smep, smap } => {
                away = Paging { wp, smep, smap, ..away };
                load(&mut machine, &mut away);
            }
            Step::Reclaim { pages } => {
                machine.mmu.reclaim(&machine.host, pages);
            }
            Step::Device { page, index, target, flags } => {
                machine.device_store(POOL + page * 0x1000 + index * 8, target | flags);
                machine.flush();
            }
        }
        machine.audit();
    }
}

fn check(machine: &mut Machine, gva: Gva, access: Access) {
    let expected = machine.expected(gva, access);
    let found = machine.access(gva, access);
    assert_eq!(found, expected, "at {gva:?} for {access:?}");
}

proptest! {
    #![proptest_config(random_guests(100))]

    #[test]
    fn four_level(steps in prop::collection::vec(step(), 1..120)) {
        run(Mode::FourLevel, 256, &steps);
    }

    #[test]
    fn four_level_in_the_smallest_cache(steps in prop::collection::vec(step(), 1..120)) {
        run(Mode::FourLevel, crate::PAGES_MIN, &steps);
    }

    #[test]
    fn pae(steps in prop::collection::vec(step(), 1..120)) {
        run(Mode::Pae, 256, &steps);
    }

    #[test]
    fn two_level(steps in prop::collection::vec(step(), 1..120)) {
        run(Mode::TwoLevel, 256, &steps);
    }
}
