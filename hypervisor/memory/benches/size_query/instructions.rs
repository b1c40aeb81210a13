//! Operations by the number, by one thread, for callgrind: the difference of two runs is that of their operations.
//! The way `nothing` is the loop around them.

use std::hint::black_box;

use crate::load::BURST;
use crate::ways::{Answer, Core, Setting, Visitor, Way, each};

struct Execute<'a> {
    way: &'a str,
    update: bool,
    times: u64,
    found: bool,
}

/// Executes `times` operations on the way with this name.
pub fn execute(way: &str, operation: &str, times: &str) {
    let update = match operation {
        "update" => true,
        "query" => false,
        _ => panic!("{operation} is neither query nor update"),
    };
    let times = times.parse().expect("a number of operations");
    let mut execute = Execute { way, update, times, found: false };
    execute.visit(Setting { name: "nothing", guests: 1, cores: 1 }, || Nothing);
    each(&mut execute);
    assert!(execute.found, "there is no way {way}");
}

impl Visitor for Execute<'_> {
    fn visit<W: Way>(&mut self, setting: Setting, new: impl Fn() -> W) {
        if setting.name != self.way {
            return;
        }
        self.found = true;
        let way = new();
        let mut core = way.core(0);
        if !self.update {
            core.allocated(0);
            (0..self.times).for_each(|_| _ = black_box(black_box(&way).query()));
            return;
        }
        for _ in 0..self.times / (2 * BURST) {
            (0..BURST).for_each(|_| core.allocated(black_box(0)));
            (0..BURST).for_each(|_| core.freed(black_box(0)));
        }
    }
}

/// What does not count.
struct Nothing;

impl Way for Nothing {
    type Core<'a> = Self;

    fn core(&self, _: usize) -> Self {
        Self
    }

    fn query(&self) -> Answer {
        Answer { low: 0, high: 0, exact: false }
    }
}

impl Core for Nothing {
    fn allocated(&mut self, _: usize) {}

    fn freed(&mut self, _: usize) {}
}
