//! One virtual processor's local APIC: xAPIC registers in a page, or x2APIC MSRs.

pub mod timer;
pub mod vectors;

use super::clock::NEVER;
use super::message::{Delivery, Destination, Message};
use timer::Timer;
use vectors::Vectors;

/// The timer's undivided input clock, in ticks a second.
pub const LAPIC_TIMER_HZ: u64 = 1_000_000_000;
/// Where the register page lies after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// The x2APIC MSR of the end-of-interrupt register.
pub const MSR_EOI: u32 = 0x800 + register::EOI as u32;

/// Registers by their number: offset in the page >> 4, or MSR - 0x800.
mod register {
    pub const ID: u16 = 0x02;
    pub const VERSION: u16 = 0x03;
    pub const TPR: u16 = 0x08;
    pub const APR: u16 = 0x09;
    pub const PPR: u16 = 0x0a;
    pub const EOI: u16 = 0x0b;
    pub const LDR: u16 = 0x0d;
    pub const DFR: u16 = 0x0e;
    pub const SVR: u16 = 0x0f;
    pub const ISR: u16 = 0x10;
    pub const ISR_LAST: u16 = 0x17;
    pub const TMR: u16 = 0x18;
    pub const TMR_LAST: u16 = 0x1f;
    pub const IRR: u16 = 0x20;
    pub const IRR_LAST: u16 = 0x27;
    pub const ESR: u16 = 0x28;
    pub const ICR: u16 = 0x30;
    pub const ICR_HIGH: u16 = 0x31;
    pub const LVT: u16 = 0x32;
    pub const LVT_LAST: u16 = 0x37;
    pub const INITIAL_COUNT: u16 = 0x38;
    pub const CURRENT_COUNT: u16 = 0x39;
    pub const DIVIDE: u16 = 0x3e;
    pub const SELF_IPI: u16 = 0x3f;
}

/// Integrated APIC; the last of the six LVT entries; no suppression of EOI broadcasts.
const VERSION: u32 = 0x14 | 5 << 16;

/// LVT entries by number - [`register::LVT`].
const LVT_TIMER: usize = 0;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
const LVT_MASKED: u32 = 1 << 16;
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
const LVT_MODE: u32 = 7 << 8;
const MODE_FIXED: u32 = 0;
const MODE_NMI: u32 = 4 << 8;
const MODE_EXTINT: u32 = 7 << 8;

const SVR_ENABLED: u32 = 1 << 8;
const SVR_WRITABLE: u32 = 0x3ff;
const SVR_RESET: u32 = 0xff;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

const ICR_LOGICAL: u32 = 1 << 11;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_LEVEL: u32 = 1 << 15;
const ICR_WRITABLE: u32 = 0x000c_cfff;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;

/// The guest's own error: the access is answered with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// How the guest reaches its local APIC, from IA32_APIC_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Disabled: interrupts of the 8259 pair go straight to the processor.
    Disabled,
    /// Through the page at this guest physical address.
    Page(u64),
    /// Through MSRs.
    X2Apic,
}

/// What follows from a register write, for the bus to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "interprocessor interrupts and EOIs are carried out by the bus"]
pub enum Effect {
    /// Nothing outside this APIC.
    None,
    /// An interprocessor interrupt.
    Send(Message),
    /// The end of a level-triggered interrupt, for the IOAPIC.
    End(u8),
}

/// What an INIT or a start-up message asks of the virtual processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Startup {
    /// Reset as by INIT, then wait for a start-up message.
    Init,
    /// Run in real mode from physical address `page << 12`.
    Run {
        /// Page number below 1 MiB.
        page: u8,
    },
}

/// One local APIC.
#[derive(Debug)]
pub struct Lapic {
    id: u32,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    errors: u32,
    errors_latched: u32,
    icr: u64,
    lvt: [u32; 6],
    requested: Vectors,
    in_service: Vectors,
    level: Vectors,
    timer: Timer,
    line: bool,
    nmi: bool,
    waits_for_startup: bool,
    init: bool,
    startup_page: Option<u8>,
}

