//! The MC146818 real-time clock and the memory beside it.

mod calendar;

use super::clock::{NEVER, NS_PER_S, Rate};
use calendar::Calendar;

/// The clock's crystal, in ticks a second.
const RATE: Rate = Rate::new(32_768);
/// How long before a new second the update-in-progress bit is set, in nanoseconds.
const UPDATE_NS: u64 = 244_000;

const A_UPDATING: u8 = 1 << 7;
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
/// Periodic, alarm and update interrupt: the same bits enable in register B and report in register C.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const C_INTERRUPT: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// From here on an alarm field matches anything.
const ALARM_ANY: u8 = 0xc0;
/// Seconds looked back for an alarm after a pause.
const ALARM_SECONDS_MAX: u64 = 8;

/// The clock chip: 128 bytes behind an index and a data port.
#[derive(Debug)]
pub struct Cmos {
    index: u8,
    memory: [u8; 128],
    /// Unix time at guest time 0, in seconds.
    epoch_s: i64,
    /// The time fields while the guest sets them.
    setting: Option<Calendar>,
    flags: u8,
    /// Seconds and periods up to here have set their flags.
    seen_ns: u64,
}

/// A guest's memory in the CMOS's units.
struct MemorySizes {
    above_1m_kib: u16,
    above_16m_64kib: u16,
    above_4g_64kib: u64,
}

impl MemorySizes {
    fn new(low_bytes: u64, high_bytes: u64) -> Self {
        let cap = |value: u64| value.min(0xffff) as u16;
        Self {
            above_1m_kib: cap(low_bytes.saturating_sub(1 << 20) >> 10),
            above_16m_64kib: cap(low_bytes.saturating_sub(16 << 20) >> 16),
            above_4g_64kib: (high_bytes >> 16).min(0xff_ffff),
        }
    }
}

