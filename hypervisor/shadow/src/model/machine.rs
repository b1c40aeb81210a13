//! A model machine: a guest's RAM, its shadow MMU, and vCPUs that run on the model processor.

use std::vec::Vec;

use memory::{Gpa, GuestMemory, Gva, PAGE_SHIFT, Pfn};

use super::processor::Context;
use super::reference::Attempt;
use super::surroundings::Surroundings;
use crate::paging::bits;
use crate::{
    Access, Config, FRAMES_PER_OPERATION, Fill, Flush, Kind, Mmu, Mode, PAGES_PER_OPERATION, PageFault,
    Paging, Short, Stats, VcpuMmu, walk,
};

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// In RAM.
    Ram(Gpa),
    /// Nowhere in RAM: to be emulated.
    Mmio(Gpa),
    /// The guest's own fault.
    Fault(PageFault),
}

/// A supervisor's read.
pub const READ: Access = Access { kind: Kind::Read, user: false, smap_overridden: false };
/// A supervisor's write.
pub const WRITE: Access = Access { kind: Kind::Write, user: false, smap_overridden: false };
/// A supervisor's fetch.
pub const FETCH: Access = Access { kind: Kind::Fetch, user: false, smap_overridden: false };

/// `access`, made at CPL 3.
pub const fn by_user(access: Access) -> Access {
    Access { user: true, smap_overridden: false, ..access }
}

/// The same in the reference's words.
pub const fn attempt(access: Access) -> Attempt {
    Attempt {
        write: matches!(access.kind, Kind::Write),
        fetch: matches!(access.kind, Kind::Fetch),
        user: access.user,
        ac: access.smap_overridden,
    }
}

/// Frames brought into the stash at a time.
const SUPPLY_FRAMES: usize = 2 * FRAMES_PER_OPERATION;

/// The machine.
pub struct Machine {
    pub host: Surroundings,
    pub mmu: Mmu,
    /// The vCPU that runs, and that the exits are of. The others are in the guest meanwhile.
    pub cpu: VcpuMmu,
    /// The others, in the order of their numbers, without the one that runs.
    parked: Vec<VcpuMmu>,
    /// The frame that was provided last, of those that were never used before.
    pub next_frame: u64,
    /// Frames that the MMU gave back.
    spare: Vec<Pfn>,
    /// Page-fault exits so far.
    pub exits: u64,
}

impl Machine {
    /// With `blocks` of 2 MiB of RAM, a cache of `pages_max` shadow pages, and one vCPU.
    pub fn new(blocks: u64, pages_max: u32) -> Machine {
        Machine::with(blocks, pages_max, false)
    }

    /// The same, on a processor that may need its executable pages small.
    pub fn with(blocks: u64, pages_max: u32, split_executable: bool) -> Machine {
        Machine::configured(blocks, Config { split_executable, ..config(pages_max, 1) })
    }

    /// With everything told.
    pub fn configured(blocks: u64, config: Config) -> Machine {
        let host = Surroundings::new(blocks);
        let mmu = Mmu::new(config, &host.slots);
        Machine {
            host,
            mmu,
            cpu: VcpuMmu::new(0),
            parked: (1..config.vcpus as u8).map(VcpuMmu::new).collect(),
            next_frame: 1,
            spare: Vec::new(),
            exits: 0,
        }
    }

    /// Lets another vCPU run: the next one in turn.
    pub fn next_vcpu(&mut self) {
        let next = self.parked.remove(0);
        self.parked.push(core::mem::replace(&mut self.cpu, next));
        self.host.cores.get_mut().acting = self.cpu.vcpu;
    }

    /// All vCPUs, the one that runs first.
    pub fn vcpus(&self) -> impl Iterator<Item = &VcpuMmu> {
        core::iter::once(&self.cpu).chain(&self.parked)
    }

    /// The vCPU leaves the guest: what follows is the hypervisor's.
    pub fn exit(&mut self) {
        let cores = self.host.cores.get_mut();
        cores.running[usize::from(self.cpu.vcpu)] = None;
    }

    /// The vCPU enters the guest, if it is not in it: a tag that is older than the flush generation is flushed.
    fn enter(&mut self) -> Context {
        let now = self.host.generation.get();
        let context = context(&self.cpu);
        let cores = self.host.cores.get_mut();
        let running = &mut cores.running[usize::from(self.cpu.vcpu)];
        if *running != Some(context) {
            *running = Some(context);
            if !self.cpu.is_good(now) {
                cores.processor.flush(context.vcpu, context.tag);
                self.cpu.flushed(now);
            }
        }
        context
    }

