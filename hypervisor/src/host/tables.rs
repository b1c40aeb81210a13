//! GDT, TSS and IDT. Every core has its own GDT and TSS, and all share one IDT.

use core::cell::UnsafeCell;

use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::registers::model_specific::GsBase;
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use super::cores::PerCore;
use super::interrupts;
use super::stacks::{self, Use};

/// Our code segment.
pub const CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);
/// Our data segment.
pub const DATA: SegmentSelector = SegmentSelector::new(2, PrivilegeLevel::Ring0);

/// Vectors that run on a stack of their own, whatever state the main one is in.
pub const ISTS: [(u8, Use); 3] = [(2, Use::Nmi), (8, Use::DoubleFault), (18, Use::MachineCheck)];

/// One gate of the IDT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Gate(u64, u64);

impl Gate {
    /// A present interrupt gate (interrupts off in the handler) for ring 0.
    /// SDM Vol. 3, "64-Bit Mode IDT".
    const fn new(handler: u64, selector: u16, ist: u8) -> Self {
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
        Self(
            handler & 0xffff
                | (selector as u64) << 16
                | (ist as u64) << 32
                | PRESENT_INTERRUPT_GATE << 32
                | (handler >> 16 & 0xffff) << 48,
            handler >> 32,
        )
    }
}

#[repr(C, align(16))]
struct Idt(UnsafeCell<[Gate; 256]>);

// SAFETY: written by the boot core before any other core runs, then only read.
unsafe impl Sync for Idt {}

static IDT: Idt = Idt(UnsafeCell::new([Gate(0, 0); 256]));

/// A core's own descriptor tables.
#[derive(Debug)]
pub struct CoreTables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
}

impl CoreTables {
    /// Empty ones.
    #[must_use]
    pub const fn new() -> Self {
        Self { gdt: GlobalDescriptorTable::new(), tss: TaskStateSegment::new() }
    }
}

impl Default for CoreTables {
    fn default() -> Self {
        Self::new()
    }
}

/// Stacks of the boot core's handlers until the guarded ones are mapped.
#[repr(C, align(16))]
struct EarlyStacks(UnsafeCell<[[u8; 4096]; 3]>);

// SAFETY: touched only by the processor's stack switch on the boot core.
unsafe impl Sync for EarlyStacks {}

static EARLY: EarlyStacks = EarlyStacks(UnsafeCell::new([[0; 4096]; 3]));

/// Fills the IDT. The boot core does it once, first of all.
pub fn build_idt() {
    let gates = IDT.0.get();
    for vector in 0..=255u8 {
        let ist = ISTS.iter().position(|&(with_ist, _)| with_ist == vector).map_or(0, |at| at as u8 + 1);
        let gate = Gate::new(interrupts::stub(vector), CODE.0, ist);
        // SAFETY: the pointer is to our own array.
        let gates = unsafe { &mut *gates };
        gates[usize::from(vector)] = gate;
    }
}

/// Where a core's handlers with stacks of their own run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandlerStacks {
    /// In the image, without guards: the boot core before our page tables.
    Early,
    /// The guarded ones of [`stacks`].
    Guarded,
}

/// Chooses the stacks of `core`'s handlers; the processor looks at them at the next event.
///
/// # Safety
/// Only by the core itself, or before it runs; [`HandlerStacks::Guarded`] only once they are mapped.
pub unsafe fn set_handler_stacks(core: &'static PerCore, which: HandlerStacks) {
    // SAFETY: as the caller promised, nobody else touches these tables.
    let tables = unsafe { &mut *core.tables() };
    for (at, &(_, purpose)) in ISTS.iter().enumerate() {
        let top = match which {
            HandlerStacks::Early => EARLY.0.get() as u64 + 4096 * (at as u64 + 1),
            HandlerStacks::Guarded => stacks::top(core.index(), purpose),
        };
        tables.tss.interrupt_stack_table[at] = VirtAddr::new(top);
    }
}

/// Loads GDT, TSS, IDT and segment registers of the core that runs this, and points GS at `core`.
///
/// # Safety
/// Once per core, by that core, after [`set_handler_stacks`].
pub unsafe fn load(core: &'static PerCore) {
    // SAFETY: as the caller promised, nobody else touches these tables.
    let tables = unsafe { &mut *core.tables() };
    // SAFETY: the TSS lives in the static per-core block.
    let tss = unsafe { Descriptor::tss_segment_unchecked(&raw const tables.tss) };
    tables.gdt = GlobalDescriptorTable::new();
    tables.gdt.append(Descriptor::kernel_code_segment());
    tables.gdt.append(Descriptor::kernel_data_segment());
    let tss = tables.gdt.append(tss);
    // SAFETY: the GDT lives in the static per-core block, and holds the segments loaded below.
    unsafe { tables.gdt.load_unsafe() };
    // SAFETY: a 64-bit ring 0 code segment.
    unsafe { CS::set_reg(CODE) };
    // SAFETY: a ring 0 data segment.
    unsafe { SS::set_reg(DATA) };
    // SAFETY: bases and limits do not matter for it in 64-bit mode.
    unsafe { DS::set_reg(DATA) };
    // SAFETY: as for DS.
    unsafe { ES::set_reg(DATA) };
    // SAFETY: FS is not used.
    unsafe { FS::set_reg(SegmentSelector::NULL) };
    // SAFETY: the base is set just below, before anything uses it.
    unsafe { GS::set_reg(SegmentSelector::NULL) };
    GsBase::write(VirtAddr::from_ptr(core));
    let idt = DescriptorTablePointer { limit: 16 * 256 - 1, base: VirtAddr::from_ptr(IDT.0.get()) };
    // SAFETY: `build_idt` filled it with handlers that never return wrongly.
    unsafe { lidt(&idt) };
    // SAFETY: the selector is this GDT's available TSS.
    unsafe { load_tss(tss) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_splits_the_address() {
        let gate = Gate::new(0xffff_ffff_8012_3456, 8, 2);
        assert_eq!(gate, Gate(0x8012_8e02_0008_3456, 0xffff_ffff));
    }
}
