//! Translations that the emulator used last: a TLB of our own, for the accesses that the guest cannot make by
//! itself. A walk of the guest's four levels costs more than all else that an access to a device does.
//!
//! It forgets whatever the guest flushes, as the processor's TLB must: all at a change of the address space or its
//! rules, and at INVLPG. What it still holds after a guest changed an entry without a flush is what a TLB may hold.
//!
//! That holds for several vCPUs too: a processor's TLB is flushed by that processor alone, so the guest must have each
//! vCPU flush for itself, and each forgets here when it does. Nor need it hear of what reclaim and the write tracker
//! remove: it holds no frames but guest page numbers, which the guest's RAM answers for as long as the guest lives, and
//! every write of the emulator's asks the tracker anew, whatever led it to the page.

use core::cell::Cell;

use memory::{Gfn, Gva};
use shadow::{Access, Kind};

/// Pages that are kept for each kind of access: fetches must not drive out the data.
const PAGES: usize = 4;
const ENTRIES: usize = 3 * PAGES;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// The page's address, and below it who may access it how; 0: empty.
    key: u64,
    gfn: u64,
}

/// The last few translations, by page and access.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    entries: [Cell<Entry>; ENTRIES],
    /// Something was noted since all was forgotten.
    holds: Cell<bool>,
}

/// Of an access that the guest's tables allowed: the same access to this page will be allowed again.
#[inline]
fn key(gva: Gva, access: Access) -> u64 {
    let kind = slot(Gva(0), access.kind) as u64;
    gva.0 & !0xfff | u64::from(access.user) << 5 | u64::from(access.smap_overridden) << 4 | (kind + 1)
}

#[inline]
fn slot(gva: Gva, kind: Kind) -> usize {
    let first = match kind {
        Kind::Read => 0,
        Kind::Write => PAGES,
        Kind::Fetch => 2 * PAGES,
    };
    first + (gva.0 >> 12) as usize % PAGES
}

impl Recent {
    /// Where the page of `gva` is, if that is known.
    #[inline]
    pub fn find(&self, gva: Gva, access: Access) -> Option<Gfn> {
        let key = key(gva, access);
        let entry = self.entries[slot(gva, access.kind)].get();
        (entry.key == key).then_some(Gfn(entry.gfn))
    }

    /// A walk found the page of `gva`, and set its A and D bits as the access demands.
    #[inline]
    pub fn note(&self, gva: Gva, access: Access, gfn: Gfn) {
        let key = key(gva, access);
        self.entries[slot(gva, access.kind)].set(Entry { key, gfn: gfn.0 });
        self.holds.set(true);
    }

    /// The guest flushed something.
    #[inline]
    pub fn forget(&self) {
        if self.holds.replace(false) {
            for entry in &self.entries {
                entry.set(Entry::default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Access = Access { kind: Kind::Read, user: false, smap_overridden: false };

    #[test]
    fn only_the_same_page_and_access_is_found() {
        let recent = Recent::default();
        assert_eq!(recent.find(Gva(0), READ), None);
        recent.note(Gva(0x5000), READ, Gfn(7));
        assert_eq!(recent.find(Gva(0x5fff), READ), Some(Gfn(7)));
        assert_eq!(recent.find(Gva(0x6000), READ), None);
        for other in [
            Access { kind: Kind::Write, ..READ },
            Access { kind: Kind::Fetch, ..READ },
            Access { user: true, ..READ },
            Access { smap_overridden: true, ..READ },
        ] {
            assert_eq!(recent.find(Gva(0x5000), other), None);
        }
        recent.forget();
        assert_eq!(recent.find(Gva(0x5000), READ), None);
    }
}
