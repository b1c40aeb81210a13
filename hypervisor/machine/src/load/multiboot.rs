//! Multiboot 1 (Multiboot Specification, version 0.6.96): ELF or "address fields" images, entered in 32-bit
//! protected mode with paging off.
//!
//! Information and strings lie in reserved memory below 1 MiB, modules page-aligned right behind the kernel, as
//! most kernels expect. A wanted video mode is a preference and ignored: the information says there is none.

mod header;

use alloc::vec::Vec;

use memory::{Gpa, GuestMemory, PAGE_SIZE};
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::error::{Fault, LoadError, Part, compressed};
use super::firmware::e820;
use super::image::{Accept, Image, parse_elf};
use super::place::Plan;
use super::{EntryState, Mode, Parts, stage};

/// EAX at entry: "loaded by a Multiboot loader".
const LOADED_MAGIC: u64 = 0x2bad_b002;
/// What a kernel may show as its loader's name.
const LOADER_NAME: &str = "Umbra";
/// Room for the information, its tables and its strings.
const INFO_BYTES_MAX: usize = (stage::ACPI.0 - stage::BOOT_INFO.0) as usize;
const MODULES_MAX: usize = 256;

/// Fields of [`Info`] that are valid.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// The information structure, up to the fields for video.
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    flags: U32,
    /// KiB from 0 on.
    mem_lower: U32,
    /// KiB from 1 MiB on.
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    mods_count: U32,
    mods_addr: U32,
    syms: [U32; 4],
    mmap_length: U32,
    mmap_addr: U32,
    drives: [U32; 2],
    config_table: U32,
    boot_loader_name: U32,
    apm_table: U32,
}

/// An entry of the module table.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ModuleEntry {
    start: U32,
    end: U32,
    cmdline: U32,
    reserved: U32,
}

/// Whether there is a Multiboot header.
pub(super) fn has_header(file: &[u8]) -> bool {
    header::find(file).is_some()
}

pub(super) fn load(
    parts: &Parts<'_>,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<EntryState, LoadError> {
    let image =
        image(parts.kernel).map_err(|fault| LoadError::kernel(compressed(parts.kernel).unwrap_or(fault)))?;
    image.place(plan, memory)?;
    write_info(parts, image.end(), plan, memory)?;
    let mut state = stage::write(memory, Mode::Protected32, image.entry).map_err(LoadError::backing)?;
    state.rax = LOADED_MAGIC;
    state.rbx = stage::BOOT_INFO.0;
    Ok(state)
}

fn image(kernel: &[u8]) -> Result<Image<'_>, Fault> {
    let header = header::find(kernel).ok_or(Fault::NotMultiboot)?;
    match header.unknown_requirements() {
        0 => {}
        unknown => return Err(Fault::MultibootFlags { unknown }),
    }
    match header.addresses {
        Some(_) => header.image(kernel),
        None => parse_elf(kernel, Accept::Both),
    }
}

