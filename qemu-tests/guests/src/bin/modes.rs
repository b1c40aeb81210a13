//! Goes through the paging modes as boot code does, off, 32-bit, off, PAE, off, 4-level and back, and in each of them
//! changes entries and flushes by every means there is: what comes after a flush must be what the tables say.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use test_guests::legacy::{Do, Script, poke, set_exception_gates};
use test_guests::paging::{AddressSpace, FREE, P, W};
use test_guests::trap::{Frame, handle};
use test_guests::{cpu, entry, println};

/// 32-bit paging: a directory, four tables that map 16 MiB to themselves, and one for [`ALIAS`].
const TWO_LEVEL: u32 = 0x50_0000;
const TWO_LEVEL_LEAF: u32 = TWO_LEVEL + 0x5000;
/// PAE: a PDPT, and a directory of 2 MiB pages with a table for [`ALIAS`].
const PAE: u32 = 0x51_0000;
const PAE_LEAF: u32 = PAE + 0x2000;
/// Two directories that take turns as the second GiB's, each with a leaf table two pages on.
const SECOND: [u32; 2] = [PAE + 0x3000, PAE + 0x4000];
/// A page that is mapped by a leaf table, in 32-bit paging and PAE.
const ALIAS: u32 = 64 << 20;
/// Mapped by what is a directory entry for 4 MiB with CR4.PSE, and leads to a table without.
const LARGE_OR_TABLE: u32 = 128 << 20;
const TABLE_OR_PAGE: u32 = 0xc0_0000;
const GIB: u32 = 1 << 30;
/// The pages behind, each with a number in it.
const FRAMES: [u32; 2] = [0x80_0000, 0x80_1000];
const NUMBERS: [u32; 2] = [0xa000, 0xa001];
/// An INVPCID descriptor.
const DESCRIPTOR: u32 = 0x52_0000;
/// The root and the tables of a second 4-level address space.
const OTHER: u64 = 0x53_0000;

const CR0: u32 = 0x8001_0011;
const CR0_OFF: u32 = 0x11;
const WP: u32 = 1 << 16;
const CD: u32 = 1 << 30;
const PSE: u32 = 1 << 4;
const PAE_BIT: u32 = 1 << 5;
const PGE: u32 = 1 << 7;
const PCIDE: u32 = 1 << 17;
const SMEP: u32 = 1 << 20;
const SMAP: u32 = 1 << 21;
const EFER: u32 = 0xc000_0080;
const NXE: u32 = 1 << 11;
const KEEP: u64 = 1 << 63;

const UD: u32 = 6;
const GP: u32 = 13;
const PF: u32 = 14;

entry!(main);

/// What the processor offers.
#[derive(Clone, Copy)]
struct Offered {
    pcid: bool,
    invpcid: bool,
    smep: bool,
    smap: bool,
    /// This is a guest. The emulator's own processor loads PDPTEs with CR0.WP, and not with CR0.CD, where the SDM has it
    /// the other way round.
    hypervisor: bool,
}

impl Offered {
    fn ask() -> Self {
        let (one, seven) = (cpu::cpuid(1, 0), cpu::cpuid(7, 0));
        let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
        let seven = if cpu::cpuid(0, 0)[0] >= 7 { seven } else { [0; 4] };
        let offered = Self {
            pcid: bit(one[2], 17),
            invpcid: bit(seven[1], 10),
            smep: bit(seven[1], 7),
            smap: bit(seven[1], 20),
            hypervisor: bit(one[2], 31),
        };
        for (there, name) in [
            (offered.pcid, "PCID"),
            (offered.invpcid, "INVPCID"),
            (offered.smep, "SMEP"),
            (offered.smap, "SMAP"),
        ] {
            if !there {
                println!("skipped: the processor does not offer {name}");
            }
        }
        offered
    }
}

/// A script with what each of its steps should find.
struct Run {
    script: Script<300>,
    expected: [Expected; 160],
    count: usize,
    /// The hazard that what comes next is about.
    hazard: Hazard,
}

/// What a step should find.
#[derive(Clone, Copy)]
struct Expected {
    step: usize,
    hazard: Hazard,
    name: &'static str,
    found: Result<u32, (u32, u32)>,
}

