//! Several processors on one set of page tables: counters, interrupts between them, remote flushes (H14), entries that
//! two change while others use them (H3), and a page that is RAM or a device under an access (H12).
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use test_guests::paging::{AddressSpace, DATA, FREE, P, W};
use test_guests::smp::{self, Barrier, MAX, Target};
use test_guests::trap::{Frame, handle};
use test_guests::{cpu, entry, println};

entry!(main);

const FLUSH_VECTOR: u8 = 0x50;
const PING_VECTOR: u8 = 0x60;
const PONG_VECTOR: u8 = 0x61;
const COUNT_VECTOR: u8 = 0x62;

/// Additions of each processor to the shared counters.
const ADDITIONS: u64 = 20_000;
/// Interrupts from each processor to each other one and back.
const PINGS: u32 = 100;
/// Rounds of each kind of flush, on the same root and on several.
const FLUSH_ROUNDS: u64 = 400;
/// Settled states between which entries are changed behind each other's back, and changes between two of them.
const TOGGLE_ROUNDS: u64 = 150;
const TOGGLES: u64 = 40;
/// Accesses to the page whose mapping is being changed.
const LOOKS: u64 = 20;

/// The page whose mapping changes, in a leaf table of its own.
const PAGE: u64 = FREE + (5 << 21);
/// Two frames that it is mapped to, and what their first words hold.
const FRAMES: [u64; 2] = [DATA, DATA + 4096];
const VALUES: [u64; 2] = [0x1111_0000_aaaa_0000, 0x2222_0000_bbbb_0000];
/// The frame of the local APIC's registers.
const APIC: u64 = 0xfee0_0000;
const APIC_ID_OFFSET: u64 = 0x20;
const RAM_SAYS: u32 = 0x00c0_ffee;

static PROCESSORS: AtomicU32 = AtomicU32::new(1);
static BARRIER: Barrier = Barrier::new();
static BAD: AtomicU32 = AtomicU32::new(0);
/// The address of the page's entry; the roots, one for each processor.
static ENTRY: AtomicU64 = AtomicU64::new(0);
static ROOTS: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];

fn processors() -> usize {
    PROCESSORS.load(Ordering::Relaxed) as usize
}

fn meet() {
    BARRIER.wait(processors());
}

fn check(name: &str, good: bool) {
    if !good && BAD.fetch_add(1, Ordering::Relaxed) < 20 {
        say(name);
    }
}

/// Two processors that print at once would mix their lines.
fn say(text: &str) {
    static PRINTING: AtomicBool = AtomicBool::new(false);
    while PRINTING.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    println!("processor {}: {text}: BAD", smp::number());
    PRINTING.store(false, Ordering::Release);
}

// An access that may fault: the value in RAX, and whether it faulted in RDX. The handler goes on at its end.
global_asm!(
    "try_read:",
    "xor edx, edx",
    "mov rax, [rdi]",
    "try_read_end: ret",
    "try_write:",
    "xor edx, edx",
    "mov [rdi], rsi",
    "try_write_end: ret",
);

#[repr(C)]
struct Tried {
    value: u64,
    fault: u64,
}

unsafe extern "C" {
    fn try_read(address: u64) -> Tried;
    fn try_write(address: u64, value: u64) -> Tried;
    static try_read_end: [u8; 0];
    static try_write_end: [u8; 0];
}

fn page_fault(frame: &mut Frame) {
    let (read, write) = (&raw const try_read_end as u64, &raw const try_write_end as u64);
    frame.rip = match frame.rip {
        rip if (read - 8..read).contains(&rip) => read,
        rip if (write - 8..write).contains(&rip) => write,
        rip => {
            println!("page fault at {rip:#x}, address {:#x}: BAD", cpu::read_cr2());
            test_guests::entry::exit(test_guests::entry::FAILED);
        }
    };
    frame.registers[11] = 1;
}

/// The word at an address, or `None` if the access faulted.
fn read(address: u64) -> Option<u64> {
    // SAFETY: a fault is dealt with by the handler above.
    let tried = unsafe { try_read(address) };
    (tried.fault == 0).then_some(tried.value)
}

