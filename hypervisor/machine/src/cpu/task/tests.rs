//! Two tasks in a flat megabyte, and what can be wrong with each part of a switch.

use core::cell::Cell;

use proptest::prelude::*;

use super::super::event::Vector;
use super::super::registers::SegmentName;
use super::*;

const GDT: Gdt = Gdt { base: 0x1000, limit: 0xfff };
const OLD_TSS: u32 = 0x3000;
const NEW_TSS: u32 = 0x4000;
const LDT_BASE: u32 = 0x5000;
const STACK: u32 = 0x8000;

/// Selectors, each of an entry of the GDT.
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const USER_DATA: u16 = 0x1b;
const USER_CODE: u16 = 0x23;
const OLD: u16 = 0x28;
const NEW: u16 = 0x30;
const LDT: u16 = 0x38;
const SPARE: u16 = 0x40;

/// Access bytes.
const CODE_ACCESS: u8 = 0x9a;
const DATA_ACCESS: u8 = 0x92;

struct Memory {
    bytes: Vec<u8>,
    /// Pages from here on are read-only.
    read_only_from: u32,
    /// So many bytes were written.
    written: usize,
    /// The last write was checked with these rights.
    privilege: Cell<Option<Privilege>>,
}

impl Linear for Memory {
    fn read(&self, address: u32, bytes: &mut [u8]) -> Result<(), Exception> {
        let from = self.bytes.get(address as usize..).and_then(|rest| rest.get(..bytes.len()));
        bytes.copy_from_slice(from.ok_or(Exception::page_fault(0, address.into()))?);
        Ok(())
    }
    fn check_write(&self, address: u32, count: u32, privilege: Privilege) -> Result<(), Exception> {
        self.privilege.set(Some(privilege));
        let end = u64::from(address) + u64::from(count);
        if end > self.bytes.len() as u64 || end > self.read_only_from.into() {
            return Err(Exception::page_fault(2, address.into()));
        }
        Ok(())
    }
    fn write(&mut self, address: u32, bytes: &[u8], _privilege: Privilege) {
        self.bytes[address as usize..][..bytes.len()].copy_from_slice(bytes);
        self.written += bytes.len();
    }
}

impl Memory {
    fn dword(&self, address: u32) -> u32 {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }
    fn set(&mut self, address: u32, value: u32) {
        self.write(address, &value.to_le_bytes(), Privilege::Supervisor);
    }
    fn descriptor(&mut self, selector: u16, base: u32, limit: u32, access: u8) {
        self.descriptor_in(GDT.base, selector, base, limit, access);
    }
    fn descriptor_in(&mut self, table: u32, selector: u16, base: u32, limit: u32, access: u8) {
        // 32 bits, and 4 KiB granularity where the limit needs it.
        let (limit, flags) = if limit > 0xf_ffff { (limit >> 12, 0xc) } else { (limit, 0x4) };
        let raw = u64::from(limit & 0xffff)
            | u64::from(base & 0xff_ffff) << 16
            | u64::from(access) << 40
            | u64::from(limit >> 16) << 48
            | flags << 52
            | u64::from(base >> 24) << 56;
        let at = table + u32::from(selector & !7);
        self.write(at, &raw.to_le_bytes(), Privilege::Supervisor);
    }
    fn access(&self, selector: u16) -> u8 {
        self.bytes[(GDT.base + u32::from(selector & !7)) as usize + 5]
    }
    fn set_access(&mut self, selector: u16, access: u8) {
        self.write(GDT.base + u32::from(selector & !7) + 5, &[access], Privilege::Supervisor);
    }
    fn tss(&mut self, field: usize, value: u32) {
        self.set(NEW_TSS + field as u32, value);
    }
    fn tss_segment(&mut self, name: SegmentName, selector: u16) {
        self.tss(offset::SEGMENTS + 4 * name as usize, selector.into());
    }
}

