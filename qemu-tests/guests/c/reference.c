/*
 * The access rights of the Intel SDM, Vol. 3, chapter "Paging", written down a third time: the hypervisor has them
 * in its walk, and again in the shadow entries it makes. Nothing is shared with either.
 */
#include "reference.h"

static u64 bits(int high, int low) { return high < low ? 0 : (~0ULL >> (63 - high)) & (~0ULL << low); }

/* "Page size": whether an entry maps a page. */
static int maps_page(const struct paging *p, int level, u64 entry)
{
    if (level == 1)
        return 1;
    if (!p->wide)
        return p->pse && (entry & PS) != 0;
    return level <= 3 && (entry & PS) != 0;
}

/* The bits that must be 0: tables "Format of a ... Entry" of each paging mode. */
static u64 reserved(const struct paging *p, int level, u64 entry)
{
    u64 mask;
    if (!p->wide) {
        /* "Format of a 32-Bit Page-Directory Entry that Maps a 4-MByte Page". */
        int m = p->maxphyaddr < 40 ? p->maxphyaddr : 40;
        if (level == 1 || !maps_page(p, level, entry))
            return 0;
        return p->pse36 ? bits(21, m - 19) : bits(21, 13);
    }
    mask = bits(51, p->maxphyaddr);
    if (!p->nxe)
        mask |= NX;
    if (p->levels == 2) /* PAE; 4-level paging ignores these */
        mask |= bits(62, 52);
    if (level == 4)
        mask |= PS;
    if (level == 3 && !p->gib_pages)
        mask |= PS;
    if (level == 3 && (entry & PS))
        mask |= bits(29, 13);
    if (level == 2 && (entry & PS))
        mask |= bits(20, 13);
    return mask;
}

/* "Determination of Access Rights". `u`, `w`, `x`: what all entries on the way permit. */
static int permitted(const struct paging *p, int u, int w, int x, const struct access *a)
{
    if (a->cpl3 && !a->implicit) {
        /* User-mode accesses. */
        if (!u)
            return 0;
        if (a->fetch)
            return x;
        return a->write ? w : 1;
    }
    /* Supervisor-mode accesses. */
    if (a->fetch) {
        if (u && p->smep)
            return 0;
        return x;
    }
    if (u && p->smap && (a->implicit || !a->ac))
        return 0;
    if (a->write && p->wp)
        return w;
    return 1;
}

/* "Interrupt 14 - Page-Fault Exception (#PF)", and "Page-Fault Exceptions". */
static struct outcome fault(const struct paging *p, const struct access *a, u32 error, int level)
{
    if (a->write)
        error |= ERROR_W;
    if (a->cpl3 && !a->implicit)
        error |= ERROR_U;
    if (a->fetch && (p->smep || (p->wide && p->nxe)))
        error |= ERROR_FETCH;
    return (struct outcome){1, error, level};
}

struct outcome reference(const struct paging *p, const u64 *entry, const struct access *a)
{
    int u = 1, w = 1, x = 1, level;
    for (level = p->levels;; level--) {
        u64 e = entry[level];
        if (!(e & P))
            return fault(p, a, 0, level);
        if (e & reserved(p, level, e))
            return fault(p, a, ERROR_P | ERROR_RESERVED, level);
        u &= (e & U) != 0;
        w &= (e & W) != 0;
        x &= !(p->wide && p->nxe && (e & NX));
        if (maps_page(p, level, e))
            break;
    }
    if (!permitted(p, u, w, x, a))
        return fault(p, a, ERROR_P, level);
    return (struct outcome){0, 0, level};
}
