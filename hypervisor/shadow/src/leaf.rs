//! The sptes of one guest leaf table, many at a time: what they have in common is looked up once, and the guest's
//! entries are read a group at a time. A prefill and the sync of a leaf table cost what they cost here.

use memory::{Gfn, Gpa, GuestMemory, TableMemory};

use crate::defect::{Defect, has};
use crate::host::Host;
use crate::mmu::Mmu;
use crate::pages::{PageId, ShadowPage, Sptes};
use crate::paging::{Mode, Rights, bits};
use crate::role::Role;
use crate::spte;
use crate::walk;

/// Guest entries read at once: an aligned group.
pub(crate) const GROUP: usize = 16;

/// A shadow page at level 1 with a guest table behind it.
pub(crate) struct LeafTable {
    pub at: Sptes,
    gfn: Gfn,
    /// The guest's entry behind spte 0.
    first: u64,
    /// The guest's entries are those of 32-bit paging.
    short: bool,
    /// What the role leaves.
    rights: Rights,
    /// Bits that no entry may have.
    reserved: u64,
}

impl LeafTable {
    /// Where the guest's entry behind spte `index` lies.
    #[inline]
    fn address(&self, index: usize) -> Gpa {
        let entry = self.first + index as u64;
        Gpa(self.gfn.address().0 + if self.short { entry * 4 } else { entry * 8 })
    }

    /// Reads the guest's entries behind sptes `first..first + GROUP`, `first` a multiple of that. All 0, which is not
    /// present, if they are no RAM.
    #[inline]
    pub fn entries<G: GuestMemory>(&self, guest: &G, first: usize) -> [u64; GROUP] {
        let mut entries = [0; GROUP];
        let address = self.address(first);
        if !self.short {
            if guest.load_words(address, &mut entries).is_err() {
                entries = [0; GROUP];
            }
            return entries;
        }
        let mut pairs = [0; GROUP / 2];
        if guest.load_words(address, &mut pairs).is_ok() {
            for (two, pair) in entries.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                two[0] = pair & 0xffff_ffff;
                two[1] = pair >> 32;
            }
        }
        entries
    }

    /// Reads the guest's entry behind spte `index`.
    #[inline]
    pub fn entry<G: GuestMemory>(&self, guest: &G, index: usize) -> u64 {
        walk::load(self.short, guest, self.address(index))
    }

    /// The guest page and the rights that a processor could have cached of `gpte`; `None` where it could have
    /// cached nothing: an entry with A clear is one that no processor has used.
    #[inline]
    pub fn cacheable(&self, gpte: u64) -> Option<(Gfn, Rights)> {
        let cached = if has(Defect::SyncKeepsUnused) { bits::P } else { bits::P | bits::A };
        if gpte & cached != cached || gpte & self.reserved != 0 {
            return None;
        }
        let rights = self.rights.and(Rights::of_entry(gpte));
        // The next write has to set D.
        let rights = if gpte & bits::D == 0 { rights.without(Rights::WRITE) } else { rights };
        Some((Gpa(gpte & if self.short { 0xffff_f000 } else { bits::FRAME }).page(), rights))
    }
}

impl Mmu {
    /// The shadow page `id`, which is at level 1 and not direct.
    #[inline]
    pub(crate) fn leaf_table(&self, id: PageId) -> LeafTable {
        let ShadowPage { gfn, role, .. } = self.pages[id];
        let paging = self.paging_of(role);
        LeafTable {
            at: self.pages.sptes(id),
            gfn,
            first: Self::guest_index(role, 0),
            short: paging.mode == Mode::TwoLevel,
            rights: role.rights(),
            reserved: paging.reserved(1, 0),
        }
    }

    /// Makes the non-empty sptes of a leaf table say what the guest's entries now say, or empties them.
    pub(crate) fn reconcile_leaves<H: Host>(&mut self, host: &H, id: PageId) {
        let leaf = self.leaf_table(id);
        for first in (0..512).step_by(GROUP) {
            let mut present = self.pages[id].group(first, GROUP);
            if present == 0 {
                continue;
            }
            let gptes = leaf.entries(host.guest(), first);
            while present != 0 {
                let bit = present.trailing_zeros() as usize;
                present &= present - 1;
                self.reconcile_leaf(host, &leaf, first + bit, gptes[bit % GROUP]);
            }
        }
    }

    /// The same for one spte, where it is not empty.
    pub(crate) fn reconcile_one<H: Host>(&mut self, host: &H, id: PageId, index: usize) {
        if self.pages[id].group(index, 1) != 0 {
            let leaf = self.leaf_table(id);
            let gpte = leaf.entry(host.guest(), index);
            self.reconcile_leaf(host, &leaf, index, gpte);
        }
    }

    /// Makes the non-empty spte `index` say what the guest's entry `gpte` behind it says, or empties it.
    #[inline]
    fn reconcile_leaf<H: Host>(&mut self, host: &H, leaf: &LeafTable, index: usize, gpte: u64) {
        let Some((target, rights)) = leaf.cacheable(gpte) else {
            self.clear_at(host, leaf.at, index);
            return;
        };
        let old = host.tables().load(leaf.at.table, index);
        let Some((guest_page, pfn)) = host.slots().page(target) else {
            // The mark stays where the entry still leads to no RAM, nor to the page that stands for a device.
            if old != spte::MMIO || self.device.is_some_and(|(gfn, _)| gfn == target) {
                self.clear_at(host, leaf.at, index);
            }
            return;
        };
        let rights =
            if has(Defect::SyncGrantsWrite) { rights } else { self.tracked_rights(guest_page, rights) };
        let new = spte::leaf(pfn, 1, rights);
        if new == old {
            return;
        }
        if spte::same_frame(old, new) {
            host.tables().store(leaf.at.table, index, new);
            self.narrowed |= spte::narrows(old, new);
            return;
        }
        self.clear_at(host, leaf.at, index);
        self.add_leaf(host, leaf.at, index, guest_page, new);
    }

    /// Whether a page with `role` is a [`LeafTable`].
    pub(crate) fn is_leaf_table(role: Role) -> bool {
        role.level() == 1 && !role.is_direct()
    }

    /// `rights` without write where the guest page holds a table whose shadow relies on hearing of every write.
    #[inline]
    pub(crate) fn tracked_rights(&self, guest_page: usize, rights: Rights) -> Rights {
        if rights.has(Rights::WRITE) && self.is_tracked(guest_page) {
            rights.without(Rights::WRITE)
        } else {
            rights
        }
    }
}
