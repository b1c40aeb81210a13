//! Instructions that need as many tables at once as can be: all that they touch crosses a page's end where the two
//! halves lie in different 512 GiB, so that each half hangs on three tables of its own below the root.
//!
//! At CPL 3 a MOVSQ, behind which a debug exception is delivered, an INT n, or a far CALL of a call gate, whose target
//! is in the LDT. Before each the processor goes over more leaf tables than there is room for, from another root.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use test_guests::paging::{P, U, W};
use test_guests::trap::{Frame, handle, selector, stub};
use test_guests::{cpu, println};

use crate::frames;
use crate::space::{Space, USER};

/// What each crosses a multiple of.
const REGION: u64 = 1 << 39;
const CODE: u64 = 4 * REGION;
const FROM: u64 = 6 * REGION;
const TO: u64 = 8 * REGION;
const GATES: u64 = 10 * REGION;
const SEGMENTS: u64 = 12 * REGION;
const TASK: u64 = 14 * REGION;
const STACK: u64 = 16 * REGION;
const LOCAL: u64 = 18 * REGION;
/// 0 and 1 mark the begin and the end of an instruction, for the exit counters (device `bench-marks`).
const MARKS: u16 = 0xe8;
/// Leaf tables between two instructions.
const OTHERS: u64 = 64;

const DEBUG: u8 = 1;
const SOFTWARE: u8 = 0x81;
/// The call gate, and the LDT, in the GDT.
const GATE: u64 = 0x38;
const LDT: u64 = 0x48;
/// The code segment that is the first of the LDT.
const LOCAL_CODE: u64 = 0x04;
const TRAP_FLAG: u64 = 1 << 8;

static ARRIVED: AtomicU64 = AtomicU64::new(0);

// `worst_enter(rip, rflags, rsi, rdi, cr3)`: with that root to CPL 3, and back when an exception comes.
global_asm!(
    "worst_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + worst_stack], rsp",
    "push {user_data}", "push 0", "push rsi", "push {user_code}", "push rdi",
    "mov rsi, rdx", "mov rdi, rcx",
    "mov cr3, r8",
    "iretq",
    "worst_called:",
    "inc qword ptr [rip + {arrived}]",
    "worst_back:",
    "mov rsp, [rip + worst_stack]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    ".data", ".balign 8", "worst_stack: .quad 0", ".text",
    arrived = sym ARRIVED,
    user_data = const selector::USER_DATA,
    user_code = const selector::USER_CODE,
);

unsafe extern "C" {
    fn worst_enter(rip: u64, rflags: u64, from: u64, to: u64, cr3: u64);
    static worst_called: [u8; 0];
    static worst_back: [u8; 0];
    static worst_stack: u64;
}

fn back(frame: &mut Frame) {
    ARRIVED.fetch_add(1, Relaxed);
    frame.rip = &raw const worst_back as u64;
    frame.cs = selector::CODE;
    frame.ss = selector::DATA;
    frame.rflags = 2;
    // SAFETY: written before CPL 3 was entered.
    frame.rsp = unsafe { (&raw const worst_stack).read_volatile() };
}

/// Maps the last page below an address and the first one from it on; their frames.
fn map_both(space: Space, boundary: u64) -> [u64; 2] {
    [boundary - 4096, boundary].map(|address| {
        let frame = frames::take();
        cpu::write64(space.slot(address, 1), frame | P | W | U);
        for level in 2..=4 {
            let slot = space.slot(address, level);
            cpu::write64(slot, cpu::read64(slot) | U);
        }
        frame
    })
}

