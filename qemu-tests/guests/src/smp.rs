//! More processors than one: found in ACPI's MADT, woken through its mailbox, told apart, and kept in step.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{cpu, trap};

/// Most processors of a guest here.
pub const MAX: usize = 8;

const APIC: u64 = 0xfee0_0000;
const APIC_ID: u64 = APIC + 0x20;
const APIC_EOI: u64 = APIC + 0xb0;
const APIC_LDR: u64 = APIC + 0xd0;
const APIC_SPURIOUS: u64 = APIC + 0xf0;
const APIC_ICR: u64 = APIC + 0x300;
const APIC_ICR_HIGH: u64 = APIC + 0x310;
const SPURIOUS_VECTOR: u8 = 0xff;
const GS_BASE: u32 = 0xc000_0101;

/// Where firmware keeps its tables.
const FIRMWARE: core::ops::Range<u64> = 0xe_0000..0x10_0000;

/// What the MADT says.
pub struct Machine {
    /// Processors, with the identifiers 0 to this, exclusive.
    pub processors: usize,
    /// The wakeup mailbox.
    pub mailbox: u64,
}

fn read32(address: u64) -> u64 {
    cpu::read64(address) & 0xffff_ffff
}

/// Reads the ACPI tables.
pub fn discover() -> Option<Machine> {
    let signature = u64::from_le_bytes(*b"RSD PTR ");
    let rsdp = FIRMWARE.step_by(16).find(|&address| cpu::read64(address) == signature)?;
    let xsdt = cpu::read64(rsdp + 24);
    let tables = (xsdt + 36..xsdt + read32(xsdt + 4)).step_by(8).map(cpu::read64);
    let madt = { tables }.find(|&table| read32(table) as u32 == u32::from_le_bytes(*b"APIC"))?;
    let mut machine = Machine { processors: 0, mailbox: 0 };
    let mut at = madt + 44;
    while at < madt + read32(madt + 4) {
        let head = cpu::read64(at);
        match head & 0xff {
            // A processor that is enabled.
            0 if head >> 32 & 1 != 0 && head >> 24 & 0xff == machine.processors as u64 => {
                machine.processors += 1;
            }
            16 => machine.mailbox = cpu::read64(at + 8),
            _ => {}
        }
        at += head >> 8 & 0xff;
    }
    (machine.mailbox != 0 || machine.processors == 1).then_some(machine)
}

#[repr(C, align(4096))]
struct Stack([u8; 16384]);
static mut STACKS: [Stack; MAX] = [const { Stack([0; 16384]) }; MAX];

/// What a processor finds at GS: its number.
static NUMBERS: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];
/// For the one that is being woken: its number and its page tables.
static NEXT: AtomicU64 = AtomicU64::new(0);
static ROOT: AtomicU64 = AtomicU64::new(0);
static STARTED: AtomicU32 = AtomicU32::new(0);
static MAIN: AtomicU64 = AtomicU64::new(0);

// The state is the mailbox's: long mode on page tables of the firmware's, interrupts off, no stack to speak of.
global_asm!(
    "smp_start:",
    "cli",
    "cld",
    "mov rax, [rip + {next}]",
    "inc rax",
    "imul rax, rax, {stack_bytes}",
    "lea rsp, [rip + {stacks}]",
    "add rsp, rax",
    "xor ebp, ebp",
    "call {started}",
    "ud2",
    next = sym NEXT,
    stacks = sym STACKS,
    stack_bytes = const size_of::<Stack>(),
    started = sym started,
);

unsafe extern "C" {
    static smp_start: [u8; 0];
}

extern "C" fn started() -> ! {
    let number = NEXT.load(Ordering::Acquire) as usize;
    crate::paging::load(ROOT.load(Ordering::Acquire));
    trap::load();
    prepare(number);
    // SAFETY: `start_all` stored a function of this type.
    let main = unsafe { core::mem::transmute::<u64, fn(usize)>(MAIN.load(Ordering::Acquire)) };
    STARTED.fetch_add(1, Ordering::Release);
    main(number);
    loop {
        cpu::halt_for_ever();
    }
}

