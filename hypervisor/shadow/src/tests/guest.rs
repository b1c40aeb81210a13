//! The guest of most tests: an identity map, and one leaf table of its own under the second PML4 slot.

use crate::model::machine::{Machine, identity};
use crate::paging::bits;

/// An entry with everything permitted and used before.
pub const FLAGS: u64 = bits::P | bits::W | bits::U | bits::A | bits::D;
/// Blocks of RAM, 2 MiB each.
pub const BLOCKS: u64 = 4;

/// The PML4. The identity map hangs below its slot 0, in the two pages after it.
pub const PML4: u64 = 0x1_0000;
/// The tables below PML4 slot 1.
pub const PDPT: u64 = 0x1_6000;
/// See [`PDPT`].
pub const PD: u64 = 0x1_7000;
/// See [`PDPT`]; entry `i` maps page `i` of the second block.
pub const PT: u64 = 0x1_8000;
/// The first address that [`PT`] translates.
pub const TOP: u64 = 1 << 39;

/// The guest, its paging on.
pub fn guest() -> Machine {
    guest_on(Machine::new(BLOCKS, 256))
}

/// The same guest on a machine with at least [`BLOCKS`].
pub fn guest_on(mut machine: Machine) -> Machine {
    let paging = identity(&machine, PML4, BLOCKS);
    machine.poke(PML4 + 8, PDPT | FLAGS);
    machine.poke(PDPT, PD | FLAGS);
    machine.poke(PD, PT | FLAGS);
    for i in 0..512 {
        machine.poke(PT + 8 * i, (0x20_0000 + i * 0x1000) | FLAGS);
    }
    machine.set_paging(paging);
    machine
}
