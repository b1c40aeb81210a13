//! The stock with its cores, and what is looked at when they are done.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use loom::thread;

use super::super::*;
use super::history::{Account, Step, Timed, locked};
use crate::address::BLOCK_PAGES;
use crate::frames::defect::with;

/// Blocks of every pool here; the second has single frames only.
const BLOCKS: usize = 2;
pub const SECOND: u32 = BLOCK_PAGES as u32;

/// The stock, and the moments of what happens to it.
struct World {
    stock: Stock,
    clock: Plain,
}

/// What runs on one core.
pub struct Core {
    world: Arc<World>,
    pub core: usize,
    held: Vec<u32>,
    steps: Vec<Timed>,
}

impl Core {
    fn step(&mut self, ask: impl FnOnce(&Stock) -> Step) -> Step {
        let now = || self.world.clock.fetch_add(1, Relaxed);
        let began = now();
        let step = ask(&self.world.stock);
        self.steps.push(Timed { step, began, ended: now() });
        step
    }

    pub fn take(&mut self, claim: Claim) {
        let core = self.core;
        let step = self.step(|stock| Step::Take { claim, limit: BLOCKS, taken: stock.take(core, claim) });
        self.hold(step);
    }

    pub fn take_below(&mut self, limit: usize, claim: Claim) {
        let step = self.step(|stock| Step::Take { claim, limit, taken: stock.take_below(limit, claim) });
        self.hold(step);
    }

    fn hold(&mut self, step: Step) {
        if let Step::Take { taken: Some(index), .. } = step {
            self.held.push(index);
        }
    }

    /// Puts back what it took last.
    pub fn put(&mut self) {
        let (core, Some(index)) = (self.core, self.held.pop()) else { return };
        self.step(|stock| {
            stock.put(core, index);
            Step::Put(index)
        });
    }

    /// Takes a block and, if there is one, puts it back.
    pub fn take_and_put_block(&mut self) {
        let taken = self
            .step(|stock| Step::TakeBlock(stock.take_beside(BLOCK_PAGES, Claim::Guest, Pool::take_block)));
        if let Step::TakeBlock(Some(first)) = taken {
            self.step(|stock| {
                stock.put_beside(BLOCK_PAGES, |pool| pool.put_block(first));
                Step::PutBlock(first)
            });
        }
    }

    pub fn set_marks(&mut self, marks: Marks) {
        self.step(|stock| {
            stock.set_marks(marks, None).unwrap();
            Step::SetMarks(marks, None)
        });
    }

    pub fn set_budget(&mut self, marks: Marks, least_frames: u64) {
        self.step(|stock| {
            stock.set_marks(marks, Some(least_frames)).unwrap();
            Step::SetMarks(marks, Some(least_frames))
        });
    }

    pub fn free_frames(&mut self) {
        self.step(|stock| Step::Free(stock.free_frames()));
    }

    pub fn pressure(&mut self) {
        self.step(|stock| Step::Pressure(stock.pressure()));
    }

    /// Asks where the answer is the same at any time.
    pub fn finds_plenty(&mut self) {
        let stock = &self.world.stock;
        assert_eq!(stock.pressure(), Pressure::Plenty, "pressed by what is beside the budget");
        assert_eq!(stock.shortfall_frames(), 0, "short of what is beside the budget");
    }

    pub fn shortfall(&mut self) {
        self.step(|stock| Step::Shortfall(stock.shortfall_frames()));
    }
}

pub fn marks(min_frames: u64, low_frames: u64, high_frames: u64) -> Marks {
    Marks::new(min_frames, low_frames, high_frames).unwrap()
}

/// Where a model begins: who runs on which core, holding what.
pub struct Start {
    world: Arc<World>,
    cores: Vec<Core>,
    pub account: Account,
}

impl Start {
    /// `frames` free ones and two caches, both open with a batch each; a third core has none. Every core holds a frame.
    pub fn open(frames: impl Iterator<Item = u32>) -> Self {
        let frames: Vec<u32> = frames.collect();
        let mut pool = Pool::new(BLOCKS, 0);
        frames.iter().for_each(|&index| pool.put(index));
        let lowest = marks(0, 1, 2);
        let stock = Stock::new(pool, frames.len() as u64, 2, lowest);
        let world = Arc::new(World { stock, clock: Plain::new(0) });
        let core = |core| Core { world: Arc::clone(&world), core, held: Vec::new(), steps: Vec::new() };
        let cores = (0..3).map(core).collect();
        let mut start = Self { world, cores, account: Account::new(frames, lowest) };
        for core in 0..3 {
            start.on(core, |core| core.take(Claim::Guest));
        }
        start
    }

