//! The stages of the boot core, in order. Each says what it does in one line.

use core::arch::asm;

use bootloader_api::BootInfo;
use bootloader_api::info::MemoryRegionKind;
use memory::{Hpa, PAGE_SIZE, Pfn};
use spin::{Mutex, Once};
use x86_64::registers::control::Cr3;

use super::acpi::{self, Platform};
use super::cores;
use super::frames::{self, DirectMap, direct};
use super::image::Segment;
use super::memory_map::{MemoryMap, Span, Spans};
use super::paging::{Cache, MapError, PageTables, Rights};
use super::stacks::{self, Use};
use super::tables::HandlerStacks;
use super::trampoline::Trampoline;
use super::{
    DEVICES, DIRECT_MAP, apic, cpu, framebuffer, heap, image, ioapic, legacy, log as sinks, machine_check,
    panic, power, tables, time,
};
use crate::vmx::enable::{self, Vmx};

/// The machine, as the rest of the hypervisor finds it.
#[derive(Debug)]
pub struct Host {
    /// What the bootloader loaded beside us; empty if there was none.
    pub payload: &'static [u8],
    /// Where the firmware's devices are.
    pub platform: Platform,
    /// Cores that run, the boot core included.
    pub cores: usize,
    /// What the processor's VMX can do, and what we use of it.
    pub vmx: Vmx,
    /// RAM in bytes, used or not.
    pub ram_bytes: u64,
    /// The local APIC timer's frequency.
    pub apic_timer_hz: u64,
}

static HOST: Once<Host> = Once::new();

/// What the first half of the boot leaves for the second, which runs on another stack.
struct Handover {
    tables: PageTables<DirectMap>,
    map: MemoryMap,
    platform: Platform,
    payload: Span,
    payload_bytes: usize,
    devices: Devices,
    trampoline: Option<Hpa>,
    next: fn(&'static Host) -> !,
}

/// Where the devices are mapped.
#[derive(Default)]
struct Devices {
    framebuffer: Option<u64>,
    local_apic: u64,
    io_apics: heapless::Vec<u64, 8>,
}

static HANDOVER: Mutex<Option<Handover>> = Mutex::new(None);

/// Brings the machine up on the boot core and the others, then goes on with `next` on the boot core; the others
/// wait for [`cores::run_on_others`].
///
/// # Safety
/// Once, as the first thing, with what the bootloader gave, configured as boot/ does.
pub unsafe fn bring_up(info: &'static mut BootInfo, next: fn(&'static Host) -> !) -> ! {
    time::mark_start();
    sinks::init(info.framebuffer.take());
    image::set_base(info.kernel_image_offset);
    panic::set_early_stack(info.kernel_stack_bottom, info.kernel_stack_bottom + info.kernel_stack_len);
    tables::build_idt();
    // SAFETY: once, on the boot core.
    unsafe { cores::adopt_boot_core() };
    report_processor();

    let rsdp = info.rsdp_addr.into_option();
    // SAFETY: the bootloader's tables are loaded, and the RSDP is the one it found.
    let platform = unsafe { acpi::read(rsdp) }.unwrap_or_else(|missing| {
        log::warn!("{missing}: only the boot core is used");
        Platform::default()
    });
    calibrate(&platform);

    let mut map = read_memory_map(info);
    let ram_frames = map.ram.bytes() / PAGE_SIZE;
    let heap_bytes = heap::bytes_for(ram_frames);
    let Some(start) = map.take(heap_bytes / PAGE_SIZE) else {
        refuse(format_args!("no {} KiB of contiguous memory for the heap", heap_bytes / 1024));
    };
    // SAFETY: just taken, and mapped by the bootloader's direct map and later by ours.
    unsafe { heap::init(direct(start), heap_bytes) };

    let trampoline = map.trampoline_page();
    // SAFETY: the boot information is the bootloader's.
    let built = unsafe { build_tables(info, &mut map, &platform, trampoline) };
    let (tables, devices, payload) = built.unwrap_or_else(|error| {
        refuse(format_args!("the page tables cannot be built: {error:?}"));
    });
    let root = tables.root().address();
    let payload_bytes = if payload.bytes() == 0 { 0 } else { info.ramdisk_len as usize };
    *HANDOVER.lock() =
        Some(Handover { tables, map, platform, payload, payload_bytes, devices, trampoline, next });
    cpu::set_up();
    // SAFETY: the new tables map the image, the direct map and the new stack as the old ones do.
    unsafe { switch(root, stacks::top(0, Use::Main)) }
}

