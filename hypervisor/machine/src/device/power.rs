//! ACPI's fixed hardware: the PM1a event block at 0x600, its control register at 0x604 and the 24-bit PM timer
//! at 0x608. The FADT says so and that there is no SMI command port: the machine is always in ACPI mode.

use super::clock::{NEVER, Rate};

/// The PM timer's clock, in ticks a second.
pub const PM_TIMER_HZ: u64 = 3_579_545;
const RATE: Rate = Rate::new(PM_TIMER_HZ);
const TIMER_MASK: u64 = 0xff_ffff;
/// The timer's top bit changes every 2^23 ticks.
const OVERFLOW_SHIFT: u32 = 23;

/// The first port.
pub const PORT: u16 = 0x600;
/// The last port.
pub const PORT_LAST: u16 = 0x60b;

const STATUS_TIMER: u16 = 1 << 0;
const EVENT_POWER_BUTTON: u16 = 1 << 8;
/// Events that can be enabled: timer overflow, global lock, power button, real-time clock. The second and the last
/// never happen here, but ACPI's software takes an enable bit that does not stick for broken hardware.
const EVENTS: u16 = STATUS_TIMER | 1 << 5 | EVENT_POWER_BUTTON | 1 << 10;
const CONTROL_SCI: u16 = 1 << 0;
const CONTROL_SLEEP: u16 = 1 << 13;
/// SLP_TYP of S5, power off.
const SLEEP_OFF: u16 = 5;

/// The power management registers.
#[derive(Debug, Default)]
pub struct Power {
    status: u16,
    enabled: u16,
    control: u16,
    /// Half-periods of the timer that have set their status.
    overflows: u64,
}

/// What a write to a power register asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Nothing.
    None,
    /// To be switched off.
    Off,
}

impl Power {
    /// The PM timer's count, 0..2^24.
    #[must_use]
    pub fn timer(now_ns: u64) -> u32 {
        (RATE.ticks(now_ns) & TIMER_MASK) as u32
    }

    /// Reads one byte of the block; wider accesses are made of these.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        self.advance(now_ns);
        let offset = usize::from(port.wrapping_sub(PORT));
        let value = match offset & !3 {
            0 => u32::from(self.status) | u32::from(self.enabled) << 16,
            4 => u32::from(self.control | CONTROL_SCI),
            8 => Self::timer(now_ns),
            _ => u32::MAX,
        };
        value.to_le_bytes()[offset & 3]
    }

    /// Writes one byte of the block; wider accesses are made of these, lowest first.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) -> PowerRequest {
        self.advance(now_ns);
        let offset = port.wrapping_sub(PORT);
        let shift = u32::from(offset & 1) * 8;
        let placed = u16::from(value) << shift;
        let merge = |old: u16| old & !(0xff << shift) | placed;
        match offset & !1 {
            0 => self.status &= !placed,
            2 => self.enabled = merge(self.enabled) & EVENTS,
            4 => {
                // SLP_EN reads as 0 and acts when it is written, in the high byte together with SLP_TYP.
                let control = merge(self.control);
                self.control = control & !CONTROL_SLEEP;
                if control & CONTROL_SLEEP != 0 && control >> 10 & 7 == SLEEP_OFF {
                    return PowerRequest::Off;
                }
            }
            _ => {}
        }
        PowerRequest::None
    }

    /// Somebody presses the power button.
    pub fn press_button(&mut self) {
        self.status |= EVENT_POWER_BUTTON;
    }

    /// The level of the system control interrupt, IRQ 9.
    #[must_use]
    pub fn interrupt_line(&self) -> bool {
        self.status & self.enabled != 0
    }

    /// Sets the status of a timer overflow that has passed.
    pub fn advance(&mut self, now_ns: u64) {
        let overflows = RATE.ticks(now_ns) >> OVERFLOW_SHIFT;
        if overflows > self.overflows {
            self.overflows = overflows;
            self.status |= STATUS_TIMER;
        }
    }

    /// When the timer next interrupts; [`NEVER`] if it does not.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        if self.enabled & !self.status & STATUS_TIMER == 0 {
            return NEVER;
        }
        RATE.ns_at((self.overflows + 1) << OVERFLOW_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::NS_PER_S;
    use super::*;

    #[test]
    fn powers_off_by_s5_only() {
        let mut power = Power::default();
        assert_eq!(power.write(0x605, (1 << 5) | (5 << 2), 0), PowerRequest::Off);
        assert_eq!(power.write(0x605, (1 << 5) | (1 << 2), 0), PowerRequest::None);
        assert_eq!(power.write(0x605, 5 << 2, 0), PowerRequest::None);
        assert_eq!(power.read(0x604, 0), 1);
        assert_eq!(power.read(0x605, 0), 5 << 2);
    }

    #[test]
    fn timer_counts_and_wraps() {
        assert_eq!(Power::timer(NS_PER_S), 3_579_545);
        assert_eq!(u64::from(Power::timer(10 * NS_PER_S)), 35_795_450 & TIMER_MASK);
        let mut power = Power::default();
        power.write(0x602, 1, 0);
        let deadline = power.deadline_ns();
        power.advance(deadline - 1);
        assert!(!power.interrupt_line());
        power.advance(deadline);
        assert!(power.interrupt_line());
        assert_eq!(power.deadline_ns(), NEVER);
        power.write(0x600, 1, deadline);
        assert!(!power.interrupt_line());
        assert!(power.deadline_ns() > deadline);
    }

    #[test]
    fn power_button() {
        let mut power = Power::default();
        power.write(0x603, 1, 0);
        power.press_button();
        assert!(power.interrupt_line());
        assert_eq!(power.read(0x601, 0), 1);
        power.write(0x601, 1, 0);
        assert!(!power.interrupt_line());
    }
}
