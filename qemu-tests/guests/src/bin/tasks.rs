//! Hardware task switches by JMP, CALL and IRET, task gates and exceptions, with 32-bit and PAE paging on and another
//! CR3 in some of the tasks.
#![no_std]
#![no_main]

use test_guests::legacy::{
    Do, Script, descriptor, peek, poke, set_descriptor, set_exception_gates, set_gate, task_entry,
};
use test_guests::{entry, println};

/// Directories, each with a leaf table after it: 32-bit paging.
const TWO_LEVEL: [u32; 2] = [0x50_0000, 0x50_2000];
/// PDPTs; the second begins inside a page.
const PDPTS: [u32; 2] = [0x50_4000, 0x50_5020];
/// Their directories, each with a leaf table after it.
const PAE: [u32; 2] = [0x50_6000, 0x50_8000];
/// The page that the leaf tables map, to a frame of each.
const ALIAS: u32 = 64 << 20;
/// The frames.
const FRAMES: [u32; 2] = [0x80_0000, 0x80_1000];
/// Task-state segments and stacks, a page each.
const SEGMENTS: u32 = 0x60_0000;
const STACKS: u32 = 0x64_0000;

const LDT: u32 = 0xe0;
const GATE: u32 = 0xe8;
const ABSENT_DATA: u32 = 0xf0;
const ABSENT_TSS: u32 = 0xf8;
const LDT_BASE: u32 = 0x50_a000;

const CR0: u32 = 0x8001_0011;
const CR0_OFF: u32 = 0x11;
const PSE: u32 = 0x10;
const PAE_BIT: u32 = 0x20;
const TS: u32 = 8;
const NT: u32 = 1 << 14;
const PRESENT_WRITABLE: u32 = 3;
const LARGE: u32 = 0x83;

/// Offsets in a task-state segment.
const CR3: u32 = 28;
const EFLAGS: u32 = 36;
const DS: u32 = 84;
const SS: u32 = 80;
const FS: u32 = 88;
const LDTR: u32 = 96;
const TRAP: u32 = 100;

entry!(main);

/// Task number `n`: its selector, and where its TSS is.
#[derive(Clone, Copy)]
struct Task(u32);

impl Task {
    const fn selector(self) -> u32 {
        0x20 + 8 * self.0
    }
    const fn tss(self) -> u32 {
        SEGMENTS + 0x1000 * self.0
    }
    const fn stack_top(self) -> u32 {
        STACKS + 0x1000 * (self.0 + 1)
    }
    /// Makes it ready to carry out `script` in the address space `cr3`.
    fn prepare<const N: usize>(self, script: &Script<N>, cr3: u32) {
        let field = |offset, value| poke(self.tss() + offset, value);
        field(CR3, cr3);
        field(32, task_entry());
        field(EFLAGS, 2);
        // EBX, ESP, EBP, ESI, EDI.
        for (offset, value) in
            [(52, 0x100), (56, self.stack_top()), (60, 0x20), (64, script.address()), (68, self.0)]
        {
            field(offset, value);
        }
        for n in 0..6 {
            field(72 + 4 * n, if n == 1 { 0x08 } else { 0x10 });
        }
        set_descriptor(self.selector(), system(self.tss(), 103, 0x89));
    }
    fn set(self, offset: u32, value: u32) {
        poke(self.tss() + offset, value);
    }
    /// The type of its descriptor: 9 available, 11 busy.
    fn kind(self) -> u64 {
        descriptor(self.selector()) >> 40 & 15
    }
    /// The task that it returns to.
    fn link(self) -> u32 {
        peek(self.tss()) & 0xffff
    }
}

/// A descriptor.
fn system(base: u32, limit: u64, access: u64) -> u64 {
    let base = u64::from(base);
    limit & 0xffff | (base & 0xff_ffff) << 16 | access << 40 | base >> 24 << 56
}

/// A task gate.
fn gate(task: Task) -> u64 {
    u64::from(task.selector()) << 16 | 0x85 << 40
}

