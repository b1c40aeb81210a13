//! The ways to count, behind one face.

mod locks;
mod ours;
mod percpu;
mod shared;

use locks::Locks;
use memory::{Counters, Population};
use percpu::{PerCpu, PerCpuSum};
use shared::Shared;

/// A way to count.
pub trait Way: Sync {
    /// One core's side, which is all that a thread needs to count.
    type Core<'a>: Core
    where
        Self: 'a;

    /// The side of core `core`; asked for once each.
    fn core(&self, core: usize) -> Self::Core<'_>;

    /// How many pages live.
    fn query(&self) -> Answer;
}

/// What a core does when a page comes or goes.
pub trait Core: Send {
    fn allocated(&mut self, guest: usize);
    fn freed(&mut self, guest: usize);
}

/// An answer; signed, since some ways can be wrong to that side, too.
#[derive(Clone, Copy)]
pub struct Answer {
    pub low: i64,
    pub high: i64,
    /// Whether the way says that so many lived at one instant.
    pub exact: bool,
}

impl Answer {
    /// From a way that gives one number and does not say how good it is.
    fn plain(count: i64) -> Self {
        Self { low: count, high: count, exact: false }
    }
}

impl From<Population> for Answer {
    fn from(population: Population) -> Self {
        let exact = matches!(population, Population::Exact(_));
        Self { low: population.low() as i64, high: population.high() as i64, exact }
    }
}

/// How a way is run.
#[derive(Clone, Copy)]
pub struct Setting {
    pub name: &'static str,
    /// Over how many guests the pages go.
    pub guests: usize,
    /// How many cores may count.
    pub cores: usize,
}

/// Something done with each way in turn.
pub trait Visitor {
    fn visit<W: Way>(&mut self, setting: Setting, new: impl Fn() -> W);
}

/// Guests and cores where their number does not matter to the way.
const GUESTS: usize = 100;
const CORES: usize = 4;

/// Shows each way to `visitor`.
pub fn each(visitor: &mut impl Visitor) {
    for (name, guests) in [("locks-1", 1), ("locks-10", 10), ("locks-100", 100), ("locks-1000", 1000)] {
        visitor.visit(Setting { name, guests, cores: CORES }, || Locks::new(guests));
    }
    let setting = |name, cores| Setting { name, guests: GUESTS, cores };
    visitor.visit(setting("shared", CORES), Shared::default);
    visitor.visit(setting("percpu-read-4", 4), || PerCpu::new(4));
    for (name, cpus) in [("percpu-sum-4", 4), ("percpu-sum-64", 64)] {
        visitor.visit(setting(name, cpus), || PerCpuSum(PerCpu::new(cpus)));
    }
    for (name, cores) in [("ours-1", 1), ("ours-2", 2), ("ours-4", 4), ("ours-8", 8), ("ours-64", 64)] {
        visitor.visit(setting(name, cores), || Counters::new(cores));
    }
}
