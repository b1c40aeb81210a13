//! Whole instructions, from their bytes.

use proptest::prelude::*;

use super::alu::{CF, STATUS, ZF};
use super::testing::{MEMORY_BYTES, Machine, Remap};
use super::*;
use crate::cpu::exit::IoAccess;
use crate::cpu::registers::CodeSize::{Bits16, Bits32, Bits64};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

fn machine() -> Machine {
    Machine::new(Bits64)
}

#[track_caller]
fn done(machine: &mut Machine, bytes: &[u8]) {
    let rip = machine.rip;
    assert_eq!(emulate(machine, bytes), Outcome::Done);
    assert_eq!(machine.rip, rip + bytes.len() as u64);
}

#[test]
fn moves() {
    let mut m = machine();
    m.registers[RDI] = 0x2000;
    m.registers[RSI] = 0x1122_3344_5566_7788;
    done(&mut m, &[0x48, 0x89, 0x37]); // mov [rdi], rsi
    assert_eq!(m.peek(0x2000, Width::Qword), 0x1122_3344_5566_7788);
    m.registers[RAX] = u64::MAX;
    done(&mut m, &[0x8b, 0x47, 0x04]); // mov eax, [rdi + 4]
    assert_eq!(m.registers[RAX], 0x1122_3344);
    m.registers[RAX] = u64::MAX;
    done(&mut m, &[0x66, 0x8b, 0x07]); // mov ax, [rdi]
    assert_eq!(m.registers[RAX], 0xffff_ffff_ffff_7788);
    done(&mut m, &[0x8a, 0x27]); // mov ah, [rdi]
    assert_eq!(m.registers[RAX], 0xffff_ffff_ffff_8888);
    done(&mut m, &[0x48, 0x0f, 0xbe, 0x07]); // movsx rax, byte [rdi]
    assert_eq!(m.registers[RAX], 0xffff_ffff_ffff_ff88);
    done(&mut m, &[0x0f, 0xb7, 0x07]); // movzx eax, word [rdi]
    assert_eq!(m.registers[RAX], 0x7788);
    done(&mut m, &[0x48, 0x63, 0x07]); // movsxd rax, dword [rdi]
    assert_eq!(m.registers[RAX], 0x5566_7788);
    done(&mut m, &[0x48, 0xc7, 0x07, 0xff, 0xff, 0xff, 0xff]); // mov qword [rdi], -1
    assert_eq!(m.peek(0x2000, Width::Qword), u64::MAX);
    done(&mut m, &[0xa2, 0x10, 0x20, 0, 0, 0, 0, 0, 0]); // mov [0x2010], al
    assert_eq!(m.peek(0x2010, Width::Word), 0x88);
    m.registers[RSI] = 7;
    done(&mut m, &[0x0f, 0xc3, 0x37]); // movnti [rdi], esi
    assert_eq!(m.peek(0x2000, Width::Dword), 7);
}

#[test]
fn read_modify_write() {
    let mut m = machine();
    m.registers[RDI] = 0x2000;
    m.poke(0x2000, Width::Dword, 0xff);
    m.registers[RAX] = 1;
    done(&mut m, &[0xf0, 0x01, 0x07]); // lock add [rdi], eax
    assert_eq!(m.peek(0x2000, Width::Dword), 0x100);
    m.contended = 3;
    done(&mut m, &[0x48, 0x0f, 0xba, 0x2f, 0x01]); // bts qword [rdi], 1
    assert_eq!((m.peek(0x2000, Width::Qword), m.rflags & CF), (0x102, 0));
    done(&mut m, &[0xf0, 0x80, 0x27, 0xfd]); // lock and byte [rdi], 0xfd
    assert_eq!(m.peek(0x2000, Width::Dword), 0x100);
    assert_eq!(m.rflags & ZF, ZF);
    done(&mut m, &[0xf7, 0x1f]); // neg dword [rdi]
    assert_eq!(m.peek(0x2000, Width::Dword), 0xffff_ff00);
    done(&mut m, &[0xf7, 0x17]); // not dword [rdi]
    assert_eq!(m.peek(0x2000, Width::Dword), 0xff);
    m.rflags |= CF;
    done(&mut m, &[0xfe, 0x07]); // inc byte [rdi]: CF stays
    assert_eq!((m.peek(0x2000, Width::Dword), m.rflags & (CF | ZF)), (0, CF | ZF));
    m.registers[RAX] = 5;
    done(&mut m, &[0x0f, 0xc1, 0x07]); // xadd [rdi], eax
    assert_eq!((m.peek(0x2000, Width::Dword), m.registers[RAX]), (5, 0));
    done(&mut m, &[0x81, 0x3f, 5, 0, 0, 0]); // cmp dword [rdi], 5
    assert_eq!(m.rflags & STATUS, ZF | 1 << 2);
    done(&mut m, &[0xf7, 0x07, 2, 0, 0, 0]); // test dword [rdi], 2
    assert_eq!(m.rflags & ZF, ZF);
    m.registers[RAX] = 9;
    done(&mut m, &[0x48, 0x87, 0x07]); // xchg [rdi], rax
    assert_eq!((m.peek(0x2000, Width::Qword), m.registers[RAX]), (9, 5));
}

