//! Starting a guest from its line in the manifest, and taking everything back when it has ended.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64};

use ::shadow::{Config, Mmu, pages_min};
use machine::cpu::control::FixedBits;
use machine::cpu::cpuid::{CpuidModel, Offered};
use machine::cpu::msr;
use machine::device::{DeviceConfig, Devices};
use machine::load::{self, EntryState, LoadError, Module, Parts, RamLayout};
use machine::manifest::{GuestConfig, Package};
use memory::{BLOCK_SIZE, GuestId, Hpa, Owner, Pfn, Slots, block_gfns};
use spin::{Mutex, Once};

use super::{CpuModel, Guest, presence::Presence, ram::GuestRam};
use crate::host::{DirectMap, Host, direct, frames, heap, time};
use crate::schedule::Core;
use crate::vcpu::Vcpu;
use crate::vmx::controls::Feature;
use crate::vmx::msr::{ARCH_CAPABILITIES, MsrRead, Processor};

/// Why a guest was not started.
#[derive(Debug)]
pub enum StartError {
    /// Not enough contiguous memory.
    Memory {
        /// What it asks for, in MiB.
        wanted_mib: u64,
        /// What is left, in MiB.
        free_mib: u64,
    },
    /// Not enough of the hypervisor's own heap.
    Heap {
        /// What its records take, in KiB.
        wanted_kib: usize,
        /// What is left, in KiB.
        free_kib: usize,
    },
    /// Its files cannot be loaded.
    Load(LoadError),
    /// More guests than there are numbers for.
    TooMany,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { wanted_mib, free_mib } => write!(
                f,
                "it asks for {wanted_mib} MiB and {free_mib} MiB are free: lower its memory in the manifest, or \
                 give the machine more (--memory)"
            ),
            Self::Heap { wanted_kib, free_kib } => write!(
                f,
                "the records of its pages take {wanted_kib} KiB of the hypervisor's heap and {free_kib} KiB are free: \
                 lower its memory or its shadow_cap in the manifest, or give the machine more memory (--memory)"
            ),
            Self::Load(error) => write!(f, "{error}"),
            Self::TooMany => f.write_str("there are more guests than the hypervisor can number"),
        }
    }
}

/// Builds a guest: its RAM, zeroed and loaded, its MMU, devices and processor model. Its first vCPU is to start in the
/// state that comes with it; the others wait to be woken.
///
/// # Errors
/// [`StartError`]; everything is given back.
pub fn start(
    host: &Host,
    core: &Core,
    place: usize,
    config: &GuestConfig,
    package: &Package<'_>,
) -> Result<(Arc<Guest>, EntryState), StartError> {
    let id = u16::try_from(place).ok().and_then(GuestId::new).ok_or(StartError::TooMany)?;
    let cap = config.shadow_cap_frames.map_or(frames::allocator().total_frames() / 4, u64::from);
    // Two frames for each page: the table and its links.
    let pages_max = default_pages(config.memory_bytes).min(cap / 2).max(pages_min(config.vcpus).into());
    let ram_pages = config.memory_bytes / memory::PAGE_SIZE;
    let heap_bytes = Mmu::heap_bytes(ram_pages as usize, pages_max as usize)
        + OTHER_HEAP_BYTES
        + config.vcpus as usize * (size_of::<Vcpu>() + VCPU_HEAP_BYTES);
    if heap_bytes > heap::usage().1 {
        return Err(StartError::Heap { wanted_kib: heap_bytes >> 10, free_kib: heap::usage().1 >> 10 });
    }
    let ram = allocate(id, config.memory_bytes)?;
    let layout = RamLayout::split(config.memory_bytes);
    let entry = match load_files(config, package, &layout, &ram) {
        Ok(entry) => entry,
        Err(error) => {
            free_blocks(core, id, ram.slots.blocks().map(|(_, pfn)| pfn));
            return Err(StartError::Load(error));
        }
    };
    let model = match model(host, config, id) {
        Ok(model) => model,
        Err(error) => {
            free_blocks(core, id, ram.slots.blocks().map(|(_, pfn)| pfn));
            return Err(error);
        }
    };
    let physical_address_bits = model.control.physical_bits;
    let mmu = Mmu::new(
        Config {
            physical_address_bits,
            gib_pages: model.gib_pages,
            mark_mmio: physical_address_bits < 52,
            split_executable: model.split_executable,
            pages_max: pages_max as u32,
            vcpus: config.vcpus,
        },
        &ram.slots,
    );
    let tsc_khz = time::tsc_hz() / 1000;
    let devices = Devices::new(&DeviceConfig {
        vcpus: config.vcpus,
        uart: true,
        debug_exit: config.devices.exit_port,
        shutdown_port: config.devices.shutdown_port,
        debug_console: config.devices.debug_console,
        bench_marks: config.devices.bench_marks,
        rtc_start_unix_s: START_OF_TIME_UNIX_S,
        tsc_khz,
        low_memory_bytes: layout.low_bytes,
        high_memory_bytes: layout.high_bytes,
        physical_address_bits,
    });
    let guest = Guest {
        id,
        config: config.clone(),
        ram,
        mmu: Mutex::new(mmu),
        devices: Mutex::new(devices),
        model,
        generation: AtomicU64::new(1),
        vcpus: (0..config.vcpus).map(|_| Arc::new(Presence::default())).collect(),
        vcpus_left: AtomicU32::new(config.vcpus),
        // All but the first one.
        parked: AtomicU64::new(u64::MAX >> (64 - config.vcpus) & !1),
        dead: AtomicU64::new(0),
        mailbox: entry.mailbox,
        shadow_frames: AtomicU64::new(0),
        guarantee_frames: config.shadow_guarantee_frames.map_or(0, u64::from),
        end: Once::new(),
        startup_told: Once::new(),
        start_tsc: time::tsc(),
    };
    Ok((Arc::new(guest), entry))
}

