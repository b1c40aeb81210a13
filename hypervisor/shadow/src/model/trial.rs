//! Runs a random guest, and compares with the architecture after each step: not only the accesses that the guest makes,
//! but every translation that the shadow or a TLB would permit.

use std::vec::Vec;
use std::{format, println};

use memory::{Gpa, GuestMemory, Gva, Pfn, TableMemory};

use super::architecture::{Claim, History, Question, Space};
use super::contents::used;
use super::machine::{Landed, Machine, READ, WRITE, attempt, config, context};
use super::processor::Context;
use super::reference::{
    Attempt, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_NXE,
    Path, Registers, permitted,
};
use super::step::{
    At, Bits, Change, MODES, Meanwhile, PAGES, PDPTS, Place, SPOTS, Step, Store, pool, pool_page,
};
use super::surroundings::{Late, Ram, VCPUS_MAX};
use crate::pages::PageId;
use crate::paging::bits;
use crate::spte::MMIO;
use crate::{Access, Config, Flush, Kind, Mode, PAGES_MIN, Paging};

/// PCIDs that the guest uses.
const PCIDS: usize = 3;

/// What a guest is like, from the first number of its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    pub mode: Mode,
    pub vcpus: u32,
    pub pages_max: u32,
    pub split_executable: bool,
    pub address_bits: u8,
    pub smep: bool,
    pub smap: bool,
    /// The vCPUs have different modes.
    pub mixed: bool,
    /// PCIDs are in use from the start.
    pub pcide: bool,
}

impl Setup {
    /// The set-up that a number stands for.
    pub fn decode(number: u64) -> Setup {
        Setup {
            mode: MODES[(number % 5) as usize],
            vcpus: 1 + (number / 5 % 4) as u32,
            pages_max: [256, 64, PAGES_MIN][(number / 20 % 3) as usize],
            split_executable: number / 60 % 4 == 3,
            address_bits: if number / 240 % 4 == 3 { 36 } else { 40 },
            smep: number / 960 % 2 == 1,
            smap: number / 1920 % 2 == 1,
            mixed: number / 3840 % 4 == 3,
            pcide: number / 15360 % 2 == 1,
        }
    }
}

/// A guest that runs.
struct Trial {
    machine: Machine,
    registers: [Registers; VCPUS_MAX],
    spaces: [[Space; PCIDS]; VCPUS_MAX],
    history: History,
    /// The address that each vCPU accessed last.
    recent: [u64; VCPUS_MAX],
    now: u64,
    /// The stores to shadow tables up to which all translations were compared.
    compared: u64,
    /// SHADOW_TRACE is set.
    traced: bool,
}

/// Eight bytes of RAM; what is none reads as 0.
fn word(ram: &Ram, gpa: u64) -> u64 {
    ram.load_u64(Gpa(gpa & !7)).unwrap_or(0)
}

/// An entry as the walker reads it.
fn entry(ram: &Ram, bytes: u64, gpa: u64) -> u64 {
    if bytes == 4 { word(ram, gpa) >> (8 * (gpa & 4)) & 0xffff_ffff } else { word(ram, gpa) }
}

/// What the hypervisor's exit path tells the MMU of the guest's registers.
fn paging(registers: &Registers, mode: Mode) -> Paging {
    let on = mode != Mode::Off;
    let (cr4, pcid) = (registers.cr4, if registers.cr4 & CR4_PCIDE == 0 { 0 } else { 0xfff });
    Paging {
        mode,
        cr3: if on { registers.cr3 & !pcid } else { 0 },
        pcid: (registers.cr4 & CR4_PCIDE != 0).then(|| registers.pcid()),
        pdptes: registers.pdpte,
        nxe: on && mode != Mode::TwoLevel && registers.efer & EFER_NXE != 0,
        wp: !on || registers.cr0 & CR0_WP != 0,
        smep: on && cr4 & CR4_SMEP != 0,
        smap: on && cr4 & CR4_SMAP != 0,
        pse: cr4 & CR4_PSE != 0,
        gib_pages: registers.gib_pages,
        physical_address_bits: registers.maxphyaddr as u8,
    }
}