/// Whether a write to an address succeeded.
fn write(address: u64, value: u64) -> bool {
    // SAFETY: the address is in the page under test, or faults.
    unsafe { try_write(address, value) }.fault == 0
}

// ---- counters and locks ----

static ADDED: AtomicU64 = AtomicU64::new(0);
static TICKETS: AtomicU32 = AtomicU32::new(0);
static SERVED: AtomicU32 = AtomicU32::new(0);
/// Where a word is changed under the lock, by plain loads and stores.
const LOCKED: u64 = DATA + 2 * 4096;

fn counters() {
    for turn in 0..ADDITIONS {
        ADDED.fetch_add(1, Ordering::Relaxed);
        if turn % 16 == 0 {
            let ticket = TICKETS.fetch_add(1, Ordering::Relaxed);
            while SERVED.load(Ordering::Acquire) != ticket {
                core::hint::spin_loop();
            }
            cpu::write64(LOCKED, cpu::read64(LOCKED) + 1);
            SERVED.store(ticket.wrapping_add(1), Ordering::Release);
        }
    }
    meet();
    let all = processors() as u64 * ADDITIONS;
    check("the shared counter", ADDED.load(Ordering::Relaxed) == all);
    check("the word under the lock", cpu::read64(LOCKED) == all / 16);
}

// ---- interrupts ----

/// By receiver.
static PINGED: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static PONGED: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static COUNTED: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static NMIS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
/// Who pings.
static PINGER: AtomicU32 = AtomicU32::new(0);

fn count(counters: &[AtomicU32; MAX]) -> u32 {
    counters.iter().map(|counter| counter.load(Ordering::Acquire)).sum()
}

fn await_count(counters: &[AtomicU32; MAX], wanted: u32) {
    while count(counters) != wanted {
        core::hint::spin_loop();
    }
}

/// Each in turn sends to each other one, which answers.
fn pings() {
    for (sender, pongs) in PONGED.iter().enumerate().take(processors()) {
        meet();
        PINGER.store(sender as u32, Ordering::Release);
        meet();
        if smp::number() == sender {
            for receiver in (0..processors()).filter(|&receiver| receiver != sender) {
                let before = pongs.load(Ordering::Acquire);
                for ping in 1..=PINGS {
                    smp::send(Target::One(receiver), PING_VECTOR);
                    while pongs.load(Ordering::Acquire) != before + ping {
                        core::hint::spin_loop();
                    }
                }
            }
        }
        meet();
    }
    let each = PINGS * (processors() as u32 - 1);
    check("pings", PINGED[smp::number()].load(Ordering::Relaxed) == each);
    check("pongs", PONGED[smp::number()].load(Ordering::Relaxed) == each);
}

/// What the first processor sends arrives at whom it is for, and wakes who sleeps.
fn kinds() {
    let others = processors() as u32 - 1;
    let all = (1 << processors()) - 1_u32;
    meet();
    if smp::number() == 0 {
        let set = all as u8 & !1;
        for (target, receivers, own) in [
            (Target::Others, others, 0),
            (Target::One(1), 1, 0),
            (Target::Set(set), others, 0),
            (Target::Lowest(set), 1, 0),
            (Target::Own, 1, 1),
        ] {
            let before = (count(&COUNTED), COUNTED[0].load(Ordering::Relaxed));
            smp::send(target, COUNT_VECTOR);
            await_count(&COUNTED, before.0 + receivers);
            check("an interrupt for itself", COUNTED[0].load(Ordering::Relaxed) == before.1 + own);
        }
        let nmis = count(&NMIS);
        smp::send_nmi(Target::Others);
        await_count(&NMIS, nmis + others);
        check("an NMI for itself", NMIS[0].load(Ordering::Relaxed) == 0);
        ASLEEP_PHASE.store(1, Ordering::Release);
        // Everybody else sleeps now, or will: each wakes by an interrupt, one by one.
        for (receiver, sleeps) in SLEEPS.iter().enumerate().take(processors()).skip(1) {
            while sleeps.load(Ordering::Acquire) == 0 {
                core::hint::spin_loop();
            }
            smp::send(Target::One(receiver), COUNT_VECTOR);
            while sleeps.load(Ordering::Acquire) != 2 {
                core::hint::spin_loop();
            }
        }
    } else {
        while ASLEEP_PHASE.load(Ordering::Acquire) == 0 {
            core::hint::spin_loop();
        }
        cpu::disable_interrupts();
        let before = COUNTED[smp::number()].load(Ordering::Relaxed);
        SLEEPS[smp::number()].store(1, Ordering::Release);
        while COUNTED[smp::number()].load(Ordering::Relaxed) == before {
            cpu::wait_for_interrupt();
        }
        SLEEPS[smp::number()].store(2, Ordering::Release);
        cpu::enable_interrupts();
    }
    meet();
}