/// The old task, as it runs, and a memory in which the new one is ready.
fn two_tasks() -> (Memory, Task) {
    let mut memory =
        Memory { bytes: vec![0; 1 << 20], read_only_from: u32::MAX, written: 0, privilege: Cell::new(None) };
    memory.descriptor(CODE, 0, u32::MAX, CODE_ACCESS);
    memory.descriptor(DATA, 0, u32::MAX, DATA_ACCESS);
    memory.descriptor(USER_DATA, 0, u32::MAX, DATA_ACCESS | 0x60);
    memory.descriptor(USER_CODE, 0, u32::MAX, CODE_ACCESS | 0x60);
    memory.descriptor(OLD, OLD_TSS, 103, 0x8b);
    memory.descriptor(NEW, NEW_TSS, 103, 0x89);
    memory.descriptor(LDT, LDT_BASE, 0xff, 0x82);
    memory.descriptor(SPARE, 0, u32::MAX, DATA_ACCESS);
    memory.tss(offset::CR3, 0x9000);
    memory.tss(offset::EIP, 0x1234_5678);
    memory.tss(offset::EFLAGS, 0x202);
    for n in 0..8 {
        memory.tss(offset::REGISTERS + 4 * n, 0x100 * n as u32 + 7);
    }
    memory.tss(offset::REGISTERS + 16, STACK);
    for name in SegmentName::ALL {
        memory.tss_segment(name, if name == SegmentName::Cs { CODE } else { DATA });
    }
    memory.written = 0;
    let segment = |selector, rights| SegmentState { selector, base: 0, limit: u32::MAX, rights };
    let mut segments = [segment(DATA, 0xc093); 6];
    segments[SegmentName::Cs as usize] = segment(CODE, 0xc09b);
    let old = Task {
        registers: core::array::from_fn(|n| 0xaaaa_0000 + n as u32),
        eip: 0xcafe,
        eflags: 0x246,
        cr3: 0x7000,
        segments,
        ldtr: SegmentState { rights: 1 << 16, ..SegmentState::default() },
        tr: SegmentState { selector: OLD, base: OLD_TSS.into(), limit: 103, rights: 0x8b },
    };
    (memory, old)
}

fn switch(memory: &mut Memory, old: &Task, source: Source, selector: u16) -> Result<Arrival, Refusal> {
    with_event(memory, old, source, selector, Event::default())
}

fn with_event(
    memory: &mut Memory,
    old: &Task,
    source: Source,
    selector: u16,
    event: Event,
) -> Result<Arrival, Refusal> {
    let prepared = prepare(memory, GDT, old, TaskSwitch { selector, source }, event)?;
    depart(memory, old, &prepared)?;
    Ok(arrive(memory, &prepared))
}

#[test]
fn a_jump_leaves_the_old_task_available() {
    let (mut memory, old) = two_tasks();
    let arrival = switch(&mut memory, &old, Source::Jump, NEW).unwrap();
    let task = arrival.task;
    assert_eq!((arrival.exception, arrival.trap), (None, false));
    assert_eq!((task.eip, task.eflags, task.cr3), (0x1234_5678, 0x202, 0x9000));
    assert_eq!(task.registers, [7, 0x107, 0x207, 0x307, STACK, 0x507, 0x607, 0x707]);
    assert_eq!(task.segments[SegmentName::Cs as usize].rights, 0xc09b);
    assert_eq!(
        task.segments[SegmentName::Gs as usize],
        SegmentState { selector: DATA, rights: 0xc093, ..SegmentState::FLAT }
    );
    assert_eq!(task.tr, SegmentState { selector: NEW, base: NEW_TSS.into(), limit: 103, rights: 0x408b });
    assert!(task.ldtr.unusable());
    assert_eq!((memory.access(OLD), memory.access(NEW)), (0x89, 0x8b));
    assert_eq!(memory.dword(NEW_TSS) & 0xffff, 0, "no link");
    // What was saved.
    assert_eq!(memory.dword(OLD_TSS + offset::EIP as u32), 0xcafe);
    assert_eq!(memory.dword(OLD_TSS + offset::EFLAGS as u32), 0x246);
    for (n, value) in old.registers.into_iter().enumerate() {
        assert_eq!(memory.dword(OLD_TSS + (offset::REGISTERS + 4 * n) as u32), value);
    }
    assert_eq!(memory.dword(OLD_TSS + (offset::SEGMENTS + 4) as u32), CODE.into());
    assert_eq!(memory.dword(OLD_TSS + offset::CR3 as u32), 0, "CR3 is not saved");
    assert_eq!(memory.access(DATA), DATA_ACCESS | 1, "accessed");
}