/// Runs a sequence: its first number is the set-up, each of the others a step. Returns how many steps that were.
///
/// # Panics
/// Where the MMU does what the architecture does not allow, or breaks an invariant of its own.
pub fn run(numbers: &[u64]) -> u64 {
    let Some((&first, steps)) = numbers.split_first() else { return 0 };
    let mut trial = Trial::new(Setup::decode(first));
    for &number in steps {
        trial.step(Step::decode(number));
    }
    trial.end();
    steps.len() as u64
}

impl Trial {
    fn new(setup: Setup) -> Trial {
        let machine = Machine::configured(
            4,
            Config {
                split_executable: setup.split_executable,
                physical_address_bits: setup.address_bits,
                ..config(setup.pages_max, setup.vcpus)
            },
        );
        for page in 0..PAGES {
            for (spot, word) in SPOTS.into_iter().enumerate() {
                machine.poke(pool(page) + 8 * word, pool((page + spot as u64 + 1) % PAGES) | 0x67);
            }
        }
        for page in PAGES..PAGES + PDPTS {
            for index in 0..4 {
                machine.poke(pool(page) + 8 * index, pool((page + index) % PAGES) | 1);
            }
        }
        let words = |page: u64| SPOTS.into_iter().chain([2, 3]).map(move |word| pool(page) + 8 * word);
        let history = History::new((0..PAGES + PDPTS).flat_map(words), |gpa| word(&machine.host.ram, gpa));
        let registers = Registers {
            cr0: CR0_WP,
            cr4: CR4_PSE | if setup.smep { CR4_SMEP } else { 0 } | if setup.smap { CR4_SMAP } else { 0 },
            efer: EFER_NXE,
            maxphyaddr: u32::from(setup.address_bits),
            gib_pages: true,
            ..Registers::default()
        };
        let mut trial = Trial {
            machine,
            registers: [registers; VCPUS_MAX],
            spaces: Default::default(),
            history,
            recent: [0; VCPUS_MAX],
            now: 2,
            compared: 0,
            traced: std::env::var_os("SHADOW_TRACE").is_some(),
        };
        let first = MODES.iter().position(|&mode| mode == setup.mode).unwrap_or(0);
        for vcpu in 0..setup.vcpus as usize {
            let further = if setup.mixed { vcpu } else { 0 };
            trial.mode(MODES[(first + further) % MODES.len()], 0);
            if setup.pcide {
                trial.pcide(true);
            }
            trial.next_vcpu();
        }
        trial
    }

    fn vcpu(&self) -> usize {
        usize::from(self.machine.cpu.vcpu)
    }

    fn mode_of(&self, vcpu: usize) -> Mode {
        use super::reference::Format;
        match self.registers[vcpu].format() {
            Format::None => Mode::Off,
            Format::Legacy => Mode::TwoLevel,
            Format::Pae => Mode::Pae,
            Format::Long { levels: 4 } => Mode::FourLevel,
            Format::Long { .. } => Mode::FiveLevel,
        }
    }

    fn linear(&self, at: At) -> u64 {
        self.linear_of(self.vcpu(), at)
    }

    fn linear_of(&self, vcpu: usize, at: At) -> u64 {
        let mode = self.mode_of(vcpu);
        if at != At::RECENT {
            return at.linear(mode);
        }
        self.recent[vcpu]
            & match mode {
                Mode::Off | Mode::TwoLevel | Mode::Pae => 0xffff_f000,
                Mode::FourLevel => 0xffff_ffff_f000,
                Mode::FiveLevel => 0x1ff_ffff_ffff_f000,
            }
    }

    fn next_vcpu(&mut self) {
        if self.machine.vcpus().count() > 1 {
            self.machine.next_vcpu();
        }
    }