/// Loads the page tables at `root` and goes on with [`on_own_tables`] on the stack that ends at `stack_top`.
///
/// # Safety
/// The tables map our image where it runs, and the stack.
unsafe fn switch(root: Hpa, stack_top: u64) -> ! {
    // SAFETY: as the caller promised; nothing of the old stack is used afterwards.
    unsafe {
        asm!(
            "mov cr3, {root}",
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "call {next}",
            "ud2",
            root = in(reg) root.0,
            stack = in(reg) stack_top,
            next = sym on_own_tables,
            options(noreturn)
        )
    }
}

extern "C" fn on_own_tables() -> ! {
    let handover = HANDOVER.lock().take().expect("the first half of the boot stored it");
    let Handover { tables, map, platform, payload, payload_bytes, devices, trampoline, next } = handover;
    if let Some(base) = devices.framebuffer {
        // SAFETY: mapped to the same bytes by `build_tables`.
        unsafe { framebuffer::remap(base as *mut u8) };
    }
    // SAFETY: this is the boot core, and its stacks are mapped.
    unsafe { tables::set_handler_stacks(cores::this_core(), HandlerStacks::Guarded) };
    check_tables(&tables);

    legacy::mask_pics();
    machine_check::arm();
    // SAFETY: mapped by `build_tables`.
    unsafe { apic::set_up(devices.local_apic) };
    apic::enable();
    cores::set_boot_apic_id(apic::id());
    for (&registers, info) in devices.io_apics.iter().zip(&platform.io_apics) {
        // SAFETY: mapped by `build_tables`.
        let inputs = unsafe { ioapic::add(registers, info.first_gsi) };
        log::info!(
            "I/O APIC at {}: inputs {} to {}, all masked",
            info.address,
            info.first_gsi,
            info.first_gsi + inputs - 1
        );
    }
    let apic_timer_hz = apic::calibrate_timer();
    let mode = if apic::is_x2apic() { "x2APIC" } else { "xAPIC" };
    log::info!("local APIC: {mode}, id {}, timer at {} kHz", apic::id(), apic_timer_hz / 1000);

    let ram_bytes = map.ram.bytes();
    let (core_count, _) = cores::usable(platform.processors);
    let allocator = frames::hand_over(&map.free, core_count);
    let marks = allocator.marks();
    log::info!(
        "frames: {} free (marks: min {}, low {}, high {}), {} used at boot",
        allocator.free_frames(),
        marks.min_frames(),
        marks.low_frames(),
        marks.high_frames(),
        map.taken_frames()
    );

    // Before any other core runs: a machine that cannot run guests needs no more of them.
    let vmx = enable::examine().unwrap_or_else(|refusal| refuse(format_args!("{refusal}")));
    let cores = start_cores(&platform, trampoline, &tables);
    // SAFETY: the bootloader put the payload there, and these frames were never free.
    let payload = unsafe { core::slice::from_raw_parts(direct(Hpa(payload.start)), payload_bytes) };
    next(HOST.call_once(|| Host { payload, platform, cores, vmx, ram_bytes, apic_timer_hz }))
}

/// Ends the boot with one clear message: this machine, as it is, cannot run Umbra.
fn refuse(reason: core::fmt::Arguments<'_>) -> ! {
    log::error!("{reason}");
    power::exit(1)
}

fn report_processor() {
    let mut name = heapless::String::<128>::new();
    // A name that is too long is cut.
    let _ = cpu::describe(&mut name);
    log::info!("processor: {name}");
}

fn calibrate(platform: &Platform) {
    match time::calibrate(platform.timer_port) {
        Some((hz, source)) => {
            let source = match source {
                time::Source::Pit => "measured with the PIT",
                time::Source::AcpiTimer => "measured with the ACPI timer",
                time::Source::Cpuid => "as CPUID says: no clock to measure it with",
            };
            log::info!("time stamp counter: {} kHz, {source}", hz / 1000);
        }
        None => refuse(format_args!(
            "nothing tells the time here: no PIT, no ACPI timer, and no frequency in CPUID leaf 15h or 16h"
        )),
    }
}

fn read_memory_map(info: &BootInfo) -> MemoryMap {
    let regions = info.memory_regions.iter().filter_map(|region| match region.kind {
        MemoryRegionKind::Usable => Some((region.start, region.end, true)),
        MemoryRegionKind::Bootloader => Some((region.start, region.end, false)),
        _ => None,
    });
    let map = MemoryMap::new(regions);
    if map.lost != 0 {
        log::warn!("the firmware's memory map has too many pieces: {} of them are not used", map.lost);
    }
    log::info!(
        "memory: {} MiB, {} MiB of it free, in {} pieces",
        map.ram.bytes() >> 20,
        map.free.bytes() >> 20,
        map.free.len()
    );
    map
}

