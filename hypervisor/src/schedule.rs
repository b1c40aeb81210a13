//! Which vCPU runs where and when. Each core has a queue of its own vCPUs and goes round it by time slices.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use machine::manifest::End;
use memory::counters::Writer;
use memory::{Counters, Event, GuestId};
use spin::{Mutex, Once};

use crate::console;
use crate::host::cores::{self, CORES_MAX, PerCore};
use crate::host::{Host, apic, ioapic, legacy, time};
use crate::vcpu::{Leave, Vcpu};
use crate::vmx::controls::Feature;
use crate::vmx::invvpid::Invvpid;

/// The longest a vCPU runs while another waits for its core.
const SLICE_NS: u64 = 10_000_000;
/// The shortest time a vCPU runs before one that wakes up takes the core from it.
const SLICE_MIN_NS: u64 = 500_000;
/// How often the boot core, with nothing to wait for, looks around: typed input comes without an interrupt.
const LOOK_NS: u64 = 5_000_000;

/// What a core carries along wherever it goes.
pub struct Core {
    /// Its number.
    pub index: usize,
    /// Its block in the host's own tables.
    pub per_core: &'static PerCore,
    /// The writer of its counters.
    pub writer: Writer<'static>,
    /// How it forgets translations.
    pub invvpid: Invvpid,
    /// The machine.
    pub host: &'static Host,
    /// Whose vCPU it took up last, see [`Guest::identity`](crate::guest::Guest::identity).
    pub last_guest: Cell<Option<(GuestId, u64)>>,
}

static COUNTERS: Once<Counters> = Once::new();

/// The counters of all cores.
pub fn counters() -> &'static Counters {
    COUNTERS.call_once(|| Counters::new(CORES_MAX))
}

/// vCPUs placed on each core and not yet taken into its queue.
static PLACED: [Mutex<Vec<Placed>>; CORES_MAX] = [const { Mutex::new(Vec::new()) }; CORES_MAX];
/// vCPUs on each core.
static LOAD: [AtomicUsize; CORES_MAX] = [const { AtomicUsize::new(0) }; CORES_MAX];
/// The TSC ticks that each core spent without a guest.
static IDLE_TICKS: [AtomicU64; CORES_MAX] = [const { AtomicU64::new(0) }; CORES_MAX];

/// A vCPU of this core that was not in its guest has been kicked, or the one that has the core spins for another:
/// whoever has the core gives it back as soon as it has had [`SLICE_MIN_NS`] of it.
static WOKEN: [AtomicBool; CORES_MAX] = [const { AtomicBool::new(false) }; CORES_MAX];

/// A vCPU of `core` may want its turn soon.
pub fn wake(core: usize) {
    WOKEN[core].store(true, Ordering::SeqCst);
}

/// Whether each core takes part: not yet known, yes, no.
static PART: [AtomicU8; CORES_MAX] = [const { AtomicU8::new(UNKNOWN) }; CORES_MAX];
const UNKNOWN: u8 = 0;
const SERVES: u8 = 1;
const LEFT_OUT: u8 = 2;
/// How long the boot core waits to hear whether the others could be taken into VMX operation.
const ANSWER_LIMIT_NS: u64 = 100_000_000;

/// A core says whether it will run guests.
pub fn announce(core: usize, serves: bool) {
    PART[core].store(if serves { SERVES } else { LEFT_OUT }, Ordering::Release);
}

/// Waits until each of `cores` cores has said whether it will run guests; one that does not is left out.
pub fn await_cores(cores: usize) {
    let start = time::tsc();
    let limit = time::ns_to_ticks(ANSWER_LIMIT_NS);
    while (0..cores).any(|core| PART[core].load(Ordering::Acquire) == UNKNOWN) {
        if time::tsc().wrapping_sub(start) > limit {
            log::warn!("not every core could be taken into VMX operation in time: guests run on the others");
            return;
        }
        core::hint::spin_loop();
    }
}

/// A vCPU on its way to a core: it is made there, on the core that owns its VMCS.
pub type Placed = Box<dyn FnOnce(&Core) -> Option<Box<Vcpu>> + Send>;

/// Chooses the core for a vCPU that may run on `allowed` (empty: any): the one with the fewest.
///
/// Hyperthreads share a physical core's buffers and predictors, so no two guests may run on them at once: the first
/// thread of each physical core does its work, its siblings stay idle. A sibling in `allowed` means its core.
pub fn choose_core(allowed: &[u32], cores: usize) -> usize {
    let smt_core = |core: usize| cores::core(core).map_or(core as u32, PerCore::smt_core);
    workers(cores, smt_core)
        .filter(|&core| PART[core].load(Ordering::Acquire) == SERVES)
        .filter(|&core| {
            allowed.is_empty() || allowed.iter().any(|&thread| smt_core(thread as usize) == smt_core(core))
        })
        .min_by_key(|&core| LOAD[core].load(Ordering::Relaxed))
        .unwrap_or(0)
}