    fn step(&mut self, step: Step) {
        self.now += 2;
        let vcpu = self.vcpu();
        match step {
            Step::Access(at, access) => _ = self.access(at, access),
            Step::Store(store, value) => self.store(store, value),
            Step::Edit { above, change } => self.edit(above, change),
            Step::Toggle(place, bit) => {
                let now = word(&self.machine.host.ram, pool(place.page) + 8 * SPOTS[place.spot as usize]);
                self.store(Store::Device(place), now ^ bit);
            }
            Step::Invlpg(at) => {
                let linear = self.linear(at);
                self.machine.invlpg(Gva(linear));
                let pcid = usize::from(self.registers[vcpu].pcid());
                self.spaces[vcpu][pcid].invlpg(self.now, linear);
                self.flushed();
            }
            Step::Cr3 { page, pcid, keep } => self.mov_to_cr3(page, pcid, keep),
            Step::Bits(bits) => self.bits(bits),
            Step::Mode(mode, page) => self.mode(mode, page),
            Step::Pcide(on) => self.pcide(on),
            Step::Invpcid { kind, pcid, at } => self.invpcid(kind, pcid, at),
            Step::Pge => {
                let mut registers = self.registers[vcpu];
                if self.reload_pdptes(&mut registers) {
                    self.registers[vcpu] = registers;
                    self.load_root(Flush::All);
                    self.flush_all_spaces();
                }
            }
            Step::Reclaim(pages) => {
                self.machine.exit();
                self.machine.mmu.reclaim(&self.machine.host, pages);
            }
            Step::Switch => self.next_vcpu(),
            Step::Race(at, access, meanwhile) => self.race(at, access, meanwhile),
            Step::Late { after, vcpu, at, spot, value } => {
                let number = vcpu as usize % self.machine.vcpus().count();
                let gva = Gva(self.linear_of(number, at));
                let word = SPOTS[spot as usize];
                self.machine.host.late.set(Some(Late { after, vcpu: number as u8, gva, word, value }));
            }
            Step::Speculate(at) => self.machine.speculate(Gva(self.linear(at))),
            Step::Drain => self.machine.drain(),
            Step::Move => {
                self.machine.exit();
                self.machine.cpu.forget_tags();
            }
        }
        self.observe(None);
        if self.traced {
            self.trace(step);
        }
        // Nothing moves while we look.
        let late = self.machine.host.late.take();
        self.machine.audit();
        self.compare();
        self.machine.host.late.set(late);
    }

    /// Shows what the step came to: for looking into a counterexample.
    fn trace(&self, step: Step) {
        let mmu = &self.machine.mmu;
        let cores = self.machine.host.cores.borrow();
        println!("vCPU {}: {step:?}", self.vcpu());
        println!(
            "  caches: {:x?}",
            cores.processor.remembered(self.machine.cpu.vcpu, self.machine.cpu.tag())
        );
        for page in (0..mmu.pages.capacity()).map(|id| &mmu.pages[PageId(id)]).filter(|page| page.live) {
            let (gfn, role, roots) = (page.gfn, page.role, page.roots);
            println!("  {gfn:x?} {role:?} in {:x?}, {roots} roots, unsync {}", page.table, page.is_unsync());
            for index in used(&self.machine, page.table) {
                println!("    {index:3}: {:#x}", self.machine.host.frames.load(page.table, index));
            }
        }
    }

    /// Everything that the guest had is given back.
    fn end(&mut self) {
        let vcpus = self.machine.vcpus().count();
        for _ in 0..vcpus {
            self.machine.exit();
            self.machine.mmu.drop_root(&mut self.machine.cpu);
            self.next_vcpu();
        }
        let (mmu, host) = (&mut self.machine.mmu, &self.machine.host);
        let pinned = (0..mmu.pages.capacity())
            .map(|id| &mmu.pages[PageId(id)])
            .find(|page| page.live && page.roots > 0);
        assert!(pinned.is_none(), "nobody runs on it: {pinned:?}");
        mmu.zap_all(host);
        mmu.release(host, host.generation.get());
        assert_eq!(mmu.live_pages(), 0);
        assert_eq!(mmu.frames(), mmu.stash_frames() as u64, "every frame is free again");
        assert_eq!(host.allocated.get(), host.freed.get(), "every page was counted once");
    }

    // ---- the guest's registers ----

    fn load_root(&mut self, flush: Flush) {
        let vcpu = self.vcpu();
        let mode = self.mode_of(vcpu);
        self.machine.load(paging(&self.registers[vcpu], mode), flush);
    }

    /// The translations of the present space are gone.
    fn flush_space(&mut self) {
        let vcpu = self.vcpu();
        let pcid = usize::from(self.registers[vcpu].pcid());
        self.spaces[vcpu][pcid].flush(self.now);
        self.flushed();
    }

    fn flush_all_spaces(&mut self) {
        let vcpu = self.vcpu();
        for space in &mut self.spaces[vcpu] {
            space.flush(self.now);
        }
        self.flushed();
    }

    /// Something may be allowed no more: everything is to be compared.
    fn flushed(&mut self) {
        self.compared = u64::MAX;
        let since = self.spaces.iter().flatten().filter_map(Space::since).min();
        self.history.forget_before(since.unwrap_or(0));
    }

