//! The pair of 8259A interrupt controllers with the ELCR beside them.

/// The firmware's vectors: 8 for the first controller, 0x70 for the second.
const VECTOR_BASES: [u8; 2] = [0x08, 0x70];
/// The pin of the first controller that the second is wired to.
const CASCADE: u8 = 2;
/// Inputs that may be level-triggered: not 0, 1, 2, 8 and 13.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
/// IRQ 9, ACPI's, is level-triggered as firmware leaves it.
const ELCR_SECOND: u8 = 0x02;

/// What the next write to the data port means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Mask,
    Vector,
    Cascade,
    Mode,
}

/// One 8259A.
#[derive(Debug)]
struct Chip {
    requested: u8,
    in_service: u8,
    masked: u8,
    lines: u8,
    level_triggered: u8,
    vector_base: u8,
    /// The input with the lowest priority, 0..=7; the next one has the highest.
    lowest: u8,
    expect: Expect,
    single: bool,
    wants_mode: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    poll: bool,
    read_in_service: bool,
}

impl Chip {
    fn new(vector_base: u8, level_triggered: u8) -> Self {
        Self {
            requested: 0,
            in_service: 0,
            masked: 0xff,
            lines: 0,
            level_triggered,
            vector_base,
            lowest: 7,
            expect: Expect::Mask,
            single: false,
            wants_mode: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            fully_nested: false,
            poll: false,
            read_in_service: false,
        }
    }

    /// The distance from the highest priority, 0..=7, of the most urgent input in `inputs`; 8 if there is none.
    fn urgency(&self, inputs: u8) -> u32 {
        inputs.rotate_right(u32::from(self.lowest) + 1).trailing_zeros()
    }

    fn input_at(&self, urgency: u32) -> u8 {
        (self.lowest + 1 + urgency as u8) & 7
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rose = level && self.lines & bit == 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.level_triggered & bit != 0 {
            self.requested = self.requested & !bit | self.lines & bit;
        } else if rose {
            self.requested |= bit;
        }
    }

