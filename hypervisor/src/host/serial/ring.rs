//! A ring of bytes of fixed size.

/// Bytes in the order in which they came; `N` at most, a power of two.
#[derive(Debug)]
pub struct Ring<const N: usize> {
    bytes: [u8; N],
    /// Bytes ever taken out.
    start: usize,
    /// Bytes ever put in.
    end: usize,
}

impl<const N: usize> Default for Ring<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Ring<N> {
    /// An empty ring.
    #[must_use]
    pub const fn new() -> Self {
        assert!(N.is_power_of_two());
        Self { bytes: [0; N], start: 0, end: 0 }
    }

    /// Bytes inside, at most `N`.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end.wrapping_sub(self.start)
    }

    /// Whether nothing is inside.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes that still fit.
    #[must_use]
    pub const fn room(&self) -> usize {
        N - self.len()
    }

    /// Puts in as many of `bytes` as fit, and returns how many those are.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        let at = self.end % N;
        let first = taken.min(N - at);
        self.bytes[at..at + first].copy_from_slice(&bytes[..first]);
        self.bytes[..taken - first].copy_from_slice(&bytes[first..taken]);
        self.end = self.end.wrapping_add(taken);
        taken
    }

    /// The oldest bytes that lie in one piece; empty only if the ring is.
    #[must_use]
    pub fn front(&self) -> &[u8] {
        let at = self.start % N;
        &self.bytes[at..(at + self.len()).min(N)]
    }

    /// Takes the oldest `count` bytes out (all, if there are fewer).
    pub fn consume(&mut self, count: usize) {
        self.start = self.start.wrapping_add(count.min(self.len()));
    }

    /// Moves the oldest bytes to `target` and returns how many.
    pub fn pop(&mut self, target: &mut [u8]) -> usize {
        let mut done = 0;
        while done < target.len() && !self.is_empty() {
            let front = self.front();
            let count = front.len().min(target.len() - done);
            target[done..done + count].copy_from_slice(&front[..count]);
            self.consume(count);
            done += count;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_round_the_end_and_takes_no_more_than_fits() {
        let mut ring = Ring::<8>::new();
        let mut next_in = 0u8;
        let mut next_out = 0u8;
        for step in 0..200usize {
            let piece: Vec<u8> = (0..step % 7).map(|i| next_in.wrapping_add(i as u8)).collect();
            let room = ring.room();
            let taken = ring.push(&piece);
            assert_eq!(taken, piece.len().min(room));
            next_in = next_in.wrapping_add(taken as u8);
            let mut out = [0; 8];
            let count = ring.pop(&mut out[..step % 5]);
            for &byte in &out[..count] {
                assert_eq!(byte, next_out);
                next_out = next_out.wrapping_add(1);
            }
            assert_eq!(ring.is_empty(), next_in == next_out);
            assert_eq!(ring.front().is_empty(), ring.is_empty());
        }
    }
}
