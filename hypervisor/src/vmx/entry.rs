//! The one VM entry, and the window in which an NMI must undo it.
//!
//! # Kicks
//!
//! A core is asked to leave its guest by an NMI whose handler sets the core's *kick byte*. An NMI in guest mode
//! exits by itself. One that comes while the hypervisor runs is seen by the check of the byte just before the
//! entry. One that comes between that check and VMRESUME would be lost: so the handler asks [`in_entry_window`] of
//! its return address, and if it lies there, replaces it by [`abort_address`]. The entry then ends as
//! [`EntryOutcome::Aborted`], with the guest's registers as they were.
//!
//! # What is not switched here
//!
//! RSP, RIP and RFLAGS live in the VMCS. CR2 stays in its register while the vCPU is on the core: every guest fault
//! exits with its address in the exit qualification and without a write of CR2, and the host takes no page faults
//! it survives. Whoever injects a #PF writes CR2 ([`write_cr2`]); whoever switches vCPUs saves and restores it.

use core::arch::{asm, global_asm};
use core::mem::{offset_of, size_of};
use core::sync::atomic::AtomicU8;

use super::mitigation;
pub use super::mitigation::Mitigations;
use super::vmcs::{CurrentVmcs, InstructionError, VmxError, last_error};

/// The guest's general registers, in the order of their encoding in instructions and exit qualifications.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GuestRegisters {
    /// Register 0.
    pub rax: u64,
    /// Register 1.
    pub rcx: u64,
    /// Register 2.
    pub rdx: u64,
    /// Register 3.
    pub rbx: u64,
    /// Register 4. Entry and exit leave it alone: the guest's RSP is in the VMCS, and this is a place to cache it.
    pub rsp: u64,
    /// Register 5.
    pub rbp: u64,
    /// Register 6.
    pub rsi: u64,
    /// Register 7.
    pub rdi: u64,
    /// Register 8.
    pub r8: u64,
    /// Register 9.
    pub r9: u64,
    /// Register 10.
    pub r10: u64,
    /// Register 11.
    pub r11: u64,
    /// Register 12.
    pub r12: u64,
    /// Register 13.
    pub r13: u64,
    /// Register 14.
    pub r14: u64,
    /// Register 15.
    pub r15: u64,
}

const _: () = assert!(size_of::<GuestRegisters>() == size_of::<[u64; 16]>());

impl GuestRegisters {
    /// All sixteen, by register number.
    #[inline(always)]
    #[must_use]
    pub const fn as_array(&self) -> &[u64; 16] {
        // SAFETY: `repr(C)` with sixteen u64 fields has the layout of the array.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }

    /// All sixteen, by register number.
    #[inline(always)]
    #[must_use]
    pub const fn as_array_mut(&mut self) -> &mut [u64; 16] {
        // SAFETY: `repr(C)` with sixteen u64 fields has the layout of the array.
        unsafe { &mut *core::ptr::from_mut(self).cast() }
    }

    /// Register `number`; only the low four bits count.
    #[inline(always)]
    #[must_use]
    pub const fn get(&self, number: u8) -> u64 {
        self.as_array()[number as usize & 15]
    }

    /// Sets register `number`; only the low four bits count.
    #[inline(always)]
    pub const fn set(&mut self, number: u8, value: u64) {
        self.as_array_mut()[number as usize & 15] = value;
    }

    /// RAX and RDX as a 64-bit MSR or XCR value.
    #[inline(always)]
    #[must_use]
    pub const fn edx_eax(&self) -> u64 {
        self.rdx << 32 | self.rax & 0xffff_ffff
    }

    /// Puts a 64-bit MSR value into EDX:EAX; the upper halves become 0.
    #[inline(always)]
    pub const fn set_edx_eax(&mut self, value: u64) {
        self.rax = value & 0xffff_ffff;
        self.rdx = value >> 32;
    }
}

const CLEAR_BUFFERS: u8 = 1;
const FILL_RETURN_STACK: u8 = 2;
const RESTRICT: u8 = 4;

/// What one VMCS's entries need: the guest's registers and two caches of what the VMCS holds.
///
/// One per VMCS. It may move in memory between entries.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Entry {
    /// The guest's general registers, valid while the guest does not run.
    pub registers: GuestRegisters,
    /// What HOST_RSP in the VMCS holds, 0: not yet written.
    host_rsp: u64,
    /// Whether the next entry is a VMRESUME.
    launched: u8,
    mitigations: u8,
    /// What SPEC_CTRL holds for the guest, where entry and exit switch it.
    speculation_control: u32,
}

/// How [`Entry::enter`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum EntryOutcome {
    /// The guest ran, or the entry failed late: the exit reason is in the VMCS (its bit 31 tells which).
    Exited,
    /// A kick came first; the guest did not run. Clear the kick byte, serve the requests, enter again.
    Aborted,
    /// The processor refused the controls or the host state: our bug.
    Failed(VmxError),
}

