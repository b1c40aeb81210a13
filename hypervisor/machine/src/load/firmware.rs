//! What a PC's firmware leaves in memory for an operating system: BIOS data area, ACPI tables, MP table,
//! and the mailbox that wakes further processors. The memory map goes with the boot protocol.

pub mod acpi;
pub mod e820;
pub mod mptable;
pub mod wakeup;

use memory::{Gpa, GuestMemory, PAGE_SIZE, Unbacked};

use super::place::zero;
use super::stage;

/// Where the I/O APIC is.
pub const IOAPIC: Gpa = Gpa(0xfec0_0000);
/// Where the local APIC is at reset.
pub const LAPIC: Gpa = Gpa(0xfee0_0000);
/// The system control interrupt: a level-triggered, active-high ISA line.
pub const SCI: u8 = 9;
/// The I/O APIC's pin that the 8254 drives; all other ISA interrupts are on the pin of their number.
pub const TIMER_PIN: u8 = 2;

/// Local APIC identifier of virtual processor `vcpu`.
#[must_use]
pub const fn apic_id(vcpu: u32) -> u8 {
    vcpu as u8
}

/// The I/O APIC's identifier: the first that no processor has.
#[must_use]
pub const fn ioapic_id(vcpus: u32) -> u8 {
    vcpus as u8
}

/// Writes the tables for `vcpus` processors; returns the wakeup mailbox if there is more than one.
///
/// # Errors
/// [`Unbacked`] if there is no RAM below 1 MiB.
pub(super) fn write(vcpus: u32, memory: &dyn GuestMemory) -> Result<Option<Gpa>, Unbacked> {
    write_bios_data(memory)?;
    let mailbox = (vcpus > 1).then_some(stage::MAILBOX);
    if let Some(mailbox) = mailbox {
        zero(memory, mailbox.0, PAGE_SIZE)?;
    }
    memory.write(stage::ACPI, &acpi::tables(stage::ACPI, vcpus, mailbox))?;
    memory.write(stage::MP_TABLE, &mptable::table(stage::MP_TABLE, vcpus))?;
    Ok(mailbox)
}

/// The few fields of the BIOS data area that kernels without another source read: COM1's port, the segment of
/// the extended area, and how much memory lies below it.
fn write_bios_data(memory: &dyn GuestMemory) -> Result<(), Unbacked> {
    const COM1: (Gpa, u16) = (Gpa(0x400), 0x3f8);
    const EXTENDED_SEGMENT: (Gpa, u16) = (Gpa(0x40e), (e820::CONVENTIONAL_END >> 4) as u16);
    const BASE_MEMORY_KIB: (Gpa, u16) = (Gpa(0x413), (e820::CONVENTIONAL_END >> 10) as u16);
    zero(memory, 0x400, 0x100)?;
    zero(memory, e820::CONVENTIONAL_END, 0x400)?;
    for (gpa, value) in [COM1, EXTENDED_SEGMENT, BASE_MEMORY_KIB] {
        memory.write(gpa, &value.to_le_bytes())?;
    }
    // The extended area begins with its own size in KiB.
    memory.write(Gpa(e820::CONVENTIONAL_END), &[1])
}

/// The byte that makes all of `bytes` add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::VCPUS_MAX;
    use super::super::test_ram::TestRam;
    use super::*;

    #[test]
    fn the_largest_guest_fits_into_the_bios_area() {
        let ram = TestRam::new(2 << 20);
        assert_eq!(write(1, &ram), Ok(None));
        assert_eq!(write(VCPUS_MAX, &ram), Ok(Some(stage::MAILBOX)));
        let acpi = acpi::tables(stage::ACPI, VCPUS_MAX, Some(stage::MAILBOX));
        assert!(acpi.len() as u64 <= stage::MP_TABLE.0 - stage::ACPI.0);
        assert!(mptable::table(stage::MP_TABLE, VCPUS_MAX).len() <= 0x1_0000);
        assert_eq!(ram.bytes(0x413, 2), [0x7f, 0x02]);
        assert_eq!(ram.bytes(0x40e, 2), [0xc0, 0x9f]);
    }
}
