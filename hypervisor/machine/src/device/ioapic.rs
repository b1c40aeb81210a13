//! The I/O APIC: 24 inputs, version 0x20 (with an EOI register).

use super::message::{Delivery, Destination, Message};

/// Inputs.
pub const PINS: usize = 24;
/// Version 0x20 and the index of the last redirection entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const REGISTER_EOI: u64 = 0x40;

const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_MASKED: u64 = 1 << 16;
/// Vector, mode, polarity, trigger, mask and destination; status and remote IRR are read-only.
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The I/O APIC's state.
#[derive(Debug)]
pub struct IoApic {
    select: u8,
    id: u32,
    lines: u32,
    entries: [u64; PINS],
}

impl IoApic {
    /// The I/O APIC at power-on. `id` is what the firmware's tables call it.
    #[must_use]
    pub fn new(id: u8) -> Self {
        Self { select: 0, id: u32::from(id) << 24, lines: 0, entries: [ENTRY_MASKED; PINS] }
    }

    /// Drives an input, 0..24; its polarity does not matter, `level` means asserted.
    pub fn set_line(&mut self, pin: u8, level: bool) -> Option<Message> {
        let bit = 1u32.checked_shl(u32::from(pin))?;
        let rose = level && self.lines & bit == 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        // An edge at a masked input is forgotten.
        if rose { self.fire(usize::from(pin)) } else { None }
    }

