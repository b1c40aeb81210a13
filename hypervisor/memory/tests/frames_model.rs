//! Random histories of the frame allocator against a naive model that looks at every frame.
#![cfg(not(loom))]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memory::{Claim, FrameAllocator, FreeError, GuestId, Marks, Owner, Pfn, Pressure};
use proptest::prelude::*;

const FOUR_GIB: u64 = 1 << 20;
const CORES: usize = 3;
const MIN_FRAMES: u64 = 40;

/// A broken block, two whole ones below 4 GiB, and two and a half above.
const REGIONS: [(Pfn, u64); 3] =
    [(Pfn(0x230), 300), (Pfn(FOUR_GIB - 1024), 1024 + 700), (Pfn(FOUR_GIB + 512), 600)];

#[derive(Clone, Debug)]
enum Step {
    Alloc {
        core: usize,
        owner: Owner,
        claim: Claim,
        times: usize,
    },
    AllocLow {
        guest: u16,
        claim: Claim,
        times: usize,
    },
    AllocBlock {
        guest: u16,
    },
    Free {
        core: usize,
        pick: usize,
        times: usize,
    },
    FreeTwice {
        core: usize,
        pick: usize,
    },
    FreeForeign {
        core: usize,
        pick: usize,
    },
    FreeAbsent {
        core: usize,
        pfn: u64,
    },
    FreeBlock {
        pick: usize,
    },
    /// As a budget does: so many frames free when the mark is set are left above it.
    SetMarks {
        above: u64,
    },
    /// The same, and what is not a shadow page's is beside it.
    SetBudget {
        above: u64,
        least: u64,
    },
}

fn owners() -> impl Strategy<Value = Owner> {
    prop_oneof![
        Just(Owner::Hypervisor),
        (0u16..3).prop_map(|n| Owner::Memory(GuestId::new(n).unwrap())),
        (0u16..3).prop_map(|n| Owner::Shadow(GuestId::new(n).unwrap())),
    ]
}

fn claims() -> impl Strategy<Value = Claim> {
    prop_oneof![Just(Claim::Guest), Just(Claim::Begun)]
}

fn steps() -> impl Strategy<Value = Step> {
    // One core more than the allocator has: it works without a cache.
    let core = 0..CORES + 1;
    prop_oneof![
        4 => (core.clone(), owners(), claims(), 1usize..300)
            .prop_map(|(core, owner, claim, times)| Step::Alloc { core, owner, claim, times }),
        1 => (0u16..3, claims(), 1usize..100)
            .prop_map(|(guest, claim, times)| Step::AllocLow { guest, claim, times }),
        2 => (0u16..3).prop_map(|guest| Step::AllocBlock { guest }),
        5 => (core.clone(), any::<usize>(), 1usize..400)
            .prop_map(|(core, pick, times)| Step::Free { core, pick, times }),
        1 => (core.clone(), any::<usize>()).prop_map(|(core, pick)| Step::FreeTwice { core, pick }),
        1 => (core.clone(), any::<usize>()).prop_map(|(core, pick)| Step::FreeForeign { core, pick }),
        1 => (core, any::<u64>()).prop_map(|(core, pfn)| Step::FreeAbsent { core, pfn }),
        2 => any::<usize>().prop_map(|pick| Step::FreeBlock { pick }),
        1 => prop_oneof![0u64..300, Just(u64::MAX)].prop_map(|above| Step::SetMarks { above }),
        1 => (0u64..300, 1u64..600).prop_map(|(above, least)| Step::SetBudget { above, least }),
    ]
}

/// The marks with this `min`.
fn marks(min_frames: u64) -> Marks {
    Marks::new(min_frames, min_frames + 10, min_frames + 40).unwrap()
}

/// A budget: how far the `min` mark follows what is taken beside it, and what has been taken out of it for all that.
struct Budget {
    least: u64,
    owed: u64,
}

/// Every frame there is, and whose it is; the `min` mark.
struct Model(BTreeMap<Pfn, Option<Owner>>, u64, Option<Budget>);

impl Model {
    fn new() -> Self {
        let frames = REGIONS.iter().flat_map(|&(first, pages)| first.0..first.0 + pages);
        Self(frames.map(|pfn| (Pfn(pfn), None)).collect(), MIN_FRAMES, None)
    }

    fn free(&self) -> u64 {
        self.0.values().filter(|owner| owner.is_none()).count() as u64
    }

    fn allows(&self, frames: u64, claim: Claim) -> bool {
        let kept = if claim == Claim::Guest { self.1 } else { 0 };
        self.free() >= frames + kept
    }

    /// Whether `owner` gets them, if they are there.
    fn grants(&self, frames: u64, claim: Claim, owner: Owner) -> bool {
        self.allows(frames, claim) || self.is_beside(frames, owner)
    }