impl Cmos {
    /// A clock that shows `start_unix_s` at guest time 0, for a guest with RAM of `low_bytes` below and
    /// `high_bytes` above 4 GiB.
    #[must_use]
    pub fn new(start_unix_s: u64, low_bytes: u64, high_bytes: u64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REGISTER_A)] = A_DEFAULT;
        memory[usize::from(REGISTER_B)] = B_24_HOURS;
        memory[0x14] = 0x02; // a coprocessor; no diskette, no display
        memory[0x15..0x17].copy_from_slice(&640u16.to_le_bytes());
        let sizes = MemorySizes::new(low_bytes, high_bytes);
        memory[0x17..0x19].copy_from_slice(&sizes.above_1m_kib.to_le_bytes());
        memory[0x30..0x32].copy_from_slice(&sizes.above_1m_kib.to_le_bytes());
        memory[0x34..0x36].copy_from_slice(&sizes.above_16m_64kib.to_le_bytes());
        memory[0x5b..0x5e].copy_from_slice(&sizes.above_4g_64kib.to_le_bytes()[..3]);
        Self {
            index: REGISTER_D,
            memory,
            epoch_s: start_unix_s.min(calendar::UNIX_S_MAX) as i64,
            setting: None,
            flags: 0,
            seen_ns: 0,
        }
    }

    /// Reads port 0x70 or 0x71.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        if port & 1 == 0 {
            return 0xff;
        }
        match self.index {
            0 | 2 | 4 | 6..=9 | CENTURY => self.read_time(now_ns),
            REGISTER_A => {
                let updating = self.setting.is_none() && now_ns % NS_PER_S >= NS_PER_S - UPDATE_NS;
                self.memory[usize::from(REGISTER_A)] | if updating { A_UPDATING } else { 0 }
            }
            REGISTER_C => {
                self.advance(now_ns);
                let interrupt = if self.interrupt_line() { C_INTERRUPT } else { 0 };
                core::mem::take(&mut self.flags) | interrupt
            }
            REGISTER_D => D_VALID,
            index => self.memory[usize::from(index)],
        }
    }

    /// Writes port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        if port & 1 == 0 {
            // Bit 7 masks NMIs on a real board; ours come from the hypervisor and are not to be masked.
            self.index = value & 0x7f;
            return;
        }
        match self.index {
            0 | 2 | 4 | 7..=9 | CENTURY => self.write_time(value, now_ns),
            REGISTER_A => {
                self.advance(now_ns);
                self.memory[usize::from(REGISTER_A)] = value & !A_UPDATING;
            }
            REGISTER_B => self.write_control(value, now_ns),
            6 | REGISTER_C | REGISTER_D => {}
            index => self.memory[usize::from(index)] = value,
        }
    }

    /// The level of IRQ 8.
    #[must_use]
    pub fn interrupt_line(&self) -> bool {
        self.flags & self.control() & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// Sets the flags of the seconds and periods that have passed.
    pub fn advance(&mut self, now_ns: u64) {
        if now_ns <= self.seen_ns {
            return;
        }
        if let Some(period) = self.period_shift()
            && RATE.ticks(now_ns) >> period != RATE.ticks(self.seen_ns) >> period
        {
            self.flags |= PERIODIC;
        }
        let (second, seen) = (now_ns / NS_PER_S, self.seen_ns / NS_PER_S);
        if second != seen && self.setting.is_none() {
            self.flags |= UPDATE;
            let from = (seen + 1).max(second.saturating_sub(ALARM_SECONDS_MAX));
            if self.flags & ALARM == 0 && (from..=second).any(|second| self.alarm_matches(second)) {
                self.flags |= ALARM;
            }
        }
        self.seen_ns = now_ns;
    }

    /// When the interrupt line may next rise; [`NEVER`] if it cannot.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        if self.interrupt_line() {
            // Only reading register C makes a new edge possible.
            return NEVER;
        }
        let mut deadline = NEVER;
        let wanted = self.control() & !self.flags;
        if wanted & (UPDATE | ALARM) != 0 && self.setting.is_none() {
            deadline = (self.seen_ns / NS_PER_S).saturating_add(1).saturating_mul(NS_PER_S);
        }
        if wanted & PERIODIC != 0
            && let Some(period) = self.period_shift()
        {
            deadline = deadline.min(RATE.ns_at(((RATE.ticks(self.seen_ns) >> period) + 1) << period));
        }
        deadline
    }

    fn control(&self) -> u8 {
        self.memory[usize::from(REGISTER_B)]
    }

    /// log2 of the periodic interrupt's period in crystal ticks, 2..=14.
    fn period_shift(&self) -> Option<u32> {
        match self.memory[usize::from(REGISTER_A)] & 0x0f {
            0 => None,
            select @ 1..=2 => Some(u32::from(select) + 6),
            select => Some(u32::from(select) - 1),
        }
    }

    fn unix_s(&self, now_ns: u64) -> i64 {
        self.epoch_s.saturating_add((now_ns / NS_PER_S) as i64)
    }

    fn calendar(&self, now_ns: u64) -> Calendar {
        self.setting.unwrap_or_else(|| Calendar::from_unix(self.unix_s(now_ns)))
    }

    fn alarm_matches(&self, second: u64) -> bool {
        let time = Calendar::from_unix(self.epoch_s.saturating_add(second as i64));
        let matches = |alarm: u8, value: u8| alarm >= ALARM_ANY || alarm == value;
        matches(self.memory[1], self.encode(time.second))
            && matches(self.memory[3], self.encode(time.minute))
            && matches(self.memory[5], self.encode_hour(time.hour))
    }

    fn read_time(&self, now_ns: u64) -> u8 {
        let time = self.calendar(now_ns);
        match self.index {
            0 => self.encode(time.second),
            2 => self.encode(time.minute),
            4 => self.encode_hour(time.hour),
            6 => self.encode(time.weekday()),
            7 => self.encode(time.day),
            8 => self.encode(time.month),
            9 => self.encode((time.year % 100) as u8),
            _ => self.encode((time.year / 100) as u8),
        }
    }

    fn write_time(&mut self, value: u8, now_ns: u64) {
        let mut time = self.calendar(now_ns);
        let number = self.decode(value);
        match self.index {
            0 => time.second = number,
            2 => time.minute = number,
            4 => time.hour = self.decode_hour(value),
            7 => time.day = number,
            8 => time.month = number,
            9 => time.year = time.year / 100 * 100 + u16::from(number),
            _ => time.year = u16::from(number) * 100 + time.year % 100,
        }
        if self.setting.is_some() {
            self.setting = Some(time);
        } else {
            self.set(time, now_ns);
        }
    }

    fn write_control(&mut self, value: u8, now_ns: u64) {
        self.advance(now_ns);
        if value & B_SET != 0 {
            self.setting = Some(self.calendar(now_ns));
        } else if let Some(time) = self.setting.take() {
            self.set(time, now_ns);
        }
        // SET also clears the update interrupt's enable bit.
        self.memory[usize::from(REGISTER_B)] = if value & B_SET != 0 { value & !UPDATE } else { value };
    }

    fn set(&mut self, time: Calendar, now_ns: u64) {
        self.epoch_s = time.unix_s().saturating_sub((now_ns / NS_PER_S) as i64);
    }

    fn encode(&self, value: u8) -> u8 {
        if self.control() & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.control() & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.control() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        afternoon
            | self.encode(match hour % 12 {
                0 => 12,
                hour => hour,
            })
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.control() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2023-11-14 22:13:20, a Tuesday.
    const START_S: u64 = 1_700_000_000;

    fn register(cmos: &mut Cmos, index: u8, now_ns: u64) -> u8 {
        cmos.write(0x70, index | 0x80, now_ns);
        cmos.read(0x71, now_ns)
    }

    fn set_register(cmos: &mut Cmos, index: u8, value: u8, now_ns: u64) {
        cmos.write(0x70, index, now_ns);
        cmos.write(0x71, value, now_ns);
    }

    #[test]
    fn shows_the_time_in_bcd() {
        let mut cmos = Cmos::new(START_S, 256 << 20, 0);
        let now = 5 * NS_PER_S;
        let fields = [9, 8, 7, 6, 4, 2, 0, CENTURY].map(|index| register(&mut cmos, index, now));
        assert_eq!(fields, [0x23, 0x11, 0x14, 0x03, 0x22, 0x13, 0x25, 0x20]);
        set_register(&mut cmos, REGISTER_B, B_BINARY, now);
        assert_eq!(register(&mut cmos, 4, now), 0x80 | 10);
    }

    #[test]
    fn update_in_progress_before_each_second() {
        let mut cmos = Cmos::new(START_S, 0, 0);
        assert_eq!(register(&mut cmos, REGISTER_A, 0), A_DEFAULT);
        assert_eq!(register(&mut cmos, REGISTER_A, NS_PER_S - 1), A_DEFAULT | A_UPDATING);
        assert_eq!(register(&mut cmos, REGISTER_A, NS_PER_S), A_DEFAULT);
    }

    #[test]
    fn memory_sizes() {
        let mut cmos = Cmos::new(0, 256 << 20, 1 << 30);
        assert_eq!(register(&mut cmos, 0x34, 0), 0x00);
        assert_eq!(register(&mut cmos, 0x35, 0), 0x0f);
        assert_eq!(register(&mut cmos, 0x5c, 0), 0x40);
        assert_eq!(register(&mut cmos, 0x16, 0), 0x02);
    }

    #[test]
    fn the_guest_sets_the_time() {
        let mut cmos = Cmos::new(START_S, 0, 0);
        let now = 90 * NS_PER_S;
        set_register(&mut cmos, REGISTER_B, B_SET | B_24_HOURS, now);
        for (index, value) in [(0, 0x59), (2, 0x59), (4, 0x23), (7, 0x28), (8, 0x02), (9, 0x24)] {
            set_register(&mut cmos, index, value, now);
        }
        assert_eq!(register(&mut cmos, 0, now + 3 * NS_PER_S), 0x59);
        set_register(&mut cmos, REGISTER_B, B_24_HOURS, now);
        let later = now + NS_PER_S;
        let fields = [9, 8, 7, 4, 2, 0].map(|index| register(&mut cmos, index, later));
        assert_eq!(fields, [0x24, 0x02, 0x29, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn periodic_interrupt_waits_for_register_c() {
        let mut cmos = Cmos::new(START_S, 0, 0);
        assert_eq!(cmos.deadline_ns(), NEVER);
        set_register(&mut cmos, REGISTER_B, B_24_HOURS | PERIODIC, 0);
        let deadline = cmos.deadline_ns();
        assert_eq!(deadline, RATE.ns_at(32)); // 1024 Hz
        cmos.advance(deadline);
        assert!(cmos.interrupt_line());
        assert_eq!(cmos.deadline_ns(), NEVER);
        assert_eq!(register(&mut cmos, REGISTER_C, deadline), C_INTERRUPT | PERIODIC);
        assert!(!cmos.interrupt_line());
        assert_eq!(cmos.deadline_ns(), RATE.ns_at(64));
    }

    #[test]
    fn alarm() {
        let mut cmos = Cmos::new(START_S, 0, 0);
        for (index, value) in [(1, 0x25), (3, 0xff), (5, 0x22), (REGISTER_B, B_24_HOURS | ALARM)] {
            set_register(&mut cmos, index, value, 0);
        }
        for second in 1..5 {
            cmos.advance(second * NS_PER_S);
            assert!(!cmos.interrupt_line());
        }
        assert_eq!(cmos.deadline_ns(), 5 * NS_PER_S);
        cmos.advance(5 * NS_PER_S);
        assert!(cmos.interrupt_line());
    }

    proptest! {
        #[test]
        fn any_sequence(start: u64, steps in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u32>()), 0..200)) {
            let mut cmos = Cmos::new(start, start, start);
            let mut now = 0;
            for (data, value, passed) in steps {
                now += u64::from(passed);
                cmos.advance(now);
                prop_assert!(cmos.deadline_ns() > now);
                cmos.write(0x70 + u16::from(data), value, now);
                cmos.read(0x71, now);
            }
            cmos.advance(u64::MAX);
            cmos.read(0x71, u64::MAX);
        }
    }
}
