//! One guest's devices, and the bus that connects them.
//!
//! All are told the time as guest nanoseconds (`now_ns`) and never read a clock. One [`Devices`] belongs to one
//! guest and is used under that guest's device lock; nothing in it allocates after [`Devices::new`], and what a
//! guest writes can neither panic nor loop it.
//!
//! Interrupts: ISA interrupt n reaches input n of the 8259 pair and of the IOAPIC, except that IRQ 0 is the
//! IOAPIC's input 2. The pair's output is LINT0 of processor 0. For each virtual processor a cached set of
//! [`Requests`] says what waits for it; whoever causes a new one finds the receiver in [`Devices::take_kicks`].

pub mod clock;
pub mod cmos;
pub mod debug;
pub mod ioapic;
pub mod lapic;
pub mod message;
pub mod output;
pub mod pic;
pub mod pit;
pub mod power;
pub mod reset;
pub mod uart;
pub mod unclaimed;
pub mod width;

use alloc::boxed::Box;

use memory::Gpa;

use clock::NEVER;
use cmos::Cmos;
use debug::{BenchMark, ShutdownProgress, ShutdownWord};
use ioapic::IoApic;
use lapic::{Access, Effect, GeneralProtection, Lapic, Startup};
use message::{Delivery, Destination, Message};
use output::Output;
use pic::Pic;
use pit::Pit;
use power::{Power, PowerRequest};
use reset::{ResetPorts, ResetRequest};
use uart::Uart;
use unclaimed::{PortAccess, UnclaimedPort, UnclaimedPorts};
pub use width::Width;

/// The most virtual processors of a guest.
pub const VCPUS_MAX: u32 = 64;
/// Where the IOAPIC's page lies.
pub const IOAPIC_BASE: Gpa = Gpa(0xfec0_0000);
/// Where a local APIC's page lies unless the guest moves it.
pub const LAPIC_BASE: Gpa = Gpa(lapic::DEFAULT_BASE);

const IRQ_TIMER: u8 = 0;
const IRQ_UART: u8 = 4;
const IRQ_RTC: u8 = 8;
const IRQ_SCI: u8 = 9;
/// IRQ 0's input of the IOAPIC, which ACPI's tables and the MP table tell the guest.
const IOAPIC_TIMER_PIN: u8 = 2;
/// The processor that the 8259 pair and the platform's deadlines belong to.
const BOOTSTRAP: usize = 0;

/// What a guest's machine is made of.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Virtual processors, 1..=[`VCPUS_MAX`]; processor n has APIC ID n.
    pub vcpus: u32,
    /// A serial port at 0x3F8.
    pub uart: bool,
    /// A byte written to port 0xF4 ends the guest with that exit code.
    pub debug_exit: bool,
    /// "Shutdown" written to port 0x8900 powers off.
    pub shutdown_port: bool,
    /// Bytes written to port 0xE9 are printed.
    pub debug_console: bool,
    /// Bytes written to port 0xE8 mark benchmark operations.
    pub bench_marks: bool,
    /// The time of day at guest time 0, in seconds since 1970 (UTC).
    pub rtc_start_unix_s: u64,
    /// The frequency of the guest's TSC, in kHz; for the APIC timer's TSC-deadline mode.
    pub tsc_khz: u64,
    /// RAM below 4 GiB, in bytes.
    pub low_memory_bytes: u64,
    /// RAM above 4 GiB, in bytes.
    pub high_memory_bytes: u64,
    /// MAXPHYADDR of the guest, 32..=52.
    pub physical_address_bits: u8,
}

impl Default for DeviceConfig {
    /// One processor with a serial port, no test devices, no memory known to the CMOS.
    fn default() -> Self {
        Self {
            vcpus: 1,
            uart: true,
            debug_exit: false,
            shutdown_port: false,
            debug_console: false,
            bench_marks: false,
            rtc_start_unix_s: 0,
            tsc_khz: 1_000_000,
            low_memory_bytes: 0,
            high_memory_bytes: 0,
            physical_address_bits: 40,
        }
    }
}

/// What a port write has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a guest that asked for its end must not run on"]
pub enum Outcome {
    /// Nothing that concerns anybody else.
    Done,
    /// Output should be drained now, see [`Devices::take_output`].
    ConsoleReady,
    /// A benchmark operation begins or ends.
    BenchMark(BenchMark),
    /// The guest ended with this exit code.
    Exit(u8),
    /// The guest switched its machine off.
    PowerOff,
    /// The guest asked for a reset of its machine.
    Reset,
}