    /// Does something before the model begins.
    pub fn on(&mut self, core: usize, work: impl FnOnce(&mut Core)) {
        let core = &mut self.cores[core];
        work(core);
        for timed in core.steps.drain(..) {
            assert!(self.account.follow(timed.step), "{timed:?}");
        }
    }

    /// Empties a cache that is open.
    pub fn empty(&mut self, core: usize) {
        for _ in 0..BATCH_FRAMES {
            self.on(core, |core| core.take(Claim::Guest));
        }
    }

    /// Sets the marks to: `low` so far below the pool's number, `min` so far below what is free, `high` so far above
    /// that.
    pub fn marks(&mut self, pooled_above_low: u64, free_above_min: u64, high_above_free: u64) {
        let free = self.account.count();
        let low = self.world.stock.posted.pooled().0 - pooled_above_low;
        let marks = marks(free - free_above_min, low, free + high_above_free);
        self.on(2, |core| core.set_marks(marks));
    }

    /// Closes the caches.
    pub fn closed(&mut self) {
        let free = self.account.count();
        self.on(2, |core| core.set_marks(marks(free - 1, free, free + 1)));
    }

    /// Lets each core do its part at once with the others, and looks at what became of it. What they were answered.
    pub fn run(self, parts: &[fn(&mut Core)]) -> String {
        let Self { world, cores, mut account } = self;
        let mut cores = cores.into_iter();
        let mut first = cores.next().unwrap();
        let others: Vec<_> = cores
            .zip(&parts[1..])
            .map(|(mut core, &part)| {
                thread::spawn(move || {
                    part(&mut core);
                    core.steps
                })
            })
            .collect();
        parts[0](&mut first);
        let mut steps = vec![first.steps];
        steps.extend(others.into_iter().map(|other| other.join().unwrap()));
        assert!(account.clone().explain(&locked(&steps), true), "no order of claims explains {steps:#?}");
        assert!(account.explain(&steps, false), "no order explains {steps:#?}");
        at_rest(&world.stock, &account);
        let answers: Vec<Vec<Step>> =
            steps.iter().map(|steps| steps.iter().map(|it| it.step).collect()).collect();
        format!("{answers:?}")
    }
}

/// Nobody takes or puts.
fn at_rest(stock: &Stock, account: &Account) {
    let (free_frames, pressure) = (stock.free_frames(), stock.pressure());
    let shortfall = stock.shortfall_frames();
    for step in [Step::Free(free_frames), Step::Pressure(pressure), Step::Shortfall(shortfall)] {
        assert!(account.clone().follow(step), "at rest with {} free: {step:?}", account.count());
    }
    let mut guarded = stock.guarded.lock();
    let mut free: Vec<u32> = iter::from_fn(|| guarded.pool.take(usize::MAX)).collect();
    assert_eq!(free.len() as u64, guarded.pooled, "the pool does not hold what it counts");
    assert_eq!(stock.posted.pooled(), (guarded.pooled, guarded.open == 0));
    let mut open = 0;
    for cache in &stock.caches {
        let mut stack = cache.stack.lock();
        let frames: Vec<u32> = iter::from_fn(|| stack.pop()).collect();
        assert!(stack.open || frames.is_empty(), "a closed cache holds frames");
        open += usize::from(stack.open);
        free.extend(frames);
    }
    assert_eq!(open, guarded.open);
    assert!(open == 0 || guarded.pooled > guarded.marks.low_frames(), "caches are open at the mark");
    assert_eq!(free.len() as u64, account.count(), "frames are lost");
    free.sort_unstable();
    free.dedup();
    assert_eq!(free.len() as u64, account.count(), "a frame is there twice");
    assert!(free.iter().all(|&index| account.is_free(index)));
}

/// In every interleaving, or in those with up to so many preemptions. All that the cores were answered.
pub fn check(
    preemptions: Option<usize>,
    model: impl Fn() -> String + Sync + Send + 'static,
) -> HashSet<String> {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let in_model = Arc::clone(&seen);
    builder.check(move || _ = in_model.lock().unwrap().insert(model()));
    core::mem::take(&mut *seen.lock().unwrap())
}

/// Two preemptions are enough for `defect` to make the model fail, and say `what`.
pub fn must_fail(defect: Defect, what: &str, model: impl Fn() -> String + Sync + Send + 'static) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        with(defect, || check(Some(2), model));
    }));
    with(defect, || ()); // switched off, though the run panicked
    let Err(payload) = result else { panic!("the model does not see {defect:?}") };
    let said = payload.downcast_ref::<String>().map(String::as_str);
    let said = said.or(payload.downcast_ref::<&str>().copied()).unwrap_or_default();
    assert!(said.contains(what), "{defect:?} fails otherwise: {said}");
}
