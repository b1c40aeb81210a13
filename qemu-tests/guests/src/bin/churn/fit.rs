//! Going over leaf tables again and again: as many as there is room for, or far more.

use test_guests::paging::{P, W};
use test_guests::{cpu, println};

use crate::frames;
use crate::space::{Space, USER};

/// One page each.
fn page(table: u64) -> u64 {
    USER + (table << 21)
}

/// All pages are one, which is mapped where each leaf table begins.
fn build(tables: u64) -> Space {
    let (space, frame) = (Space::new(), frames::take());
    for table in 0..tables {
        frames::share(frame);
        cpu::write64(space.slot(page(table), 1), frame | P | W);
    }
    frames::give(frame);
    space
}

/// Rounds between two short-lived processes.
const SHORT_LIVED_EVERY: u64 = 8;
/// Their leaf tables.
const SHORT_LIVED_TABLES: u64 = 4;

/// Two processes with half of the tables each; in each round one page is mapped anew, and at times a small process
/// comes and goes.
pub fn fit(tables: u64, rounds: u64) -> u32 {
    let half = tables / 2;
    let spaces = [build(half), build(half)];
    let begin = cpu::rdtsc();
    for round in 0..rounds {
        for space in spaces {
            space.load();
            go_over(half, round);
            let address = page(round % half);
            let slot = space.slot(address, 1);
            let entry = cpu::read64(slot);
            cpu::write64(slot, 0);
            cpu::invlpg(address);
            cpu::write64(slot, entry);
            cpu::write64(address, round);
        }
        if round % SHORT_LIVED_EVERY == 0 {
            let short_lived = build(SHORT_LIVED_TABLES);
            short_lived.load();
            go_over(SHORT_LIVED_TABLES, round);
            spaces[0].load();
            short_lived.end();
        }
    }
    println!("churn fit: {} ticks", cpu::rdtsc() - begin);
    0
}

/// One process.
pub fn thrash(tables: u64, rounds: u64) -> u32 {
    let space = build(tables);
    space.load();
    let begin = cpu::rdtsc();
    for round in 0..rounds {
        go_over(tables, round);
    }
    println!("churn thrash: {} ticks", cpu::rdtsc() - begin);
    0
}

fn go_over(tables: u64, round: u64) {
    for table in 0..tables {
        cpu::write64(page(table) + 8, round);
    }
}