    /// Makes ready for an operation, as the exit path does before it takes the lock.
    pub fn ready(&mut self) {
        self.exit();
        if !self.mmu.is_ready() && self.mmu.pages_left() < PAGES_PER_OPERATION {
            let gone = self.mmu.reclaim(&self.host, 16);
            assert!(gone > 0, "reclaim makes room");
        }
        self.release();
        while self.mmu.stash_frames() < FRAMES_PER_OPERATION || !self.mmu.has_low_frame() {
            for _ in 0..SUPPLY_FRAMES {
                let frame = self.spare.pop().unwrap_or_else(|| {
                    self.next_frame += 1;
                    Pfn(self.next_frame)
                });
                if self.mmu.provide(frame).is_err() {
                    self.spare.extend(self.mmu.take_back());
                    self.spare.push(frame);
                }
            }
        }
    }

    /// The allocator takes back what is in the stash.
    pub fn drain(&mut self) {
        self.spare.extend(core::iter::from_fn(|| self.mmu.take_back()));
    }

    /// Whether nobody uses the frame.
    pub fn is_free(&self, frame: Pfn) -> bool {
        self.spare.contains(&frame) || self.mmu.stash.contains(&frame)
    }

    /// Every vCPU flushes, then the zapped tables' frames are free.
    pub fn release(&mut self) {
        use crate::Host;
        self.host.shoot_down();
        self.mmu.release(&self.host, self.host.generation.get());
    }

    /// MOV to CR3 without PCIDs, or any change of the paging mode.
    pub fn set_paging(&mut self, paging: Paging) {
        self.load(paging, Flush::All);
    }

    /// MOV to CR3, with or without bit 63.
    pub fn load(&mut self, paging: Paging, flush: Flush) {
        self.exit();
        self.cpu.paging = paging;
        if self.mmu.load_root(&self.host, &mut self.cpu, flush) == Err(Short) {
            self.ready();
            self.mmu.load_root(&self.host, &mut self.cpu, flush).unwrap();
        }
    }

    /// A flush of everything.
    pub fn flush(&mut self) {
        self.exit();
        self.mmu.flush(&self.host, &mut self.cpu);
    }

    /// INVLPG.
    pub fn invlpg(&mut self, gva: Gva) {
        self.exit();
        self.mmu.invlpg(&self.host, &mut self.cpu, gva);
    }

    /// What the processor does without an exit: the guest physical address, or `None` for a #PF.
    pub fn hardware(&mut self, gva: Gva, access: Access) -> Option<Gpa> {
        let context = self.enter();
        let processor = &mut self.host.cores.get_mut().processor;
        let pfn = processor.translate(&*self.host.frames, &context, gva, attempt(access)).ok()?;
        let gfn = self.host.owned(pfn).expect("the guest's own frame");
        Some(Gpa(gfn.0 << PAGE_SHIFT | gva.offset()))
    }

    /// The processor walks `gva` on its own account.
    pub fn speculate(&mut self, gva: Gva) {
        let context = self.enter();
        self.host.cores.get_mut().processor.speculate(&*self.host.frames, &context, gva);
    }

    /// One access of the guest's, with all the exits that it takes.
    pub fn access(&mut self, gva: Gva, access: Access) -> Landed {
        self.access_racing(gva, access, |_| ())
    }