/// A row of docs/hazards.md, or none.
#[derive(Clone, Copy)]
enum Hazard {
    None,
    /// PDPTEs.
    H17,
    /// Flushes.
    H19,
    /// CR3 values that are no RAM.
    H20,
}

/// What was checked of each hazard, and what of it was bad.
#[derive(Default)]
struct Tally {
    checks: [u32; 4],
    bad: [u32; 4],
}

impl Tally {
    fn count(&mut self, hazard: Hazard, good: bool) {
        self.checks[hazard as usize] += 1;
        self.bad[hazard as usize] += u32::from(!good);
    }
    fn show(&self) {
        for (hazard, name) in [(Hazard::H17, "H17"), (Hazard::H19, "H19"), (Hazard::H20, "H20")] {
            println!("{name}: {} bad of {}", self.bad[hazard as usize], self.checks[hazard as usize]);
        }
    }
}

impl Run {
    fn new() -> Self {
        let none = Expected { step: 0, hazard: Hazard::None, name: "", found: Ok(0) };
        Self { script: Script::default(), expected: [none; 160], count: 0, hazard: Hazard::None }
    }
    fn then(&mut self, what: Do, a: u32, b: u32) {
        self.script.add(what, a, b);
    }
    fn expect(&mut self, name: &'static str, expected: Result<u32, (u32, u32)>, what: Do, a: u32, b: u32) {
        let step = self.script.add(what, a, b);
        self.expected[self.count] = Expected { step, hazard: self.hazard, name, found: expected };
        self.count += 1;
    }
    fn read(&mut self, name: &'static str, address: u32, expected: u32) {
        self.expect(name, Ok(expected), Do::Read, address, 0);
    }
    fn efer(&mut self, value: u32) {
        self.script.add_three(Do::WriteMsr, EFER, value, 0);
    }
    /// Carries it out, and forgets it.
    fn finish(&mut self, tally: &mut Tally) {
        self.script.run();
        for &Expected { step: number, hazard, name, found: expected } in &self.expected[..self.count] {
            let step = self.script.step(number);
            let found = step.found().ok_or((step.vector, step.error));
            if found != expected {
                println!("{name} (step {number}): {found:x?} for {expected:x?}: BAD");
            }
            tally.count(hazard, found == expected);
        }
        self.script.clear();
        self.count = 0;
    }
}

fn tables() {
    for page in 0..0x40 {
        for word in 0..1024 {
            poke(TWO_LEVEL + page * 0x1000 + word * 4, 0);
        }
    }
    for n in 0..4 {
        poke(TWO_LEVEL + 4 * n, (TWO_LEVEL + 0x1000 * (n + 1)) | 3);
    }
    for n in 0..4096 {
        poke(TWO_LEVEL + 0x1000 + 4 * n, n << 12 | 3);
    }
    poke(TWO_LEVEL + (ALIAS >> 22) * 4, TWO_LEVEL_LEAF | 7);
    poke(TWO_LEVEL + (LARGE_OR_TABLE >> 22) * 4, TABLE_OR_PAGE | 0x83);
    poke(TABLE_OR_PAGE, FRAMES[0] | 0x63);
    poke(PAE, (PAE + 0x1000) | 1);
    poke(PAE + 8, SECOND[0] | 1);
    for n in 0..8 {
        poke(PAE + 0x1000 + 8 * n, n << 21 | 0x83);
    }
    poke(PAE + 0x1000 + (ALIAS >> 21) * 8, PAE_LEAF | 7);
    for n in 0..2 {
        poke(SECOND[n], (SECOND[n] + 0x2000) | 3);
        poke(SECOND[n] + 0x2000, FRAMES[n] | 3);
        poke(FRAMES[n], NUMBERS[n]);
    }
    descriptor();
}

