//! The stock on two or three cores, in every interleaving (some models: up to two, three or five preemptions), while caches close and open at the
//! marks. What the cores were answered must be what an allocator could answer that does one thing at a time and has no
//! caches; at rest every frame is where it should be.
//!
//! Run by `cargo xtask test loom`, compiled with `--cfg loom`, where a cache holds four frames. Each defect of
//! `frames/defect.rs` must make one of the models fail.
//!
//! Loom leaves interleavings out where a thread stores to an atomic that it loaded itself just before. So the stock
//! stores blind, and whoever asks without a lock here does nothing else. Where marks change, `pressure` and the shortfall
//! may go by a number that is too high for them: there they are asked only where that makes no difference.

mod history;
mod world;

use std::collections::HashSet;

use super::*;
use crate::address::BLOCK_PAGES;
use world::{Core, SECOND, Start, check, marks, must_fail};

/// 20 frames of the second block.
fn singles() -> impl Iterator<Item = u32> {
    SECOND..SECOND + 20
}

/// Six claims where five can be granted, the pool a batch and a frame above its mark.
fn claims_across_the_mark() -> String {
    let mut start = Start::open(singles());
    start.empty(1);
    start.on(0, |core| core.take(Claim::Guest));
    start.marks(BATCH_FRAMES as u64 + 1, 5, 2);
    let twice = |core: &mut Core| (0..2).for_each(|_| core.take(Claim::Guest));
    start.run(&[twice, twice, twice])
}

/// One core closes the caches for its claim; an owner takes from its own and puts back into it.
fn closed_under_its_owner() -> String {
    let mut start = Start::open(singles());
    start.empty(1);
    start.marks(1, 4, 1);
    start.run(&[
        |core| {
            core.put();
            core.take(Claim::Guest);
            core.take(Claim::Guest);
            core.put();
        },
        |core| core.put(),
        |core| {
            core.take(Claim::Begun);
            core.take(Claim::Begun);
        },
    ])
}

/// Caches open, by frames put back and by a claim, and the marks are raised over the pool's number.
fn opened_under_raised_marks() -> String {
    let mut start = Start::open(singles());
    start.on(0, |core| core.take(Claim::Guest));
    start.closed();
    start.marks(REOPEN_FRAMES, REOPEN_FRAMES + 1, 1);
    start.run(&[
        |core| {
            core.put();
            core.put();
            core.take(Claim::Guest);
        },
        |core| {
            core.put();
            core.take(Claim::Guest);
            core.take(Claim::Guest);
        },
        |core| core.set_marks(marks(15, 17, 19)),
    ])
}

/// The marks are raised so far that two frames are left, while caches are open that hold twice as many.
fn marks_raised_over_open_caches() -> String {
    let mut start = Start::open(singles());
    start.marks(1, 6, 1);
    let twice = |core: &mut Core| (0..2).for_each(|_| core.take(Claim::Guest));
    start.run(&[twice, twice, |core| core.set_marks(marks(15, 16, 19))])
}

/// A claim for a whole block, where the marks allow it and one frame more.
fn block_or_frames() -> String {
    let mut start = Start::open((0..SECOND).chain(singles()));
    start.marks(1, SECOND as u64 + 1, 1);
    start.run(&[
        |core| {
            core.put();
            core.take(Claim::Guest);
            core.take(Claim::Guest);
        },
        Core::take_and_put_block,
        |core| core.take(Claim::Guest),
    ])
}

/// A block beside the budget, of which two frames are left.
fn block_beside_a_budget() -> String {
    let mut start = Start::open((0..SECOND).chain(singles()));
    start.empty(0);
    start.empty(1);
    let free = start.account.count();
    let budget = marks(free - 2, free - 1, free + 1);
    start.on(2, |core| core.set_budget(budget, free - 2 - BLOCK_PAGES));
    start.run(&[
        |core| {
            core.take(Claim::Guest);
            core.put();
        },
        Core::take_and_put_block,
        |core| {
            core.take(Claim::Guest);
            core.take(Claim::Guest);
        },
    ])
}

