//! Multiboot 1: entered in 32-bit protected mode with paging off, it goes through two-level paging, PAE and
//! long mode in turn, and says so at each stage on COM1.
//!
//! Every stage maps 0 to 32 MiB to itself and, through a second mapping at 64 MiB, the page at 16 MiB; it
//! writes a mark through the one and reads it through the other.
#![no_std]
#![no_main]

use core::arch::global_asm;

use test_guests::{cpu, entry, println};

/// Where the tables are built: 20 MiB, zeroed by the guest first.
const TABLES: u32 = 20 << 20;
/// The page that is mapped twice.
const PAGE: u32 = 16 << 20;
/// Its second address.
const ALIAS: u32 = 64 << 20;

global_asm!(
    ".section .multiboot, \"a\"",
    ".balign 8",
    "multiboot_header:",
    ".long 0x1badb002",
    // Modules page-aligned, memory information, address fields valid.
    ".long 0x00010003",
    ".long -(0x1badb002 + 0x00010003)",
    ".long multiboot_header",
    ".long __image_start",
    ".long __data_end",
    ".long __image_end",
    ".long multiboot_entry",
    include_str!("../multiboot/stages.s"),
    tables = const TABLES,
    page = const PAGE,
    alias = const ALIAS,
    options(att_syntax),
);

unsafe extern "C" {
    static multiboot_magic: u32;
    static multiboot_info: u32;
}

entry!(main);

fn main() -> u8 {
    // SAFETY: written by the first instructions, before Rust code ran.
    let (magic, info) = unsafe { ((&raw const multiboot_magic).read_volatile(), u64::from(multiboot_info)) };
    println!("stage 4: long mode, magic {magic:#x}");
    if magic != 0x2bad_b002 {
        return 1;
    }
    let flags = cpu::read32(info);
    if flags & 1 != 0 {
        println!("multiboot: {} KiB above 1 MiB", cpu::read32(info + 8));
    }
    if flags & 1 << 6 == 0 {
        println!("multiboot: no memory map: BAD");
        return 2;
    }
    if flags & 1 << 3 != 0 {
        println!("multiboot: {} modules", cpu::read32(info + 20));
    }
    println!("multiboot done");
    0
}