/// Changes the entry at `leaf`, of a table that maps [`ALIAS`], and flushes by all means of the present mode.
fn flushes(run: &mut Run, offered: Offered, leaf: u32, cr3: u32, cr4: u32) {
    run.hazard = Hazard::H19;
    let mut which = 0;
    let mut change = |run: &mut Run, name, what, a, b| {
        which ^= 1;
        run.then(Do::Write, leaf, FRAMES[which] | 3);
        run.then(what, a, b);
        run.read(name, ALIAS, NUMBERS[which]);
    };
    change(run, "INVLPG", Do::Invlpg, ALIAS, 0);
    change(run, "INVLPG of another byte of the page", Do::Invlpg, ALIAS + 0xfff, 0);
    change(run, "MOV to CR3", Do::WriteCr3, cr3, 0);
    change(run, "CR4.PGE is set", Do::WriteCr4, cr4 | PGE, 0);
    change(run, "INVLPG with PGE", Do::Invlpg, ALIAS, 0);
    change(run, "CR4.PGE is cleared", Do::WriteCr4, cr4, 0);
    for kind in 0..4 {
        if offered.invpcid {
            change(run, "INVPCID", Do::Invpcid, kind, DESCRIPTOR);
        }
    }
    invalidations(run, offered);
    run.hazard = Hazard::None;
    // The supervisor's writes to a read-only page.
    run.then(Do::Write, leaf, FRAMES[0] | 1);
    run.then(Do::Invlpg, ALIAS, 0);
    run.expect("WP", Err((PF, 3)), Do::Write, ALIAS + 8, 1);
    run.then(Do::WriteCr0, CR0 & !WP, 0);
    run.expect("WP is cleared", Ok(0), Do::Write, ALIAS + 8, 1);
    run.then(Do::WriteCr0, CR0, 0);
    run.expect("WP is set again", Err((PF, 3)), Do::Write, ALIAS + 8, 1);
    // The supervisor's accesses to a user page.
    run.then(Do::Write, leaf, FRAMES[0] | 7);
    run.then(Do::Invlpg, ALIAS, 0);
    run.read("a user page", ALIAS, NUMBERS[0]);
    if offered.smap {
        run.then(Do::WriteCr4, cr4 | SMAP, 0);
        run.expect("SMAP is set", Err((PF, 1)), Do::Read, ALIAS, 0);
        run.then(Do::WriteCr4, cr4, 0);
        run.read("SMAP is cleared", ALIAS, NUMBERS[0]);
    }
    if offered.smep {
        run.then(Do::WriteCr4, cr4 | SMEP, 0);
        run.read("SMEP is set", ALIAS, NUMBERS[0]);
        run.then(Do::WriteCr4, cr4, 0);
        run.read("SMEP is cleared", ALIAS, NUMBERS[0]);
    }
}

/// Every flush instruction, with operands good and bad, in whatever mode.
fn invalidations(run: &mut Run, offered: Offered) {
    run.hazard = Hazard::H19;
    for address in [0, ALIAS, GIB, 0x8000_0000, 0xffff_ffff] {
        run.expect("INVLPG of any address", Ok(0), Do::Invlpg, address, 0);
    }
    if !offered.invpcid {
        run.expect("INVPCID where it is not offered", Err((UD, 0)), Do::Invpcid, 2, DESCRIPTOR);
        return;
    }
    for kind in 0..4 {
        run.expect("INVPCID of any type", Ok(0), Do::Invpcid, kind, DESCRIPTOR);
    }
    run.expect("INVPCID of no type", Err((GP, 0)), Do::Invpcid, 4, DESCRIPTOR);
    run.then(Do::Write, DESCRIPTOR, 1);
    for kind in 0..4 {
        let expected = if kind < 2 { Err((GP, 0)) } else { Ok(0) };
        run.expect("INVPCID of a PCID without PCIDE", expected, Do::Invpcid, kind, DESCRIPTOR);
    }
    run.then(Do::Write, DESCRIPTOR, 1 << 12);
    run.expect("INVPCID with a reserved bit", Err((GP, 0)), Do::Invpcid, 2, DESCRIPTOR);
    run.then(Do::Write, DESCRIPTOR, 0);
    run.then(Do::Write, DESCRIPTOR + 12, 0x8000);
    run.expect("INVPCID, not canonical", Err((GP, 0)), Do::Invpcid, 0, DESCRIPTOR);
    run.then(Do::Write, DESCRIPTOR + 12, 0);
}