impl Lapic {
    /// The APIC of processor `id` as firmware leaves it: the first one (the bootstrap processor) is enabled and
    /// passes the 8259's interrupts on through LINT0 (virtual wire mode), the others wait for their start-up.
    #[must_use]
    pub fn new(id: u32) -> Self {
        let bootstrap = id == 0;
        let mut lapic = Self {
            id,
            base: DEFAULT_BASE | BASE_ENABLED | if bootstrap { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: SVR_RESET,
            errors: 0,
            errors_latched: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            requested: Vectors::default(),
            in_service: Vectors::default(),
            level: Vectors::default(),
            timer: Timer::default(),
            line: false,
            nmi: false,
            waits_for_startup: !bootstrap,
            init: false,
            startup_page: None,
        };
        if bootstrap {
            lapic.svr |= SVR_ENABLED;
            lapic.lvt[LVT_LINT0] = MODE_EXTINT;
            lapic.lvt[LVT_LINT1] = MODE_NMI;
        }
        lapic
    }

    /// How the guest reaches it.
    #[must_use]
    pub fn access(&self) -> Access {
        match (self.base & BASE_ENABLED != 0, self.is_x2apic()) {
            (false, _) => Access::Disabled,
            (true, true) => Access::X2Apic,
            (true, false) => Access::Page(self.base & !0xfff),
        }
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE. SDM Vol. 3 "Advanced Programmable Interrupt Controller", "x2APIC State Transitions".
    ///
    /// # Errors
    /// Reserved bits, or a transition that does not exist.
    pub fn set_base(&mut self, value: u64, physical_address_bits: u8) -> Result<(), GeneralProtection> {
        let address_mask = (1u64 << physical_address_bits.clamp(32, 52)) - 0x1000;
        if value & !(address_mask | BASE_BSP | BASE_X2APIC | BASE_ENABLED) != 0 {
            return Err(GeneralProtection);
        }
        let mode = |base: u64| (base & BASE_ENABLED != 0, base & BASE_X2APIC != 0);
        match (mode(self.base), mode(value)) {
            ((_, _), (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => {
                return Err(GeneralProtection);
            }
            ((true, _), (false, _)) => self.reset(),
            ((true, false), (true, true)) => self.icr &= 0xffff_ffff,
            _ => {}
        }
        self.base = value;
        Ok(())
    }

    /// Reads a register of the page. Only aligned 32-bit reads are defined; others give bytes of the register.
    pub fn read_page(&mut self, offset: u16, now_ns: u64) -> u32 {
        let value = self.read(offset >> 4 & 0x3f, now_ns);
        match offset & 0xf {
            byte @ 0..4 => value >> (8 * byte),
            _ => 0,
        }
    }

    /// Writes a register of the page.
    pub fn write_page(&mut self, offset: u16, value: u32, now_ns: u64) -> Effect {
        // Intel leaves all but aligned 32-bit writes undefined; they do nothing here.
        if offset & 0xf != 0 {
            return Effect::None;
        }
        match offset >> 4 & 0x3f {
            register::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_WRITABLE);
                self.send((self.icr >> 56) as u32, value)
            }
            register::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Effect::None
            }
            register::LDR => {
                self.ldr = value & 0xff00_0000;
                Effect::None
            }
            register::DFR => {
                self.dfr = value | 0x0fff_ffff;
                Effect::None
            }
            number => self.write(number, value, now_ns),
        }
    }

    /// Reads x2APIC MSR `msr`, 0x800..0x900.
    ///
    /// # Errors
    /// Not in x2APIC mode, or no such readable register.
    pub fn read_msr(&mut self, msr: u32, now_ns: u64) -> Result<u64, GeneralProtection> {
        let number = self.msr_register(msr)?;
        match number {
            register::ICR => Ok(self.icr),
            register::ID
            | register::VERSION
            | register::TPR
            | register::PPR
            | register::LDR
            | register::SVR
            | register::ISR..=register::ESR
            | register::LVT..=register::CURRENT_COUNT
            | register::DIVIDE => Ok(u64::from(self.read(number, now_ns))),
            _ => Err(GeneralProtection),
        }
    }

    /// Writes x2APIC MSR `msr`, 0x800..0x900.
    ///
    /// # Errors
    /// Not in x2APIC mode, no such writable register, or reserved bits.
    pub fn write_msr(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<Effect, GeneralProtection> {
        let number = self.msr_register(msr)?;
        let writable = match number {
            register::ICR => 0xffff_ffff_0000_0000 | u64::from(ICR_WRITABLE),
            register::TPR | register::SELF_IPI => 0xff,
            register::EOI | register::ESR => 0,
            register::SVR => u64::from(SVR_WRITABLE),
            // Delivery status and remote IRR are read-only, not reserved.
            register::LVT..=register::LVT_LAST => {
                u64::from(LVT_WRITABLE[usize::from(number - register::LVT)] | 0x5000)
            }
            register::INITIAL_COUNT => 0xffff_ffff,
            register::DIVIDE => 0x0b,
            _ => return Err(GeneralProtection),
        };
        if value & !writable != 0 {
            return Err(GeneralProtection);
        }
        Ok(match number {
            register::ICR => {
                self.icr = value;
                self.send((value >> 32) as u32, value as u32)
            }
            register::SELF_IPI => {
                self.accept(value as u8, false);
                Effect::None
            }
            _ => self.write(number, value as u32, now_ns),
        })
    }

    /// The task priority's upper half, as in CR8: 0..=15.
    #[must_use]
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// The task priority register.
    #[must_use]
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task priority register.
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    /// The vector that can be delivered now: the highest requested one, if its class is above the processor
    /// priority's.
    #[must_use]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.requested.highest()?;
        (vector & 0xf0 > self.ppr() & 0xf0).then_some(vector)
    }

    /// The class, 1..=15, of a requested vector that only the task priority holds back: it becomes deliverable
    /// when CR8 falls below it.
    #[must_use]
    pub fn held_back_by_tpr(&self) -> Option<u8> {
        let class = self.requested.highest()? >> 4;
        let serving = self.in_service.highest().unwrap_or(0) >> 4;
        (class > serving && class <= self.cr8()).then_some(class)
    }

    /// Takes the deliverable vector into service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.requested.remove(vector);
        self.in_service.insert(vector);
        Some(vector)
    }

