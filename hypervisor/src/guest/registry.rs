//! All guests of this boot, by their place in the manifest.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use machine::manifest::{End, GuestConfig};
use spin::Mutex;

use super::Guest;

/// A guest's line in the registry.
pub struct Line {
    /// What the manifest says.
    pub config: GuestConfig,
    /// While it runs.
    pub guest: Option<Arc<Guest>>,
    /// How it last ended.
    pub ended: Option<End>,
    /// How often it was started again.
    pub restarts: u32,
}

/// Held for a few instructions at a time, never on the exit or fill path.
static LINES: Mutex<Vec<Line>> = Mutex::new(Vec::new());

/// Enters the manifest's guests, none of them running.
pub fn enter(configs: &[GuestConfig]) {
    *LINES.lock() = configs
        .iter()
        .map(|config| Line { config: config.clone(), guest: None, ended: None, restarts: 0 })
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

/// The running guest whose shadow MMU holds most beyond its guarantee; none if none holds more than
/// `floor_frames` beyond it.
pub fn largest_excess(floor_frames: u64) -> Option<Arc<Guest>> {
    let lines = LINES.lock();
    let running = lines.iter().filter_map(|line| line.guest.as_ref());
    let excess = |guest: &Guest| {
        let kept = guest.guarantee_frames.max(floor_frames);
        guest.shadow_frames.load(Ordering::Relaxed).saturating_sub(kept)
    };
    running.max_by_key(|guest| excess(guest)).filter(|guest| excess(guest) > 0).cloned()
}
