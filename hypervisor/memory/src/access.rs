//! How the pure crates see memory: small traits that the hypervisor implements over its direct map and the
//! tests over a vector.

use crate::address::{Gpa, PAGE_SIZE, Pfn};

/// The guest physical address is not backed by RAM: a hole, or MMIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unbacked(pub Gpa);

/// A guest's RAM, by guest physical address. Other cores may change it at any time: what is read is an
/// allegation, read once and checked before use. Aligned 4- and 8-byte accesses are single-copy atomic.
pub trait GuestMemory {
    /// Copies `buf.len()` bytes from `gpa`; may cross pages.
    ///
    /// # Errors
    /// [`Unbacked`] with the first byte that is no RAM; `buf` is then unspecified.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked>;

    /// Copies `bytes` to `gpa`; may cross pages. Nothing is written if any byte is unbacked.
    /// This is the raw store: writes that a guest could see as its own must go through the write tracker.
    ///
    /// # Errors
    /// [`Unbacked`] with the first byte that is no RAM.
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked>;

    /// Reads an aligned 4-byte word.
    ///
    /// # Errors
    /// [`Unbacked`] if it is no RAM.
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked>;

    /// Reads an aligned 8-byte word.
    ///
    /// # Errors
    /// [`Unbacked`] if it is no RAM.
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked>;

    /// Reads consecutive aligned 8-byte words that lie in one page.
    ///
    /// # Errors
    /// [`Unbacked`] if they are no RAM, or not all in one page; `words` is then unspecified.
    fn load_words(&self, gpa: Gpa, words: &mut [u64]) -> Result<(), Unbacked> {
        if words.len() as u64 * 8 > PAGE_SIZE - gpa.offset() {
            return Err(Unbacked(gpa));
        }
        for (word, address) in words.iter_mut().zip((gpa.0..).step_by(8)) {
            *word = self.load_u64(Gpa(address))?;
        }
        Ok(())
    }

    /// Replaces an aligned 4-byte word if it still holds `old`: `Ok(true)` if it did. A locked access.
    ///
    /// # Errors
    /// [`Unbacked`] if it is no RAM.
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked>;

    /// Replaces an aligned 8-byte word if it still holds `old`: `Ok(true)` if it did. A locked access.
    ///
    /// # Errors
    /// [`Unbacked`] if it is no RAM.
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked>;
}

/// The frames that the hypervisor uses as tables of 512 eight-byte entries, by frame. The processor reads
/// shadow tables, and sets their A and D bits, at any time, so every access is atomic (Relaxed suffices on
/// x86 for its page walker; the lock of the guest's MMU orders the rest).
pub trait TableMemory {
    /// Reads entry `index` (0..512) of the table in `pfn`.
    fn load(&self, pfn: Pfn, index: usize) -> u64;
    /// Writes entry `index` (0..512) of the table in `pfn`.
    fn store(&self, pfn: Pfn, index: usize, value: u64);
    /// Writes an entry and returns what it held: no A or D bit that the processor sets meanwhile is lost.
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64;
    /// Writes `value` to all 512 entries.
    fn fill(&self, pfn: Pfn, value: u64);
}
