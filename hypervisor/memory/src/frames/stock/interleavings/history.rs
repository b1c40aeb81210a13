//! What cores asked of the stock and were answered, and whether an allocator that does one thing at a time and keeps
//! no caches could have answered so.

use crate::address::BLOCK_PAGES;
use crate::frames::{Claim, Marks, Pressure};

/// Room for every index that a model uses.
const INDICES: usize = 2 * BLOCK_PAGES as usize;

/// A question with its answer.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A frame of any block, or of those below the limit.
    Take {
        claim: Claim,
        limit: usize,
        taken: Option<u32>,
    },
    Put(u32),
    TakeBlock(Option<u32>),
    PutBlock(u32),
    SetMarks(Marks, Option<u64>),
    Free(u64),
    Pressure(Pressure),
    Shortfall(u64),
}

impl Step {
    /// Whether it was asked without the pool's lock and without a cache's.
    fn is_query(self) -> bool {
        matches!(self, Self::Free(_) | Self::Pressure(_) | Self::Shortfall(_))
    }
}

/// A step, with the moments when it was asked and answered.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    pub step: Step,
    pub began: u64,
    pub ended: u64,
}

/// The allocator that does one thing at a time.
#[derive(Clone)]
pub struct Account {
    free: [bool; INDICES],
    count: u64,
    marks: Marks,
    budget_least_frames: Option<u64>,
    blocks_of_budget: u64,
}

impl Account {
    pub fn new(free: impl IntoIterator<Item = u32>, marks: Marks) -> Self {
        let mut account =
            Self { free: [false; INDICES], count: 0, marks, budget_least_frames: None, blocks_of_budget: 0 };
        free.into_iter().for_each(|index| assert!(account.put(index)));
        account
    }

    fn put(&mut self, index: u32) -> bool {
        self.count += 1;
        !core::mem::replace(&mut self.free[index as usize], true)
    }

    fn take(&mut self, index: u32) -> bool {
        self.count -= 1;
        core::mem::replace(&mut self.free[index as usize], false)
    }

    fn block(first: u32) -> core::ops::Range<u32> {
        first..first + BLOCK_PAGES as u32
    }

    /// Does the step, if it can be answered as it was.
    pub fn follow(&mut self, step: Step) -> bool {
        match step {
            Step::Take { claim, limit, taken } => {
                let keep = if claim == Claim::Guest { self.marks.min_frames() } else { 0 };
                let below = (limit as u64).saturating_mul(BLOCK_PAGES).min(INDICES as u64);
                match taken {
                    Some(index) => self.count > keep && u64::from(index) < below && self.take(index),
                    None => self.count <= keep || !self.free[..below as usize].contains(&true),
                }
            }
            Step::Put(index) => self.put(index),
            Step::TakeBlock(taken) => self.take_block(taken),
            Step::PutBlock(first) => {
                if self.blocks_of_budget > 0 {
                    self.blocks_of_budget -= 1;
                } else if self.budget_least_frames.is_some() {
                    self.marks = self.marks.moved(|mark| mark + BLOCK_PAGES);
                }
                Self::block(first).all(|index| self.put(index))
            }
            Step::SetMarks(marks, budget_least_frames) => {
                (self.marks, self.budget_least_frames, self.blocks_of_budget) =
                    (marks, budget_least_frames, 0);
                true
            }
            Step::Free(count) => count == self.count,
            Step::Pressure(pressure) => {
                let marks = self.marks;
                pressure
                    == match self.count {
                        count if count > marks.low_frames() => Pressure::Plenty,
                        count if count > marks.min_frames() => Pressure::Low,
                        _ => Pressure::Min,
                    }
            }
            Step::Shortfall(missing) => missing == self.marks.high_frames().saturating_sub(self.count),
        }
    }

    fn take_block(&mut self, taken: Option<u32>) -> bool {
        let min_frames = self.marks.min_frames();
        let beside_budget = self.budget_least_frames.is_some_and(|least| min_frames >= least + BLOCK_PAGES);
        let allowed = beside_budget || self.count >= min_frames + BLOCK_PAGES;
        let Some(first) = taken else {
            let whole = |block: &[bool]| block.iter().all(|&free| free);
            return !allowed || !self.free.chunks(BLOCK_PAGES as usize).any(whole);
        };
        if beside_budget {
            self.marks = self.marks.moved(|mark| mark - BLOCK_PAGES);
        } else if self.budget_least_frames.is_some() {
            self.blocks_of_budget += 1;
        }
        allowed && Self::block(first).all(|index| self.take(index))
    }

    /// Does all steps in some order that keeps each thread's own; whether there is one. The account is then as they
    /// left it.
    ///
    /// `timed`: what was answered before something else was asked has to come before it. Queries take no lock, and
    /// what they see may be older than what was answered meanwhile to others.
    pub fn explain(&mut self, threads: &[Vec<Timed>], timed: bool) -> bool {
        let mut positions = vec![0; threads.len()];
        self.explain_rest(threads, &mut positions, timed)
    }

    fn explain_rest(&mut self, threads: &[Vec<Timed>], positions: &mut [usize], timed: bool) -> bool {
        let next = |positions: &[usize], thread: usize| threads[thread].get(positions[thread]).copied();
        if (0..threads.len()).all(|thread| next(positions, thread).is_none()) {
            return true;
        }
        let earliest_end =
            (0..threads.len()).filter_map(|thread| next(positions, thread)).map(|it| it.ended).min();
        for thread in 0..threads.len() {
            let Some(it) = next(positions, thread) else { continue };
            if timed && Some(it.began) > earliest_end {
                continue;
            }
            let mut then = Box::new(self.clone());
            if !then.follow(it.step) {
                continue;
            }
            positions[thread] += 1;
            if then.explain_rest(threads, positions, timed) {
                *self = *then;
                return true;
            }
            positions[thread] -= 1;
        }
        false
    }

    /// Free frames.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether the frame is free.
    pub fn is_free(&self, index: u32) -> bool {
        self.free[index as usize]
    }
}

/// The steps that took a lock.
pub fn locked(threads: &[Vec<Timed>]) -> Vec<Vec<Timed>> {
    let locked = |steps: &Vec<Timed>| steps.iter().copied().filter(|it| !it.step.is_query()).collect();
    threads.iter().map(locked).collect()
}
