//! The 8254 interval timer and port 0x61. Nothing ticks: every count is computed from the time it was loaded.

use super::clock::{NEVER, PERIOD_NS_MIN, Rate};

/// The timer's clock, in ticks a second.
pub const PIT_HZ: u64 = 1_193_182;
const RATE: Rate = Rate::new(PIT_HZ);

/// Half the period of the refresh signal in port 0x61, in nanoseconds.
const REFRESH_NS: u64 = 15_085;

/// Port 0x61.
const PORT_B_GATE: u8 = 1 << 0;
const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_OUT: u8 = 1 << 5;

/// Which bytes of a count an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    Both = 3,
}

/// What a channel counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// No count was written since the control word, or the trigger has not come.
    Idle,
    /// Counting since this tick.
    Since(u64),
    /// Stopped by its gate, so many ticks after its start.
    Held(u64),
}

/// One of the three counters. Times are in ticks since guest time 0.
#[derive(Debug)]
struct Channel {
    /// 0..=5.
    mode: u8,
    bcd: bool,
    access: Access,
    /// 1..=0x10000.
    count: u64,
    written: bool,
    run: Run,
    gate: bool,
    write_low: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: 0x1_0000,
            written: false,
            run: Run::Idle,
            gate,
            write_low: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// The output is retriggered by the gate's rising edge (modes 1 and 5).
    fn waits_for_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, tick: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => Some(tick.saturating_sub(start)),
            Run::Held(elapsed) => Some(elapsed),
        }
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// What the counting element holds, as the guest reads it.
    fn value(&self, tick: u64) -> u16 {
        let count = match self.elapsed(tick) {
            None => self.count,
            Some(elapsed) => match self.mode {
                2 => self.count - elapsed % self.count,
                // Counts down by two, twice per period; always even.
                3 => {
                    let even = self.count.next_multiple_of(2);
                    even - 2 * (elapsed % self.count) % even
                }
                _ => {
                    let modulus = self.modulus();
                    self.count % modulus + modulus - elapsed % modulus
                }
            },
        } % self.modulus();
        if self.bcd { to_bcd(count as u16) } else { count as u16 }
    }

    fn output(&self, tick: u64) -> bool {
        let Some(elapsed) = self.elapsed(tick) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= self.count,
            2 => !self.gate || elapsed % self.count != self.count - 1,
            3 => !self.gate || elapsed % self.count < self.count.div_ceil(2),
            _ => elapsed != self.count,
        }
    }

    fn control(&mut self, value: u8) {
        self.access = match value >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are 2 and 3 again.
        self.mode = match value >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        self.bcd = value & 1 != 0;
        self.written = false;
        self.run = Run::Idle;
        self.write_low = None;
        self.read_high_next = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    /// Takes a byte of the count; it is loaded at once, also where the hardware would end the period first.
    fn write(&mut self, value: u8, tick: u64) {
        let count = match (self.access, self.write_low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops a mode 0 count and drops the output.
                    self.run = Run::Idle;
                    self.written = false;
                }
                return;
            }
            (Access::Both, Some(low)) => {
                self.write_low = None;
                u16::from_le_bytes([low, value])
            }
        };
        let count = if self.bcd { from_bcd(count) } else { u64::from(count) };
        self.count = if count == 0 { self.modulus() } else { count };
        self.written = true;
        if !self.waits_for_trigger() {
            self.run = if self.gate { Run::Since(tick) } else { Run::Held(0) };
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(tick)).to_le_bytes();
        let use_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => self.read_high_next,
        };
        if self.access == Access::Both {
            self.read_high_next = !use_high;
        }
        if self.access != Access::Both || use_high {
            self.latched_count = None;
        }
        if use_high { high } else { low }
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        let status = u8::from(self.output(tick)) << 7
            | u8::from(!self.written) << 6
            | (self.access as u8) << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        if rising && self.written && (self.is_periodic() || self.waits_for_trigger()) {
            self.run = Run::Since(tick);
        } else if rising && let Run::Held(elapsed) = self.run {
            self.run = Run::Since(tick.saturating_sub(elapsed));
        } else if falling
            && !self.waits_for_trigger()
            && let Run::Since(start) = self.run
        {
            self.run = Run::Held(tick.saturating_sub(start));
        }
    }
}

/// The timer. Channel 0 is wired to IRQ 0, channel 2 to the speaker port.
#[derive(Debug)]
pub struct Pit {
    channels: [Channel; 3],
    port_b: u8,
    /// When channel 0 next interrupts; [`NEVER`] if it does not.
    interrupt_ns: u64,
}

