//! Control registers: what follows from the guest's changes for the hardware and for the shadow MMU.

use machine::cpu::control::{
    self as rules, Change, ControlState, Cr0, Cr4, Efer, Effects, Paging as GuestPaging,
};
use machine::cpu::event::Exception;
use machine::cpu::registers::{CodeSize, Gpr, SegmentName, SegmentState, canonical};
use machine::emulate::{self, Fault, Invalidation, Invpcid};
use memory::{Event, Gva};
use shadow::{Flush, Mode, Paging, Short, walk};

use super::mmio::View;
use super::{Next, Vcpu};
use crate::schedule::Core;
use crate::vmx::controls::Feature;
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

impl Vcpu {
    /// Takes over the CR0 and CR4 bits that the guest changes without an exit.
    pub(crate) fn refresh_control(&mut self, vmcs: &CurrentVmcs) {
        let model = &self.guest.model;
        let (cr0, cr4) = (vmcs.read(fields::GUEST_CR0), vmcs.read(fields::GUEST_CR4));
        self.control.refresh(&model.control, &model.fixed, cr0, cr4);
    }

    /// CR4 as the guest would read it.
    pub(crate) fn guest_cr4(&mut self, vmcs: &CurrentVmcs) -> u64 {
        self.refresh_control(vmcs);
        self.control.cr4.bits()
    }

    /// Access rights of a segment register.
    pub(crate) fn segment_rights(&self, vmcs: &CurrentVmcs, name: SegmentName) -> u32 {
        match name {
            SegmentName::Es => vmcs.read(fields::GUEST_ES_ACCESS_RIGHTS),
            SegmentName::Cs => vmcs.read(fields::GUEST_CS_ACCESS_RIGHTS),
            SegmentName::Ss => vmcs.read(fields::GUEST_SS_ACCESS_RIGHTS),
            SegmentName::Ds => vmcs.read(fields::GUEST_DS_ACCESS_RIGHTS),
            SegmentName::Fs => vmcs.read(fields::GUEST_FS_ACCESS_RIGHTS),
            SegmentName::Gs => vmcs.read(fields::GUEST_GS_ACCESS_RIGHTS),
        }
    }

    /// The width of the code that the vCPU runs.
    pub(crate) fn code_size(&self, vmcs: &CurrentVmcs) -> CodeSize {
        let cs = SegmentState {
            selector: 0,
            base: 0,
            limit: 0,
            rights: vmcs.read(fields::GUEST_CS_ACCESS_RIGHTS),
        };
        CodeSize::of(self.control.efer.contains(Efer::LMA), &cs)
    }

    /// What a MOV to a control register takes of its source: 32 bits of it outside 64-bit mode.
    #[inline]
    pub(crate) fn control_source(&self, vmcs: &CurrentVmcs, register: Gpr) -> u64 {
        let value = self.register(vmcs, register);
        if value >> 32 != 0 && self.code_size(vmcs) != CodeSize::Bits64 { value & 0xffff_ffff } else { value }
    }

    /// An allowed MOV to CR3 outside PAE paging.
    pub(crate) fn change_root(&mut self, core: &Core, vmcs: &CurrentVmcs, change: Change) -> Next {
        self.control.cr3 = change.state.cr3;
        if self.mmu.paging.mode != Mode::Off {
            self.mmu.paging.cr3 = change.state.cr3;
            self.mmu.paging.pcid = change.state.pcid();
            if let Err(next) = self.load_root(core, vmcs, flush_of(change.effects)) {
                return next;
            }
        }
        self.skip(vmcs);
        Next::Resume
    }

    /// An allowed change of CR4.PGE alone, which the hardware's CR4 never has: a flush of everything.
    pub(crate) fn toggle_global_pages(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        self.control.cr4.toggle(Cr4::PGE);
        vmcs.write(fields::CR4_READ_SHADOW, self.control.cr4.bits());
        self.recent.forget();
        let host = self.guest.surroundings(core);
        self.guest.mmu.lock().flush(&host, &mut self.mmu);
        self.skip(vmcs);
        Next::Resume
    }