#[test]
fn contention_lets_the_guest_retry() {
    let mut m = machine();
    m.registers[RDI] = 0x2000;
    m.contended = usize::MAX;
    assert_eq!(emulate(&mut m, &[0xf0, 0x01, 0x07]), Outcome::Retry);
    assert_eq!((m.rip, m.rflags), (0x1000, 2));
}

#[test]
fn compare_exchanges() {
    let mut m = machine();
    m.registers[RDI] = 0x2000;
    m.registers[RSI] = 77;
    m.poke(0x2000, Width::Qword, 5);
    done(&mut m, &[0xf0, 0x48, 0x0f, 0xb1, 0x37]); // lock cmpxchg [rdi], rsi: no match
    assert_eq!((m.peek(0x2000, Width::Qword), m.registers[RAX], m.rflags & ZF), (5, 5, 0));
    done(&mut m, &[0xf0, 0x48, 0x0f, 0xb1, 0x37]);
    assert_eq!((m.peek(0x2000, Width::Qword), m.registers[RAX], m.rflags & ZF), (77, 5, ZF));
    // lock cmpxchg8b [rdi]
    (m.registers[RAX], m.registers[RDX]) = (77, 0);
    (m.registers[RBX], m.registers[RCX]) = (1, 2);
    done(&mut m, &[0xf0, 0x0f, 0xc7, 0x0f]);
    assert_eq!((m.peek(0x2000, Width::Qword), m.rflags & ZF), (2 << 32 | 1, ZF));
    // lock cmpxchg16b [rdi]: no match loads RDX:RAX, then it matches
    done(&mut m, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
    assert_eq!((m.registers[RAX], m.registers[RDX], m.rflags & ZF), (2 << 32 | 1, 0, 0));
    done(&mut m, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
    assert_eq!((m.peek(0x2000, Width::Qword), m.peek(0x2008, Width::Qword)), (1, 2));
    m.registers[RDI] = 0x2008;
    assert_eq!(emulate(&mut m, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]), Outcome::Exception(Exception::PROTECTION));
}

#[test]
fn bits_beyond_the_operand() {
    let mut m = machine();
    m.registers[RDI] = 0x2000;
    m.registers[RSI] = 64 * 3 + 5;
    done(&mut m, &[0x48, 0x0f, 0xab, 0x37]); // bts [rdi], rsi
    assert_eq!(m.peek(0x2018, Width::Qword), 1 << 5);
    m.registers[RSI] = (-1i64) as u64;
    done(&mut m, &[0xf0, 0x48, 0x0f, 0xbb, 0x37]); // lock btc [rdi], rsi
    assert_eq!(m.peek(0x1ff8, Width::Qword), 1 << 63);
    done(&mut m, &[0x48, 0x0f, 0xa3, 0x37]); // bt [rdi], rsi
    assert_eq!(m.rflags & CF, CF);
}

#[test]
fn stack() {
    let mut m = machine();
    m.registers[RSP] = 0x3000;
    m.registers[RDI] = 0x2000;
    m.poke(0x2000, Width::Qword, 0xabcd);
    done(&mut m, &[0xff, 0x37]); // push qword [rdi]
    assert_eq!((m.registers[RSP], m.peek(0x2ff8, Width::Qword)), (0x2ff8, 0xabcd));
    done(&mut m, &[0x8f, 0x04, 0x24]); // pop qword [rsp]: the address is made after the increment
    assert_eq!((m.registers[RSP], m.peek(0x3000, Width::Qword)), (0x3000, 0xabcd));
    done(&mut m, &[0x50]); // push rax
    done(&mut m, &[0x5c]); // pop rsp
    assert_eq!(m.registers[RSP], 0);
    m.registers[RSP] = 0x3000;
    m.registers[RDI] = MEMORY_BYTES;
    assert!(matches!(emulate(&mut m, &[0x8f, 0x07]), Outcome::Exception(_)));
    assert_eq!(m.registers[RSP], 0x3000, "a fault undoes the increment");
}

#[test]
fn strings() {
    let mut m = machine();
    (m.registers[RDI], m.registers[RCX], m.registers[RAX]) = (0x1000, 600, u64::MAX);
    assert_eq!(emulate(&mut m, &[0xf3, 0x48, 0xab]), Outcome::Continue); // rep stosq
    assert_eq!((m.registers[RCX], m.registers[RDI], m.rip), (88, 0x2000, 0x1000));
    done(&mut m, &[0xf3, 0x48, 0xab]);
    assert_eq!((m.registers[RCX], m.peek(0x1000 + 599 * 8, Width::Qword)), (0, u64::MAX));
    assert_eq!(m.peek(0x1000 + 600 * 8, Width::Qword), 0);
    done(&mut m, &[0xf3, 0x48, 0xab]); // nothing left
    // Downwards, and one iteration at a time under single-step.
    (m.registers[RSI], m.registers[RDI], m.registers[RCX]) = (0x1003, 0x3003, 2);
    m.memory[0x1002] = 0x42;
    m.rflags |= 1 << 10 | 1 << 8;
    assert_eq!(emulate(&mut m, &[0xf3, 0xa4]), Outcome::Continue); // rep movsb
    assert_eq!(m.registers[RCX], 1);
    done(&mut m, &[0xf3, 0xa4]);
    assert_eq!((m.memory[0x3002], m.registers[RSI], m.registers[RDI]), (0x42, 0x1001, 0x3001));
    m.registers[RSI] = 0x1002;
    done(&mut m, &[0xac]); // lodsb
    assert_eq!(m.registers[RAX] & 0xff, 0x42);
}

#[test]
fn h13_a_fault_in_a_repeated_string_keeps_what_is_done() {
    let mut m = machine();
    m.read_only_from = 0x2000;
    (m.registers[RDI], m.registers[RCX]) = (0x1ff0, 10);
    let outcome = emulate(&mut m, &[0xf3, 0x48, 0xab]);
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(2, 0x2000)));
    assert_eq!((m.registers[RCX], m.registers[RDI], m.rip), (8, 0x2000, 0x1000));
}