impl Outcome {
    /// The weightier of the outcomes of a split access; the earlier one if they weigh the same.
    fn and_then(self, later: Self) -> Self {
        let ends = |outcome| matches!(outcome, Self::Exit(_) | Self::PowerOff | Self::Reset);
        if self == Self::Done || ends(later) && !ends(self) { later } else { self }
    }
}

/// No device is at this guest physical address: reads give all-ones, writes are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclaimed;

bitflags::bitflags! {
    /// What waits for a virtual processor.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Requests: u8 {
        /// A vector for [`Devices::acknowledge`]: it can be delivered as soon as RFLAGS.IF and the blocking by
        /// STI and MOV SS allow it.
        const INTERRUPT = 1 << 0;
        /// An NMI for [`Devices::take_nmi`].
        const NMI = 1 << 1;
        /// INIT or a start-up message for [`Devices::take_startup`].
        const STARTUP = 1 << 2;
    }
}

/// Per virtual processor: its local APIC and what waits for it.
#[derive(Debug)]
struct Processor {
    lapic: Lapic,
    requests: Requests,
}

/// One guest's devices.
#[derive(Debug)]
pub struct Devices {
    // The hot part first: what every exit may look at.
    /// Nothing is due before this time. It may be too early, never too late.
    earliest_ns: u64,
    /// What processor 0 knows of the platform's next deadline. It too may be too early, never too late.
    platform_ns: u64,
    /// Virtual processors with a new request, one bit each.
    kicks: u64,
    processors: Box<[Processor]>,
    output: Output,
    uart: Uart,
    /// The levels last driven onto the interrupt lines.
    lines: u16,
    pic_output: bool,
    pic: Pic,
    ioapic: IoApic,
    pit: Pit,
    cmos: Cmos,
    power: Power,
    reset: ResetPorts,
    shutdown: ShutdownWord,
    unclaimed: UnclaimedPorts,
    unclaimed_mmio: u64,
    /// Nanoseconds in a tick of the TSC, in units of 2^-32, rounded up: a deadline is met late, not early.
    ns_per_tsc_tick: u64,
    config: DeviceConfig,
}

impl Devices {
    /// The machine at power-on, as firmware leaves it.
    ///
    /// # Panics
    /// If `config.vcpus` is out of range (the manifest is validated before).
    #[must_use]
    pub fn new(config: &DeviceConfig) -> Self {
        assert!((1..=VCPUS_MAX).contains(&config.vcpus), "{} virtual processors", config.vcpus);
        let processor = |id| Processor { lapic: Lapic::new(id), requests: Requests::empty() };
        Self {
            earliest_ns: NEVER,
            platform_ns: NEVER,
            kicks: 0,
            processors: (0..config.vcpus).map(processor).collect(),
            output: Output::default(),
            uart: Uart::default(),
            lines: 0,
            pic_output: false,
            pic: Pic::default(),
            // The first ID that no processor has.
            ioapic: IoApic::new(config.vcpus as u8),
            pit: Pit::default(),
            cmos: Cmos::new(config.rtc_start_unix_s, config.low_memory_bytes, config.high_memory_bytes),
            power: Power::default(),
            reset: ResetPorts::default(),
            shutdown: ShutdownWord::default(),
            unclaimed: UnclaimedPorts::default(),
            unclaimed_mmio: 0,
            ns_per_tsc_tick: (1_000_000u64 << 32).div_ceil(config.tsc_khz.max(1)),
            config: config.clone(),
        }
    }
}

/// Ports.
impl Devices {
    /// IN: the value in the low bits, all others 0. `width` is at most a dword.
    pub fn port_read(&mut self, port: u16, width: Width, now_ns: u64) -> u32 {
        if now_ns >= self.earliest_ns {
            self.advance(now_ns);
        }
        match (port, width) {
            (_, Width::Byte) => u32::from(self.byte_read(port, now_ns)),
            (0x608, Width::Dword) => Power::timer(now_ns),
            // No PCI: neither configuration mechanism answers.
            (0xcf8..=0xcff, _) => width.ones() as u32,
            _ => (0..width.bytes().min(4) as u16).fold(0, |value, index| {
                // The lowest port first: reads have side effects.
                value | u32::from(self.byte_read(port.wrapping_add(index), now_ns)) << (8 * index)
            }),
        }
    }

