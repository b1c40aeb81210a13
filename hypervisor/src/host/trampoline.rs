//! How a core comes from real mode to our page tables: one page below 1 MiB, mapped at its own address while cores
//! are started, and never writable there.

use core::arch::global_asm;

use memory::{Hpa, PAGE_SIZE};

use super::cores::PerCore;
use super::frames::direct;

// From a startup IPI to long mode in one step: with EFER.LME set, CR0.PE and CR0.PG may be set at once (SDM Vol. 3,
// "Initializing IA-32e Mode"). The code segment has its accessed bit set already, for the page is read-only.
global_asm!(
    // Visible beyond this object file: the compiler may put the users of the labels into another.
    ".irp label, umbra_trampoline, umbra_trampoline_long, umbra_trampoline_gdt, umbra_trampoline_gdt_address, \
     umbra_trampoline_far, umbra_trampoline_cr3, umbra_trampoline_stack, umbra_trampoline_core, \
     umbra_trampoline_main, umbra_trampoline_end",
    ".globl \\label",
    ".hidden \\label",
    ".endr",
    ".pushsection .rodata.umbra_trampoline, \"a\"",
    ".balign 16",
    ".code16",
    "umbra_trampoline:",
    "cli",
    "cld",
    "movw %cs, %ax",
    "movw %ax, %ds",
    "lgdtl umbra_trampoline_gdtr - umbra_trampoline",
    "movl %cr4, %eax",
    "orl $0x20, %eax", // PAE
    "movl %eax, %cr4",
    "movl umbra_trampoline_cr3 - umbra_trampoline, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx", // IA32_EFER
    "rdmsr",
    "orl $0x900, %eax", // LME, NXE
    "wrmsr",
    "movl $0x80010033, %eax", // PG, WP, NE, ET, MP, PE; caches on
    "movl %eax, %cr0",
    "ljmpl *(umbra_trampoline_far - umbra_trampoline)",
    ".code64",
    "umbra_trampoline_long:",
    "movl $16, %eax",
    "movl %eax, %ss",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movq umbra_trampoline_stack(%rip), %rsp",
    "movq umbra_trampoline_core(%rip), %rdi",
    "movq umbra_trampoline_main(%rip), %rax",
    "xorl %ebp, %ebp",
    "pushq $0",
    "jmpq *%rax",
    ".balign 8",
    "umbra_trampoline_gdt:",
    ".quad 0",
    ".quad 0x00209b0000000000", // 64-bit code
    ".quad 0x00cf930000000000", // data
    "umbra_trampoline_gdtr:",
    ".word 23",
    "umbra_trampoline_gdt_address:",
    ".long 0",
    "umbra_trampoline_far:",
    ".long 0",
    ".word 8",
    ".balign 8",
    "umbra_trampoline_cr3: .quad 0",
    "umbra_trampoline_stack: .quad 0",
    "umbra_trampoline_core: .quad 0",
    "umbra_trampoline_main: .quad 0",
    "umbra_trampoline_end:",
    ".popsection",
    options(att_syntax)
);

unsafe extern "C" {
    static umbra_trampoline: u8;
    static umbra_trampoline_long: u8;
    static umbra_trampoline_gdt: u8;
    static umbra_trampoline_gdt_address: u8;
    static umbra_trampoline_far: u8;
    static umbra_trampoline_cr3: u8;
    static umbra_trampoline_stack: u8;
    static umbra_trampoline_core: u8;
    static umbra_trampoline_main: u8;
    static umbra_trampoline_end: u8;
}

/// The offset of a label in the page.
fn offset(label: *const u8) -> u64 {
    label as u64 - (&raw const umbra_trampoline) as u64
}

/// The page with the code, filled in.
#[derive(Debug)]
pub struct Trampoline {
    page: Hpa,
}

impl Trampoline {
    /// Copies the code to `page`, to switch to the page tables at `root`.
    ///
    /// # Safety
    /// `page` is a free page below 1 MiB, reached through the direct map. Under `root`, which lies below 4 GiB, it
    /// is mapped at its own address, executable, for as long as cores are started.
    pub unsafe fn install(page: Hpa, root: Hpa) -> Self {
        let bytes = offset(&raw const umbra_trampoline_end);
        assert!(bytes <= PAGE_SIZE && page.0 < 1 << 20 && root.0 < 1 << 32);
        let trampoline = Self { page };
        // SAFETY: the source is our own code, the target a free page.
        unsafe { core::ptr::copy_nonoverlapping(&raw const umbra_trampoline, direct(page), bytes as usize) };
        let linear = |label| page.0 + offset(label);
        trampoline
            .put_u32(&raw const umbra_trampoline_gdt_address, linear(&raw const umbra_trampoline_gdt) as u32);
        trampoline.put_u32(&raw const umbra_trampoline_far, linear(&raw const umbra_trampoline_long) as u32);
        trampoline.put_u64(&raw const umbra_trampoline_cr3, root.0);
        trampoline
    }

    /// Chooses what the next core to start does: it calls `main(core)` on the stack that ends at `stack_top`.
    pub fn aim(&self, stack_top: u64, core: &'static PerCore, main: extern "C" fn(&'static PerCore) -> !) {
        self.put_u64(&raw const umbra_trampoline_stack, stack_top);
        self.put_u64(&raw const umbra_trampoline_core, core::ptr::from_ref(core) as u64);
        self.put_u64(&raw const umbra_trampoline_main, main as *const () as u64);
    }

    /// The page.
    #[must_use]
    pub fn page(&self) -> Hpa {
        self.page
    }

    fn put_u32(&self, label: *const u8, value: u32) {
        let place = direct(Hpa(self.page.0 + offset(label))).cast::<u32>();
        // SAFETY: inside the page that `install` was given. Volatile: another core reads it.
        unsafe { place.write_volatile(value) }
    }

    fn put_u64(&self, label: *const u8, value: u64) {
        self.put_u32(label, value as u32);
        // SAFETY: the label's eight bytes lie inside the blob.
        let upper = unsafe { label.add(4) };
        self.put_u32(upper, (value >> 32) as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page_and_begins_with_cli() {
        assert!(offset(&raw const umbra_trampoline_end) <= PAGE_SIZE);
        assert!(offset(&raw const umbra_trampoline_cr3).is_multiple_of(8));
        // SAFETY: the first byte of our own blob.
        assert_eq!(unsafe { (&raw const umbra_trampoline).read() }, 0xfa);
    }
}