    /// Reads the 32-bit register at `offset` within the page.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            REGISTER_SELECT => u32::from(self.select),
            REGISTER_WINDOW => self.read_window(),
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` within the page; messages that follow go to `send`.
    pub fn write(&mut self, offset: u64, value: u32, send: impl FnMut(Message)) {
        match offset {
            REGISTER_SELECT => self.select = value as u8,
            REGISTER_WINDOW => self.write_window(value, send),
            REGISTER_EOI => self.end(value as u8, send),
            _ => {}
        }
    }

    /// A local APIC has ended the level-triggered interrupt `vector`: inputs still asserted ask again.
    pub fn end(&mut self, vector: u8, mut send: impl FnMut(Message)) {
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry & (ENTRY_LEVEL | ENTRY_REMOTE_IRR) == ENTRY_LEVEL | ENTRY_REMOTE_IRR
                && entry as u8 == vector
            {
                self.entries[pin] &= !ENTRY_REMOTE_IRR;
                if let Some(message) = self.fire_level(pin) {
                    send(message);
                }
            }
        }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => VERSION,
            select => match self.entries.get(usize::from(select.wrapping_sub(0x10) / 2)) {
                Some(entry) if select & 1 == 0 => *entry as u32,
                Some(entry) => (*entry >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&mut self, value: u32, mut send: impl FnMut(Message)) {
        if self.select == 0 {
            self.id = value & 0xff00_0000;
        }
        let pin = usize::from(self.select.wrapping_sub(0x10) / 2);
        let Some(entry) = self.entries.get_mut(pin) else { return };
        let merged = if self.select & 1 == 0 {
            *entry >> 32 << 32 | u64::from(value)
        } else {
            *entry & 0xffff_ffff | u64::from(value) << 32
        };
        let mut new = merged & ENTRY_WRITABLE | *entry & ENTRY_REMOTE_IRR;
        if new & ENTRY_LEVEL == 0 {
            // Guests that know no EOI register clear remote IRR by a detour through edge mode.
            new &= !ENTRY_REMOTE_IRR;
        }
        *entry = new;
        if let Some(message) = self.fire_level(pin) {
            send(message);
        }
    }

    /// Sends a level-triggered input that is asserted and not yet sent.
    fn fire_level(&mut self, pin: usize) -> Option<Message> {
        let asserted = self.lines & 1 << pin != 0 && self.entries[pin] & ENTRY_LEVEL != 0;
        if asserted { self.fire(pin) } else { None }
    }

    fn fire(&mut self, pin: usize) -> Option<Message> {
        let entry = self.entries.get_mut(pin)?;
        if *entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR) != 0 {
            return None;
        }
        let delivery = Delivery::from_mode((*entry >> 8) as u32)?;
        let level = *entry & ENTRY_LEVEL != 0 && matches!(delivery, Delivery::Fixed | Delivery::Lowest);
        if level {
            *entry |= ENTRY_REMOTE_IRR;
        }
        let destination = match ((*entry >> 56) as u32, *entry & ENTRY_LOGICAL != 0) {
            (0xff, false) => Destination::All,
            (id, false) => Destination::Physical(id),
            (id, true) => Destination::Logical(id),
        };
        Some(Message { destination, delivery, vector: *entry as u8, level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_entry(ioapic: &mut IoApic, pin: u8, entry: u64) -> Vec<Message> {
        let mut sent = vec![];
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            ioapic.write(REGISTER_SELECT, u32::from(0x10 + 2 * pin + half), |_| {});
            ioapic.write(REGISTER_WINDOW, value, |message| sent.push(message));
        }
        sent
    }

    fn entry(ioapic: &mut IoApic, pin: u8) -> u32 {
        ioapic.write(REGISTER_SELECT, u32::from(0x10 + 2 * pin), |_| {});
        ioapic.read(REGISTER_WINDOW)
    }

    #[test]
    fn identity() {
        let mut ioapic = IoApic::new(2);
        assert_eq!((ioapic.read(REGISTER_SELECT), ioapic.read(REGISTER_WINDOW)), (0, 2 << 24));
        ioapic.write(REGISTER_SELECT, 1, |_| {});
        assert_eq!(ioapic.read(REGISTER_WINDOW), 0x0017_0020);
        assert_eq!(entry(&mut ioapic, 23), 0x1_0000);
        ioapic.write(REGISTER_SELECT, 0x40, |_| {});
        assert_eq!(ioapic.read(REGISTER_WINDOW), 0);
        assert_eq!(ioapic.set_line(40, true), None);
    }

    #[test]
    fn edge() {
        let mut ioapic = IoApic::new(2);
        assert_eq!(ioapic.set_line(2, true), None);
        assert!(set_entry(&mut ioapic, 2, 3 << 56 | 0x30).is_empty());
        assert_eq!(ioapic.set_line(2, false), None);
        let message = ioapic.set_line(2, true).unwrap();
        assert_eq!((message.destination, message.vector), (Destination::Physical(3), 0x30));
        assert_eq!(ioapic.set_line(2, true), None);
    }

    #[test]
    fn level_asks_again_at_eoi() {
        let mut ioapic = IoApic::new(2);
        set_entry(&mut ioapic, 9, ENTRY_LEVEL | ENTRY_LOGICAL | 1 << 56 | 0x41);
        let message = ioapic.set_line(9, true).unwrap();
        assert!(message.level);
        assert_eq!(message.destination, Destination::Logical(1));
        assert_ne!(entry(&mut ioapic, 9) & ENTRY_REMOTE_IRR as u32, 0);
        let mut sent = 0;
        ioapic.end(0x41, |_| sent += 1);
        assert_eq!(sent, 1);
        assert_eq!(ioapic.set_line(9, false), None);
        ioapic.write(REGISTER_EOI, 0x41, |_| sent += 1);
        assert_eq!(sent, 1);
        assert_eq!(entry(&mut ioapic, 9) & ENTRY_REMOTE_IRR as u32, 0);
    }

    #[test]
    fn level_unmasked_while_asserted() {
        let mut ioapic = IoApic::new(2);
        assert_eq!(ioapic.set_line(9, true), None);
        assert_eq!(set_entry(&mut ioapic, 9, ENTRY_LEVEL | 0x41).len(), 1);
        assert!(set_entry(&mut ioapic, 9, 0x41).is_empty());
        assert_eq!(entry(&mut ioapic, 9) & ENTRY_REMOTE_IRR as u32, 0);
    }
}
