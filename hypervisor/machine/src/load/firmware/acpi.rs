//! The ACPI tables (ACPI specification 6.4): RSDP, XSDT, FADT, FACS, DSDT, MADT.
//!
//! They describe a PC with COM1, a real-time clock, 8259s, I/O APIC and local APICs, a PM timer and soft-off;
//! without keyboard controller, screen and PCI. The ports named here are those of `machine::device`.

use alloc::vec::Vec;

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use memory::Gpa;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{IOAPIC, LAPIC, SCI, TIMER_PIN, apic_id, ioapic_id};

/// PM1a event block: status and enable, two bytes each.
pub const PM1A_EVENT: u16 = 0x600;
/// PM1a control, two bytes.
pub const PM1A_CONTROL: u16 = 0x604;
/// PM timer, 24 bits in a four-byte register.
pub const PM_TIMER: u16 = 0x608;
/// SLP_TYP that, with SLP_EN, turns the guest off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Writing [`RESET_VALUE`] here resets the guest.
pub const RESET_PORT: u16 = 0xcf9;
/// See [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;

const OEM: [u8; 6] = *b"UMBRA ";
const OEM_TABLE: [u8; 8] = *b"UMBRAPC ";
const OEM_REVISION: u32 = 1;
/// A table's header alone.
const HEADER_BYTES: u32 = 36;
/// Tables start at multiples of this; the FACS needs it.
const ALIGNMENT: usize = 64;

/// All tables, for `base` (below 4 GiB, 64-byte aligned), the RSDP first. `mailbox`: see
/// [`wakeup`](super::wakeup); it is announced if given.
#[must_use]
pub fn tables(base: Gpa, vcpus: u32, mailbox: Option<Gpa>) -> Vec<u8> {
    let mut area = Area { base, bytes: alloc::vec![0; Rsdp::len()] };
    let mut facs = Vec::new();
    FACS::new().to_aml_bytes(&mut facs);
    let facs = area.append(&facs);
    let dsdt = area.append(dsdt().as_slice());
    let fadt = area.append(fadt(facs, dsdt).as_slice());
    let madt = area.append(madt(vcpus, mailbox).as_slice());
    let mut xsdt = table(*b"XSDT", 1);
    xsdt.append_slice(&fadt.0.to_le_bytes());
    xsdt.append_slice(&madt.0.to_le_bytes());
    let xsdt = area.append(xsdt.as_slice());
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    area.bytes
}

struct Area {
    base: Gpa,
    bytes: Vec<u8>,
}

impl Area {
    fn append(&mut self, table: &[u8]) -> Gpa {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let start = Gpa(self.base.0 + self.bytes.len() as u64);
        self.bytes.extend_from_slice(table);
        start
    }
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_BYTES, revision, OEM, OEM_TABLE, OEM_REVISION)
}

/// A register in I/O space ("Generic Address Structure").
#[derive(Clone, Copy, Default, IntoBytes, Immutable, FromBytes)]
#[repr(C)]
struct Register {
    space: u8,
    bits: u8,
    bit_offset: u8,
    access: u8,
    address: U64,
}

impl Register {
    fn port(port: u16, bytes: u8) -> Self {
        const IO_SPACE: u8 = 1;
        // The smallest access that fits: 1 byte, 2 words, 3 double words. An event block is accessed by words.
        let access = match bytes {
            1 => 1,
            _ if port == PM_TIMER => 3,
            _ => 2,
        };
        Self { space: IO_SPACE, bits: bytes * 8, bit_offset: 0, access, address: u64::from(port).into() }
    }
}

