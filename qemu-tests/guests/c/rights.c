/*
 * The rights matrix (H15): paging modes x rights at every level x CR0.WP, CR4.SMEP, CR4.SMAP, EFER.NXE x accesses,
 * with A and D set or not, pages of every size, entries that are not present or have a reserved bit set. What each
 * access does (success, or #PF with this error code and CR2; A and D afterwards) is compared with reference.c.
 */
#include "machine.h"

#define PAGE __attribute__((aligned(4096)))

enum {
    CR0_WP = 1 << 16,
    CR4_PSE = 1 << 4,
    CR4_PAE = 1 << 5,
    CR4_SMEP = 1 << 20,
    CR4_SMAP = 1 << 21,
    EFER = 0xc0000080,
    EFER_NXE = 1 << 11,
    /* In the page under test. */
    LDT_AT = 0,
    RET_AT = 0x100,
    INT_AT = 0x200,
    READ_AT = 0x400,
    WRITE_AT = 0x800,
    MAGIC = 0x5a17c0de,
    FAILURES_SHOWN = 20,
};
/* The page under test: page 9 of the 2 MiB block, and of the 4 MiB block, at 8 MiB. */
#define BLOCK_UNDER_TEST 0x800000UL
#define PAGE_UNDER_TEST (BLOCK_UNDER_TEST + 0x9000)
/* Combinations, at least, in a mode with more than two levels or wide entries. */
#define COMBINATIONS 100000U