    /// Whether the 8259's interrupts reach the processor through this APIC (or past it, when it is disabled).
    #[must_use]
    pub fn passes_external(&self) -> bool {
        self.access() == Access::Disabled || self.lvt[LVT_LINT0] & (LVT_MASKED | LVT_MODE) == MODE_EXTINT
    }

    /// Drives LINT0 with the 8259's output.
    pub fn set_line(&mut self, level: bool) {
        let before = core::mem::replace(&mut self.line, level);
        if level && !before && self.access() != Access::Disabled {
            self.trigger(LVT_LINT0);
        }
    }

    /// An NMI arrives at LINT1.
    pub fn pulse_nmi_line(&mut self) {
        if self.access() == Access::Disabled {
            self.nmi = true;
        } else {
            self.trigger(LVT_LINT1);
        }
    }

    /// An NMI is waiting.
    #[must_use]
    pub fn has_nmi(&self) -> bool {
        self.nmi
    }

    /// Takes the waiting NMI.
    pub fn take_nmi(&mut self) -> bool {
        core::mem::take(&mut self.nmi)
    }

    /// INIT or a start-up message is waiting.
    #[must_use]
    pub fn has_startup(&self) -> bool {
        self.init || self.startup_page.is_some()
    }

    /// Takes the waiting INIT or, after it, the start-up message.
    pub fn take_startup(&mut self) -> Option<Startup> {
        if core::mem::take(&mut self.init) {
            return Some(Startup::Init);
        }
        let page = self.startup_page.take()?;
        self.waits_for_startup = false;
        Some(Startup::Run { page })
    }

    /// The processor waits for a start-up message.
    #[must_use]
    pub fn waits_for_startup(&self) -> bool {
        self.waits_for_startup
    }

    /// The processor was started by other means than a start-up message (the ACPI wake-up mailbox).
    pub fn started(&mut self) {
        self.waits_for_startup = false;
    }