/// A write across two pages takes place wholly or not at all.
#[test]
fn h13_page_crossing() {
    let mut m = machine();
    m.registers[RDI] = 0x1ffd;
    m.registers[RSI] = 0x1122_3344_5566_7788;
    done(&mut m, &[0x48, 0x89, 0x37]);
    assert_eq!(m.peek(0x1ffd, Width::Qword), 0x1122_3344_5566_7788);
    done(&mut m, &[0x48, 0x8b, 0x07]);
    assert_eq!(m.registers[RAX], 0x1122_3344_5566_7788);
    m.read_only_from = 0x2000;
    m.registers[RSI] = 0;
    assert_eq!(emulate(&mut m, &[0x48, 0x89, 0x37]), Outcome::Exception(Exception::page_fault(2, 0x2000)));
    assert_eq!(m.peek(0x1ffd, Width::Qword), 0x1122_3344_5566_7788);
}

#[test]
fn addresses_that_segmentation_refuses() {
    let mut m = machine();
    m.registers[RDI] = 0x8000_0000_0000;
    assert_eq!(emulate(&mut m, &[0x89, 0x37]), Outcome::Exception(Exception::PROTECTION));
    m.registers[RSP] = 0x8000_0000_0000;
    assert_eq!(emulate(&mut m, &[0x89, 0x34, 0x24]), Outcome::Exception(Exception::stack_fault(0)));
    m.registers[RDI] = 0x7fff_ffff_fffe;
    assert_eq!(emulate(&mut m, &[0x89, 0x37]), Outcome::Exception(Exception::PROTECTION));

    let mut m = Machine::new(Bits32);
    m.segments[3] = SegmentState { limit: 0xfff, base: 0x1000, ..SegmentState::FLAT };
    m.registers[RDI] = 0xffc;
    m.registers[RAX] = 5;
    assert_eq!(emulate(&mut m, &[0x89, 0x07]), Outcome::Done);
    assert_eq!(m.peek(0x1ffc, Width::Dword), 5);
    m.registers[RDI] = 0xffd;
    assert_eq!(emulate(&mut m, &[0x89, 0x07]), Outcome::Exception(Exception::PROTECTION));
    m.segments[3].rights = 0xc091;
    m.registers[RDI] = 0;
    assert_eq!(emulate(&mut m, &[0x89, 0x07]), Outcome::Exception(Exception::PROTECTION));
    m.segments[3].rights = 1 << 16;
    assert_eq!(emulate(&mut m, &[0x8b, 0x07]), Outcome::Exception(Exception::PROTECTION));
}