    /// OUT. `width` is at most a dword.
    pub fn port_write(&mut self, port: u16, width: Width, value: u32, now_ns: u64) -> Outcome {
        if now_ns >= self.earliest_ns {
            self.advance(now_ns);
        }
        match (port, width) {
            (_, Width::Byte) => self.byte_write(port, value as u8, now_ns),
            // A wide write here addresses PCI and must not touch the reset control inside.
            (0xcf8..=0xcff, _) => Outcome::Done,
            _ => {
                let bytes = value.to_le_bytes().into_iter().take(width.bytes() as usize);
                (0u16..).zip(bytes).fold(Outcome::Done, |outcome, (index, byte)| {
                    outcome.and_then(self.byte_write(port.wrapping_add(index), byte, now_ns))
                })
            }
        }
    }

    fn byte_read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x3f8..=0x3ff if self.config.uart => {
                let value = self.uart.read(port);
                self.update_uart();
                value
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                let value = self.pic.read(port);
                self.update_pic();
                value
            }
            0x40..=0x43 => self.pit.read(port, now_ns),
            0x61 => self.pit.read_port_b(now_ns),
            0x70 | 0x71 => {
                let value = self.cmos.read(port, now_ns);
                self.update_cmos();
                value
            }
            power::PORT..=power::PORT_LAST => {
                let value = self.power.read(port, now_ns);
                self.update_power();
                value
            }
            0x60 | 0x64 | 0x92 | 0xcf9 => self.reset.read(port),
            debug::CONSOLE_PORT if self.config.debug_console => debug::CONSOLE_PORT as u8,
            // Delays and POST codes; PCI that is not there.
            0x80 | 0xed | 0xcf8..=0xcff => 0xff,
            _ => {
                self.unclaimed.record(port, PortAccess::Read);
                0xff
            }
        }
    }

    fn byte_write(&mut self, port: u16, value: u8, now_ns: u64) -> Outcome {
        match port {
            0x3f8..=0x3ff if self.config.uart => {
                let printed = self.uart.write(port, value);
                self.update_uart();
                return match printed {
                    Some(byte) => self.print(byte, now_ns),
                    None => Outcome::Done,
                };
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                self.pic.write(port, value);
                self.update_pic();
            }
            0x40..=0x43 => {
                self.pit.write(port, value, now_ns);
                self.note_platform_deadline(self.pit.deadline_ns());
            }
            0x61 => self.pit.write_port_b(value, now_ns),
            0x70 | 0x71 => {
                self.cmos.write(port, value, now_ns);
                self.update_cmos();
            }
            power::PORT..=power::PORT_LAST => {
                let request = self.power.write(port, value, now_ns);
                self.update_power();
                return match request {
                    PowerRequest::Off => Outcome::PowerOff,
                    PowerRequest::None => Outcome::Done,
                };
            }
            0x60 | 0x64 | 0x92 | 0xcf9 => {
                return match self.reset.write(port, value) {
                    ResetRequest::Reset => Outcome::Reset,
                    ResetRequest::None => Outcome::Done,
                };
            }
            debug::CONSOLE_PORT if self.config.debug_console => return self.print(value, now_ns),
            debug::EXIT_PORT if self.config.debug_exit => return Outcome::Exit(value),
            debug::BENCH_PORT if self.config.bench_marks => {
                return BenchMark::from_byte(value).map_or(Outcome::Done, Outcome::BenchMark);
            }
            debug::SHUTDOWN_PORT if self.config.shutdown_port => {
                return match self.shutdown.write(value) {
                    ShutdownProgress::Complete => Outcome::PowerOff,
                    ShutdownProgress::Partial => Outcome::Done,
                };
            }
            0x80 | 0xed | 0xcf8..=0xcff => {}
            _ => self.unclaimed.record(port, PortAccess::Write),
        }
        Outcome::Done
    }

    fn print(&mut self, byte: u8, now_ns: u64) -> Outcome {
        self.output.push(byte, now_ns);
        if self.output.is_due() {
            return Outcome::ConsoleReady;
        }
        self.note_platform_deadline(self.output.deadline_ns());
        Outcome::Done
    }

    /// Takes the report of a port that was accessed for the first time and that nobody owns.
    pub fn take_unclaimed_port(&mut self) -> Option<UnclaimedPort> {
        self.unclaimed.take()
    }

    /// Accesses to ports that nobody owns.
    #[must_use]
    pub fn unclaimed_port_accesses(&self) -> u64 {
        self.unclaimed.count()
    }

    /// Accesses to addresses that are neither RAM nor a device.
    #[must_use]
    pub fn unclaimed_mmio_accesses(&self) -> u64 {
        self.unclaimed_mmio
    }
}

