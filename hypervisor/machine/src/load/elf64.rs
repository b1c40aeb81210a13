//! Plain ELF64 executables: loaded at their physical addresses and entered in long mode.
//!
//! The first 4 GiB are identity-mapped, interrupts are off, RSP points to the end of a 4 KiB stack, RDI is 0.
//! Page tables, GDT and stack lie in reserved memory ([`super::stage`]), so that all usable RAM is the program's.

use memory::GuestMemory;

use super::error::{LoadError, compressed};
use super::image::{Accept, parse_elf};
use super::place::Plan;
use super::{EntryState, Mode, Parts, stage};

pub(super) fn load(
    parts: &Parts<'_>,
    plan: &mut Plan,
    memory: &dyn GuestMemory,
) -> Result<EntryState, LoadError> {
    let image = parse_elf(parts.kernel, Accept::Elf64)
        .map_err(|fault| LoadError::kernel(compressed(parts.kernel).unwrap_or(fault)))?;
    image.place(plan, memory)?;
    stage::write(memory, Mode::Long, image.entry).map_err(LoadError::backing)
}

#[cfg(test)]
mod tests {
    use memory::Gpa;

    use super::super::error::Fault;
    use super::super::image::tests::{Load, elf64};
    use super::super::test_ram::TestRam;
    use super::super::{Protocol, identify, load};
    use super::*;

    const BASE: u64 = 0x20_0000;

    #[test]
    fn segments_land_and_their_tails_are_zero() {
        let ram = TestRam::with_high(8 << 20, 2 << 20);
        ram.poison(0xaa);
        let loads = [
            Load { virt: BASE, phys: BASE, bytes: vec![0xf4; 100], memory_bytes: 100 },
            Load { virt: 0, phys: BASE + 0x1000, bytes: vec![7; 10], memory_bytes: 9000 },
            Load { virt: 1 << 32, phys: 1 << 32, bytes: vec![9; 10], memory_bytes: 10 },
        ];
        let file = elf64(BASE + 4, &loads, &[]);
        assert_eq!(identify(&file), Some(Protocol::Elf64));
        let parts = Parts { kernel: &file, ..Parts::default() };
        let entry = load(Protocol::Elf64, &parts, &ram.layout(), 1, &ram).unwrap();
        assert_eq!((entry.mode, entry.rip, entry.rdi), (Mode::Long, BASE + 4, 0));
        assert_eq!((entry.mailbox, entry.cr3), (None, stage::PAGE_TABLES));
        assert_eq!(ram.bytes(BASE, 101), [vec![0xf4; 100], vec![0xaa]].concat());
        assert_eq!(ram.bytes(BASE + 0x1000, 9001), [vec![7; 10], vec![0; 8990], vec![0xaa]].concat());
        assert_eq!(ram.bytes(1 << 32, 11), [vec![9; 10], vec![0xaa]].concat());
    }

    #[test]
    fn programs_outside_ram_are_refused() {
        let ram = TestRam::new(4 << 20);
        for phys in [0x3f_ffff, 0x40_0000, 0xc_0000, 0, u64::MAX - 5] {
            let loads = [Load { virt: phys, phys, bytes: vec![0xf4; 2], memory_bytes: 2 }];
            let file = elf64(phys, &loads, &[]);
            let parts = Parts { kernel: &file, ..Parts::default() };
            let error = load(Protocol::Elf64, &parts, &ram.layout(), 1, &ram).unwrap_err();
            assert!(matches!(error.fault, Fault::OutsideRam { .. } | Fault::Entry { .. }), "{error}");
        }
        let load_at = |phys| Load { virt: phys, phys, bytes: vec![0; 32], memory_bytes: 32 };
        let file = elf64(BASE, &[load_at(BASE), load_at(BASE + 31)], &[]);
        let parts = Parts { kernel: &file, ..Parts::default() };
        let error = load(Protocol::Elf64, &parts, &ram.layout(), 1, &ram).unwrap_err();
        assert_eq!(error.fault, Fault::Overlap { start: Gpa(BASE + 31), bytes: 32 });
    }

    #[test]
    fn a_compressed_file_is_named() {
        let parts = Parts { kernel: b"\x1f\x8b\x08", ..Parts::default() };
        let ram = TestRam::new(4 << 20);
        let error = load(Protocol::Elf64, &parts, &ram.layout(), 1, &ram).unwrap_err();
        assert!(error.to_string().contains("gunzip"), "{error}");
    }
}