    /// The input that asks for the processor now.
    fn request(&self) -> Option<u8> {
        let wanted = self.urgency(self.requested & !self.masked);
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.masked;
        }
        if self.fully_nested {
            // A second interrupt through the cascade may be more urgent than the one in service.
            blocking &= !(1 << CASCADE);
        }
        (wanted < self.urgency(blocking)).then(|| self.input_at(wanted))
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level_triggered & bit == 0 {
            self.requested &= !bit;
        }
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 forgets all edges; level-triggered inputs ask again by themselves.
            self.lines &= self.level_triggered;
            self.requested = self.lines;
            self.in_service = 0;
            self.masked = 0;
            self.lowest = 7;
            self.auto_eoi = false;
            self.rotate_on_auto_eoi = false;
            self.special_mask = false;
            self.fully_nested = false;
            self.poll = false;
            self.read_in_service = false;
            self.single = value & 0x02 != 0;
            self.wants_mode = value & 0x01 != 0;
            self.expect = Expect::Vector;
        } else if value & 0x08 != 0 {
            // OCW3.
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 0x04 != 0;
            if value & 0x02 != 0 {
                self.read_in_service = value & 0x01 != 0;
            }
        } else {
            self.write_eoi(value);
        }
    }

    /// OCW2: the end of an interrupt, and the rotation of priorities.
    fn write_eoi(&mut self, value: u8) {
        let rotate = value & 0x80 != 0;
        let input = value & 7;
        match value >> 5 & 3 {
            0 => self.rotate_on_auto_eoi = rotate,
            1 => {
                let mut ending = self.in_service;
                if self.special_mask {
                    ending &= !self.masked;
                }
                if ending != 0 {
                    let input = self.input_at(self.urgency(ending));
                    self.in_service &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            2 if rotate => self.lowest = input,
            2 => {}
            _ => {
                self.in_service &= !(1 << input);
                if rotate {
                    self.lowest = input;
                }
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        let mode = if self.wants_mode { Expect::Mode } else { Expect::Mask };
        match self.expect {
            Expect::Mask => self.masked = value,
            Expect::Vector => {
                self.vector_base = value & 0xf8;
                self.expect = if self.single { mode } else { Expect::Cascade };
            }
            Expect::Cascade => self.expect = mode,
            Expect::Mode => {
                self.auto_eoi = value & 0x02 != 0;
                self.fully_nested = value & 0x10 != 0;
                self.expect = Expect::Mask;
            }
        }
    }
}

/// Both controllers.
#[derive(Debug)]
pub struct Pic {
    chips: [Chip; 2],
}

impl Default for Pic {
    fn default() -> Self {
        Self { chips: [Chip::new(VECTOR_BASES[0], 0), Chip::new(VECTOR_BASES[1], ELCR_SECOND)] }
    }
}

impl Pic {
    /// Drives the input `irq`, 0..16 (2 is the cascade and ignored).
    pub fn set_line(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.chips[0].set_line(irq, level),
            8..16 => {
                self.chips[1].set_line(irq & 7, level);
                self.cascade();
            }
            _ => debug_assert!(false, "no such IRQ"),
        }
    }

    /// The level of the wire to the processor.
    #[must_use]
    pub fn output(&self) -> bool {
        self.chips[0].request().is_some()
    }

    /// The processor's acknowledge cycle: the vector of the most urgent interrupt, which is then in service. If
    /// none asks any more it is the spurious one, IRQ 7 or 15.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.chips[0].request() else { return self.chips[0].vector_base | 7 };
        self.chips[0].acknowledge(input);
        if input != CASCADE || self.chips[0].single {
            return self.chips[0].vector_base | input;
        }
        let second = &mut self.chips[1];
        let input = second.request();
        if let Some(input) = input {
            second.acknowledge(input);
        }
        let vector = second.vector_base | input.unwrap_or(7);
        // The acknowledged request withdraws the wire, the next one raises it again: a new edge.
        self.chips[0].set_line(CASCADE, false);
        self.cascade();
        vector
    }

    /// Reads port 0x20, 0x21, 0xA0, 0xA1 or the ELCR, 0x4D0 and 0x4D1.
    pub fn read(&mut self, port: u16) -> u8 {
        if port & 0xfffe == 0x4d0 {
            return self.chips[usize::from(port & 1)].level_triggered;
        }
        let index = usize::from(port & 0x80 != 0);
        let chip = &mut self.chips[index];
        if core::mem::take(&mut chip.poll) {
            let Some(input) = chip.request() else { return 0 };
            chip.acknowledge(input);
            if index == 1 {
                self.chips[0].set_line(CASCADE, false);
            }
            self.cascade();
            return 0x80 | input;
        }
        match (port & 1, chip.read_in_service) {
            (0, false) => chip.requested,
            (0, true) => chip.in_service,
            _ => chip.masked,
        }
    }

    /// Writes port 0x20, 0x21, 0xA0, 0xA1 or the ELCR, 0x4D0 and 0x4D1.
    pub fn write(&mut self, port: u16, value: u8) {
        if port & 0xfffe == 0x4d0 {
            let index = usize::from(port & 1);
            self.chips[index].level_triggered = value & ELCR_WRITABLE[index];
        } else {
            let chip = &mut self.chips[usize::from(port & 0x80 != 0)];
            if port & 1 == 0 {
                chip.write_command(value);
            } else {
                chip.write_data(value);
            }
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let level = self.chips[1].request().is_some();
        self.chips[0].set_line(CASCADE, level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// init_8259A() of Linux, without auto-EOI.
    fn linux() -> Pic {
        let mut pic = Pic::default();
        for (port, value) in [
            (0x21, 0xff),
            (0xa1, 0xff),
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0xfb),
            (0xa1, 0xff),
        ] {
            pic.write(port, value);
        }
        pic
    }

    #[test]
    fn linux_probe() {
        let mut pic = Pic::default();
        pic.write(0xa1, 0xff);
        pic.write(0x21, 0xfb);
        assert_eq!(pic.read(0x21), 0xfb);
    }

    #[test]
    fn edge_interrupt_and_specific_eoi() {
        let mut pic = linux();
        pic.set_line(0, true);
        pic.set_line(0, false);
        assert!(!pic.output());
        pic.write(0x21, 0xfa);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x30);
        assert!(!pic.output());
        // The next edge waits for the end of the first.
        pic.set_line(0, true);
        assert!(!pic.output());
        pic.write(0x20, 0x60);
        assert_eq!(pic.acknowledge(), 0x30);
    }

    #[test]
    fn second_controller() {
        let mut pic = linux();
        pic.write(0xa1, 0x00);
        pic.set_line(8, true);
        pic.set_line(12, true);
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.output());
        pic.write(0xa0, 0x60);
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), 0x38 + 4);
        pic.write(0xa0, 0x0b);
        assert_eq!(pic.read(0xa0), 1 << 4);
    }

    #[test]
    fn priorities_and_rotation() {
        let mut pic = linux();
        pic.write(0x21, 0x00);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_line(5, true);
        assert!(!pic.output());
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(0x20, 0xa0); // non-specific, rotate: 1 becomes the lowest
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x20);
        pic.set_line(0, true);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn spurious() {
        let mut pic = linux();
        pic.write(0x21, 0x00);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0);
        // A level-triggered line that goes away between the request and the acknowledge.
        pic.write(0x4d1, 0x02);
        pic.write(0xa1, 0x00);
        pic.set_line(9, true);
        pic.chips[1].set_line(1, false);
        assert_eq!(pic.acknowledge(), 0x3f);
    }

    #[test]
    fn level_triggered_asks_until_withdrawn() {
        let mut pic = linux();
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8);
        pic.write(0x21, 0x00);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x65);
        assert!(pic.output());
        pic.set_line(5, false);
        assert!(!pic.output());
    }

    #[test]
    fn auto_eoi_poll_and_special_mask() {
        let mut pic = linux();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03), (0x21, 0x00)] {
            pic.write(port, value);
        }
        for _ in 0..2 {
            pic.set_line(6, true);
            assert_eq!(pic.acknowledge(), 0x36);
            pic.set_line(6, false);
        }
        let mut pic = linux();
        pic.write(0x21, 0x00);
        pic.set_line(3, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x83);
        assert_eq!(pic.read(0x21), 0x00);
        pic.set_line(5, true);
        assert!(!pic.output());
        pic.write(0x21, 0x08);
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x35);
    }
}