/// Writes bytes on both sides of the boundary, by their frames.
fn write_across(frames: [u64; 2], first: u64, bytes: &[u8]) {
    for (at, &byte) in (first..).zip(bytes) {
        let address = if at < 4096 { frames[0] + at } else { frames[1] + at - 4096 };
        // SAFETY: the frames are nobody else's.
        unsafe { asm!("mov [{}], {}", in(reg) address, in(reg_byte) byte, options(nostack, preserves_flags)) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Instruction {
    /// MOVSQ, and the debug exception.
    Move,
    Interrupt,
    Call,
}

impl Instruction {
    fn bytes(self) -> [u8; 2] {
        match self {
            Self::Move => [0x48, 0xa5],
            Self::Interrupt => [0xcd, SOFTWARE],
            // CALL FAR [RDI].
            Self::Call => [0xff, 0x1f],
        }
    }

    /// The gate of the IDT that crosses.
    fn vector(self) -> u8 {
        if self == Self::Interrupt { SOFTWARE } else { DEBUG }
    }

    /// How far into the GDT the boundary lies: amid the handler's code segment, or the call gate.
    fn segments_below(self) -> u64 {
        if self == Self::Call { GATE + 8 } else { selector::CODE + 4 }
    }
}

struct Worst {
    space: Space,
    instruction: Instruction,
    from: [u64; 2],
    to: [u64; 2],
}

impl Worst {
    /// The pages, and tables that cross where the entry used for the instruction crosses.
    fn build(instruction: Instruction) -> Self {
        let space = Space::new();
        let code = map_both(space, CODE);
        write_across(code, 4095, &instruction.bytes());
        let (from, to) = (map_both(space, FROM), map_both(space, TO));
        let (gates, segments) = (map_both(space, GATES), map_both(space, SEGMENTS));
        let (task, local) = (map_both(space, TASK), map_both(space, LOCAL));
        map_both(space, STACK);

        let gates_base = GATES - 8 - 16 * u64::from(instruction.vector());
        for number in 0..=SOFTWARE {
            let stub = stub(number);
            let kind = if number == SOFTWARE { 0xee } else { 0x8e };
            let low = stub & 0xffff | selector::CODE << 16 | kind << 40 | (stub >> 16 & 0xffff) << 48;
            let at = 4096 - (GATES - gates_base) + 16 * u64::from(number);
            write_across(gates, at, &low.to_le_bytes());
            write_across(gates, at + 8, &(stub >> 32).to_le_bytes());
        }
        // RSP0 is eight bytes from byte 4 on.
        let task_base = TASK - 8;
        write_across(task, 4096 - 8 + 4, &(STACK + 16).to_le_bytes());
        let code_segment = 0x00af_9b00_0000_ffff_u64;
        let local_base = LOCAL - 4;
        write_across(local, 4096 - 4, &code_segment.to_le_bytes());
        let below = instruction.segments_below();
        let called = &raw const worst_called as u64;
        let system = |base: u64, limit: u64, kind: u64| {
            limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56
        };
        let descriptors = [
            0,
            code_segment,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            system(task_base, 103, 0x89),
            task_base >> 32,
            called & 0xffff | LOCAL_CODE << 16 | 0xec << 40 | (called >> 16 & 0xffff) << 48,
            called >> 32,
            system(local_base, 7, 0x82),
            local_base >> 32,
        ];
        for (number, descriptor) in (0..).zip(descriptors) {
            write_across(segments, 4096 - below + 8 * number, &u64::to_le_bytes(descriptor));
        }
        space.load();
        load_tables(gates_base, SEGMENTS - below);
        // The far pointer to the gate: an offset that does not count, and the selector.
        if instruction == Instruction::Call {
            write_across(to, 4091, &[0, 0, 0, 0, GATE as u8 | 3, 0]);
        }
        Self { space, instruction, from, to }
    }

    /// Once; whether it did what it should.
    fn once(&self, round: u64) -> bool {
        let number = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        write_across(self.from, 4093, &number.to_le_bytes());
        let moves = self.instruction == Instruction::Move;
        let flags = if moves { 2 | TRAP_FLAG } else { 2 };
        cpu::out8(MARKS, 0);
        // SAFETY: the tables of `build` bring the processor back to `worst_back`.
        unsafe { worst_enter(CODE - 1, flags, FROM - 3, TO - 5, self.space.root()) };
        cpu::out8(MARKS, 1);
        let words = [cpu::read64(self.to[0] + 4088), cpu::read64(self.to[1])];
        let moved = words[0] >> 24 | words[1] << 40;
        ARRIVED.load(Relaxed) == round + 1 && (!moves || moved == number)
    }
}

fn load_tables(gates: u64, segments: u64) {
    let pointer = |limit: u16, base: u64| {
        [limit, base as u16, (base >> 16) as u16, (base >> 32) as u16, (base >> 48) as u16]
    };
    let (gates, segments) = (pointer(4095, gates), pointer(87, segments));
    // SAFETY: the new tables say what the old ones did.
    unsafe {
        asm!("lgdt [{}]", "lidt [{}]", "ltr {2:x}", "lldt {3:x}",
             in(reg) &raw const segments, in(reg) &raw const gates, in(reg) selector::TSS, in(reg) LDT);
    }
}

/// `movs`, `int` or `call`.
pub fn run(name: &str, rounds: u64) -> u32 {
    let instruction = match name {
        "int" => Instruction::Interrupt,
        "call" => Instruction::Call,
        _ => Instruction::Move,
    };
    handle(DEBUG, back);
    handle(SOFTWARE, back);
    let others = Space::new();
    let frame = frames::take();
    for table in 0..OTHERS {
        cpu::write64(others.slot(USER + (table << 21), 1), frame | P | W);
    }
    let worst = Worst::build(instruction);
    let mut bad = 0;
    for round in 0..rounds {
        others.load();
        for table in 0..OTHERS {
            cpu::write64(USER + (table << 21), round);
        }
        bad += u32::from(!worst.once(round));
    }
    println!("churn worst: {rounds} times {name}, {bad} bad");
    bad
}