/// The time of day at a guest's start: the real-time clock of the host is not read, so that runs repeat.
const START_OF_TIME_UNIX_S: u64 = 1_700_000_000;

/// What a guest takes of the heap beside its MMU and its vCPUs, and room for the pieces that the heap is in: devices,
/// processor model, configuration.
const OTHER_HEAP_BYTES: usize = 64 * 1024;
/// What each vCPU takes beside itself: its local APIC, its presence, its place in a core's queue.
const VCPU_HEAP_BYTES: usize = 4096;

/// Shadow pages a guest may have where its manifest sets no cap: one for each 16 pages of its RAM, which is
/// 32 times what mapping all of it once takes.
fn default_pages(memory_bytes: u64) -> u64 {
    (memory_bytes / memory::PAGE_SIZE / 16).max(512)
}

fn allocate(id: GuestId, memory_bytes: u64) -> Result<GuestRam, StartError> {
    let allocator = frames::allocator();
    let mut blocks = Vec::new();
    for gfn in block_gfns(memory_bytes) {
        let Some(pfn) = allocator.alloc_block(id) else {
            let free_mib = allocator.free_frames() >> 8;
            for (_, pfn) in blocks {
                // Just allocated to this owner.
                let _ = allocator.free_block(pfn, id);
            }
            return Err(StartError::Memory { wanted_mib: memory_bytes >> 20, free_mib });
        };
        // SAFETY: the block is ours alone, and the direct map covers it.
        unsafe { core::ptr::write_bytes(direct(pfn.address()), 0, BLOCK_SIZE as usize) };
        blocks.push((gfn, pfn));
    }
    let slots = Slots::new(&blocks).expect("blocks as `block_gfns` lists them make slots");
    Ok(GuestRam { slots })
}

fn load_files(
    config: &GuestConfig,
    package: &Package<'_>,
    layout: &RamLayout,
    ram: &GuestRam,
) -> Result<EntryState, LoadError> {
    let modules: Vec<Module<'_>> = config
        .modules
        .iter()
        .map(|module| Module { bytes: package.file(module.file), cmdline: &module.cmdline })
        .collect();
    let parts = Parts {
        kernel: package.file(config.kernel),
        initrd: config.initrd.map(|file| package.file(file)),
        modules: &modules,
        cmdline: &config.cmdline,
    };
    load::load(config.protocol, &parts, layout, config.vcpus, ram)
}

fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