#[test]
fn sixteen_bit_code() {
    let mut m = Machine::new(Bits16);
    m.registers[RBX] = 0xffff_1ff0;
    m.registers[RSI] = 0x20;
    m.registers[RAX] = 0xbeef;
    assert_eq!(emulate(&mut m, &[0x89, 0x00]), Outcome::Done); // mov [bx + si], ax
    assert_eq!(m.peek(0x2010, Width::Word), 0xbeef);
}

#[test]
fn segment_bases() {
    let mut m = machine();
    m.segments[5].base = 0x1000;
    m.segments[3].base = 0x5000_0000;
    m.registers[RAX] = 3;
    done(&mut m, &[0x65, 0x89, 0x04, 0x25, 0x10, 0, 0, 0]); // mov gs:[0x10], eax
    assert_eq!(m.peek(0x1010, Width::Dword), 3);
}

fn io(input: bool, repeat: bool) -> StringIo {
    StringIo {
        port: 0x3f8,
        width: Width::Byte,
        input,
        repeat,
        address: Width::Qword,
        segment: SegmentName::Ds,
        length: 2,
    }
}

#[test]
fn string_ports() {
    let mut m = machine();
    m.memory[0x2000..0x2003].copy_from_slice(b"abc");
    (m.registers[RSI], m.registers[RCX]) = (0x2000, 3);
    assert_eq!(string_io(&mut m, &io(false, true)), Outcome::Done);
    assert_eq!(m.written, [(0x3f8, 97), (0x3f8, 98), (0x3f8, 99)]);
    assert_eq!((m.rip, m.registers[RCX], m.registers[RSI]), (0x1002, 0, 0x2003));

    (m.registers[RSI], m.registers[RCX]) = (0x2000, 3);
    m.flow = Flow::Leave;
    assert_eq!(string_io(&mut m, &io(false, true)), Outcome::Continue);
    assert_eq!(m.registers[RCX], 2);

    // Nothing is taken from the port that cannot be stored.
    (m.registers[RDI], m.registers[RCX]) = (0x2fff, 2);
    m.read_only_from = 0x3000;
    assert_eq!(string_io(&mut m, &io(true, true)), Outcome::Exception(Exception::page_fault(2, 0x3000)));
    assert_eq!((m.to_read, m.registers[RCX], m.memory[0x2fff]), (1, 1, 1));
}

#[test]
fn string_ports_from_the_instruction() {
    let access = IoAccess { port: 0x60, width: Width::Word, input: false, string: true, repeat: true };
    let got = StringIo::from_instruction(access, &[0x2e, 0xf3, 0x67, 0x66, 0x6f], Bits32, 0).unwrap();
    assert_eq!((got.address, got.segment, got.length), (Width::Word, SegmentName::Cs, 5));
    assert_eq!(StringIo::from_instruction(access, &[0x90], Bits32, 0), None);
}

