//! Threads that allocate and free while someone asks. From the pages that live all the time to [`UPDATERS_MAX`] more
//! live at any moment: what the truth is, is known without another count.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use crate::ways::{Core, Setting, Way};

/// Where updates themselves are measured, so many allocations are followed by as many frees: a way that saves its work
/// up has to do it now and then.
pub const BURST: u64 = 64;
/// Pages that live all the time.
const BASE: i64 = 10_000;
const UPDATERS_MAX: usize = 2;
/// What lives at any moment.
pub const TRUTH: RangeInclusive<i64> = BASE..=BASE + UPDATERS_MAX as i64;

/// Where an updater allocates and where it frees. It always does both in turn, and half of the pages that it frees are
/// the other updater's.
#[derive(Clone, Copy, PartialEq)]
pub enum Load {
    /// On one core, its own.
    OneCore,
    /// On two: the one only allocates, the other only frees, as when a virtual processor moves, or when one core tears
    /// down what others have built.
    TwoCores,
}

impl Load {
    fn cores(self) -> usize {
        match self {
            Self::OneCore => 1,
            Self::TwoCores => 2,
        }
    }

    /// Whether a way with so many cores can be put under it.
    pub fn fits(self, setting: Setting) -> bool {
        setting.cores >= self.cores()
    }
}

/// A page is told by its guest: nothing else of it matters to any way.
type Page = usize;

/// An updater: where it allocates, and where it frees if that is elsewhere.
struct Updater<C> {
    allocating: C,
    freeing: Option<C>,
}

/// As many updaters as there are cores for; the first holds the pages that live all the time.
fn updaters<'a, W: Way>(way: &'a W, setting: Setting, load: Load) -> Vec<Updater<W::Core<'a>>> {
    let updaters = (setting.cores / load.cores()).min(UPDATERS_MAX);
    let mut cores = (0..updaters * load.cores()).map(|core| way.core(core));
    let mut updaters = Vec::new();
    while let Some(mut allocating) = cores.next() {
        if updaters.is_empty() {
            (0..BASE as usize).for_each(|page| allocating.allocated(page % setting.guests));
        }
        let freeing = if load == Load::TwoCores { cores.next() } else { None };
        updaters.push(Updater { allocating, freeing });
    }
    updaters
}

/// How far the updaters have come, for who wants to know whether they have a processor.
pub struct Progress(Vec<Pages>);

/// Pages that an updater has freed, on lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Pages(AtomicU64);

impl Progress {
    /// A number that changes while any updater works; `None` if there is none.
    pub fn look(&self) -> Option<u64> {
        let pages = self.0.iter().map(|updater| updater.0.load(Ordering::Relaxed));
        pages.reduce(u64::wrapping_add)
    }
}

/// Runs `ask` while the updaters are at work on `way`.
pub fn under<W: Way, T>(way: &W, setting: Setting, load: Load, ask: impl FnOnce(&Progress) -> T) -> T {
    beside(updaters(way, setting, load), setting.guests, ask)
}

/// Runs `count` with one core's side while the other updater, if there is a core for one, is at work.
pub fn next_to<W: Way, T>(
    way: &W,
    setting: Setting,
    count: impl FnOnce(&mut W::Core<'_>, &Progress) -> T,
) -> T {
    let mut updaters = updaters(way, setting, Load::OneCore);
    let others = updaters.split_off(1);
    beside(others, setting.guests, |progress| count(&mut updaters[0].allocating, progress))
}

fn beside<C: Core, T>(updaters: Vec<Updater<C>>, guests: usize, ask: impl FnOnce(&Progress) -> T) -> T {
    // A page of guest 0 lies ready: one of those that live all the time.
    let (page, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let progress = Progress(updaters.iter().map(|_| Pages::default()).collect());
    thread::scope(|scope| {
        for (updater, pages) in updaters.into_iter().zip(&progress.0) {
            scope.spawn(|| updater.work(guests, &page, &stop, &pages.0));
        }
        let answer = ask(&progress);
        stop.store(true, Ordering::Relaxed);
        answer
    })
}

impl<C: Core> Updater<C> {
    /// Allocates a page, leaves it in the place where the updaters exchange theirs, and frees what lay there.
    fn work(mut self, guests: usize, place: &AtomicUsize, stop: &AtomicBool, pages: &AtomicU64) {
        // Not the next guest each time: a walk through the guests would go in step.
        let stride = 617 % guests;
        let mut guest: Page = 0;
        let mut count = 0;
        while !stop.load(Ordering::Relaxed) {
            guest = if guest + stride < guests { guest + stride } else { guest + stride - guests };
            self.allocating.allocated(guest);
            let page = place.swap(guest, Ordering::AcqRel);
            self.freeing.as_mut().unwrap_or(&mut self.allocating).freed(page);
            count += 1;
            pages.store(count, Ordering::Relaxed);
        }
    }
}
