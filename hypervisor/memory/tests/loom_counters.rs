//! All interleavings, and all stale values the memory model allows, of cores that allocate and free shadow
//! pages while another asks how many there are. Run by
//! `RUSTFLAGS="--cfg loom" cargo test -p memory --test loom_counters --release`.
//!
//! The same histories run over the real counters and over mutants that each lack one part; a mutant that
//! passes would mean that the model sees nothing. Counts are stored blind, from plain fields: where a store
//! follows a load of the same atomic, loom leaves interleavings out. Hand-overs are looked at once and not
//! waited for, so that every execution ends.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use memory::counters::{Counters, Population, Writer};

const CORES: usize = 4;

/// An answer, with room for the nonsense of mutants.
#[derive(Debug, PartialEq)]
enum Answer {
    Exact(i64),
    Between(i64, i64),
}

trait Subject: Send + Sync + 'static {
    fn new() -> Self;
    fn query(&self) -> Answer;
    fn on_core(&self, core: usize) -> impl Core + '_;
}

/// One core's side.
trait Core {
    fn allocate(&mut self);
    fn free(&mut self);
    /// Two at once, as far as the subject lets one.
    fn allocate_two(&mut self) {
        self.allocate();
        self.allocate();
    }
}

impl Subject for Counters {
    fn new() -> Self {
        Counters::new(CORES)
    }
    fn query(&self) -> Answer {
        match self.shadow_pages() {
            Population::Exact(count) => Answer::Exact(count as i64),
            Population::Between { low, high } => Answer::Between(low as i64, high as i64),
        }
    }
    fn on_core(&self, core: usize) -> impl Core + '_ {
        self.writer(core).expect("the core's only writer")
    }
}

impl Core for Writer<'_> {
    fn allocate(&mut self) {
        self.shadow_page_allocated();
    }
    fn free(&mut self) {
        self.shadow_pages_freed(1);
    }
}

/// What a mutant does otherwise than the real counters.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// None: as the real ones, to show that the mutants' frame is sound.
    None,
    /// One signed number per core.
    NetSlots,
    /// The query reads `allocated` before `freed`.
    AllocatedFirst,
    /// The query does not read `freed` again.
    ReadOnce,
    RelaxedStores,
    RelaxedLoads,
    /// Only the load of `allocated` is relaxed.
    RelaxedAllocatedLoad,
    /// `allocated` advances by two.
    Batches,
}

struct Mutant<const FAULT: usize> {
    slots: Vec<(AtomicU64, AtomicU64)>,
}

const FAULTS: [Fault; 8] = [
    Fault::None,
    Fault::NetSlots,
    Fault::AllocatedFirst,
    Fault::ReadOnce,
    Fault::RelaxedStores,
    Fault::RelaxedLoads,
    Fault::RelaxedAllocatedLoad,
    Fault::Batches,
];

impl<const FAULT: usize> Mutant<FAULT> {
    fn sum(&self, order: Ordering, pick: impl Fn(&(AtomicU64, AtomicU64)) -> &AtomicU64) -> i64 {
        self.slots.iter().map(|slot| pick(slot).load(order) as i64).sum()
    }
}

impl<const FAULT: usize> Subject for Mutant<FAULT> {
    fn new() -> Self {
        Self { slots: (0..CORES).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect() }
    }

    fn query(&self) -> Answer {
        let fault = FAULTS[FAULT];
        let relaxed_if = |faults: &[Fault]| {
            if faults.contains(&fault) { Ordering::Relaxed } else { Ordering::Acquire }
        };
        let freed = || self.sum(relaxed_if(&[Fault::RelaxedLoads]), |slot| &slot.1);
        let allocated_order = relaxed_if(&[Fault::RelaxedLoads, Fault::RelaxedAllocatedLoad]);
        let allocated = || self.sum(allocated_order, |slot| &slot.0);
        match fault {
            Fault::NetSlots => return Answer::Exact(allocated()),
            Fault::ReadOnce => {
                let freed = freed();
                return Answer::Exact(allocated() - freed);
            }
            Fault::AllocatedFirst => {
                let (allocated, before, after) = (allocated(), freed(), freed());
                return match before == after {
                    true => Answer::Exact(allocated - before),
                    false => Answer::Between((allocated - after).max(0), allocated - before),
                };
            }
            _ => {}
        }
        let mut before = freed();
        for _ in 0..2 {
            let (allocated, after) = (allocated(), freed());
            if before == after {
                return Answer::Exact(allocated - before);
            }
            before = after;
        }
        let (allocated, after) = (allocated(), freed());
        match before == after {
            true => Answer::Exact(allocated - before),
            false => Answer::Between((allocated - after).max(0), allocated - before),
        }
    }