    /// In PAE mode, what a write of CR3 and of some bits of CR0 and CR4 does. False if it is #GP(0).
    fn reload_pdptes(&self, registers: &mut Registers) -> bool {
        if registers.format() != super::reference::Format::Pae {
            return true;
        }
        let ram = &self.machine.host.ram;
        let expected = registers.pdptes(registers.cr3, |gpa| word(ram, gpa));
        let found = crate::walk::load_pdptes(ram, registers.cr3, registers.maxphyaddr as u8);
        assert_eq!(found.ok(), expected, "the PDPTE registers from {:#x}", registers.cr3);
        expected.is_some_and(|pdptes| {
            registers.pdpte = pdptes;
            true
        })
    }

    /// A page of the pool as CR3 holds it.
    fn cr3(mode: Mode, page: u64) -> u64 {
        match mode {
            // Two pages of PDPTEs, and one of tables: most of its entries are no PDPTEs.
            Mode::Pae if page % 5 == 4 => pool(page) | 0x18,
            Mode::Pae => pool(PAGES + page % PDPTS) | (page / PDPTS % 2) << 5,
            _ => pool(page),
        }
    }

    fn mov_to_cr3(&mut self, page: u64, pcid: u64, keep: bool) {
        let vcpu = self.vcpu();
        let mut registers = self.registers[vcpu];
        registers.cr3 = Trial::cr3(self.mode_of(vcpu), page);
        let pcide = registers.cr4 & CR4_PCIDE != 0;
        if pcide {
            registers.cr3 |= pcid;
        }
        if self.reload_pdptes(&mut registers) {
            self.leave_space();
            self.registers[vcpu] = registers;
            let keep = keep && pcide;
            self.load_root(if keep { Flush::Keep } else { Flush::Pcid });
            self.enter_space();
            if !keep {
                self.flush_space();
            }
        }
    }

    /// Another space comes into use.
    fn leave_space(&mut self) {
        let vcpu = self.vcpu();
        let pcid = usize::from(self.registers[vcpu].pcid());
        self.spaces[vcpu][pcid].end(self.now);
    }

    fn enter_space(&mut self) {
        let vcpu = self.vcpu();
        let pcid = usize::from(self.registers[vcpu].pcid());
        let root = self.registers[vcpu].cr3 & !0xfff;
        self.spaces[vcpu][pcid].begin(self.now, root);
        self.flushed();
    }

    /// CR4.PCIDE changes, where it may.
    fn pcide(&mut self, on: bool) {
        let vcpu = self.vcpu();
        if !matches!(self.mode_of(vcpu), Mode::FourLevel | Mode::FiveLevel) {
            return;
        }
        self.leave_space();
        let registers = &mut self.registers[vcpu];
        registers.cr3 &= !0xfff;
        registers.cr4 = if on { registers.cr4 | CR4_PCIDE } else { registers.cr4 & !CR4_PCIDE };
        self.load_root(Flush::All);
        self.enter_space();
        self.flush_all_spaces();
    }

    fn invpcid(&mut self, kind: u64, pcid: u64, at: At) {
        let vcpu = self.vcpu();
        let linear = self.linear(at);
        let pcid = if self.registers[vcpu].cr4 & CR4_PCIDE == 0 { 0 } else { pcid };
        self.machine.exit();
        let Machine { mmu, host, cpu, .. } = &mut self.machine;
        let space = &mut self.spaces[vcpu][pcid as usize];
        match kind {
            0 => {
                mmu.flush_address(host, cpu, pcid as u16, Gva(linear));
                space.flush_address(self.now, linear);
            }
            1 => {
                mmu.flush_pcid(host, cpu, pcid as u16);
                space.flush(self.now);
            }
            _ => {
                mmu.flush(host, cpu);
                self.flush_all_spaces();
            }
        }
        self.flushed();
    }

    fn bits(&mut self, bits: Bits) {
        let registers = &mut self.registers[usize::from(self.machine.cpu.vcpu)];
        let mut set = |register: fn(&mut Registers) -> &mut u64, bit: u64, on: bool| {
            let register = register(registers);
            *register = if on { *register | bit } else { *register & !bit };
        };
        set(|registers| &mut registers.cr0, CR0_WP, bits.wp);
        set(|registers| &mut registers.cr4, CR4_SMEP, bits.smep);
        set(|registers| &mut registers.cr4, CR4_SMAP, bits.smap);
        set(|registers| &mut registers.cr4, CR4_PSE, bits.pse);
        set(|registers| &mut registers.efer, EFER_NXE, bits.nxe);
        self.load_root(Flush::Pcid);
        self.flush_space();
    }