#[test]
fn a_call_nests_and_iret_returns() {
    let (mut memory, old) = two_tasks();
    let arrival = switch(&mut memory, &old, Source::Call, NEW).unwrap();
    assert_eq!(arrival.task.eflags, 0x202 | NESTED);
    assert_eq!((memory.access(OLD), memory.access(NEW)), (0x8b, 0x8b));
    assert_eq!(memory.dword(NEW_TSS) & 0xffff, OLD.into(), "the link back");
    let inner = Task { eip: 0x77, ..arrival.task };
    let back = switch(&mut memory, &inner, Source::Iret, OLD).unwrap();
    assert_eq!(back.task.registers, old.registers);
    assert_eq!((back.task.eip, back.task.eflags), (old.eip, old.eflags));
    assert_eq!((memory.access(OLD), memory.access(NEW)), (0x8b, 0x89));
    assert_eq!(memory.dword(NEW_TSS + offset::EFLAGS as u32), 0x202, "saved without NT");
    assert_eq!(memory.dword(NEW_TSS + offset::EIP as u32), 0x77);
}

#[test]
fn an_events_error_code_is_pushed_and_a_fault_resumes() {
    let (mut memory, old) = two_tasks();
    let event = Event { external: true, fault: true, error_code: Some(6) };
    let arrival = with_event(&mut memory, &old, Source::Gate, NEW, event).unwrap();
    assert_eq!(arrival.exception, None);
    assert_eq!(arrival.task.registers[4], STACK - 4);
    assert_eq!(memory.dword(STACK - 4), 6);
    assert_eq!(memory.privilege.get(), Some(Privilege::Supervisor));
    assert_eq!(memory.dword(OLD_TSS + offset::EFLAGS as u32), 0x246 | 1 << 16);
    assert_eq!(arrival.task.eflags, 0x202 | NESTED);
    assert_eq!((memory.access(OLD), memory.access(NEW)), (0x8b, 0x8b));
}

#[test]
fn an_error_code_without_a_stack_is_the_new_tasks_stack_fault() {
    let event = Event { external: true, fault: true, error_code: Some(6) };
    let (mut memory, old) = two_tasks();
    memory.descriptor(SPARE, 0, 0x7000, DATA_ACCESS);
    memory.tss_segment(SegmentName::Ss, SPARE);
    let arrival = with_event(&mut memory, &old, Source::Gate, NEW, event).unwrap();
    assert_eq!(arrival.exception, Some(Exception::stack_fault(1)));
    assert_eq!(arrival.task.tr.selector, NEW);
    let (mut memory, old) = two_tasks();
    memory.read_only_from = STACK - 4;
    let arrival = with_event(&mut memory, &old, Source::Gate, NEW, event).unwrap();
    assert_eq!(arrival.exception, Some(Exception::page_fault(2, u64::from(STACK - 4))));
    // A 16-bit stack wraps within its 64 KiB.
    let (mut memory, old) = two_tasks();
    memory.descriptor(SPARE, 0x1_0000, 0xffff, DATA_ACCESS);
    memory.bytes[(GDT.base + u32::from(SPARE)) as usize + 6] &= !0x40;
    memory.tss_segment(SegmentName::Ss, SPARE);
    memory.tss(offset::REGISTERS + 16, 0xabcd_0000);
    let arrival = with_event(&mut memory, &old, Source::Gate, NEW, event).unwrap();
    assert_eq!((arrival.exception, arrival.task.registers[4]), (None, 0xabcd_fffc));
    assert_eq!(memory.dword(0x1_fffc), 6);
}

#[test]
fn a_user_task_gets_its_error_code_as_a_user() {
    let (mut memory, old) = two_tasks();
    for name in SegmentName::ALL {
        memory.tss_segment(name, if name == SegmentName::Cs { USER_CODE } else { USER_DATA });
    }
    let event = Event { error_code: Some(1), ..Event::default() };
    let arrival = with_event(&mut memory, &old, Source::Gate, NEW, event).unwrap();
    assert_eq!(arrival.exception, None);
    assert_eq!(memory.privilege.get(), Some(Privilege::User));
}

