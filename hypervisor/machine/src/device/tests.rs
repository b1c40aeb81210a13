//! The devices together, driven as guests drive them.

use proptest::prelude::*;

use super::clock::{NS_PER_S, PERIOD_NS_MIN};
use super::*;

fn devices(vcpus: u32) -> Devices {
    Devices::new(&DeviceConfig {
        vcpus,
        debug_exit: true,
        shutdown_port: true,
        debug_console: true,
        bench_marks: true,
        rtc_start_unix_s: 1_700_000_000,
        low_memory_bytes: 256 << 20,
        ..DeviceConfig::default()
    })
}

fn outb(devices: &mut Devices, port: u16, value: u8, now_ns: u64) {
    assert_eq!(devices.port_write(port, Width::Byte, u32::from(value), now_ns), Outcome::Done);
}

fn inb(devices: &mut Devices, port: u16, now_ns: u64) -> u8 {
    devices.port_read(port, Width::Byte, now_ns) as u8
}

/// 8259 pair at 0x30, all masked but the cascade, as Linux does it.
fn init_pic(devices: &mut Devices) {
    for (port, value) in
        [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x01), (0xa0, 0x11), (0xa1, 0x38), (0xa1, 0x02)]
    {
        outb(devices, port, value, 0);
    }
    for (port, value) in [(0xa1, 0x01), (0x21, 0xfb), (0xa1, 0xff)] {
        outb(devices, port, value, 0);
    }
}

fn lapic(devices: &mut Devices, vcpu: usize, offset: u64, value: u32, now_ns: u64) {
    let gpa = Gpa(LAPIC_BASE.0 + offset);
    devices.mmio_write(vcpu, gpa, Width::Dword, u64::from(value), now_ns).unwrap();
}

fn redirect(devices: &mut Devices, pin: u32, entry: u64) {
    for (half, value) in [(1, entry >> 32), (0, entry & 0xffff_ffff)] {
        devices.mmio_write(0, IOAPIC_BASE, Width::Dword, u64::from(0x10 + 2 * pin + half), 0).unwrap();
        devices.mmio_write(0, Gpa(IOAPIC_BASE.0 + 0x10), Width::Dword, value, 0).unwrap();
    }
}

#[test]
fn pit_through_the_8259_in_virtual_wire_mode() {
    let mut devices = devices(1);
    init_pic(&mut devices);
    outb(&mut devices, 0x21, 0xfa, 0);
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        outb(&mut devices, port, value, 0);
    }
    for _ in 0..3 {
        assert_eq!(devices.requests(0), Requests::empty());
        let deadline = devices.next_deadline_ns(0).unwrap();
        devices.advance(deadline);
        assert_eq!(devices.requests(0), Requests::INTERRUPT);
        assert_eq!(devices.acknowledge(0), Some(0x30));
        assert_eq!(devices.acknowledge(0), None);
        outb(&mut devices, 0x20, 0x60, deadline);
    }
}

#[test]
fn pit_through_the_ioapic() {
    let mut devices = devices(2);
    lapic(&mut devices, 1, 0xf0, 0x1ff, 0);
    redirect(&mut devices, 2, 1 << 56 | 0x30);
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        outb(&mut devices, port, value, 0);
    }
    devices.take_kicks();
    let deadline = devices.next_deadline_ns(0).unwrap();
    devices.advance(deadline);
    assert_eq!(devices.take_kicks(), 1 << 1);
    assert_eq!(devices.acknowledge(1), Some(0x30));
    lapic(&mut devices, 1, 0xb0, 0, deadline);
    assert_eq!(devices.requests(1), Requests::empty());
}

#[test]
fn serial_console() {
    let mut devices = devices(1);
    init_pic(&mut devices);
    outb(&mut devices, 0x21, 0xeb, 0);
    outb(&mut devices, 0x3fc, 0x0b, 0);
    outb(&mut devices, 0x3f8, b'#', 10);
    // A prompt without an end of line becomes due by itself.
    let deadline = devices.next_deadline_ns(0).unwrap();
    devices.advance(deadline);
    assert!(devices.console_is_due());
    let mut buf = [0; 64];
    assert_eq!(devices.take_output(&mut buf), 1);
    assert_eq!(devices.next_deadline_ns(0), None);
    assert_eq!(devices.port_write(0x3f8, Width::Byte, 10, 20), Outcome::ConsoleReady);
    // Typed input interrupts.
    outb(&mut devices, 0x3f9, 0x05, 20);
    assert_eq!(devices.push_input(b"x"), 1);
    assert_eq!(devices.acknowledge(0), Some(0x34));
    assert_eq!(inb(&mut devices, 0x3fa, 20), 0x04);
    assert_eq!(inb(&mut devices, 0x3f8, 20), b'x');
    outb(&mut devices, 0x20, 0x64, 20);
    assert_eq!(devices.requests(0), Requests::empty());
}