/// Writes the information, and the modules it tells of.
fn write_info(
    parts: &Parts<'_>,
    kernel_end: u64,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<(), LoadError> {
    if parts.modules.len() > MODULES_MAX {
        let fault = Fault::TooMany { what: "modules", max: MODULES_MAX };
        return Err(LoadError { part: Part::Module(MODULES_MAX), fault });
    }
    let mut blob = Blob { bytes: alloc::vec![0; size_of::<Info>()] };
    let mut info = Info {
        flags: (INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME).into(),
        mem_lower: ((e820::CONVENTIONAL_END / 1024) as u32).into(),
        // Low RAM ends between 2 MiB and 3 GiB.
        mem_upper: ((plan.low_end().saturating_sub(1 << 20) / 1024) as u32).into(),
        mods_count: (parts.modules.len() as u32).into(),
        ..Info::default()
    };

    let mmap_start = blob.bytes.len();
    info.mmap_addr = blob.here();
    for entry in e820::map(plan.ram()) {
        // The size does not count itself.
        blob.bytes.extend(20u32.to_le_bytes());
        blob.bytes.extend(entry.start.0.to_le_bytes());
        blob.bytes.extend(entry.bytes.to_le_bytes());
        blob.bytes.extend((entry.kind as u32).to_le_bytes());
    }
    info.mmap_length = ((blob.bytes.len() - mmap_start) as u32).into();

    info.boot_loader_name = blob.string(LOADER_NAME, Part::Guest)?;
    info.cmdline = blob.string(parts.cmdline, Part::CommandLine)?;
    let mut entries = Vec::new();
    for (index, module) in parts.modules.iter().enumerate() {
        let part = Part::Module(index);
        let bytes = module.bytes.len() as u64;
        let start = plan.lowest(bytes, PAGE_SIZE, kernel_end).map_err(|fault| LoadError { part, fault })?;
        memory.write(Gpa(start), module.bytes).map_err(LoadError::backing)?;
        entries.push(ModuleEntry {
            start: (start as u32).into(),
            end: ((start + bytes) as u32).into(),
            cmdline: blob.string(module.cmdline, part)?,
            reserved: 0.into(),
        });
    }
    blob.bytes.resize(blob.bytes.len().next_multiple_of(4), 0);
    info.mods_addr = blob.here();
    blob.bytes.extend(entries.as_bytes());

    if blob.bytes.len() > INFO_BYTES_MAX {
        let fault = Fault::TooLong { bytes: blob.bytes.len(), max: INFO_BYTES_MAX };
        return Err(LoadError { part: Part::CommandLine, fault });
    }
    blob.bytes[..size_of::<Info>()].copy_from_slice(info.as_bytes());
    memory.write(stage::BOOT_INFO, &blob.bytes).map_err(LoadError::backing)
}

/// What goes to [`stage::BOOT_INFO`].
struct Blob {
    bytes: Vec<u8>,
}

impl Blob {
    /// The guest physical address of what is appended next.
    fn here(&self) -> U32 {
        (stage::BOOT_INFO.0 as u32 + self.bytes.len() as u32).into()
    }

    /// Appends a string with its NUL.
    fn string(&mut self, text: &str, part: Part) -> Result<U32, LoadError> {
        let room = INFO_BYTES_MAX.saturating_sub(self.bytes.len() + 1);
        if text.len() > room {
            return Err(LoadError { part, fault: Fault::TooLong { bytes: text.len(), max: room } });
        }
        if text.contains('\0') {
            return Err(LoadError { part, fault: Fault::Nul });
        }
        let here = self.here();
        self.bytes.extend_from_slice(text.as_bytes());
        self.bytes.push(0);
        Ok(here)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::image::tests::{Load, elf32, elf64};
    use super::super::test_ram::TestRam;
    use super::super::{Module, Protocol, identify, load};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
        let words = [&[0x1bad_b002, flags, checksum], addresses].concat();
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn kernel32(flags: u32) -> Vec<u8> {
        let bytes = [header(flags, &[]), vec![0xf4; 100]].concat();
        elf32(MIB as u32 + 12, &Load { virt: MIB, phys: MIB, bytes, memory_bytes: 0x3210 })
    }

    fn word(ram: &TestRam, gpa: u64) -> u64 {
        ram.load_u32(Gpa(gpa)).unwrap().into()
    }

    #[test]
    fn an_elf32_kernel_gets_memory_map_modules_and_strings() {
        let ram = TestRam::new(8 << 20);
        ram.poison(0xee);
        let kernel = kernel32(3);
        assert_eq!(identify(&kernel), Some(Protocol::Multiboot));
        let modules = [Module { bytes: b"first", cmdline: "one 1" }, Module { bytes: b"", cmdline: "" }];
        let parts = Parts { kernel: &kernel, modules: &modules, cmdline: "console=com0", ..Parts::default() };
        let entry = load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!((entry.mode, entry.rip, entry.rax), (Mode::Protected32, MIB + 12, 0x2bad_b002));
        assert_eq!(entry.cr3, Gpa(0));
        assert_eq!(ram.bytes(MIB + 0x320f, 2), [0, 0xee]);

        let info = |offset| word(&ram, entry.rbx + offset);
        assert_eq!((info(0), info(4), info(8)), (0x24d, 639, 7 * 1024));
        assert_eq!(ram.text(info(16)), "console=com0");
        assert_eq!(ram.text(info(64)), "Umbra");
        assert_eq!(info(20), 2);
        let module = |index: u64, offset: u64| word(&ram, info(24) + 16 * index + offset);
        assert_eq!((module(0, 0), module(0, 4)), (MIB + 0x4000, MIB + 0x4005));
        assert_eq!(ram.bytes(module(0, 0), 5), b"first");
        assert_eq!((ram.text(module(0, 8)), ram.text(module(1, 8))), ("one 1".into(), String::new()));
        assert_eq!(module(1, 0), module(1, 4));
        assert_eq!(info(44), 3 * 24);
        let last = info(48) + 2 * 24;
        assert_eq!((word(&ram, last), word(&ram, last + 4), word(&ram, last + 12)), (20, MIB, 7 * MIB));
        assert_eq!(word(&ram, last + 20), 1);
    }

    #[test]
    fn an_elf64_kernel_is_entered_at_its_physical_address() {
        let ram = TestRam::new(8 << 20);
        let bytes = [header(0, &[]), vec![0xf4; 100]].concat();
        let high = Load { virt: 0xffff_ffff_8010_0000, phys: MIB, bytes, memory_bytes: 0x1000 };
        let kernel = elf64(0xffff_ffff_8010_0010, &[high], &[]);
        let parts = Parts { kernel: &kernel, ..Parts::default() };
        let entry = load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!(entry.rip, MIB + 0x10);
    }

    #[test]
    fn address_fields_place_a_flat_image() {
        let ram = TestRam::new(8 << 20);
        ram.poison(0xee);
        let base = 2 * MIB as u32;
        // 64 bytes of something else come first in the file; the text starts 16 bytes before the header.
        let addresses = [base + 16, base, base + 100, base + 200, base + 48];
        let kernel = [vec![0x11; 64], vec![0x22; 16], header(1 << 16, &addresses), vec![0x33; 500]].concat();
        let parts = Parts { kernel: &kernel, ..Parts::default() };
        let entry = load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!(entry.rip, u64::from(base) + 48);
        assert_eq!(ram.bytes(base.into(), 100), kernel[64..164]);
        assert_eq!(ram.bytes(u64::from(base) + 100, 101), [vec![0; 100], vec![0xee]].concat());
    }

    #[test]
    fn bad_headers_are_refused_by_name() {
        let ram = TestRam::new(8 << 20);
        let fault = |kernel: &[u8]| {
            let parts = Parts { kernel, ..Parts::default() };
            load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap_err().fault
        };
        assert_eq!(fault(b"\x7fELF"), Fault::NotMultiboot);
        assert_eq!(fault(&[vec![0; 8184], header(0, &[])].concat()), Fault::NotMultiboot);
        assert_eq!(fault(&kernel32(0x28)), Fault::MultibootFlags { unknown: 0x28 });
        assert_eq!(fault(&header(0, &[])), Fault::NotElf);
        let base = 2 * MIB as u32;
        for addresses in [
            [base - 4, base, 0, 0, base],
            [base + 16, base, 0, 0, base],
            [base, base, base - 1, 0, base],
            [base, base, base + 32, base + 16, base],
        ] {
            let fault = fault(&[header(1 << 16, &addresses), vec![0; 100]].concat());
            assert!(matches!(fault, Fault::Inconsistent(_)), "{addresses:x?}: {fault}");
        }
        let short = header(1 << 16, &[base, base, base + 0x1000, 0, base]);
        assert!(matches!(fault(&short), Fault::Truncated { .. }));
        let astray = header(1 << 16, &[base, base, 0, 0, base + 0x100]);
        assert!(matches!(fault(&astray), Fault::Entry { .. }));
    }

    #[test]
    fn overlong_strings_and_too_many_modules_are_refused() {
        let ram = TestRam::new(8 << 20);
        let kernel = kernel32(0);
        let long = "x".repeat(INFO_BYTES_MAX);
        let parts = Parts { kernel: &kernel, cmdline: &long, ..Parts::default() };
        let error = load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap_err();
        assert_eq!(error.part, Part::CommandLine);
        let modules = vec![Module { bytes: b"x", cmdline: "" }; MODULES_MAX + 1];
        let parts = Parts { kernel: &kernel, modules: &modules, ..Parts::default() };
        let error = load(Protocol::Multiboot, &parts, &ram.layout(), 1, &ram).unwrap_err();
        assert!(matches!(error.fault, Fault::TooMany { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn mutated_images_panic_nothing_and_stay_inside_ram(
            changes in prop::collection::vec((0usize..130, any::<u8>()), 0..8),
            addresses in prop::array::uniform5(any::<u32>()),
            near in any::<bool>(),
            elf in any::<bool>(),
        ) {
            let ram = TestRam::new(4 << 20);
            let addresses = addresses.map(|address| if near { 0x20_0000 + address % 0x400 } else { address });
            let mut kernel = if elf { kernel32(0) } else { [header(1 << 16, &addresses), vec![0; 200]].concat() };
            for (at, byte) in changes {
                kernel[at] = byte;
            }
            let modules = [Module { bytes: &[5; 3000], cmdline: "m" }];
            let parts = Parts { kernel: &kernel, modules: &modules, cmdline: "x", ..Parts::default() };
            for protocol in [Protocol::Multiboot, Protocol::Elf64, Protocol::Linux] {
                let parts = if protocol == Protocol::Multiboot { parts } else { Parts { kernel: &kernel, ..Parts::default() } };
                if let Err(error) = load(protocol, &parts, &ram.layout(), 2, &ram) {
                    prop_assert!(!matches!(error.fault, Fault::Unbacked(_)), "{}", error);
                }
            }
            let _ = identify(&kernel);
        }
    }
}
