/* The machine that the matrix runs on: tables for segments and interrupts, ports, and the access itself. */
#ifndef MACHINE_H
#define MACHINE_H

#include "reference.h"

typedef unsigned long word; /* of the guest's own width */

/* What an access does; in start64.S and start32.S each has 16 bytes of code for CPL 0 and for CPL 3. */
enum op { OP_READ, OP_WRITE, OP_FETCH, OP_LAR, OP_LOAD_GS };

/* Selectors. */
enum { CODE = 0x08, DATA = 0x10, USER_DATA = 0x1b, USER_CODE = 0x23, TASK = 0x28, LDT = 0x38 };
/* In the local descriptor table, which lies in the page under test. */
enum { LDT_ACCESSED = 0x0f, LDT_FRESH = 0x17 };

/* What happened in the last access. */
extern volatile u32 faults;
extern volatile u32 fault_error;
extern volatile word fault_address;
/* Where the code for CPL 3 is mapped. */
extern word user_page;
/* That code, to be copied there. */
extern const u8 user_ops[], user_ops_end[];

/* Makes one access at `address`, with `value` written, or `value` as the selector. Returns what was read. */
u32 run_access(word op, word cpl3, word ac, word address, word value);

/* Loads segments, interrupt gates, task register and the local descriptor table at `ldt`. */
void install(word ldt);

/* What the loader was told to hand over; "" where it hands over nothing. */
const char *command_line(void);

void print(const char *text);
void print_hex(u64 value);
void print_number(u32 value);
__attribute__((noreturn)) void leave(u8 code);

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

struct cpuid { u32 a, b, c, d; };
static inline struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid r;
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}

static inline u64 rdmsr(u32 msr)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    return (u64)high << 32 | low;
}
static inline void wrmsr(u32 msr, u64 value)
{
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

#define CONTROL_REGISTER(name)                                                                                  \
    static inline word read_##name(void)                                                                        \
    {                                                                                                           \
        word value;                                                                                             \
        __asm__ volatile("mov %%" #name ", %0" : "=r"(value));                                                  \
        return value;                                                                                           \
    }                                                                                                           \
    static inline void write_##name(word value) { __asm__ volatile("mov %0, %%" #name ::"r"(value) : "memory"); }
CONTROL_REGISTER(cr0)
CONTROL_REGISTER(cr2)
CONTROL_REGISTER(cr3)
CONTROL_REGISTER(cr4)

static inline void invlpg(word address) { __asm__ volatile("invlpg (%0)" ::"r"(address) : "memory"); }

#endif