/// Why our page tables could not be built.
#[derive(Debug)]
#[expect(dead_code, reason = "shown by the derived Debug in the refusal")]
enum BuildError {
    Image(image::BadImage),
    Map(MapError),
    /// The bootloader did not map this address of ours.
    Unmapped(u64),
    /// The top table must lie where a core in protected mode can name it.
    RootTooHigh(Hpa),
}

impl From<MapError> for BuildError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

/// Builds the tables: image, direct map, stacks, devices, the trampoline's page; nothing else. Returns them, where
/// the devices are, and the payload's frames.
///
/// # Safety
/// The bootloader's tables are loaded, and `info` is its own.
unsafe fn build_tables(
    info: &BootInfo,
    map: &mut MemoryMap,
    platform: &Platform,
    trampoline: Option<Hpa>,
) -> Result<(PageTables<DirectMap>, Devices, Span), BuildError> {
    let old = PageTables::at(DirectMap, Pfn(Cr3::read().0.start_address().as_u64() >> 12));
    let lookup = |virt| old.translate(virt).map(|found| found.hpa).ok_or(BuildError::Unmapped(virt));
    // SAFETY: the bootloader keeps the file it loaded us from, and says where.
    let file = unsafe {
        core::slice::from_raw_parts(direct(Hpa(info.kernel_addr)).cast_const(), info.kernel_len as usize)
    };
    let segments = image::segments(file).map_err(BuildError::Image)?;
    let ram = map.ram.clone();
    let mut frames = || map.take_frame();
    let tables = PageTables::new(DirectMap, &mut frames)?;
    if tables.root().address().0 >= 1 << 32 {
        return Err(BuildError::RootTooHigh(tables.root().address()));
    }

    // Frames of code and constants: the direct map gives no way round their rights.
    let mut constant = Spans::default();
    for &Segment { start, end, rights } in &segments {
        for page in (start..end).step_by(PAGE_SIZE as usize) {
            let virt = info.kernel_image_offset.wrapping_add(page);
            let phys = lookup(virt)?;
            tables.map(&mut frames, virt, phys, PAGE_SIZE, rights, Cache::WriteBack)?;
            if rights != Rights::ReadWrite && !constant.add(Span { start: phys.0, end: phys.0 + PAGE_SIZE }) {
                log::warn!(
                    "the image lies in too many pieces: a page of its code stays writable in the direct map"
                );
            }
        }
        if rights == Rights::ReadExecute {
            image::set_text(
                info.kernel_image_offset.wrapping_add(start),
                info.kernel_image_offset.wrapping_add(end),
            );
        }
    }
    for span in ram.iter() {
        for (span, rights) in with_constants(span, &constant) {
            tables.map(
                &mut frames,
                DIRECT_MAP + span.start,
                Hpa(span.start),
                span.bytes(),
                rights,
                Cache::WriteBack,
            )?;
        }
    }
    let devices = map_devices(&tables, &mut frames, platform, &lookup)?;
    if let Some(page) = trampoline {
        tables.map(&mut frames, page.0, page, PAGE_SIZE, Rights::ReadExecute, Cache::WriteBack)?;
    }
    let payload = match info.ramdisk_addr.as_ref() {
        Some(&virt) if info.ramdisk_len != 0 => {
            let start = lookup(virt)?.0;
            Span { start, end: start + info.ramdisk_len }
        }
        _ => Span { start: 0, end: 0 },
    };
    for core in 0..cores::usable(platform.processors).0 {
        for purpose in Use::ALL {
            let bottom = stacks::bottom(core, purpose);
            for page in (0..purpose.bytes()).step_by(PAGE_SIZE as usize) {
                let frame = frames().ok_or(MapError::OutOfFrames)?;
                let (virt, phys) = (bottom + page, frame.address());
                tables.map(&mut frames, virt, phys, PAGE_SIZE, Rights::ReadWrite, Cache::WriteBack)?;
            }
        }
    }
    Ok((tables, devices, payload))
}