#[test]
fn clocks_agree() {
    // PIT, PM timer and APIC timer measured against each other over 50 ms, as guests calibrate.
    let mut devices = devices(1);
    let (start, end) = (3 * NS_PER_S, 3 * NS_PER_S + 50_000_000);
    lapic(&mut devices, 0, 0x3e0, 0x0b, start);
    lapic(&mut devices, 0, 0x380, u32::MAX, start);
    outb(&mut devices, 0x61, 1, start);
    for (port, value) in [(0x43, 0xb0), (0x42, 0xff), (0x42, 0xff)] {
        outb(&mut devices, port, value, start);
    }
    let pm_start = devices.port_read(0x608, Width::Dword, start);
    let pm = devices.port_read(0x608, Width::Dword, end).wrapping_sub(pm_start) & 0xff_ffff;
    outb(&mut devices, 0x43, 0x80, end);
    let left = u16::from_le_bytes([inb(&mut devices, 0x42, end), inb(&mut devices, 0x42, end)]);
    let apic = u32::MAX - devices.lapic_read(0, 0x390, end);
    assert!(pm.abs_diff(3_579_545 / 20) <= 1);
    assert!((0xffff - u32::from(left)).abs_diff(1_193_182 / 20) <= 1);
    assert_eq!(apic, 50_000_000);
}

#[test]
fn processor_0_learns_of_a_new_platform_deadline() {
    let mut devices = devices(2);
    lapic(&mut devices, 1, 0xf0, 0x1ff, 0);
    lapic(&mut devices, 1, 0x320, 0xec, 0);
    lapic(&mut devices, 1, 0x380, 10, 0);
    devices.take_kicks();
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        outb(&mut devices, port, value, 0);
    }
    assert_eq!(devices.take_kicks(), 1);
}

#[test]
fn starting_the_second_processor() {
    let mut devices = devices(2);
    assert!(devices.waits_for_startup(1));
    lapic(&mut devices, 0, 0x310, 1 << 24, 0);
    lapic(&mut devices, 0, 0x300, 0xc500, 0);
    lapic(&mut devices, 0, 0x300, 0x8500, 0);
    lapic(&mut devices, 0, 0x300, 0x0699, 0);
    assert_eq!(devices.take_kicks(), 1 << 1);
    assert_eq!(devices.requests(1), Requests::STARTUP);
    assert_eq!(devices.take_startup(1), Some(Startup::Run { page: 0x99 }));
    assert!(!devices.waits_for_startup(1));
    assert_eq!(devices.requests(1), Requests::empty());
}

#[test]
fn interprocessor_interrupts() {
    let mut devices = devices(3);
    for vcpu in 0..3 {
        lapic(&mut devices, vcpu, 0xf0, 0x1ff, 0);
        lapic(&mut devices, vcpu, 0xd0, 1 << (24 + vcpu), 0);
    }
    devices.take_kicks();
    lapic(&mut devices, 2, 0x300, 0x000c_00fd, 0);
    assert_eq!(devices.take_kicks(), 0b011);
    lapic(&mut devices, 0, 0x300, 0x0004_0040, 0);
    assert_eq!(devices.take_kicks(), 0);
    assert_eq!(devices.acknowledge(0), Some(0xfd));
    lapic(&mut devices, 0, 0x310, 0b110 << 24, 0);
    lapic(&mut devices, 0, 0x300, 0x0000_0c00, 0);
    assert_eq!(devices.requests(2), Requests::NMI);
    assert!(devices.take_nmi(2));
    assert!(!devices.take_nmi(2));
    // Lowest priority: processor 1 still has a vector in service.
    assert_eq!(devices.acknowledge(1), Some(0xfd));
    lapic(&mut devices, 0, 0x300, 0x0000_0950, 0);
    assert_eq!(devices.acknowledge(2), Some(0x50));
}

