//! What the firmware tells of the machine: cores, interrupt controllers, the ACPI timer.

use core::pin::Pin;
use core::ptr::NonNull;

use acpi::fadt::Fadt;
use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiHandler, AcpiTables, PhysicalMapping};
use memory::Hpa;

use super::frames::direct;

/// Local APIC ids kept; more processors than this are only counted.
const PROCESSORS_MAX: usize = 256;

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicInfo {
    /// Its registers.
    pub address: Hpa,
    /// The global system interrupt of its first input.
    pub first_gsi: u32,
}

/// An ISA interrupt that does not arrive at the input of its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    /// The ISA line, 0 to 15.
    pub irq: u8,
    /// Where it arrives.
    pub gsi: u32,
}

/// The machine as the firmware describes it.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// Local APIC ids of the usable processors, the boot processor among them.
    pub apic_ids: heapless::Vec<u32, PROCESSORS_MAX>,
    /// Usable processors in all, also those beyond the list.
    pub processors: usize,
    /// The I/O APICs.
    pub io_apics: heapless::Vec<IoApicInfo, 8>,
    /// The moved ISA interrupts.
    pub overrides: heapless::Vec<Override, 16>,
    /// I/O port of the ACPI power management timer.
    pub timer_port: Option<u16>,
}

impl Platform {
    /// The I/O APIC input of PIT channel 0.
    #[must_use]
    pub fn pit_gsi(&self) -> u32 {
        self.overrides.iter().find(|moved| moved.irq == 0).map_or(0, |moved| moved.gsi)
    }
}

/// Why the firmware's tables say nothing of the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The bootloader found no RSDP.
    Rsdp,
    /// The RSDP or the table of tables is damaged.
    Damaged,
    /// No valid MADT.
    Madt,
}

impl core::fmt::Display for Missing {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Rsdp => "no ACPI (no RSDP)",
            Self::Damaged => "the ACPI tables are damaged",
            Self::Madt => "ACPI has no valid MADT (\"APIC\" table)",
        })
    }
}

#[derive(Clone)]
struct Direct;

impl AcpiHandler for Direct {
    unsafe fn map_physical_region<T>(&self, address: usize, size: usize) -> PhysicalMapping<Self, T> {
        let start = direct(Hpa(address as u64)).cast::<T>();
        // SAFETY: an address in the upper half.
        let start = unsafe { NonNull::new_unchecked(start) };
        // SAFETY: under the bootloader's tables, which are still loaded, all physical memory is mapped there.
        unsafe { PhysicalMapping::new(address, start, size, size, Self) }
    }

    fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
}

/// Reads the tables behind the RSDP at `rsdp`.
///
/// # Errors
/// [`Missing`] says what is not there; the machine then has one core for us.
///
/// # Safety
/// The bootloader's direct map of all physical memory is in use, and `rsdp` is where it found the RSDP.
pub unsafe fn read(rsdp: Option<u64>) -> Result<Platform, Missing> {
    let rsdp = rsdp.ok_or(Missing::Rsdp)?;
    // SAFETY: as the caller promised.
    let tables = unsafe { AcpiTables::from_rsdp(Direct, rsdp as usize) }.map_err(|_| Missing::Damaged)?;
    let madt = tables.find_table::<Madt>().map_err(|_| Missing::Madt)?;
    let length = madt.region_length();
    // SAFETY: the crate has read `length` bytes to sum them.
    let bytes = unsafe { core::slice::from_raw_parts(madt.virtual_start().as_ptr().cast::<u8>(), length) };
    if !entries_are_whole(bytes) {
        return Err(Missing::Madt);
    }
    let mut platform = processors(madt.get());
    platform.timer_port = tables.find_table::<Fadt>().ok().and_then(|fadt| timer_port(&fadt));
    Ok(platform)
}

fn timer_port(fadt: &Fadt) -> Option<u16> {
    let timer = fadt.pm_timer_block().ok()??;
    let is_port = timer.address_space == acpi::address::AddressSpace::SystemIo;
    is_port.then(|| u16::try_from(timer.address).ok()).flatten().filter(|&port| port != 0)
}