    fn on_core(&self, core: usize) -> impl Core + '_ {
        MutantCore::<FAULT> { slot: &self.slots[core], allocated: 0, freed: 0 }
    }
}

struct MutantCore<'a, const FAULT: usize> {
    slot: &'a (AtomicU64, AtomicU64),
    allocated: i64,
    freed: i64,
}

impl<const FAULT: usize> MutantCore<'_, FAULT> {
    fn publish(&mut self, allocated: i64, freed: i64) {
        let fault = FAULTS[FAULT];
        let order = if fault == Fault::RelaxedStores { Ordering::Relaxed } else { Ordering::Release };
        self.allocated += allocated;
        self.freed += freed;
        if fault == Fault::NetSlots {
            self.slot.0.store((self.allocated - self.freed) as u64, order);
        } else if allocated != 0 {
            self.slot.0.store(self.allocated as u64, order);
        } else {
            self.slot.1.store(self.freed as u64, order);
        }
    }
}

impl<const FAULT: usize> Core for MutantCore<'_, FAULT> {
    fn allocate(&mut self) {
        self.publish(1, 0);
    }
    fn free(&mut self) {
        self.publish(0, 1);
    }
    fn allocate_two(&mut self) {
        if FAULTS[FAULT] == Fault::Batches {
            self.publish(2, 0);
        } else {
            self.allocate();
            self.allocate();
        }
    }
}

/// A page (or the room it leaves) passed from one core to the next.
#[derive(Clone)]
struct HandOver(Arc<AtomicBool>);