    fn is_beside(&self, frames: u64, owner: Owner) -> bool {
        !matches!(owner, Owner::Shadow(_))
            && self.2.as_ref().is_some_and(|budget| self.1 >= budget.least + frames)
    }

    /// The marks follow what is taken and given back beside a budget.
    fn taken(&mut self, frames: u64, owner: Owner) {
        if self.is_beside(frames, owner) {
            self.1 -= frames;
        } else if let (Some(budget), false) = (&mut self.2, matches!(owner, Owner::Shadow(_))) {
            budget.owed += frames;
        }
    }

    fn given_back(&mut self, frames: u64, owner: Owner) {
        if let (Some(budget), false) = (&mut self.2, matches!(owner, Owner::Shadow(_))) {
            let owed = budget.owed.min(frames);
            budget.owed -= owed;
            self.1 += frames - owed;
        }
    }

    fn pressure(&self) -> Pressure {
        match self.free() {
            free if free <= self.1 => Pressure::Min,
            free if free <= self.1 + 10 => Pressure::Low,
            _ => Pressure::Plenty,
        }
    }

    fn has_low(&self) -> bool {
        self.0.range(..Pfn(FOUR_GIB)).any(|(_, owner)| owner.is_none())
    }

    fn block_is(&self, first: Pfn, owner: Option<Owner>) -> bool {
        first.0.is_multiple_of(512) && (0..512).all(|i| self.0.get(&Pfn(first.0 + i)) == Some(&owner))
    }

    fn has_whole_block(&self) -> bool {
        self.0.keys().any(|&first| self.block_is(first, None))
    }

    fn hand_out(&mut self, pfn: Pfn, owner: Owner) {
        let was = self.0.insert(pfn, Some(owner));
        assert_eq!(was, Some(None), "{pfn} was handed out though it is no free frame");
    }

    fn held(&self, pick: usize) -> Option<(Pfn, Owner)> {
        let held: Vec<_> = self.0.iter().filter_map(|(&pfn, owner)| Some((pfn, (*owner)?))).collect();
        (!held.is_empty()).then(|| held[pick % held.len()])
    }
}

