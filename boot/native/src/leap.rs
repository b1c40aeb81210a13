//! The last step: the guest's memory goes down to address 0, and the processor into the guest.
//!
//! What is copied over is all we stand on, so the copying code, its page tables and its data lie above the
//! stage, in page tables that map the first 4 GiB to themselves beside everything there was.

use core::arch::{asm, global_asm};

use machine::load::{EntryState, Mode};

use crate::{
    serial,
    stage::{DIRECT_MAP, STAGE},
};

/// The copying code and its tables, above the largest stage.
pub const CODE: u64 = 2 * STAGE;
/// Code, data, and six tables.
pub const AREA_BYTES: u64 = 8 * 4096;

const DATA: u64 = CODE + 4096;
const PML4: u64 = CODE + 2 * 4096;
const PDPT: u64 = CODE + 3 * 4096;
const DIRECTORIES: u64 = CODE + 4 * 4096;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
/// What lies between the first 640 KiB and 768 KiB is the VGA adapter's.
const HOLE_START: u64 = 0xa_0000;
const HOLE_END: u64 = 0xc_0000;

/// What the copying code needs, at fixed offsets.
#[repr(C)]
struct Data {
    memory_bytes: u64,
    stage: u64,
    cr3: u64,
    rip: u64,
    rsp: u64,
    rax: u64,
    rbx: u64,
    rsi: u64,
    rdi: u64,
    code: u64,
    data: u64,
    gdtr: [u16; 5],
}

/// Enters the guest, and prints the tick at which that is.
pub fn into(entry: &EntryState, memory_bytes: u64) -> ! {
    assert!(entry.mode == Mode::Long, "only guests that start in long mode");
    open_the_bios_area();
    let base = entry.gdt_base.0;
    let data = Data {
        memory_bytes,
        stage: STAGE,
        cr3: entry.cr3.0,
        rip: entry.rip,
        rsp: entry.rsp,
        rax: entry.rax,
        rbx: entry.rbx,
        rsi: entry.rsi,
        rdi: entry.rdi,
        code: u64::from(entry.code),
        data: u64::from(entry.data),
        gdtr: [entry.gdt_limit, base as u16, (base >> 16) as u16, (base >> 32) as u16, (base >> 48) as u16],
    };
    // SAFETY: RAM that only this module uses, aligned to a page.
    unsafe { ((DIRECT_MAP + DATA) as *mut Data).write(data) };
    copy_code();
    map();
    // SAFETY: the new tables hold all mappings of the old ones, and CODE to itself; the code never returns.
    unsafe {
        asm!("cli", "mov cr3, {pml4}", "jmp {code}", pml4 = in(reg) PML4, code = in(reg) CODE, in("rdi") DATA,
            options(noreturn))
    }
}

/// Makes the memory from 768 KiB to 1 MiB, the BIOS's, RAM: the loader puts firmware tables there.
///
/// Intel 440FX data sheet, "PAM[6:0]": registers 0x59 to 0x5f of the host bridge; 3 in both halves: read and
/// write go to DRAM.
fn open_the_bios_area() {
    for register in 0x59..=0x5f_u32 {
        let address = 0x8000_0000 | (register & !3);
        // SAFETY: PCI's address port takes 32 bits at once and touches no memory.
        unsafe { asm!("out dx, eax", in("dx") 0xcf8_u16, in("eax") address, options(nomem, nostack)) };
        serial::write(0xcfc + (register & 3) as u16, 0x33);
    }
}

fn copy_code() {
    unsafe extern "C" {
        static leap_start: u8;
        static leap_end: u8;
    }
    let (start, end) = (&raw const leap_start, &raw const leap_end);
    let bytes = end as usize - start as usize;
    assert!(bytes <= 4096);
    // SAFETY: both ends are in this image's code; the target is RAM that only this module uses.
    unsafe { core::ptr::copy_nonoverlapping(start, (DIRECT_MAP + CODE) as *mut u8, bytes) };
}

