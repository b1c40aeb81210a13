//! A 16550A serial port. Its transmitter is always empty: a guest prints as fast as it can write, whatever
//! speed it set; a receiver's FIFO is refilled from a queue, so no input is overrun.

use alloc::collections::VecDeque;

use heapless::Deque;

/// Input bytes kept behind the receiver's FIFO.
pub const BACKLOG_BYTES_MAX: usize = 1024;
/// Bytes in the receiver's FIFO.
const FIFO_BYTES: usize = 16;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR: u8 = 1 << 7;

const MCR_MASK: u8 = 0x1f;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;

const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// DCD, DSR and CTS: a terminal is always there.
const MODEM_CONNECTED: u8 = 0xb0;
const MODEM_RING: u8 = 1 << 6;

/// The port's state. Registers are addressed by their offset 0..8 from the base port.
#[derive(Debug)]
pub struct Uart {
    enabled: u8,
    line_control: u8,
    modem_control: u8,
    modem_changes: u8,
    scratch: u8,
    divisor: u16,
    fifo: bool,
    trigger: usize,
    received: Deque<u8, FIFO_BYTES>,
    backlog: VecDeque<u8>,
    overrun: bool,
    transmitter_interrupt: bool,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            enabled: 0,
            line_control: 0x03,
            modem_control: 0,
            modem_changes: 0,
            scratch: 0,
            divisor: 1,
            fifo: false,
            trigger: 1,
            received: Deque::new(),
            backlog: VecDeque::with_capacity(BACKLOG_BYTES_MAX),
            overrun: false,
            transmitter_interrupt: false,
        }
    }
}

