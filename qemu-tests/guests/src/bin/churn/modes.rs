//! The same in 32-bit paging and in PAE, two roots each, step by step.

use test_guests::legacy::{Do, Script, poke, set_exception_gates};

use crate::mix;

/// Leaf tables of each root.
const TABLES: u32 = 24;
const TWO_LEVEL: [u32; 2] = [0x80_0000, 0x84_0000];
const PAE: [u32; 2] = [0x88_0000, 0x8c_0000];
/// Pages that are mapped by turns.
const FRAMES: u32 = 0x90_0000;
const FRAME_COUNT: u32 = 2 * TABLES;
/// Where the leaf tables' pages begin.
const PAGES: u32 = 1 << 30;
/// Each root's leaf tables lie this far above it.
const LEAVES: u32 = 0x1_0000;

const CR0: u32 = 0x8001_0011;
const CR0_OFF: u32 = 0x11;
const PSE: u32 = 1 << 4;
const PAE_BIT: u32 = 1 << 5;
/// Four bytes each.
const IDENTITY_BYTES: u32 = 64 << 20;

fn clear(begin: u32, end: u32) {
    (begin..end).step_by(4).for_each(|address| poke(address, 0));
}

fn tables() {
    clear(TWO_LEVEL[0], FRAMES + FRAME_COUNT * 4096);
    for root in TWO_LEVEL {
        for n in 0..IDENTITY_BYTES >> 22 {
            poke(root + 4 * n, n << 22 | 0x83);
        }
        for n in 0..TABLES {
            poke(root + 4 * ((PAGES >> 22) + n), (root + LEAVES + n * 4096) | 3);
        }
    }
    for root in PAE {
        poke(root, (root + 0x1000) | 1);
        poke(root + 8, (root + 0x2000) | 1);
        for n in 0..IDENTITY_BYTES >> 21 {
            poke(root + 0x1000 + 8 * n, n << 21 | 0x83);
        }
        for n in 0..TABLES {
            poke(root + 0x2000 + 8 * n, (root + LEAVES + n * 4096) | 3);
        }
    }
}

/// What was read, all of it folded into one.
pub fn run(seed: u64, rounds: u64) -> u64 {
    tables();
    set_exception_gates();
    (0..rounds as u32).fold(seed, round)
}

fn round(sum: u64, round: u32) -> u64 {
    let mut script = Script::<400>::default();
    let mut reads = [0; 4 * TABLES as usize];
    let mut reads_left = reads.iter_mut();
    for (roots, cr4, shift, entry_bytes) in [(TWO_LEVEL, PSE, 22, 4), (PAE, PAE_BIT, 21, 8)] {
        script.add(Do::WriteCr0, CR0_OFF, 0);
        script.add(Do::WriteCr4, cr4, 0);
        for (which, root) in (0_u32..).zip(roots) {
            script.add(Do::WriteCr3, root, 0);
            script.add(Do::WriteCr0, CR0, 0);
            for n in 0..TABLES {
                let at = (n * 37 + round) % 512;
                let page = PAGES + (n << shift) + (at << 12);
                let frame = FRAMES + ((n * 5 + which + 3 * round) % FRAME_COUNT) * 4096;
                script.add(Do::Write, root + LEAVES + n * 4096 + at * entry_bytes, frame | 3);
                script.add(Do::Invlpg, page, 0);
                script.add(Do::Write, page + 4 * (n + 1), sum as u32 ^ n << 8 ^ round);
                if let Some(read) = reads_left.next() {
                    *read = script.add(Do::Read, page + 4 * (n % 7 + 1), 0);
                }
            }
        }
    }
    script.run();
    reads.iter().fold(sum, |sum, &read| {
        let step = script.step(read);
        mix(sum, u64::from(step.result) ^ u64::from(step.vector) << 32)
    })
}
