//! `struct boot_params` and `struct setup_header` of the Linux boot protocol, as far as they are used.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::load::firmware::e820;

/// Where the setup header lies, in the file as in [`BootParams`].
pub(super) const HEADER_START: usize = 0x1f1;
/// `boot_flag`.
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// `header`.
pub(super) const HEADER_MAGIC: &[u8; 4] = b"HdrS";
/// `loadflags`: the kernel proper goes above 1 MiB.
pub(super) const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry at 0x200.
pub(super) const XLF_KERNEL_64: u16 = 1 << 0;
/// The room for e820 entries.
const E820_ENTRIES_MAX: usize = 128;

/// `struct setup_header`, protocol 2.15.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetupHeader {
    /// Real-mode setup code, in sectors beyond the first.
    pub(super) setup_sects: u8,
    root_flags: U16,
    /// The kernel proper, in 16-byte units.
    pub(super) syssize: U32,
    ram_size: U16,
    vid_mode: U16,
    root_dev: U16,
    pub(super) boot_flag: U16,
    /// A short jump over the rest of the header: says how long it is.
    pub(super) jump: [u8; 2],
    pub(super) header: [u8; 4],
    pub(super) version: U16,
    realmode_swtch: U32,
    start_sys_seg: U16,
    kernel_version: U16,
    pub(super) type_of_loader: u8,
    pub(super) loadflags: u8,
    setup_move_size: U16,
    code32_start: U32,
    pub(super) ramdisk_image: U32,
    pub(super) ramdisk_size: U32,
    bootsect_kludge: U32,
    heap_end_ptr: U16,
    ext_loader_ver: u8,
    ext_loader_type: u8,
    pub(super) cmd_line_ptr: U32,
    /// The last address the RAM disk may occupy.
    pub(super) initrd_addr_max: U32,
    pub(super) kernel_alignment: U32,
    pub(super) relocatable_kernel: u8,
    min_alignment: u8,
    pub(super) xloadflags: U16,
    /// The longest command line, without its NUL.
    pub(super) cmdline_size: U32,
    hardware_subarch: U32,
    hardware_subarch_data: U64,
    payload_offset: U32,
    payload_length: U32,
    setup_data: U64,
    pub(super) pref_address: U64,
    /// RAM needed from the load address on until the kernel has read the memory map.
    pub(super) init_size: U32,
    handover_offset: U32,
    kernel_info_offset: U32,
}

/// One entry of the BIOS's memory map.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct E820 {
    pub(super) start: U64,
    pub(super) bytes: U64,
    pub(super) kind: U32,
}

impl From<e820::Entry> for E820 {
    fn from(entry: e820::Entry) -> Self {
        Self { start: entry.start.0.into(), bytes: entry.bytes.into(), kind: (entry.kind as u32).into() }
    }
}

/// `struct boot_params`, the "zero page".
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct BootParams {
    screen_to_tboot: [u8; 0x70],
    pub(super) acpi_rsdp_addr: U64,
    disks_to_efi: [u8; 0x1e8 - 0x78],
    pub(super) e820_entries: u8,
    edd_and_keyboard: [u8; 6],
    /// Not zero if a loader copied the setup sectors without clearing what lies around the header.
    pub(super) sentinel: u8,
    pad: u8,
    pub(super) header: SetupHeader,
    pad_and_edd: [u8; 0x2d0 - 0x26c],
    pub(super) e820_table: [E820; E820_ENTRIES_MAX],
    edd: [u8; 0x1000 - 0xcd0],
}

impl Default for BootParams {
    fn default() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    /// Offsets from the kernel's documentation, "The Real-Mode Kernel Header" and "Zero Page".
    #[test]
    fn fields_lie_where_the_protocol_says() {
        let header = |offset| HEADER_START + offset;
        assert_eq!(header(offset_of!(SetupHeader, syssize)), 0x1f4);
        assert_eq!(header(offset_of!(SetupHeader, boot_flag)), 0x1fe);
        assert_eq!(header(offset_of!(SetupHeader, header)), 0x202);
        assert_eq!(header(offset_of!(SetupHeader, version)), 0x206);
        assert_eq!(header(offset_of!(SetupHeader, type_of_loader)), 0x210);
        assert_eq!(header(offset_of!(SetupHeader, loadflags)), 0x211);
        assert_eq!(header(offset_of!(SetupHeader, ramdisk_image)), 0x218);
        assert_eq!(header(offset_of!(SetupHeader, ramdisk_size)), 0x21c);
        assert_eq!(header(offset_of!(SetupHeader, cmd_line_ptr)), 0x228);
        assert_eq!(header(offset_of!(SetupHeader, initrd_addr_max)), 0x22c);
        assert_eq!(header(offset_of!(SetupHeader, kernel_alignment)), 0x230);
        assert_eq!(header(offset_of!(SetupHeader, relocatable_kernel)), 0x234);
        assert_eq!(header(offset_of!(SetupHeader, xloadflags)), 0x236);
        assert_eq!(header(offset_of!(SetupHeader, cmdline_size)), 0x238);
        assert_eq!(header(offset_of!(SetupHeader, setup_data)), 0x250);
        assert_eq!(header(offset_of!(SetupHeader, pref_address)), 0x258);
        assert_eq!(header(offset_of!(SetupHeader, init_size)), 0x260);
        assert_eq!(header(size_of::<SetupHeader>()), 0x26c);
        assert_eq!(offset_of!(BootParams, acpi_rsdp_addr), 0x70);
        assert_eq!(offset_of!(BootParams, e820_entries), 0x1e8);
        assert_eq!(offset_of!(BootParams, sentinel), 0x1ef);
        assert_eq!(offset_of!(BootParams, header), HEADER_START);
        assert_eq!(offset_of!(BootParams, e820_table), 0x2d0);
        assert_eq!((size_of::<E820>(), size_of::<BootParams>()), (20, 4096));
    }
}
