//! What a guest has printed and the hypervisor has not yet shown.

use alloc::collections::VecDeque;

use super::clock::NEVER;

/// Bytes kept at most; what comes on top is lost and counted.
pub const OUTPUT_BYTES_MAX: usize = 4096;
/// From here on the hypervisor is asked to drain.
const DRAIN_BYTES: usize = OUTPUT_BYTES_MAX / 2;
/// A line without an end (a prompt) is shown after this time, in nanoseconds.
const FLUSH_NS: u64 = 2_000_000;

/// A bounded queue of printed bytes that says when it wants to be drained: at the end of a line, half full, or
/// some time after the first byte.
#[derive(Debug)]
pub struct Output {
    bytes: VecDeque<u8>,
    due: bool,
    flush_ns: u64,
    lost: u64,
}

impl Default for Output {
    fn default() -> Self {
        Self { bytes: VecDeque::with_capacity(OUTPUT_BYTES_MAX), due: false, flush_ns: NEVER, lost: 0 }
    }
}

impl Output {
    /// Adds a byte.
    pub fn push(&mut self, byte: u8, now_ns: u64) {
        if self.bytes.len() == OUTPUT_BYTES_MAX {
            self.lost += 1;
            self.due = true;
            return;
        }
        self.bytes.push_back(byte);
        if byte == b'\n' || self.bytes.len() >= DRAIN_BYTES {
            self.due = true;
            self.flush_ns = NEVER;
        } else if !self.due && self.flush_ns == NEVER {
            self.flush_ns = now_ns.saturating_add(FLUSH_NS);
        }
    }

    /// Moves the oldest bytes to `buf` and returns how many.
    pub fn take(&mut self, buf: &mut [u8]) -> usize {
        let taken = buf.len().min(self.bytes.len());
        for (to, from) in buf.iter_mut().zip(self.bytes.drain(..taken)) {
            *to = from;
        }
        if self.bytes.is_empty() {
            self.due = false;
            self.flush_ns = NEVER;
        }
        taken
    }

    /// There is something that should be shown now.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// When an unfinished line becomes due; [`NEVER`] if there is none.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        self.flush_ns
    }

    /// Makes an unfinished line due when its time has come.
    pub fn advance(&mut self, now_ns: u64) {
        if now_ns >= self.flush_ns {
            self.flush_ns = NEVER;
            self.due = true;
        }
    }

    /// Bytes lost because nobody drained.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_at_end_of_line_and_after_a_while() {
        let mut output = Output::default();
        output.push(b'#', 100);
        assert!(!output.is_due());
        let flush = output.deadline_ns();
        assert_eq!(flush, 100 + FLUSH_NS);
        output.advance(flush);
        assert!(output.is_due());
        let mut buf = [0; 8];
        assert_eq!(output.take(&mut buf), 1);
        assert!(!output.is_due());
        output.push(b'\n', 200);
        assert!(output.is_due());
    }

    #[test]
    fn bounded() {
        let mut output = Output::default();
        for _ in 0..OUTPUT_BYTES_MAX + 5 {
            output.push(b'x', 0);
        }
        assert_eq!(output.lost(), 5);
        let mut buf = [0; OUTPUT_BYTES_MAX];
        assert_eq!(output.take(&mut buf), OUTPUT_BYTES_MAX);
        assert_eq!(output.deadline_ns(), NEVER);
    }
}