/// The frames of the first block are in the cache of a core that takes them.
fn low_frames_in_a_cache() -> String {
    let mut start = Start::open((0..2).chain(singles()));
    start.empty(0);
    for _ in 0..2 {
        start.on(0, |core| core.take_below(1, Claim::Guest));
    }
    start.on(0, Core::put);
    start.on(0, Core::put);
    start.marks(3, 8, 1);
    start.run(&[
        |core| {
            core.take(Claim::Guest);
            core.take(Claim::Guest);
            core.put();
        },
        |core| core.take_below(1, Claim::Guest),
        |core| core.take(Claim::Guest),
    ])
}

/// A claim so near above the mark that its cache must not be filled.
fn asked_near_the_mark() -> String {
    let mut start = Start::open(singles());
    start.empty(1);
    start.marks(BATCH_FRAMES as u64 + 1, 6, 1);
    start.run(&[
        Core::put,
        |core| core.take(Claim::Guest),
        |core| {
            core.pressure();
            core.free_frames();
        },
    ])
}

/// Somebody asks while the marks are crossed.
fn asked_at_the_marks(ask: fn(&mut Core)) -> String {
    let mut start = Start::open(singles());
    start.empty(1);
    start.on(0, |core| core.take(Claim::Guest));
    start.marks(1, 3, 1);
    start.run(&[
        |core| {
            core.put();
            core.take(Claim::Guest);
        },
        |core| {
            core.take(Claim::Begun);
            core.take(Claim::Begun);
            core.put();
        },
        ask,
    ])
}

/// Frames leave the pool at the high mark, and the caches are open and empty.
fn asked_at_the_high_mark() -> String {
    let mut start = Start::open(singles());
    start.empty(0);
    start.empty(1);
    start.marks(REOPEN_FRAMES, REOPEN_FRAMES + 1, 0);
    start.run(&[
        |core| core.take(Claim::Guest),
        |core| {
            core.free_frames();
            core.shortfall();
        },
        |core| core.take(Claim::Guest),
    ])
}

/// Somebody asks how many are free while the marks change.
fn asked_while_marks_change() -> String {
    let mut start = Start::open(singles());
    start.marks(1, 6, 1);
    start.run(&[
        |core| {
            core.put();
            core.take(Claim::Guest);
        },
        |core| {
            core.set_marks(marks(15, 16, 19));
            core.set_marks(marks(1, 2, 3));
        },
        |core| {
            core.free_frames();
            core.free_frames();
        },
    ])
}

/// Frames are put back all the while that somebody asks how many are missing, and then a cache opens again.
fn asked_while_frames_come_back() -> String {
    let mut start = Start::open(SECOND..SECOND + 30);
    for _ in 0..2 {
        start.on(0, |core| core.take(Claim::Guest));
    }
    start.marks(REOPEN_FRAMES + 3, 19, 4);
    start.run(&[
        |core| {
            core.put();
            core.put();
            core.put();
            core.take(Claim::Guest);
            core.core = 1;
            core.take(Claim::Guest);
        },
        Core::shortfall,
    ])
}

/// A block goes and comes back beside a budget that hardly anything is taken of, and somebody asks.
fn asked_beside_a_budget() -> String {
    let mut start = Start::open((0..SECOND).chain(singles()));
    start.empty(0);
    start.empty(1);
    let free = start.account.count();
    let budget = marks(free - 8, free - 7, free - 6);
    start.on(2, |core| core.set_budget(budget, free - 8 - BLOCK_PAGES));
    start.run(&[Core::take_and_put_block, Core::finds_plenty])
}

/// How many of the answers of one history say that: each number that occurs, ascending.
fn counts(seen: &HashSet<String>, answer: &str) -> Vec<usize> {
    let mut counts: Vec<usize> = seen.iter().map(|answers| answers.matches(answer).count()).collect();
    counts.sort_unstable();
    counts.dedup();
    counts
}