impl Default for Pit {
    fn default() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            port_b: 0,
            interrupt_ns: NEVER,
        }
    }
}

impl Pit {
    /// Reads port 0x40..=0x43.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match self.channels.get_mut(usize::from(port & 3)) {
            Some(channel) => channel.read(RATE.ticks(now_ns)),
            None => 0xff,
        }
    }

    /// Writes port 0x40..=0x43.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        let tick = RATE.ticks(now_ns);
        let index = usize::from(port & 3);
        if let Some(channel) = self.channels.get_mut(index) {
            channel.write(value, tick);
            if index == 0 {
                self.schedule(now_ns);
            }
            return;
        }
        match value >> 6 {
            3 => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << index != 0 {
                        if value & 0x20 == 0 {
                            channel.latch_count(tick);
                        }
                        if value & 0x10 == 0 {
                            channel.latch_status(tick);
                        }
                    }
                }
            }
            index => {
                let channel = &mut self.channels[usize::from(index)];
                if value & 0x30 == 0 {
                    channel.latch_count(tick);
                } else {
                    channel.control(value);
                    if index == 0 {
                        self.interrupt_ns = NEVER;
                    }
                }
            }
        }
    }

    /// Reads port 0x61: gate and speaker as written, the refresh toggle, channel 2's output.
    #[must_use]
    pub fn read_port_b(&self, now_ns: u64) -> u8 {
        let mut value = self.port_b;
        if (now_ns / REFRESH_NS) & 1 != 0 {
            value |= PORT_B_REFRESH;
        }
        if self.channels[2].output(RATE.ticks(now_ns)) {
            value |= PORT_B_OUT;
        }
        value
    }

    /// Writes port 0x61.
    pub fn write_port_b(&mut self, value: u8, now_ns: u64) {
        self.port_b = value & PORT_B_WRITABLE;
        self.channels[2].set_gate(value & PORT_B_GATE != 0, RATE.ticks(now_ns));
    }

    /// When channel 0 next raises IRQ 0; [`NEVER`] if it does not.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        self.interrupt_ns
    }

    /// True if IRQ 0 has had at least one rising edge since the last call; missed periods count as one.
    pub fn advance(&mut self, now_ns: u64) -> bool {
        if now_ns < self.interrupt_ns {
            return false;
        }
        let earliest_ns = now_ns.saturating_add(PERIOD_NS_MIN);
        self.interrupt_ns = NEVER;
        if self.channels[0].is_periodic() {
            self.schedule(now_ns);
            self.interrupt_ns = self.interrupt_ns.max(earliest_ns);
        }
        true
    }

    /// Finds channel 0's next rising edge after `now_ns`.
    fn schedule(&mut self, now_ns: u64) {
        let channel = &self.channels[0];
        self.interrupt_ns = match channel.run {
            Run::Since(start) => {
                let elapsed = RATE.ticks(now_ns).saturating_sub(start);
                let periods = if channel.is_periodic() { elapsed / channel.count + 1 } else { 1 };
                RATE.ns_at(start.saturating_add(periods.saturating_mul(channel.count)))
            }
            Run::Idle | Run::Held(_) => NEVER,
        };
    }
}

fn to_bcd(value: u16) -> u16 {
    [1000, 100, 10, 1].into_iter().fold(0, |bcd, place| (bcd << 4) | (value / place % 10))
}

/// Digits above nine count as they would: at most 0xffff = 16,665.
fn from_bcd(value: u16) -> u64 {
    let digit = |place: u32| u64::from(value >> (4 * place) & 0xf);
    (digit(0) + 10 * digit(1) + 100 * digit(2) + 1000 * digit(3)).min(9999)
}

#[cfg(test)]
mod tests {
    use super::super::clock::NS_PER_S;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn linux_quick_pit_calibrate() {
        // Gate on, speaker off; channel 2, mode 0, 0xffff; then watch the high byte fall.
        let mut pit = Pit::default();
        let mut now = 5_000_000;
        pit.write_port_b(pit.read_port_b(now) & !2 | 1, now);
        pit.write(0x43, 0xb0, now);
        pit.write(0x42, 0xff, now);
        pit.write(0x42, 0xff, now);
        let start = now;
        pit.read(0x42, now);
        assert_eq!(pit.read(0x42, now), 0xff);
        for expected in (0xe0..=0xfe).rev() {
            loop {
                now += 500;
                pit.read(0x42, now);
                if pit.read(0x42, now) == expected {
                    break;
                }
            }
            let ticks = u64::from(0xff - expected - 1) * 256 + 256;
            let ideal = start + ticks * NS_PER_S / PIT_HZ;
            assert!(now.abs_diff(ideal) < 2_000, "{now} {ideal}");
        }
    }