static const struct kind {
    const char *name;
    u8 op, cpl3, ac, write, fetch, implicit;
    u16 at;
    u32 value;
} kinds[] = {
    {"read", OP_READ, 0, 0, 0, 0, 0, READ_AT, 0},
    {"write", OP_WRITE, 0, 0, 1, 0, 0, WRITE_AT, MAGIC},
    {"fetch", OP_FETCH, 0, 0, 0, 1, 0, RET_AT, 0},
    {"read, AC", OP_READ, 0, 1, 0, 0, 0, READ_AT, 0},
    {"write, AC", OP_WRITE, 0, 1, 1, 0, 0, WRITE_AT, MAGIC},
    {"fetch, AC", OP_FETCH, 0, 1, 0, 1, 0, RET_AT, 0},
    {"user read", OP_READ, 1, 0, 0, 0, 0, READ_AT, 0},
    {"user write", OP_WRITE, 1, 0, 1, 0, 0, WRITE_AT, MAGIC},
    {"user fetch", OP_FETCH, 1, 0, 0, 1, 0, INT_AT, 0},
    {"descriptor read", OP_LAR, 0, 0, 0, 0, 1, LDT_AT + 8, LDT_ACCESSED},
    {"descriptor read, AC", OP_LAR, 0, 1, 0, 0, 1, LDT_AT + 8, LDT_ACCESSED},
    {"user's descriptor read", OP_LAR, 1, 0, 0, 0, 1, LDT_AT + 8, LDT_ACCESSED},
    {"user's descriptor read, AC", OP_LAR, 1, 1, 0, 0, 1, LDT_AT + 8, LDT_ACCESSED},
    {"descriptor write", OP_LOAD_GS, 0, 0, 1, 0, 1, LDT_AT + 16, LDT_FRESH},
    {"user's descriptor write", OP_LOAD_GS, 1, 0, 1, 0, 1, LDT_AT + 16, LDT_FRESH},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

/* Where a mode's test lies. */
struct mode {
    const char *name;
    int levels, wide;
    void *table[5];  /* the table of each level */
    u16 index[5];    /* the entry in it */
    word address;    /* what the entries translate */
};

static const struct mode *mode;
static struct paging paging;
/* What the entries under test hold. */
static u64 current[5];
static u32 combinations, bad, all_bad, seed = 1;

static u32 random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

static u64 load(int level)
{
    if (mode->wide)
        return ((volatile u64 *)mode->table[level])[mode->index[level]];
    return ((volatile u32 *)mode->table[level])[mode->index[level]];
}

static void store(int level, u64 entry)
{
    if (mode->wide)
        ((volatile u64 *)mode->table[level])[mode->index[level]] = entry;
    else
        ((volatile u32 *)mode->table[level])[mode->index[level]] = entry;
}

static void say(const char *what, u64 value)
{
    print(what);
    print_hex(value);
}

static void fail(const struct kind *kind, const u64 *was, struct outcome want, const char *why)
{
    int level;
    if (bad++ >= FAILURES_SHOWN)
        return;
    print("rights: ");
    print(mode->name);
    print(", ");
    print(kind->name);
    say(": wp ", paging.wp);
    say(" smep ", paging.smep);
    say(" smap ", paging.smap);
    say(" nxe ", paging.nxe);
    print("; entries");
    for (level = mode->levels; level > 0; level--) {
        say(" ", was[level]);
        say(" -> ", load(level));
    }
    say("; wanted faults ", want.fault);
    say(" error ", want.error);
    say("; got ", faults);
    say(" error ", fault_error);
    say(" CR2 ", fault_address);
    print(": ");
    print(why);
    print(": BAD\n");
}

static volatile u8 *page(int offset) { return (volatile u8 *)(PAGE_UNDER_TEST + offset); }
static volatile u32 *page32(int offset) { return (volatile u32 *)page(offset); }

/* Bochs lets EFLAGS.AC excuse implicit accesses from SMAP too, which the SDM excludes. Such a processor is left alone
 * with them. */
static int excuses_implicit;

/* One combination: the entries as `want` has them, a flush, an access. */
static void one(const u64 *want, const struct kind *kind)
{
    word address = mode->address + kind->at;
    struct access access = {kind->write, kind->fetch, kind->cpl3, kind->implicit, kind->ac};
    struct outcome expected;
    int level, read_first = kind->op == OP_LOAD_GS, read_through = 0;
    u32 result;
    const char *why = 0;

    if (kind->implicit && kind->ac && paging.smap && excuses_implicit)
        return;
    combinations++;
    for (level = mode->levels; level > 0; level--)
        if (current[level] != want[level])
            store(level, want[level]);
    if (random() & 1)
        invlpg(mode->address);
    else
        write_cr3(read_cr3());

    /* A segment is loaded by a read of its descriptor and then a write of its accessed bit. */
    if (read_first) {
        access.write = 0;
        expected = reference(&paging, want, &access);
        access.write = 1;
        read_through = !expected.fault;
    }
    if (!read_first || read_through)
        expected = reference(&paging, want, &access);

    faults = 0;
    result = run_access(kind->op, kind->cpl3, kind->ac, address, kind->value);

    if (faults != (u32)expected.fault)
        why = "number of faults";
    else if (faults && fault_error != expected.error)
        why = "error code";
    else if (faults && (fault_address < address || fault_address > address + (kind->implicit ? 7 : 0)))
        why = "CR2";
    else if (!faults && kind->op == OP_READ && result != MAGIC)
        why = "what was read";
    else if (!faults && kind->op == OP_LAR && (result & 0x00f0ff00) != 0x00c0f300)
        why = "what the descriptor says";
    if (kind->op == OP_WRITE) {
        if (*page32(WRITE_AT) != (expected.fault ? 0 : MAGIC) && !why)
            why = "what was written";
        *page32(WRITE_AT) = 0;
    }
    if (kind->op == OP_LOAD_GS) {
        if ((*page(LDT_AT + 16 + 5) & 1) == expected.fault && !why)
            why = "the descriptor's accessed bit";
        *page(LDT_AT + 16 + 5) &= ~1;
    }
    for (level = mode->levels; level > 0; level--) {
        u64 now = load(level), then = want[level];
        current[level] = now;
        if (level < expected.level) {
            /* Not looked at. */
        } else if (!expected.fault) {
            then |= A;
            if (level == expected.level && kind->write)
                then |= D;
        } else if (level > expected.level) {
            /* Whether an entry is marked as used where a lower one faults is the processor's choice. */
            then |= now & A;
        } else if (read_through) {
            then |= A;
        }
        if (now != then && !why)
            why = "A and D";
    }
    if (why)
        fail(kind, want, expected, why);
}

/* What an entry says beside P, rights, A and D: nothing, or bits that must not matter. */
static u64 ignored(int level, int leaf)
{
    u64 bits = 0;
    u32 r = random();
    if (r & 1)
        return 0;
    bits |= (r & 2 ? PWT : 0) | (r & 4 ? PCD : 0) | (r & 0x38) << 6;
    if (leaf)
        bits |= r & 0x40 ? 1 << 8 : 0;
    else
        bits |= r & 0x40 ? D : 0;
    if (level == 1)
        bits |= r & 0x80 ? 1 << 7 : 0;
    else if (leaf)
        bits |= r & 0x80 ? 1 << 12 : 0;
    if (level == 2 && !mode->wide && !paging.pse)
        bits |= r & 0x80 ? PS : 0;
    if (mode->levels == 4)
        bits |= (u64)(r >> 8 & 0x7ff) << 52;
    return bits;
}

/* The entry at `level` with these rights (U, W, NX from bit 0 on); `leaf`: the level that maps the page. */
static u64 entry(int level, int leaf, u32 rights, int a, int d)
{
    u64 e = P | (rights & 1 ? U : 0) | (rights & 2 ? W : 0) | (a ? A : 0);
    if (rights & 4)
        e |= NX;
    if (level == leaf) {
        static const word frame[] = {0, PAGE_UNDER_TEST, BLOCK_UNDER_TEST, 0};
        e |= frame[level] | (d ? D : 0) | (level > 1 ? PS : 0);
    } else {
        e |= (word)mode->table[level - 1];
    }
    return e;
}

/* Every level's entry for `rights` (a field of `width` bits for each level, the lowest level's lowest) and `used` (D
 * of the leaf in bit 0, A of each level above). */
static void entries(u64 *want, int leaf, u32 rights, int width, u32 used)
{
    int level;
    for (level = 1; level < leaf; level++)
        want[level] = current[level];
    for (level = leaf; level <= mode->levels; level++) {
        want[level] = entry(level, leaf, rights & ((1 << width) - 1), used >> (level - leaf + 1) & 1, used & 1);
        want[level] |= ignored(level, level == leaf);
        rights >>= width;
    }
}

/* All rights at every level down to `leaf`; `times` accesses for each, of all kinds in turn. */
static void all_rights(int leaf, u32 times)
{
    static u32 turn;
    int width = mode->wide ? 3 : 2, levels = mode->levels - leaf + 1;
    u32 number, count = 1U << (width * levels), n;
    u64 want[5];
    for (number = 0; number < count; number++) {
        /* Gray code: one right changes at a time, so one table is written. */
        u32 rights = number ^ number >> 1;
        for (n = 0; n < times; n++) {
            /* Each A and D in turn as well, where all combinations are gone through. */
            u32 used = times % KINDS ? random() : n / KINDS;
            entries(want, leaf, rights, width, used);
            one(want, &kinds[turn++ % KINDS]);
        }
    }
}

/* Whether bit `bit` of the entry at `level` is worth a try by itself: not rights, A and D, which `all_rights` goes
 * through, and nothing that leads to another page or table. */
static int worth_trying(int level, int leaf, int bit)
{
    int frame_from = level != leaf || level == 1 ? 12 : level == 3 ? 30 : mode->wide ? 21 : 22;
    int frame_to = mode->wide ? paging.maxphyaddr : 32;
    if (bit == 0)
        return 1;
    if (bit == 7)
        return level == 1 || level == 4 || (level == 3 && !paging.gib_pages);
    if (bit < 12 || bit == 63 || (bit >= frame_from && bit < frame_to))
        return 0;
    /* A 4 MiB page beyond 4 GiB. */
    return mode->wide || level == 1 || !paging.pse36 || bit == 12 || bit > 20;
}

/* P clear, and each reserved bit set, at each level, with each kind of access; all else at random. */
static void defects(int leaf)
{
    int width = mode->wide ? 3 : 2, level, bit, kind;
    u64 want[5];
    for (level = leaf; level <= mode->levels; level++)
        for (bit = 0; bit < (mode->wide ? 64 : 32); bit++)
            for (kind = 0; kind < KINDS && worth_trying(level, leaf, bit); kind++) {
                u32 r = random();
                entries(want, leaf, r, width, r >> 12);
                want[level] ^= 1ULL << bit;
                one(want, &kinds[kind]);
            }
}

static void set_paging(int wp, int smep, int smap, int nxe, int pse)
{
    paging.wp = wp;
    paging.smep = smep;
    paging.smap = smap;
    paging.nxe = nxe;
    paging.pse = pse;
    write_cr0((read_cr0() & ~(word)CR0_WP) | (wp ? CR0_WP : 0));
    write_cr4((read_cr4() & ~(word)(CR4_SMEP | CR4_SMAP | CR4_PSE)) | (smep ? CR4_SMEP : 0) | (smap ? CR4_SMAP : 0) |
              (pse ? CR4_PSE : 0));
    if (cpuid(0x80000001, 0).d >> 20 & 1)
        wrmsr(EFER, (rdmsr(EFER) & ~(u64)EFER_NXE) | (nxe ? EFER_NXE : 0));
}

struct features { int smep, smap, nx, pse, pse36, gib_pages, maxphyaddr; };

static struct features features(void)
{
    struct features f = {0};
    u32 seven = cpuid(0, 0).a >= 7 ? cpuid(7, 0).b : 0, one = cpuid(1, 0).d, extended = cpuid(0x80000001, 0).d;
    f.smep = seven >> 7 & 1;
    f.smap = seven >> 20 & 1;
    f.pse = one >> 3 & 1;
    f.pse36 = one >> 17 & 1;
    f.nx = extended >> 20 & 1;
    f.gib_pages = extended >> 26 & 1;
    f.maxphyaddr = cpuid(0x80000008, 0).a & 0xff;
    return f;
}

/* Whether the processor, the translation being there, lets AC excuse an implicit access. */
static int probe_implicit(void)
{
    int level;
    for (level = 1; level <= mode->levels; level++)
        store(level, current[level] = entry(level, 1, 3, 1, 1));
    write_cr3(read_cr3());
    set_paging(1, 0, 1, 0, 0);
    faults = 0;
    run_access(OP_READ, 1, 0, mode->address + READ_AT, 0);
    run_access(OP_LAR, 1, 1, mode->address + LDT_AT + 8, LDT_ACCESSED);
    return !faults;
}

/* The whole matrix of one mode, whose tables are loaded. */
static void run(const struct mode *which, const struct features *has)
{
    u32 settings, count = 0, n, level;
    mode = which;
    paging = (struct paging){.levels = mode->levels,
                             .wide = mode->wide,
                             .maxphyaddr = has->maxphyaddr,
                             .gib_pages = has->gib_pages,
                             .pse36 = has->pse36};
    combinations = bad = 0;
    for (level = 1; level <= (u32)mode->levels; level++)
        current[level] = load(level);
    excuses_implicit = has->smap && probe_implicit();
    if (excuses_implicit)
        print("rights: this processor lets AC excuse implicit accesses from SMAP: these are left out\n");
    for (n = 0; n < 16; n++)
        count += (has->smep || !(n & 2)) && (has->smap || !(n & 4)) && (has->nx || !(n & 8));
    for (settings = 0; settings < 16; settings++) {
        int wp = settings & 1, smep = settings >> 1 & 1, smap = settings >> 2 & 1, nxe = settings >> 3 & 1;
        if ((smep && !has->smep) || (smap && !has->smap) || (nxe && !has->nx))
            continue;
        set_paging(wp, smep, smap, nxe, mode->wide ? 0 : has->pse);
        if (mode->levels == 4) {
            u32 each = COMBINATIONS / 4096 / count;
            all_rights(1, each);
            all_rights(2, each);
            defects(2);
            if (has->gib_pages) {
                all_rights(3, KINDS + 1);
                defects(3);
            }
        } else if (mode->wide) {
            /* All kinds with all A and D, and again until it is enough. */
            u32 once = 64 * KINDS * 8;
            for (n = 0; n * once * count < COMBINATIONS; n++)
                all_rights(1, KINDS * 8);
            all_rights(2, KINDS * 4);
            defects(2);
        } else {
            all_rights(1, KINDS * 8);
            if (has->pse) {
                all_rights(2, KINDS * 4);
                defects(2);
            }
            /* The page-size bit means nothing without PSE. */
            set_paging(wp, smep, smap, nxe, 0);
            all_rights(1, KINDS + 1);
        }
        defects(1);
    }
    set_paging(1, 0, 0, 0, 0);
    print("rights: ");
    print(mode->name);
    print(": ");
    print_number(combinations);
    print(" combinations, ");
    print_number(bad);
    print(" bad\n");
    all_bad += bad;
}

static void fill_page(void)
{
    u32 n;
    for (n = 0; n < 4096; n += 4)
        *page32(n) = 0;
    *page32(LDT_AT + 8) = *page32(LDT_AT + 16) = 0x0000ffff;
    *page32(LDT_AT + 12) = 0x00cff300;
    *page32(LDT_AT + 20) = 0x00cff200;
    *page(RET_AT) = 0xc3;
    *page(INT_AT) = 0xcd;
    *page(INT_AT + 1) = 0x80;
    *page32(READ_AT) = MAGIC;
}

static u8 user_code[4096] PAGE;
static const u64 USED = P | W | A | D;

#ifdef __x86_64__
static u64 pml4[512] PAGE, low_pdpt[512] PAGE, low_pd[512] PAGE;
static u64 user_pdpt[512] PAGE, user_pd[512] PAGE, user_pt[512] PAGE;
static u64 pdpt[512] PAGE, pd[512] PAGE, pt[512] PAGE;

static void modes(const struct features *has)
{
    static struct mode four = {"4-level", 4, 1, {0}, {0, 9, 4, 5, 2}, 0};
    u32 n;
    for (n = 0; n < 8; n++)
        low_pd[n] = (u64)n << 21 | USED | PS;
    low_pdpt[0] = (u64)low_pd | USED;
    pml4[0] = (u64)low_pdpt | USED;
    user_page = 1UL << 39;
    user_pt[0] = (u64)user_code | USED | U;
    user_pd[0] = (u64)user_pt | USED | U;
    user_pdpt[0] = (u64)user_pd | USED | U;
    pml4[1] = (u64)user_pdpt | USED | U;
    four.table[4] = pml4;
    four.table[3] = pdpt;
    four.table[2] = pd;
    four.table[1] = pt;
    four.address = 2UL << 39 | 5UL << 30 | PAGE_UNDER_TEST;
    write_cr3((word)pml4);
    install(four.address + LDT_AT);
    run(&four, has);
}
#else
static u32 short_root[1024] PAGE, short_low[4][1024] PAGE, short_user[1024] PAGE, short_pt[1024] PAGE;
static u64 pdpt[512] PAGE, low_pd[512] PAGE, user_pd[512] PAGE, user_pt[512] PAGE, pd[512] PAGE, pt[512] PAGE;
static const word TEST = 0x80000000 | PAGE_UNDER_TEST;

static void paging_on(word root, word cr4)
{
    write_cr4(cr4);
    write_cr3(root);
    write_cr0(read_cr0() | 0x80010000);
}

static void modes(const struct features *has)
{
    static struct mode two = {"2-level", 2, 0, {0}, {0, 9, 512 + 2}, 0};
    static struct mode pae = {"PAE", 2, 1, {0}, {0, 9, 4}, 0};
    u32 n, i;
    user_page = 1UL << 30;
    /* By 4 KiB pages: the machine must stay mapped without CR4.PSE. */
    for (n = 0; n < 4; n++) {
        for (i = 0; i < 1024; i++)
            short_low[n][i] = n << 22 | i << 12 | (u32)USED;
        short_root[n] = (word)short_low[n] | (u32)USED;
    }
    short_user[0] = (word)user_code | (u32)USED | U;
    short_root[256] = (word)short_user | (u32)USED | U;
    two.table[2] = short_root;
    two.table[1] = short_pt;
    two.address = TEST;
    install(TEST + LDT_AT);
    paging_on((word)short_root, 0);
    run(&two, has);
    write_cr0(read_cr0() & 0x7fffffff);

    for (n = 0; n < 8; n++)
        low_pd[n] = (u64)n << 21 | USED | PS;
    user_pt[0] = (word)user_code | USED | U;
    user_pd[0] = (word)user_pt | USED | U;
    pdpt[0] = (word)low_pd | P;
    pdpt[1] = (word)user_pd | P;
    pdpt[2] = (word)pd | P;
    pae.table[2] = pd;
    pae.table[1] = pt;
    pae.address = TEST;
    paging_on((word)pdpt, CR4_PAE);
    run(&pae, has);
}
#endif

void cmain(void)
{
    struct features has = features();
    const u8 *from;
    if (!has.smep)
        print("rights: this processor has no SMEP\n");
    if (!has.smap)
        print("rights: this processor has no SMAP\n");
    if (!has.nx)
        print("rights: this processor has no NX\n");
    if (!has.pse36)
        print("rights: this processor has no PSE-36\n");
    if (!has.gib_pages)
        print("rights: this processor has no 1 GiB pages\n");
    fill_page();
    for (from = user_ops; from < user_ops_end; from++)
        user_code[from - user_ops] = *from;
    modes(&has);
    leave(all_bad != 0);
}
