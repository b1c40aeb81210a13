/*
 * Ways for a guest to end, or to come to nothing, one for each word of its command line (H28, H29): each is this guest's
 * own business. 32-bit, entered with paging off.
 */
#include "machine.h"

/* No RAM, no device. */
#define HOLE 0xd0000000U
#define APIC 0xfee00000U

enum { CR0_AM = 1 << 18, FLAG_AC = 1 << 18, FLAG_VM = 1 << 17, ALIGNMENT = 17 };

static u64 gates[32];
static u64 segments[9];
static u32 task[26], other_task[26];
static struct { u16 limit; u32 base; } __attribute__((packed)) pointer;
static u8 stack[4096] __attribute__((aligned(16)));

static int is(const char *word)
{
    const char *text = command_line();
    while (*word && *text == *word)
        word++, text++;
    return !*word && (*text == ' ' || !*text);
}

static void load_gates(u32 base, u16 limit)
{
    pointer.base = base;
    pointer.limit = limit;
    __asm__ volatile("lidt %0" ::"m"(pointer));
}

static void load_segments(u32 base, u16 limit)
{
    pointer.base = base;
    pointer.limit = limit;
    __asm__ volatile("lgdt %0" ::"m"(pointer));
}

static void set_gate(int vector, u32 handler, u32 selector)
{
    gates[vector] = (handler & 0xffff) | (u64)selector << 16 | 0xeeULL << 40 | (u64)(handler >> 16) << 48;
}

static void describe_task(int index, const u32 *at)
{
    u32 base = (u32)at;
    segments[index] = 103 | (u64)(base & 0xffffff) << 16 | 0x89ULL << 40 | (u64)(base >> 24) << 56;
}

static void flat_segments(void)
{
    segments[CODE / 8] = 0x00cf9b000000ffff;
    segments[DATA / 8] = 0x00cf93000000ffff;
    segments[USER_DATA / 8] = 0x00cff3000000ffff;
    segments[USER_CODE / 8] = 0x00cffb000000ffff;
    task[1] = (u32)stack + sizeof stack;
    task[2] = DATA;
    describe_task(TASK / 8, task);
    describe_task(LDT / 8, other_task);
    load_segments((u32)segments, sizeof segments - 1);
    __asm__ volatile("ljmp %0, $1f; 1:" ::"i"(CODE));
    __asm__ volatile("mov %0, %%ds; mov %0, %%es; mov %1, %%ss" ::"r"(USER_DATA), "r"(DATA));
    __asm__ volatile("ltr %0" ::"r"((u16)TASK));
}

/* The handler, which returns: in ends32.S. */
extern const u8 storm_handler[];

/* An alignment check at CPL 3 whose handler, at CPL 3 too, is pushed on the same misaligned stack. */
static void alignment_storm(void)
{
    flat_segments();
    set_gate(ALIGNMENT, (u32)storm_handler, USER_CODE);
    load_gates((u32)gates, sizeof gates - 1);
    print("ends: alignment checks\n");
    __asm__ volatile("mov %%cr0, %%eax; or %0, %%eax; mov %%eax, %%cr0" ::"i"(CR0_AM) : "eax");
    __asm__ volatile("push %0; push %1; push %2; push %3; push $storm_misaligned; iret" ::"i"(USER_DATA),
                     "r"((u32)&stack[1025]), "i"(FLAG_AC | 2), "i"(USER_CODE));
}

static void virtual_8086(void)
{
    flat_segments();
    *(volatile u8 *)0x8000 = 0xf4; /* HLT */
    __asm__ volatile("push $0; push $0; push $0; push $0; push $0; push $0x7000; push %0; push $0; push $0x8000; iret" ::
                         "i"(FLAG_VM | 2));
}

static void paging_on(u32 root)
{
    __asm__ volatile("mov %0, %%cr3; mov %%cr0, %%eax; or $0x80000000, %%eax; mov %%eax, %%cr0" ::"r"(root) : "eax");
}

void cmain(void)
{
    print("ends: ");
    print(command_line());
    print("\n");
    if (is("triple-fault")) {
        load_gates(0, 0);
        __asm__ volatile("int3");
    } else if (is("reset-cf9")) {
        outb(0xcf9, 2);
        outb(0xcf9, 6);
    } else if (is("reset-keyboard")) {
        outb(0x64, 0xfe);
    } else if (is("reset-fast")) {
        outb(0x92, 1);
    } else if (is("power-off")) {
        __asm__ volatile("outw %0, %1" ::"a"((u16)(5 << 10 | 1 << 13)), "d"((u16)0x604));
    } else if (is("halt")) {
        __asm__ volatile("cli; hlt");
    } else if (is("task-switch")) {
        /* To a task that is all zeros. */
        flat_segments();
        load_gates(0, 0);
        __asm__ volatile("ljmp %0, $0" ::"i"(LDT));
    } else if (is("real-mode")) {
        __asm__ volatile("mov %%cr0, %%eax; and $0xfffffffe, %%eax; mov %%eax, %%cr0" ::: "eax");
    } else if (is("virtual-8086")) {
        virtual_8086();
    } else if (is("gates-in-hole")) {
        load_gates(HOLE, 0xff);
        __asm__ volatile("int3");
    } else if (is("gates-in-apic")) {
        load_gates(APIC, 0xff);
        __asm__ volatile("int3");
    } else if (is("stack-in-hole")) {
        flat_segments();
        set_gate(3, (u32)storm_handler, CODE);
        load_gates((u32)gates, sizeof gates - 1);
        __asm__ volatile("mov %0, %%esp; int3" ::"r"(HOLE + 0x1000));
    } else if (is("segments-in-hole")) {
        load_segments(HOLE, 0xff);
        __asm__ volatile("mov %0, %%ds" ::"r"(DATA));
    } else if (is("code-in-hole")) {
        ((void (*)(void))HOLE)();
    } else if (is("code-in-apic")) {
        ((void (*)(void))APIC)();
    } else if (is("wide-write-to-apic")) {
        __asm__ volatile("mov %%cr4, %%eax; or $0x200, %%eax; mov %%eax, %%cr4; fxsave (%0)" ::"r"(APIC) : "eax");
    } else if (is("tables-in-hole")) {
        paging_on(HOLE);
    } else if (is("tables-nowhere")) {
        paging_on(0xfffff000);
    } else if (is("alignment-storm")) {
        alignment_storm();
    }
    print("ends: still here: BAD\n");
    leave(1);
}
