//! Loaders: put a guest's kernel, its files and the firmware's tables into guest RAM, and say in which state
//! its first processor starts.
//!
//! Everything is written through [`memory::GuestMemory`]; the same code run over a memory that forgets
//! ([`check`]) tells the manifest tool what would go wrong at boot. The files are untrusted: all their lengths
//! and offsets are checked, and nothing but the RAM that [`firmware::e820`] calls usable is written for them.
//!
//! What the loader and the firmware keep for themselves lies between 768 KiB and 1 MiB, where no kernel expects
//! RAM ([`stage`] has the map), so that it is in no program's way and may stay valid for the guest's life.

mod elf64;
mod error;
pub mod firmware;
mod image;
mod linux;
mod multiboot;
mod place;
pub mod stage;
#[cfg(test)]
mod test_ram;

use memory::{Gpa, GuestMemory, Unbacked};
use serde::{Deserialize, Serialize};

pub use error::{Fault, LoadError, Part};

/// How a kernel is handed control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The Linux x86 boot protocol's 64-bit entry: a bzImage or a vmlinux.
    Linux,
    /// Multiboot 1: 32-bit protected mode, paging off.
    Multiboot,
    /// A static ELF64 executable, entered in long mode with the first 4 GiB identity-mapped.
    Elf64,
}

impl Protocol {
    /// The name as the manifest spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Multiboot => "multiboot",
            Self::Elf64 => "elf64",
        }
    }
}

/// A Multiboot module.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// Its content.
    pub bytes: &'a [u8],
    /// Its command line.
    pub cmdline: &'a str,
}

/// The files a guest is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts<'a> {
    /// The kernel, as the file is.
    pub kernel: &'a [u8],
    /// The initial RAM disk; Linux only.
    pub initrd: Option<&'a [u8]>,
    /// Modules, in the order in which the kernel finds them; Multiboot only.
    pub modules: &'a [Module<'a>],
    /// The kernel's command line; not for [`Protocol::Elf64`].
    pub cmdline: &'a str,
}

/// How much RAM the guest has, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    /// RAM from address 0 on, in bytes; a multiple of 2 MiB, up to [`RamLayout::LOW_BYTES_MAX`].
    pub low_bytes: u64,
    /// RAM from 4 GiB on, in bytes; a multiple of 2 MiB, or 0.
    pub high_bytes: u64,
}

impl RamLayout {
    /// Low RAM ends here; local APIC, I/O APIC and what else is MMIO lie above.
    pub const LOW_BYTES_MAX: u64 = 3 << 30;
    /// Where high RAM starts.
    pub const HIGH_START: u64 = 4 << 30;
    /// The most high RAM there can be: it ends within the 46 bits that every 64-bit kernel can map.
    pub const HIGH_BYTES_MAX: u64 = (1 << 46) - Self::HIGH_START;

    /// Divides `memory_bytes` of RAM into low and high.
    #[must_use]
    pub const fn split(memory_bytes: u64) -> Self {
        if memory_bytes <= Self::LOW_BYTES_MAX {
            Self { low_bytes: memory_bytes, high_bytes: 0 }
        } else {
            Self { low_bytes: Self::LOW_BYTES_MAX, high_bytes: memory_bytes - Self::LOW_BYTES_MAX }
        }
    }

    /// All RAM, in bytes.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.low_bytes.saturating_add(self.high_bytes)
    }
}

/// The most virtual processors the tables describe: local APIC identifiers are 0..=253 (0xFF is the broadcast
/// and one identifier is the I/O APIC's).
pub const VCPUS_MAX: u32 = 254;

/// The processor mode a guest starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit: CR0.PE and PG, CR4.PAE, EFER.LME and LMA are set, CS.L is set.
    Long,
    /// 32-bit flat protected mode, paging off; CR0.PE alone is set.
    Protected32,
}

/// The state in which a virtual processor starts. What is not named is as after INIT: RFLAGS is 2 (interrupts
/// off), the other general registers are 0, no IDT (limit 0), LDT and TR are null (VM entry wants a busy TSS in
/// TR's hidden part all the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// The mode.
    pub mode: Mode,
    /// The first instruction.
    pub rip: u64,
    /// Top of a 4 KiB stack.
    pub rsp: u64,
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// The page tables in long mode; 0 else.
    pub cr3: Gpa,
    /// Where the GDT lies; its entries agree with `code` and `data`.
    pub gdt_base: Gpa,
    /// Limit of the GDT: bytes less one.
    pub gdt_limit: u16,
    /// Selector in CS: a flat code segment of the mode's width, ring 0.
    pub code: u16,
    /// Selector in SS, DS, ES, FS, GS: a flat writable data segment.
    pub data: u16,
    /// Where the guest wakes its other processors ([`firmware::wakeup`]); `None` with one processor.
    pub mailbox: Option<Gpa>,
}

/// Says which protocol a kernel's file is made for, or that it is no kernel we know.
#[must_use]
pub fn identify(kernel: &[u8]) -> Option<Protocol> {
    if linux::is_bzimage(kernel) {
        Some(Protocol::Linux)
    } else if multiboot::has_header(kernel) {
        Some(Protocol::Multiboot)
    } else if image::is_linux_elf(kernel) {
        Some(Protocol::Linux)
    } else if image::is_elf64(kernel) {
        Some(Protocol::Elf64)
    } else {
        None
    }
}

