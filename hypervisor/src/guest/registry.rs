//! All guests of this boot, by their place in the manifest.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use machine::manifest::{End, GuestConfig};
use shadow::pages_min;
use spin::Mutex;

use super::Guest;

/// Where a guest is between its start and its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// It has ended, or never started: all it had is free.
    #[default]
    Down,
    /// A core is building it.
    Starting,
    /// It runs, or sleeps.
    Up,
    /// A core is taking everything back from it.
    Ending,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug)]
pub struct Last {
    /// For what reason.
    pub end: End,
    /// Exits of its life.
    pub exits: u64,
    /// TSC ticks from its start to its end.
    pub ticks: u64,
}

/// A guest's line in the registry.
pub struct Line {
    /// What the manifest says.
    pub config: GuestConfig,
    /// While it runs: in [`Phase::Up`].
    pub guest: Option<Arc<Guest>>,
    /// Who changes it, under the registry's lock, owns the guest until the next change.
    pub phase: Phase,
    /// How it last ended.
    pub last: Option<Last>,
    /// How often its policy started it again.
    pub restarts: u32,
    /// Somebody wants it to be started once it is down.
    pub restart_wanted: bool,
    /// Heap that its building took, in bytes.
    pub heap_bytes: usize,
}

/// Held for a few instructions at a time, never on the exit or fill path.
static LINES: Mutex<Vec<Line>> = Mutex::new(Vec::new());

/// Enters the manifest's guests, none of them running.
pub fn enter(configs: &[GuestConfig]) {
    *LINES.lock() = configs
        .iter()
        .map(|config| Line {
            config: config.clone(),
            guest: None,
            phase: Phase::Down,
            last: None,
            restarts: 0,
            restart_wanted: false,
            heap_bytes: 0,
        })
        .collect();
}

/// Calls `f` with all lines.
pub fn with<R>(f: impl FnOnce(&mut [Line]) -> R) -> R {
    f(&mut LINES.lock())
}

/// The running guest with this place, if it runs.
pub fn running(place: usize) -> Option<Arc<Guest>> {
    LINES.lock().get(place)?.guest.clone()
}

/// The running guest whose shadow MMU holds most beyond its guarantee and what it needs to go on; none if none holds
/// more. Those in the set `without`, a bit for each number, are passed over.
pub fn largest_excess(without: u64) -> Option<Arc<Guest>> {
    let lines = LINES.lock();
    let asked = || {
        let running = lines.iter().filter_map(|line| line.guest.as_ref());
        running.filter(|guest| without >> (guest.id.index() % 64) & 1 == 0)
    };
    let victim = largest(asked().map(|guest| {
        // Two frames for each page.
        let kept = guest.guarantee_frames.max(2 * u64::from(pages_min(guest.config.vcpus)));
        (guest.shadow_frames.load(Ordering::Relaxed), kept)
    }))?;
    asked().nth(victim).cloned()
}

/// Of guests that hold and may keep so many frames each, the place of the one with most beyond what it may keep;
/// `None` if nobody has any (H26).
fn largest(frames: impl Iterator<Item = (u64, u64)>) -> Option<usize> {
    let excess = frames.map(|(held, kept)| held.saturating_sub(kept)).enumerate();
    excess.filter(|&(_, excess)| excess > 0).max_by_key(|&(_, excess)| excess).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Frames that come free with a batch.
    const BATCH: u64 = 64;

    proptest! {
        /// Reclaim, batch by batch, until so many frames are free or nobody has any to give: each guest's share is what
        /// it has beyond the others, wherever it stands in the list, and nobody goes below what it may keep.
        #[test]
        fn h26_everybody_gives_by_its_excess(
            guests in prop::collection::vec((0u64..5000, 0u64..2000), 1..8),
            wanted in 1u64..20_000,
        ) {
            let mut held: Vec<u64> = guests.iter().map(|&(held, _)| held).collect();
            let mut freed = 0;
            let mut batches = 0;
            while freed < wanted
                && let Some(victim) = largest(held.iter().copied().zip(guests.iter().map(|&(_, kept)| kept)))
            {
                let batch = BATCH.min(held[victim] - guests[victim].1);
                held[victim] -= batch;
                freed += batch;
                batches += 1;
            }
            prop_assert!(batches <= 40_000 / BATCH + 8);
            let excess: Vec<u64> = held.iter().zip(&guests).map(|(&held, &(_, kept))| held.saturating_sub(kept)).collect();
            let most = excess.iter().copied().max().unwrap_or(0);
            prop_assert!(freed >= wanted || most == 0);
            for (i, &(before, kept)) in guests.iter().enumerate() {
                prop_assert!(held[i] == before || held[i] >= kept);
                // Who gave has no less left than those who have most, but for the last batch.
                prop_assert!(held[i] == before || excess[i] + BATCH >= most, "{:?} of {:?}", held, guests);
            }
        }
    }
}