/// The console.
impl Devices {
    /// Moves printed bytes to `buf` and returns how many; call until it returns less than there is room for.
    pub fn take_output(&mut self, buf: &mut [u8]) -> usize {
        self.output.take(buf)
    }

    /// Output should be drained: the same as [`Outcome::ConsoleReady`], also after a prompt has waited a while.
    #[must_use]
    pub fn console_is_due(&self) -> bool {
        self.output.is_due()
    }

    /// Printed bytes that were lost because nobody drained them.
    #[must_use]
    pub fn output_lost(&self) -> u64 {
        self.output.lost()
    }

    /// Types into the serial port; returns how many bytes were accepted. The rest may be offered again later.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        if !self.config.uart {
            return 0;
        }
        let accepted = self.uart.push_input(bytes);
        self.update_uart();
        accepted
    }
}

/// Memory-mapped registers and the APIC's MSRs. A `vcpu` is always below the number of virtual processors.
impl Devices {
    /// Reads `width` bytes at `gpa`, for processor `vcpu`.
    ///
    /// # Errors
    /// [`Unclaimed`]: the guest reads all-ones.
    pub fn mmio_read(&mut self, vcpu: usize, gpa: Gpa, width: Width, now_ns: u64) -> Result<u64, Unclaimed> {
        let page = gpa.page().address();
        let value = if self.processors[vcpu].lapic.access() == Access::Page(page.0) {
            self.lapic_read(vcpu, gpa.offset() as u16, now_ns)
        } else if page == IOAPIC_BASE {
            self.ioapic.read(gpa.offset())
        } else {
            self.unclaimed_mmio += 1;
            return Err(Unclaimed);
        };
        Ok(u64::from(value) & width.ones())
    }

    /// Writes the low `width` bytes of `value` at `gpa`, for processor `vcpu`.
    ///
    /// # Errors
    /// [`Unclaimed`]: the write is lost.
    pub fn mmio_write(
        &mut self,
        vcpu: usize,
        gpa: Gpa,
        width: Width,
        value: u64,
        now_ns: u64,
    ) -> Result<(), Unclaimed> {
        let page = gpa.page().address();
        let value = (value & width.ones()) as u32;
        if self.processors[vcpu].lapic.access() == Access::Page(page.0) {
            self.lapic_write(vcpu, gpa.offset() as u16, value, now_ns);
        } else if page == IOAPIC_BASE {
            let (ioapic, processors) = (&mut self.ioapic, &mut self.processors);
            let mut touched = 0;
            ioapic.write(gpa.offset(), value, |message| touched |= deliver(processors, None, message));
            self.refresh(touched);
        } else {
            self.unclaimed_mmio += 1;
            return Err(Unclaimed);
        }
        Ok(())
    }

    /// Reads the local APIC's register at `offset` (0..4096) of its page, as on an APIC-access exit.
    pub fn lapic_read(&mut self, vcpu: usize, offset: u16, now_ns: u64) -> u32 {
        if now_ns >= self.earliest_ns {
            self.advance(now_ns);
        }
        let value = self.processors[vcpu].lapic.read_page(offset, now_ns);
        // Reading a register that does not exist may raise the error interrupt.
        self.refresh(1 << vcpu);
        value
    }

    /// Writes the local APIC's register at `offset` (0..4096) of its page, as on an APIC-access exit.
    pub fn lapic_write(&mut self, vcpu: usize, offset: u16, value: u32, now_ns: u64) {
        let effect = self.processors[vcpu].lapic.write_page(offset, value, now_ns);
        self.apply(vcpu, effect);
    }

