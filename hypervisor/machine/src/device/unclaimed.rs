//! Ports that no device owns: reads give all-ones, accesses are counted, each port is reported once.

use alloc::boxed::Box;
use alloc::vec;

use heapless::Deque;

/// Words of the bitmap of ports seen.
const WORDS: usize = 1 << 16 >> 6;
/// Reports that wait at most; what comes on top is only counted.
const REPORTS_MAX: usize = 16;

/// The first access to a port nobody owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnclaimedPort {
    /// The port.
    pub port: u16,
    /// What was done to it.
    pub access: PortAccess,
}

/// A port's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortAccess {
    /// IN.
    Read,
    /// OUT.
    Write,
}

/// Counts accesses to ports nobody owns and remembers which were reported.
#[derive(Debug)]
pub struct UnclaimedPorts {
    seen: Box<[u64]>,
    reports: Deque<UnclaimedPort, REPORTS_MAX>,
    count: u64,
}

impl Default for UnclaimedPorts {
    fn default() -> Self {
        Self { seen: vec![0; WORDS].into_boxed_slice(), reports: Deque::new(), count: 0 }
    }
}

impl UnclaimedPorts {
    /// Records an access.
    pub fn record(&mut self, port: u16, access: PortAccess) {
        self.count += 1;
        let word = &mut self.seen[usize::from(port >> 6)];
        let bit = 1 << (port & 63);
        // A port whose report finds no room is reported at a later access.
        if *word & bit == 0 && self.reports.push_back(UnclaimedPort { port, access }).is_ok() {
            *word |= bit;
        }
    }

    /// Takes the oldest report.
    pub fn take(&mut self) -> Option<UnclaimedPort> {
        self.reports.pop_front()
    }

    /// Accesses in all.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_once() {
        let mut ports = UnclaimedPorts::default();
        for _ in 0..3 {
            ports.record(0x2f8, PortAccess::Read);
        }
        assert_eq!(ports.take(), Some(UnclaimedPort { port: 0x2f8, access: PortAccess::Read }));
        assert_eq!(ports.take(), None);
        assert_eq!(ports.count(), 3);
        for port in 0..=u16::MAX {
            ports.record(port, PortAccess::Write);
        }
        assert_eq!(core::iter::from_fn(|| ports.take()).count(), REPORTS_MAX);
    }
}