fn off(run: &mut Run, offered: Offered) {
    run.then(Do::WriteCr0, CR0_OFF, 0);
    run.hazard = Hazard::H20;
    run.read("paging off", FRAMES[1], NUMBERS[1]);
    // Nothing is looked up through it while paging is off.
    run.expect("a CR3 that is no RAM, with paging off", Ok(0), Do::WriteCr3, 0xfff0_0000, 0);
    run.read("paging off, with that CR3", FRAMES[0], NUMBERS[0]);
    run.expect("CR3 as it was written", Ok(0xfff0_0000), Do::ReadCr3, 0, 0);
    invalidations(run, offered);
}

fn two_level(run: &mut Run, offered: Offered) {
    run.then(Do::WriteCr4, 0, 0);
    run.then(Do::WriteCr3, TWO_LEVEL, 0);
    run.then(Do::WriteCr0, CR0, 0);
    flushes(run, offered, TWO_LEVEL_LEAF, TWO_LEVEL, 0);
    run.read("without PSE a table", LARGE_OR_TABLE, NUMBERS[0]);
    run.then(Do::WriteCr4, PSE, 0);
    run.read("with PSE a page of 4 MiB", LARGE_OR_TABLE, FRAMES[0] | 0x63);
    run.then(Do::WriteCr4, 0, 0);
    run.read("a table again", LARGE_OR_TABLE, NUMBERS[0]);
}

fn pae(run: &mut Run, offered: Offered) {
    run.then(Do::WriteCr4, PAE_BIT, 0);
    run.then(Do::WriteCr3, PAE, 0);
    run.then(Do::WriteCr0, CR0, 0);
    flushes(run, offered, PAE_LEAF, PAE, PAE_BIT);
    // EFER.NXE while paging is on.
    run.efer(NXE);
    run.then(Do::Write, PAE_LEAF + 4, 1 << 31);
    run.then(Do::Invlpg, ALIAS, 0);
    run.read("NX", ALIAS, NUMBERS[0]);
    // A write of EFER flushes nothing.
    run.efer(0);
    run.then(Do::Invlpg, ALIAS, 0);
    run.expect("NX is reserved without NXE", Err((PF, 9)), Do::Read, ALIAS, 0);
    run.efer(NXE);
    run.read("NX again", ALIAS, NUMBERS[0]);
    run.then(Do::Write, PAE_LEAF + 4, 0);
    run.efer(0);
    if offered.pcid {
        run.expect("PCIDE outside long mode", Err((GP, 0)), Do::WriteCr4, PAE_BIT | PCIDE, 0);
    }
    pdptes(run, offered);
}

/// H17: the PDPTE registers are what memory held at the last of the writes that load them.
fn pdptes(run: &mut Run, offered: Offered) {
    run.hazard = Hazard::H17;
    let mut which = 0;
    run.read("the PDPTE", GIB, NUMBERS[0]);
    let mut change = |run: &mut Run, name, stays: bool, what, a| {
        run.then(Do::Write, PAE + 8, SECOND[which ^ 1] | 1);
        run.then(what, a, 0);
        which ^= usize::from(!stays);
        run.read(name, GIB, NUMBERS[which]);
        run.then(Do::Write, PAE + 8, SECOND[which] | 1);
    };
    change(run, "a PDPTE counts after MOV to CR3 with the same value", false, Do::WriteCr3, PAE);
    change(run, "not after INVLPG", true, Do::Invlpg, GIB);
    if offered.hypervisor {
        change(run, "not after CR0.WP", true, Do::WriteCr0, CR0 & !WP);
        change(run, "not after CR0.WP again", true, Do::WriteCr0, CR0);
        change(run, "after CR0.CD", false, Do::WriteCr0, CR0 | CD);
        change(run, "after CR0.CD again", false, Do::WriteCr0, CR0);
    }
    change(run, "after CR4.PGE is set", false, Do::WriteCr4, PAE_BIT | PGE);
    change(run, "after CR4.PGE is cleared", false, Do::WriteCr4, PAE_BIT);
    change(run, "after CR4.PSE", false, Do::WriteCr4, PAE_BIT | PSE);
    change(run, "not after a CR4 of the same value", true, Do::WriteCr4, PAE_BIT | PSE);
    if offered.smep {
        change(run, "after CR4.SMEP", false, Do::WriteCr4, PAE_BIT | SMEP);
    }
    // One with a reserved bit is refused, and changes nothing.
    run.then(Do::Write, PAE + 8, SECOND[0] | 3);
    run.expect("a PDPTE with a reserved bit", Err((GP, 0)), Do::WriteCr3, PAE, 0);
    run.then(Do::Write, PAE + 8, SECOND[0] | 1);
    run.then(Do::WriteCr3, PAE, 0);
    run.read("and then a good one", GIB, NUMBERS[0]);
    run.then(Do::Write, PAE + 8, 0);
    run.read("still there", GIB, NUMBERS[0]);
    run.then(Do::WriteCr3, PAE, 0);
    run.expect("and gone", Err((PF, 0)), Do::Read, GIB, 0);
    run.then(Do::Write, PAE + 8, SECOND[0] | 1);
    run.then(Do::WriteCr4, PAE_BIT, 0);
}