    /// RDMSR of an x2APIC register, `msr` in 0x800..0x900.
    ///
    /// # Errors
    /// The guest gets #GP(0).
    pub fn x2apic_read(&mut self, vcpu: usize, msr: u32, now_ns: u64) -> Result<u64, GeneralProtection> {
        if now_ns >= self.earliest_ns {
            self.advance(now_ns);
        }
        self.processors[vcpu].lapic.read_msr(msr, now_ns)
    }

    /// WRMSR to an x2APIC register, `msr` in 0x800..0x900.
    ///
    /// # Errors
    /// The guest gets #GP(0).
    pub fn x2apic_write(
        &mut self,
        vcpu: usize,
        msr: u32,
        value: u64,
        now_ns: u64,
    ) -> Result<(), GeneralProtection> {
        let effect = self.processors[vcpu].lapic.write_msr(msr, value, now_ns)?;
        self.apply(vcpu, effect);
        Ok(())
    }

    /// Whether a look around would find nothing new for processor `vcpu` after it has ended an interrupt: nothing waits
    /// for it, not even for its task priority, and no other processor is to be told of anything.
    #[must_use]
    pub fn is_quiet(&self, vcpu: usize) -> bool {
        let Processor { lapic, requests } = &self.processors[vcpu];
        requests.is_empty() && self.kicks == 0 && lapic.held_back_by_tpr().is_none()
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn apic_base(&self, vcpu: usize) -> u64 {
        self.processors[vcpu].lapic.base()
    }

    /// WRMSR to IA32_APIC_BASE; afterwards [`Self::lapic_access`] may have changed.
    ///
    /// # Errors
    /// The guest gets #GP(0).
    pub fn set_apic_base(&mut self, vcpu: usize, value: u64) -> Result<(), GeneralProtection> {
        self.processors[vcpu].lapic.set_base(value, self.config.physical_address_bits)?;
        self.refresh(1 << vcpu);
        Ok(())
    }

    /// How the guest reaches this processor's local APIC now.
    #[must_use]
    pub fn lapic_access(&self, vcpu: usize) -> Access {
        self.processors[vcpu].lapic.access()
    }

    /// CR8, 0..=15.
    #[must_use]
    pub fn cr8(&self, vcpu: usize) -> u8 {
        self.processors[vcpu].lapic.cr8()
    }

    /// Writes CR8 (its low four bits).
    pub fn set_cr8(&mut self, vcpu: usize, cr8: u8) {
        self.set_tpr(vcpu, cr8 << 4);
    }

    /// The task priority register, for the virtual-APIC page's VTPR.
    #[must_use]
    pub fn tpr(&self, vcpu: usize) -> u8 {
        self.processors[vcpu].lapic.tpr()
    }

    /// Sets the task priority register, as from the virtual-APIC page's VTPR.
    pub fn set_tpr(&mut self, vcpu: usize, tpr: u8) {
        self.processors[vcpu].lapic.set_tpr(tpr);
        self.refresh(1 << vcpu);
    }

    /// The TPR threshold for the VMCS: the class of the vector that only the task priority holds back, else 0.
    #[must_use]
    pub fn tpr_threshold(&self, vcpu: usize) -> u8 {
        self.processors[vcpu].lapic.held_back_by_tpr().unwrap_or(0)
    }

    /// IA32_TSC_DEADLINE, 0 unless armed.
    #[must_use]
    pub fn tsc_deadline(&self, vcpu: usize) -> u64 {
        self.processors[vcpu].lapic.deadline_tsc()
    }

    /// WRMSR to IA32_TSC_DEADLINE, at `now_ns`, when the guest's own TSC reads `now_tsc`.
    pub fn set_tsc_deadline(&mut self, vcpu: usize, deadline_tsc: u64, now_tsc: u64, now_ns: u64) {
        let ticks = u128::from(deadline_tsc.saturating_sub(now_tsc));
        let wait_ns = ((ticks * u128::from(self.ns_per_tsc_tick)) >> 32) + 1;
        // One below "never", or a far deadline would read as disarmed.
        let expires_ns = now_ns.saturating_add(wait_ns.min(u128::from(NEVER)) as u64).min(NEVER - 1);
        let lapic = &mut self.processors[vcpu].lapic;
        lapic.set_deadline_tsc(deadline_tsc, expires_ns);
        self.earliest_ns = self.earliest_ns.min(lapic.deadline_ns());
    }

    fn apply(&mut self, vcpu: usize, effect: Effect) {
        let mut touched = 1 << vcpu;
        match effect {
            Effect::None => {}
            Effect::Send(message) => touched |= deliver(&mut self.processors, Some(vcpu), message),
            Effect::End(vector) => {
                let (ioapic, processors) = (&mut self.ioapic, &mut self.processors);
                ioapic.end(vector, |message| touched |= deliver(processors, None, message));
            }
        }
        self.earliest_ns = self.earliest_ns.min(self.processors[vcpu].lapic.deadline_ns());
        self.refresh(touched);
    }
}

/// Interrupts and time, for the loop that runs the virtual processors.
impl Devices {
    /// What waits for a processor: one load.
    #[must_use]
    pub fn requests(&self, vcpu: usize) -> Requests {
        self.processors[vcpu].requests
    }

