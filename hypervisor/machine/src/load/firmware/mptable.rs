//! The MP floating pointer and configuration table (Intel MultiProcessor Specification, version 1.4), for guests
//! that do not read ACPI.

use alloc::vec::Vec;

use memory::Gpa;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::{IOAPIC, LAPIC, SCI, TIMER_PIN, apic_id, checksum, ioapic_id};

const ISA_BUS: u8 = 0;
const ISA_IRQS: u8 = 16;
/// The line by which the second 8259 reports to the first: no device drives it.
const CASCADE_IRQ: u8 = 2;
/// The 8254.
const TIMER_IRQ: u8 = 0;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FloatingPointer {
    signature: [u8; 4],
    table: U32,
    /// In 16-byte units.
    length: u8,
    revision: u8,
    checksum: u8,
    /// All 0: there is a table, and virtual-wire mode.
    features: [u8; 5],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    length: U16,
    revision: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: U32,
    oem_table_bytes: U16,
    entries: U16,
    lapic: U32,
    extended_length: U16,
    extended_checksum: u8,
    reserved: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Processor {
    kind: u8,
    apic_id: u8,
    apic_version: u8,
    /// Bit 0: usable; bit 1: the boot processor.
    flags: u8,
    /// Stepping, model, family.
    signature: U32,
    /// CPUID.1:EDX.
    features: U32,
    reserved: [U32; 2],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Bus {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    /// Bit 0: usable.
    flags: u8,
    address: U32,
}

/// An interrupt's way to an I/O APIC or to a local APIC.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Interrupt {
    kind: u8,
    delivery: u8,
    /// Polarity in bits 1:0, trigger mode in bits 3:2; 0 is as the bus has it.
    flags: U16,
    bus: u8,
    irq: u8,
    apic_id: u8,
    pin: u8,
}

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Delivery: a vectored interrupt.
const INT: u8 = 0;
/// Delivery: NMI.
const NMI: u8 = 1;
/// Delivery: by the 8259.
const EXT_INT: u8 = 3;
/// Level-triggered, active high.
const LEVEL_HIGH: u16 = 0b1101;
/// A local interrupt goes to every processor.
const ALL: u8 = 0xff;

/// Floating pointer and table, for `base` (16-byte aligned, below 1 MiB).
#[must_use]
pub fn table(base: Gpa, vcpus: u32) -> Vec<u8> {
    let mut body = Vec::new();
    let mut entries = 0u16;
    let mut add = |entry: &[u8]| {
        body.extend_from_slice(entry);
        entries += 1;
    };
    for vcpu in 0..vcpus {
        let processor = Processor {
            kind: PROCESSOR,
            apic_id: apic_id(vcpu),
            apic_version: 0x14,
            flags: if vcpu == 0 { 0b11 } else { 0b01 },
            // Readers ask CPUID; these say no more than "P6 with FPU and APIC".
            signature: 0x600.into(),
            features: 0x201.into(),
            reserved: [0.into(); 2],
        };
        add(processor.as_bytes());
    }
    add(Bus { kind: BUS, id: ISA_BUS, name: *b"ISA   " }.as_bytes());
    let ioapic = ioapic_id(vcpus);
    let address = (IOAPIC.0 as u32).into();
    add(IoApic { kind: IO_APIC, id: ioapic, version: 0x20, flags: 1, address }.as_bytes());
    for irq in (0..ISA_IRQS).filter(|&irq| irq != CASCADE_IRQ) {
        let interrupt = Interrupt {
            kind: IO_INTERRUPT,
            delivery: INT,
            flags: if irq == SCI { LEVEL_HIGH } else { 0 }.into(),
            bus: ISA_BUS,
            irq,
            apic_id: ioapic,
            pin: if irq == TIMER_IRQ { TIMER_PIN } else { irq },
        };
        add(interrupt.as_bytes());
    }
    for (delivery, pin) in [(EXT_INT, 0), (NMI, 1)] {
        let flags = 0.into();
        let local =
            Interrupt { kind: LOCAL_INTERRUPT, delivery, flags, bus: ISA_BUS, irq: 0, apic_id: ALL, pin };
        add(local.as_bytes());
    }

    let header = Header {
        signature: *b"PCMP",
        length: ((size_of::<Header>() + body.len()) as u16).into(),
        revision: 4,
        checksum: 0,
        oem: *b"UMBRA   ",
        product: *b"VIRTUAL PC  ",
        oem_table: 0.into(),
        oem_table_bytes: 0.into(),
        entries: entries.into(),
        lapic: (LAPIC.0 as u32).into(),
        extended_length: 0.into(),
        extended_checksum: 0,
        reserved: 0,
    };
    let mut table = [header.as_bytes(), &body].concat();
    table[7] = checksum(&table);

    let mut pointer = FloatingPointer {
        signature: *b"_MP_",
        table: (base.0 as u32 + size_of::<FloatingPointer>() as u32).into(),
        length: 1,
        revision: 4,
        checksum: 0,
        features: [0; 5],
    };
    pointer.checksum = checksum(pointer.as_bytes());
    [pointer.as_bytes(), &table].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_lengths_and_counts_hold() {
        for vcpus in [1, 2, 254] {
            let bytes = table(Gpa(0xf_0000), vcpus);
            assert_eq!((&bytes[..4], checksum(&bytes[..16])), (&b"_MP_"[..], 0));
            assert_eq!(bytes[4..8], 0xf_0010u32.to_le_bytes());
            let table = &bytes[16..];
            assert_eq!((&table[..4], checksum(table)), (&b"PCMP"[..], 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let mut at = 44;
            let mut entries = 0;
            let mut last_kind = 0;
            while at < table.len() {
                assert!(table[at] >= last_kind, "kinds ascend");
                last_kind = table[at];
                at += if last_kind == PROCESSOR { 20 } else { 8 };
                entries += 1;
            }
            assert_eq!(at, table.len());
            assert_eq!(entries, u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(u32::from(entries), vcpus + 19);
        }
    }

    #[test]
    fn the_timer_is_on_pin_2_and_the_sci_is_level() {
        let bytes = table(Gpa(0xf_0000), 1);
        let has = |entry: &[u8]| bytes.windows(8).any(|window| window == entry);
        assert!(has(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, 0, 1, 2]));
        assert!(has(&[IO_INTERRUPT, INT, 13, 0, ISA_BUS, 9, 1, 9]));
        assert!(has(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, 4, 1, 4]));
        assert!(has(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL, 1]));
    }
}
