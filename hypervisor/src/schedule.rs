//! Which vCPU runs where and when. Each core has a queue of its own vCPUs and goes round it by time slices.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use machine::manifest::End;
use memory::counters::Writer;
use memory::{Counters, Event};
use spin::{Mutex, Once};

use crate::host::cores::{self, CORES_MAX, PerCore};
use crate::host::{Host, apic, time};
use crate::vcpu::{Leave, Vcpu};
use crate::vmx::invvpid::Invvpid;

/// The longest a vCPU runs while another waits for its core.
const SLICE_NS: u64 = 10_000_000;
/// How often a core with nothing to wait for looks around: typed input comes without an interrupt.
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

/// A vCPU on its way to a core: it is made there, on the core that owns its VMCS.
pub type Placed = Box<dyn FnOnce(&Core) -> Option<Box<Vcpu>> + Send>;

/// Chooses the core for a vCPU that may run on `allowed` (empty: any): the one with the fewest.
pub fn choose_core(allowed: &[u32], cores: usize) -> usize {
    (0..cores)
        .filter(|&core| allowed.is_empty() || allowed.contains(&(core as u32)))
        .min_by_key(|&core| LOAD[core].load(Ordering::Relaxed))
        .unwrap_or(0)
}

/// Puts a vCPU on a core.
pub fn place(core: usize, vcpu: Placed) {
    LOAD[core].fetch_add(1, Ordering::Relaxed);
    PLACED[core].lock().push(vcpu);
    if let Some(core) = cores::core(core) {
        cores::kick(core);
    }
}

struct Slot {
    vcpu: Box<Vcpu>,
    /// Not before this TSC value, unless kicked.
    sleeps_until: Option<u64>,
}

/// The life of a core: runs its vCPUs, sleeps while all of them sleep. `ended` is told of each guest's end.
pub fn run(core: &Core, ended: &dyn Fn(&Core, Box<Vcpu>, End), chores: &dyn Fn(&Core) -> bool) -> ! {
    let mut queue: Vec<Slot> = Vec::new();
    let mut current: Option<usize> = None;
    let mut next = 0;
    loop {
        let new = core::mem::take(&mut *PLACED[core.index].lock());
        for make in new {
            if let Some(index) = current.take() {
                // Another VMCS becomes the current one.
                queue[index].vcpu.unload();
            }
            if let Some(vcpu) = make(core) {
                queue.push(Slot { vcpu, sleeps_until: None });
            }
        }
        let working = chores(core);
        let now = time::tsc();
        let ready = (0..queue.len()).map(|i| (next + i) % queue.len()).find(|&i| {
            let slot = &queue[i];
            slot.sleeps_until.is_none_or(|tsc| now >= tsc) || slot.vcpu.wants_attention()
        });
        let Some(index) = ready else {
            sleep(core, queue.iter().filter_map(|slot| slot.sleeps_until).min(), working);
            continue;
        };
        let switch = current != Some(index);
        if switch && let Some(old) = current {
            queue[old].vcpu.unload();
        }
        current = Some(index);
        next = index + 1;
        let slice_end_tsc = now + time::ns_to_ticks(SLICE_NS);
        let leave = queue[index].vcpu.run(core, switch, slice_end_tsc);
        match leave {
            Leave::Slice => {
                core.writer.count(Event::SliceEnd);
                queue[index].sleeps_until = None;
            }
            Leave::Halted(until) => queue[index].sleeps_until = Some(until.unwrap_or(u64::MAX)),
            Leave::Ended(end) => {
                let slot = queue.remove(index);
                LOAD[core.index].fetch_sub(1, Ordering::Relaxed);
                current = None;
                ended(core, slot.vcpu, end);
            }
        }
    }
}

/// Sleeps until `until_tsc`, a kick, or the next time to look around.
fn sleep(core: &Core, until_tsc: Option<u64>, working: bool) {
    core.writer.count(Event::Idle);
    let start = time::tsc();
    let look = if working { 0 } else { LOOK_NS };
    let wait_ns = until_tsc.map_or(u64::MAX, |tsc| time::ticks_to_ns(tsc.saturating_sub(start)));
    if wait_ns > 0 && look > 0 {
        apic::arm_timer(wait_ns.min(look));
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