    fn mode(&mut self, mode: Mode, page: u64) {
        let vcpu = self.vcpu();
        let mut registers = self.registers[vcpu];
        registers.cr0 &= !CR0_PG;
        registers.cr4 &= !(CR4_PAE | CR4_LA57 | CR4_PCIDE);
        registers.efer &= !EFER_LMA;
        registers.cr0 |= if mode == Mode::Off { 0 } else { CR0_PG };
        registers.cr4 |= match mode {
            Mode::Off | Mode::TwoLevel => 0,
            Mode::Pae | Mode::FourLevel => CR4_PAE,
            Mode::FiveLevel => CR4_PAE | CR4_LA57,
        };
        registers.efer |= if matches!(mode, Mode::FourLevel | Mode::FiveLevel) { EFER_LMA } else { 0 };
        registers.cr3 = Trial::cr3(mode, page);
        if self.reload_pdptes(&mut registers) {
            self.leave_space();
            self.registers[vcpu] = registers;
            self.flush_all_spaces();
            self.load_root(Flush::All);
            self.enter_space();
        }
    }

    // ---- memory ----

    /// Stores one of a page's words, or of its four-byte entries where the vCPU's tables have those.
    fn write(machine: &Machine, mode: Mode, page: u64, spot: u64, value: u64) {
        let gpa = page + 8 * SPOTS[spot as usize];
        match mode {
            Mode::TwoLevel => machine.poke_u32(gpa + if spot < 2 { 0 } else { 4 }, value as u32),
            _ => machine.poke(gpa, value),
        }
    }

    fn store(&mut self, store: Store, value: u64) {
        let mode = self.mode_of(self.vcpu());
        match store {
            Store::Device(Place { page, spot }) => {
                self.machine.exit();
                self.machine.mmu.before_write(&self.machine.host, Gpa(pool(page)).page());
                Trial::write(&self.machine, mode, pool(page), spot, value);
            }
            Store::Guest(at, Place { spot, .. }) => {
                if let Landed::Ram(gpa) = self.access(at, WRITE)
                    && pool_page(gpa.0).is_some()
                {
                    Trial::write(&self.machine, mode, gpa.0 & !0xfff, spot, value);
                }
            }
        }
    }

    /// A kernel changes the entry that translates what was accessed last, through a mapping that we do not model.
    fn edit(&mut self, above: u64, change: Change) {
        let vcpu = self.vcpu();
        let path = self.path(self.linear(At::RECENT), READ);
        let Some(&(_, gpa)) = path.iter().rev().nth(above as usize) else { return };
        if pool_page(gpa).is_none() {
            return;
        }
        self.machine.exit();
        self.machine.mmu.before_write(&self.machine.host, Gpa(gpa).page());
        let bytes = self.registers[vcpu].entry_bytes();
        let value = match change {
            Change::Toggle(bit) => entry(&self.machine.host.ram, bytes, gpa) ^ bit,
            Change::Value(value) => value,
        };
        if bytes == 4 { self.machine.poke_u32(gpa, value as u32) } else { self.machine.poke(gpa, value) }
    }

    /// One access, compared with the architecture.
    fn access(&mut self, at: At, access: Access) -> Landed {
        let linear = self.linear(at);
        let vcpu = self.vcpu();
        self.recent[vcpu] = linear;
        let undisturbed = self.machine.host.late.get().is_none();
        let path = undisturbed.then(|| self.path(linear, access));
        let exits = self.machine.exits;
        let landed = self.machine.access(Gva(linear), access);
        self.observe(path.as_deref());
        if let Some(path) = path
            && self.machine.exits > exits
            && !matches!(landed, Landed::Fault(_))
        {
            self.check_marks(&path, access);
        }
        self.check_landed(linear, access, landed);
        landed
    }