/// Cuts `span` where `constant` begins and ends: the parts with their rights.
fn with_constants(span: Span, constant: &Spans) -> impl Iterator<Item = (Span, Rights)> {
    let mut at = span.start;
    let mut constant =
        constant.iter().filter(move |part| part.start < span.end && part.end > span.start).peekable();
    core::iter::from_fn(move || {
        if at >= span.end {
            return None;
        }
        let (end, rights) = match constant.peek() {
            Some(part) if part.start <= at => (part.end.min(span.end), Rights::ReadOnly),
            Some(part) => (part.start, Rights::ReadWrite),
            None => (span.end, Rights::ReadWrite),
        };
        if rights == Rights::ReadOnly {
            constant.next();
        }
        let part = Span { start: at, end };
        at = end;
        Some((part, rights))
    })
}

fn map_devices(
    tables: &PageTables<DirectMap>,
    frames: &mut dyn FnMut() -> Option<Pfn>,
    platform: &Platform,
    lookup: &dyn Fn(u64) -> Result<Hpa, BuildError>,
) -> Result<Devices, BuildError> {
    let mut devices = Devices::default();
    let mut next = DEVICES;
    let mut map = |phys: Hpa, bytes: u64, cache| {
        // Both ends on 2 MiB, so that a framebuffer there gets large pages.
        let start = Hpa(phys.0 & !(PAGE_SIZE - 1));
        let bytes = (phys.offset() + bytes).next_multiple_of(PAGE_SIZE);
        let virt = next + (start.0 & (memory::BLOCK_SIZE - 1));
        next = (virt + bytes).next_multiple_of(memory::BLOCK_SIZE);
        tables.map(frames, virt, start, bytes, Rights::ReadWrite, cache)?;
        Ok::<u64, MapError>(virt + phys.offset())
    };
    if let Some((virt, bytes)) = framebuffer::mapping() {
        devices.framebuffer = Some(map(lookup(virt)?, bytes, Cache::WriteCombining)?);
    }
    devices.local_apic = map(apic::physical_base(), PAGE_SIZE, Cache::Uncached)?;
    for io in &platform.io_apics {
        let _ = devices.io_apics.push(map(io.address, 0x20, Cache::Uncached)?);
    }
    Ok(devices)
}

/// W^X, or nothing runs.
fn check_tables(tables: &PageTables<DirectMap>) {
    let audit = tables.audit();
    assert!(audit.violation.is_none(), "a mapping is writable and executable: {audit:x?}");
    assert!(!audit.null_mapped, "the null page is mapped");
    log::info!(
        "page tables: W^X checked, {} mappings, {} of them executable",
        audit.mappings,
        audit.executable
    );
}

/// Starts the other cores and takes the trampoline away again. Returns how many cores run.
fn start_cores(platform: &Platform, page: Option<Hpa>, tables: &PageTables<DirectMap>) -> usize {
    let wanted = platform.processors.max(1);
    if let (_, Some(surplus)) = cores::usable(wanted) {
        log::warn!("{surplus}");
    }
    let mut count = 1;
    if let Some(page) = page {
        if wanted > 1 {
            // SAFETY: a free page below 1 MiB, mapped executable by `build_tables`.
            let trampoline = unsafe { Trampoline::install(page, tables.root().address()) };
            count = cores::start_others(&platform.apic_ids, &trampoline);
        }
        tables.unmap_page(page.0);
        x86_64::instructions::tlb::flush_all();
    } else if wanted > 1 {
        log::warn!("no free memory below 640 KiB to start the other cores from: only the boot core is used");
    }
    log::info!("cores: {count} of {wanted} run");
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(span: (u64, u64), constant: &[(u64, u64)]) -> Vec<(u64, u64, bool)> {
        let mut spans = Spans::default();
        for &(start, end) in constant {
            assert!(spans.add(Span { start, end }));
        }
        with_constants(Span { start: span.0, end: span.1 }, &spans)
            .map(|(part, rights)| (part.start, part.end, rights == Rights::ReadWrite))
            .collect()
    }

    #[test]
    fn constants_are_read_only_in_the_direct_map_and_nothing_is_left_out() {
        assert_eq!(cut((0, 10), &[]), [(0, 10, true)]);
        assert_eq!(
            cut((0, 10), &[(2, 4), (6, 7)]),
            [(0, 2, true), (2, 4, false), (4, 6, true), (6, 7, false), (7, 10, true)]
        );
        assert_eq!(cut((3, 10), &[(2, 4), (9, 12)]), [(3, 4, false), (4, 9, true), (9, 10, false)]);
        assert_eq!(cut((3, 4), &[(2, 12)]), [(3, 4, false)]);
        assert_eq!(cut((3, 4), &[(0, 3), (4, 5)]), [(3, 4, true)]);
    }
}
