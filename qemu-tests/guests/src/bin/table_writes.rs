//! Writes of every size and kind into live page tables, by the guest (H13) and by a string port instruction (H16): after
//! a flush each of them, and nothing else, has to show in what the tables translate.
#![no_std]
#![no_main]

use core::arch::asm;

use test_guests::paging::{A, AddressSpace, D, DATA, FREE, P, W};
use test_guests::{cpu, entry, println};

const PAGE: u64 = 4096;
/// Two leaf tables beside each other in memory and in what they translate: 1024 pages from [`WINDOW`] on.
const TABLES: u64 = DATA;
const WINDOW: u64 = FREE;
/// The same tables by other addresses, through which they are written.
const ALIAS: u64 = FREE + (1 << 30);
/// Pages that hold their own number each.
const NUMBERED: u64 = DATA + (1 << 20);
const PAGES: u64 = 512;
/// What is copied from.
const SOURCE: u64 = DATA + (6 << 20);
/// A port that nothing answers at: it reads all-ones.
const NO_PORT: u16 = 0x1234;

entry!(main);

/// The entry that maps numbered page `page`.
const fn entry_for(page: u64) -> u64 {
    (NUMBERED + page % PAGES * PAGE) | P | W | A | D
}

/// The number of the page that page `index` of the window now is.
fn seen(index: u64) -> u64 {
    cpu::read64(WINDOW + index * PAGE)
}

/// What the window shows of entry `index`, as the tables stand in memory.
fn agrees(index: u64) -> bool {
    let entry = cpu::read64(TABLES + 8 * index);
    entry & P == 0 || seen(index) == (entry - NUMBERED) / PAGE
}