    /// When the timer next interrupts; [`NEVER`] if it does not.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        // A masked timer runs on, but nobody needs to wake for it.
        if self.lvt[LVT_TIMER] & LVT_MASKED != 0 { NEVER } else { self.timer.expires_ns() }
    }

    /// Raises the timer's interrupt if it is due.
    pub fn advance(&mut self, now_ns: u64) {
        if self.timer.expire(now_ns) {
            self.trigger(LVT_TIMER);
        }
    }

    /// IA32_TSC_DEADLINE.
    #[must_use]
    pub fn deadline_tsc(&self) -> u64 {
        self.timer.deadline_tsc()
    }

    /// Writes IA32_TSC_DEADLINE; `expires_ns` is when the guest's TSC reaches it.
    pub fn set_deadline_tsc(&mut self, deadline_tsc: u64, expires_ns: u64) {
        self.timer.set_deadline_tsc(deadline_tsc, expires_ns);
    }

    /// Whether a message for `destination` (not a shorthand) is for this APIC.
    #[must_use]
    pub fn is_addressed(&self, destination: Destination) -> bool {
        match destination {
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mask) if self.is_x2apic() => {
                let ldr = self.logical_id();
                mask >> 16 == ldr >> 16 && mask & ldr & 0xffff != 0
            }
            Destination::Logical(mask) => {
                let (mask, ldr) = (mask & 0xff, self.ldr >> 24);
                if self.dfr >> 28 == 0xf {
                    return mask & ldr != 0;
                }
                (mask >> 4 == ldr >> 4 || mask >> 4 == 0xf) && mask & ldr & 0xf != 0
            }
            Destination::All => true,
            Destination::Sender | Destination::Others => false,
        }
    }

    /// The processor priority, for the arbitration of lowest-priority messages.
    #[must_use]
    pub fn ppr(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }

    /// Whether it takes vectors: neither disabled as a whole nor by the spurious-interrupt register.
    #[must_use]
    pub fn takes_vectors(&self) -> bool {
        self.access() != Access::Disabled && self.svr & SVR_ENABLED != 0
    }

    /// Receives a message that is for this APIC.
    pub fn receive(&mut self, message: Message) {
        if self.access() == Access::Disabled {
            return;
        }
        match message.delivery {
            Delivery::Fixed | Delivery::Lowest => self.accept(message.vector, message.level),
            Delivery::Nmi => self.nmi = true,
            Delivery::Init => {
                let waits = self.waits_for_startup;
                self.reset();
                self.waits_for_startup = true;
                self.startup_page = None;
                // A processor that waits already needs no second reset.
                self.init |= !waits;
            }
            Delivery::Startup => {
                if self.waits_for_startup {
                    self.startup_page.get_or_insert(message.vector);
                }
            }
        }
    }

    fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    /// The logical ID that an x2APIC derives from its ID.
    fn logical_id(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    /// The state after INIT. SDM Vol. 3 "Local APIC State After an INIT Reset": the ID and the base stay.
    fn reset(&mut self) {
        let fresh = Self::new(self.id);
        *self = Self {
            base: self.base,
            svr: SVR_RESET,
            lvt: [LVT_MASKED; 6],
            line: self.line,
            waits_for_startup: self.waits_for_startup,
            init: self.init,
            startup_page: self.startup_page,
            ..fresh
        };
    }

    fn msr_register(&self, msr: u32) -> Result<u16, GeneralProtection> {
        if self.access() != Access::X2Apic || !(0x800..0x840).contains(&msr) {
            return Err(GeneralProtection);
        }
        Ok((msr - 0x800) as u16)
    }

    fn read(&mut self, number: u16, now_ns: u64) -> u32 {
        match number {
            register::ID if self.is_x2apic() => self.id,
            register::ID => self.id << 24,
            register::VERSION => VERSION,
            register::TPR => u32::from(self.tpr),
            register::APR | register::PPR => u32::from(self.ppr()),
            register::EOI => 0,
            register::LDR if self.is_x2apic() => self.logical_id(),
            register::LDR => self.ldr,
            register::DFR => self.dfr,
            register::SVR => self.svr,
            register::ISR..=register::ISR_LAST => self.in_service.register(number - register::ISR),
            register::TMR..=register::TMR_LAST => self.level.register(number - register::TMR),
            register::IRR..=register::IRR_LAST => self.requested.register(number - register::IRR),
            register::ESR => self.errors_latched,
            register::ICR => self.icr as u32,
            register::ICR_HIGH => (self.icr >> 32) as u32,
            register::LVT..=register::LVT_LAST => self.lvt[usize::from(number - register::LVT)],
            register::INITIAL_COUNT => self.timer.initial(),
            register::CURRENT_COUNT => self.timer.current(now_ns),
            register::DIVIDE => self.timer.divide(),
            _ => {
                self.error(ERROR_REGISTER);
                0
            }
        }
    }

    fn write(&mut self, number: u16, value: u32, now_ns: u64) -> Effect {
        match number {
            register::EOI => return self.end(),
            register::TPR => self.tpr = value as u8,
            register::SVR => {
                self.svr = value & SVR_WRITABLE;
                if value & SVR_ENABLED == 0 {
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            // A write shows the errors collected since the last one.
            register::ESR => self.errors_latched = core::mem::take(&mut self.errors),
            register::LVT..=register::LVT_LAST => {
                self.write_lvt(usize::from(number - register::LVT), value, now_ns)
            }
            register::INITIAL_COUNT => {
                self.advance(now_ns);
                self.timer.set_initial(value, now_ns);
            }
            register::DIVIDE => {
                self.advance(now_ns);
                self.timer.set_divide(value, now_ns);
            }
            // Read-only.
            register::ID | register::VERSION | register::APR | register::PPR => {}
            register::ISR..=register::IRR_LAST | register::CURRENT_COUNT => {}
            _ => self.error(ERROR_REGISTER),
        }
        Effect::None
    }

    fn write_lvt(&mut self, index: usize, value: u32, now_ns: u64) {
        if index == LVT_TIMER {
            // What expired under the old entry is decided by the old entry.
            self.advance(now_ns);
        }
        let mut entry = value & LVT_WRITABLE[index];
        if self.svr & SVR_ENABLED == 0 {
            entry |= LVT_MASKED;
        }
        self.lvt[index] = entry;
        if index == LVT_TIMER {
            self.timer.set_lvt(entry);
        }
    }

    fn end(&mut self) -> Effect {
        let Some(vector) = self.in_service.highest() else { return Effect::None };
        self.in_service.remove(vector);
        if self.level.contains(vector) { Effect::End(vector) } else { Effect::None }
    }

    /// Carries out a write to the interrupt command register.
    fn send(&mut self, id: u32, command: u32) -> Effect {
        let Some(delivery) = Delivery::from_mode(command >> 8) else { return Effect::None };
        let vector = command as u8;
        match delivery {
            Delivery::Fixed | Delivery::Lowest if vector < 16 => {
                self.error(ERROR_SEND_VECTOR);
                return Effect::None;
            }
            // The level de-assert that older protocols send after INIT does nothing.
            Delivery::Init if command & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL => return Effect::None,
            _ => {}
        }
        let broadcast = if self.is_x2apic() { u32::MAX } else { 0xff };
        let destination = match command >> 18 & 3 {
            0 if id == broadcast && command & ICR_LOGICAL == 0 => Destination::All,
            0 if command & ICR_LOGICAL != 0 => Destination::Logical(id),
            0 => Destination::Physical(id),
            1 => Destination::Sender,
            2 => Destination::All,
            _ => Destination::Others,
        };
        // Interprocessor interrupts are edge-triggered whatever the command says.
        Effect::Send(Message { destination, delivery, vector, level: false })
    }

    fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(ERROR_RECEIVE_VECTOR);
            return;
        }
        if !self.takes_vectors() {
            return;
        }
        self.requested.insert(vector);
        if level {
            self.level.insert(vector);
        } else {
            self.level.remove(vector);
        }
    }

    fn error(&mut self, error: u32) {
        // One interrupt for each new error; it ends the recursion when the error entry's own vector is illegal.
        if self.errors & error == 0 {
            self.errors |= error;
            self.trigger(LVT_ERROR);
        }
    }

    /// Delivers a local interrupt as its LVT entry says.
    fn trigger(&mut self, index: usize) {
        let entry = self.lvt[index];
        if entry & LVT_MASKED != 0 {
            return;
        }
        match entry & LVT_MODE {
            MODE_FIXED => self.accept(entry as u8, false),
            MODE_NMI => self.nmi = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TPR: u16 = 0x80;
    const EOI: u16 = 0xb0;
    const SVR: u16 = 0xf0;
    const ESR: u16 = 0x280;
    const ICR: u16 = 0x300;
    const ICR_HIGH: u16 = 0x310;
    const LVT_TIMER: u16 = 0x320;
    const LVT_LINT0: u16 = 0x350;
    const LVT_ERROR: u16 = 0x370;
    const INITIAL: u16 = 0x380;
    const CURRENT: u16 = 0x390;
    const DIVIDE: u16 = 0x3e0;

    fn write(lapic: &mut Lapic, offset: u16, value: u32) {
        assert_eq!(lapic.write_page(offset, value, 0), Effect::None);
    }

    fn fixed(vector: u8, level: bool) -> Message {
        Message { destination: Destination::All, delivery: Delivery::Fixed, vector, level }
    }

    fn enabled(id: u32) -> Lapic {
        let mut lapic = Lapic::new(id);
        write(&mut lapic, SVR, 0x1ff);
        lapic
    }

    #[test]
    fn linux_calibrates_the_timer() {
        // __setup_APIC_LVTT: masked one-shot by 16; the current count must fall by 62.5 M a second.
        let mut lapic = enabled(0);
        write(&mut lapic, LVT_TIMER, 0x1_00ec);
        write(&mut lapic, DIVIDE, 3);
        write(&mut lapic, INITIAL, u32::MAX);
        assert_eq!(lapic.deadline_ns(), NEVER);
        assert_eq!(lapic.read_page(CURRENT, 100_000_000), u32::MAX - 6_250_000);
        // Unmasked, one-shot: fires once.
        write(&mut lapic, LVT_TIMER, 0xec);
        write(&mut lapic, INITIAL, 1000);
        assert_eq!(lapic.deadline_ns(), 16_000);
        lapic.advance(16_000);
        assert_eq!(lapic.deadline_ns(), NEVER);
        assert_eq!(lapic.acknowledge(), Some(0xec));
        assert_eq!(lapic.write_page(EOI, 0, 0), Effect::None);
    }

    #[test]
    fn priorities() {
        let mut lapic = enabled(0);
        lapic.receive(fixed(0x31, false));
        lapic.receive(fixed(0x52, false));
        assert_eq!(lapic.acknowledge(), Some(0x52));
        assert_eq!(lapic.deliverable(), None);
        lapic.receive(fixed(0x61, false));
        assert_eq!(lapic.acknowledge(), Some(0x61));
        assert_eq!(lapic.read_page(0xa0, 0), 0x60);
        write(&mut lapic, EOI, 0);
        write(&mut lapic, EOI, 0);
        write(&mut lapic, TPR, 0x30);
        assert_eq!(lapic.deliverable(), None);
        assert_eq!(lapic.held_back_by_tpr(), Some(3));
        lapic.set_tpr(0x2f);
        assert_eq!(lapic.deliverable(), Some(0x31));
    }

    #[test]
    fn level_triggered_end_is_reported() {
        let mut lapic = enabled(0);
        lapic.receive(fixed(0x41, true));
        assert_eq!(lapic.read_page(0x1a0, 0), 1 << 1);
        assert_eq!(lapic.acknowledge(), Some(0x41));
        assert_eq!(lapic.write_page(EOI, 0, 0), Effect::End(0x41));
        assert_eq!(lapic.write_page(EOI, 0, 0), Effect::None);
    }

    #[test]
    fn commands() {
        let mut lapic = enabled(0);
        write(&mut lapic, ICR_HIGH, 1 << 24);
        let Effect::Send(message) = lapic.write_page(ICR, 0x4500, 0) else { panic!() };
        assert_eq!((message.destination, message.delivery), (Destination::Physical(1), Delivery::Init));
        assert_eq!(lapic.write_page(ICR, 0x8500, 0), Effect::None);
        let Effect::Send(message) = lapic.write_page(ICR, 0x4609, 0) else { panic!() };
        assert_eq!((message.vector, message.delivery), (9, Delivery::Startup));
        let Effect::Send(message) = lapic.write_page(ICR, 0xc_00fd, 0) else { panic!() };
        assert_eq!(message.destination, Destination::Others);
        assert_eq!(lapic.read_page(ICR, 0) & 1 << 12, 0);
        write(&mut lapic, ICR, 0x0f);
        write(&mut lapic, ESR, 0);
        assert_eq!(lapic.read_page(ESR, 0), ERROR_SEND_VECTOR);
        write(&mut lapic, ESR, 0);
        assert_eq!(lapic.read_page(ESR, 0), 0);
    }

    #[test]
    fn startup_sequence() {
        let mut lapic = Lapic::new(1);
        let message =
            |delivery| Message { destination: Destination::All, delivery, vector: 0x9a, level: false };
        // It waits from the beginning, so INIT asks nothing new of it.
        lapic.receive(message(Delivery::Init));
        assert!(!lapic.has_startup());
        lapic.receive(message(Delivery::Startup));
        lapic.receive(message(Delivery::Startup));
        assert_eq!(lapic.take_startup(), Some(Startup::Run { page: 0x9a }));
        lapic.receive(message(Delivery::Startup));
        assert_eq!(lapic.take_startup(), None);
        lapic.receive(message(Delivery::Init));
        lapic.receive(message(Delivery::Startup));
        assert_eq!(lapic.take_startup(), Some(Startup::Init));
        assert_eq!(lapic.take_startup(), Some(Startup::Run { page: 0x9a }));
    }

    #[test]
    fn virtual_wire() {
        let mut lapic = Lapic::new(0);
        assert!(lapic.passes_external());
        assert!(!Lapic::new(1).passes_external());
        lapic.pulse_nmi_line();
        assert!(lapic.take_nmi());
        // Linux's check_timer tries the 8259 as a fixed interrupt at LINT0.
        write(&mut lapic, SVR, 0x1ff);
        write(&mut lapic, LVT_LINT0, 0x30);
        assert!(!lapic.passes_external());
        lapic.set_line(true);
        assert_eq!(lapic.acknowledge(), Some(0x30));
        write(&mut lapic, SVR, 0xff);
        assert_eq!(lapic.read_page(LVT_LINT0, 0), 0x1_0030);
        lapic.set_base(DEFAULT_BASE | BASE_BSP, 40).unwrap();
        assert!(lapic.passes_external());
    }

    #[test]
    fn logical_destinations() {
        let mut lapic = enabled(2);
        write(&mut lapic, 0xd0, 4 << 24);
        assert!(lapic.is_addressed(Destination::Logical(0xff)));
        assert!(!lapic.is_addressed(Destination::Logical(3)));
        write(&mut lapic, 0xe0, 0x0fff_ffff);
        write(&mut lapic, 0xd0, 0x12 << 24);
        assert!(lapic.is_addressed(Destination::Logical(0x13)));
        assert!(!lapic.is_addressed(Destination::Logical(0x23)));
        lapic.set_base(DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC, 40).unwrap();
        assert!(lapic.is_addressed(Destination::Logical(4)));
        assert!(!lapic.is_addressed(Destination::Logical(1 << 16 | 4)));
    }

    #[test]
    fn x2apic() {
        let mut lapic = enabled(17);
        assert_eq!(lapic.read_msr(0x802, 0), Err(GeneralProtection));
        let x2apic = DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC;
        lapic.set_base(x2apic, 40).unwrap();
        assert_eq!(lapic.access(), Access::X2Apic);
        assert_eq!(lapic.read_msr(0x802, 0), Ok(17));
        assert_eq!(lapic.read_msr(0x80d, 0), Ok(1 << 16 | 2));
        for (msr, value) in
            [(0x80e, 0), (0x802, 0), (0x80b, 1), (0x831, 0), (0x808, 0x100), (0x839, 0), (0x8ff, 0)]
        {
            assert_eq!(lapic.write_msr(msr, value, 0), Err(GeneralProtection), "{msr:#x}");
        }
        assert_eq!(lapic.read_msr(0x80b, 0), Err(GeneralProtection));
        let Ok(Effect::Send(message)) = lapic.write_msr(0x830, 3 << 32 | 0xfb, 0) else { panic!() };
        assert_eq!(message.destination, Destination::Physical(3));
        assert_eq!(lapic.write_msr(0x83f, 0x55, 0), Ok(Effect::None));
        assert_eq!(lapic.acknowledge(), Some(0x55));
        assert_eq!(lapic.set_base(DEFAULT_BASE | BASE_ENABLED, 40), Err(GeneralProtection));
        lapic.set_base(DEFAULT_BASE, 40).unwrap();
        assert_eq!(lapic.set_base(x2apic, 40), Err(GeneralProtection));
        assert_eq!(lapic.set_base(1 << 40 | BASE_ENABLED, 40), Err(GeneralProtection));
    }

    #[test]
    fn software_disabled_takes_nothing_but_nmi() {
        let mut lapic = enabled(0);
        write(&mut lapic, SVR, 0xff);
        lapic.receive(fixed(0x40, false));
        assert_eq!(lapic.deliverable(), None);
        lapic.receive(Message { delivery: Delivery::Nmi, ..fixed(0, false) });
        assert!(lapic.take_nmi());
    }

    #[test]
    fn an_illegal_error_vector_does_not_recurse() {
        let mut lapic = enabled(0);
        write(&mut lapic, LVT_ERROR, 0x05);
        lapic.receive(fixed(3, false));
        write(&mut lapic, ESR, 0);
        assert_eq!(lapic.read_page(ESR, 0), ERROR_RECEIVE_VECTOR);
    }
}