static ASLEEP_PHASE: AtomicU32 = AtomicU32::new(0);
/// 1: asleep, or about to be; 2: woken.
static SLEEPS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];

// ---- more tables than a tight budget has room for ----

/// Pages, each with a leaf table of its own, that are mapped to fewer frames.
const ALIASES: u64 = 240;
const ALIASED: u64 = 60;
const PASSES: u64 = 6;
const FIRST_ALIASED: u64 = DATA + 16 * 4096;

fn alias(number: u64) -> u64 {
    FREE + (16 + number) * (2 << 20)
}

fn tag(frame: u64) -> u64 {
    frame.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn map_aliases(space: &mut AddressSpace) {
    for frame in (0..ALIASED).map(|number| FIRST_ALIASED + number * 4096) {
        (0..512).for_each(|word| cpu::write64(frame + 8 * word, 0));
        cpu::write64(frame, tag(frame));
    }
    for number in 0..ALIASES {
        space.map(alias(number), FIRST_ALIASED + number % ALIASED * 4096, P | W);
    }
}

/// All go through all of them, each in an order of its own, and count in each frame: what one processor reclaims, the
/// others use just then.
fn aliases() {
    let me = smp::number() as u64;
    let slot = 64 * (me + 1);
    for pass in 0..PASSES {
        for step in 0..ALIASES {
            // A multiplier without a common factor with their number visits each once.
            let number = (step * [1, 7, 239, 11][me as usize % 4] + pass * 31 + me * 60) % ALIASES;
            let page = alias(number);
            check("an alias", read(page) == Some(tag(FIRST_ALIASED + number % ALIASED * 4096)));
            check("a count", write(page + slot, read(page + slot).unwrap_or(0) + 1));
        }
    }
    meet();
    for frame in (0..ALIASED).map(|number| FIRST_ALIASED + number * 4096) {
        check("what was counted", cpu::read64(frame + slot) == PASSES * (ALIASES / ALIASED));
    }
    meet();
}

// ---- remote flushes ----

/// The round whose flush each processor has carried out.
static FLUSHED: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];
static ROUND: AtomicU64 = AtomicU64::new(0);

fn flush(_: &mut Frame) {
    let round = ROUND.load(Ordering::Acquire);
    forget(round.is_multiple_of(2));
    FLUSHED[smp::number()].store(round, Ordering::Release);
    smp::end_of_interrupt();
}

#[derive(Clone, Copy)]
enum Change {
    Remap,
    Unmap,
    Protect,
}

fn set_entry(value: u64) {
    cpu::write64(ENTRY.load(Ordering::Relaxed), value);
}

