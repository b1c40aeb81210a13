//! 256 cores and 1000 guests: shadow pages made on one core and freed on another, with the counters, the guests' own
//! counts and the frame table to agree at the end.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use memory::counters::Writer;
use memory::{Claim, Counters, FrameAllocator, GuestId, Owner, Pfn, Population};
use proptest::prelude::*;

const CORES: usize = 256;
const GUESTS: usize = 1000;
const FRAMES: u64 = 64 * 512;

/// A shadow page: its frame, and whose it is.
type Page = (Pfn, GuestId);

/// The machine, with what each guest counts for itself.
struct Machine {
    frames: FrameAllocator,
    counters: Counters,
    own: Vec<AtomicU64>,
    /// Pages to be counted, counted, to be uncounted, uncounted: what bounds the number that live.
    making: AtomicU64,
    made: AtomicU64,
    freeing: AtomicU64,
    freed: AtomicU64,
}

impl Machine {
    fn new() -> Self {
        Self {
            frames: FrameAllocator::new(&[(Pfn(0), FRAMES)], CORES, None),
            counters: Counters::new(CORES),
            own: (0..GUESTS).map(|_| AtomicU64::new(0)).collect(),
            making: AtomicU64::new(0),
            made: AtomicU64::new(0),
            freeing: AtomicU64::new(0),
            freed: AtomicU64::new(0),
        }
    }

    fn make(&self, core: usize, writer: &Writer<'_>, guest: usize) -> Page {
        let guest = GuestId::new(guest as u16).unwrap();
        let pfn = self.frames.alloc(core, Owner::Shadow(guest), Claim::Guest).expect("plenty of frames");
        self.making.fetch_add(1, SeqCst);
        writer.shadow_page_allocated();
        self.made.fetch_add(1, SeqCst);
        self.own[guest.index()].fetch_add(1, SeqCst);
        (pfn, guest)
    }

    fn free(&self, core: usize, writer: &Writer<'_>, (pfn, guest): Page) {
        self.own[guest.index()].fetch_sub(1, SeqCst);
        self.frames.free(core, pfn, Owner::Shadow(guest)).unwrap();
        self.freeing.fetch_add(1, SeqCst);
        writer.shadow_pages_freed(1);
        self.freed.fetch_add(1, SeqCst);
    }

    /// Asks for the population while cores work: whatever the answer, so many can have lived meanwhile.
    fn look(&self) -> Population {
        let (made, freed) = (self.made.load(SeqCst), self.freed.load(SeqCst));
        let answer = self.counters.shadow_pages();
        let (making, freeing) = (self.making.load(SeqCst), self.freeing.load(SeqCst));
        let (least, most) = (made.saturating_sub(freeing), making - freed);
        assert!(answer.low() <= answer.high(), "{answer:?}");
        assert!(answer.low() <= most && answer.high() >= least, "{answer:?}, but {least} to {most} lived");
        answer
    }

    /// At rest: the sum is exact, and what the guests say and what the frame table says.
    fn close(&self, live: u64) {
        let own: Vec<u64> = self.own.iter().map(|count| count.load(SeqCst)).collect();
        let mut table = vec![0; GUESTS];
        for pfn in (0..FRAMES).map(Pfn) {
            match self.frames.owner(pfn) {
                Some(Owner::Shadow(guest)) => table[guest.index()] += 1,
                other => assert_eq!(other, None),
            }
        }
        assert_eq!(self.counters.shadow_pages(), Population::Exact(live));
        assert_eq!(own.iter().sum::<u64>(), live);
        assert_eq!(own, table);
        assert_eq!(self.frames.free_frames(), FRAMES - live);
    }
}

#[test]
fn pages_made_and_freed_on_256_cores_for_1000_guests_are_all_accounted_for() {
    const THREADS: usize = 8;
    const STEPS: usize = 20_000;
    const KEPT: usize = 200;
    let machine = Machine::new();
    // Pages on their way to another thread's cores.
    let passed: Vec<Mutex<VecDeque<Page>>> = (0..THREADS).map(|_| Mutex::default()).collect();
    let looks = std::thread::scope(|scope| {
        let work = |thread: usize| {
            let (machine, passed) = (&machine, &passed);
            move || {
                let cores: Vec<_> = (thread..CORES)
                    .step_by(THREADS)
                    .map(|core| (core, machine.counters.writer(core).unwrap()))
                    .collect();
                let mut random = thread as u64 + 1;
                let mut next = |below: usize| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (random >> 33) as usize % below
                };
                let (mut held, mut taken) = (Vec::new(), 0);
                for _ in 0..STEPS {
                    let (core, writer) = &cores[next(cores.len())];
                    if next(2) == 0 {
                        held.push(machine.make(*core, writer, next(GUESTS)));
                    }
                    // Some are handed on, to a list that its thread keeps short.
                    if held.len() > KEPT {
                        let mut list = passed[(thread + 1 + next(THREADS - 1)) % THREADS].lock().unwrap();
                        if list.len() < KEPT {
                            list.extend(held.drain(..20));
                        }
                    }
                    let page = passed[thread].lock().unwrap().pop_front();
                    if let Some(page) = page {
                        machine.free(*core, writer, page);
                        taken += 1;
                        continue;
                    }
                    // The others may have no processor to do it.
                    std::thread::yield_now();
                    if held.len() > 2 * KEPT || next(8) == 0 {
                        held.pop().into_iter().for_each(|page| machine.free(*core, writer, page));
                    }
                }
                taken
            }
        };
        let workers: Vec<_> = (0..THREADS).map(|thread| scope.spawn(work(thread))).collect();
        let mut looks = 0;
        while workers.iter().any(|worker| !worker.is_finished()) {
            machine.look();
            assert!(machine.frames.free_frames() <= FRAMES);
            looks += 1;
        }
        let taken: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert!(taken > STEPS, "only {taken} pages were freed by another thread");
        looks
    });
    assert!(looks > 0);
    let live = machine.made.load(SeqCst) - machine.freed.load(SeqCst);
    assert!(live > 0);
    machine.close(live);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn long_histories_on_256_cores_close_exactly(
        // Core; guest; free one, if there is one, or make one; which.
        history in prop::collection::vec((0..CORES, 0..GUESTS, 0u8..9, any::<usize>()), 2_000..6_000),
    ) {
        let machine = Machine::new();
        let writers: Vec<_> = (0..CORES).map(|core| machine.counters.writer(core).unwrap()).collect();
        let mut live = Vec::new();
        for (core, guest, kind, pick) in history {
            if kind >= 5 && !live.is_empty() {
                let page = live.swap_remove(pick % live.len());
                machine.free(core, &writers[core], page);
            } else {
                live.push(machine.make(core, &writers[core], guest));
            }
            prop_assert_eq!(machine.look(), Population::Exact(live.len() as u64));
        }
        machine.close(live.len() as u64);
        for page in live {
            machine.free(page.1.index() % CORES, &writers[page.1.index() % CORES], page);
        }
        machine.close(0);
    }
}