fn model(host: &Host, config: &GuestConfig, id: GuestId) -> Result<CpuModel, StartError> {
    let controls = &host.vmx.controls;
    let has_arch_capabilities = cpuid(0, 0)[0] >= 7 && cpuid(7, 0)[3] >> 29 & 1 != 0;
    let offered = Offered {
        rdtscp: controls.has(Feature::Rdtscp),
        invpcid: controls.has(Feature::Invpcid),
        pcid: controls.has(Feature::Vpid),
        xsaves: controls.has(Feature::Xsaves),
        arch_capabilities: has_arch_capabilities.then(|| Processor.read(ARCH_CAPABILITIES)),
        speculation_control: host.vmx.mitigations.speculation_control,
        invariant_tsc: true,
        tsc_khz: (time::tsc_hz() / 1000) as u32,
        apic_khz: (machine::device::lapic::LAPIC_TIMER_HZ / 1000) as u32,
        vcpus: config.vcpus,
        ..Offered::default()
    };
    let cpuid = CpuidModel::new(cpuid, &offered);
    let msr = cpuid.msr_model();
    let bitmap = frames::allocator()
        .alloc(0, Owner::Memory(id), memory::Claim::Begun)
        .ok_or(StartError::Memory { wanted_mib: 1, free_mib: 0 })?;
    let bits = msr::bitmap(&msr);
    // SAFETY: the frame is ours alone, of 4096 bytes as the bitmap is.
    unsafe { core::ptr::copy_nonoverlapping(bits.as_ptr(), direct(bitmap.address()), 4096) };
    let capabilities = &host.vmx.capabilities;
    // iTLB multihit (CVE-2018-12207): IA32_ARCH_CAPABILITIES bit 6 says that the processor is not affected. One
    // without the register is taken for affected if it is of the families that are: 64-bit, with VMX and 2 MiB
    // pages, before 2019. A machine check by it takes the whole machine down.
    let has_gib_pages = cpuid.query(0x8000_0001, 0, &Default::default())[3] >> 26 & 1 != 0;
    let split_executable = offered.arch_capabilities.is_none_or(|capabilities| capabilities >> 6 & 1 == 0);
    Ok(CpuModel {
        gib_pages: has_gib_pages,
        split_executable,
        control: cpuid.control_model(),
        msr,
        cpuid,
        fixed: FixedBits {
            cr0_fixed0: capabilities.cr0.must_be_one,
            cr0_fixed1: capabilities.cr0.may_be_one,
            cr4_fixed0: capabilities.cr4.must_be_one,
            cr4_fixed1: capabilities.cr4.may_be_one,
        },
        msr_bitmap: bitmap.address(),
    })
}

fn free_blocks(core: &Core, id: GuestId, blocks: impl Iterator<Item = Pfn>) {
    let allocator = frames::allocator();
    for first in blocks {
        if let Err(error) = allocator.free_block_poisoned(&DirectMap, first, id) {
            panic!("{error} (core {})", core.index);
        }
    }
}

/// Frames that are still on the account of a guest that has ended: our own error.
#[derive(Clone, Copy, Debug)]
pub struct Leak {
    /// Shadow pages, and frames kept for them.
    pub shadow_frames: u64,
    /// Its RAM, and what belongs to it.
    pub memory_frames: u64,
    /// One of them.
    pub first: Pfn,
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shadow_frames, memory_frames, first } = self;
        write!(
            f,
            "{} frames did not come back: {shadow_frames} of its shadow pages, {memory_frames} of its memory, \
             frame {first} among them",
            shadow_frames + memory_frames
        )
    }
}

/// Takes everything back from a guest that has ended: its shadow pages, then its RAM. Returns the frames that are
/// still on its account, if there are any.
pub fn dispose(guest: &Guest, core: &Core) -> Option<Leak> {
    guest.drop_shadow(core);
    free_blocks(core, guest.id, guest.ram.slots.blocks().map(|(_, pfn)| pfn));
    let bitmap: Hpa = guest.model.msr_bitmap;
    if let Err(error) = frames::allocator().free(core.index, bitmap.page(), Owner::Memory(guest.id)) {
        panic!("{error}");
    }
    let allocator = frames::allocator();
    let (shadow, memory) = (Owner::Shadow(guest.id), Owner::Memory(guest.id));
    let first = allocator.frames_of(shadow).chain(allocator.frames_of(memory)).next()?;
    Some(Leak { shadow_frames: allocator.owned_by(shadow), memory_frames: allocator.owned_by(memory), first })
}