/// Processor 0 changes the entry, flushes, and has all others flush: from then on nobody may use the old translation.
fn remote_flushes(change: Change) {
    let me = smp::number();
    // The last word that a processor writes into the page, by which what came too late is found.
    let slot = PAGE + 64 * (me as u64 + 1);
    for round in 0..FLUSH_ROUNDS {
        let old = (round % 2) as usize;
        if me == 0 {
            set_entry(FRAMES[old] | P | W);
        }
        meet();
        cpu::invlpg(PAGE);
        check("the page before the change", read(PAGE) == Some(VALUES[old]) && write(slot, round));
        let number = ROUND.load(Ordering::Acquire) + 1;
        meet();
        let settled = |value: Option<u64>, written: bool| match change {
            Change::Remap => value == Some(VALUES[1 - old]) && written,
            Change::Unmap => value.is_none() && !written,
            Change::Protect => value == Some(VALUES[old]) && !written,
        };
        if me == 0 {
            ROUND.store(number, Ordering::Release);
            set_entry(match change {
                Change::Remap => FRAMES[1 - old] | P | W,
                Change::Unmap => 0,
                Change::Protect => FRAMES[old] | P,
            });
            cpu::invlpg(PAGE);
            smp::send(Target::Others, FLUSH_VECTOR);
            for flushed in &FLUSHED[1..processors()] {
                while flushed.load(Ordering::Acquire) != number {
                    core::hint::spin_loop();
                }
            }
        } else {
            while FLUSHED[me].load(Ordering::Acquire) != number {
                // Old or new: both are right until it has flushed.
                let value = read(PAGE);
                check("a value from nowhere", value.is_none_or(|value| VALUES.contains(&value)));
                write(slot, round);
            }
        }
        for look in 0..4 {
            check("a stale translation", settled(read(PAGE), write(slot, round << 32 | look)));
        }
        meet();
        if me == 0 && !matches!(change, Change::Remap) {
            // Nothing written after the flush has reached the frame.
            for other in 0..processors() as u64 {
                check("a late write", cpu::read64(FRAMES[old] + 64 * (other + 1)) >> 32 == 0);
            }
        }
        if me == 0 {
            for frame in FRAMES {
                (1..=MAX as u64).for_each(|slot| cpu::write64(frame + 64 * slot, 0));
            }
        }
    }
    meet();
}

// ---- entries that two change at once ----

/// Flushes the page, alone or with all others.
fn forget(alone: bool) {
    if alone {
        cpu::invlpg(PAGE);
    } else {
        cpu::write_cr3(cpu::read_cr3());
    }
}

/// Changes bits of the entry as a locked instruction does.
fn toggle(bits: u64) {
    let entry = ENTRY.load(Ordering::Relaxed);
    // SAFETY: an entry of a page table of this guest's, which nobody holds a reference to.
    unsafe { asm!("lock xor [{}], {}", in(reg) entry, in(reg) bits, options(nostack)) }
}

fn toggles() {
    let me = smp::number();
    let slot = PAGE + 64 * (me as u64 + 1);
    let target = FRAMES[0] ^ FRAMES[1];
    for round in 0..TOGGLE_ROUNDS {
        meet();
        match me {
            1 => (0..TOGGLES).for_each(|_| {
                toggle(W);
                if processors() < 4 {
                    toggle(target);
                }
            }),
            2 if processors() >= 4 => (0..TOGGLES).for_each(|_| toggle(target)),
            _ => (0..LOOKS).for_each(|look| {
                forget(round / 4 % 2 == 0);
                let value = read(PAGE);
                check("a value from nowhere", value.is_some_and(|value| VALUES.contains(&value)));
                write(slot, look);
            }),
        }
        meet();
        // Nobody changes it any more: one flush, and what the entry says holds.
        // Whoever sets it last may have been able to write the table for long: that write too must be heard of.
        let (frame, writable) = ((round % 2) as usize, round / 2 % 2 == 0);
        if me == round as usize % processors() {
            set_entry(FRAMES[frame] | P | if writable { W } else { 0 });
        }
        meet();
        forget(round / 4 % 2 == 0);
        check("the settled value", read(PAGE) == Some(VALUES[frame]));
        check("the settled right", write(slot, round) == writable);
        check("the write's place", !writable || cpu::read64(FRAMES[frame] + 64 * (me as u64 + 1)) == round);
    }
    meet();
}