    #[test]
    fn linux_pit_calibrate_tsc() {
        // Mode 0 with 10 ms: OUT2 rises when the time is over.
        let mut pit = Pit::default();
        pit.write_port_b(1, 0);
        pit.write(0x43, 0xb0, 0);
        let latch = (PIT_HZ / 100) as u16;
        pit.write(0x42, latch as u8, 0);
        pit.write(0x42, (latch >> 8) as u8, 0);
        assert_eq!(pit.read_port_b(9_990_000) & PORT_B_OUT, 0);
        assert_ne!(pit.read_port_b(10_000_000) & PORT_B_OUT, 0);
    }

    #[test]
    fn periodic_interrupt() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x34, 0);
        pit.write(0x40, 0x9c, 0);
        pit.write(0x40, 0x2e, 0); // 11932: 100 Hz
        let mut edges = 0;
        for now in (0..=NS_PER_S).step_by(100_000) {
            edges += u32::from(pit.advance(now));
        }
        assert_eq!(edges, 99);
        // Missed periods are one edge, and the rhythm goes on.
        assert!(pit.advance(5 * NS_PER_S));
        assert!(!pit.advance(5 * NS_PER_S));
        assert!(pit.deadline_ns() > 5 * NS_PER_S && pit.deadline_ns() < 5 * NS_PER_S + 11_000_000);
    }

    #[test]
    fn one_shot_and_shutdown() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x38, 0); // mode 4
        pit.write(0x40, 0x00, 0);
        pit.write(0x40, 0x10, 0);
        let deadline = pit.deadline_ns();
        assert_eq!(deadline, RATE.ns_at(0x1000));
        assert!(!pit.advance(deadline - 1));
        assert!(pit.advance(deadline));
        assert_eq!(pit.deadline_ns(), NEVER);
        pit.write(0x43, 0x30, deadline);
        assert_eq!(pit.deadline_ns(), NEVER);
    }

    #[test]
    fn tiny_periods_are_bounded() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x14, 0);
        pit.write(0x40, 1, 0);
        let mut edges = 0;
        let mut now = 0;
        while now < 10_000_000 {
            now = pit.deadline_ns();
            assert!(pit.advance(now));
            edges += 1;
        }
        assert!(edges <= 202, "{edges}");
    }

    #[test]
    fn latch_and_read_back() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x36, 0);
        pit.write(0x40, 0xe8, 0);
        pit.write(0x40, 0x03, 0); // 1000
        pit.write(0x43, 0xc2, RATE.ns_at(100));
        // Status (output high, mode 3, both bytes), then the count: down by two a tick.
        assert_eq!(pit.read(0x40, NS_PER_S), 0xb6);
        assert_eq!(pit.read(0x40, NS_PER_S), (800 & 0xff) as u8);
        assert_eq!(pit.read(0x40, NS_PER_S), (800 >> 8) as u8);
        pit.write(0x43, 0x00, RATE.ns_at(1001));
        assert_eq!(pit.read(0x40, 0), (998 & 0xff) as u8);
    }

    #[test]
    fn gate_holds_channel_2() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x90, 0);
        pit.write(0x42, 200, 0);
        assert_eq!(pit.read(0x42, RATE.ns_at(500)), 200);
        pit.write_port_b(1, RATE.ns_at(500));
        assert_eq!(pit.read(0x42, RATE.ns_at(550)), 150);
        pit.write_port_b(0, RATE.ns_at(560));
        assert_eq!(pit.read(0x42, RATE.ns_at(900)), 140);
    }

    #[test]
    fn bcd() {
        let mut pit = Pit::default();
        pit.write(0x43, 0x31, 0);
        pit.write(0x40, 0x00, 0);
        pit.write(0x40, 0x10, 0); // 1000
        pit.write(0x43, 0x00, RATE.ns_at(1));
        assert_eq!((pit.read(0x40, 0), pit.read(0x40, 0)), (0x99, 0x09));
    }

    proptest! {
        #[test]
        fn any_sequence(steps in prop::collection::vec((0u16..5, any::<u8>(), 0u64..10_000_000), 0..200)) {
            let mut pit = Pit::default();
            let mut now = 0;
            for (port, value, passed) in steps {
                now += passed;
                if pit.advance(now) {
                    prop_assert!(pit.deadline_ns() > now);
                }
                if port == 4 {
                    pit.write_port_b(value, now);
                } else {
                    pit.write(0x40 + port, value, now);
                }
                pit.read(0x40 + port, now);
                let _ = pit.read_port_b(now);
            }
        }
    }
}
