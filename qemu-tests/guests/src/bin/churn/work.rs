//! What kernels do with page tables, in phases, each with a checksum over what was read.

use test_guests::{cpu, println};

use crate::space::{self, Space, USER};
use crate::{mix, modes};

const PROCESSES_MAX: usize = 16;
const PAGES_PER_TABLE: u64 = 2;

/// A page of leaf table `table`. The tables hang on three directories.
fn page(table: u64, which: u64) -> u64 {
    let at = (table * 7 + which * 256) % 512;
    USER + ((table % 3) << 30) + ((table / 3) << 21) + (at << 12)
}

fn pages(tables: u64) -> impl Iterator<Item = u64> {
    (0..tables).flat_map(|table| (0..PAGES_PER_TABLE).map(move |which| page(table, which)))
}

/// All phases; how much of what was read was not what the tables say.
pub fn run(seed: u64, rounds: u64, processes: usize, tables: u64) -> u32 {
    let mut spaces = [None; PROCESSES_MAX];
    for space in &mut spaces[..processes] {
        *space = Some(Space::new());
    }
    let mut work = Work { spaces, processes, tables, sum: seed, bad: 0 };
    work.phase("processes", |work| (0..rounds).for_each(|round| work.switch(round)));
    work.phase("copies", |work| (0..rounds).for_each(|round| work.fork(round)));
    work.phase("moves", |work| (0..rounds).for_each(|round| work.shift(round)));
    space::go_home();
    work.phase("modes", |work| work.sum = mix(work.sum, modes::run(work.sum, rounds)));
    work.phase("at last", |work| work.switch(rounds));
    work.bad
}

struct Work {
    spaces: [Option<Space>; PROCESSES_MAX],
    processes: usize,
    tables: u64,
    sum: u64,
    bad: u32,
}

impl Work {
    fn phase(&mut self, name: &str, work: impl FnOnce(&mut Self)) {
        work(self);
        println!("churn checksum {:016x} after {} page faults: {name}", self.sum, space::faults());
    }

    fn space(&self, number: usize) -> Space {
        self.spaces[number % self.processes].expect("each process has one")
    }

    /// Reads a page, and leaves a trace of all that was read before.
    fn touch(&mut self, address: u64, round: u64) {
        let at = address + ((round * 8) & 0xff8);
        self.sum = mix(self.sum, cpu::read64(at) ^ cpu::read64(address + (self.sum & 0xff8)));
        cpu::write64(at, self.sum);
    }

    fn read_all(&mut self) {
        for address in pages(self.tables) {
            self.sum = mix(self.sum, cpu::read64(address) ^ cpu::read64(address + 8));
        }
    }

    /// Each process in turn goes over its pages.
    fn switch(&mut self, round: u64) {
        for number in 0..self.processes {
            let space = self.space(number * 5 + round as usize);
            space.load();
            for step in 0..self.tables {
                let table = (step * 11 + round) % self.tables;
                self.touch(page(table, step & 1), round);
            }
            self.bad += space.differences(pages(self.tables));
        }
    }

    /// What the words that this round changes hold now.
    fn content(&self, round: u64) -> u64 {
        pages(self.tables).fold(0, |sum, address| mix(sum, cpu::read64(address + ((round * 8) & 0xff8))))
    }

    /// A process makes a copy of itself, both write, neither sees what the other wrote, one of them ends.
    fn fork(&mut self, round: u64) {
        let number = round as usize % self.processes;
        let parent = self.space(number);
        parent.load();
        let before = self.content(round);
        let child = parent.fork();
        for (which, space) in [child, parent, child].into_iter().enumerate() {
            space.load();
            let own = self.content(round);
            if (own == before) != (which < 2) {
                println!("churn: a copy is not one: BAD");
                self.bad += 1;
            }
            for table in (which as u64..self.tables).step_by(2 + which) {
                self.touch(page(table, round & 1), round);
            }
            self.read_all();
            self.bad += space.differences(pages(self.tables));
        }
        space::go_home();
        let (stays, ends) = if round & 1 == 0 { (child, parent) } else { (parent, child) };
        ends.end();
        self.spaces[number] = Some(stays);
    }

    /// Pages, and then whole tables, change their places; some go and come back empty.
    fn shift(&mut self, round: u64) {
        let space = self.space(round as usize);
        space.load();
        for table in 1..self.tables {
            let (one, other) = (page(table - 1, 0), page(table, 1));
            self.exchange(space, one, other, 1);
            self.touch(one, round);
            self.touch(other, round);
        }
        for table in (3..self.tables).step_by(4) {
            let (one, other) = (page(table, 0), page(table - 3, 0));
            self.exchange(space, one, other, 2);
            // The exchanged tables' pages are elsewhere too: what the processor may remember of them goes.
            cpu::write_cr3(cpu::read_cr3());
            self.touch(one, round);
            self.touch(other, round);
        }
        let gone = page(round % self.tables, 1);
        let slot = space.slot(gone, 1);
        let entry = cpu::read64(slot);
        cpu::write64(slot, 0);
        cpu::invlpg(gone);
        self.touch(gone, round);
        cpu::write64(slot, entry);
        cpu::invlpg(gone);
        self.read_all();
        self.bad += space.differences(pages(self.tables));
    }

    fn exchange(&mut self, space: Space, one: u64, other: u64, level: u32) {
        let (first, second) = (space.slot(one, level), space.slot(other, level));
        let (at_first, at_second) = (cpu::read64(first), cpu::read64(second));
        cpu::write64(first, at_second);
        cpu::write64(second, at_first);
        cpu::invlpg(one);
        cpu::invlpg(other);
    }
}