fn tables() {
    for page in 0..16 {
        for word in 0..1024 {
            poke(0x50_0000 + page * 0x1000 + word * 4, 0);
        }
    }
    for word in 0..16 * 1024 {
        poke(SEGMENTS + word * 4, 0);
    }
    for space in 0..2 {
        let (directory, table) = (TWO_LEVEL[space], TWO_LEVEL[space] + 0x1000);
        for n in 0..4 {
            poke(directory + 4 * n, n << 22 | LARGE);
        }
        poke(directory + (ALIAS >> 22) * 4, table | PRESENT_WRITABLE);
        poke(table, FRAMES[space] | PRESENT_WRITABLE);
        let (directory, table) = (PAE[space], PAE[space] + 0x1000);
        poke(PDPTS[space], directory | 1);
        for n in 0..8 {
            poke(directory + 8 * n, n << 21 | LARGE);
        }
        poke(directory + (ALIAS >> 21) * 8, table | PRESENT_WRITABLE);
        poke(table, FRAMES[space] | PRESENT_WRITABLE);
        poke(FRAMES[space], 0xa000 + space as u32);
        poke(FRAMES[space] + 4, 0);
    }
    set_descriptor(LDT, system(LDT_BASE, 0xff, 0x82));
    let data = system(FRAMES[1], 0xfff, 0x92);
    poke(LDT_BASE + 8, data as u32);
    poke(LDT_BASE + 12, (data >> 32) as u32);
    set_descriptor(ABSENT_DATA, system(0, 0xffff, 0x12));
    set_descriptor(ABSENT_TSS, system(SEGMENTS, 103, 0x09));
}