/// What the assembly returns in EAX.
const EXITED: u32 = 0;
const ABORTED: u32 = 1;
const FAILED_INVALID: u32 = 2;
const FAILED_VALID: u32 = 3;

impl Entry {
    /// For a VMCS that was just cleared.
    #[must_use]
    pub fn new(mitigations: Mitigations) -> Self {
        let mut flags = 0;
        if mitigations.clear_buffers_on_entry {
            flags |= CLEAR_BUFFERS;
        }
        if mitigations.fill_return_stack_on_exit {
            flags |= FILL_RETURN_STACK;
        }
        if mitigations.restrict_on_exit {
            flags |= RESTRICT;
        }
        Self { mitigations: flags, ..Self::default() }
    }

    /// The guest's SPEC_CTRL (bits 2:0), for processors whose mitigations switch it at entry and exit.
    pub const fn set_speculation_control(&mut self, value: u64) {
        self.speculation_control = value as u32;
    }

    /// The VMCS was cleared (its data stays): the next entry must launch it again.
    pub const fn cleared(&mut self) {
        self.launched = 0;
    }

    /// Whether an entry has ended in an exit since the VMCS was last cleared.
    ///
    /// If that exit was a failed first entry (exit reason bit 31), the processor has not launched the VMCS: call
    /// [`Self::cleared`] before trying again.
    #[must_use]
    pub const fn is_launched(&self) -> bool {
        self.launched != 0
    }

    /// Runs the guest of the current VMCS until its next exit.
    ///
    /// `kick` is this core's kick byte: the entry is not made if it is not 0. The caller clears it.
    ///
    /// # Safety
    /// - `vmcs` is the VMCS this `Entry` belongs to, since it was last cleared.
    /// - Its controls and guest state are such that the guest reaches no memory but its own.
    /// - Its host state is this core's ([`super::host_state`]), with HOST_RIP = [`exit_address`].
    /// - Interrupts are off, and this core's NMI and #MC handlers treat the window as this module says.
    #[inline(always)]
    pub unsafe fn enter(&mut self, vmcs: &CurrentVmcs, kick: &AtomicU8) -> EntryOutcome {
        let _ = vmcs;
        // SAFETY: the caller's promises; the assembly keeps the System V ABI.
        let outcome = unsafe { umbra_vmx_enter(self, kick) };
        if outcome == EXITED {
            self.launched = 1;
            return EntryOutcome::Exited;
        }
        not_exited(outcome, self.mitigations & RESTRICT != 0)
    }
}

#[cold]
#[inline(never)]
fn not_exited(outcome: u32, restrict: bool) -> EntryOutcome {
    if restrict {
        mitigation::restrict();
    }
    match outcome {
        ABORTED => EntryOutcome::Aborted,
        FAILED_VALID => EntryOutcome::Failed(VmxError::FailValid(InstructionError(last_error()))),
        _ => EntryOutcome::Failed(VmxError::FailInvalid),
    }
}

unsafe extern "sysv64" {
    fn umbra_vmx_enter(entry: &mut Entry, kick: &AtomicU8) -> u32;
    // Labels inside it, never called: only their addresses count.
    fn umbra_vmx_exit();
    fn umbra_vmx_abort();
    fn umbra_vmx_window_start();
    fn umbra_vmx_window_end();
}

/// What HOST_RIP must be.
#[must_use]
pub fn exit_address() -> u64 {
    umbra_vmx_exit as *const () as u64
}

/// Where an NMI or machine-check handler returns to if it came inside the entry window.
#[must_use]
pub fn abort_address() -> u64 {
    umbra_vmx_abort as *const () as u64
}

/// Whether `rip`, a handler's return address, lies between the check of the kick byte and the guest.
#[inline]
#[must_use]
pub fn in_entry_window(rip: u64) -> bool {
    let start = umbra_vmx_window_start as *const () as u64;
    let end = umbra_vmx_window_end as *const () as u64;
    (start..end).contains(&rip)
}