/// Bytes before the first entry.
const MADT_HEADER: usize = size_of::<Madt>();

/// Whether every entry's length leads exactly to the next, and each known one is as long as its type: the crate's
/// iterator takes that for granted.
fn entries_are_whole(madt: &[u8]) -> bool {
    let Some(mut rest) = madt.get(MADT_HEADER..) else { return false };
    while let [kind, length, ..] = *rest {
        let least = match kind {
            0 => 8,
            1 | 8 | 10 => 12,
            2 => 10,
            3 => 8,
            4 => 6,
            5 => 12,
            6 | 7 | 9 | 11 | 16 => 16,
            _ => 2,
        };
        if length < least || usize::from(length) > rest.len() {
            return false;
        }
        rest = &rest[usize::from(length)..];
    }
    rest.is_empty()
}

/// Collects the entries of a MADT whose lengths are sound.
fn processors(madt: Pin<&Madt>) -> Platform {
    /// "Processor is enabled": one that is merely "online capable" is not there.
    const ENABLED: u32 = 1;
    let mut platform = Platform::default();
    let add = |platform: &mut Platform, id: u32| {
        // Processors below 255 may be listed in both forms.
        if !platform.apic_ids.contains(&id) {
            platform.processors += 1;
            let _ = platform.apic_ids.push(id);
        }
    };
    for entry in madt.entries() {
        match entry {
            MadtEntry::LocalApic(core) if { core.flags } & ENABLED != 0 => {
                add(&mut platform, core.apic_id.into())
            }
            MadtEntry::LocalX2Apic(core) if { core.flags } & ENABLED != 0 => {
                add(&mut platform, core.x2apic_id)
            }
            MadtEntry::IoApic(io) => {
                let _ = platform.io_apics.push(IoApicInfo {
                    address: Hpa({ io.io_apic_address }.into()),
                    first_gsi: io.global_system_interrupt_base,
                });
            }
            MadtEntry::InterruptSourceOverride(moved) => {
                let _ =
                    platform.overrides.push(Override { irq: moved.irq, gsi: moved.global_system_interrupt });
            }
            _ => {}
        }
    }
    platform
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(8))]
    struct Aligned([u8; 512]);

    fn table(entries: &[&[u8]]) -> (Aligned, usize) {
        let mut bytes = Aligned([0; 512]);
        let mut at = MADT_HEADER;
        for entry in entries {
            bytes.0[at..at + entry.len()].copy_from_slice(entry);
            at += entry.len();
        }
        bytes.0[4..8].copy_from_slice(&(at as u32).to_le_bytes());
        (bytes, at)
    }

    #[test]
    fn a_typical_table() {
        let (bytes, length) = table(&[
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[0, 8, 1, 2, 1, 0, 0, 0],
            &[0, 8, 2, 4, 2, 0, 0, 0],
            &[9, 16, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
            &[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0],
            &[1, 12, 4, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        ]);
        assert!(entries_are_whole(&bytes.0[..length]));
        // SAFETY: the buffer is longer than the table, and its length field says how long that is.
        let madt = unsafe { &*bytes.0.as_ptr().cast::<Madt>() };
        // SAFETY: nothing moves it.
        let platform = processors(unsafe { Pin::new_unchecked(madt) });
        assert_eq!(platform.apic_ids[..], [0, 2, 0x100]);
        assert_eq!(platform.processors, 3);
        assert_eq!(platform.io_apics[..], [IoApicInfo { address: Hpa(0xfec0_0000), first_gsi: 0 }]);
        assert_eq!(platform.pit_gsi(), 2);
    }

    #[test]
    fn damaged_lengths_are_refused() {
        for entry in [&[0u8, 0, 0, 0][..], &[0, 7, 0, 0, 0, 0, 0], &[0, 9, 0, 0, 1, 0, 0, 0], &[77]] {
            let (bytes, length) = table(&[entry]);
            assert!(!entries_are_whole(&bytes.0[..length]), "{entry:?}");
        }
        assert!(!entries_are_whole(&[0; 10]));
    }
}