    /// Installs an allowed change and moves past its instruction.
    pub(crate) fn apply(&mut self, core: &Core, vmcs: &CurrentVmcs, change: Change) -> Next {
        let Change { state, effects } = change;
        if !state.cr0.contains(Cr0::PE) {
            return Next::Leave(self.stop(
                core,
                vmcs,
                &"it left protected mode: real mode is not supported (a processor without unrestricted guests has \
                  none under VMX)",
            ));
        }
        if effects.contains(Effects::LOAD_PDPTES) && state.paging() == GuestPaging::Pae {
            match walk::load_pdptes(&self.guest.ram, state.cr3, self.guest.model.control.physical_bits) {
                Ok(pdptes) => self.mmu.paging.pdptes = pdptes,
                Err(_) => return self.raise(vmcs, Exception::PROTECTION),
            }
        }
        let old = core::mem::replace(&mut self.control, state);
        let only_cr3 = state.cr0 == old.cr0 && state.cr4 == old.cr4 && state.efer == old.efer;
        if !only_cr3 {
            self.write_control_registers(vmcs, Some(&old));
            if effects.contains(Effects::CPUID) {
                self.cpuid_state.osxsave = state.cr4.contains(Cr4::OSXSAVE);
            }
        }
        let flushes = Effects::ROLE
            | Effects::FLUSH_ALL
            | Effects::FLUSH_NON_GLOBAL
            | Effects::LOAD_PDPTES
            | Effects::LONG_MODE;
        if effects.intersects(flushes) || only_cr3 {
            self.refresh_paging();
            if let Err(next) = self.load_root(core, vmcs, flush_of(effects)) {
                return next;
            }
        }
        self.skip(vmcs);
        Next::Resume
    }

    /// Writes the hardware's CR0, CR4, EFER and mode for what the guest believes, as far as that has changed since it
    /// believed `old`.
    pub(crate) fn write_control_registers(&mut self, vmcs: &CurrentVmcs, old: Option<&ControlState>) {
        let fixed = &self.guest.model.fixed;
        let state: &ControlState = &self.control;
        let new_cr0 = old.is_none_or(|old| old.cr0 != state.cr0);
        if new_cr0 {
            vmcs.write(fields::GUEST_CR0, rules::hardware_cr0(state, fixed));
            vmcs.write(fields::CR0_READ_SHADOW, state.cr0.bits());
        }
        // What the hardware has of CR4 depends on CR0.PG.
        if new_cr0 || old.is_none_or(|old| old.cr4 != state.cr4) {
            vmcs.write(fields::GUEST_CR4, rules::hardware_cr4(state, fixed));
            vmcs.write(fields::CR4_READ_SHADOW, state.cr4.bits());
        }
        if old.is_some_and(|old| old.efer == state.efer) {
            return;
        }
        vmcs.write(fields::ENTRY_CONTROLS, self.controls.entry_for(state.efer.contains(Efer::LMA)));
        if self.controls.has(Feature::EferSwitch) {
            vmcs.write(fields::GUEST_EFER, rules::hardware_efer(state));
        } else {
            self.extended.set_syscall_enable(state.efer.contains(Efer::SCE));
        }
    }

    /// Tells the MMU what the control registers now say.
    pub(crate) fn refresh_paging(&mut self) {
        let control = &self.control;
        let mode = match control.paging() {
            GuestPaging::Off => Mode::Off,
            GuestPaging::TwoLevel => Mode::TwoLevel,
            GuestPaging::Pae => Mode::Pae,
            GuestPaging::FourLevel => Mode::FourLevel,
            GuestPaging::FiveLevel => Mode::FiveLevel,
        };
        let on = mode != Mode::Off;
        self.mmu.paging = Paging {
            mode,
            cr3: if on { control.cr3 } else { 0 },
            pcid: control.pcid(),
            pdptes: self.mmu.paging.pdptes,
            nxe: on && mode != Mode::TwoLevel && control.efer.contains(Efer::NXE),
            wp: !on || control.cr0.contains(Cr0::WP),
            smep: on && control.cr4.contains(Cr4::SMEP),
            smap: on && control.cr4.contains(Cr4::SMAP),
            pse: control.cr4.contains(Cr4::PSE),
            gib_pages: self.guest.model.gib_pages,
            physical_address_bits: self.guest.model.control.physical_bits,
        };
    }

