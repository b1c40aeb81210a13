/* What a processor must do with an access, by the Intel SDM's text alone: see reference.c. */
#ifndef REFERENCE_H
#define REFERENCE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Bits of a page-table entry. */
enum { P = 1, W = 2, U = 4, PWT = 8, PCD = 16, A = 32, D = 64, PS = 128 };
#define NX (1ULL << 63)

/* Bits of a page fault's error code. */
enum { ERROR_P = 1, ERROR_W = 2, ERROR_U = 4, ERROR_RESERVED = 8, ERROR_FETCH = 16 };

/* How the processor translates. */
struct paging {
    int levels;          /* of tables in memory: 2 (32-bit and PAE paging) or 4 */
    int wide;            /* entries of eight bytes: all but 32-bit paging */
    int wp, smep, smap;  /* CR0.WP, CR4.SMEP, CR4.SMAP */
    int nxe, pse;        /* EFER.NXE, CR4.PSE */
    int maxphyaddr;      /* CPUID.80000008H:EAX[7:0] */
    int gib_pages;       /* CPUID.80000001H:EDX.Page1GB */
    int pse36;           /* CPUID.01H:EDX.PSE-36 */
};

struct access {
    int write, fetch;
    int cpl3;      /* CPL is 3 */
    int implicit;  /* to a system data structure: a supervisor access whatever the CPL is */
    int ac;        /* EFLAGS.AC */
};

/* A page fault, or the level of the entry that maps the page. */
struct outcome {
    int fault;
    u32 error;
    int level;  /* of the entry that faulted, or that maps the page */
};

/* entry[1] to entry[levels]: what the tables hold on the way to the address. */
struct outcome reference(const struct paging *paging, const u64 *entry, const struct access *access);

#endif
