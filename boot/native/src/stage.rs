//! The guest's memory while it is made ready: guest-physical address 0 is at [`STAGE`].

use core::ptr;

use memory::{Gpa, GuestMemory, Unbacked};

/// Where the bootloader maps all physical memory.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Above the bootloader's data, and above where the largest guest ends.
pub const STAGE: u64 = 400 << 20;

/// The memory of a guest that is not running yet.
pub struct Stage {
    memory_bytes: u64,
}

impl Stage {
    /// Empty memory of this size, at most [`STAGE`] bytes.
    pub fn new(memory_bytes: u64) -> Self {
        let bytes = usize::try_from(memory_bytes).expect("64 bits");
        // SAFETY: the caller has seen that this RAM exists, and nothing else uses it.
        unsafe { ptr::write_bytes((DIRECT_MAP + STAGE) as *mut u8, 0, bytes) };
        Self { memory_bytes }
    }

    fn at(&self, gpa: Gpa, bytes: usize) -> Result<*mut u8, Unbacked> {
        let end = gpa.0.checked_add(bytes as u64).ok_or(Unbacked(gpa))?;
        if end > self.memory_bytes {
            return Err(Unbacked(gpa));
        }
        Ok((DIRECT_MAP + STAGE + gpa.0) as *mut u8)
    }

    fn word<T: Copy>(&self, gpa: Gpa) -> Result<T, Unbacked> {
        let from = self.at(gpa, size_of::<T>())?.cast::<T>();
        // SAFETY: `at` has checked the range; there is one processor, and the words are plain integers.
        Ok(unsafe { from.read_unaligned() })
    }

    fn exchange<T: Copy + PartialEq>(&self, gpa: Gpa, old: T, new: T) -> Result<bool, Unbacked> {
        let equal = self.word::<T>(gpa)? == old;
        if equal {
            let to = self.at(gpa, size_of::<T>())?.cast::<T>();
            // SAFETY: as in `word`.
            unsafe { to.write_unaligned(new) };
        }
        Ok(equal)
    }
}

impl GuestMemory for Stage {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        let from = self.at(gpa, buf.len())?;
        // SAFETY: `at` has checked the range, and no slice of ours lies in the stage.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        let to = self.at(gpa, bytes.len())?;
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        self.word(gpa)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        self.word(gpa)
    }
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        self.exchange(gpa, old, new)
    }
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        self.exchange(gpa, old, new)
    }
}