/// Tells a processor its number, and lets its local APIC take interrupts.
fn prepare(number: usize) {
    NUMBERS[number].store(number as u64, Ordering::Relaxed);
    cpu::wrmsr(GS_BASE, NUMBERS[number].as_ptr() as u64);
    cpu::write32(APIC_SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    cpu::write32(APIC_LDR, 1 << (24 + number));
    trap::handle(SPURIOUS_VECTOR, |_| ());
}

/// Wakes all others, each like [`start`]. False if one did not come.
pub fn start_all(machine: &Machine, root: u64, main: fn(usize)) -> bool {
    (1..machine.processors).all(|number| start(machine, number, root, main))
}

/// Wakes a processor, on the page tables `root`: it runs `main` with its number, on a stack of its own, and halts for
/// ever afterwards. False if it did not come.
pub fn start(machine: &Machine, number: usize, root: u64, main: fn(usize)) -> bool {
    prepare(0);
    MAIN.store(main as usize as u64, Ordering::Release);
    ROOT.store(root, Ordering::Release);
    NEXT.store(number as u64, Ordering::Release);
    let before = STARTED.load(Ordering::Acquire);
    cpu::write64(machine.mailbox + 8, &raw const smp_start as u64);
    // The identifier, then the command.
    cpu::write32(machine.mailbox + 4, number as u32);
    cpu::write32(machine.mailbox, 1);
    let begin = cpu::rdtsc();
    while STARTED.load(Ordering::Acquire) == before {
        if cpu::rdtsc() - begin > PATIENCE_TICKS {
            return false;
        }
        core::hint::spin_loop();
    }
    cpu::read32(machine.mailbox) & 0xffff == 0
}

/// How long anything may take before it counts as lost.
const PATIENCE_TICKS: u64 = 2_000_000_000;

/// The processor's number, as it was told.
#[must_use]
pub fn number() -> usize {
    let number: u64;
    // SAFETY: GS points at the number, see `prepare`.
    unsafe { asm!("mov {}, gs:[0]", out(reg) number, options(nostack, preserves_flags, readonly)) }
    number as usize
}

/// The identifier that its local APIC has.
#[must_use]
pub fn apic_id() -> u32 {
    cpu::read32(APIC_ID) >> 24
}

/// For whom an interrupt is.
#[derive(Clone, Copy)]
pub enum Target {
    /// One processor.
    One(usize),
    /// All in the set, by logical destination.
    Set(u8),
    /// Whichever of the set has the lowest priority.
    Lowest(u8),
    /// All but the sender.
    Others,
    /// The sender.
    Own,
}

/// Sends an interrupt.
pub fn send(target: Target, vector: u8) {
    command(target, u32::from(vector));
}

/// Sends an NMI.
pub fn send_nmi(target: Target) {
    command(target, 4 << 8);
}

/// Sends INIT.
pub fn send_init(number: usize) {
    command(Target::One(number), 5 << 8);
}

/// Sends a start-up message: begin in real mode at `page << 12`.
pub fn send_startup(number: usize, page: u8) {
    command(Target::One(number), 6 << 8 | u32::from(page));
}

fn command(target: Target, what: u32) {
    let (destination, how) = match target {
        Target::One(number) => (number as u32, 0),
        Target::Set(set) => (u32::from(set), 1 << 11),
        Target::Lowest(set) => (u32::from(set), 1 << 11 | 1 << 8),
        Target::Others => (0, 3 << 18),
        Target::Own => (0, 1 << 18),
    };
    cpu::write32(APIC_ICR_HIGH, destination << 24);
    cpu::write32(APIC_ICR, how | 1 << 14 | what);
}

/// Ends the interrupt that is being served.
pub fn end_of_interrupt() {
    cpu::write32(APIC_EOI, 0);
}

/// A point that all processors reach before any goes on.
pub struct Barrier {
    arrived: AtomicU32,
    round: AtomicU32,
}

impl Barrier {
    /// Nobody is there yet.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "a constant for a static")]
    pub const fn new() -> Self {
        Self { arrived: AtomicU32::new(0), round: AtomicU32::new(0) }
    }

    /// Waits for `processors` in all.
    pub fn wait(&self, processors: usize) {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == processors as u32 {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.fetch_add(1, Ordering::Release);
        }
        while self.round.load(Ordering::Acquire) == round {
            core::hint::spin_loop();
        }
    }
}
