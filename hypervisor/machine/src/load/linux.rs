//! The Linux x86 boot protocol, 64-bit entry (kernel documentation, "The Linux/x86 Boot Protocol", section
//! "64-bit Boot Protocol"): bzImages from protocol 2.12 on, and uncompressed vmlinux files.
//!
//! The kernel starts in long mode with RSI pointing to `boot_params`; what is identity-mapped there covers the
//! kernel, `boot_params`, command line and initial RAM disk. A bzImage's setup code (real mode) is not used.

mod params;

use memory::{Gpa, GuestMemory, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

use super::error::{Fault, LoadError, Part, compressed};
use super::firmware::e820;
use super::image::{Accept, Image, Segment, is_elf64, parse_elf, slice};
use super::place::Plan;
use super::{EntryState, Mode, Parts, stage};
use params::{
    BOOT_FLAG, BootParams, E820, HEADER_MAGIC, HEADER_START, LOADED_HIGH, SetupHeader, XLF_KERNEL_64,
};

/// The first version with XLF_KERNEL_64 and `init_size` both.
const VERSION_MIN: u16 = 0x020c;
/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The 64-bit entry's offset in the kernel proper.
const ENTRY_OFFSET_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// What vmlinux files, which have no setup header, are told and take: the limits of every kernel since 2.6.
const VMLINUX_CMDLINE_SIZE: u32 = 2047;
const VMLINUX_INITRD_MAX: u32 = 0x7fff_ffff;
const VMLINUX_ALIGNMENT: u32 = 0x20_0000;

/// Whether the file is a bzImage.
pub(super) fn is_bzimage(file: &[u8]) -> bool {
    setup_header(file).is_some()
}

pub(super) fn load(
    parts: &Parts<'_>,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<EntryState, LoadError> {
    let (entry, mut header) = match setup_header(parts.kernel) {
        Some(header) => load_bzimage(parts.kernel, header, plan, memory)?,
        None if is_elf64(parts.kernel) => load_vmlinux(parts.kernel, plan, memory)?,
        None => return Err(LoadError::kernel(compressed(parts.kernel).unwrap_or(Fault::NotLinux))),
    };
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = (stage::COMMAND_LINE.0 as u32).into();
    write_command_line(parts.cmdline, header.cmdline_size.get(), memory)?;
    if let Some(initrd) = parts.initrd {
        let start = place_initrd(initrd, header.initrd_addr_max.get(), plan, memory)?;
        // Both fit: low RAM ends below 3 GiB.
        header.ramdisk_image = (start as u32).into();
        header.ramdisk_size = (initrd.len() as u32).into();
    }

    let mut params = BootParams::default();
    params.header = header;
    params.acpi_rsdp_addr = stage::ACPI.0.into();
    for (entry, range) in params.e820_table.iter_mut().zip(e820::map(plan.ram())) {
        *entry = E820::from(range);
        params.e820_entries += 1;
    }
    memory.write(stage::BOOT_INFO, params.as_bytes()).map_err(LoadError::backing)?;

    let mut state = stage::write(memory, Mode::Long, entry).map_err(LoadError::backing)?;
    state.rsi = stage::BOOT_INFO.0;
    Ok(state)
}

/// The setup header, if the file has one. It is as long as its own jump instruction says; what an older kernel
/// does not have reads as zero.
fn setup_header(file: &[u8]) -> Option<SetupHeader> {
    let mut bytes = [0; size_of::<SetupHeader>()];
    let announced = 0x202 + usize::from(*file.get(0x201)?) - HEADER_START;
    let len = announced.min(bytes.len());
    bytes[..len].copy_from_slice(file.get(HEADER_START..HEADER_START + len)?);
    let header = SetupHeader::read_from_bytes(&bytes).ok()?;
    (header.boot_flag.get() == BOOT_FLAG && header.header == *HEADER_MAGIC).then_some(header)
}

fn load_bzimage(
    file: &[u8],
    header: SetupHeader,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<(u64, SetupHeader), LoadError> {
    let fail = |fault| Err(LoadError::kernel(fault));
    if header.version.get() < VERSION_MIN {
        return fail(Fault::BootProtocol { version: header.version.get() });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return fail(Fault::NotLoadedHigh);
    }
    if header.xloadflags.get() & XLF_KERNEL_64 == 0 {
        return fail(Fault::No64BitEntry);
    }
    // 0 means 4, for the sake of very old loaders.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (setup_sectors + 1) * SECTOR;
    let announced = u64::from(header.syssize.get()) * 16;
    let rest = (file.len() as u64).saturating_sub(offset);
    // syssize counts whole 16-byte units, so the file may end up to 15 bytes short of it.
    if announced.saturating_sub(rest) >= 16 || rest <= ENTRY_OFFSET_64 {
        let needed_bytes = offset + announced.max(ENTRY_OFFSET_64 + 1);
        return fail(Fault::Truncated {
            what: "the kernel proper",
            needed_bytes,
            file_bytes: file.len() as u64,
        });
    }
    let bytes = slice(file, offset, rest, "the kernel proper").map_err(LoadError::kernel)?;

    // A compressed kernel unpacks itself within init_size bytes from where it runs.
    let room = u64::from(header.init_size.get()).max(rest);
    let preferred = header.pref_address.get();
    let start = match plan.claim(preferred, room) {
        Ok(()) => preferred,
        // Below its preferred address it would only move itself there; so anywhere above.
        Err(_) if header.relocatable_kernel != 0 => {
            let align = u64::from(header.kernel_alignment.get()).max(PAGE_SIZE);
            if !align.is_power_of_two() {
                return fail(Fault::Inconsistent("kernel_alignment is no power of two"));
            }
            plan.lowest(room, align, preferred).map_err(LoadError::kernel)?
        }
        Err(fault) => return fail(fault),
    };
    memory.write(Gpa(start), bytes).map_err(LoadError::backing)?;
    let entry = start + ENTRY_OFFSET_64;
    if entry >= 1 << 32 {
        return fail(Fault::Entry { entry });
    }
    Ok((entry, header))
}

fn load_vmlinux(
    file: &[u8],
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<(u64, SetupHeader), LoadError> {
    let mut image = parse_elf(file, Accept::Elf64).map_err(LoadError::kernel)?;
    keep_last_claims(&mut image);
    image.place(plan, memory)?;
    // vmlinux has no setup header; the kernel proper reads what a bzImage's would say.
    let mut header = SetupHeader::default();
    header.boot_flag = BOOT_FLAG.into();
    header.header = *HEADER_MAGIC;
    header.version = VERSION_MIN.into();
    header.loadflags = LOADED_HIGH;
    header.xloadflags = XLF_KERNEL_64.into();
    header.kernel_alignment = VMLINUX_ALIGNMENT.into();
    header.cmdline_size = VMLINUX_CMDLINE_SIZE.into();
    header.initrd_addr_max = VMLINUX_INITRD_MAX.into();
    Ok((image.entry, header))
}

/// Shortens a segment's zero tail where the next one begins: the linker script pads segments to pages, so that
/// the tail of one may reach into the next one's page without meaning anything.
fn keep_last_claims(image: &mut Image<'_>) {
    image.segments.sort_by_key(|segment: &Segment<'_>| segment.start);
    for index in 1..image.segments.len() {
        let next = image.segments[index].start;
        let segment = &mut image.segments[index - 1];
        let room = next - segment.start;
        if room >= segment.bytes.len() as u64 {
            segment.memory_bytes = segment.memory_bytes.min(room);
        }
    }
}

fn write_command_line(cmdline: &str, kernel_max: u32, memory: &dyn GuestMemory) -> Result<(), LoadError> {
    let fail = |fault| Err(LoadError { part: Part::CommandLine, fault });
    // The kernel's limit does not count the NUL.
    let max = (kernel_max as usize).min(stage::COMMAND_LINE_BYTES_MAX - 1);
    if cmdline.len() > max {
        return fail(Fault::TooLong { bytes: cmdline.len(), max });
    }
    if cmdline.contains('\0') {
        return fail(Fault::Nul);
    }
    memory.write(stage::COMMAND_LINE, cmdline.as_bytes()).map_err(LoadError::backing)?;
    let end = Gpa(stage::COMMAND_LINE.0 + cmdline.len() as u64);
    memory.write(end, &[0]).map_err(LoadError::backing)
}

/// High, as the protocol wants it, so that an unpacking kernel below does not have to go around it.
fn place_initrd(
    initrd: &[u8],
    addr_max: u32,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<u64, LoadError> {
    let start = plan
        .highest(initrd.len() as u64, PAGE_SIZE, u64::from(addr_max) + 1)
        .map_err(|fault| LoadError { part: Part::Initrd, fault })?;
    memory.write(Gpa(start), initrd).map_err(LoadError::backing)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::image::tests::{Load, elf64, note};
    use super::super::test_ram::TestRam;
    use super::super::{Protocol, identify, load};
    use super::*;

    const MIB: u64 = 1 << 20;
    const SETUP_SECTORS: usize = 4;

    /// A bzImage whose kernel proper is `kernel_bytes` of 0x90.
    fn bzimage(kernel_bytes: usize, tweak: impl FnOnce(&mut SetupHeader)) -> Vec<u8> {
        let mut header = SetupHeader::default();
        header.setup_sects = SETUP_SECTORS as u8;
        header.boot_flag = BOOT_FLAG.into();
        header.jump = [0xeb, 0x6a];
        header.header = *HEADER_MAGIC;
        header.version = 0x020f.into();
        header.syssize = (kernel_bytes as u32).div_ceil(16).into();
        header.loadflags = LOADED_HIGH;
        header.xloadflags = (XLF_KERNEL_64 | 0x3e).into();
        header.relocatable_kernel = 1;
        header.kernel_alignment = (2 * MIB as u32).into();
        header.pref_address = (16 * MIB).into();
        header.init_size = (8 * MIB as u32).into();
        header.cmdline_size = 2047.into();
        header.initrd_addr_max = 0x7fff_ffff.into();
        tweak(&mut header);
        let mut file = vec![0; (SETUP_SECTORS + 1) * SECTOR as usize];
        file[HEADER_START..HEADER_START + size_of::<SetupHeader>()].copy_from_slice(header.as_bytes());
        file.resize(file.len() + kernel_bytes, 0x90);
        file
    }

    fn params(ram: &TestRam) -> BootParams {
        BootParams::read_from_bytes(&ram.bytes(stage::BOOT_INFO.0, 4096)).unwrap()
    }

    #[test]
    fn a_bzimage_is_set_up_as_the_protocol_says() {
        let ram = TestRam::with_high(64 << 20, 2 << 20);
        ram.poison(0x5a);
        let file = bzimage(10_000, |_| ());
        assert_eq!(identify(&file), Some(Protocol::Linux));
        let initrd = vec![0x77; 5000];
        let parts = Parts {
            kernel: &file,
            initrd: Some(&initrd),
            cmdline: "console=ttyS0,115200",
            ..Parts::default()
        };
        let entry = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!((entry.mode, entry.rip), (Mode::Long, 16 * MIB + 0x200));
        assert_eq!((entry.rsi, entry.code, entry.data), (stage::BOOT_INFO.0, 0x10, 0x18));
        assert_eq!(ram.bytes(16 * MIB, 10_000), vec![0x90; 10_000]);
        let params = params(&ram);
        assert_eq!((params.header.type_of_loader, params.sentinel), (0xff, 0));
        assert_eq!(params.header.version.get(), 0x020f);
        assert_eq!(ram.text(params.header.cmd_line_ptr.get().into()), "console=ttyS0,115200");
        assert_eq!(params.header.ramdisk_image.get() as u64, 64 * MIB - 8192);
        assert_eq!(ram.bytes(64 * MIB - 8192, 5000), initrd);
        assert_eq!(params.acpi_rsdp_addr.get(), stage::ACPI.0);
        let table: Vec<_> = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .map(|entry| (entry.start.get(), entry.bytes.get(), entry.kind.get()))
            .collect();
        let expected = [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 63 * MIB, 1), (4 << 30, 2 * MIB, 1)];
        assert_eq!(table, expected);
        assert_eq!(ram.bytes(stage::ACPI.0, 8), b"RSD PTR ");
    }

    #[test]
    fn a_relocatable_kernel_goes_above_its_preferred_place() {
        let ram = TestRam::new(64 << 20);
        let at = |file: &[u8]| {
            let parts = Parts { kernel: file, ..Parts::default() };
            load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).map(|entry| entry.rip)
        };
        let low = bzimage(1000, |header| header.pref_address = 0.into());
        assert_eq!(at(&low), Ok(2 * MIB + 0x200));
        let fixed = bzimage(1000, |header| {
            header.pref_address = 0.into();
            header.relocatable_kernel = 0;
        });
        assert!(matches!(at(&fixed).unwrap_err().fault, Fault::OutsideRam { .. }));
        let large = bzimage(1000, |header| header.init_size = (49 * MIB as u32).into());
        assert!(matches!(at(&large).unwrap_err().fault, Fault::NoRoom { .. }));
        let odd = bzimage(1000, |header| {
            header.pref_address = 0.into();
            header.kernel_alignment = 0x30_0000.into();
        });
        assert!(matches!(at(&odd).unwrap_err().fault, Fault::Inconsistent(_)));
    }

    #[test]
    fn unsuitable_kernels_are_refused_by_name() {
        let ram = TestRam::new(64 << 20);
        let fault = |file: &[u8]| {
            let parts = Parts { kernel: file, ..Parts::default() };
            load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap_err().fault
        };
        let old = bzimage(1000, |header| header.version = 0x020b.into());
        assert_eq!(fault(&old), Fault::BootProtocol { version: 0x020b });
        assert_eq!(fault(&bzimage(1000, |header| header.xloadflags = 0.into())), Fault::No64BitEntry);
        assert_eq!(fault(&bzimage(1000, |header| header.loadflags = 0)), Fault::NotLoadedHigh);
        let good = bzimage(1000, |_| ());
        assert!(matches!(fault(&good[..good.len() - 16]), Fault::Truncated { .. }));
        assert!(matches!(fault(&good[..0x300]), Fault::Truncated { .. }));
        assert_eq!(fault(&good[..0x260]), Fault::NotLinux);
        assert_eq!(fault(b"\xfd7zXZ\0"), Fault::Compressed { format: "xz", tool: "unxz" });
    }

    #[test]
    fn what_does_not_fit_is_said_of_its_file() {
        let ram = TestRam::new(32 << 20);
        let file = bzimage(1000, |_| ());
        let initrd = vec![0; 16 << 20];
        let parts = Parts { kernel: &file, initrd: Some(&initrd), ..Parts::default() };
        let error = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap_err();
        assert_eq!(error.part, Part::Initrd);
        let long = "x".repeat(2048);
        for (cmdline, fault) in [(&*long, Fault::TooLong { bytes: 2048, max: 2047 }), ("a\0b", Fault::Nul)] {
            let parts = Parts { kernel: &file, cmdline, ..Parts::default() };
            let error = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap_err();
            assert_eq!(error, LoadError { part: Part::CommandLine, fault });
        }
    }

    #[test]
    fn a_vmlinux_is_entered_at_its_start() {
        let ram = TestRam::new(64 << 20);
        let segment = |virt, phys, memory_bytes| Load { virt, phys, bytes: vec![0xcc; 4096], memory_bytes };
        // The per-CPU segment is linked at 0, and the text's tail reaches into it.
        let loads = [
            segment(0xffff_ffff_8100_0000, 16 * MIB, 0x3000),
            segment(0, 16 * MIB + 0x2000, 0x1000),
            segment(0xffff_ffff_8100_3000, 16 * MIB + 0x3000, 0x9000),
        ];
        let file = elf64(16 * MIB, &loads, &note("Linux", b""));
        assert_eq!(identify(&file), Some(Protocol::Linux));
        let parts = Parts { kernel: &file, initrd: Some(&[1, 2, 3]), cmdline: "quiet", ..Parts::default() };
        let entry = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!((entry.rip, entry.rsi), (16 * MIB, stage::BOOT_INFO.0));
        let params = params(&ram);
        assert_eq!(params.header.header, *HEADER_MAGIC);
        assert_eq!(params.header.ramdisk_size.get(), 3);
        assert_eq!(ram.text(params.header.cmd_line_ptr.get().into()), "quiet");
    }

    /// A real kernel, for development: `UMBRA_TEST_BZIMAGE` names it.
    #[test]
    fn a_real_kernel_loads() {
        let Some(path) = std::env::var_os("UMBRA_TEST_BZIMAGE") else {
            eprintln!("skipped: UMBRA_TEST_BZIMAGE names no kernel");
            return;
        };
        let file = std::fs::read(path).unwrap();
        assert_eq!(identify(&file), Some(Protocol::Linux));
        let ram = TestRam::new(256 << 20);
        let parts = Parts { kernel: &file, cmdline: "quiet", ..Parts::default() };
        let entry = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!(entry.rip & 0xf_ffff, 0x200);
        eprintln!("{entry:x?}");
    }

    proptest! {
        #[test]
        fn mutated_headers_panic_nothing_and_stay_inside_ram(
            changes in prop::collection::vec((HEADER_START..HEADER_START + 0x7b, any::<u8>()), 1..6),
            cut in 0usize..4000,
            initrd in 0usize..3000,
        ) {
            let ram = TestRam::new(24 << 20);
            let mut file = bzimage(1000, |_| ());
            for (at, byte) in changes {
                file[at] = byte;
            }
            if cut < file.len() && cut % 3 == 0 {
                file.truncate(cut);
            }
            let initrd = vec![1; initrd];
            let parts = Parts { kernel: &file, initrd: Some(&initrd), cmdline: "x", ..Parts::default() };
            let result = load(Protocol::Linux, &parts, &ram.layout(), 1, &ram);
            if let Err(error) = result {
                prop_assert!(!matches!(error.fault, Fault::Unbacked(_)), "{}", error);
            }
        }
    }
}
