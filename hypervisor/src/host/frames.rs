//! Host frames: the direct map that reaches them, and the allocator that owns them.

use core::sync::atomic::{AtomicU64, Ordering};

use memory::{FrameAllocator, Hpa, Pfn, TableMemory};
use spin::Once;

use super::DIRECT_MAP;
use super::memory_map::Spans;

static ALLOCATOR: Once<FrameAllocator> = Once::new();

/// Hands the frames in `free` to the allocator, for cores `0..cores`. Once.
pub fn hand_over(free: &Spans, cores: usize) -> &'static FrameAllocator {
    ALLOCATOR.call_once(|| {
        let regions: heapless::Vec<(Pfn, u64), { super::memory_map::SPANS_MAX }> =
            free.iter().map(|span| (Hpa(span.start).page(), span.bytes() / memory::PAGE_SIZE)).collect();
        FrameAllocator::new(&regions, cores, None)
    })
}

/// The frame allocator.
///
/// # Panics
/// Before [`hand_over`].
#[inline]
#[must_use]
pub fn allocator() -> &'static FrameAllocator {
    ALLOCATOR.get().expect("the frame allocator is made at boot, before anything asks for frames")
}

/// The address at which `hpa` is mapped, read-write. Only RAM is mapped there: not devices, and not what the
/// firmware keeps.
#[inline]
#[must_use]
pub fn direct(hpa: Hpa) -> *mut u8 {
    (DIRECT_MAP + hpa.0) as *mut u8
}

/// The tables in host frames, through the direct map.
#[derive(Clone, Copy, Debug, Default)]
pub struct DirectMap;

impl DirectMap {
    #[inline]
    fn entry(&self, pfn: Pfn, index: usize) -> &'static AtomicU64 {
        debug_assert!(index < 512);
        let entry = direct(pfn.address()).cast::<u64>();
        // SAFETY: callers name frames that the allocator gave them, which the direct map covers.
        let entry = unsafe { entry.add(index & 511) };
        // SAFETY: aligned, mapped for ever, and reached by every core and the page walker atomically.
        unsafe { AtomicU64::from_ptr(entry) }
    }
}

impl TableMemory for DirectMap {
    #[inline]
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.entry(pfn, index).load(Ordering::Relaxed)
    }

    #[inline]
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.entry(pfn, index).store(value, Ordering::Relaxed);
    }

    #[inline]
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        self.entry(pfn, index).swap(value, Ordering::Relaxed)
    }

    fn fill(&self, pfn: Pfn, value: u64) {
        for index in 0..512 {
            self.store(pfn, index, value);
        }
    }
}