/// The first thread of each physical core, of threads 0 to `threads`, exclusive.
fn workers(threads: usize, smt_core: impl Fn(usize) -> u32) -> impl Iterator<Item = usize> {
    (0..threads).filter(move |&thread| (0..thread).all(|earlier| smt_core(earlier) != smt_core(thread)))
}

/// Puts a vCPU on a core.
pub fn place(core: usize, vcpu: Placed) {
    LOAD[core].fetch_add(1, Ordering::Relaxed);
    PLACED[core].lock().push(vcpu);
    if let Some(core) = cores::core(core) {
        cores::kick(core);
    }
}

/// A vCPU's turn on its core, in ticks of the TSC.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// It began here.
    pub begin_tsc: u64,
    /// It ends here, if not before.
    pub end_tsc: u64,
}

impl Turn {
    /// When it ends, as things stand now.
    #[inline]
    #[must_use]
    pub fn end_on(&self, core: usize) -> u64 {
        if WOKEN[core].load(Ordering::SeqCst) {
            self.end_tsc.min(self.begin_tsc + time::ns_to_ticks(SLICE_MIN_NS))
        } else {
            self.end_tsc
        }
    }
}

struct Slot {
    vcpu: Box<Vcpu>,
    /// Not before this TSC value, unless kicked.
    sleeps_until: Option<u64>,
    /// TSC ticks it has had of the core, and what it was credited with for its sleep: see [`credited`].
    used_ticks: u64,
}

impl Slot {
    /// The core takes up another vCPU.
    fn put_down(&mut self) {
        self.vcpu.unload();
        self.vcpu.presence().account.lock().end();
    }
}

/// What a vCPU that wakes up is taken to have used of its core, of which the vCPU that is furthest behind has used
/// `floor`. Who sleeps does not save up more than one slice, or it would keep the others waiting for as long as it
/// slept.
const fn credited(used_ticks: u64, floor_ticks: u64, slice_ticks: u64) -> u64 {
    let least = floor_ticks.saturating_sub(slice_ticks);
    if used_ticks > least { used_ticks } else { least }
}

/// The vCPUs of one core. The core is the turn of whoever has used least of it; a slice ends early when one that
/// has used less wakes up.
#[derive(Default)]
struct Queue {
    slots: Vec<Slot>,
    /// What the vCPU that was last given a turn had used before it: it only grows.
    floor_ticks: u64,
}

impl Queue {
    fn add(&mut self, vcpu: Box<Vcpu>) {
        // One that waits for its guest to wake it has no turn before.
        let sleeps_until = vcpu.is_parked().then_some(u64::MAX);
        self.slots.push(Slot { vcpu, sleeps_until, used_ticks: self.floor_ticks });
    }

    /// The next turn's slot and the TSC value where it ends.
    fn next_turn(&mut self, now: u64) -> Option<(usize, u64)> {
        let slice = time::ns_to_ticks(SLICE_NS);
        for slot in &mut self.slots {
            if slot.sleeps_until.is_some_and(|tsc| now >= tsc || slot.vcpu.wants_attention()) {
                slot.sleeps_until = None;
                slot.used_ticks = credited(slot.used_ticks, self.floor_ticks, slice);
            }
        }
        let ready = self.slots.iter().enumerate().filter(|(_, slot)| slot.sleeps_until.is_none());
        let (index, slot) = ready.min_by_key(|(_, slot)| slot.used_ticks)?;
        self.floor_ticks = self.floor_ticks.max(slot.used_ticks);
        let floor = self.floor_ticks;
        let earliest = now + time::ns_to_ticks(SLICE_MIN_NS);
        let woken = self.slots.iter().filter_map(|sleeper| {
            let tsc = sleeper.sleeps_until?.max(earliest);
            let used_then = slot.used_ticks + (tsc - now);
            (credited(sleeper.used_ticks, floor, slice) < used_then).then_some(tsc)
        });
        Some((index, woken.fold(now + slice, u64::min)))
    }

    fn earliest_wake(&self) -> Option<u64> {
        self.slots.iter().filter_map(|slot| slot.sleeps_until).min()
    }
}

/// What is done once, on the boot core, before any vCPU runs.
fn prepare(host: &Host) {
    let smt_core = |core: usize| cores::core(core).map_or(core as u32, PerCore::smt_core);
    let working = workers(host.cores, smt_core).count();
    if working < host.cores {
        log::info!(
            "hyperthreads: {} of {} stay idle, so that no two guests share a physical core",
            host.cores - working,
            host.cores
        );
    }
    log::info!("speculation: {}", host.vmx.mitigations);
    if !host.vmx.controls.has(Feature::PreemptionTimer) {
        start_clock(host);
    }
}