fn apply(frames: &FrameAllocator, model: &mut Model, step: Step) {
    match step {
        Step::Alloc { core, owner, claim, times } => {
            for _ in 0..times {
                let pfn = frames.alloc(core, owner, claim);
                assert_eq!(pfn.is_some(), model.free() > 0 && model.grants(1, claim, owner));
                let Some(pfn) = pfn else { break };
                model.taken(1, owner);
                model.hand_out(pfn, owner);
            }
        }
        Step::AllocLow { guest, claim, times } => {
            let guest = GuestId::new(guest).unwrap();
            for _ in 0..times {
                let pfn = frames.alloc_below_4g(guest, claim);
                assert_eq!(pfn.is_some(), model.allows(1, claim) && model.has_low());
                let Some(pfn) = pfn else { break };
                assert!(pfn.0 < FOUR_GIB);
                model.hand_out(pfn, Owner::Shadow(guest));
            }
        }
        Step::AllocBlock { guest } => {
            let guest = GuestId::new(guest).unwrap();
            let owner = Owner::Memory(guest);
            let first = frames.alloc_block(guest);
            assert_eq!(first.is_some(), model.grants(512, Claim::Guest, owner) && model.has_whole_block());
            let Some(first) = first else { return };
            model.taken(512, owner);
            assert_eq!(first.0 % 512, 0);
            (0..512).for_each(|i| model.hand_out(Pfn(first.0 + i), owner));
        }
        Step::Free { core, pick, times } => {
            for i in 0..times {
                let Some((pfn, owner)) = model.held(pick.wrapping_add(i * 7)) else { break };
                assert_eq!(frames.free(core, pfn, owner), Ok(()));
                model.given_back(1, owner);
                model.0.insert(pfn, None);
            }
        }
        Step::FreeTwice { core, pick } => {
            let Some((pfn, owner)) = model.held(pick) else { return };
            assert_eq!(frames.free(core, pfn, owner), Ok(()));
            assert_eq!(frames.free((core + 1) % CORES, pfn, owner), Err(FreeError::Double(pfn)));
            model.given_back(1, owner);
            model.0.insert(pfn, None);
        }
        Step::FreeForeign { core, pick } => {
            let Some((pfn, owner)) = model.held(pick) else { return };
            let other = Owner::Shadow(GuestId::new(9).unwrap());
            assert_eq!(frames.free(core, pfn, other), Err(FreeError::Foreign { pfn, owner }));
        }
        Step::FreeAbsent { core, pfn } => {
            let pfn = Pfn(pfn);
            if !model.0.contains_key(&pfn) {
                assert_eq!(frames.free(core, pfn, Owner::Hypervisor), Err(FreeError::Absent(pfn)));
            }
        }
        Step::FreeBlock { pick } => {
            let Some((pfn, owner)) = model.held(pick) else { return };
            let Owner::Memory(guest) = owner else { return };
            let first = Pfn(pfn.0 & !511);
            let whole = model.block_is(first, Some(owner));
            assert_eq!(frames.free_block(first, guest).is_ok(), whole);
            if whole {
                model.given_back(512, owner);
                (0..512).for_each(|i| _ = model.0.insert(Pfn(first.0 + i), None));
            }
        }
        Step::SetMarks { above } => {
            model.1 = model.free().saturating_sub(above).clamp(MIN_FRAMES, frames.total_frames() - 41);
            model.2 = None;
            frames.set_marks(marks(model.1)).unwrap();
        }
        Step::SetBudget { above, least } => {
            model.1 = model.free().saturating_sub(above).clamp(MIN_FRAMES, frames.total_frames() - 41);
            model.2 = Some(Budget { least, owed: 0 });
            frames.set_budget(marks(model.1), least).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn histories_agree_with_the_model(history in prop::collection::vec(steps(), 1..60)) {
        let frames = FrameAllocator::new(&REGIONS, CORES, Some(marks(MIN_FRAMES)));
        let mut model = Model::new();
        prop_assert_eq!(frames.total_frames(), model.free());
        for step in history {
            apply(&frames, &mut model, step);
            prop_assert_eq!(frames.free_frames(), model.free());
            prop_assert_eq!(frames.pressure(), model.pressure());
            prop_assert_eq!(frames.shortfall_frames(), (model.1 + 40).saturating_sub(model.free()));
        }
        for (&pfn, &owner) in &model.0 {
            prop_assert_eq!(frames.owner(pfn), owner);
        }
    }
}

/// Cores that allocate, hand over and free at once: no frame has two holders, none is lost, and a claim that
/// the marks allow is always met although the frames lie in the caches of others.
#[test]
fn cores_at_once_share_no_frame_and_lose_none() {
    const FRAMES: u64 = 300;
    let frames = FrameAllocator::new(&[(Pfn(0), FRAMES)], CORES, Marks::new(0, 1, 2).ok());
    let held: Vec<AtomicBool> = (0..FRAMES).map(|_| AtomicBool::new(false)).collect();
    let owner = Owner::Shadow(GuestId::new(0).unwrap());
    std::thread::scope(|scope| {
        for core in 0..CORES {
            let (frames, held) = (&frames, &held);
            scope.spawn(move || {
                let mut mine = Vec::new();
                let mut random = core as u64 + 1;
                for _ in 0..30_000 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if (random >> 33) % 100 < 50 && mine.len() < 100 {
                        // Never more than 300 are held, so no claim may fail.
                        let pfn = frames.alloc(core, owner, Claim::Begun).expect("a free frame");
                        assert!(!held[pfn.0 as usize].swap(true, Ordering::SeqCst), "{pfn} has two holders");
                        mine.push(pfn);
                    } else if let Some(pfn) = mine.pop() {
                        assert!(held[pfn.0 as usize].swap(false, Ordering::SeqCst));
                        // Now and then through the cache of a neighbour.
                        let through = if random.is_multiple_of(5) { (core + 1) % CORES } else { core };
                        frames.free(through, pfn, owner).unwrap();
                    }
                    assert!(frames.free_frames() <= FRAMES);
                }
                for pfn in mine {
                    held[pfn.0 as usize].store(false, Ordering::SeqCst);
                    frames.free(core, pfn, owner).unwrap();
                }
            });
        }
    });
    assert_eq!(frames.free_frames(), FRAMES);
    assert_eq!(frames.owned_by(owner), 0);
}

/// Cores that take and give back near the `min` mark, where the caches open and close all the time, through caches
/// of their own and of neighbours. Together they may hold what lies above the mark and not one frame more: so
/// each claim of one that holds less than its share must be granted although the free frames lie in the caches
/// of others, and whoever looks never finds fewer than `min` free.
#[test]
fn cores_at_once_near_the_mark_are_refused_nothing_that_is_theirs() {
    const CORES: usize = 4;
    const SHARE: usize = 150;
    const MIN_FRAMES: u64 = 1000;
    let total_frames = MIN_FRAMES + (CORES * SHARE) as u64;
    let marks = Marks::new(MIN_FRAMES, MIN_FRAMES + 8, MIN_FRAMES + 16).unwrap();
    // More caches than cores at work: some are filled and left behind.
    let frames = FrameAllocator::new(&[(Pfn(0x400), total_frames)], 2 * CORES, Some(marks));
    std::thread::scope(|scope| {
        let work = |core: usize| {
            let frames = &frames;
            move || {
                let owner = Owner::Shadow(GuestId::new(core as u16).unwrap());
                let mut random = core as u64 + 1;
                let mut next = |below: u64| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (random >> 33) % below
                };
                let mut mine = Vec::new();
                for _ in 0..3_000 {
                    let goal = next(SHARE as u64 + 1) as usize;
                    let through = if next(4) == 0 { next(2 * CORES as u64 + 1) as usize } else { core };
                    while mine.len() < goal {
                        mine.push(frames.alloc(through, owner, Claim::Guest).expect("a claim that is due"));
                    }
                    mine.drain(goal..).for_each(|pfn| frames.free(through, pfn, owner).unwrap());
                }
                // All take their share: the mark is reached.
                while mine.len() < SHARE {
                    mine.push(frames.alloc(core, owner, Claim::Guest).expect("a claim that is due"));
                }
            }
        };
        let workers: Vec<_> = (0..CORES).map(|core| scope.spawn(work(core))).collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            let free = frames.free_frames();
            assert!((MIN_FRAMES..=total_frames).contains(&free), "{free} frames free");
            assert!(frames.shortfall_frames() <= 16);
            std::hint::black_box(frames.pressure());
        }
    });
    assert_eq!((frames.free_frames(), frames.pressure()), (MIN_FRAMES, Pressure::Min));
    let late = frames.alloc(0, Owner::Hypervisor, Claim::Guest);
    assert_eq!(late, None);
}