/// Writes of every width that the emulator knows, from rsi and rdx:rax (or rcx:rbx) to [rdi].
const WRITES: &[(&[u8], u64)] = &[
    (&[0x40, 0x88, 0x37], 1),             // mov [rdi], sil
    (&[0x66, 0x89, 0x37], 2),             // mov [rdi], si
    (&[0x89, 0x37], 4),                   // mov [rdi], esi
    (&[0x48, 0x89, 0x37], 8),             // mov [rdi], rsi
    (&[0x48, 0x87, 0x37], 8),             // xchg [rdi], rsi
    (&[0xf0, 0x48, 0x0f, 0xc1, 0x37], 8), // lock xadd [rdi], rsi
    (&[0xf0, 0x66, 0x09, 0x37], 2),       // lock or [rdi], si
    (&[0xf0, 0x0f, 0xb1, 0x37], 4),       // lock cmpxchg [rdi], esi
    (&[0x0f, 0xc7, 0x0f], 8),             // cmpxchg8b [rdi]
    (&[0x48, 0x0f, 0xc7, 0x0f], 16),      // cmpxchg16b [rdi]
    (&[0x48, 0xab], 8),                   // stosq
    (&[0xa4], 1),                         // movsb
    (&[0xf3, 0xaa], 64),                  // rep stosb, rcx = 64
    (&[0xf3, 0x48, 0xab], 512),           // rep stosq
    (&[0xf3, 0xa5], 256),                 // rep movsd
];

/// 64 bytes by one instruction, as vectors and the cache-line stores write them: the emulator knows none of them, and
/// must not take one for a shorter write.
const UNKNOWN_WRITES: &[&[u8]] = &[
    &[0x0f, 0x29, 0x07],                   // movaps [rdi], xmm0
    &[0xc5, 0xfd, 0x7f, 0x07],             // vmovdqa [rdi], ymm0
    &[0x62, 0xf1, 0x7c, 0x48, 0x29, 0x07], // vmovaps [rdi], zmm0
    &[0x66, 0x0f, 0x38, 0xf8, 0x3e],       // movdir64b rdi, [rsi]
    &[0x0f, 0xae, 0x07],                   // fxsave [rdi]
    &[0x48, 0x0f, 0xae, 0x27],             // xsave [rdi]
    &[0x0f, 0xe7, 0x07],                   // movntq [rdi], mm0
];

proptest! {
    /// Whatever its width and wherever it lies, also across two pages, a write changes the bytes of its operand alone;
    /// and none of them where the second page is read-only, but for whole elements of a repeated one.
    #[test]
    fn h13_a_write_changes_its_operand_alone(
        which in 0..WRITES.len(),
        at in prop_oneof![0x1f00u64..0x2010, 0x2000u64..0x3000],
        registers in proptest::array::uniform16(any::<u64>()),
        read_only in any::<bool>(),
    ) {
        let (bytes, length) = WRITES[which];
        let mut m = machine();
        m.registers = registers;
        (m.registers[RDI], m.registers[RSI], m.registers[RCX]) = (at, 0x400, 64);
        m.memory.iter_mut().zip(0u32..).for_each(|(byte, i)| *byte = (i.wrapping_mul(0x9e37_79b9) >> 13) as u8);
        m.read_only_from = if read_only { 0x2000 } else { MEMORY_BYTES };
        let before = m.memory.clone();
        let outcome = emulate(&mut m, bytes);
        let end = (at + length).min(m.read_only_from);
        for (i, (old, new)) in before.iter().zip(&m.memory).enumerate() {
            prop_assert!(old == new || (at..end).contains(&(i as u64)), "byte {:#x} of a write at {:#x}", i, at);
        }
        let repeated = bytes[0] == 0xf3;
        if at + length > m.read_only_from && !repeated {
            prop_assert!(matches!(outcome, Outcome::Exception(_)));
            prop_assert_eq!(&before, &m.memory, "a write that faults changes nothing");
        }
    }

    /// A wide write that the emulator does not know changes nothing at all.
    #[test]
    fn h13_no_wide_write_is_taken_for_a_narrow_one(which in 0..UNKNOWN_WRITES.len(), at in 0x1f00u64..0x2010) {
        let mut m = machine();
        (m.registers[RDI], m.registers[RSI]) = (at, 0x400);
        let before = m.memory.clone();
        prop_assert_eq!(emulate(&mut m, UNKNOWN_WRITES[which]), Outcome::Unsupported);
        prop_assert_eq!((before, m.rip), (m.memory, 0x1000));
    }

    /// While an instruction is carried out another vCPU maps its operand elsewhere: from the n-th access on page 2 is
    /// page 3, or gone. The write goes to a page that was mapped, or faults; it never panics, and RIP moves on only if
    /// the instruction was carried out.
    #[test]
    fn h12_the_target_is_mapped_elsewhere_during_the_emulation(
        which in 0..WRITES.len(),
        at in 0x1fe0u64..0x2010,
        after in 0..80usize,
        gone in any::<bool>(),
    ) {
        let (bytes, length) = WRITES[which];
        let mut m = machine();
        (m.registers[RDI], m.registers[RSI], m.registers[RCX]) = (at, 0x400, 64);
        m.registers[RAX] = u64::MAX;
        m.remap = Some(Remap { accesses: after, to: if gone { MEMORY_BYTES } else { 0x3000 } });
        let before = m.memory.clone();
        let outcome = emulate(&mut m, bytes);
        let operand = at..at + length;
        for (i, (old, new)) in before.iter().zip(&m.memory).enumerate() {
            let i = i as u64;
            let moved = !gone && (0x3000..0x4000).contains(&i) && operand.contains(&(i - 0x1000));
            prop_assert!(old == new || operand.contains(&i) || moved, "byte {:#x} of a write at {:#x}", i, at);
        }
        prop_assert_eq!(m.rip != 0x1000, outcome == Outcome::Done);
        let misaligned = outcome == Outcome::Exception(Exception::PROTECTION);
        prop_assert!(gone || misaligned || outcome == Outcome::Done, "{:?}", outcome);
    }
}