#[test]
fn messages_for_many_processors() {
    let mut devices = devices(64);
    for vcpu in 0..64 {
        lapic(&mut devices, vcpu, 0xf0, 0x1ff, 0);
    }
    devices.take_kicks();
    // All but the sender, by shorthand; all, by the broadcast identifier; the last one, by its own.
    lapic(&mut devices, 5, 0x300, 0x000c_00fd, 0);
    assert_eq!(devices.take_kicks(), !(1 << 5));
    assert!((0..64).all(|vcpu| devices.acknowledge(vcpu).is_some() == (vcpu != 5)));
    lapic(&mut devices, 5, 0x310, 0xff << 24, 0);
    lapic(&mut devices, 5, 0x300, 0x0000_00fe, 0);
    assert_eq!(devices.requests(63), Requests::empty(), "of the same class as the one in service");
    assert_eq!(devices.acknowledge(5), Some(0xfe));
    lapic(&mut devices, 5, 0xb0, 0, 0);
    for vcpu in (0..64).filter(|&vcpu| vcpu != 5) {
        lapic(&mut devices, vcpu, 0xb0, 0, 0);
        assert_eq!(devices.acknowledge(vcpu), Some(0xfe), "vCPU {vcpu}");
        lapic(&mut devices, vcpu, 0xb0, 0, 0);
    }
    devices.take_kicks();
    lapic(&mut devices, 5, 0x310, 63 << 24, 0);
    lapic(&mut devices, 5, 0x300, 0x0000_0400, 0);
    assert_eq!((devices.take_kicks(), devices.requests(63)), (1 << 63, Requests::NMI));
}

#[test]
fn the_lowest_priority_of_a_set_takes_the_interrupt() {
    let mut devices = devices(4);
    for (vcpu, tpr) in [(0, 0), (1, 0x40), (2, 0x20), (3, 0x30)] {
        lapic(&mut devices, vcpu, 0xf0, 0x1ff, 0);
        lapic(&mut devices, vcpu, 0xd0, 1 << (24 + vcpu), 0);
        devices.set_tpr(vcpu, tpr);
    }
    let send = |devices: &mut Devices| {
        devices.take_kicks();
        // To 1, 2 and 3, logically.
        lapic(devices, 0, 0x310, 0b1110 << 24, 0);
        lapic(devices, 0, 0x300, 0x0000_0950, 0);
        devices.take_kicks()
    };
    assert_eq!(send(&mut devices), 1 << 2);
    assert_eq!(devices.acknowledge(2), Some(0x50));
    assert_eq!(send(&mut devices), 1 << 3, "the other serves one of that class");
    // One whose APIC is switched off by software takes none.
    lapic(&mut devices, 3, 0xf0, 0xff, 0);
    assert_eq!(send(&mut devices), 1 << 1);
}

#[test]
fn x2apic_destinations_are_clusters_of_sixteen() {
    let mut devices = devices(64);
    for vcpu in 0..64 {
        let base = devices.apic_base(vcpu);
        devices.set_apic_base(vcpu, base | 1 << 10).unwrap();
        devices.x2apic_write(vcpu, 0x80f, 0x1ff, 0).unwrap();
    }
    devices.take_kicks();
    // Cluster 3, its first and its last; then everybody; then one, physically.
    devices.x2apic_write(0, 0x830, 0x0003_8001 << 32 | 0x0840, 0).unwrap();
    assert_eq!(devices.take_kicks(), 1 << 48 | 1 << 63);
    devices.x2apic_write(0, 0x830, 0xffff_ffff << 32 | 0x0060, 0).unwrap();
    assert_eq!(devices.take_kicks(), !(1 << 48 | 1 << 63), "those two have a request already");
    assert_eq!((devices.acknowledge(48), devices.acknowledge(17)), (Some(0x60), Some(0x60)));
    devices.take_kicks();
    devices.x2apic_write(0, 0x830, 17 << 32 | 0x00f0, 0).unwrap();
    assert_eq!(devices.take_kicks(), 1 << 17);
}

#[test]
fn task_priority_holds_interrupts_back() {
    let mut devices = devices(1);
    devices.set_cr8(0, 5);
    lapic(&mut devices, 0, 0x300, 0x0004_0051, 0);
    assert_eq!(devices.requests(0), Requests::empty());
    assert_eq!(devices.tpr_threshold(0), 5);
    devices.set_cr8(0, 4);
    assert_eq!(devices.requests(0), Requests::INTERRUPT);
    assert_eq!(devices.tpr_threshold(0), 0);
}

