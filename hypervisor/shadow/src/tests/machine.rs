//! A model machine: a guest's RAM, its shadow MMU, and vCPUs that run on the model processor.

use memory::{Gpa, GuestMemory, Gva, PAGE_SHIFT, Pfn};
use proptest::prelude::ProptestConfig;

use super::processor::Processor;
use super::surroundings::Surroundings;
use crate::paging::bits;
use crate::{
    Access, Config, FRAMES_PER_OPERATION, Fill, Kind, Mmu, Mode, PAGES_PER_OPERATION, PageFault, Paging,
    Stats, VcpuMmu, walk,
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

/// The machine.
pub struct Machine {
    pub host: Surroundings,
    pub mmu: Mmu,
    /// The vCPU that runs.
    pub cpu: VcpuMmu,
    /// The others, in the order of their numbers, without the one that runs.
    parked: Vec<VcpuMmu>,
    processor: Processor,
    /// The frame that was provided last.
    pub next_frame: u64,
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
            processor: Processor::default(),
            next_frame: 1,
            exits: 0,
        }
    }

    /// Lets another vCPU run: the next one in turn.
    pub fn next_vcpu(&mut self) {
        let next = self.parked.remove(0);
        self.parked.push(core::mem::replace(&mut self.cpu, next));
    }

    /// Makes ready for an operation, as the exit path does before it takes the lock.
    pub fn ready(&mut self) {
        if !self.mmu.is_ready() && self.mmu.pages_left() < PAGES_PER_OPERATION {
            let gone = self.mmu.reclaim(&self.host, 16);
            assert!(gone > 0, "reclaim makes room");
        }
        self.release();
        while self.mmu.stash_frames() < FRAMES_PER_OPERATION {
            self.next_frame += 1;
            self.mmu.provide(Pfn(self.next_frame)).unwrap();
        }
    }

    /// Every vCPU flushes, then the zapped tables' frames are free.
    pub fn release(&mut self) {
        self.flush_tags();
        self.mmu.release(&self.host, self.host.generation.get());
    }

    /// What every entry begins with, here for all vCPUs at once: a tag that is older than the flush generation is
    /// flushed.
    fn flush_tags(&mut self) {
        let now = self.host.generation.get();
        for cpu in core::iter::once(&mut self.cpu).chain(&mut self.parked) {
            if !cpu.is_good(now) {
                self.processor.flush(cpu.vcpu, cpu.tag());
                cpu.flushed(now);
            }
        }
    }

    /// MOV to CR3, or any change of the paging mode.
    pub fn set_paging(&mut self, paging: Paging) {
        self.cpu.paging = paging;
        self.ready();
        self.mmu.load_root(&self.host, &mut self.cpu).unwrap();
    }

    /// A flush of everything.
    pub fn flush(&mut self) {
        self.mmu.flush(&self.host, &self.cpu);
    }

    /// INVLPG.
    pub fn invlpg(&mut self, gva: Gva) {
        self.mmu.invlpg(&self.host, &self.cpu, gva);
    }

    /// What the processor does without an exit: the guest physical address, or `None` for a #PF.
    pub fn hardware(&mut self, gva: Gva, access: Access) -> Option<Gpa> {
        let now = self.host.generation.get();
        if !self.cpu.is_good(now) {
            self.processor.flush(self.cpu.vcpu, self.cpu.tag());
            self.cpu.flushed(now);
        }
        let context = (self.cpu.vcpu, self.cpu.tag());
        let (root, paging) = (self.cpu.root_table(), &self.cpu.paging);
        let pfn = self.processor.translate(&self.host.frames, context, root, paging, gva, access).ok()?;
        let gfn = self.host.owned(pfn).expect("the guest's own frame");
        Some(Gpa(gfn.0 << PAGE_SHIFT | gva.offset()))
    }

    /// One access of the guest's, with all the exits that it takes.
    pub fn access(&mut self, gva: Gva, access: Access) -> Landed {
        for _ in 0..8 {
            if let Some(gpa) = self.hardware(gva, access) {
                return Landed::Ram(gpa);
            }
            self.exits += 1;
            let found = match walk::walk(&self.cpu.paging, &self.host.ram, gva, access) {
                Err(fault) => return Landed::Fault(fault),
                Ok(found) => found,
            };
            self.ready();
            match self.mmu.fill(&self.host, &self.cpu, gva, access, &found) {
                Fill::Filled | Fill::Changed => {}
                Fill::Mmio(gpa) => return Landed::Mmio(gpa),
                Fill::EmulateWrite(gpa) => {
                    self.mmu.before_write(&self.host, gpa.page());
                    return Landed::Ram(gpa);
                }
                Fill::Short => panic!("the stash was filled"),
            }
        }
        panic!("no progress at {gva:?} {access:?}");
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

    /// What the guest's tables say, by the architecture; sets no bits.
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

/// `cases` random guests, or as many as PROPTEST_CASES says.
pub fn random_guests(cases: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases, ..config } }
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
