//! Maps and unmaps pages, looks at A and D, and provokes every right's fault.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use test_guests::paging::{A, AddressSpace, D, DATA, FREE, NX, P, U, W};
use test_guests::trap::{Frame, handle, selector};
use test_guests::{cpu, entry, println};

static FAULTS: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);

/// Bits of a page fault's error code.
mod error {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const USER: u64 = 4;
    pub const RESERVED: u64 = 8;
    pub const FETCH: u64 = 16;
}

entry!(main);

// `try_access(kind, address)`: 0 read, 1 write, 2 call, 3 read from ring 3, 4 write from ring 3. Whatever
// faults on the way, the #PF handler goes on at `access_resume`, with the stack of `access_stack`.
global_asm!(
    "try_access:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + access_stack], rsp",
    "cmp edi, 1", "je 3f", "cmp edi, 2", "je 4f", "cmp edi, 3", "jae 5f",
    "mov rax, [rsi]", "jmp access_resume",
    "3: mov qword ptr [rsi], 0x55", "jmp access_resume",
    "4: call rsi", "jmp access_resume",
    "5: lea rax, [rip + 6f]", "je 8f", "lea rax, [rip + 7f]",
    "8: push {user_data}", "push rsp", "push 2", "push {user_code}", "push rax", "iretq",
    "6: mov rax, [rsi]", "int 0x80",
    "7: mov qword ptr [rsi], 0x66", "int 0x80",
    "access_resume:",
    "mov rsp, [rip + access_stack]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    ".data", ".balign 8", "access_stack: .quad 0", ".text",
    user_data = const selector::USER_DATA,
    user_code = const selector::USER_CODE,
);

unsafe extern "C" {
    fn try_access(kind: u32, address: u64);
    static access_stack: u64;
    static access_resume: [u8; 0];
}

fn resume(frame: &mut Frame) {
    frame.rip = &raw const access_resume as u64;
    frame.cs = selector::CODE;
    frame.ss = selector::DATA;
    // SAFETY: written by the access that is going on.
    frame.rsp = unsafe { (&raw const access_stack).read_volatile() };
}

fn page_fault(frame: &mut Frame) {
    FAULTS.fetch_add(1, Ordering::Relaxed);
    ERROR.store(frame.error, Ordering::Relaxed);
    resume(frame);
}

#[derive(Clone, Copy)]
enum Access {
    Read = 0,
    Write = 1,
    Call = 2,
    UserRead = 3,
    UserWrite = 4,
}

/// The error code of the one fault the access raised, if any.
fn access(kind: Access, address: u64) -> Option<u64> {
    FAULTS.store(0, Ordering::Relaxed);
    // SAFETY: faults come back here; the callee keeps the registers that the ABI says.
    unsafe { try_access(kind as u32, address) }
    match FAULTS.load(Ordering::Relaxed) {
        0 => None,
        1 => Some(ERROR.load(Ordering::Relaxed)),
        count => {
            println!("one access, {count} faults: BAD");
            Some(u64::MAX)
        }
    }
}

fn remap_checksum(space: &mut AddressSpace) -> u64 {
    let mut sum = 0u64;
    for round in 0..8u64 {
        for page in 0..256u64 {
            let address = FREE + page * 4096;
            // Each round maps the pages rotated by one: stale translations show in the sum.
            space.map(address, DATA + (page + round) % 256 * 4096, P | W);
            cpu::invlpg(address);
            cpu::write64(address + 8 * round, page << 8 | round);
        }
    }
    for page in 0..256u64 {
        for word in 0..8 {
            sum = (sum ^ cpu::read64(DATA + page * 4096 + word * 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    for page in 0..256 {
        space.map(FREE + page * 4096, 0, 0);
        cpu::invlpg(FREE + page * 4096);
    }
    sum
}

fn main() -> u8 {
    handle(14, page_fault);
    handle(0x80, resume);
    let mut space = AddressSpace::install();
    for word in 0..256 * 512 {
        cpu::write64(DATA + word * 8, 0);
    }
    let sum = remap_checksum(&mut space);
    println!("paging: checksum {sum:016x}");

    let mut bad = 0u8;
    let page = FREE + (1 << 30);
    let mut check = |name: &str, good: bool| {
        println!("{name}: {}", if good { "ok" } else { "BAD" });
        bad += u8::from(!good);
    };

    check("unmapped", access(Access::Read, FREE) == Some(0));
    space.map(page, DATA, P | W);
    cpu::invlpg(page);
    check("A clear before", space.flags(page) & (A | D) == 0);
    check("read", access(Access::Read, page).is_none());
    check("A after a read", space.flags(page) & (A | D) == A);
    check("write", access(Access::Write, page).is_none());
    check("D after a write", space.flags(page) & (A | D) == A | D);
    space.map(page, DATA, P | W);
    cpu::invlpg(page);
    let _ = access(Access::Read, page);
    check("A again after it was cleared", space.flags(page) & (A | D) == A);

    space.map(page, DATA, P);
    cpu::invlpg(page);
    check("W fault", access(Access::Write, page) == Some(error::PRESENT | error::WRITE));
    cpu::write_cr0(cpu::read_cr0() & !(1 << 16));
    check("no W fault with WP off", access(Access::Write, page).is_none());
    cpu::write_cr0(cpu::read_cr0() | 1 << 16);
    check("W fault with WP on again", access(Access::Write, page) == Some(error::PRESENT | error::WRITE));

    check("U fault on a read", access(Access::UserRead, page) == Some(error::PRESENT | error::USER));
    check(
        "U fault on a write",
        access(Access::UserWrite, page) == Some(error::PRESENT | error::USER | error::WRITE),
    );
    space.map(page, DATA, P | W | U);
    cpu::invlpg(page);
    check("user read", access(Access::UserRead, page).is_none());
    check("user write", access(Access::UserWrite, page).is_none());
    check("the user's write is there", cpu::read64(DATA) == 0x66);
    check("unmapped, user", access(Access::UserRead, FREE) == Some(error::USER));

    cpu::write64(DATA, 0xc3); // RET
    check("call", access(Access::Call, page).is_none());
    space.map(page, DATA, P | W | U | NX);
    cpu::invlpg(page);
    check("NX fault", access(Access::Call, page) == Some(error::PRESENT | error::FETCH));
    check("NX read", access(Access::Read, page).is_none());
    // The highest bit of a frame number, which is reserved unless MAXPHYADDR is 52.
    let physical_bits = cpu::cpuid(0x8000_0008, 0)[0] & 0xff;
    space.map(page, 0, P | 1 << 51);
    cpu::invlpg(page);
    if physical_bits < 52 {
        check("RSVD fault", access(Access::Read, page) == Some(error::PRESENT | error::RESERVED));
    }

    // A not-present entry that becomes present needs no INVLPG (SDM volume 3, "Details of TLB Use").
    let late = page + 4096;
    check("unmapped before", access(Access::Read, late) == Some(0));
    space.map(late, DATA + 4096, P | W);
    check("mapped without INVLPG", access(Access::Write, late).is_none());

    // Two views of one frame.
    let alias = FREE + (3 << 30);
    space.map(alias, DATA + 4096, P | W);
    cpu::write64(alias + 16, 0x1234_5678);
    check("alias", cpu::read64(late + 16) == 0x1234_5678 && cpu::read64(DATA + 4096 + 16) == 0x1234_5678);

    // SAFETY: reads nothing; only keeps the compiler from moving accesses over the end.
    unsafe { asm!("") }
    println!("paging done: {bad} bad");
    bad
}