    fn race(&mut self, at: At, access: Access, meanwhile: Meanwhile) {
        let linear = self.linear(at);
        let modes: [Mode; VCPUS_MAX] = core::array::from_fn(|vcpu| self.mode_of(vcpu));
        let theirs: [u64; VCPUS_MAX] = core::array::from_fn(|vcpu| match meanwhile {
            Meanwhile::Store(Store::Guest(at, _), _) => self.linear_of(vcpu, at),
            _ => 0,
        });
        let (history, now) = (&mut self.history, self.now);
        let landed = self.machine.access_racing(Gva(linear), access, |machine| {
            // What a walk set may be stored over before the step is over.
            let mut look = |machine: &Machine| {
                history.observe(now, |gpa| word(&machine.host.ram, gpa), |_, _, _| ());
            };
            look(machine);
            match meanwhile {
                Meanwhile::Reclaim(pages) => _ = machine.mmu.reclaim(&machine.host, pages),
                // Nobody stores while the guest's only vCPU is out of it.
                Meanwhile::Store(..) if machine.vcpus().count() == 1 => {}
                Meanwhile::Store(Store::Guest(_, place), value) => {
                    let vcpu = machine.cpu.vcpu;
                    machine.next_vcpu();
                    let mode = modes[usize::from(machine.cpu.vcpu)];
                    let landed = machine.access(Gva(theirs[usize::from(machine.cpu.vcpu)]), WRITE);
                    look(machine);
                    if let Landed::Ram(gpa) = landed
                        && pool_page(gpa.0).is_some()
                    {
                        Trial::write(machine, mode, gpa.0 & !0xfff, place.spot, value);
                    }
                    while machine.cpu.vcpu != vcpu {
                        machine.next_vcpu();
                    }
                }
                Meanwhile::Store(Store::Device(place), value) => {
                    machine.mmu.before_write(&machine.host, Gpa(pool(place.page)).page());
                    let mode = modes[usize::from(machine.cpu.vcpu)];
                    Trial::write(machine, mode, pool(place.page), place.spot, value);
                }
            }
            // And so may what was stored here, by a store that is still to come.
            look(machine);
        });
        self.observe(None);
        self.check_landed(linear, access, landed);
    }

    /// The entries that translate `linear`, by level and address; of a translation that faults, those before.
    fn path(&self, linear: u64, access: Access) -> Vec<(u8, u64)> {
        let registers = &self.registers[self.vcpu()];
        let (ram, bytes) = (&self.machine.host.ram, registers.entry_bytes());
        let mut path = Vec::new();
        let _ = registers.translate(
            linear,
            attempt(access),
            |gpa| entry(ram, bytes, gpa),
            |level, gpa| path.push((level, gpa)),
        );
        path
    }

    /// Notes what memory holds now. With `path`, nothing may have changed but A and D of its entries.
    fn observe(&mut self, path: Option<&[(u8, u64)]>) {
        let ram = &self.machine.host.ram;
        let bytes = self.registers[usize::from(self.machine.cpu.vcpu)].entry_bytes();
        self.history.observe(
            self.now,
            |gpa| word(ram, gpa),
            |gpa, old, new| {
                let Some(path) = path else { return };
                let allowed: u64 = path
                    .iter()
                    .filter(|(_, used)| used & !7 == gpa)
                    .map(|(_, used)| if bytes == 4 { 0x60 << (8 * (used & 4)) } else { 0x60 })
                    .fold(0, |all, bits| all | bits);
                assert_eq!(
                    (old ^ new) & !allowed | old & !new,
                    0,
                    "H18: an access changed the word at {gpa:#x} from {old:#x} to {new:#x}"
                );
            },
        );
    }

    /// After an access that took an exit, A is set in every entry that it used, and D in the last one by a write.
    fn check_marks(&self, path: &[(u8, u64)], access: Access) {
        let registers = &self.registers[self.vcpu()];
        for (i, &(level, gpa)) in path.iter().enumerate() {
            let entry = entry(&self.machine.host.ram, registers.entry_bytes(), gpa);
            let last = i + 1 == path.len();
            let want = if last && access.kind == Kind::Write { 0x60 } else { 0x20 };
            assert_eq!(entry & want, want, "A and D of the entry of level {level} at {gpa:#x}: {entry:#x}");
        }
    }

    fn question(&self, vcpu: usize) -> Question<'_, impl Fn(u64) -> u64 + use<'_>> {
        let ram = &self.machine.host.ram;
        let pcid = usize::from(self.registers[vcpu].pcid());
        Question {
            registers: &self.registers[vcpu],
            history: &self.history,
            space: &self.spaces[vcpu][pcid],
            spaces: &self.spaces[vcpu],
            load: move |gpa| word(ram, gpa),
        }
    }