/// Page tables like those in use, and the first 4 GiB to themselves.
fn map() {
    let table = |frame: u64| (DIRECT_MAP + frame) as *mut [u64; 512];
    let old: u64;
    // SAFETY: reading CR3 has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) old, options(nomem, nostack)) };
    // SAFETY: CR3 names a table, which is in physical memory and so in the direct map.
    let mut top = unsafe { table(old & !0xfff).read() };
    top[0] = PDPT | PRESENT_WRITABLE;
    // SAFETY: RAM that only this module uses.
    unsafe { table(PML4).write(top) };
    let mut middle = [0; 512];
    for gib in 0..4 {
        let directory = DIRECTORIES + gib * 4096;
        middle[gib as usize] = directory | PRESENT_WRITABLE;
        let entries =
            core::array::from_fn(|index| (gib << 30) | ((index as u64) << 21) | LARGE | PRESENT_WRITABLE);
        // SAFETY: as above.
        unsafe { table(directory).write(entries) };
    }
    // SAFETY: as above.
    unsafe { table(PDPT).write(middle) };
}

// RDI: the data. Runs at CODE, wherever it was linked.
global_asm!(
    ".section .text.leap, \"ax\"",
    ".global leap_start, leap_end",
    "leap_start:",
    "cld",
    "mov rbp, rdi",
    // Below the VGA adapter's memory, then above it.
    "mov rsi, [rbp + {stage}]",
    "xor edi, edi",
    "mov ecx, {hole_start} / 8",
    "rep movsq",
    "mov rsi, [rbp + {stage}]",
    "add rsi, {hole_end}",
    "mov edi, {hole_end}",
    "mov rcx, [rbp + {memory}]",
    "sub rcx, {hole_end}",
    "shr rcx, 3",
    "rep movsq",
    // The tick, 16 hexadecimal digits and a line's end on COM1.
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r8, rax",
    "mov ecx, 18",
    "2:",
    "mov edx, {line_status}",
    "3:",
    "in al, dx",
    "test al, {thr_empty}",
    "jz 3b",
    "mov eax, 13",
    "cmp ecx, 2",
    "je 4f",
    "mov eax, 10",
    "jb 4f",
    "rol r8, 4",
    "mov eax, r8d",
    "and eax, 15",
    "add eax, 48",
    "cmp eax, 57",
    "jbe 4f",
    "add eax, 39",
    "4:",
    "mov edx, {com1}",
    "out dx, al",
    "dec ecx",
    "jnz 2b",
    // The guest's own tables map the first 4 GiB to themselves as well.
    "mov rax, [rbp + {cr3}]",
    "mov cr3, rax",
    "lgdt [rbp + {gdtr}]",
    "mov eax, [rbp + {data}]",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ss, eax",
    "mov rsp, [rbp + {rsp}]",
    "push qword ptr [rbp + {code}]",
    "push qword ptr [rbp + {rip}]",
    "mov rax, [rbp + {rax}]",
    "mov rbx, [rbp + {rbx}]",
    "mov rsi, [rbp + {rsi}]",
    "mov rdi, [rbp + {rdi}]",
    "xor ebp, ebp",
    "xor ecx, ecx",
    "xor edx, edx",
    "xor r8d, r8d",
    "retfq",
    "leap_end:",
    ".text",
    com1 = const serial::COM1,
    line_status = const serial::LINE_STATUS,
    thr_empty = const serial::THR_EMPTY,
    hole_start = const HOLE_START,
    hole_end = const HOLE_END,
    memory = const core::mem::offset_of!(Data, memory_bytes),
    stage = const core::mem::offset_of!(Data, stage),
    cr3 = const core::mem::offset_of!(Data, cr3),
    rip = const core::mem::offset_of!(Data, rip),
    rsp = const core::mem::offset_of!(Data, rsp),
    rax = const core::mem::offset_of!(Data, rax),
    rbx = const core::mem::offset_of!(Data, rbx),
    rsi = const core::mem::offset_of!(Data, rsi),
    rdi = const core::mem::offset_of!(Data, rdi),
    code = const core::mem::offset_of!(Data, code),
    data = const core::mem::offset_of!(Data, data),
    gdtr = const core::mem::offset_of!(Data, gdtr),
);
