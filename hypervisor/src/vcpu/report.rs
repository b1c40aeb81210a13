//! The end of a guest that did something it may not: a report that a person can act on.

use alloc::sync::Arc;
use core::fmt;

use machine::cpu::exit::InterruptionInfo;
use machine::cpu::registers::SegmentState;
use machine::cpu::report::{Report, TableRegister};
use machine::emulate::INSTRUCTION_BYTES_MAX;
use machine::manifest::End;
use memory::Event;

use super::{Leave, Vcpu};
use crate::guest::Guest;
use crate::guest::presence::Presence;
use crate::host::heap;
use crate::schedule::Core;
use crate::vmx::entry::read_cr2;
use crate::vmx::fields;
use crate::vmx::guest_state::GuestState;
use crate::vmx::vmcs::CurrentVmcs;

/// Prints a text line by line.
#[derive(Default)]
struct Lines(heapless::String<200>);

impl fmt::Write for Lines {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive('\n') {
            // What does not fit into a line is cut.
            let _ = piece.trim_end_matches('\n').chars().try_for_each(|letter| self.0.push(letter));
            if piece.ends_with('\n') {
                if !self.0.is_empty() {
                    crate::host::log::raw(format_args!("{}", self.0));
                }
                self.0.clear();
            }
        }
        Ok(())
    }
}

impl Vcpu {
    /// Stops this guest, and it alone, for `cause`.
    #[cold]
    pub(crate) fn stop(&mut self, core: &Core, vmcs: &CurrentVmcs, cause: &dyn fmt::Display) -> Leave {
        if !self.guest.end(End::Crash) {
            // It ends already: one report is enough.
            return Leave::Ended(End::Crash);
        }
        core.writer.count(Event::GuestStopped);
        self.refresh_control(vmcs);
        let state = GuestState::read(vmcs, &self.controls);
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let count = self.instruction_bytes(vmcs, &mut bytes);
        let mut registers = *self.entry.registers.as_array();
        registers[4] = state.rsp;
        let segments = state.segments.map(|segment| SegmentState {
            selector: segment.selector,
            base: segment.base,
            limit: segment.limit,
            rights: segment.access.0,
        });
        // The VMCS lists ES, CS, SS, DS, FS, GS, LDTR, TR as the report does.
        let report = Report {
            guest: self.guest.name(),
            vcpu: self.index as u32,
            cause,
            reason_field: vmcs.read(fields::EXIT_REASON),
            qualification: vmcs.read(fields::EXIT_QUALIFICATION),
            interruption: InterruptionInfo(vmcs.read(fields::EXIT_INTERRUPTION_INFO)),
            interruption_error: vmcs.read(fields::EXIT_INTERRUPTION_ERROR_CODE),
            vectoring: InterruptionInfo(vmcs.read(fields::IDT_VECTORING_INFO)),
            registers,
            rip: state.rip,
            rflags: state.rflags,
            cr2: read_cr2(),
            control: self.control,
            segments,
            gdtr: TableRegister { base: state.gdtr.base, limit: state.gdtr.limit.into() },
            idtr: TableRegister { base: state.idtr.base, limit: state.idtr.limit.into() },
            instruction: &bytes[..count],
            history: &self.log,
        };
        if self.guest.vcpus.len() > 1 {
            log::warn!("guest {} is stopped by its vCPU {}: {cause}", self.guest.name(), self.index);
        } else {
            log::warn!("guest {} is stopped: {cause}", self.guest.name());
        }
        let mut lines = Lines::default();
        // Writing into the buffer cannot fail: what does not fit into a line is cut.
        let _ = fmt::write(&mut lines, format_args!("{report}\n"));
        Leave::Ended(End::Crash)
    }

    /// A benchmark guest begins or ends an operation: the exits between the two are told, and so are allocations, of
    /// which there should be none.
    pub(crate) fn bench_mark(&mut self, begin: bool) {
        if begin {
            self.bench_start = (self.exits(), heap::allocations());
        } else {
            let (exits, allocations) = self.bench_start;
            // The OUT that ends the operation is itself an exit.
            let exits = self.exits().wrapping_sub(exits).saturating_sub(1);
            crate::console::bench(&self.guest, exits, heap::allocations() - allocations);
        }
    }

    /// Whether it wants to run though it halted.
    pub fn wants_attention(&self) -> bool {
        self.presence.is_kicked()
    }

    /// The guest it belongs to.
    pub fn owner(&self) -> Arc<Guest> {
        Arc::clone(&self.guest)
    }

    /// What others see of it.
    pub fn presence(&self) -> &Presence {
        &self.presence
    }
}