    /// Finds the root for the present paging and puts it into the VMCS.
    pub(crate) fn load_root(&mut self, core: &Core, vmcs: &CurrentVmcs, flush: Flush) -> Result<(), Next> {
        self.recent.forget();
        loop {
            let host = self.guest.surroundings(core);
            let result = self.guest.mmu.lock().load_root(&host, &mut self.mmu, flush);
            match result {
                Ok(()) => break,
                Err(Short) => {
                    if self.guest.supply(core, self.mmu.paging.mode.shadow_is_pae()).is_err() {
                        return Err(self.starved(core, vmcs));
                    }
                }
            }
        }
        vmcs.write(fields::GUEST_CR3, self.mmu.root_table().address().0);
        if self.controls.has(Feature::Vpid) {
            vmcs.write(fields::VPID, self.vpid_base + self.mmu.tag() as u16);
        }
        Ok(())
    }

    pub(crate) fn starved(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        Next::Leave(self.stop(
            core,
            vmcs,
            &"no frames are left for its shadow pages: in the manifest raise shadow_frames or its cap, or lower \
              min_frames or what is guaranteed to others; or give the machine more memory",
        ))
    }

    #[inline(never)]
    pub(crate) fn invlpg(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        core.writer.count(Event::Invlpg);
        let gva = Gva(vmcs.read(fields::EXIT_QUALIFICATION));
        // An address that is not canonical is no fault here, and nothing is translated there.
        if canonical(gva.0) {
            self.recent.forget();
            let host = self.guest.surroundings(core);
            self.guest.mmu.lock().invlpg(&host, &mut self.mmu, gva);
        }
        self.skip(vmcs);
        Next::Resume
    }

    #[inline(never)]
    pub(crate) fn invpcid(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let information = vmcs.read(fields::EXIT_INSTRUCTION_INFO);
        let Some(instruction) = Invpcid::from_exit(information, vmcs.read(fields::EXIT_QUALIFICATION)) else {
            return Next::Leave(self.stop(
                core,
                vmcs,
                &"an INVPCID whose operands the processor does not tell",
            ));
        };
        let pcide = self.control.cr4.contains(Cr4::PCIDE);
        let invalidation = match emulate::invpcid(&mut View::new(self, core, vmcs), &instruction, pcide) {
            Ok(invalidation) => invalidation,
            Err(Fault::Exception(exception)) => return self.raise(vmcs, exception),
            Err(Fault::Retry) => return Next::Resume,
        };
        self.recent.forget();
        core.writer.count(Event::Invlpg);
        let host = self.guest.surroundings(core);
        let mut mmu = self.guest.mmu.lock();
        match invalidation {
            Invalidation::Address { pcid, gva } => mmu.flush_address(&host, &mut self.mmu, pcid, gva),
            Invalidation::Pcid(pcid) => mmu.flush_pcid(&host, &mut self.mmu, pcid),
            Invalidation::All => mmu.flush(&host, &mut self.mmu),
        }
        drop(mmu);
        self.skip(vmcs);
        Next::Resume
    }
}

/// What a change of a control register leaves of the translations.
fn flush_of(effects: Effects) -> Flush {
    if effects.is_empty() {
        Flush::Keep
    } else if effects.intersects(Effects::FLUSH_ALL | Effects::ROLE | Effects::LONG_MODE) {
        Flush::All
    } else {
        Flush::Pcid
    }
}
