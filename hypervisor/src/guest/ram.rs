//! A guest's RAM: its blocks of host frames, reached through the direct map.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memory::{Gpa, GuestMemory, PAGE_SIZE, Slots, Unbacked};

use crate::host::direct;

/// A guest's RAM. The guest's processors write it at any time: everything here is atomic or a raw copy, and no
/// reference into it is ever made.
#[derive(Debug)]
pub struct GuestRam {
    /// Where it lies.
    pub slots: Slots,
}

impl GuestRam {
    /// The direct map's pointer to `gpa`; good to the end of its page.
    #[inline]
    fn pointer(&self, gpa: Gpa) -> Result<*mut u8, Unbacked> {
        self.slots.hpa(gpa).map(direct).ok_or(Unbacked(gpa))
    }

    /// Calls `each(pointer, offset, bytes)` for every piece of `length` bytes from `gpa` that lies in one page.
    fn pieces(
        &self,
        gpa: Gpa,
        length: usize,
        mut each: impl FnMut(*mut u8, usize, usize),
    ) -> Result<(), Unbacked> {
        let mut done = 0;
        while done < length {
            let at = Gpa(gpa.0.wrapping_add(done as u64));
            let bytes = (length - done).min((PAGE_SIZE - at.offset()) as usize);
            each(self.pointer(at)?, done, bytes);
            done += bytes;
        }
        Ok(())
    }

    /// The word at `gpa`, which is aligned to its size.
    #[inline]
    fn word_u64(&self, gpa: Gpa) -> Result<&AtomicU64, Unbacked> {
        let pointer = self.pointer(Gpa(gpa.0 & !7))?;
        // SAFETY: aligned, inside one page of this guest's RAM, which is mapped while the guest lives.
        Ok(unsafe { AtomicU64::from_ptr(pointer.cast()) })
    }

    #[inline]
    fn word_u32(&self, gpa: Gpa) -> Result<&AtomicU32, Unbacked> {
        let pointer = self.pointer(Gpa(gpa.0 & !3))?;
        // SAFETY: aligned, inside one page of this guest's RAM, which is mapped while the guest lives.
        Ok(unsafe { AtomicU32::from_ptr(pointer.cast()) })
    }
}

impl GuestMemory for GuestRam {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        // What the processor reads in one piece is read in one: another vCPU may be writing it.
        match buf.len() {
            8 if gpa.0.is_multiple_of(8) => {
                buf.copy_from_slice(&self.word_u64(gpa)?.load(Ordering::Relaxed).to_ne_bytes());
                return Ok(());
            }
            4 if gpa.0.is_multiple_of(4) => {
                buf.copy_from_slice(&self.word_u32(gpa)?.load(Ordering::Relaxed).to_ne_bytes());
                return Ok(());
            }
            _ => {}
        }
        let target = buf.as_mut_ptr();
        self.pieces(gpa, buf.len(), |source, at, bytes| {
            // SAFETY: `at + bytes` is at most `buf.len()`.
            let target = unsafe { target.add(at) };
            // SAFETY: the source is guest RAM, which no Rust object overlaps; the target is ours.
            unsafe { core::ptr::copy_nonoverlapping(source, target, bytes) };
        })
    }

    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        // Another vCPU, its page walker say, never sees half of what the processor writes in one piece.
        if let (Ok(word), true) = (bytes.try_into(), gpa.0.is_multiple_of(8)) {
            self.word_u64(gpa)?.store(u64::from_ne_bytes(word), Ordering::Release);
            return Ok(());
        }
        if let (Ok(word), true) = (bytes.try_into(), gpa.0.is_multiple_of(4)) {
            self.word_u32(gpa)?.store(u32::from_ne_bytes(word), Ordering::Release);
            return Ok(());
        }
        // All or nothing: look first.
        self.pieces(gpa, bytes.len(), |_, _, _| {})?;
        let source = bytes.as_ptr();
        self.pieces(gpa, bytes.len(), |target, at, count| {
            // SAFETY: `at + count` is at most `bytes.len()`.
            let source = unsafe { source.add(at) };
            // SAFETY: the target is guest RAM, which no Rust object overlaps.
            unsafe { core::ptr::copy_nonoverlapping(source, target, count) };
        })
    }

    #[inline]
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        Ok(self.word_u32(gpa)?.load(Ordering::Relaxed))
    }

    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        Ok(self.word_u64(gpa)?.load(Ordering::Relaxed))
    }

    #[inline]
    fn load_words(&self, gpa: Gpa, words: &mut [u64]) -> Result<(), Unbacked> {
        let first = self.word_u64(gpa)?;
        if words.len() as u64 * 8 > PAGE_SIZE - gpa.offset() {
            return Err(Unbacked(gpa));
        }
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: the words end with the page at the latest.
            let source = unsafe { core::ptr::from_ref(first).add(i) };
            // SAFETY: aligned, inside one page of this guest's RAM, which is mapped while the guest lives.
            *word = unsafe { &*source }.load(Ordering::Relaxed);
        }
        Ok(())
    }

    #[inline]
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        Ok(self.word_u32(gpa)?.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }

    #[inline]
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        Ok(self.word_u64(gpa)?.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }
}
