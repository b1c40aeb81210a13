//! The ways a guest asks its board for a reset: port 0xCF9, port 0x92, and the keyboard controller's pulse
//! command (there is no keyboard controller otherwise: its ports read all-ones).

/// Port 0xCF9: leaving 0 in this bit and then setting it resets.
const CONTROL_RESET: u8 = 1 << 2;
/// Port 0x92: fast reset, on its rising edge.
const SYSTEM_RESET: u8 = 1 << 0;
/// Port 0x92: the A20 gate, always open.
const SYSTEM_A20: u8 = 1 << 1;

/// The reset ports.
#[derive(Debug, Default)]
pub struct ResetPorts {
    control: u8,
    system: u8,
}

impl ResetPorts {
    /// Reads port 0x60, 0x64, 0x92 or 0xCF9.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        match port {
            0x92 => self.system | SYSTEM_A20,
            0xcf9 => self.control,
            _ => 0xff,
        }
    }

    /// Writes port 0x60, 0x64, 0x92 or 0xCF9; says whether that resets the machine.
    pub fn write(&mut self, port: u16, value: u8) -> ResetRequest {
        let reset = match port {
            // Commands 0xF0..=0xFF pulse the output lines whose bits are 0; line 0 is the reset.
            0x64 => value >= 0xf0 && value & 1 == 0,
            0x92 => {
                let before = core::mem::replace(&mut self.system, value & SYSTEM_RESET);
                value & !before & SYSTEM_RESET != 0
            }
            0xcf9 => {
                let before = core::mem::replace(&mut self.control, value & 0x0e);
                value & !before & CONTROL_RESET != 0
            }
            _ => false,
        };
        if reset { ResetRequest::Reset } else { ResetRequest::None }
    }
}

/// What a write to a reset port asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetRequest {
    /// Nothing.
    None,
    /// A reset of the whole machine.
    Reset,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_reboots() {
        let mut ports = ResetPorts::default();
        assert_eq!(ports.write(0x64, 0xfe), ResetRequest::Reset);
        let control = ports.read(0xcf9) & !6;
        assert_eq!(ports.write(0xcf9, control | 2), ResetRequest::None);
        assert_eq!(ports.write(0xcf9, control | 6), ResetRequest::Reset);
        assert_eq!(ports.write(0x92, 0x03), ResetRequest::Reset);
    }

    #[test]
    fn no_keyboard_controller() {
        let mut ports = ResetPorts::default();
        assert_eq!(ports.read(0x64), 0xff);
        assert_eq!(ports.write(0x64, 0xaa), ResetRequest::None);
        assert_eq!(ports.write(0x60, 0xfe), ResetRequest::None);
        assert_eq!(ports.write(0x92, 0x02), ResetRequest::None);
    }
}