    /// The same, with `meanwhile` between the walk and the fill of its first exit.
    pub fn access_racing(
        &mut self,
        gva: Gva,
        access: Access,
        meanwhile: impl FnOnce(&mut Machine),
    ) -> Landed {
        let mut meanwhile = Some(meanwhile);
        for _ in 0..10 {
            if let Some(gpa) = self.hardware(gva, access) {
                return Landed::Ram(gpa);
            }
            self.exits += 1;
            self.exit();
            let found = match walk::walk(&self.cpu.paging, &self.host.ram, gva, access) {
                Err(fault) => return Landed::Fault(fault),
                Ok(found) => found,
            };
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile(self);
            }
            match self.fill(gva, access, &found) {
                Fill::Filled | Fill::Changed => {}
                Fill::Mmio(gpa) => return Landed::Mmio(gpa),
                Fill::EmulateWrite(gpa) => {
                    self.mmu.before_write(&self.host, gpa.page());
                    return Landed::Ram(gpa);
                }
                Fill::Short => unreachable!("`fill` sees to the frames"),
            }
        }
        panic!("no progress at {gva:?} {access:?}");
    }

    /// Fills, after bringing frames if there are too few: then nothing may have been done.
    fn fill(&mut self, gva: Gva, access: Access, found: &crate::Walk) -> Fill {
        let before = self.state();
        match self.mmu.fill(&self.host, &self.cpu, gva, access, found) {
            Fill::Short => {
                assert_eq!(self.state(), before, "what is short has done nothing");
                self.ready();
                let outcome = self.mmu.fill(&self.host, &self.cpu, gva, access, found);
                assert_ne!(outcome, Fill::Short, "the stash was filled");
                outcome
            }
            outcome => outcome,
        }
    }

    /// A guest's store of eight bytes.
    pub fn store(&mut self, gva: Gva, value: u64) -> Landed {
        let result = self.access(gva, WRITE);
        if let Landed::Ram(gpa) = result {
            self.poke(gpa.0, value);
        }
        result
    }

    /// A device's store of eight bytes: through the write tracker.
    pub fn device_store(&mut self, gpa: u64, value: u64) {
        self.mmu.before_write(&self.host, Gpa(gpa).page());
        self.poke(gpa, value);
    }

    /// What the guest's tables say, by the crate's own walk; sets no bits.
    pub fn expected(&self, gva: Gva, access: Access) -> Landed {
        match walk::peek(&self.cpu.paging, &self.host.ram, gva, access) {
            Err(fault) => Landed::Fault(fault),
            Ok(found) => {
                let gpa = Gpa(found.gfn.address().0 | gva.offset());
                if self.host.slots.index(found.gfn).is_some() { Landed::Ram(gpa) } else { Landed::Mmio(gpa) }
            }
        }
    }

    /// Checks every invariant.
    pub fn audit(&mut self) {
        if let Err(violation) = self.mmu.audit(&self.host) {
            panic!("{violation:?}");
        }
        let live = self.host.allocated.get() - self.host.freed.get();
        assert!(live >= u64::from(self.mmu.live_pages()), "what lives is counted");
        super::contents::scan(self);
    }

    /// The counts that an operation which did nothing leaves as they are.
    pub fn state(&self) -> (Stats, u32, u64, usize, u64) {
        let mmu = &self.mmu;
        (*mmu.stats(), mmu.live_pages(), mmu.frames(), mmu.stash_frames(), self.host.generation.get())
    }

    /// Raw set-up of memory, before the guest runs.
    pub fn poke(&self, gpa: u64, value: u64) {
        self.host.ram.write(Gpa(gpa), &value.to_le_bytes()).unwrap();
    }

    /// The same with four bytes.
    pub fn poke_u32(&self, gpa: u64, value: u32) {
        self.host.ram.write(Gpa(gpa), &value.to_le_bytes()).unwrap();
    }

    /// Eight bytes of guest memory.
    pub fn peek(&self, gpa: u64) -> u64 {
        self.host.ram.load_u64(Gpa(gpa)).unwrap()
    }
}

/// What the hardware runs a vCPU with.
pub fn context(cpu: &VcpuMmu) -> Context {
    let paging = &cpu.paging;
    let on = paging.mode != Mode::Off;
    Context {
        vcpu: cpu.vcpu,
        tag: cpu.tag(),
        root: cpu.root_table(),
        levels: paging.mode.root_level(),
        smep: on && paging.smep,
        smap: on && paging.smap,
    }
}

/// 4-level tables at `root`: PML4, PDPT, and a PD whose 2 MiB pages map `blocks` of RAM to themselves.
pub fn identity(machine: &Machine, root: u64, blocks: u64) -> Paging {
    let flags = bits::P | bits::W | bits::U | bits::A;
    machine.poke(root, (root + 0x1000) | flags);
    machine.poke(root + 0x1000, (root + 0x2000) | flags);
    for block in 0..blocks {
        machine.poke(root + 0x2000 + 8 * block, block << 21 | flags | bits::D | bits::PS);
    }
    Paging {
        mode: Mode::FourLevel,
        cr3: root,
        nxe: true,
        wp: true,
        gib_pages: true,
        physical_address_bits: 40,
        ..Paging::default()
    }
}

/// A guest on a processor of 40 address bits, with every feature.
pub const fn config(pages_max: u32, vcpus: u32) -> Config {
    Config {
        physical_address_bits: 40,
        gib_pages: true,
        mark_mmio: true,
        split_executable: false,
        pages_max,
        vcpus,
    }
}