    /// Takes the vector that is deliverable now, which is then in service. The caller injects it.
    pub fn acknowledge(&mut self, vcpu: usize) -> Option<u8> {
        if vcpu == BOOTSTRAP && self.pic_output && self.processors[BOOTSTRAP].lapic.passes_external() {
            let vector = self.pic.acknowledge();
            self.update_pic();
            return Some(vector);
        }
        let vector = self.processors[vcpu].lapic.acknowledge();
        self.refresh(1 << vcpu);
        vector
    }

    /// Takes the waiting NMI; true if there was one. The caller injects it.
    pub fn take_nmi(&mut self, vcpu: usize) -> bool {
        let taken = self.processors[vcpu].lapic.take_nmi();
        self.refresh(1 << vcpu);
        taken
    }

    /// Takes a waiting INIT or, after it, a start-up message.
    pub fn take_startup(&mut self, vcpu: usize) -> Option<Startup> {
        let taken = self.processors[vcpu].lapic.take_startup();
        self.refresh(1 << vcpu);
        taken
    }

    /// The processor waits for a start-up message.
    #[must_use]
    pub fn waits_for_startup(&self, vcpu: usize) -> bool {
        self.processors[vcpu].lapic.waits_for_startup()
    }

    /// The processor was started by other means than a start-up message (the ACPI wake-up mailbox).
    pub fn started(&mut self, vcpu: usize) {
        self.processors[vcpu].lapic.started();
    }

    /// An NMI button for one processor, through LINT1.
    pub fn inject_nmi(&mut self, vcpu: usize) {
        self.processors[vcpu].lapic.pulse_nmi_line();
        self.refresh(1 << vcpu);
    }

    /// Presses the power button: asks an ACPI guest to shut itself down.
    pub fn press_power_button(&mut self) {
        self.power.press_button();
        self.update_power();
    }

    /// Takes the set of processors (bit n for processor n) that have got a new request or an earlier deadline
    /// since the last call. Whoever calls notifies them, except itself.
    pub fn take_kicks(&mut self) -> u64 {
        core::mem::take(&mut self.kicks)
    }

    /// Something is due at `now_ns` and wants [`Self::advance`]: one comparison.
    #[must_use]
    pub fn is_due(&self, now_ns: u64) -> bool {
        now_ns >= self.earliest_ns
    }

    /// When processor `vcpu` must be back here at the latest, in guest nanoseconds. Processor 0 has the
    /// platform's devices beside its own timer.
    #[must_use]
    pub fn next_deadline_ns(&self, vcpu: usize) -> Option<u64> {
        let mut deadline = self.processors[vcpu].lapic.deadline_ns();
        if vcpu == BOOTSTRAP {
            deadline = deadline.min(self.platform_deadline_ns());
        }
        (deadline != NEVER).then_some(deadline)
    }

    /// Fires everything that is due. Afterwards no deadline lies in the past.
    pub fn advance(&mut self, now_ns: u64) {
        if self.pit.advance(now_ns) {
            self.set_irq(IRQ_TIMER, true);
            self.set_irq(IRQ_TIMER, false);
        }
        self.cmos.advance(now_ns);
        self.set_irq(IRQ_RTC, self.cmos.interrupt_line());
        self.power.advance(now_ns);
        self.set_irq(IRQ_SCI, self.power.interrupt_line());
        self.output.advance(now_ns);
        self.platform_ns = self.platform_deadline_ns();
        let mut earliest_ns = self.platform_ns;
        for vcpu in 0..self.processors.len() {
            let lapic = &mut self.processors[vcpu].lapic;
            if now_ns >= lapic.deadline_ns() {
                lapic.advance(now_ns);
                self.refresh(1 << vcpu);
            }
            earliest_ns = earliest_ns.min(self.processors[vcpu].lapic.deadline_ns());
        }
        self.earliest_ns = earliest_ns;
    }