/// Where there is no preemption timer, a slice of a guest that spins with interrupts off ends by an NMI: the PIT's
/// interrupt line, which the I/O APIC sends to every core as one. (The local APIC's timer has no such delivery
/// mode, and Bochs takes no external-interrupt exit from a guest that was entered with interrupts off.)
fn start_clock(host: &Host) {
    const EVERY_CORE: u8 = 0xff;
    if ioapic::route_nmi(host.platform.pit_gsi(), EVERY_CORE) {
        legacy::start_periodic_pit(SLICE_NS / 4);
        log::info!(
            "time slices: ended by the PIT, whose ticks reach every core as NMIs: no preemption timer"
        );
    } else {
        log::warn!(
            "time slices: no preemption timer, and no I/O APIC input for the PIT: guests that turn interrupts off \
             may keep their core for long"
        );
    }
}

/// The life of a core: runs its vCPUs, sleeps while all of them sleep.
///
/// `left` is told of each vCPU whose guest ends. `chores` is called between turns, at least once in a slice; it says whether
/// it wants to be called again at once.
pub fn run(core: &Core, left: &dyn Fn(&Core, Box<Vcpu>, End), chores: &dyn Fn(&Core) -> bool) -> ! {
    if core.index == 0 {
        prepare(core.host);
    }
    let mut queue = Queue::default();
    // The slot whose vCPU the core holds: its VMCS is the current one, its registers are in the core.
    let mut current: Option<usize> = None;
    loop {
        let new = core::mem::take(&mut *PLACED[core.index].lock());
        for make in new {
            if let Some(index) = current.take() {
                // Another VMCS becomes the current one.
                queue.slots[index].put_down();
            }
            match make(core) {
                Some(vcpu) => queue.add(vcpu),
                None => _ = LOAD[core.index].fetch_sub(1, Ordering::Relaxed),
            }
        }
        let working = chores(core);
        // Before the look at who was kicked: who is from here on ends the turn that begins now.
        WOKEN[core.index].store(false, Ordering::SeqCst);
        let now = time::tsc();
        let Some((index, slice_end_tsc)) = queue.next_turn(now) else {
            sleep(core, queue.earliest_wake(), working);
            continue;
        };
        let switch = current != Some(index);
        if switch && let Some(old) = current {
            queue.slots[old].put_down();
        }
        current = Some(index);
        let slot = &mut queue.slots[index];
        if switch {
            slot.vcpu.presence().account.lock().begin(core.index);
        }
        let leave = slot.vcpu.run(core, Turn { begin_tsc: now, end_tsc: slice_end_tsc });
        slot.used_ticks += time::tsc().wrapping_sub(now);
        match leave {
            Leave::Slice => core.writer.count(Event::SliceEnd),
            Leave::Halted(until) => slot.sleeps_until = Some(until.unwrap_or(u64::MAX)),
            Leave::Ended(end) => {
                let slot = queue.slots.remove(index);
                LOAD[core.index].fetch_sub(1, Ordering::Relaxed);
                current = None;
                slot.vcpu.presence().account.lock().end();
                left(core, slot.vcpu, end);
            }
        }
    }
}

/// Sleeps until `until_tsc`, a kick, or, on the boot core, the next time to look around.
fn sleep(core: &Core, until_tsc: Option<u64>, working: bool) {
    core.writer.count(Event::Idle);
    let start = time::tsc();
    let until_ns = until_tsc.map_or(u64::MAX, |tsc| time::ticks_to_ns(tsc.saturating_sub(start)));
    let wait_ns = if core.index == 0 { until_ns.min(LOOK_NS).min(console::patience_ns(0)) } else { until_ns };
    if wait_ns > 0 && !working {
        if wait_ns < u64::MAX {
            apic::arm_timer(wait_ns);
        }
        cores::idle();
        apic::disarm_timer();
    }
    core.per_core.kick.store(0, Ordering::Release);
    IDLE_TICKS[core.index].fetch_add(time::tsc() - start, Ordering::Relaxed);
}

/// TSC ticks that `core` spent asleep.
pub fn idle_ticks(core: usize) -> u64 {
    IDLE_TICKS.get(core).map_or(0, |ticks| ticks.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_of_a_working_thread_stay_idle() {
        let working =
            |smt_cores: &[u32]| workers(smt_cores.len(), |core| smt_cores[core]).collect::<Vec<_>>();
        assert_eq!(working(&[0, 1, 2, 3]), [0, 1, 2, 3]);
        assert_eq!(working(&[0, 0, 1, 1]), [0, 2]);
        assert_eq!(working(&[3, 5, 3, 5]), [0, 1]);
        assert_eq!(working(&[7]), [0]);
    }

    #[test]
    fn a_sleeper_saves_up_one_slice_at_most() {
        assert_eq!(credited(0, 1_000, 10), 990);
        assert_eq!(credited(995, 1_000, 10), 995);
        // One that has had more than its share is not forgiven.
        assert_eq!(credited(1_500, 1_000, 10), 1_500);
        assert_eq!(credited(0, 5, 10), 0);
    }
}