impl HandOver {
    fn new() -> Self {
        Self(Arc::new(AtomicBool::new(false)))
    }
    fn give(&self) {
        self.0.store(true, Ordering::Release);
    }
    fn taken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Runs `model` in every execution in which at most `preemptions` threads lose the processor unasked: enough
/// for every mutant, and few enough for seconds.
fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// `lived`: every number that ever lived, in any execution, all of them on one chain of cause and effect.
fn check(answer: &Answer, lived: &[i64]) {
    let (least, most) = (lived.iter().min().unwrap(), lived.iter().max().unwrap());
    match *answer {
        Answer::Exact(count) => assert!(lived.contains(&count), "{count} never lived"),
        Answer::Between(low, high) => {
            assert!(0 <= low && low <= high, "{low}..{high} is no bracket");
            assert!(low <= *most && high >= *least, "{low}..{high} leaves out all that lived");
        }
    }
}

/// A page lives all the time. Another is allocated on core 0 and freed on core 1, and its frame is used again
/// on core 2. One or two live at any moment, never none, never three.
fn handed_over<S: Subject>() {
    explore(3, || {
        let subject = Arc::new(S::new());
        subject.on_core(3).allocate();
        let (page, room) = (HandOver::new(), HandOver::new());
        let first = {
            let (subject, page) = (subject.clone(), page.clone());
            thread::spawn(move || {
                subject.on_core(0).allocate();
                page.give();
            })
        };
        let second = {
            let (subject, room) = (subject.clone(), room.clone());
            thread::spawn(move || {
                if page.taken() {
                    subject.on_core(1).free();
                    room.give();
                }
            })
        };
        let third = {
            let subject = subject.clone();
            thread::spawn(move || {
                let again = room.taken();
                if again {
                    subject.on_core(2).allocate();
                }
                again
            })
        };
        check(&subject.query(), &[1, 2]);
        first.join().unwrap();
        second.join().unwrap();
        let again = third.join().unwrap();
        let Answer::Exact(at_rest) = subject.query() else { panic!("no bracket is needed at rest") };
        assert!(at_rest == 2 || (at_rest == 1 && !again));
    });
}

/// One page's frame goes to and fro between two cores: one allocates, the other frees, again and again. At
/// most one lives, and the query can be kept from an exact answer.
fn to_and_fro<S: Subject>() {
    explore(4, || {
        let subject = Arc::new(S::new());
        let pages = [HandOver::new(), HandOver::new()];
        let rooms = [HandOver::new(), HandOver::new()];
        let allocating = {
            let (subject, pages, rooms) = (subject.clone(), pages.clone(), rooms.clone());
            thread::spawn(move || {
                let mut core = subject.on_core(0);
                core.allocate();
                pages[0].give();
                if rooms[0].taken() {
                    core.allocate();
                    pages[1].give();
                }
            })
        };
        let freeing = {
            let (subject, pages, rooms) = (subject.clone(), pages.clone(), rooms.clone());
            thread::spawn(move || {
                let mut core = subject.on_core(1);
                for (page, room) in pages.iter().zip(&rooms) {
                    if !page.taken() {
                        return;
                    }
                    core.free();
                    room.give();
                }
            })
        };
        check(&subject.query(), &[0, 1]);
        allocating.join().unwrap();
        freeing.join().unwrap();
    });
}

/// Three pages are freed one by one during the query: often enough for a bracket.
fn torn_down<S: Subject>() {
    explore(4, || {
        let subject = Arc::new(S::new());
        let mut core = subject.on_core(3);
        (0..3).for_each(|_| core.allocate());
        drop(core);
        let freeing = {
            let subject = subject.clone();
            thread::spawn(move || {
                let mut core = subject.on_core(0);
                (0..3).for_each(|_| core.free());
            })
        };
        let answer = subject.query();
        check(&answer, &[0, 1, 2, 3]);
        // Nothing is allocated meanwhile, so the bracket's upper end is a number that lived, too.
        if let Answer::Between(low, high) = answer {
            assert!(low < high && high <= 3);
            BRACKETS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        freeing.join().unwrap();
        assert_eq!(subject.query(), Answer::Exact(0));
    });
}

/// How many brackets were answered: that path is explored, too.
static BRACKETS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Core 0 allocates one page, then core 1 two. Whoever allocates two by one store makes 2 a number that never
/// was, and the query must not name it; one by one, all four were.
fn two_at_once<S: Subject>(lived: &'static [i64]) {
    explore(4, move || {
        let subject = Arc::new(S::new());
        let done = HandOver::new();
        let first = {
            let (subject, done) = (subject.clone(), done.clone());
            thread::spawn(move || {
                subject.on_core(0).allocate();
                done.give();
            })
        };
        let second = {
            let subject = subject.clone();
            thread::spawn(move || {
                if done.taken() {
                    subject.on_core(1).allocate_two();
                }
            })
        };
        check(&subject.query(), lived);
        first.join().unwrap();
        second.join().unwrap();
    });
}

#[test]
fn loom_a_page_freed_on_another_core_is_counted_once() {
    handed_over::<Counters>();
}

#[test]
fn loom_a_frame_to_and_fro_is_at_most_one_page() {
    to_and_fro::<Counters>();
}

#[test]
fn loom_frees_during_a_query_give_a_bracket() {
    torn_down::<Counters>();
    assert!(BRACKETS.load(std::sync::atomic::Ordering::Relaxed) > 0);
}

#[test]
fn loom_every_step_of_allocated_was() {
    two_at_once::<Counters>(&[0, 1, 2, 3]);
}

#[test]
fn loom_a_mutant_without_a_fault_passes() {
    handed_over::<Mutant<0>>();
    to_and_fro::<Mutant<0>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_net_signed_slots_must_fail() {
    handed_over::<Mutant<1>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_allocated_first_must_fail() {
    handed_over::<Mutant<2>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_freed_read_once_must_fail() {
    handed_over::<Mutant<3>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_relaxed_stores_must_fail() {
    handed_over::<Mutant<4>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_relaxed_loads_must_fail() {
    handed_over::<Mutant<5>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_relaxed_load_of_allocated_must_fail() {
    handed_over::<Mutant<6>>();
}

#[test]
#[should_panic(expected = "never lived")]
fn loom_allocated_in_batches_must_fail() {
    two_at_once::<Mutant<7>>(&[0, 1, 3]);
}