#[test]
fn loom_claims_across_the_mark_are_refused_when_the_last_is_gone() {
    let seen = check(Some(5), claims_across_the_mark);
    assert_eq!(counts(&seen, "taken: None"), [1]);
}

#[test]
fn loom_a_cache_is_closed_under_its_owner() {
    check(None, closed_under_its_owner);
}

#[test]
fn loom_caches_open_while_the_marks_are_raised() {
    check(Some(5), opened_under_raised_marks);
}

#[test]
fn loom_marks_raised_over_open_caches_leave_two_frames() {
    let seen = check(None, marks_raised_over_open_caches);
    assert_eq!(counts(&seen, "taken: None"), [0, 1, 2]);
}

#[test]
fn loom_a_block_or_frames() {
    let seen = check(None, block_or_frames);
    assert_eq!(counts(&seen, "TakeBlock(None)"), [0, 1]);
}

#[test]
fn loom_a_block_beside_a_budget() {
    let seen = check(None, block_beside_a_budget);
    assert_eq!(counts(&seen, "TakeBlock(None)"), [0]);
    assert_eq!(counts(&seen, "taken: None"), [0, 1]);
}

#[test]
fn loom_low_frames_are_found_in_a_cache() {
    let seen = check(None, low_frames_in_a_cache);
    assert_eq!(counts(&seen, "taken: None"), [0, 1]);
}

#[test]
fn loom_asked_near_the_mark() {
    check(Some(3), asked_near_the_mark);
}

#[test]
fn loom_asked_at_the_marks() {
    let seen = check(Some(3), || {
        asked_at_the_marks(|core| {
            core.pressure();
            core.free_frames();
        })
    });
    assert_eq!(counts(&seen, "Pressure(Plenty)"), [0, 1]);
}

#[test]
fn loom_short_at_the_marks() {
    check(Some(3), || asked_at_the_marks(Core::shortfall));
}

#[test]
fn loom_asked_at_the_high_mark() {
    check(None, asked_at_the_high_mark);
}

#[test]
fn loom_asked_while_marks_change() {
    check(Some(3), asked_while_marks_change);
}

#[test]
fn loom_asked_while_frames_come_back() {
    check(None, asked_while_frames_come_back);
}

#[test]
fn loom_asked_beside_a_budget() {
    check(Some(2), asked_beside_a_budget);
}

#[test]
fn loom_version_not_looked_at_must_fail() {
    must_fail(Defect::VersionNotLookedAt, "beside the budget", asked_beside_a_budget);
}

#[test]
fn loom_caches_not_closed_must_fail() {
    must_fail(Defect::CachesNotClosed, "no order of claims", block_or_frames);
}

#[test]
fn loom_frames_not_raised_must_fail() {
    must_fail(Defect::FramesNotRaised, "no order of claims", claims_across_the_mark);
}

#[test]
fn loom_closed_cache_takes_must_fail() {
    must_fail(Defect::ClosedCacheTakes, "no order of claims", block_beside_a_budget);
}

#[test]
fn loom_opened_at_the_mark_must_fail() {
    must_fail(Defect::OpenedAtTheMark, "caches are open at the mark", opened_under_raised_marks);
}

#[test]
fn loom_filled_past_the_mark_must_fail() {
    must_fail(Defect::FilledPastTheMark, "no order explains", asked_near_the_mark);
}

#[test]
fn loom_marks_over_open_caches_must_fail() {
    must_fail(Defect::MarksOverOpenCaches, "caches are open at the mark", marks_raised_over_open_caches);
}

#[test]
fn loom_counted_first_must_fail() {
    must_fail(Defect::CountedFirst, "no order explains", asked_at_the_high_mark);
}

#[test]
fn loom_pool_taken_for_all_must_fail() {
    must_fail(Defect::PoolTakenForAll, "no order explains", asked_while_marks_change);
}

#[test]
fn loom_read_after_unlock_must_fail() {
    must_fail(Defect::ReadAfterUnlock, "no order explains", asked_while_frames_come_back);
}
