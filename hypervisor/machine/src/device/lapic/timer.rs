//! The local APIC's timer: one-shot, periodic, TSC-deadline.

use super::super::clock::{NEVER, PERIOD_NS_MIN};

/// How the timer runs, from bits 18:17 of its LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Starts again by itself.
    Periodic,
    /// Fires when the TSC reaches a value.
    TscDeadline,
    /// The reserved encoding: does not run.
    Reserved,
}

impl Mode {
    fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// The timer's state. Its input clock is 1 GHz: an undivided tick is a nanosecond.
#[derive(Debug)]
pub struct Timer {
    mode: Mode,
    divide: u32,
    initial: u32,
    expires_ns: u64,
    deadline_tsc: u64,
}

impl Default for Timer {
    fn default() -> Self {
        Self { mode: Mode::OneShot, divide: 0, initial: 0, expires_ns: NEVER, deadline_tsc: 0 }
    }
}

impl Timer {
    /// When it expires; [`NEVER`] if it does not run.
    #[must_use]
    pub fn expires_ns(&self) -> u64 {
        self.expires_ns
    }

    /// True if it has expired since the last call. Missed periods count as one.
    pub fn expire(&mut self, now_ns: u64) -> bool {
        if now_ns < self.expires_ns {
            return false;
        }
        self.deadline_tsc = 0;
        self.expires_ns = if self.mode == Mode::Periodic {
            let period = self.period_ns();
            let missed = (now_ns - self.expires_ns) / period;
            self.expires_ns.saturating_add(missed.saturating_add(1).saturating_mul(period))
        } else {
            NEVER
        };
        true
    }

    /// The LVT entry was written. The caller has let pass what expired before.
    pub fn set_lvt(&mut self, lvt: u32) {
        let mode = Mode::from_lvt(lvt);
        let counts = |mode| matches!(mode, Mode::OneShot | Mode::Periodic);
        if mode != self.mode && !(counts(mode) && counts(self.mode)) {
            // Between counting and the TSC deadline nothing is carried over.
            self.expires_ns = NEVER;
            self.deadline_tsc = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// The initial count register.
    #[must_use]
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count, which starts the countdown; 0 stops it.
    pub fn set_initial(&mut self, initial: u32, now_ns: u64) {
        if !matches!(self.mode, Mode::OneShot | Mode::Periodic) {
            return;
        }
        self.initial = initial;
        self.expires_ns = match (initial, self.mode) {
            (0, _) => NEVER,
            (_, Mode::Periodic) => now_ns.saturating_add(self.period_ns()),
            _ => now_ns.saturating_add(u64::from(initial) << self.shift()),
        };
    }

    /// The current count register, 0 when nothing is counted.
    #[must_use]
    pub fn current(&self, now_ns: u64) -> u32 {
        if self.expires_ns == NEVER || !matches!(self.mode, Mode::OneShot | Mode::Periodic) {
            return 0;
        }
        let left_ns = self.expires_ns.saturating_sub(now_ns);
        let left = left_ns.div_ceil(1 << self.shift());
        left.min(u64::from(self.initial)) as u32
    }

    /// The divide configuration register.
    #[must_use]
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration register: what is left is counted at the new speed.
    pub fn set_divide(&mut self, divide: u32, now_ns: u64) {
        let left = self.current(now_ns);
        self.divide = divide & 0x0b;
        if left != 0 {
            self.expires_ns = now_ns.saturating_add(u64::from(left) << self.shift());
        }
    }

    /// IA32_TSC_DEADLINE as the guest reads it: 0 unless armed.
    #[must_use]
    pub fn deadline_tsc(&self) -> u64 {
        self.deadline_tsc
    }

    /// Writes IA32_TSC_DEADLINE, which the guest's TSC reaches at `expires_ns`. Ignored in the other modes.
    pub fn set_deadline_tsc(&mut self, deadline_tsc: u64, expires_ns: u64) {
        if self.mode == Mode::TscDeadline {
            self.deadline_tsc = deadline_tsc;
            self.expires_ns = if deadline_tsc == 0 { NEVER } else { expires_ns };
        }
    }

    /// log2 of the divisor, 0..=7.
    fn shift(&self) -> u32 {
        ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7
    }

    fn period_ns(&self) -> u64 {
        (u64::from(self.initial) << self.shift()).max(PERIOD_NS_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot() {
        let mut timer = Timer::default();
        timer.set_divide(3, 0); // by 16
        timer.set_initial(1000, 100);
        assert_eq!(timer.expires_ns(), 16_100);
        assert_eq!(timer.current(100), 1000);
        assert_eq!(timer.current(8_100), 500);
        assert!(!timer.expire(16_099));
        assert!(timer.expire(16_100));
        assert!(!timer.expire(u64::MAX - 1));
        assert_eq!(timer.current(20_000), 0);
    }

    #[test]
    fn periodic_is_bounded_and_keeps_its_rhythm() {
        let mut timer = Timer::default();
        timer.set_divide(0x0b, 0);
        timer.set_lvt(1 << 17);
        timer.set_initial(1_000_000, 0);
        assert!(timer.expire(1_000_000));
        assert!(timer.expire(5_500_000));
        assert_eq!(timer.expires_ns(), 6_000_000);
        timer.set_initial(1, 0);
        assert_eq!(timer.expires_ns(), PERIOD_NS_MIN);
        assert_eq!(timer.current(0), 1);
    }

    #[test]
    fn tsc_deadline() {
        let mut timer = Timer::default();
        timer.set_deadline_tsc(5, 5);
        assert_eq!(timer.deadline_tsc(), 0);
        timer.set_lvt(2 << 17);
        timer.set_initial(7, 0);
        assert_eq!(timer.expires_ns(), NEVER);
        timer.set_deadline_tsc(5, 500);
        assert_eq!((timer.deadline_tsc(), timer.current(0)), (5, 0));
        assert!(timer.expire(500));
        assert_eq!((timer.deadline_tsc(), timer.expires_ns()), (0, NEVER));
        timer.set_deadline_tsc(9, 900);
        timer.set_lvt(0);
        assert_eq!(timer.expires_ns(), NEVER);
    }

    #[test]
    fn divisors() {
        let mut timer = Timer::default();
        for (divide, shift) in [(0, 1), (1, 2), (2, 3), (3, 4), (8, 5), (9, 6), (10, 7), (11, 0)] {
            timer.set_divide(divide, 0);
            assert_eq!(timer.shift(), shift);
        }
    }
}