impl Uart {
    /// Offers input; returns how many bytes were accepted (the rest may be offered again later).
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes.len().min(BACKLOG_BYTES_MAX - self.backlog.len());
        self.backlog.extend(&bytes[..accepted]);
        self.refill();
        accepted
    }

    /// Reads the register at `offset` (its low three bits count).
    pub fn read(&mut self, offset: u16) -> u8 {
        match offset & 7 {
            0 if self.divisor_access() => self.divisor as u8,
            0 => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 if self.divisor_access() => (self.divisor >> 8) as u8,
            1 => self.enabled,
            2 => {
                let source = self.interrupt_source();
                if source == IIR_TRANSMITTER {
                    self.transmitter_interrupt = false;
                }
                source | if self.fifo { IIR_FIFO } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let mut status = LSR_TRANSMITTER_EMPTY;
                if !self.received.is_empty() {
                    status |= LSR_READY;
                }
                if core::mem::take(&mut self.overrun) {
                    status |= LSR_OVERRUN;
                }
                status
            }
            6 => self.modem_lines() | core::mem::take(&mut self.modem_changes),
            _ => self.scratch,
        }
    }

    /// Writes the register at `offset` (its low three bits count); returns the byte that was transmitted, if any.
    pub fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match offset & 7 {
            0 if self.divisor_access() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => {
                self.transmitter_interrupt = true;
                if self.modem_control & MCR_LOOPBACK == 0 {
                    return Some(value);
                }
                if self.received.len() < self.depth() {
                    let _ = self.received.push_back(value);
                } else {
                    self.overrun = true;
                }
            }
            1 if self.divisor_access() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            1 => {
                // Enabling the interrupt of an empty transmitter raises it at once (Linux tests for that).
                if value & !self.enabled & IER_TRANSMITTER != 0 {
                    self.transmitter_interrupt = true;
                }
                self.enabled = value & 0x0f;
            }
            2 => self.write_fifo_control(value),
            3 => self.line_control = value,
            4 => {
                let before = self.modem_lines();
                self.modem_control = value & MCR_MASK;
                let after = self.modem_lines();
                let changed = (before ^ after) & !MODEM_RING | before & !after & MODEM_RING;
                self.modem_changes |= changed >> 4;
                self.refill();
            }
            5 | 6 => {}
            _ => self.scratch = value,
        }
        None
    }

    /// The level of the interrupt line. OUT2 gates it, as on every PC's board.
    #[must_use]
    pub fn interrupt_line(&self) -> bool {
        self.modem_control & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2 && self.interrupt_source() != IIR_NONE
    }

    fn divisor_access(&self) -> bool {
        self.line_control & LCR_DIVISOR != 0
    }

    fn depth(&self) -> usize {
        if self.fifo { FIFO_BYTES } else { 1 }
    }

    /// What is still on the line flows into the receiver, as far as it has room.
    fn refill(&mut self) {
        if self.modem_control & MCR_LOOPBACK != 0 {
            return;
        }
        while self.received.len() < self.depth() {
            let Some(byte) = self.backlog.pop_front() else { break };
            let _ = self.received.push_back(byte);
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        let fifo = value & FCR_ENABLE != 0;
        if fifo != self.fifo || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        self.fifo = fifo;
        self.trigger = if fifo { [1, 4, 8, 14][usize::from(value >> 6)] } else { 1 };
        self.refill();
    }

    fn modem_lines(&self) -> u8 {
        let control = self.modem_control;
        if control & MCR_LOOPBACK == 0 {
            return MODEM_CONNECTED;
        }
        // DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
        (control & 0x0c) << 4 | (control & 0x02) << 3 | (control & 0x01) << 5
    }

    fn interrupt_source(&self) -> u8 {
        if self.overrun && self.enabled & IER_LINE != 0 {
            IIR_LINE
        } else if self.enabled & IER_RECEIVED != 0 && !self.received.is_empty() {
            // Fewer bytes than the trigger level count as timed out at once: nobody types faster than that.
            if self.received.len() >= self.trigger { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if self.transmitter_interrupt && self.enabled & IER_TRANSMITTER != 0 {
            IIR_TRANSMITTER
        } else if self.modem_changes != 0 && self.enabled & IER_MODEM != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_autoconfig_finds_a_16550a() {
        let mut uart = Uart::default();
        uart.write(1, 0);
        assert_eq!(uart.read(1) & 0x0f, 0);
        uart.write(1, 0x0f);
        assert_eq!(uart.read(1) & 0x0f, 0x0f);
        uart.write(1, 0);
        // The loopback test of 8250_port.c: LOOP | OUT2 | RTS must show DCD | CTS.
        uart.write(4, MCR_LOOPBACK | 0x0a);
        assert_eq!(uart.read(6) & 0xf0, 0x90);
        uart.write(4, 0);
        uart.write(2, FCR_ENABLE);
        assert_eq!(uart.read(2) >> 6, 3);
        for pattern in [0x5a, 0xa5] {
            uart.write(7, pattern);
            assert_eq!(uart.read(7), pattern);
        }
    }

    #[test]
    fn linux_startup_sees_the_transmitter_interrupt_again() {
        let mut uart = Uart::default();
        uart.write(4, MCR_OUT2);
        for _ in 0..2 {
            uart.write(1, IER_TRANSMITTER);
            assert!(uart.interrupt_line());
            assert_eq!(uart.read(2), IIR_TRANSMITTER);
            assert!(!uart.interrupt_line());
            assert_eq!(uart.read(2), IIR_NONE);
            uart.write(1, 0);
        }
        uart.write(1, IER_TRANSMITTER);
        uart.read(2);
        assert_eq!(uart.write(0, b'x'), Some(b'x'));
        assert!(uart.interrupt_line());
    }

    #[test]
    fn divisor_and_line_status() {
        let mut uart = Uart::default();
        uart.write(3, LCR_DIVISOR | 3);
        uart.write(0, 0x0c);
        uart.write(1, 0x01);
        assert_eq!((uart.read(0), uart.read(1)), (0x0c, 0x01));
        uart.write(3, 3);
        assert_eq!(uart.read(5), LSR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn input_flows_through_the_fifo() {
        let mut uart = Uart::default();
        uart.write(2, FCR_ENABLE | 0x80);
        uart.write(4, MCR_OUT2);
        uart.write(1, IER_RECEIVED);
        assert_eq!(uart.push_input(b"abc"), 3);
        assert!(uart.interrupt_line());
        assert_eq!(uart.read(2) & 0x0f, IIR_TIMEOUT);
        assert_eq!(uart.push_input(b"0123456789"), 10);
        assert_eq!(uart.read(2) & 0x0f, IIR_RECEIVED);
        let text: Vec<u8> =
            core::iter::from_fn(|| (uart.read(5) & LSR_READY != 0).then(|| uart.read(0))).collect();
        assert_eq!(text, b"abc0123456789");
        assert!(!uart.interrupt_line());
        let flood = [b'y'; 5000];
        assert_eq!(uart.push_input(&flood), BACKLOG_BYTES_MAX);
        assert_eq!(uart.push_input(&flood), FIFO_BYTES);
    }

    #[test]
    fn loopback_keeps_bytes_inside() {
        let mut uart = Uart::default();
        uart.write(4, MCR_LOOPBACK | MCR_OUT2);
        assert_eq!(uart.write(0, 0xae), None);
        uart.push_input(b"!");
        assert_eq!(uart.read(0), 0xae);
        assert_eq!(uart.read(5) & LSR_READY, 0);
        uart.write(4, MCR_OUT2);
        assert_eq!(uart.read(0), b'!');
    }
}
