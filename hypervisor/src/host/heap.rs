//! The heap: one contiguous range of the direct map behind a spin lock. Never used on an exit path.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use linked_list_allocator::Heap;
use spin::Mutex;

/// The hypervisor's heap.
pub struct LockedHeap(Mutex<Heap>);

#[cfg_attr(target_os = "none", global_allocator)]
static HEAP: LockedHeap = LockedHeap(Mutex::new(Heap::empty()));

/// How often memory was taken.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: `Heap` hands out disjoint blocks of the range that `init` gave it; the lock makes it one user at a time.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        self.0.lock().allocate_first_fit(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Some(pointer) = NonNull::new(pointer) else { return };
        let mut heap = self.0.lock();
        // SAFETY: the caller got `pointer` from `alloc` with this layout, as GlobalAlloc demands.
        unsafe { heap.deallocate(pointer, layout) }
    }
}

/// Bytes of heap for a machine of `frames` frames of RAM: 4 MiB, and for each frame its own record (2 bytes) and what
/// a guest that owns it keeps of it: 8 bytes, and a share of the descriptors of its shadow pages (about 11).
#[must_use]
pub const fn bytes_for(frames: u64) -> u64 {
    (4 * 1024 * 1024 + 24 * frames).next_multiple_of(memory::PAGE_SIZE)
}

/// Opens the heap.
///
/// # Safety
/// `start..start + bytes` is mapped, writable, and nobody else's, for ever. Called once.
pub unsafe fn init(start: *mut u8, bytes: u64) {
    // SAFETY: as the caller promised.
    unsafe { HEAP.0.lock().init(start, bytes as usize) }
}

/// How often memory was taken since the start: for showing that something takes none.
#[must_use]
pub fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Used and free bytes.
#[must_use]
pub fn usage() -> (usize, usize) {
    let heap = HEAP.0.lock();
    (heap.used(), heap.free())
}