// Instructions in 64-bit mode that may fault. None pushes anything, so that the handler can return for it.
global_asm!(
    "probe_cr0: mov cr0, rdi",
    "xor eax, eax",
    "ret",
    "probe_cr3: mov cr3, rdi",
    "xor eax, eax",
    "ret",
    "probe_cr4: mov cr4, rdi",
    "xor eax, eax",
    "ret",
    "probe_invlpg: invlpg [rdi]",
    "xor eax, eax",
    "ret",
    "probe_invpcid: invpcid rdi, [rsi]",
    "xor eax, eax",
    "ret",
    "probe_read: mov rax, [rdi]",
    "ret",
    "probe_faulted: mov eax, 1",
    "ret",
);

unsafe extern "C" {
    fn probe_cr0(value: u64) -> u64;
    fn probe_cr3(value: u64) -> u64;
    fn probe_cr4(value: u64) -> u64;
    fn probe_invlpg(address: u64) -> u64;
    fn probe_invpcid(kind: u64, descriptor: u64) -> u64;
    fn probe_read(address: u64) -> u64;
    static probe_faulted: [u8; 0];
}

static FAULT: AtomicU64 = AtomicU64::new(0);
/// RFLAGS that were pushed with it.
static FLAGS: AtomicU64 = AtomicU64::new(0);

fn note(frame: &mut Frame) {
    FAULT.store(frame.vector << 32 | frame.error, Ordering::Relaxed);
    FLAGS.store(frame.rflags, Ordering::Relaxed);
    frame.rip = &raw const probe_faulted as u64;
}

/// What an instruction gave, or the vector and the error code that it raised.
fn probe(instruction: impl FnOnce() -> u64) -> Result<u64, (u32, u32)> {
    FAULT.store(u64::MAX, Ordering::Relaxed);
    let value = instruction();
    match FAULT.load(Ordering::Relaxed) {
        u64::MAX => Ok(value),
        fault => Err(((fault >> 32) as u32, fault as u32)),
    }
}

/// Safe, because what faults comes back as an error and the tables keep all that runs where it is.
macro_rules! instruction {
    ($function:ident $(, $argument:expr)*) => {
        // SAFETY: see the macro.
        probe(|| unsafe { $function($($argument),*) })
    };
}

fn invpcid(kind: u64, pcid: u64, address: u64) -> Result<u64, (u32, u32)> {
    let at = u64::from(DESCRIPTOR);
    cpu::write64(at, pcid);
    cpu::write64(at + 8, address);
    instruction!(probe_invpcid, kind, at)
}

/// Long mode: the same flushes, and PCIDs.
struct Long<'a>(&'a mut Tally);

impl Long<'_> {
    fn check(&mut self, name: &str, good: bool) {
        if !good {
            println!("{name}: BAD");
        }
        self.0.count(Hazard::H19, good);
    }
    fn reads(&mut self, name: &str, which: usize) {
        let found = instruction!(probe_read, FREE).map(|value| value as u32);
        if found != Ok(NUMBERS[which]) {
            println!("{name}: {found:x?}");
        }
        self.check(name, found == Ok(NUMBERS[which]));
    }
}

