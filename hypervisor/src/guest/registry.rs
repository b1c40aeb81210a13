//! All guests of this boot, by their place in the manifest.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use machine::manifest::{End, GuestConfig};
use shadow::cache::Tenant;
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

/// Held for a few instructions at a time; on the fill path only where reclaim looks for the next guest.
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

/// Guests that have begun to hand what they counted over to the cores' counters, and those that are through.
static LEAVING: AtomicU64 = AtomicU64::new(0);
static LEFT: AtomicU64 = AtomicU64::new(0);

/// Calls `f`, which takes a guest off the registry and hands what it counted over to the cores' counters.
pub fn hand_over(f: impl FnOnce()) {
    LEAVING.fetch_add(1, Ordering::SeqCst);
    f();
    LEFT.fetch_add(1, Ordering::SeqCst);
}

/// What `read` finds while no guest hands its counts over: each guest is in the registry or in the cores' counters, not in
/// both. Waits for who is at it; nobody waits for the reader.
pub fn settled<R>(mut read: impl FnMut() -> R) -> R {
    loop {
        let left = LEFT.load(Ordering::SeqCst);
        if LEAVING.load(Ordering::SeqCst) == left {
            let found = read();
            if LEAVING.load(Ordering::SeqCst) == left {
                return found;
            }
        }
        core::hint::spin_loop();
    }
}

/// Calls `f` with all lines.
pub fn with<R>(f: impl FnOnce(&mut [Line]) -> R) -> R {
    f(&mut LINES.lock())
}

/// The running guest with this place, if it runs.
pub fn running(place: usize) -> Option<Arc<Guest>> {
    LINES.lock().get(place)?.guest.clone()
}

/// The running guest whose shadow pages reclaim takes next; none if no one has more than it may keep. Those in the set
/// `without`, a bit for each number, are passed over.
pub fn next_guest(without: u64) -> Option<Arc<Guest>> {
    let lines = LINES.lock();
    let asked = || {
        let running = lines.iter().filter_map(|line| line.guest.as_ref());
        running.filter(|guest| without >> (guest.id.index() % 64) & 1 == 0)
    };
    let victim = shadow::next_guest(asked().map(|guest| guest.share()))?;
    asked().nth(victim).cloned()
}

/// The running guest that is first in turn.
#[cfg(feature = "first-guest")]
pub fn first_guest() -> Option<Arc<Guest>> {
    use core::sync::atomic::AtomicUsize;
    static TURN: AtomicUsize = AtomicUsize::new(0);
    let lines = LINES.lock();
    let running = || lines.iter().filter_map(|line| line.guest.as_ref());
    let turn = TURN.fetch_add(1, Ordering::Relaxed) % running().count().max(1);
    running().nth(turn).cloned()
}