    /// A fault is what the tables say now; what landed is something that they say, or said and may be cached.
    fn check_landed(&self, linear: u64, access: Access, landed: Landed) {
        let vcpu = self.vcpu();
        let registers = &self.registers[vcpu];
        let ram = &self.machine.host.ram;
        let expected = registers.translate(
            linear,
            attempt(access),
            |gpa| entry(ram, registers.entry_bytes(), gpa),
            |_, _| (),
        );
        let what =
            || format!("vCPU {vcpu}, {linear:#x}, {access:?}: {landed:?}, and the tables say {expected:x?}");
        match landed {
            Landed::Fault(fault) => {
                assert_eq!(Some(fault.code.0), expected.err().map(|fault| fault.0), "{}", what());
                assert_eq!(fault.address.0, linear, "CR2");
            }
            Landed::Mmio(gpa) => {
                assert_eq!(Ok(gpa.0), expected.map(|target| target.physical), "{}", what());
                assert!(self.machine.host.slots.index(gpa.page()).is_none(), "it is RAM: {}", what());
            }
            Landed::Ram(gpa) => {
                let claim = Claim { linear, attempt: attempt(access), physical: gpa.0 };
                assert!(self.question(vcpu).allows(&claim), "{}", what());
            }
        }
    }

    // ---- every translation there is ----

    /// Compares all that the hardware could do next, on any vCPU, if there is anything new.
    fn compare(&mut self) {
        let stores = self.machine.host.frames.stores.get();
        let remembered = self.compared == stores;
        self.compared = stores;
        let now = self.machine.host.generation.get();
        for cpu in self.machine.vcpus() {
            let context = context(cpu);
            assert!(!self.machine.is_free(context.root), "H7: the root that is loaded is free");
            if !remembered {
                self.compare_table(&context, context.levels, context.root, 0, Path::OPEN);
            }
            let cores = self.machine.host.cores.borrow();
            if cores.running[usize::from(cpu.vcpu)].is_none() && !cpu.is_good(now) {
                continue; // flushed before it is used again
            }
            for cached in cores.processor.remembered(cpu.vcpu, cpu.tag()) {
                if cached.level > 0 {
                    assert!(
                        !self.machine.is_free(cached.frame),
                        "H7: a free frame is still walked: {cached:?}"
                    );
                } else {
                    self.compare_page(&context, cached.prefix << 12, cached.frame, cached.path);
                }
            }
        }
    }

    fn compare_table(&self, context: &Context, level: u8, table: Pfn, linear: u64, path: Path) {
        for index in used(&self.machine, table) {
            let raw = self.machine.host.frames.load(table, index);
            if raw == MMIO {
                continue;
            }
            let linear = linear | (index as u64) << (12 + 9 * (u32::from(level) - 1));
            let pdpte = context.levels == 3 && level == 3;
            let path = if pdpte { path } else { path.through(raw) };
            let frame = Pfn((raw & bits::FRAME) >> 12);
            if level == 1 {
                self.compare_page(context, linear, frame, path);
            } else if raw & bits::PS != 0 {
                for page in [0, 0x123, 511] {
                    self.compare_page(context, linear | page << 12, Pfn(frame.0 + page), path);
                }
            } else {
                self.compare_table(context, level - 1, frame, linear, path);
            }
        }
    }

    /// Whether the guest's processor might do whatever the translation permits.
    fn compare_page(&self, context: &Context, linear: u64, frame: Pfn, path: Path) {
        let Some(gfn) = self.machine.host.owned(frame) else { panic!("H10: {frame:?} is not the guest's") };
        let vcpu = usize::from(context.vcpu);
        let question = self.question(vcpu);
        for user in [true, false] {
            for (write, fetch) in [(false, false), (true, false), (false, true)] {
                let attempt = Attempt { write, fetch, user, ac: !user && !fetch };
                if !permitted(context.controls(), path, attempt) {
                    continue;
                }
                let claim = Claim { linear, attempt, physical: gfn.address().0 };
                assert!(
                    question.allows(&claim),
                    "vCPU {vcpu}: the shadow permits {claim:x?} by {path:?}, which the architecture does not"
                );
            }
        }
    }
}
