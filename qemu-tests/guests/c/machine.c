#include "machine.h"

enum { COM1 = 0x3f8, EXIT_PORT = 0xf4, SHUTDOWN_PORT = 0x8900, VECTORS = 129, PAGE_FAULT = 14, DONE = 0x80 };

/* Entry points: of the exceptions, 16 bytes each, and of what ends an access. */
extern const u8 exception_stubs[], page_fault_stub[], done_stub[];

static u8 ring0_stack[4096] __attribute__((aligned(16)));
static struct { u16 limit; word base; } __attribute__((packed)) pointer;
static u64 gdt[9];
/* 104 bytes in both widths; what is not set stays 0. */
static u32 tss[26];

#ifdef __x86_64__
static u64 idt[2 * VECTORS];
#else
static u64 idt[VECTORS];
#endif

#ifdef __x86_64__
const char *command_line(void) { return ""; }
#else
extern u32 multiboot_info;

const char *command_line(void)
{
    const u32 *info = (const u32 *)multiboot_info;
    return info[0] & 4 ? (const char *)info[4] : "";
}
#endif

void print(const char *text)
{
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, *text);
    }
}

void print_hex(u64 value)
{
    char text[19], *at = text + 18;
    *at = 0;
    do
        *--at = "0123456789abcdef"[value & 15];
    while (value >>= 4);
    *--at = 'x';
    *--at = '0';
    print(at);
}

void print_number(u32 value)
{
    char text[11], *at = text + 10;
    *at = 0;
    do
        *--at = '0' + value % 10;
    while (value /= 10);
    print(at);
}

void leave(u8 code)
{
    const char *shutdown;
    outb(EXIT_PORT, code);
    /* On the bare emulator. */
    for (shutdown = "Shutdown"; *shutdown; shutdown++)
        outb(SHUTDOWN_PORT, *shutdown);
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* Called by the stub of an exception that no access may raise. */
void unexpected(u32 vector)
{
    print("rights: unexpected exception ");
    print_number(vector);
    print(", CR2 ");
    print_hex(read_cr2());
    print(": BAD\n");
    leave(0xee);
}

static void gate(int vector, const u8 *entry)
{
    word at = (word)entry;
    u64 kind = vector == DONE ? 0xee : 0x8e;
    u64 low = (at & 0xffff) | (u64)CODE << 16 | kind << 40 | (u64)(at >> 16 & 0xffff) << 48;
#ifdef __x86_64__
    idt[2 * vector] = low;
    idt[2 * vector + 1] = at >> 32;
#else
    idt[vector] = low;
#endif
}

/* A system descriptor; twice as long in 64-bit mode. */
static void describe(int index, word base, u32 limit, u64 type)
{
    gdt[index] = limit | (u64)(base & 0xffffff) << 16 | type << 40 | (u64)(base >> 24 & 0xff) << 56;
#ifdef __x86_64__
    gdt[index + 1] = base >> 32;
#endif
}

void install(word ldt)
{
    word stack = (word)ring0_stack + sizeof ring0_stack;
    int vector;
#ifdef __x86_64__
    gdt[CODE / 8] = 0x00af9b000000ffff;
    gdt[USER_CODE / 8] = 0x00affb000000ffff;
    tss[1] = stack;
    tss[2] = stack >> 32;
#else
    gdt[CODE / 8] = 0x00cf9b000000ffff;
    gdt[USER_CODE / 8] = 0x00cffb000000ffff;
    tss[1] = stack;
    tss[2] = DATA;
#endif
    gdt[DATA / 8] = 0x00cf93000000ffff;
    gdt[USER_DATA / 8] = 0x00cff3000000ffff;
    describe(TASK / 8, (word)tss, sizeof tss - 1, 0x89);
    describe(LDT / 8, ldt, 3 * 8 - 1, 0x82);
    for (vector = 0; vector < 32; vector++)
        gate(vector, exception_stubs + 16 * vector);
    gate(PAGE_FAULT, page_fault_stub);
    gate(DONE, done_stub);

    pointer.limit = sizeof gdt - 1;
    pointer.base = (word)gdt;
    __asm__ volatile("lgdt %0" ::"m"(pointer));
    pointer.limit = sizeof idt - 1;
    pointer.base = (word)idt;
    __asm__ volatile("lidt %0" ::"m"(pointer));
    /* The far return loads CS anew. DS and ES are CPL 3's too: an IRET would clear others. */
#ifdef __x86_64__
    __asm__ volatile("pushq %0; lea 1f(%%rip), %%rax; push %%rax; lretq; 1:" ::"i"(CODE) : "rax", "memory");
#else
    __asm__ volatile("ljmp %0, $1f; 1:" ::"i"(CODE) : "memory");
#endif
    __asm__ volatile("mov %0, %%ss; mov %1, %%ds; mov %1, %%es" ::"r"(DATA), "r"(USER_DATA) : "memory");
    __asm__ volatile("ltr %0; lldt %1" ::"r"((u16)TASK), "r"((u16)LDT));
}
