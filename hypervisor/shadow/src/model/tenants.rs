//! Several model guests that share a machine's frames: the frame allocator, the counters and [`crate::cache`] are the
//! real ones.

use core::cell::{Cell, RefCell};
use core::sync::atomic::AtomicU64;
use std::rc::Rc;
use std::vec::Vec;

use memory::counters::Writer;
use memory::{Counters, Event, FrameAllocator, GuestId, Gva, Marks, Owner, Pfn, Population};

use super::machine::{Landed, Machine, config};
use super::surroundings::{Frames, Surroundings};
use crate::cache::{Cache, Tenant};
use crate::reclaim::next_guest;
use crate::{Access, Fill, Flush, Mmu, Paging, walk};

/// The first frame of the allocator.
const FIRST_FRAME: Pfn = Pfn(1);
/// Frames that the machine has beyond what its guests may use.
const KEPT_FRAMES: u64 = 64;
/// Exits after which an access must have landed.
const ATTEMPTS_MAX: u32 = 1000;

/// What gives way when frames run low.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The order of this crate.
    #[default]
    Ours,
    /// What KVM did until 2024, see `reclaim/first_guest.rs`.
    FirstGuestOldestPage,
}

/// A guest, and what it counts for the comparison.
pub struct Guest {
    id: GuestId,
    vcpus: u32,
    held_frames: AtomicU64,
    guarantee_frames: u64,
    pub machine: RefCell<Machine>,
    /// Page faults that were the hypervisor's: what the guest pays.
    pub fills: Cell<u64>,
    /// How much of the machine's counts has been handed to the counters: pages allocated, pages freed.
    counted: Cell<(u64, u64)>,
}

impl Tenant for Guest {
    fn id(&self) -> GuestId {
        self.id
    }
    fn vcpus(&self) -> u32 {
        self.vcpus
    }
    fn held_frames(&self) -> &AtomicU64 {
        &self.held_frames
    }
    fn guarantee_frames(&self) -> u64 {
        self.guarantee_frames
    }
}

/// The machine.
pub struct Tenants<'a> {
    frames: FrameAllocator,
    tables: Rc<Frames>,
    counters: &'a Counters,
    writers: Vec<Writer<'a>>,
    pub guests: Vec<Rc<Guest>>,
    policy: Policy,
    /// The guest that the other policy takes from next.
    turn: Cell<usize>,
    /// The core that works now.
    core: Cell<usize>,
    /// Frames free before any guest began.
    at_rest: u64,
}

/// What the machine has, and how it is shared.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// RAM of each guest, in blocks of 2 MiB.
    pub blocks: u64,
    /// Virtual processors of each guest.
    pub vcpus: u32,
    /// Most shadow pages of a guest.
    pub pages_max: u32,
    /// Frames for the shadow pages of all.
    pub budget_frames: u64,
    /// What gives way.
    pub policy: Policy,
}

impl<'a> Tenants<'a> {
    /// A guest for each of `guarantees`, the frames that reclaim for others leaves to it. Guests are on the cores of
    /// `counters` in turn.
    pub fn new(counters: &'a Counters, setup: Setup, guarantees: &[u64]) -> Tenants<'a> {
        let Setup { blocks, vcpus, pages_max, budget_frames, policy } = setup;
        let writers: Vec<Writer<'a>> = (0..).map_while(|core| counters.writer(core)).collect();
        let tables: Rc<Frames> = Rc::default();
        let guest = |(number, &guarantee_frames)| {
            let mut machine = Machine::configured(blocks, config(pages_max, vcpus));
            machine.host.frames = Rc::clone(&tables);
            Rc::new(Guest {
                id: GuestId::new(number).unwrap_or_else(|| unreachable!("so few guests have numbers")),
                vcpus,
                held_frames: AtomicU64::new(0),
                guarantee_frames,
                machine: RefCell::new(machine),
                fills: Cell::new(0),
                counted: Cell::new((0, 0)),
            })
        };
        let guests: Vec<Rc<Guest>> = (0..).zip(guarantees).map(guest).collect();
        let kept_frames = guests.iter().map(|guest| guest.unreclaimable_frames()).sum();
        let available_frames = budget_frames + KEPT_FRAMES;
        let marks = Marks::for_budget(available_frames, budget_frames, kept_frames, KEPT_FRAMES).ok();
        let frames = FrameAllocator::new(&[(FIRST_FRAME, available_frames)], writers.len(), marks);
        Tenants {
            at_rest: frames.free_frames(),
            frames,
            tables,
            counters,
            writers,
            guests,
            policy,
            turn: Cell::new(0),
            core: Cell::new(0),
        }
    }

    /// From here on the guest's vCPU number `vcpu` is the one that acts.
    pub fn turn_to(&self, number: usize, vcpu: u8) {
        let machine = &mut *self.guests[number].machine.borrow_mut();
        while machine.cpu.vcpu != vcpu {
            machine.next_vcpu();
        }
    }

    /// One access of a guest's, with all the exits that it takes.
    ///
    /// # Panics
    /// If it comes to no end.
    pub fn access(&self, number: usize, gva: Gva, access: Access) -> Landed {
        let landed = (0..ATTEMPTS_MAX).find_map(|_| self.attempt(number, gva, access));
        landed.unwrap_or_else(|| panic!("no progress at {gva:?}"))
    }

    /// One try of an access: where it landed, or `None` after the exit that a missing translation takes.
    ///
    /// # Panics
    /// If the guest starves: with a legal budget none does.
    pub fn attempt(&self, number: usize, gva: Gva, access: Access) -> Option<Landed> {
        let guest = &self.guests[number];
        self.core.set(number % self.writers.len());
        let found = {
            let machine = &mut *guest.machine.borrow_mut();
            if let Some(gpa) = machine.hardware(gva, access) {
                return Some(Landed::Ram(gpa));
            }
            machine.exit();
            match walk::walk(&machine.cpu.paging, &machine.host.ram, gva, access) {
                Err(fault) => return Some(Landed::Fault(fault)),
                Ok(found) => found,
            }
        };
        guest.fills.set(guest.fills.get() + 1);
        loop {
            let outcome = {
                let machine = &mut *guest.machine.borrow_mut();
                machine.mmu.fill(&machine.host, &machine.cpu, gva, access, &found)
            };
            self.hand_over(guest);
            match outcome {
                Fill::Filled | Fill::Changed => return None,
                Fill::Mmio(gpa) => return Some(Landed::Mmio(gpa)),
                Fill::EmulateWrite(gpa) => return Some(Landed::Ram(gpa)),
                Fill::Short => self.bring(guest, false),
            }
        }
    }

    /// MOV to CR3, or any change of the paging mode.
    ///
    /// # Panics
    /// If the guest starves.
    pub fn load(&self, number: usize, paging: Paging) {
        let guest = &self.guests[number];
        self.core.set(number % self.writers.len());
        loop {
            let loaded = {
                let machine = &mut *guest.machine.borrow_mut();
                machine.exit();
                machine.cpu.paging = paging;
                machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All)
            };
            self.hand_over(guest);
            if loaded.is_ok() {
                return;
            }
            self.bring(guest, paging.mode.shadow_is_pae());
        }
    }