/// One changes the page between RAM and the local APIC while the others read it: each read is the one or the other's.
fn devices() {
    let me = smp::number();
    let id = smp::apic_id() << 24;
    if me == 0 {
        cpu::write32(FRAMES[0] + APIC_ID_OFFSET, RAM_SAYS);
        set_entry(FRAMES[0] | P | W);
    }
    for round in 0..TOGGLE_ROUNDS {
        meet();
        if me == 1 {
            (0..TOGGLES).for_each(|_| toggle(APIC ^ FRAMES[0]));
        } else {
            for _ in 0..LOOKS {
                cpu::invlpg(PAGE);
                let value = cpu::read32(PAGE + APIC_ID_OFFSET);
                check("neither RAM nor the APIC", value == RAM_SAYS || value == id);
            }
        }
        meet();
        let device = round % 2 == 1;
        if me == 0 {
            set_entry(if device { APIC } else { FRAMES[0] } | P | W);
        }
        meet();
        cpu::invlpg(PAGE);
        check("the settled device", cpu::read32(PAGE + APIC_ID_OFFSET) == if device { id } else { RAM_SAYS });
        meet();
        if me == 0 {
            set_entry(FRAMES[0] | P | W);
        }
    }
    meet();
}

fn work(number: usize) {
    cpu::enable_interrupts();
    meet();
    let stage = |name: &str| {
        if number == 0 {
            println!("smp: {name}: {}", if BAD.load(Ordering::Relaxed) == 0 { "ok" } else { "BAD" });
        }
        meet();
    };
    counters();
    stage("counters");
    pings();
    stage("pings");
    kinds();
    stage("kinds of interrupts");
    aliases();
    stage("many tables");
    for (root, name) in [(0, "one root"), (number, "a root each")] {
        cpu::write_cr3(ROOTS[root].load(Ordering::Relaxed));
        for change in [Change::Remap, Change::Unmap, Change::Protect] {
            remote_flushes(change);
        }
        stage(name);
    }
    toggles();
    stage("toggled entries");
    devices();
    stage("RAM or a device");
}

fn main() -> u8 {
    handle(2, |_| _ = NMIS[smp::number()].fetch_add(1, Ordering::Release));
    handle(14, page_fault);
    handle(FLUSH_VECTOR, flush);
    handle(PING_VECTOR, |_| {
        PINGED[smp::number()].fetch_add(1, Ordering::Release);
        smp::end_of_interrupt();
        smp::send(Target::One(PINGER.load(Ordering::Acquire) as usize), PONG_VECTOR);
    });
    handle(PONG_VECTOR, |_| {
        PONGED[smp::number()].fetch_add(1, Ordering::Release);
        smp::end_of_interrupt();
    });
    handle(COUNT_VECTOR, |_| {
        COUNTED[smp::number()].fetch_add(1, Ordering::Release);
        smp::end_of_interrupt();
    });
    let Some(machine) = smp::discover() else {
        println!("smp: no processors in ACPI's tables: BAD");
        return 1;
    };
    if !(2..=MAX).contains(&machine.processors) {
        println!("smp: {} processors, and 2 to {MAX} are wanted: BAD", machine.processors);
        return 1;
    }
    PROCESSORS.store(machine.processors as u32, Ordering::Relaxed);
    let mut space = AddressSpace::install();
    for frame in 0..2 {
        (0..512).for_each(|word| cpu::write64(FRAMES[frame] + 8 * word, 0));
        cpu::write64(FRAMES[frame], VALUES[frame]);
    }
    cpu::write64(LOCKED, 0);
    ENTRY.store(space.entry(PAGE), Ordering::Relaxed);
    set_entry(FRAMES[0] | P | W);
    map_aliases(&mut space);
    ROOTS[0].store(space.root(), Ordering::Relaxed);
    ROOTS[1..machine.processors].iter().for_each(|root| root.store(space.sibling(), Ordering::Relaxed));
    if !smp::start_all(&machine, space.root(), work) {
        println!("smp: a processor did not come up: BAD");
        return 1;
    }
    println!("smp: {} processors", machine.processors);
    work(0);
    let bad = BAD.load(Ordering::Relaxed);
    println!("smp done: {bad} bad");
    bad.min(200) as u8
}
