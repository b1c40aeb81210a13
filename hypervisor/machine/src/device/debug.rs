//! The opt-in ports of test guests: an exit code, the word "Shutdown", marks around a benchmark.

/// Written byte by byte to [`SHUTDOWN_PORT`] it ends the machine.
const SHUTDOWN: &[u8] = b"Shutdown";

/// A byte written here is the guest's exit code.
pub const EXIT_PORT: u16 = 0xf4;
/// A byte written here is printed; it reads as itself.
pub const CONSOLE_PORT: u16 = 0xe9;
/// 0 written here begins a benchmark operation, 1 ends it.
pub const BENCH_PORT: u16 = 0xe8;
/// Takes the word "Shutdown".
pub const SHUTDOWN_PORT: u16 = 0x8900;

/// A mark set by a benchmark guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchMark {
    /// An operation begins (0 was written).
    Begin,
    /// An operation has ended (1 was written).
    End,
}

impl BenchMark {
    /// The mark that `value` stands for.
    #[must_use]
    pub fn from_byte(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Begin),
            1 => Some(Self::End),
            _ => None,
        }
    }
}

/// Waits for the word "Shutdown".
#[derive(Debug, Default)]
pub struct ShutdownWord {
    matched: usize,
}

/// What a byte written to the shutdown port has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownProgress {
    /// More is to come.
    Partial,
    /// The word is complete.
    Complete,
}

impl ShutdownWord {
    /// Takes the next byte.
    pub fn write(&mut self, value: u8) -> ShutdownProgress {
        if SHUTDOWN[self.matched] != value {
            // Only its first letter may begin the word anew.
            self.matched = usize::from(value == SHUTDOWN[0]);
            return ShutdownProgress::Partial;
        }
        self.matched += 1;
        if self.matched < SHUTDOWN.len() {
            return ShutdownProgress::Partial;
        }
        self.matched = 0;
        ShutdownProgress::Complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shutdown_word() {
        let mut word = ShutdownWord::default();
        let progress: Vec<_> = b"ShSShutdown".iter().map(|&byte| word.write(byte)).collect();
        assert_eq!(progress[10], ShutdownProgress::Complete);
        assert!(progress[..10].iter().all(|&step| step == ShutdownProgress::Partial));
    }
}