/// What a jump to (or an IRET to) the new task comes to before it begins; memory must be as it was.
fn refused(source: Source, change: impl FnOnce(&mut Memory, &mut Task) -> u16) -> (Vector, u32) {
    let (mut memory, mut old) = two_tasks();
    let selector = change(&mut memory, &mut old);
    let before = memory.bytes.clone();
    match with_event(
        &mut memory,
        &old,
        source,
        selector,
        Event { external: source == Source::Gate, ..Event::default() },
    ) {
        Err(Refusal::Exception(exception)) => {
            assert!(memory.bytes == before, "nothing has changed");
            (exception.vector, exception.error_code.unwrap())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bad_tss_is_the_old_tasks_fault() {
    let gp = |selector: u16| (Vector::GP, u32::from(selector));
    let ts = |selector: u16| (Vector::TS, u32::from(selector));
    assert_eq!(refused(Source::Jump, |_, _| 0x1000), gp(0x1000), "beyond the table");
    assert_eq!(refused(Source::Jump, |_, _| NEW | 4), gp(NEW | 4), "in the LDT");
    assert_eq!(refused(Source::Iret, |_, _| 0), ts(0), "the null selector");
    assert_eq!(refused(Source::Iret, |_, _| NEW), ts(NEW), "not busy");
    assert_eq!(refused(Source::Call, |_, _| OLD), gp(OLD), "busy");
    assert_eq!(refused(Source::Gate, |_, _| OLD), gp(OLD | 1), "busy, and not the program's own doing");
    assert_eq!(refused(Source::Jump, |_, _| DATA), gp(DATA), "no TSS");
    assert_eq!(refused(Source::Jump, |_, _| LDT), gp(LDT), "a system segment of another kind");
    let absent = refused(Source::Jump, |memory, _| {
        memory.set_access(NEW, 0x09);
        NEW
    });
    assert_eq!(absent, (Vector::NP, NEW.into()));
    let short = refused(Source::Jump, |memory, _| {
        memory.descriptor(NEW, NEW_TSS, 102, 0x89);
        NEW
    });
    assert_eq!(short, ts(NEW));
    let old_short = refused(Source::Jump, |_, old| {
        old.tr.limit = 94;
        NEW
    });
    assert_eq!(old_short, ts(OLD));
    let old_read_only = refused(Source::Jump, |memory, _| {
        memory.read_only_from = OLD_TSS;
        NEW
    });
    assert_eq!(old_read_only, (Vector::PF, 2));
    let link_read_only = refused(Source::Call, |memory, _| {
        memory.read_only_from = NEW_TSS;
        NEW
    });
    assert_eq!(link_read_only, (Vector::PF, 2));
    let nowhere = refused(Source::Jump, |memory, _| {
        memory.descriptor(NEW, 1 << 20, 103, 0x89);
        NEW
    });
    assert_eq!(nowhere, (Vector::PF, 0));
}

#[test]
fn what_is_not_emulated_is_told() {
    let (mut memory, old) = two_tasks();
    memory.set_access(NEW, 0x81);
    let refused = switch(&mut memory, &old, Source::Jump, NEW);
    assert_eq!(refused, Err(Refusal::Unsupported(Unsupported::Tss16)));
    let (mut memory, mut old) = two_tasks();
    old.tr.rights = 0x83;
    assert_eq!(switch(&mut memory, &old, Source::Jump, NEW), Err(Refusal::Unsupported(Unsupported::Tss16)));
    let (mut memory, old) = two_tasks();
    memory.tss(offset::EFLAGS, VIRTUAL_8086);
    let refused = switch(&mut memory, &old, Source::Jump, NEW);
    assert_eq!(refused, Err(Refusal::Unsupported(Unsupported::Virtual8086)));
}

/// The exception that the new task begins with, and how far it got.
fn begins_with(change: impl FnOnce(&mut Memory)) -> (Vector, u32, Task) {
    let (mut memory, old) = two_tasks();
    change(&mut memory);
    let arrival = switch(&mut memory, &old, Source::Jump, NEW).unwrap();
    assert_eq!(memory.access(NEW), 0x8b, "the switch is complete");
    assert_eq!(arrival.task.tr.selector, NEW);
    let exception = arrival.exception.unwrap();
    (exception.vector, exception.error_code.unwrap(), arrival.task)
}

/// SDM Vol. 3, "Exception Conditions Checked During a Task Switch", the rows of the new task's segments.
#[test]
fn a_bad_segment_is_the_new_tasks_fault() {
    use SegmentName::{Cs, Ds, Es, Fs, Gs, Ss};
    let check = |what: &str, expected: (Vector, u16), change: &dyn Fn(&mut Memory)| {
        let (vector, code, task) = begins_with(change);
        assert_eq!((vector, code), (expected.0, u32::from(expected.1)), "{what}");
        // What the SDM checks at VM entry.
        let (cs, ss) = (task.segments[Cs as usize], task.segments[Ss as usize]);
        assert_eq!(cs.rights & 0x99, 0x99, "{what}: code, accessed, present");
        assert_eq!(cs.selector & 3, ss.selector & 3, "{what}");
        assert_eq!(ss.rights >> 5 & 3, u32::from(ss.selector & 3), "{what}");
    };
    let spare = |name: SegmentName, access: u8| {
        move |memory: &mut Memory| {
            memory.set_access(SPARE, access);
            memory.tss_segment(name, SPARE);
        }
    };
    let selector =
        |name: SegmentName, selector: u16| move |memory: &mut Memory| memory.tss_segment(name, selector);

    check("CS null", (Vector::TS, 0), &selector(Cs, 0));
    check("CS beyond the table", (Vector::TS, 0x1000), &selector(Cs, 0x1000));
    check("CS in no LDT", (Vector::TS, CODE | 4), &selector(Cs, CODE | 4));
    check("CS of data", (Vector::TS, DATA), &selector(Cs, DATA));
    check("CS with another RPL", (Vector::TS, CODE), &selector(Cs, CODE | 3));
    check("CS conforming, too privileged", (Vector::TS, SPARE), &spare(Cs, 0xfe));
    check("CS not present", (Vector::NP, SPARE), &spare(Cs, 0x1a));
    check("SS null", (Vector::TS, 0), &selector(Ss, 0));
    check("SS of code", (Vector::TS, CODE), &selector(Ss, CODE));
    check("SS read-only", (Vector::TS, SPARE), &spare(Ss, 0x90));
    check("SS with another RPL", (Vector::TS, DATA), &selector(Ss, DATA | 3));
    check("SS with another DPL", (Vector::TS, USER_DATA & !3), &selector(Ss, USER_DATA & !3));
    check("SS not present", (Vector::SS, SPARE), &spare(Ss, 0x12));
    for name in [Ds, Es, Fs, Gs] {
        check("data beyond the table", (Vector::TS, 0x1000), &selector(name, 0x1000));
        check("data of a system segment", (Vector::TS, LDT), &selector(name, LDT));
        check("code that cannot be read", (Vector::TS, SPARE), &spare(name, 0x98));
        check("data with a weaker RPL", (Vector::TS, DATA), &selector(name, DATA | 3));
        check("data not present", (Vector::NP, SPARE), &spare(name, 0x12));
    }
    for (what, access, ldt) in [("absent", 0x02, LDT), ("no LDT", 0x92, LDT), ("in an LDT", 0x82, LDT | 4)] {
        let change = move |memory: &mut Memory| {
            memory.set_access(LDT, access);
            memory.tss(offset::LDT, ldt.into());
        };
        check(what, (Vector::TS, ldt), &change);
    }
}

#[test]
fn segments_of_the_ldt_and_null_ones() {
    let (mut memory, old) = two_tasks();
    memory.tss(offset::LDT, LDT.into());
    memory.descriptor_in(LDT_BASE, 8, 0x123_4000, 0xffff, DATA_ACCESS);
    memory.tss_segment(SegmentName::Fs, 8 | 4);
    memory.tss_segment(SegmentName::Gs, 3);
    let arrival = switch(&mut memory, &old, Source::Jump, NEW).unwrap();
    assert_eq!(arrival.exception, None);
    let [.., fs, gs] = arrival.task.segments;
    assert_eq!((fs.selector, fs.base, fs.limit, fs.rights), (8 | 4, 0x123_4000, 0xffff, 0x4093));
    assert!(gs.unusable());
    assert_eq!((arrival.task.ldtr.base, arrival.task.ldtr.limit), (LDT_BASE.into(), 0xff));
    let beyond = begins_with(|memory| {
        memory.tss(offset::LDT, LDT.into());
        memory.tss_segment(SegmentName::Fs, 0x100 | 4);
    });
    assert_eq!((beyond.0, beyond.1), (Vector::TS, 0x104));
}

#[test]
fn a_conforming_segment_keeps_the_level_of_its_selector() {
    let (mut memory, old) = two_tasks();
    memory.set_access(SPARE, 0x9e);
    memory.tss_segment(SegmentName::Cs, SPARE | 3);
    for name in [SegmentName::Ss, SegmentName::Ds, SegmentName::Es, SegmentName::Fs, SegmentName::Gs] {
        memory.tss_segment(name, USER_DATA);
    }
    let arrival = switch(&mut memory, &old, Source::Jump, NEW).unwrap();
    assert_eq!(arrival.exception, None);
    assert_eq!(arrival.task.segments[SegmentName::Cs as usize].selector & 3, 3);
}

#[test]
fn the_trap_bit_and_the_flags_that_exist() {
    let (mut memory, old) = two_tasks();
    memory.tss(offset::TRAP, 1);
    memory.tss(offset::EFLAGS, !VIRTUAL_8086);
    let arrival = switch(&mut memory, &old, Source::Jump, NEW).unwrap();
    assert!(arrival.trap);
    assert_eq!(arrival.task.eflags, FLAGS_DEFINED & !VIRTUAL_8086 | 2);
}

#[test]
fn qualifications() {
    for (source, number) in [(Source::Call, 0), (Source::Iret, 1), (Source::Jump, 2), (Source::Gate, 3)] {
        let switch = TaskSwitch::from_qualification(number << 30 | 0x1234);
        assert_eq!(switch, TaskSwitch { selector: 0x1234, source });
    }
}

proptest! {
    /// Whatever the tables hold, nothing panics, a refusal changes nothing, and what arrives can be entered.
    #[test]
    fn any_tables(
        table in proptest::collection::vec(any::<u64>(), 9),
        tss in proptest::collection::vec(any::<u8>(), 104),
        keep in any::<u16>(),
        selectors in proptest::collection::vec(0_u16..0x60, 6),
        source in 0_u64..4,
        selector in prop_oneof![4 => Just(NEW), 1 => any::<u16>()],
        error_code in any::<Option<u32>>(),
    ) {
        let (mut memory, old) = two_tasks();
        for (n, raw) in table.iter().enumerate() {
            // Mostly good ones, of which some bits are turned.
            if keep >> n & 1 == 0 {
                let at = GDT.base + 8 * n as u32;
                let mut bytes = [0; 8];
                memory.read(at, &mut bytes).unwrap();
                let turned = raw & raw.rotate_left(7) & raw.rotate_left(29);
                memory.write(at, &(u64::from_le_bytes(bytes) ^ turned).to_le_bytes(), Privilege::Supervisor);
            }
        }
        if keep >> 9 & 1 == 0 {
            memory.write(NEW_TSS, &tss, Privilege::Supervisor);
        }
        for (n, &selector) in selectors.iter().enumerate() {
            if keep >> (10 + n) & 1 == 0 {
                memory.tss(offset::SEGMENTS + 4 * n, selector.into());
            }
        }
        let before = memory.bytes.clone();
        let event = Event { external: true, fault: true, error_code };
        let switch = TaskSwitch::from_qualification(source << 30 | u64::from(selector));
        match prepare(&memory, GDT, &old, switch, event) {
            Err(_) => prop_assert!(memory.bytes == before),
            Ok(prepared) => {
                prop_assert_eq!(depart(&mut memory, &old, &prepared), Ok(()));
                let Arrival { task, .. } = arrive(&mut memory, &prepared);
                let (cs, ss) = (task.segments[SegmentName::Cs as usize], task.segments[SegmentName::Ss as usize]);
                prop_assert_eq!(cs.rights & 0x99, 0x99);
                prop_assert_eq!(cs.selector & 3, ss.selector & 3);
                prop_assert_eq!(ss.rights >> 5 & 3, u32::from(ss.selector & 3));
                for segment in task.segments.iter().chain([&task.tr]).filter(|segment| !segment.unusable()) {
                    prop_assert!(segment.rights & 1 != 0 && segment.rights & 0x80 != 0);
                    let granular = segment.rights & 1 << 15 != 0;
                    prop_assert!(segment.limit & 0xfff == 0xfff || !granular);
                    prop_assert!(segment.limit >> 20 == 0 || granular);
                    prop_assert_eq!(segment.rights & 0xfffe_0f00, 0);
                }
                prop_assert_eq!(task.eflags & (VIRTUAL_8086 | 2), 2);
            }
        }
    }
}