/// CR2 of this core: the guest's, while its vCPU is loaded.
#[inline]
#[must_use]
pub fn read_cr2() -> u64 {
    let value: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets CR2, before a #PF is injected or as part of a vCPU switch.
#[inline]
pub fn write_cr2(value: u64) {
    // SAFETY: nothing of the host depends on CR2: a page fault in the host writes it anew before it is read.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

// The order in the window: the kick byte first, as early as a lost NMI can be told by the return address, then
// the registers; MOV leaves the flags of the `launched` test alone. RDI goes last, it addresses the others.
//
// On the stack while the guest runs: the address of `Entry`, the six registers the ABI makes ours to keep, and
// the return address. RSP is the same at abort, failure and exit, so all three leave by one tail.
//
// After an exit no register but RSP may hold a guest value that the host's code could speculate with.
global_asm!(
    ".pushsection .text.umbra_vmx_enter, \"ax\", @progbits",
    ".balign 64",
    ".global umbra_vmx_enter",
    ".type umbra_vmx_enter, @function",
    "umbra_vmx_enter:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    "cmp rsp, [rdi + {host_rsp}]",
    "jne 20f",
    "22:",
    "test byte ptr [rdi + {mitigations}], {clear_buffers} | {restrict}",
    "jnz 30f",
    ".global umbra_vmx_window_start",
    "umbra_vmx_window_start:",
    "cmp byte ptr [rsi], 0",
    "jne umbra_vmx_abort",
    "cmp byte ptr [rdi + {launched}], 0",
    "mov rax, [rdi + {rax}]",
    "mov rcx, [rdi + {rcx}]",
    "mov rdx, [rdi + {rdx}]",
    "mov rbx, [rdi + {rbx}]",
    "mov rbp, [rdi + {rbp}]",
    "mov rsi, [rdi + {rsi}]",
    "mov r8, [rdi + {r8}]",
    "mov r9, [rdi + {r9}]",
    "mov r10, [rdi + {r10}]",
    "mov r11, [rdi + {r11}]",
    "mov r12, [rdi + {r12}]",
    "mov r13, [rdi + {r13}]",
    "mov r14, [rdi + {r14}]",
    "mov r15, [rdi + {r15}]",
    "mov rdi, [rdi + {rdi}]",
    "jne 12f",
    "vmlaunch",
    // Still inside the window, which is harmless: an NMI here turns a failed launch into an aborted one, and
    // the next try fails again.
    "jmp 13f",
    "12:",
    "vmresume",
    ".global umbra_vmx_window_end",
    "umbra_vmx_window_end:",
    // Arriving here is VMfail: ZF says valid, CF invalid.
    "13:",
    "mov eax, {failed_invalid}",
    "mov ecx, {failed_valid}",
    "cmovz eax, ecx",
    "jmp 14f",
    ".global umbra_vmx_abort",
    "umbra_vmx_abort:",
    "mov eax, {aborted}",
    "jmp 14f",
    // HOST_RSP differs: another call depth or a new VMCS.
    "20:",
    "mov eax, {host_rsp_field}",
    "vmwrite rax, rsp",
    "jbe 13b",
    "mov [rdi + {host_rsp}], rsp",
    "jmp 22b",
    // The guest's SPEC_CTRL. Then VERW with a memory operand; any selector will do, the stack segment's is at hand.
    "30:",
    "test byte ptr [rdi + {mitigations}], {restrict}",
    "jz 31f",
    "mov ecx, {spec_ctrl}",
    "mov eax, [rdi + {speculation_control}]",
    "xor edx, edx",
    "wrmsr",
    "31:",
    "test byte ptr [rdi + {mitigations}], {clear_buffers}",
    "jz umbra_vmx_window_start",
    "mov word ptr [rsp - 8], ss",
    "verw word ptr [rsp - 8]",
    "jmp umbra_vmx_window_start",
    ".balign 64",
    ".global umbra_vmx_exit",
    "umbra_vmx_exit:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "mov [rdi + {rax}], rax",
    "mov [rdi + {rcx}], rcx",
    "mov [rdi + {rdx}], rdx",
    "mov [rdi + {rbx}], rbx",
    "mov [rdi + {rbp}], rbp",
    "mov [rdi + {rsi}], rsi",
    "mov [rdi + {r8}], r8",
    "mov [rdi + {r9}], r9",
    "mov [rdi + {r10}], r10",
    "mov [rdi + {r11}], r11",
    "mov [rdi + {r12}], r12",
    "mov [rdi + {r13}], r13",
    "mov [rdi + {r14}], r14",
    "mov [rdi + {r15}], r15",
    "pop qword ptr [rdi + {rdi}]",
    "test byte ptr [rdi + {mitigations}], {fill_return_stack} | {restrict}",
    "jnz 40f",
    "41:",
    "xor eax, eax",
    "xor ecx, ecx",
    "xor edx, edx",
    "xor esi, esi",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "xor r10d, r10d",
    "xor r11d, r11d",
    "14:",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    "40:",
    "test byte ptr [rdi + {mitigations}], {restrict}",
    "jz 47f",
    "mov ecx, {spec_ctrl}",
    "mov eax, {ibrs}",
    "xor edx, edx",
    "wrmsr",
    "47:",
    "test byte ptr [rdi + {mitigations}], {fill_return_stack}",
    "jz 41b",
    // Thirty-two calls that never return fill the return stack buffer with addresses of ours.
    "mov ecx, 16",
    "42:",
    "call 44f",
    "43:",
    "pause",
    "lfence",
    "jmp 43b",
    "44:",
    "call 46f",
    "45:",
    "pause",
    "lfence",
    "jmp 45b",
    "46:",
    "dec ecx",
    "jnz 42b",
    "add rsp, 256",
    "lfence",
    "jmp 41b",
    ".size umbra_vmx_enter, . - umbra_vmx_enter",
    ".popsection",
    host_rsp = const offset_of!(Entry, host_rsp),
    launched = const offset_of!(Entry, launched),
    mitigations = const offset_of!(Entry, mitigations),
    clear_buffers = const CLEAR_BUFFERS,
    fill_return_stack = const FILL_RETURN_STACK,
    restrict = const RESTRICT,
    speculation_control = const offset_of!(Entry, speculation_control),
    spec_ctrl = const super::msr::SPEC_CTRL,
    ibrs = const mitigation::IBRS,
    host_rsp_field = const super::fields::HOST_RSP.encoding(),
    aborted = const ABORTED,
    failed_invalid = const FAILED_INVALID,
    failed_valid = const FAILED_VALID,
    rax = const offset_of!(Entry, registers.rax),
    rcx = const offset_of!(Entry, registers.rcx),
    rdx = const offset_of!(Entry, registers.rdx),
    rbx = const offset_of!(Entry, registers.rbx),
    rbp = const offset_of!(Entry, registers.rbp),
    rsi = const offset_of!(Entry, registers.rsi),
    rdi = const offset_of!(Entry, registers.rdi),
    r8 = const offset_of!(Entry, registers.r8),
    r9 = const offset_of!(Entry, registers.r9),
    r10 = const offset_of!(Entry, registers.r10),
    r11 = const offset_of!(Entry, registers.r11),
    r12 = const offset_of!(Entry, registers.r12),
    r13 = const offset_of!(Entry, registers.r13),
    r14 = const offset_of!(Entry, registers.r14),
    r15 = const offset_of!(Entry, registers.r15),
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_by_number_are_those_by_name() {
        let mut registers = GuestRegisters::default();
        for number in 0..16 {
            registers.set(number, 100 + u64::from(number));
        }
        assert_eq!((registers.rax, registers.rcx, registers.rdx, registers.rbx), (100, 101, 102, 103));
        assert_eq!((registers.rsp, registers.rbp, registers.rsi, registers.rdi), (104, 105, 106, 107));
        assert_eq!((registers.r8, registers.r15), (108, 115));
        assert_eq!(registers.get(31), 115);
    }

    #[test]
    fn msr_values_are_split_and_joined() {
        let mut registers = GuestRegisters { rax: !0, rdx: !0, ..Default::default() };
        assert_eq!(registers.edx_eax(), !0);
        registers.set_edx_eax(0x1234_5678_9abc_def0);
        assert_eq!((registers.rdx, registers.rax), (0x1234_5678, 0x9abc_def0));
        assert_eq!(registers.edx_eax(), 0x1234_5678_9abc_def0);
    }

    #[test]
    fn the_window_holds_neither_abort_nor_exit() {
        assert!(!in_entry_window(abort_address()));
        assert!(!in_entry_window(exit_address()));
        let start = umbra_vmx_window_start as *const () as u64;
        let end = umbra_vmx_window_end as *const () as u64;
        assert!(start < end && end - start < 128);
        assert!(in_entry_window(start) && in_entry_window(end - 1) && !in_entry_window(end));
    }

    /// The abort path keeps the ABI: run for real, with a kick waiting. There is no VMCS here, so HOST_RSP must not
    /// be written: its cache is given the value that RSP will have.
    #[test]
    fn a_waiting_kick_aborts_and_leaves_the_registers_alone() {
        let mut entry = Entry::new(Mitigations { clear_buffers_on_entry: true, ..Default::default() });
        entry.registers.rbx = 0x1111;
        let before = entry.registers;
        let kick = AtomicU8::new(1);
        let outcome: u64;
        // SAFETY: the callee keeps the System V ABI. It finds its own RSP in `host_rsp`, which is what RSP will be
        // after the call's and its own seven pushes, so it executes no VMX instruction before it sees the kick.
        unsafe {
            asm!(
                "lea rax, [rsp - 64]",
                "mov [rdi + {host_rsp}], rax",
                "call {enter}",
                host_rsp = const offset_of!(Entry, host_rsp),
                enter = sym umbra_vmx_enter,
                in("rdi") &raw mut entry,
                in("rsi") &raw const kick,
                out("rax") outcome,
                clobber_abi("sysv64"),
            );
        }
        assert_eq!(outcome as u32, ABORTED);
        assert_eq!(entry.registers, before);
    }
}