/// One kind of write: its name, the bytes it writes, and how it writes them to an address from [`SOURCE`].
type Kind = (&'static str, u64, fn(u64));

macro_rules! kind {
    ($name:literal, $bytes:expr, $($code:literal),+) => {
        ($name, $bytes, |to| {
            // SAFETY: copies from memory of this guest's own to its page tables, which map nothing it lives by.
            unsafe {
                asm!("push rbx", $($code),+, "pop rbx", inout("rdi") to => _, inout("rsi") SOURCE => _,
                     out("rax") _, out("rcx") _, out("rdx") _, out("r8") _,
                     out("xmm0") _, options(nostack))
            }
        })
    };
}

/// 8 bytes and more are whole entries; fewer are the low bytes of one.
const KINDS: &[Kind] = &[
    kind!("MOV, 1 byte", 1, "mov al, [rsi]", "mov [rdi], al"),
    kind!("MOV, 2 bytes", 2, "mov ax, [rsi]", "mov [rdi], ax"),
    kind!("MOV, 4 bytes", 4, "mov eax, [rsi]", "mov [rdi], eax"),
    kind!("MOV, 8 bytes", 8, "mov rax, [rsi]", "mov [rdi], rax"),
    kind!("XCHG", 8, "mov rax, [rsi]", "xchg [rdi], rax"),
    kind!("LOCK CMPXCHG", 8, "mov rdx, [rsi]", "mov rax, [rdi]", "lock cmpxchg [rdi], rdx"),
    kind!("LOCK XADD", 8, "mov rax, [rsi]", "sub rax, [rdi]", "lock xadd [rdi], rax"),
    kind!(
        "LOCK CMPXCHG16B",
        16,
        "mov rbx, [rsi]",
        "mov rcx, [rsi + 8]",
        "mov rax, [rdi]",
        "mov rdx, [rdi + 8]",
        "lock cmpxchg16b [rdi]"
    ),
    kind!("MOVNTI", 8, "mov rax, [rsi]", "movnti [rdi], rax"),
    kind!("MOVUPS", 16, "movups xmm0, [rsi]", "movups [rdi], xmm0"),
    kind!("PUSH", 8, "mov r8, rsp", "lea rsp, [rdi + 8]", "push qword ptr [rsi]", "mov rsp, r8"),
    kind!("REP MOVSB", 64, "mov ecx, 64", "rep movsb"),
    kind!("REP MOVSQ", 64, "mov ecx, 8", "rep movsq"),
    kind!("REP MOVSQ, long", 512, "mov ecx, 64", "rep movsq"),
    kind!("REP MOVSQ down", 64, "add rdi, 56", "add rsi, 56", "mov ecx, 8", "std", "rep movsq", "cld"),
    kind!("REP STOSQ", 8, "mov rax, [rsi]", "mov ecx, 1", "rep stosq"),
    kind!("FXSAVE", 512, "fxrstor [rsi]", "fxsave [rdi]"),
];

/// Where the vector registers lie in what FXSAVE writes, in words of 8 bytes.
const VECTORS: core::ops::Range<u64> = 20..52;

fn check(name: &str, at: u64, bytes: u64, before: u64) -> u32 {
    // The entries written, and some on either side.
    let (first, last) = (at / 8, (at + bytes - 1) / 8);
    let mut bad = 0;
    for index in first.saturating_sub(2)..=(last + 2).min(2 * PAGES - 1) {
        let good = agrees(index);
        if !good && bad == 0 {
            println!("table-writes: {name} of entry {first}: page {index} is not what its entry says: BAD");
        }
        bad |= u32::from(!good);
    }
    if before != cpu::read64(TABLES + 8 * (first.saturating_sub(1))) && first > 0 {
        println!("table-writes: {name} of entry {first} changed the one before: BAD");
        bad = 1;
    }
    bad
}

fn main() -> u8 {
    // SSE, for the wide writes.
    cpu::write_cr0(cpu::read_cr0() & !(1 << 2) | 1 << 1);
    cpu::write_cr4(cpu::read_cr4() | 3 << 9);
    let mut space = AddressSpace::install();
    for page in 0..PAGES {
        cpu::write64(NUMBERED + page * PAGE, page);
    }
    for index in 0..2 * PAGES {
        cpu::write64(TABLES + 8 * index, entry_for(index));
    }
    for table in 0..2 {
        let slot = space.directory_entry(WINDOW + (table << 21));
        cpu::write64(slot, (TABLES + table * PAGE) | P | W | A);
        space.map(ALIAS + table * PAGE, TABLES + table * PAGE, P | W | A | D);
    }
    let mut bad = 0;
    let mut count = 0;
    let mut number = 7;
    // In the middle of the first table, at its beginning, and across the two.
    for at in [8 * 100, 0, PAGE - 8, PAGE - 16, PAGE - 64, PAGE - 256, PAGE] {
        for (turn, &(name, bytes, write)) in (0_u64..).zip(KINDS) {
            if name == "LOCK CMPXCHG16B" && at % 16 != 0 || name == "FXSAVE" && at % 16 != 0 {
                continue;
            }
            for flush_all in [false, true] {
                let entries = bytes.div_ceil(8);
                // Known to the shadow before, table and pages.
                for index in (at / 8).saturating_sub(2)..(at / 8 + entries + 2).min(2 * PAGES) {
                    let _ = seen(index);
                }
                for word in 0..64 {
                    number = (number * 5 + turn + 1) % PAGES;
                    let old = cpu::read64(TABLES + (at + 8 * word).min(2 * PAGE - 8));
                    let new = entry_for(number);
                    // A narrow write keeps the entry's upper bytes, and must leave a page of ours.
                    let kept = if bytes < 4 { !0 << (8 * bytes) } else { 0 };
                    cpu::write64(SOURCE + 8 * word, old & kept | new & !kept);
                }
                if bytes < 4 {
                    // Of such an entry only flags change, or a frame number's low bits: W goes, and comes back.
                    let old = cpu::read64(TABLES + at);
                    cpu::write64(SOURCE, old ^ if bytes == 1 { W } else { PAGE });
                }
                if name == "FXSAVE" {
                    // Entries in the vector registers alone; the control words are what they are after a reset.
                    for word in (0..64).filter(|word| !VECTORS.contains(word)) {
                        cpu::write64(
                            SOURCE + 8 * word,
                            [0x37f, 0, 0, 0x1f80][word.min(3) as usize] * u64::from(word < 4),
                        );
                    }
                }
                let before = cpu::read64(TABLES + at.saturating_sub(8));
                write(ALIAS + at);
                if name == "FXSAVE" {
                    for word in (0..64).filter(|word| !VECTORS.contains(word)) {
                        cpu::write64(ALIAS + at + 8 * word, entry_for(number + word));
                    }
                }
                if flush_all {
                    cpu::write_cr3(cpu::read_cr3());
                } else {
                    for index in at / 8..(at / 8 + entries).min(2 * PAGES) {
                        cpu::invlpg(WINDOW + index * PAGE);
                    }
                }
                bad += check(name, at, bytes, before);
                if bytes < 4 {
                    cpu::write64(ALIAS + at, entry_for(number));
                    cpu::invlpg(WINDOW + at / 8 * PAGE);
                }
                count += 1;
            }
        }
    }
    // The upper half of the last entry of one table, and the lower half of the first one of the next.
    for turn in 0..4 {
        let (last, first) = (entry_for(9), entry_for(20 + turn));
        cpu::write64(ALIAS + PAGE - 8, last);
        let _ = (seen(PAGES - 1), seen(PAGES));
        let across = last >> 32 | first << 32;
        // SAFETY: as for the others.
        unsafe { asm!("mov [{}], {}", in(reg) ALIAS + PAGE - 4, in(reg) across) };
        cpu::write_cr3(cpu::read_cr3());
        if seen(PAGES) != 20 + turn || seen(PAGES - 1) != 9 {
            println!("table-writes: MOV across two tables: {} and {}: BAD", seen(PAGES - 1), seen(PAGES));
            bad += 1;
        }
        count += 1;
    }
    // H16: the hypervisor writes for a string port instruction; all-ones in the low half of an entry, then the whole.
    for (at, bytes) in [(8 * 40, 4_u32), (8 * 41, 64), (PAGE - 32, 64)] {
        for index in at / 8..at / 8 + 8 {
            let _ = seen(index);
        }
        // SAFETY: writes entries that map nothing the guest lives by.
        unsafe {
            asm!("rep insb", inout("rdi") ALIAS + at => _, inout("ecx") bytes => _, in("dx") NO_PORT);
        }
        // The entries are beyond the guest's memory now, or have reserved bits set; what they mapped must be gone.
        cpu::write_cr3(cpu::read_cr3());
        for index in at / 8..at / 8 + u64::from(bytes.div_ceil(8)) {
            if cpu::read64(TABLES + 8 * index) & 0xffff_ffff != 0xffff_ffff {
                println!("table-writes: INS did not write entry {index}: BAD");
                bad += 1;
            }
            cpu::write64(ALIAS + 8 * index, entry_for(index + 200));
            if !agrees(index) {
                println!("table-writes: after INS page {index} is not what its entry says: BAD");
                bad += 1;
            }
            count += 1;
        }
    }
    println!("table-writes: {count} writes");
    println!("table-writes done: {bad} bad");
    u8::from(bad != 0)
}