fn long_mode(offered: Offered, tally: &mut Tally) {
    let mut space = AddressSpace::install();
    space.map(FREE, FRAMES[0].into(), P | W);
    let leaf = space.entry(FREE);
    let root = cpu::read_cr3();
    let cr4 = cpu::read_cr4();
    // The other space shares everything but what lies at FREE.
    for slot in 0..512 {
        cpu::write64(OTHER + 8 * slot, cpu::read64(root + 8 * slot));
    }
    for level in 0..3 {
        let slot = if level == 0 { 8 } else { 0 };
        cpu::write64(OTHER + level * 0x1000 + slot, (OTHER + (level + 1) * 0x1000) | P | W);
    }
    let other_leaf = OTHER + 0x3000;
    cpu::write64(other_leaf, u64::from(FRAMES[0]) | P | W);
    let point = |leaf: u64, which: usize| cpu::write64(leaf, u64::from(FRAMES[which]) | P | W);

    let mut long = Long(tally);
    long.reads("4-level", 0);
    point(leaf, 1);
    cpu::invlpg(FREE);
    long.reads("INVLPG", 1);
    point(leaf, 0);
    cpu::write_cr3(root);
    long.reads("MOV to CR3", 0);
    point(leaf, 1);
    cpu::write_cr4(cr4 ^ u64::from(PGE));
    long.reads("CR4.PGE", 1);
    point(leaf, 0);
    cpu::write_cr4(cr4);
    long.reads("CR4.PGE again", 0);
    for address in [0, 1 << 47, u64::MAX, 1 << 63] {
        long.check("INVLPG of any address", instruction!(probe_invlpg, address).is_ok());
    }
    long.check("CR0.PG in 64-bit mode", instruction!(probe_cr0, u64::from(CR0_OFF)) == Err((GP, 0)));
    long.check("RF is set in what a fault pushes", FLAGS.load(Ordering::Relaxed) & 1 << 16 != 0);
    long.check("CR3 with bit 63 without PCIDE", instruction!(probe_cr3, root | KEEP) == Err((GP, 0)));
    long.check("CR3 with a reserved bit", instruction!(probe_cr3, root | 1 << 51) == Err((GP, 0)));
    long.check("CR3 after that", cpu::read_cr3() == root);
    if offered.invpcid {
        for kind in 0..4 {
            point(leaf, 1 - kind as usize % 2);
            long.check("INVPCID", invpcid(kind, 0, FREE).is_ok());
            long.reads("after INVPCID", 1 - kind as usize % 2);
        }
        long.check("INVPCID of no type", invpcid(4, 0, 0) == Err((GP, 0)));
        long.check("INVPCID of a PCID", invpcid(1, 1, 0) == Err((GP, 0)));
        long.check("INVPCID, not canonical", invpcid(0, 0, 1 << 47) == Err((GP, 0)));
        long.check("INVPCID with a reserved bit", invpcid(3, 1 << 12, 0) == Err((GP, 0)));
        let unmapped = FREE + 0x1000;
        let fault = instruction!(probe_invpcid, 2, unmapped);
        long.check("INVPCID without its descriptor", fault == Err((PF, 0)) && cpu::read_cr2() == unmapped);
        let fault = instruction!(probe_invpcid, 2, 1 << 47);
        long.check("INVPCID with a descriptor nowhere", fault == Err((GP, 0)));
    } else {
        long.check("INVPCID where it is not offered", invpcid(2, 0, 0) == Err((UD, 0)));
    }
    if offered.pcid {
        pcids(&mut long, offered, root, [leaf, other_leaf]);
    } else {
        let value = cr4 | u64::from(PCIDE);
        long.check("PCIDE where it is not offered", instruction!(probe_cr4, value) == Err((GP, 0)));
    }
    descriptor();
}

/// An INVPCID descriptor of PCID 0.
fn descriptor() {
    cpu::write64(DESCRIPTOR.into(), 0);
    cpu::write64(u64::from(DESCRIPTOR) + 8, ALIAS.into());
}

