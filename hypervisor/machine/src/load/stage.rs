//! What the loader leaves between 768 KiB and 896 KiB for the guest's first instructions: page tables, GDT,
//! stack. The whole map of the area that e820 reserves:
//!
//! | from | what |
//! | --- | --- |
//! | `0x9fc00` | extended BIOS data area (empty) |
//! | `0xa0000` | plain RAM where a PC has its screen |
//! | `0xc0000` | PML4, PDPT, four page directories |
//! | `0xc6000` | GDT |
//! | `0xc7000` | stack, one page |
//! | `0xc8000` | mailbox that wakes other processors |
//! | `0xc9000` | Linux boot parameters or Multiboot information |
//! | `0xca000` | Linux command line |
//! | `0xe0000` | ACPI tables |
//! | `0xf0000` | MP table |

use memory::{Gpa, GuestMemory, PAGE_SIZE, Unbacked};

use super::{EntryState, Mode};

/// The page tables: identity for the first 4 GiB, in 2 MiB pages, supervisor, writable and executable.
pub const PAGE_TABLES: Gpa = Gpa(0xc_0000);
/// The GDT.
pub const GDT: Gpa = Gpa(0xc_6000);
/// Top of the stack.
pub const STACK_TOP: Gpa = Gpa(0xc_8000);
/// The page of the multiprocessor wakeup mailbox.
pub const MAILBOX: Gpa = Gpa(0xc_8000);
/// What the boot protocol hands over, up to [`ACPI`].
pub const BOOT_INFO: Gpa = Gpa(0xc_9000);
/// Linux's command line, up to [`COMMAND_LINE_BYTES_MAX`].
pub const COMMAND_LINE: Gpa = Gpa(0xc_a000);
/// Room for Linux's command line with its NUL.
pub const COMMAND_LINE_BYTES_MAX: usize = 0x2000;
/// The ACPI tables, RSDP first.
pub const ACPI: Gpa = Gpa(0xe_0000);
/// The MP floating pointer and table.
pub const MP_TABLE: Gpa = Gpa(0xf_0000);

/// Code selector: `__BOOT_CS` of the Linux boot protocol.
pub const CODE: u16 = 0x10;
/// Data selector: `__BOOT_DS` of the Linux boot protocol.
pub const DATA: u16 = 0x18;
/// Code selector of a further processor: 64-bit whatever the first one started in.
const SECONDARY_CODE: u16 = 0x20;
const GDT_LIMIT: u16 = SECONDARY_CODE + 7;

const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;
// P, W, A; and D, PS for a leaf. A and D are set already: a walker then has nothing to write back.
const TABLE_ENTRY: u64 = 0x23;
const LARGE_LEAF: u64 = 0xe3;

/// Flat 64-bit code, 32-bit code and data descriptors, ring 0, accessed (SDM Vol. 3, "Segment Descriptors").
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;

/// Writes page tables and GDT, and returns a state that lacks only the protocol's registers.
///
/// A guest that starts with paging off gets the page tables too: its further processors start on them.
pub(super) fn write(memory: &dyn GuestMemory, mode: Mode, rip: u64) -> Result<EntryState, Unbacked> {
    let boot_code = match mode {
        Mode::Long => CODE_64,
        Mode::Protected32 => CODE_32,
    };
    let mut gdt = [0; GDT_LIMIT as usize + 1];
    for (selector, descriptor) in [(CODE, boot_code), (DATA, FLAT_DATA), (SECONDARY_CODE, CODE_64)] {
        gdt[usize::from(selector)..][..8].copy_from_slice(&u64::to_le_bytes(descriptor));
    }
    memory.write(GDT, &gdt)?;
    write_identity_map(memory)?;
    Ok(state(mode, rip))
}

/// The state in which a further processor starts at `vector`: long mode, on the page tables that [`super::load`]
/// left in reserved memory, with the stack that the first processor had.
#[must_use]
pub const fn secondary(vector: u64) -> EntryState {
    let mut state = state(Mode::Long, vector);
    state.code = SECONDARY_CODE;
    state
}

const fn state(mode: Mode, rip: u64) -> EntryState {
    EntryState {
        mode,
        rip,
        rsp: STACK_TOP.0,
        rax: 0,
        rbx: 0,
        rsi: 0,
        rdi: 0,
        cr3: match mode {
            Mode::Long => PAGE_TABLES,
            Mode::Protected32 => Gpa(0),
        },
        gdt_base: GDT,
        gdt_limit: GDT_LIMIT,
        code: CODE,
        data: DATA,
        mailbox: None,
    }
}

fn write_identity_map(memory: &dyn GuestMemory) -> Result<(), Unbacked> {
    let page = |index: u64| PAGE_TABLES.0 + index * PAGE_SIZE;
    let mut table = [0; PAGE_SIZE as usize];
    table[..8].copy_from_slice(&(page(1) | TABLE_ENTRY).to_le_bytes());
    memory.write(Gpa(page(0)), &table)?;
    for directory in 0..DIRECTORIES {
        let entry = page(2 + directory) | TABLE_ENTRY;
        table[directory as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    memory.write(Gpa(page(1)), &table)?;
    for directory in 0..DIRECTORIES {
        for index in 0..ENTRIES {
            let entry = ((directory * ENTRIES + index) << 21) | LARGE_LEAF;
            table[index as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
        }
        memory.write(Gpa(page(2 + directory)), &table)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::test_ram::TestRam;
    use super::*;

    fn walk(ram: &TestRam, cr3: Gpa, address: u64) -> u64 {
        let mut table = cr3.0;
        for shift in [39, 30, 21] {
            let entry = ram.load_u64(Gpa(table + ((address >> shift) & 511) * 8)).unwrap();
            assert_eq!(entry & 3, 3, "{address:#x} at shift {shift}");
            if entry & 0x80 != 0 {
                assert_eq!(shift, 21);
                return (entry & 0x000f_ffff_ffe0_0000) | (address & 0x1f_ffff);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        panic!("no leaf");
    }

    #[test]
    fn the_first_four_gib_map_to_themselves_and_no_more() {
        let ram = TestRam::new(2 << 20);
        let state = write(&ram, Mode::Long, 0x20_0000).unwrap();
        for address in [0, 0x1f_ffff, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(walk(&ram, state.cr3, address), address);
        }
        assert_eq!(ram.load_u64(Gpa(state.cr3.0 + 8)).unwrap(), 0);
        assert_eq!(ram.load_u64(Gpa(PAGE_TABLES.0 + 0x1000 + 4 * 8)).unwrap(), 0);
    }

    #[test]
    fn descriptors_suit_the_mode() {
        let ram = TestRam::new(2 << 20);
        let long = write(&ram, Mode::Long, 0).unwrap();
        assert_eq!(ram.load_u64(Gpa(GDT.0 + u64::from(long.code))).unwrap(), CODE_64);
        let flat = write(&ram, Mode::Protected32, 0).unwrap();
        assert_eq!(ram.load_u64(Gpa(GDT.0 + u64::from(flat.code))).unwrap(), CODE_32);
        assert_eq!(ram.load_u64(Gpa(GDT.0 + u64::from(flat.data))).unwrap(), FLAT_DATA);
        assert_eq!((flat.cr3, flat.gdt_limit), (Gpa(0), 39));
        let second = secondary(0x9_8000);
        assert_eq!(ram.load_u64(Gpa(GDT.0 + u64::from(second.code))).unwrap(), CODE_64);
        assert_eq!((second.rip, walk(&ram, second.cr3, 0x9_8000)), (0x9_8000, 0x9_8000));
    }
}
