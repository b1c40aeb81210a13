//! A set of interrupt vectors: IRR, ISR and TMR.

/// 256 bits, one for each vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors([u64; 4]);

impl Vectors {
    /// Adds a vector.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    /// Takes a vector out.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    /// Whether the vector is in the set.
    #[must_use]
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & 1 << (vector & 63) != 0
    }

    /// The highest vector of the set.
    #[must_use]
    pub fn highest(&self) -> Option<u8> {
        (0..4u8).rev().find_map(|index| {
            let word = self.0[usize::from(index)];
            (word != 0).then(|| index * 64 + 63 - word.leading_zeros() as u8)
        })
    }

    /// The 32-bit register `index`, 0..8, of the eight that hold the set.
    #[must_use]
    pub fn register(&self, index: u16) -> u32 {
        (self.0[usize::from(index >> 1 & 3)] >> (32 * (index & 1))) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_of_vectors() {
        let mut set = Vectors::default();
        assert_eq!(set.highest(), None);
        for vector in [0x20, 0x7f, 0xff, 0xec] {
            set.insert(vector);
            assert!(set.contains(vector));
        }
        assert_eq!(set.highest(), Some(0xff));
        set.remove(0xff);
        assert_eq!(set.highest(), Some(0xec));
        assert_eq!(set.register(7), 1 << (0xec - 0xe0));
        assert_eq!(set.register(1), 1);
    }
}