#[test]
fn tsc_deadline() {
    let mut devices = devices(1);
    lapic(&mut devices, 0, 0x320, 2 << 17 | 0xec, 0);
    devices.set_tsc_deadline(0, 5_000, 2_000, 100);
    assert_eq!(devices.tsc_deadline(0), 5_000);
    assert_eq!(devices.next_deadline_ns(0), Some(100 + 3_001));
    devices.advance(3_101);
    assert_eq!((devices.tsc_deadline(0), devices.acknowledge(0)), (0, Some(0xec)));
    devices.set_tsc_deadline(0, u64::MAX, 0, u64::MAX - 5);
    assert_eq!(devices.tsc_deadline(0), u64::MAX);
}

#[test]
fn sci_of_the_power_button() {
    let mut devices = devices(1);
    redirect(&mut devices, 9, 1 << 15 | 0x39);
    assert_eq!(devices.port_write(0x602, Width::Word, 0x100, 0), Outcome::Done);
    devices.press_power_button();
    assert_eq!(devices.acknowledge(0), Some(0x39));
    assert_eq!(devices.port_read(0x600, Width::Word, 0), 0x100);
    assert_eq!(devices.port_write(0x600, Width::Word, 0x100, 0), Outcome::Done);
    lapic(&mut devices, 0, 0xb0, 0, 0);
    assert_eq!(devices.acknowledge(0), None);
    assert_eq!(devices.port_write(0x604, Width::Word, 5 << 10 | 1 << 13, 0), Outcome::PowerOff);
}

#[test]
fn ways_to_end() {
    let mut devices = devices(1);
    assert_eq!(devices.port_write(0xf4, Width::Dword, 0x2a, 0), Outcome::Exit(0x2a));
    let outcomes: Vec<_> =
        b"Shutdown".iter().map(|&byte| devices.port_write(0x8900, Width::Byte, u32::from(byte), 0)).collect();
    assert_eq!(outcomes[7], Outcome::PowerOff);
    assert_eq!(devices.port_write(0x64, Width::Byte, 0xfe, 0), Outcome::Reset);
    assert_eq!(devices.port_write(0xcf8, Width::Dword, 0x8000_0600, 0), Outcome::Done);
    assert_eq!(devices.port_write(0xcf9, Width::Byte, 6, 0), Outcome::Reset);
    assert_eq!(devices.port_write(0xe8, Width::Byte, 1, 0), Outcome::BenchMark(BenchMark::End));
    assert_eq!(inb(&mut devices, 0xe9, 0), 0xe9);
}

#[test]
fn nobody_there() {
    let mut devices = devices(1);
    assert_eq!(devices.port_read(0xcf8, Width::Dword, 0), u32::MAX);
    assert_eq!(devices.take_unclaimed_port(), None);
    assert_eq!(devices.port_read(0x2f8, Width::Word, 0), 0xffff);
    assert_eq!(devices.take_unclaimed_port(), Some(UnclaimedPort { port: 0x2f8, access: PortAccess::Read }));
    assert_eq!(devices.unclaimed_port_accesses(), 2);
    assert_eq!(devices.mmio_read(0, Gpa(0xfed0_0000), Width::Qword, 0), Err(Unclaimed));
    // Accesses that wrap round the port space.
    assert_eq!(devices.port_read(0xffff, Width::Dword, 0) & 0xff, 0xff);
}

#[test]
fn reading_an_illegal_register_raises_the_error_interrupt() {
    let mut devices = devices(1);
    lapic(&mut devices, 0, 0x370, 0x66, 0);
    devices.lapic_read(0, 0x3f0, 0);
    assert_eq!(devices.requests(0), Requests::INTERRUPT);
    assert_eq!(devices.acknowledge(0), Some(0x66));
}

#[test]
fn x2apic_takes_the_page_away() {
    let mut devices = devices(2);
    let base = devices.apic_base(0);
    devices.set_apic_base(0, base | 1 << 10).unwrap();
    assert_eq!(devices.lapic_access(0), Access::X2Apic);
    assert_eq!(devices.mmio_read(0, LAPIC_BASE, Width::Dword, 0), Err(Unclaimed));
    assert_eq!(devices.mmio_read(1, Gpa(LAPIC_BASE.0 + 0x20), Width::Dword, 0), Ok(1 << 24));
    lapic(&mut devices, 1, 0xf0, 0x1ff, 0);
    devices.x2apic_write(0, 0x830, 1 << 32 | 0x77, 0).unwrap();
    assert_eq!(devices.acknowledge(1), Some(0x77));
}

/// One thing a guest can do.
#[derive(Clone, Debug)]
enum Step {
    In(u16, u8),
    Out(u16, u8, u32),
    Read(bool, u16, u8),
    Write(bool, u16, u8, u32),
    Msr(u8, u64),
    Base(u64),
    Deadline(u64),
    Input,
    Acknowledge,
}