    fn bring(&self, guest: &Guest, below_4g: bool) {
        if self.supply(guest, below_4g).is_err() {
            panic!("guest {} starves", guest.id.index());
        }
    }

    /// Adds an exit's counts to those of the core that works.
    fn hand_over(&self, guest: &Guest) {
        let host = &guest.machine.borrow().host;
        let (allocated, freed) = guest.counted.get();
        let writer = &self.writers[self.core.get()];
        (allocated..host.allocated.get()).for_each(|_| writer.shadow_page_allocated());
        writer.shadow_pages_freed(host.freed.get() - freed);
        guest.counted.set((host.allocated.get(), host.freed.get()));
    }

    /// The guest ends: all that it had is free again.
    pub fn end(&self, number: usize) {
        let guest = &self.guests[number];
        {
            let machine = &mut *guest.machine.borrow_mut();
            machine.exit();
            machine.mmu.drop_root(&mut machine.cpu);
        }
        self.drop_all(guest);
    }

    /// Frames that nobody holds, and those before any guest began.
    pub fn free_frames(&self) -> (u64, u64) {
        (self.frames.free_frames(), self.at_rest)
    }

    /// Audits every guest, and compares the three accounts of what lives: the counters, the guests' own, and the frame
    /// table.
    ///
    /// # Panics
    /// If anything is wrong.
    pub fn audit(&self) {
        let (mut live, mut held) = (0, 0);
        for guest in &self.guests {
            let mut machine = guest.machine.borrow_mut();
            machine.audit();
            let owned = self.frames.owned_by(Owner::Shadow(guest.id));
            assert_eq!(owned, machine.mmu.frames(), "the frame table knows what the guest holds");
            live += machine.host.allocated.get() - machine.host.freed.get();
            held += owned;
        }
        assert_eq!(self.counters.shadow_pages(), Population::Exact(live));
        assert_eq!(self.frames.free_frames() + held, self.at_rest, "no frame is lost");
    }

    /// What all guests' MMUs have counted.
    pub fn total(&self, event: Event) -> u64 {
        (0..self.guests.len()).map(|number| self.count_of(number, event)).sum()
    }

    /// What one guest's MMU has counted.
    pub fn count_of(&self, number: usize, event: Event) -> u64 {
        let counts = self.guests[number].machine.borrow().mmu.stats().each();
        counts.filter(|&(counted, _)| counted == event).map(|(_, count)| count).sum()
    }
}

impl Cache for Tenants<'_> {
    type Tenant = Guest;
    type Handle = Rc<Guest>;
    type Host<'b> = Surroundings;
    type Tables = Frames;

    fn frames(&self) -> &FrameAllocator {
        &self.frames
    }
    fn tables(&self) -> &Frames {
        &self.tables
    }
    fn core(&self) -> usize {
        self.core.get()
    }
    fn count(&self, event: Event) {
        self.writers[self.core.get()].count(event);
    }
    fn next_guest(&self, without: u64) -> Option<Rc<Guest>> {
        let asked = || self.guests.iter().filter(|guest| without >> guest.id.index() & 1 == 0);
        asked().nth(next_guest(asked().map(|guest| guest.share()))?).cloned()
    }
    fn with<R>(&self, guest: &Guest, f: impl FnOnce(&mut Mmu, &Surroundings) -> R) -> R {
        let result = {
            let machine = &mut *guest.machine.borrow_mut();
            f(&mut machine.mmu, &machine.host)
        };
        self.hand_over(guest);
        result
    }
    fn first_guest(&self) -> Option<Rc<Guest>> {
        let turn = self.turn.get();
        self.turn.set((turn + 1) % self.guests.len());
        self.guests.get(turn).cloned()
    }
    fn shrink(&self) -> u64 {
        match self.policy {
            Policy::Ours => crate::cache::shrink(self),
            Policy::FirstGuestOldestPage => crate::reclaim::first_guest::shrink(self),
        }
    }
}
