//! The vCPU's state that neither the VMCS nor the entry code switches: debug registers, CR2, system-call MSRs, XCR0 and
//! the extended registers. The hypervisor uses none of them, so they stay in the hardware from exit to entry and
//! change only when the core changes its vCPU.

use core::arch::asm;

use machine::cpu::control::ControlState;
use machine::cpu::exit::DebugQualification;
use machine::cpu::msr::NativeMsr;
use memory::{Claim, Hpa, Owner};
use x86_64::registers::model_specific::Msr;

use crate::guest::CpuModel;
use crate::host::{direct, frames};
use crate::vmx::entry::{read_cr2, write_cr2};
use crate::vmx::msr::{self, MsrRead, Processor};

/// The MSRs switched here, as the guest's bitmap lets it write them.
const SWITCHED: [NativeMsr; 6] = [
    NativeMsr::Star,
    NativeMsr::Lstar,
    NativeMsr::Cstar,
    NativeMsr::Sfmask,
    NativeMsr::KernelGsBase,
    NativeMsr::TscAux,
];

/// DR6 after reset.
const DR6_RESET: u64 = 0xffff_0ff0;
/// The initial MXCSR, at its place in the save area: all exceptions masked.
const MXCSR: (usize, u32) = (24, 0x1f80);

/// The state, while another vCPU has the core; while this one has it, the debug registers 0 to 3 and 6 are kept in
/// both places.
pub(crate) struct Extended {
    /// The page that XSAVE or FXSAVE writes to.
    area: Hpa,
    debug: [u64; 4],
    dr6: u64,
    cr2: u64,
    msrs: [u64; SWITCHED.len()],
    syscall_enable: bool,
    xsave: bool,
}

fn write_msr(index: u32, value: u64) {
    // SAFETY: one of `SWITCHED` or EFER.SCE: the hypervisor uses neither SYSCALL nor SWAPGS nor RDTSCP, and the
    // values were checked (canonical) where the guest wrote them.
    unsafe { Msr::new(index).write(value) }
}

fn xsetbv(value: u64) {
    // SAFETY: the value is one that XSETBV takes, and the hypervisor uses no extended registers.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    }
}

impl Extended {
    /// The state after INIT. `None` without a frame for it.
    pub fn new() -> Option<Extended> {
        let area = frames::allocator().alloc(0, Owner::Hypervisor, Claim::Begun)?.address();
        // SAFETY: the frame is ours alone.
        unsafe { core::ptr::write_bytes(direct(area), 0, 4096) };
        // SAFETY: inside the frame.
        let mxcsr = unsafe { direct(area).add(MXCSR.0) };
        // SAFETY: aligned, inside the frame.
        unsafe { mxcsr.cast::<u32>().write(MXCSR.1) };
        let xsave = raw_cpuid::CpuId::new().get_feature_info().is_some_and(|info| info.has_xsave());
        Some(Extended {
            area,
            debug: [0; 4],
            dr6: DR6_RESET,
            cr2: 0,
            msrs: [0; 6],
            syscall_enable: false,
            xsave,
        })
    }

    /// Gives the save area back.
    pub fn dispose(&self, core: usize) {
        if let Err(error) = frames::allocator().free(core, self.area.page(), Owner::Hypervisor) {
            panic!("{error}");
        }
    }

    /// Puts the state into the hardware.
    pub fn load(&self, model: &CpuModel, control: &ControlState) {
        for (msr, &value) in SWITCHED.iter().zip(&self.msrs) {
            if *msr != NativeMsr::TscAux || model.msr.rdtscp {
                write_msr(msr.index(), value);
            }
        }
        self.set_hardware_syscall_enable();
        for number in 0..4 {
            write_dr(number, self.debug[usize::from(number)]);
        }
        write_dr(6, self.dr6);
        write_cr2(self.cr2);
        let area = direct(self.area);
        if self.xsave {
            let all = model.control.xcr0_allowed | 1;
            xsetbv(all);
            // SAFETY: the area is 64-byte aligned, as large as the components in `all` take, and holds what XSAVE
            // wrote or the initial zeroes.
            unsafe {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") all as u32, in("edx") (all >> 32) as u32, options(nostack))
            };
            xsetbv(control.xcr0);
        } else {
            // SAFETY: the area is aligned and holds what FXSAVE wrote or the initial zeroes.
            unsafe { asm!("fxrstor64 [{}]", in(reg) area, options(nostack)) };
        }
    }