/// Guests' memory comes and goes beside a budget while cores take up nearly all of it: nobody is refused, and nobody who
/// looks finds a mark reached.
#[test]
fn memory_that_comes_and_goes_disturbs_no_budget() {
    const CORES: usize = 2;
    const SHARE: usize = 100;
    const BUDGET: u64 = (CORES * SHARE) as u64 + 20;
    const BLOCKS: u64 = 16;
    let frames = FrameAllocator::new(&[(Pfn(0x400), BLOCKS * 512)], CORES, None);
    let min_frames = BLOCKS * 512 - BUDGET;
    frames.set_budget(Marks::new(min_frames, min_frames + 5, min_frames + 10).unwrap(), 100).unwrap();
    let (left, frames) = (AtomicUsize::new(CORES), &frames);
    let (refused, pressed) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for core in 0..CORES {
            let (left, refused, pressed) = (&left, &refused, &pressed);
            scope.spawn(move || {
                let owner = Owner::Shadow(GuestId::new(core as u16).unwrap());
                for round in 0..2_000 {
                    let take = (0..SHARE - round % 7).map(|_| frames.alloc(core, owner, Claim::Guest));
                    let taken: Vec<_> = take.collect();
                    refused.fetch_or(taken.contains(&None), Ordering::Relaxed);
                    for pfn in taken.into_iter().flatten() {
                        let low = frames.pressure() != Pressure::Plenty || frames.shortfall_frames() > 0;
                        pressed.fetch_or(low, Ordering::Relaxed);
                        frames.free(core, pfn, owner).unwrap();
                    }
                }
                left.fetch_sub(1, Ordering::Release);
            });
        }
        let ram = GuestId::new(7).unwrap();
        let mut random = 1_u64;
        while left.load(Ordering::Acquire) > 0 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let goal = (random >> 33) % (BLOCKS - 4);
            let blocks: Vec<_> = (0..goal).map_while(|_| frames.alloc_block(ram)).collect();
            blocks.into_iter().for_each(|first| frames.free_block(first, ram).unwrap());
        }
    });
    assert!(!refused.into_inner(), "a claim that was due was refused");
    assert!(!pressed.into_inner(), "a mark was reached, to somebody who looked");
    assert_eq!((frames.marks().min_frames(), frames.free_frames()), (min_frames, BLOCKS * 512));
}

/// Frames that idle in many caches, and cores that take all there is at once: together they get what lies above
/// the mark, to the frame.
#[test]
fn claims_at_once_end_at_the_mark_to_the_frame() {
    const CORES: usize = 64;
    for round in 0..20 {
        let marks = Marks::new(128, 130, 140).unwrap();
        let frames = FrameAllocator::new(&[(Pfn(0), 8192)], CORES, Some(marks));
        let owner = Owner::Shadow(GuestId::new(1).unwrap());
        let first: Vec<_> = (0..CORES).map(|core| frames.alloc(core, owner, Claim::Guest).unwrap()).collect();
        for (core, pfn) in first.into_iter().enumerate() {
            frames.free((core + round) % CORES, pfn, owner).unwrap();
        }
        let taken: usize = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..4)
                .map(|core| {
                    let frames = &frames;
                    let mut taken = 0;
                    scope.spawn(move || {
                        while frames.alloc(core, owner, Claim::Guest).is_some() {
                            taken += 1;
                        }
                        taken
                    })
                })
                .collect();
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!((taken, frames.free_frames()), (8192 - 128, 128));
        assert_eq!(frames.owned_by(owner), 8192 - 128);
    }
}