/// Two spaces under two PCIDs.
fn pcids(long: &mut Long<'_>, offered: Offered, root: u64, leaves: [u64; 2]) {
    let on = cpu::read_cr4() | u64::from(PCIDE);
    let point = |space: usize, which: usize| cpu::write64(leaves[space], u64::from(FRAMES[which]) | P | W);
    cpu::write_cr3(root | 0x18);
    long.check("PCIDE with a CR3 that has low bits", instruction!(probe_cr4, on) == Err((GP, 0)));
    cpu::write_cr3(root);
    long.check("PCIDE", instruction!(probe_cr4, on).is_ok());
    let (a, b) = (root | 1, OTHER | 2);
    for space in 0..2 {
        point(space, 0);
    }
    for cr3 in [b, a] {
        long.check("CR3 with a PCID", instruction!(probe_cr3, cr3).is_ok() && cpu::read_cr3() == cr3);
        long.reads("a PCID's page", 0);
    }
    long.check("CR3 with bit 63", instruction!(probe_cr3, b | KEEP).is_ok());
    long.check("bit 63 does not show", cpu::read_cr3() == b);
    long.check("PG off with PCIDE", instruction!(probe_cr0, u64::from(CR0_OFF)) == Err((GP, 0)));
    // Edited under the other PCID: without a flush it may be old, with one it may not.
    let mut which = 0;
    let edit = |which: &mut usize| {
        *which ^= 1;
        point(0, *which);
    };
    edit(&mut which);
    cpu::write_cr3(a | KEEP);
    let found = cpu::read64(FREE) as u32;
    long.check("without a flush: old or new", NUMBERS.contains(&found));
    cpu::write_cr3(b | KEEP);
    cpu::write_cr3(a);
    long.reads("MOV to CR3 without bit 63", which);
    // A PCID that never saw the old entry may not see it: this space had none before.
    cpu::write_cr3(b | KEEP);
    edit(&mut which);
    cpu::write_cr3(root | 3);
    long.reads("another PCID on the same root", which);
    edit(&mut which);
    cpu::write_cr3(b | KEEP);
    cpu::write_cr3(root | 4);
    long.reads("and another", which);
    for kind in 0..4 {
        if !offered.invpcid {
            break;
        }
        cpu::write_cr3(a);
        long.reads("before INVPCID", which);
        cpu::write_cr3(b | KEEP);
        edit(&mut which);
        long.check("INVPCID of another PCID", invpcid(kind, 1, FREE).is_ok());
        cpu::write_cr3(a | KEEP);
        long.reads("INVPCID of another PCID", which);
        edit(&mut which);
        long.check("INVPCID of this PCID", invpcid(kind, 1, FREE).is_ok());
        long.reads("INVPCID of this PCID", which);
    }
    // INVLPG empties this PCID's, and global ones of all.
    cpu::write_cr3(a | KEEP);
    edit(&mut which);
    cpu::invlpg(FREE);
    long.reads("INVLPG under a PCID", which);
    // CR4.PGE empties all of every PCID.
    cpu::write_cr3(b | KEEP);
    edit(&mut which);
    cpu::write_cr4(on ^ u64::from(PGE));
    cpu::write_cr4(on);
    cpu::write_cr3(a | KEEP);
    long.reads("CR4.PGE under another PCID", which);
    // So does clearing PCIDE, which is allowed with any PCID; what was the PCID stays in CR3.
    cpu::write_cr3(b | KEEP);
    edit(&mut which);
    cpu::write_cr4(on & !u64::from(PCIDE));
    long.check("CR3 without PCIDE", cpu::read_cr3() == b);
    cpu::write_cr3(root);
    long.reads("without PCIDE", which);
}

fn main() -> u8 {
    for vector in [UD, GP, PF] {
        handle(vector as u8, note);
    }
    set_exception_gates();
    tables();
    let offered = Offered::ask();
    let mut run = Run::new();
    off(&mut run, offered);
    two_level(&mut run, offered);
    off(&mut run, offered);
    let mut tally = Tally::default();
    run.finish(&mut tally);
    println!("modes: 32-bit paging");
    off(&mut run, offered);
    pae(&mut run, offered);
    off(&mut run, offered);
    run.finish(&mut tally);
    println!("modes: PAE");
    long_mode(offered, &mut tally);
    println!("modes: 4-level");
    pae(&mut run, offered);
    off(&mut run, offered);
    run.finish(&mut tally);
    println!("modes: PAE and off again");
    tally.show();
    let bad: u32 = tally.bad.iter().sum();
    println!("modes done: {bad} bad");
    u8::from(bad != 0)
}
