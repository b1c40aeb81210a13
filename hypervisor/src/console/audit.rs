//! Every guest's shadow pages, checked while the guests run.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::guest::registry;
use crate::host::log::raw;
use crate::host::time;
use crate::schedule::Core;

const NS_PER_MS: u64 = 1_000_000;
const NS_PER_US: u64 = 1_000;

/// Between two audits, in nanoseconds; 0: there are none but those that a person asks for.
static INTERVAL_NS: AtomicU64 = AtomicU64::new(0);
/// When the next one is due, in nanoseconds since the start.
static NEXT_NS: AtomicU64 = AtomicU64::new(0);

/// Audits every so many milliseconds; `None`: never.
pub fn every(interval_ms: Option<u32>) {
    let interval_ns = u64::from(interval_ms.unwrap_or(0)) * NS_PER_MS;
    INTERVAL_NS.store(interval_ns, Ordering::Relaxed);
    NEXT_NS.store(time::now_ns() + interval_ns, Ordering::Relaxed);
}

/// Carries out the audit that is due; returns when the next one is, in nanoseconds since the start.
///
/// # Panics
/// If an invariant is broken: our own bug.
pub fn tick(core: &Core, now_ns: u64) -> u64 {
    let interval_ns = INTERVAL_NS.load(Ordering::Relaxed);
    if interval_ns == 0 {
        return u64::MAX;
    }
    let due_ns = NEXT_NS.load(Ordering::Relaxed);
    if now_ns < due_ns {
        return due_ns;
    }
    let broken = all(core);
    assert_eq!(broken, 0, "the shadow pages of {broken} guests are not what they must be");
    let next_ns = time::now_ns() + interval_ns;
    NEXT_NS.store(next_ns, Ordering::Relaxed);
    next_ns
}

/// Audits the guests that run, one after the other, and prints a line for each. Returns how many of them break an
/// invariant.
pub fn all(core: &Core) -> usize {
    let mut broken = 0;
    for place in 0..registry::with(|lines| lines.len()) {
        let Some(guest) = registry::running(place) else { continue };
        let begin = time::tsc();
        let result = guest.audit(core);
        let us = time::ticks_to_ns(time::tsc().wrapping_sub(begin)) / NS_PER_US;
        match result {
            Ok(found) => raw(format_args!(
                "umbra: audit of {}: {} shadow pages, {} sptes, {us} us: sound",
                guest.name(),
                found.pages,
                found.sptes
            )),
            Err(violation) => {
                broken += 1;
                raw(format_args!("umbra: audit of {}: {violation}", guest.name()));
            }
        }
    }
    broken
}