fn any_machine() -> impl Strategy<Value = Machine> {
    let registers = proptest::array::uniform16(prop_oneof![0u64..MEMORY_BYTES + 16, any::<u64>()]);
    (registers, any::<u64>(), 0..3u8, any::<u32>(), 0u64..=MEMORY_BYTES).prop_map(
        |(registers, rflags, code, rights, read_only_from)| {
            let mut machine = Machine::new([Bits16, Bits32, Bits64][usize::from(code)]);
            machine.registers = registers;
            machine.rflags = rflags;
            machine.read_only_from = read_only_from;
            machine.segments[1].rights = rights;
            machine.segments[2].limit = rights;
            machine
        },
    )
}

proptest! {
    /// Random bytes and registers never panic, and RIP moves only when something was done.
    #[test]
    fn random_bytes(mut m in any_machine(), bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
        let before = m.rip;
        let outcome = emulate(&mut m, &bytes);
        prop_assert_eq!(m.rip != before, outcome == Outcome::Done);
    }

    /// The same with bytes that are more often something the emulator knows.
    #[test]
    fn likely_bytes(
        mut m in any_machine(),
        prefix in proptest::sample::select(vec![&[][..], &[0x48], &[0x66], &[0xf3], &[0xf0], &[0x67], &[0xf3, 0x48], &[0x65]]),
        opcode in prop_oneof![
            proptest::sample::select(vec![0x01u8, 0x11, 0x19, 0x29, 0x31, 0x39, 0x81, 0x83, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8f, 0xa4, 0xa5, 0xaa, 0xab, 0xad, 0xc6, 0xc7, 0xf6, 0xf7, 0xfe, 0xff]).prop_map(|b| vec![b]),
            proptest::sample::select(vec![0xa3u8, 0xab, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbe, 0xc0, 0xc1, 0xc3, 0xc7]).prop_map(|b| vec![0x0f, b]),
        ],
        tail in proptest::collection::vec(any::<u8>(), 10),
    ) {
        let mut bytes = prefix.to_vec();
        bytes.extend(opcode);
        bytes.extend(tail);
        let before = (m.rip, m.registers[RSP]);
        let outcome = emulate(&mut m, &bytes);
        prop_assert_eq!(m.rip != before.0, outcome == Outcome::Done);
    }

    /// String port I/O is bounded whatever RCX says.
    #[test]
    fn string_ports_are_bounded(mut m in any_machine(), input: bool, repeat: bool) {
        let _ = string_io(&mut m, &io(input, repeat));
        prop_assert!(m.written.len() as u64 <= REPEAT_MAX && u64::from(m.to_read) <= REPEAT_MAX);
    }
}