/// What follows the header in the FADT, revision 6 ("Fixed ACPI Description Table").
#[derive(Default, IntoBytes, Immutable, FromBytes)]
#[repr(C)]
struct Fadt {
    facs: U32,
    dsdt: U32,
    reserved: u8,
    profile: u8,
    sci: U16,
    /// 0: ACPI mode is on from the start; nothing enables it.
    smi_command: U32,
    acpi_enable: u8,
    acpi_disable: u8,
    s4bios: u8,
    pstate_control: u8,
    pm1a_event: U32,
    pm1b_event: U32,
    pm1a_control: U32,
    pm1b_control: U32,
    pm2_control: U32,
    pm_timer: U32,
    gpe0: U32,
    gpe1: U32,
    pm1_event_length: u8,
    pm1_control_length: u8,
    pm2_control_length: u8,
    pm_timer_length: u8,
    gpe0_length: u8,
    gpe1_length: u8,
    gpe1_base: u8,
    cst_control: u8,
    c2_latency: U16,
    c3_latency: U16,
    flush_size: U16,
    flush_stride: U16,
    duty_offset: u8,
    duty_width: u8,
    day_alarm: u8,
    month_alarm: u8,
    century: u8,
    boot_arch: U16,
    reserved_2: u8,
    flags: U32,
    reset: Register,
    reset_value: u8,
    arm_boot_arch: U16,
    minor_revision: u8,
    x_facs: U64,
    x_dsdt: U64,
    x_pm1a_event: Register,
    x_pm1b_event: Register,
    x_pm1a_control: Register,
    x_pm1b_control: Register,
    x_pm2_control: Register,
    x_pm_timer: Register,
    x_gpe0: Register,
    x_gpe1: Register,
    sleep_control: Register,
    sleep_status: Register,
    hypervisor: U64,
}

/// `boot_arch`: there are devices on the ISA bus. Bit 1, an 8042, stays clear; so does bit 5, no RTC.
const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
/// `boot_arch`: do not probe for a VGA screen.
const BOOT_NO_VGA: u16 = 1 << 2;
/// `boot_arch`: no message-signalled interrupts.
const BOOT_NO_MSI: u16 = 1 << 3;

/// `flags`: WBINVD works; C1 on all processors; power and sleep button are not in the fixed registers;
/// neither is the RTC's wake status; the reset register works. The PM timer has 24 bits (bit 8 clear).
const FADT_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10;
/// Latencies above these say that there is no C2, C3.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

fn fadt(facs: Gpa, dsdt: Gpa) -> Sdt {
    const REVISION: u8 = 6;
    let fadt = Fadt {
        facs: (facs.0 as u32).into(),
        dsdt: (dsdt.0 as u32).into(),
        sci: u16::from(SCI).into(),
        pm1a_event: u32::from(PM1A_EVENT).into(),
        pm1a_control: u32::from(PM1A_CONTROL).into(),
        pm_timer: u32::from(PM_TIMER).into(),
        pm1_event_length: 4,
        pm1_control_length: 2,
        pm_timer_length: 4,
        c2_latency: NO_C2.into(),
        c3_latency: NO_C3.into(),
        // CMOS register 0x32, where PCs keep it.
        century: 0x32,
        boot_arch: (BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_MSI).into(),
        flags: FADT_FLAGS.into(),
        reset: Register::port(RESET_PORT, 1),
        reset_value: RESET_VALUE,
        minor_revision: 4,
        // x_facs stays 0: given both ways, Linux takes it for two tables.
        x_dsdt: dsdt.0.into(),
        x_pm1a_event: Register::port(PM1A_EVENT, 4),
        x_pm1a_control: Register::port(PM1A_CONTROL, 2),
        x_pm_timer: Register::port(PM_TIMER, 4),
        hypervisor: u64::from_le_bytes(*b"Umbra\0\0\0").into(),
        ..Fadt::default()
    };
    let mut table = table(*b"FACP", REVISION);
    table.append_slice(fadt.as_bytes());
    table
}

fn dsdt() -> Sdt {
    let (off, zero) = (SLEEP_TYPE_OFF, 0u8);
    let sleep = Package::new(alloc::vec![&off, &zero, &zero, &zero]);

    let com1_id = EISAName::new("PNP0501");
    let com1_io = IO::new(0x3f8, 0x3f8, 1, 8);
    let com1_irq = isa_irq(4);
    let com1 = device("COM1", &com1_id, &com1_io, &com1_irq);

    let rtc_id = EISAName::new("PNP0B00");
    let rtc_io = IO::new(0x70, 0x70, 1, 2);
    let rtc_irq = isa_irq(8);
    let rtc = device("RTC_", &rtc_id, &rtc_io, &rtc_irq);

    let mut aml = Vec::new();
    Name::new(Path::new("_S5_"), &sleep).to_aml_bytes(&mut aml);
    let devices: [&dyn Aml; 2] = [&Bytes(com1), &Bytes(rtc)];
    Scope::new(Path::new("_SB_"), devices.to_vec()).to_aml_bytes(&mut aml);
    let mut table = table(*b"DSDT", 2);
    table.append_slice(&aml);
    table
}