fn main() -> u8 {
    tables();
    set_exception_gates();
    let [
        main,
        jumped,
        called,
        interrupted,
        faulted,
        doubled,
        stackless,
        invalid,
        absent,
        trapped,
        local,
        pae,
    ] = core::array::from_fn(|n| Task(n as u32));
    let mut bad = 0_u8;
    let mut check = |name: &str, good: bool| {
        println!("{name}: {}", if good { "ok" } else { "BAD" });
        bad += u8::from(!good);
    };

    // The tasks. Each comes back to its next step when it is switched to again.
    let mut jumped_script = Script::<16>::default();
    let j_tr = jumped_script.add(Do::TaskRegister, 0, 0);
    let j_cr3 = jumped_script.add(Do::ReadCr3, 0, 0);
    let j_read = jumped_script.add(Do::Read, ALIAS, 0);
    jumped_script.add(Do::Write, ALIAS + 4, 0x55);
    let j_flags = jumped_script.add(Do::Flags, 0, 0);
    let j_registers = jumped_script.add(Do::Registers, 0, 0);
    let j_cr0 = jumped_script.add(Do::ReadCr0, 0, 0);
    let j_dr7 = jumped_script.add(Do::ReadDr7, 0, 0);
    jumped_script.add(Do::SetRegisters, 0x700, 0x70);
    jumped_script.add(Do::Jump, main.selector(), 0);
    let j_again = jumped_script.add(Do::Registers, 0, 0);
    jumped_script.add(Do::Jump, main.selector(), 0);
    jumped.prepare(&jumped_script, TWO_LEVEL[1]);

    let mut called_script = Script::<16>::default();
    let c_flags: [usize; 3] = core::array::from_fn(|_| {
        let flags = called_script.add(Do::Flags, 0, 0);
        called_script.add(Do::Return, 0, 0);
        flags
    });
    called.prepare(&called_script, TWO_LEVEL[0]);

    let mut interrupted_script = Script::<8>::default();
    let i_flags: [usize; 2] = core::array::from_fn(|_| {
        let flags = interrupted_script.add(Do::Flags, 0, 0);
        interrupted_script.add(Do::Return, 0, 0);
        flags
    });
    interrupted.prepare(&interrupted_script, TWO_LEVEL[1]);

    let mut faulted_script = Script::<16>::default();
    let f_steps: [[usize; 3]; 2] = core::array::from_fn(|n| {
        let stack = faulted_script.add(Do::StackPointer, 0, 0);
        let code = faulted_script.add(Do::Pop, 0, 0);
        let cr2 = faulted_script.add(Do::ReadCr2, 0, 0);
        let entry = TWO_LEVEL[0] + 0x1000 + 4 * (n as u32 + 1);
        faulted_script.add(Do::Write, entry, FRAMES[0] | PRESENT_WRITABLE);
        faulted_script.add(Do::Return, 0, 0);
        [stack, code, cr2]
    });
    faulted.prepare(&faulted_script, TWO_LEVEL[1]);

    let mut doubled_script = Script::<8>::default();
    let d_code = doubled_script.add(Do::Pop, 0, 0);
    // The gate of #GP is there again, and the fault is taken once more.
    let gates = test_guests::legacy::gates_address();
    doubled_script.add(Do::Write, gates + 8 * 13 + 4, peek(gates + 8 * 13 + 4));
    doubled_script.add(Do::Return, 0, 0);
    doubled.prepare(&doubled_script, TWO_LEVEL[0]);

    let mut stackless_script = Script::<4>::default();
    stackless_script.add(Do::Jump, main.selector(), 0);
    stackless.prepare(&stackless_script, TWO_LEVEL[0]);
    stackless.set(SS, 0x13);
    let mut invalid_script = Script::<4>::default();
    let t_code = invalid_script.add(Do::Pop, 0, 0);
    invalid_script.add(Do::Jump, main.selector(), 0);
    invalid.prepare(&invalid_script, TWO_LEVEL[0]);

    let mut absent_script = Script::<8>::default();
    let a_fault = absent_script.add(Do::Flags, 0, 0);
    let a_tr = absent_script.add(Do::TaskRegister, 0, 0);
    absent_script.add(Do::Jump, main.selector(), 0);
    absent.prepare(&absent_script, TWO_LEVEL[1]);
    absent.set(DS, ABSENT_DATA);

    let mut trapped_script = Script::<8>::default();
    let b_fault = trapped_script.add(Do::Flags, 0, 0);
    let b_dr6 = trapped_script.add(Do::ReadDr6, 0, 0);
    trapped_script.add(Do::WriteDr6, 0, 0);
    trapped_script.add(Do::Jump, main.selector(), 0);
    trapped.prepare(&trapped_script, TWO_LEVEL[0]);
    trapped.set(TRAP, 1);

    let mut local_script = Script::<4>::default();
    let l_read = local_script.add(Do::ReadFs, 0, 0);
    local_script.add(Do::Jump, main.selector(), 0);
    local.prepare(&local_script, TWO_LEVEL[0]);
    local.set(LDTR, LDT);
    local.set(FS, 0x0c);

    let mut pae_script = Script::<8>::default();
    let p_cr3 = pae_script.add(Do::ReadCr3, 0, 0);
    let p_read = pae_script.add(Do::Read, ALIAS, 0);
    pae_script.add(Do::Jump, main.selector(), 0);
    let p_again = pae_script.add(Do::Read, ALIAS, 0);
    pae_script.add(Do::Jump, main.selector(), 0);
    pae.prepare(&pae_script, PDPTS[1]);

    // The main program.
    set_descriptor(main.selector(), system(main.tss(), 103, 0x89));
    main.set(CR3, TWO_LEVEL[0]);
    set_descriptor(GATE, gate(called));
    for (vector, task) in [(0x40, interrupted), (3, interrupted), (14, faulted), (8, doubled), (10, invalid)]
    {
        set_gate(vector, gate(task));
    }
    let mut script = Script::<96>::default();
    script.add(Do::ClearTaskSwitched, 0, 0);
    script.add(Do::LoadTaskRegister, main.selector(), 0);
    script.add(Do::WriteCr4, PSE, 0);
    script.add(Do::WriteCr3, TWO_LEVEL[0], 0);
    script.add(Do::WriteCr0, CR0, 0);
    let before = script.add(Do::ReadCr0, 0, 0);
    script.add(Do::WriteDr7, 0x455, 0);
    script.add_three(Do::SetRegisters, 1, 2, 3);
    let jump = script.add(Do::Jump, jumped.selector(), 0);
    let registers = script.add(Do::Registers, 0, 0);
    let tr = script.add(Do::TaskRegister, 0, 0);
    let cr3 = script.add(Do::ReadCr3, 0, 0);
    let read = script.add(Do::Read, ALIAS, 0);
    let other = script.add(Do::Read, ALIAS + 4, 0);
    let cr0 = script.add(Do::ReadCr0, 0, 0);
    script.add(Do::ClearTaskSwitched, 0, 0);
    script.add(Do::Jump, jumped.selector(), 0);
    script.add(Do::Call, called.selector(), 0);
    let flags = script.add(Do::Flags, 0, 0);
    script.add(Do::Call, called.selector(), 0);
    let by_gate = script.add(Do::Call, GATE, 0);
    let interrupt = script.add(Do::Interrupt, 0, 0);
    let breakpoint = script.add(Do::Breakpoint, 0, 0);
    let hole = script.add(Do::Read, ALIAS + 0x1000, 0);
    let written = script.add(Do::Write, ALIAS + 0x2004, 0x66);
    let shown = script.add(Do::Read, ALIAS + 4, 0);
    // #GP without a gate: #NP in its delivery, and that is a double fault.
    script.add(Do::Write, gates + 8 * 13 + 4, 0);
    let double = script.add(Do::Jump, 0x1000, 0);
    let busy = script.add(Do::Jump, main.selector(), 0);
    let not_present = script.add(Do::Call, ABSENT_TSS, 0);
    script.add(Do::Jump, stackless.selector(), 0);
    script.add(Do::Jump, absent.selector(), 0);
    script.add(Do::Jump, trapped.selector(), 0);
    script.add(Do::Jump, local.selector(), 0);
    // IRET to a task that is not busy. (#TS by the stub again: the task of its gate would return to us.)
    let stub = test_guests::legacy::exception_gate(10);
    script.add(Do::Write, gates + 8 * 10, stub as u32);
    script.add(Do::Write, gates + 8 * 10 + 4, (stub >> 32) as u32);
    script.add(Do::Write, main.tss(), jumped.selector());
    script.add(Do::SetFlags, NT | 2, 0);
    let not_busy = script.add(Do::Return, 0, 0);
    script.add(Do::SetFlags, 2, 0);
    script.add(Do::WriteCr0, CR0_OFF, 0);
    script.add(Do::WriteCr4, PAE_BIT, 0);
    script.add(Do::WriteCr3, PDPTS[0], 0);
    script.add(Do::Write, main.tss() + CR3, PDPTS[0]);
    script.add(Do::WriteCr0, CR0, 0);
    script.add(Do::Jump, pae.selector(), 0);
    let pae_read = script.add(Do::Read, ALIAS, 0);
    // The other PDPT leads elsewhere now, and the switch to it sees that.
    script.add(Do::Write, PDPTS[1], PAE[0] | 1);
    script.add(Do::Jump, pae.selector(), 0);
    let pae_cr3 = script.add(Do::ReadCr3, 0, 0);
    script.run();

    check("JMP", script.step(jump).raised().is_none());
    check("JMP: the new task register", jumped_script.step(j_tr).found() == Some(jumped.selector()));
    check("JMP: the new CR3", jumped_script.step(j_cr3).found() == Some(TWO_LEVEL[1]));
    check("JMP: the new address space", jumped_script.step(j_read).found() == Some(0xa001));
    check("JMP: no NT", jumped_script.step(j_flags).found().is_some_and(|flags| flags & NT == 0));
    check("JMP: the new registers", jumped_script.step(j_registers).found() == Some(0x100 + 0x20 + 1));
    check("JMP: TS is set", jumped_script.step(j_cr0).found().is_some_and(|cr0| cr0 & TS != 0));
    check("JMP: no TS before", script.step(before).found().is_some_and(|cr0| cr0 & TS == 0));
    check("JMP: no local breakpoints", jumped_script.step(j_dr7).found() == Some(0x400));
    check("JMP back: registers", script.step(registers).found() == Some(6));
    check("JMP back: task register", script.step(tr).found() == Some(main.selector()));
    check("JMP back: CR3", script.step(cr3).found() == Some(TWO_LEVEL[0]));
    check("JMP back: address space", script.step(read).found() == Some(0xa000));
    check("JMP back: the other's write is not here", script.step(other).found() == Some(0));
    check("JMP back: TS", script.step(cr0).found().is_some_and(|cr0| cr0 & TS != 0));
    check("JMP again: where it was", jumped_script.step(j_again).found() == Some(0x770));
    check("JMP: the task that was left is available", jumped.kind() == 9 && main.kind() == 11);
    let nested = |step: test_guests::legacy::Step| step.found().is_some_and(|flags| flags & NT != 0);
    check("CALL: NT", c_flags.iter().all(|&step| nested(called_script.step(step))));
    check("CALL: the link", called.link() == main.selector());
    check("IRET: no NT", script.step(flags).found().is_some_and(|flags| flags & NT == 0));
    check("IRET: the task is available", called.kind() == 9);
    check("CALL by a task gate", script.step(by_gate).raised().is_none());
    check("INT n by a task gate", nested(interrupted_script.step(i_flags[0])));
    check("INT n: goes on behind it", script.step(interrupt).raised().is_none());
    check("INT3 by a task gate", nested(interrupted_script.step(i_flags[1])));
    check("INT3: goes on behind it", script.step(breakpoint).raised().is_none());
    let f = |n: usize, which: usize| faulted_script.step(f_steps[n][which]).found();
    check("#PF by a task gate: its stack", f(0, 0) == Some(faulted.stack_top() - 4));
    check("#PF by a task gate: a read", f(0, 1) == Some(0) && f(0, 2) == Some(ALIAS + 0x1000));
    check("#PF by a task gate: a write", f(1, 1) == Some(2) && f(1, 2) == Some(ALIAS + 0x2004));
    check("#PF by a task gate: once more", script.step(hole).found() == Some(0xa000));
    check("#PF by a task gate: written", script.step(written).raised().is_none());
    check("#PF by a task gate: what was written", script.step(shown).found() == Some(0x66));
    check("#DF by a task gate", doubled_script.step(d_code).found() == Some(0));
    check("#DF: the fault again", script.step(double).raised() == Some((13, 0x1000)));
    check("JMP to itself", script.step(busy).raised() == Some((13, main.selector())));
    check("CALL of one that is not present", script.step(not_present).raised() == Some((11, ABSENT_TSS)));
    check("#TS in the new task: its code", invalid_script.step(t_code).found() == Some(0x10));
    check("#TS in the new task: whose", invalid.link() == stackless.selector());
    check("#NP in the new task", absent_script.step(a_fault).raised() == Some((11, ABSENT_DATA)));
    check("#NP in the new task: where", absent_script.step(a_fault).result == task_entry());
    check("#NP in the new task: whose", absent_script.step(a_tr).found() == Some(absent.selector()));
    check("T: #DB", trapped_script.step(b_fault).raised() == Some((1, 0)));
    check("T: before the first instruction", trapped_script.step(b_fault).result == task_entry());
    check("T: DR6", trapped_script.step(b_dr6).found().is_some_and(|dr6| dr6 & 1 << 15 != 0));
    check("LDT", local_script.step(l_read).found() == Some(0xa001));
    check("IRET to one that is not busy", script.step(not_busy).raised() == Some((10, jumped.selector())));
    check("PAE: the new CR3", pae_script.step(p_cr3).found() == Some(PDPTS[1]));
    check("PAE: the new address space", pae_script.step(p_read).found() == Some(0xa001));
    check("PAE: back", script.step(pae_read).found() == Some(0xa000));
    check("PAE: the PDPTEs are loaded anew", pae_script.step(p_again).found() == Some(0xa000));
    check("PAE: the CR3 of the end", script.step(pae_cr3).found() == Some(PDPTS[0]));
    println!("tasks done: {bad} bad");
    bad
}