    fn platform_deadline_ns(&self) -> u64 {
        let timers = self.pit.deadline_ns().min(self.cmos.deadline_ns());
        timers.min(self.power.deadline_ns()).min(self.output.deadline_ns())
    }

    /// A device of the platform has this deadline now; if it is news, processor 0 looks again when to be back.
    fn note_platform_deadline(&mut self, deadline_ns: u64) {
        if deadline_ns < self.platform_ns {
            self.platform_ns = deadline_ns;
            self.earliest_ns = self.earliest_ns.min(deadline_ns);
            self.kicks |= 1 << BOOTSTRAP;
        }
    }

    fn update_uart(&mut self) {
        self.set_irq(IRQ_UART, self.uart.interrupt_line());
    }

    fn update_cmos(&mut self) {
        self.set_irq(IRQ_RTC, self.cmos.interrupt_line());
        self.note_platform_deadline(self.cmos.deadline_ns());
    }

    fn update_power(&mut self) {
        self.set_irq(IRQ_SCI, self.power.interrupt_line());
        self.note_platform_deadline(self.power.deadline_ns());
    }

    /// Drives the ISA interrupt `irq`, 0..16, at both controllers.
    fn set_irq(&mut self, irq: u8, level: bool) {
        let bit = 1 << irq;
        if (self.lines & bit != 0) == level {
            return;
        }
        self.lines ^= bit;
        self.pic.set_line(irq, level);
        let pin = if irq == IRQ_TIMER { IOAPIC_TIMER_PIN } else { irq };
        if let Some(message) = self.ioapic.set_line(pin, level) {
            let touched = deliver(&mut self.processors, None, message);
            self.refresh(touched);
        }
        self.update_pic();
    }

    /// Passes the 8259 pair's output on to processor 0.
    fn update_pic(&mut self) {
        let output = self.pic.output();
        // Also when nothing changed for us: an acknowledge may have taken one request and left another.
        self.pic_output = output;
        self.processors[BOOTSTRAP].lapic.set_line(output);
        self.refresh(1 << BOOTSTRAP);
    }

    /// Recomputes what waits for the processors in `touched`.
    fn refresh(&mut self, mut touched: u64) {
        while touched != 0 {
            let vcpu = touched.trailing_zeros() as usize;
            touched &= touched - 1;
            let Processor { lapic, requests } = &mut self.processors[vcpu];
            let external = vcpu == BOOTSTRAP && self.pic_output && lapic.passes_external();
            let mut now = Requests::empty();
            now.set(Requests::INTERRUPT, external || lapic.deliverable().is_some());
            now.set(Requests::NMI, lapic.has_nmi());
            now.set(Requests::STARTUP, lapic.has_startup());
            if !(now - *requests).is_empty() {
                self.kicks |= 1 << vcpu;
            }
            *requests = now;
        }
    }
}

/// Hands a message to the local APICs it is for; returns them, one bit each. `sender` is `None` for the IOAPIC.
fn deliver(processors: &mut [Processor], sender: Option<usize>, message: Message) -> u64 {
    let is_for = |vcpu: usize, lapic: &Lapic| match message.destination {
        Destination::Sender => sender == Some(vcpu),
        Destination::Others => sender != Some(vcpu),
        destination => lapic.is_addressed(destination),
    };
    if message.delivery == Delivery::Lowest {
        let receiver = processors
            .iter_mut()
            .enumerate()
            .filter(|(vcpu, processor)| is_for(*vcpu, &processor.lapic) && processor.lapic.takes_vectors())
            .min_by_key(|(_, processor)| processor.lapic.ppr());
        return receiver.map_or(0, |(vcpu, processor)| {
            processor.lapic.receive(message);
            1 << vcpu
        });
    }
    let mut touched = 0;
    for (vcpu, processor) in processors.iter_mut().enumerate() {
        if is_for(vcpu, &processor.lapic) {
            processor.lapic.receive(message);
            touched |= 1 << vcpu;
        }
    }
    touched
}

#[cfg(test)]
mod tests;