fn isa_irq(irq: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, irq)
}

fn device(name: &str, id: &EISAName, io: &IO, irq: &Interrupt) -> Vec<u8> {
    let id = Name::new(Path::new("_HID"), id);
    let uid = Name::new(Path::new("_UID"), &0u8);
    let resources = ResourceTemplate::new(alloc::vec![io, irq]);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let mut aml = Vec::new();
    Device::new(Path::new(name), alloc::vec![&id, &uid, &resources]).to_aml_bytes(&mut aml);
    aml
}

/// AML that is encoded already.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// MADT structures ("Multiple APIC Description Table").
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ProcessorLocalApic {
    kind: u8,
    length: u8,
    uid: u8,
    apic_id: u8,
    /// Bit 0: enabled.
    flags: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct IoApic {
    kind: u8,
    length: u8,
    id: u8,
    reserved: u8,
    address: U32,
    first_interrupt: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    irq: u8,
    interrupt: U32,
    /// Polarity in bits 1:0, trigger mode in bits 3:2; 0 is as the bus has it.
    flags: U16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalNmi {
    kind: u8,
    length: u8,
    /// 0xff: every processor.
    uid: u8,
    flags: U16,
    pin: u8,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Wakeup {
    kind: u8,
    length: u8,
    version: U16,
    reserved: U32,
    mailbox: U64,
}

fn madt(vcpus: u32, mailbox: Option<Gpa>) -> Sdt {
    const REVISION: u8 = 5;
    /// There are 8259s too.
    const PCAT_COMPATIBLE: u32 = 1;
    const LEVEL_HIGH: u16 = 0b1101;
    let mut body = Vec::new();
    body.extend((LAPIC.0 as u32).to_le_bytes());
    body.extend(PCAT_COMPATIBLE.to_le_bytes());
    for vcpu in 0..vcpus {
        let id = apic_id(vcpu);
        let entry = ProcessorLocalApic { kind: 0, length: 8, uid: id, apic_id: id, flags: 1.into() };
        body.extend_from_slice(entry.as_bytes());
    }
    let ioapic = IoApic {
        kind: 1,
        length: 12,
        id: ioapic_id(vcpus),
        reserved: 0,
        address: (IOAPIC.0 as u32).into(),
        first_interrupt: 0.into(),
    };
    body.extend_from_slice(ioapic.as_bytes());
    for (irq, interrupt, flags) in [(0, TIMER_PIN, 0), (SCI, SCI, LEVEL_HIGH)] {
        let interrupt = u32::from(interrupt).into();
        let entry = SourceOverride { kind: 2, length: 10, bus: 0, irq, interrupt, flags: flags.into() };
        body.extend_from_slice(entry.as_bytes());
    }
    let nmi = LocalNmi { kind: 4, length: 6, uid: 0xff, flags: 0.into(), pin: 1 };
    body.extend_from_slice(nmi.as_bytes());
    if let Some(mailbox) = mailbox {
        let (version, reserved) = (0.into(), 0.into());
        let entry = Wakeup { kind: 16, length: 16, version, reserved, mailbox: mailbox.0.into() };
        body.extend_from_slice(entry.as_bytes());
    }
    let mut table = table(*b"APIC", REVISION);
    table.append_slice(&body);
    table
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::super::checksum;
    use super::*;

    const BASE: Gpa = Gpa(0xe_0000);

    fn at(area: &[u8], gpa: u64) -> &[u8] {
        let start = (gpa - BASE.0) as usize;
        let len = u32::from_le_bytes(area[start + 4..start + 8].try_into().unwrap()) as usize;
        &area[start..start + len]
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// (XSDT, FADT, MADT, DSDT)
    fn all(area: &[u8]) -> [&[u8]; 4] {
        let xsdt = at(area, u64_at(area, 24));
        let (fadt, madt) = (at(area, u64_at(xsdt, 36)), at(area, u64_at(xsdt, 44)));
        [xsdt, fadt, madt, at(area, u64_at(fadt, 140))]
    }

    #[test]
    fn every_table_is_found_and_adds_up() {
        for (vcpus, mailbox) in [(1, None), (4, Some(Gpa(0xc_8000))), (254, Some(Gpa(0xc_8000)))] {
            let area = tables(BASE, vcpus, mailbox);
            assert_eq!(&area[..8], b"RSD PTR ");
            assert_eq!((checksum(&area[..20]), checksum(&area[..36])), (0, 0));
            let tables = all(&area);
            for (table, signature) in tables.iter().zip([b"XSDT", b"FACP", b"APIC", b"DSDT"]) {
                assert_eq!((&table[..4], checksum(table)), (&signature[..], 0));
            }
            assert_eq!(tables[0].len(), 52);
            let facs = u32::from_le_bytes(tables[1][36..40].try_into().unwrap());
            assert_eq!(facs % 64, 0);
            assert_eq!((&at(&area, facs.into())[..4], at(&area, facs.into()).len()), (&b"FACS"[..], 64));
        }
    }

    #[test]
    fn fadt_fields_lie_where_the_specification_says() {
        let offset = |field: usize| 36 + field;
        assert_eq!(offset(size_of::<Fadt>()), 276);
        assert_eq!(offset(offset_of!(Fadt, sci)), 46);
        assert_eq!(offset(offset_of!(Fadt, pm1a_event)), 56);
        assert_eq!(offset(offset_of!(Fadt, pm_timer)), 76);
        assert_eq!(offset(offset_of!(Fadt, pm1_event_length)), 88);
        assert_eq!(offset(offset_of!(Fadt, boot_arch)), 109);
        assert_eq!(offset(offset_of!(Fadt, flags)), 112);
        assert_eq!(offset(offset_of!(Fadt, reset)), 116);
        assert_eq!(offset(offset_of!(Fadt, x_dsdt)), 140);
        assert_eq!(offset(offset_of!(Fadt, x_pm1a_event)), 148);
        assert_eq!(offset(offset_of!(Fadt, x_pm_timer)), 208);
        assert_eq!(offset(offset_of!(Fadt, sleep_control)), 244);
        assert_eq!(offset(offset_of!(Fadt, hypervisor)), 268);
    }

    #[test]
    fn madt_structures_fill_the_table() {
        let area = tables(BASE, 3, Some(Gpa(0xc_8000)));
        let madt = all(&area)[2];
        let mut at = 44;
        let mut kinds = Vec::new();
        while at < madt.len() {
            kinds.push(madt[at]);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        assert_eq!(kinds, [0, 0, 0, 1, 2, 2, 4, 16]);
        assert_eq!(u64_at(madt, madt.len() - 8), 0xc_8000);
    }

    /// Checked with `iasl -d` when it was made: no warning, and the devices as intended.
    #[test]
    fn the_dsdt_is_the_one_that_was_disassembled() {
        let area = tables(BASE, 1, None);
        let dsdt = all(&area)[3];
        assert_eq!(&dsdt[36..], GOLDEN_AML, "{:02x?}", &dsdt[36..]);
    }

    #[rustfmt::skip]
    const GOLDEN_AML: &[u8] = &[
        0x08, 0x5f, 0x53, 0x35, 0x5f, 0x12, 0x07, 0x04, 0x0a, 0x05, 0x00, 0x00, 0x00, 0x10, 0x4c, 0x06,
        0x5f, 0x53, 0x42, 0x5f, 0x5b, 0x82, 0x31, 0x43, 0x4f, 0x4d, 0x31, 0x08, 0x5f, 0x48, 0x49, 0x44,
        0x0c, 0x41, 0xd0, 0x05, 0x01, 0x08, 0x5f, 0x55, 0x49, 0x44, 0x00, 0x08, 0x5f, 0x43, 0x52, 0x53,
        0x11, 0x16, 0x0a, 0x13, 0x47, 0x01, 0xf8, 0x03, 0xf8, 0x03, 0x01, 0x08, 0x89, 0x06, 0x00, 0x03,
        0x01, 0x04, 0x00, 0x00, 0x00, 0x79, 0x00, 0x5b, 0x82, 0x31, 0x52, 0x54, 0x43, 0x5f, 0x08, 0x5f,
        0x48, 0x49, 0x44, 0x0c, 0x41, 0xd0, 0x0b, 0x00, 0x08, 0x5f, 0x55, 0x49, 0x44, 0x00, 0x08, 0x5f,
        0x43, 0x52, 0x53, 0x11, 0x16, 0x0a, 0x13, 0x47, 0x01, 0x70, 0x00, 0x70, 0x00, 0x01, 0x02, 0x89,
        0x06, 0x00, 0x03, 0x01, 0x08, 0x00, 0x00, 0x00, 0x79, 0x00,
    ];
}
