//! The cores: a block for each, reached through GS, and how they are started, kicked, put to sleep and stopped.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;
use core::ops::Range;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use memory::Hpa;

use super::tables::{self, CoreTables, HandlerStacks};
use super::trampoline::Trampoline;
use super::{apic, cpu, machine_check, power, stacks, time};

/// Cores that can be used; a machine with more runs on the first ones.
pub const CORES_MAX: usize = 64;

/// Cores that stay off because there is no room for them: counters, stacks and caches are for [`CORES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surplus {
    /// Cores that the machine has.
    pub cores: usize,
}

impl fmt::Display for Surplus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this machine has {} cores, and Umbra has counters and stacks for {CORES_MAX}: the other {} stay off; \
             to use them, raise CORES_MAX in hypervisor/src/host/cores.rs and build again",
            self.cores,
            self.cores - CORES_MAX
        )
    }
}

/// How many of `cores` cores can be used (the boot core is one at least), and what is to be said of the others.
#[must_use]
pub const fn usable(cores: usize) -> (usize, Option<Surplus>) {
    match cores {
        0 => (1, None),
        1..=CORES_MAX => (cores, None),
        _ => (CORES_MAX, Some(Surplus { cores })),
    }
}

/// How long a core may take from its startup IPI to our code: 100 ms.
const START_LIMIT_NS: u64 = 100_000_000;

const ABSENT: u8 = 0;
const ONLINE: u8 = 1;

/// What belongs to one core. The assembly relies on the places of the first two fields.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct PerCore {
    /// The block's own address: what `this_core` reads.
    this: AtomicU64,
    /// 1: somebody wants this core's attention (set by the NMI handler and by [`kick`]). The core clears it before
    /// it looks at its requests.
    pub kick: AtomicU8,
    state: AtomicU8,
    index: AtomicU32,
    apic_id: AtomicU32,
    smt_core: AtomicU32,
    nmis: AtomicU64,
    interrupts: AtomicU64,
    /// The time stamp counter when the core came to our code.
    started_tsc: AtomicU64,
    /// For the scheduler: what it keeps per core. The host code does not look at it.
    pub data: AtomicPtr<()>,
    tables: UnsafeCell<CoreTables>,
}

/// Where [`PerCore::kick`] is in the block: `cmp byte ptr gs:[KICK_OFFSET], 0`.
pub const KICK_OFFSET: usize = offset_of!(PerCore, kick);
const _: () = assert!(offset_of!(PerCore, this) == 0 && KICK_OFFSET == 8);

// SAFETY: everything is atomic but `tables`, which only its own core touches (see `PerCore::tables`).
unsafe impl Sync for PerCore {}

impl PerCore {
    const fn new() -> Self {
        Self {
            this: AtomicU64::new(0),
            kick: AtomicU8::new(0),
            state: AtomicU8::new(ABSENT),
            index: AtomicU32::new(0),
            apic_id: AtomicU32::new(0),
            smt_core: AtomicU32::new(0),
            nmis: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            started_tsc: AtomicU64::new(0),
            data: AtomicPtr::new(core::ptr::null_mut()),
            tables: UnsafeCell::new(CoreTables::new()),
        }
    }

    /// 0 for the boot core, then in the order of the MADT; less than [`CORES_MAX`].
    #[inline]
    #[must_use]
    pub fn index(&self) -> usize {
        self.index.load(Ordering::Relaxed) as usize
    }