    /// Takes the state out of the hardware.
    pub fn save(&mut self, model: &CpuModel, _control: &ControlState) {
        for (msr, value) in SWITCHED.iter().zip(&mut self.msrs) {
            if *msr != NativeMsr::TscAux || model.msr.rdtscp {
                *value = Processor.read(msr.index());
            }
        }
        self.dr6 = read_dr6();
        self.cr2 = read_cr2();
        let area = direct(self.area);
        if self.xsave {
            let all = model.control.xcr0_allowed | 1;
            xsetbv(all);
            // SAFETY: the area is 64-byte aligned and as large as the components in `all` take.
            unsafe {
                asm!("xsave64 [{}]", in(reg) area, in("eax") all as u32, in("edx") (all >> 32) as u32, options(nostack))
            };
        } else {
            // SAFETY: the area is aligned, 512 bytes and more.
            unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack)) };
        }
    }

    /// XCR0, at once.
    pub fn set_xcr0(&self, value: u64) {
        if self.xsave {
            xsetbv(value);
        }
    }

    /// One of the MSRs switched here, out of the hardware.
    pub fn msr(&self, native: NativeMsr) -> u64 {
        Processor.read(native.index())
    }

    /// Sets one of them in the hardware.
    pub fn set_msr(&self, native: NativeMsr, value: u64) {
        write_msr(native.index(), value);
    }

    /// EFER.SCE, where the VMCS does not switch EFER.
    pub fn set_syscall_enable(&mut self, on: bool) {
        self.syscall_enable = on;
        self.set_hardware_syscall_enable();
    }

    fn set_hardware_syscall_enable(&self) {
        let efer = Processor.read(msr::EFER);
        let wanted = efer & !1 | u64::from(self.syscall_enable);
        if wanted != efer {
            write_msr(msr::EFER, wanted);
        }
    }

    /// DR0 to DR3 and DR6.
    pub fn dr(&self, number: u8) -> u64 {
        match number {
            0..4 => self.debug[usize::from(number)],
            _ => read_dr6(),
        }
    }

    /// Sets one of DR0 to DR3 and DR6, at once.
    pub fn set_dr(&mut self, number: u8, value: u64) {
        if let 0..4 = number {
            self.debug[usize::from(number)] = value;
        } else {
            self.dr6 = value & 0xe00f | DR6_RESET;
        }
        write_dr(number, if number < 4 { value } else { self.dr6 });
    }

    /// A #DB exit tells its cause only in the qualification.
    pub fn merge_dr6(&mut self, qualification: DebugQualification) {
        self.dr6 = qualification.merge_dr6(read_dr6());
        write_dr(6, self.dr6);
    }
}

/// Writes one of DR0 to DR3 or, for any other number, DR6. DR7 is 400h while the hypervisor runs (every exit sets it
/// so): no breakpoint is on.
fn write_dr(number: u8, value: u64) {
    macro_rules! write_to {
        ($register:literal) => {
            // SAFETY: no breakpoint is on, and the hypervisor uses no debug register.
            unsafe { asm!(concat!("mov ", $register, ", {}"), in(reg) value, options(nomem, nostack)) }
        };
    }
    match number {
        0 => write_to!("dr0"),
        1 => write_to!("dr1"),
        2 => write_to!("dr2"),
        3 => write_to!("dr3"),
        _ => write_to!("dr6"),
    }
}

fn read_dr6() -> u64 {
    let value: u64;
    // SAFETY: reading DR6 has no effect.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack)) };
    value
}