/// Loads a guest: firmware tables for `vcpus` processors, kernel, files, page tables, GDT.
///
/// Only bytes that are part of something are written; RAM that is to be read as zero elsewhere must be zero.
///
/// # Errors
/// [`LoadError`] says which file is wrong, how, and what to do about it; guest RAM is then partly written.
pub fn load(
    protocol: Protocol,
    parts: &Parts<'_>,
    ram: &RamLayout,
    vcpus: u32,
    memory: &dyn GuestMemory,
) -> Result<EntryState, LoadError> {
    check_guest(protocol, parts, ram, vcpus)?;
    let mut plan = place::Plan::new(*ram);
    let mut entry = match protocol {
        Protocol::Linux => linux::load(parts, &mut plan, memory)?,
        Protocol::Multiboot => multiboot::load(parts, &mut plan, memory)?,
        Protocol::Elf64 => elf64::load(parts, &mut plan, memory)?,
    };
    entry.mailbox = firmware::write(vcpus, memory).map_err(LoadError::backing)?;
    Ok(entry)
}

/// Does all that [`load`] does, and writes nothing: every error that can be known before boot.
///
/// # Errors
/// As [`load`].
pub fn check(
    protocol: Protocol,
    parts: &Parts<'_>,
    ram: &RamLayout,
    vcpus: u32,
) -> Result<EntryState, LoadError> {
    load(protocol, parts, ram, vcpus, &Forgets(*ram))
}

fn check_guest(protocol: Protocol, parts: &Parts<'_>, ram: &RamLayout, vcpus: u32) -> Result<(), LoadError> {
    const MIB_2: u64 = 2 << 20;
    let guest = |fault| Err(LoadError { part: Part::Guest, fault });
    if ram.low_bytes == 0
        || ram.low_bytes > RamLayout::LOW_BYTES_MAX
        || ram.high_bytes > RamLayout::HIGH_BYTES_MAX
        || !ram.low_bytes.is_multiple_of(MIB_2)
        || !ram.high_bytes.is_multiple_of(MIB_2)
    {
        return guest(Fault::RamLayout { low_bytes: ram.low_bytes, high_bytes: ram.high_bytes });
    }
    if !(1..=VCPUS_MAX).contains(&vcpus) {
        return guest(Fault::Vcpus { vcpus, max: VCPUS_MAX });
    }
    let unused = |part| Err(LoadError { part, fault: Fault::NotUsedBy(protocol) });
    if protocol != Protocol::Linux && parts.initrd.is_some() {
        return unused(Part::Initrd);
    }
    if protocol != Protocol::Multiboot && !parts.modules.is_empty() {
        return unused(Part::Module(0));
    }
    if protocol == Protocol::Elf64 && !parts.cmdline.is_empty() {
        return unused(Part::CommandLine);
    }
    Ok(())
}

/// Guest RAM that takes every write and holds nothing.
struct Forgets(RamLayout);

impl Forgets {
    fn inside(&self, gpa: Gpa, bytes: usize) -> Result<(), Unbacked> {
        let end = gpa.0.checked_add(bytes as u64).ok_or(Unbacked(gpa))?;
        let high_end = RamLayout::HIGH_START.saturating_add(self.0.high_bytes);
        let in_high = gpa.0 >= RamLayout::HIGH_START && end <= high_end;
        if end <= self.0.low_bytes || in_high { Ok(()) } else { Err(Unbacked(gpa)) }
    }
}

impl GuestMemory for Forgets {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        buf.fill(0);
        self.inside(gpa, buf.len())
    }
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        self.inside(gpa, bytes.len())
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        self.inside(gpa, 4).map(|()| 0)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        self.inside(gpa, 8).map(|()| 0)
    }
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, _new: u32) -> Result<bool, Unbacked> {
        self.inside(gpa, 4).map(|()| old == 0)
    }
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, _new: u64) -> Result<bool, Unbacked> {
        self.inside(gpa, 8).map(|()| old == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_split_at_three_gib() {
        assert_eq!(RamLayout::split(1 << 30), RamLayout { low_bytes: 1 << 30, high_bytes: 0 });
        assert_eq!(RamLayout::split(5 << 30), RamLayout { low_bytes: 3 << 30, high_bytes: 2 << 30 });
        assert_eq!(RamLayout::split(u64::MAX).total_bytes(), u64::MAX);
    }

    #[test]
    fn what_a_protocol_has_no_use_for_is_refused() {
        let ram = RamLayout::split(16 << 20);
        let initrd = Parts { initrd: Some(b"x"), ..Parts::default() };
        let error = check(Protocol::Multiboot, &initrd, &ram, 1).unwrap_err();
        assert_eq!(error.part, Part::Initrd);
        let cmdline = Parts { cmdline: "quiet", ..Parts::default() };
        assert_eq!(check(Protocol::Elf64, &cmdline, &ram, 1).unwrap_err().part, Part::CommandLine);
        let modules = [Module { bytes: b"", cmdline: "" }];
        let modules = Parts { modules: &modules, ..Parts::default() };
        assert_eq!(check(Protocol::Linux, &modules, &ram, 1).unwrap_err().part, Part::Module(0));
    }

    #[test]
    fn impossible_guests_are_refused() {
        let parts = Parts::default();
        for (low_bytes, high_bytes) in
            [(0, 0), (4096, 0), (4 << 30, 0), (2 << 20, 1), (2 << 20, u64::MAX << 21)]
        {
            let error = check(Protocol::Elf64, &parts, &RamLayout { low_bytes, high_bytes }, 1).unwrap_err();
            assert!(matches!(error.fault, Fault::RamLayout { .. }), "{error}");
        }
        for vcpus in [0, 255, u32::MAX] {
            let error = check(Protocol::Elf64, &parts, &RamLayout::split(2 << 20), vcpus).unwrap_err();
            assert!(matches!(error.fault, Fault::Vcpus { .. }), "{error}");
        }
    }

    #[test]
    fn foreign_files_are_not_identified() {
        for file in [&b""[..], b"\x7fELF", b"\x1f\x8b\x08", &[0; 9000]] {
            assert_eq!(identify(file), None);
        }
    }
}