    /// The id of its local APIC.
    #[inline]
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }

    /// Equal for the hyperthreads of one physical core.
    #[must_use]
    pub fn smt_core(&self) -> u32 {
        self.smt_core.load(Ordering::Relaxed)
    }

    /// NMIs taken in the hypervisor (not those that ended a guest's run).
    #[must_use]
    pub fn nmis(&self) -> u64 {
        self.nmis.load(Ordering::Relaxed)
    }

    /// Interrupts taken while idle.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// The handlers' own counters: only this core's handlers write them, so a plain add will do.
    pub(super) fn count_nmi(&self) {
        self.nmis.store(self.nmis.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn count_interrupt(&self) {
        self.interrupts.store(self.interrupts.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// The core's GDT and TSS. Only the core itself, or who prepares it before it runs, may use them.
    pub(super) fn tables(&self) -> *mut CoreTables {
        self.tables.get()
    }

    fn prepare(&'static self, index: usize, apic_id: u32) {
        self.this.store(core::ptr::from_ref(self) as u64, Ordering::Relaxed);
        self.index.store(index as u32, Ordering::Relaxed);
        self.apic_id.store(apic_id, Ordering::Relaxed);
        self.smt_core.store(apic_id >> smt_shift(), Ordering::Relaxed);
    }
}

/// Bits of the APIC id that number a core's hyperthreads (CPUID leaf 0Bh; processors without it that have VMX have
/// no hyperthreads).
fn smt_shift() -> u32 {
    let cpuid = raw_cpuid::CpuId::new();
    if let Some(mut levels) = cpuid.get_extended_topology_info()
        && let Some(level) = levels.find(|level| level.level_type() == raw_cpuid::TopologyType::SMT)
    {
        return level.shift_right_for_next_apic_id().min(31);
    }
    0
}

static CORES: [PerCore; CORES_MAX] = [const { PerCore::new() }; CORES_MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// This core's block.
#[inline]
#[must_use]
pub fn this_core() -> &'static PerCore {
    let block: *const PerCore;
    // SAFETY: GS points at this core's block from `tables::load` on, and its first word is its own address.
    unsafe {
        core::arch::asm!("mov {}, gs:[0]", out(reg) block, options(nostack, preserves_flags, readonly, pure));
    }
    // SAFETY: the blocks are static.
    unsafe { &*block }
}

/// Cores that run: their indices are 0 to this, exclusive.
#[must_use]
pub fn count() -> usize {
    COUNT.load(Ordering::Acquire)
}

/// The core of an index below [`count`].
#[must_use]
pub fn core(index: usize) -> Option<&'static PerCore> {
    CORES.get(index).filter(|core| core.state.load(Ordering::Acquire) == ONLINE)
}

/// All cores that run.
pub fn all() -> impl Iterator<Item = &'static PerCore> {
    CORES[..count()].iter()
}

/// Makes the boot core number 0, and loads its tables with the early handler stacks.
///
/// # Safety
/// Once, first of all, on the boot core, after [`tables::build_idt`].
pub unsafe fn adopt_boot_core() {
    let core = &CORES[0];
    core.prepare(0, apic::initial_id());
    // SAFETY: this is the core itself.
    unsafe { tables::set_handler_stacks(core, HandlerStacks::Early) };
    // SAFETY: once, as the caller promised.
    unsafe { tables::load(core) };
    core.state.store(ONLINE, Ordering::Release);
    COUNT.store(1, Ordering::Release);
}

/// Corrects the boot core's APIC id once its APIC can be asked.
pub fn set_boot_apic_id(id: u32) {
    CORES[0].prepare(0, id);
}

/// Asks for a core's attention: sets its kick byte and interrupts whatever it does, a guest with interrupts off and
/// sleep included. What was stored before is visible to it when it sees the byte.
#[inline]
pub fn kick(core: &PerCore) {
    ask(core);
    apic::send_nmi(core.apic_id());
}

/// The same without interrupting it: it sees the byte before it next enters a guest or sleeps. Whoever stores what
/// says that it is about to enter, before it looks at the byte, is found by who asks first and looks for that then.
#[inline]
pub fn ask(core: &PerCore) {
    core.kick.store(1, Ordering::SeqCst);
}

// Sleep until an interrupt or a kick. STI takes effect after the next instruction, so no interrupt is lost between
// it and HLT; an NMI could be, and its handler moves a return address inside the window to the end.
global_asm!(
    // Visible beyond this object file: the compiler may put the users of the labels into another.
    ".irp label, umbra_idle, umbra_idle_check, umbra_idle_end",
    ".globl \\label",
    ".hidden \\label",
    ".endr",
    ".pushsection .text.umbra_idle, \"ax\"",
    ".balign 16",
    "umbra_idle:",
    "umbra_idle_check:",
    "cmpb $0, %gs:{kick}",
    "jne umbra_idle_end",
    "sti",
    "hlt",
    "umbra_idle_end:",
    "cli",
    "ret",
    ".popsection",
    kick = const KICK_OFFSET,
    options(att_syntax)
);

unsafe extern "C" {
    fn umbra_idle();
    static umbra_idle_check: u8;
    static umbra_idle_end: u8;
}

/// The addresses between the look at the kick byte and the end of the sleep.
#[inline]
pub(super) fn idle_window() -> Range<u64> {
    (&raw const umbra_idle_check) as u64..(&raw const umbra_idle_end) as u64
}

/// Sleeps with interrupts on until one arrives (the timer of [`apic::arm_timer`], say) or the kick byte is set;
/// returns at once if it is set already.
#[inline]
pub fn idle() {
    // SAFETY: returns with interrupts off, as it was called; handlers leave all registers as they were.
    unsafe { umbra_idle() }
}

/// The core that ends the machine.
static STOPPER: AtomicUsize = AtomicUsize::new(NOBODY);
const NOBODY: usize = usize::MAX;

/// Whether the machine is ending, and this core is not the one that ends it: it shall halt.
#[must_use]
pub fn must_halt() -> bool {
    let stopper = STOPPER.load(Ordering::Acquire);
    stopper != NOBODY && stopper != this_core().index()
}

/// Halts every other core for ever, whatever it does.
pub fn stop_others() {
    let own = this_core().index();
    match STOPPER.compare_exchange(NOBODY, own, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(stopper) if stopper == own => return,
        // Two cores that end the machine at once: the second one halts.
        Err(_) => power::halt(),
    }
    if !apic::is_set_up() {
        return;
    }
    for core in all().filter(|core| core.index() != own) {
        apic::send_nmi(core.apic_id());
    }
}

/// What the started cores wait for: the function that they run.
static WORK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Starts the processors in `apic_ids` (the boot core among them is skipped) and leaves them waiting for
/// [`run_on_others`]. One that does not answer is reported and left out. Returns how many cores run, the boot core
/// included. The stacks of [`CORES_MAX`] cores, or of as many as there are, must be mapped.
pub fn start_others(apic_ids: &[u32], trampoline: &Trampoline) -> usize {
    let own = this_core().apic_id();
    let others = || apic_ids.iter().copied().filter(|&id| id != own);
    for id in others().take(CORES_MAX - 1) {
        apic::send_init(id);
    }
    // SDM Vol. 3, "MP Initialization Protocol Algorithm": 10 ms after INIT, then up to two startup IPIs.
    time::busy_wait_ns(10_000_000);
    for id in others() {
        let index = count();
        if index == CORES_MAX {
            break;
        }
        let core = &CORES[index];
        core.prepare(index, id);
        // SAFETY: the core does not run yet, and its stacks are mapped.
        unsafe { tables::set_handler_stacks(core, HandlerStacks::Guarded) };
        trampoline.aim(stacks::top(index, stacks::Use::Main), core, core_main);
        let before = time::tsc();
        if start(core, trampoline.page()) {
            COUNT.store(index + 1, Ordering::Release);
            if !(before..=time::tsc()).contains(&core.started_tsc.load(Ordering::Relaxed)) {
                log::warn!(
                    "the time stamp counter of core {index} differs from the boot core's: guests' clocks may jump"
                );
            }
        } else {
            // Keeps a late core from taking the next one's block: it waits for a startup IPI again.
            apic::send_init(id);
            log::warn!(
                "the core with APIC id {id} did not answer within {} ms of INIT and SIPI: it is left out",
                START_LIMIT_NS / 1_000_000
            );
        }
    }
    count()
}

fn start(core: &PerCore, page: Hpa) -> bool {
    let is_online = || core.state.load(Ordering::Acquire) == ONLINE;
    for limit_ns in [1_000_000, START_LIMIT_NS] {
        apic::send_startup(core.apic_id(), (page.0 >> 12) as u8);
        let start = time::tsc();
        while time::ticks_to_ns(time::tsc().wrapping_sub(start)) < limit_ns {
            if is_online() {
                return true;
            }
            core::hint::spin_loop();
        }
    }
    is_online()
}

/// Where the trampoline leads: on our tables and this core's own stack.
extern "C" fn core_main(core: &'static PerCore) -> ! {
    cpu::set_up();
    machine_check::arm();
    // SAFETY: once, by this core; its handler stacks were set before it was started.
    unsafe { tables::load(core) };
    apic::enable();
    core.started_tsc.store(time::tsc(), Ordering::Relaxed);
    core.state.store(ONLINE, Ordering::Release);
    loop {
        let work = WORK.load(Ordering::Acquire);
        if work.is_null() {
            core::hint::spin_loop();
            continue;
        }
        // SAFETY: only `run_on_others` stores here, and only functions of this type.
        let work = unsafe { core::mem::transmute::<*mut (), fn(&'static PerCore)>(work) };
        // The trampoline's page is unmapped by now: forget it.
        x86_64::instructions::tlb::flush_all();
        work(core);
        power::halt();
    }
}

/// Lets every started core run `work`, once; a core whose `work` returns halts. The boot core goes on.
pub fn run_on_others(work: fn(&'static PerCore)) {
    WORK.store(work as *mut (), Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_beyond_the_slots_stay_off_and_are_named_with_the_remedy() {
        assert_eq!([0, 1, 63, CORES_MAX].map(usable), [1, 1, 63, CORES_MAX].map(|count| (count, None)));
        let (count, surplus) = usable(CORES_MAX + 16);
        assert_eq!(count, CORES_MAX);
        let told = surplus.unwrap().to_string();
        assert!(told.contains("80 cores") && told.contains("the other 16 stay off"), "{told}");
        assert!(told.contains("raise CORES_MAX"), "{told}");
    }
}