fn port() -> impl Strategy<Value = u16> {
    let owned = vec![
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x64, 0x70, 0x71, 0x92, 0x3f8,
        0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x600, 0x602, 0x604, 0x608, 0xcf9, 0xe8, 0xe9, 0xf4,
        0x8900,
    ];
    prop_oneof![9 => prop::sample::select(owned), 1 => any::<u16>()]
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![(0u16..0x40).prop_map(|register| register << 4), 0u16..0x1000];
    prop_oneof![
        3 => (port(), 0u8..3).prop_map(|(port, width)| Step::In(port, width)),
        6 => (port(), 0u8..3, any::<u32>()).prop_map(|(port, width, value)| Step::Out(port, width, value)),
        2 => (any::<bool>(), offset.clone(), 0u8..4).prop_map(|(io, offset, width)| Step::Read(io, offset, width)),
        6 => (any::<bool>(), offset, 0u8..4, any::<u32>())
            .prop_map(|(io, offset, width, value)| Step::Write(io, offset, width, value)),
        2 => (any::<u8>(), any::<u64>()).prop_map(|(number, value)| Step::Msr(number, value)),
        1 => any::<u64>().prop_map(|bits| Step::Base(0xfee0_0000 | bits & 0xd00)),
        1 => any::<u64>().prop_map(Step::Deadline),
        1 => Just(Step::Input),
        3 => Just(Step::Acknowledge),
    ]
}

proptest! {
    #[test]
    fn no_guest_can_break_it(
        steps in prop::collection::vec((step(), 0usize..3, prop_oneof![0u64..100_000, any::<u32>().prop_map(u64::from)]), 1..300)
    ) {
        const WIDTHS: [Width; 4] = [Width::Byte, Width::Word, Width::Dword, Width::Qword];
        let mut devices = devices(3);
        let mut now = 0u64;
        for (step, vcpu, passed) in steps {
            now += passed;
            let page = |io| if io { IOAPIC_BASE.0 } else { LAPIC_BASE.0 };
            match step {
                Step::In(port, width) => {
                    devices.port_read(port, WIDTHS[usize::from(width)], now);
                }
                Step::Out(port, width, value) => {
                    let _ = devices.port_write(port, WIDTHS[usize::from(width)], value, now);
                }
                Step::Read(io, offset, width) => {
                    let gpa = Gpa(page(io) + u64::from(offset));
                    let _ = devices.mmio_read(vcpu, gpa, WIDTHS[usize::from(width)], now);
                }
                Step::Write(io, offset, width, value) => {
                    let gpa = Gpa(page(io) + u64::from(offset));
                    let _ = devices.mmio_write(vcpu, gpa, WIDTHS[usize::from(width)], u64::from(value), now);
                }
                Step::Msr(number, value) => {
                    let msr = 0x800 + u32::from(number);
                    let _ = devices.x2apic_write(vcpu, msr, value & 0xff, now);
                    let _ = devices.x2apic_write(vcpu, msr, value, now);
                    let _ = devices.x2apic_read(vcpu, msr, now);
                }
                Step::Base(base) => {
                    let _ = devices.set_apic_base(vcpu, base);
                }
                Step::Deadline(tsc) => devices.set_tsc_deadline(vcpu, tsc, now, now),
                Step::Input => {
                    devices.push_input(b"hello");
                }
                Step::Acknowledge => {
                    let requested = devices.requests(vcpu).contains(Requests::INTERRUPT);
                    let vector = devices.acknowledge(vcpu);
                    prop_assert_eq!(requested, vector.is_some());
                    devices.take_nmi(vcpu);
                    devices.take_startup(vcpu);
                    devices.take_kicks();
                }
            }
            devices.advance(now);
            for vcpu in 0..3 {
                prop_assert!(devices.next_deadline_ns(vcpu).is_none_or(|deadline| deadline > now));
            }
            prop_assert!(!devices.is_due(now));
        }
        // Left alone, the timers keep a core busy only so often: bounded for each of the few periodic ones.
        let end = now + 20 * PERIOD_NS_MIN;
        let mut wakes = 0;
        while let Some(next) = (0..3).filter_map(|vcpu| devices.next_deadline_ns(vcpu)).min()
            && next <= end
        {
            devices.advance(next);
            wakes += 1;
            prop_assert!(wakes <= 20 * 8);
        }
        let mut buf = [0; 256];
        while devices.take_output(&mut buf) == buf.len() {}
        devices.advance(u64::MAX - 1);
    }
}
