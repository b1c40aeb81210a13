//! What frames and counters cost on the bare machine: crate `memory` as the product has it, by the same loader and with
//! the same profile, but nothing else beside it. It runs in the emulator only, where a tick is an instruction.
//!
//! Each figure is a line `cost NAME TICKS` on COM1: the least of several rounds, less what reading the clock costs;
//! those named `mean` are of many operations, slow paths among them.
#![no_std]
#![no_main]

extern crate alloc;

mod clock;
#[path = "../../native/src/serial.rs"]
mod serial;

use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::fmt::Write;
use core::hint::black_box;

use bootloader_api::{BootInfo, config::BootloaderConfig, entry_point};
use clock::least;
use memory::counters::Writer;
use memory::{Claim, Counters, FrameAllocator, GuestId, Owner, Pfn, Population};
use serial::Serial;

/// For the tables of the allocator and the counters.
const HEAP_BYTES: usize = 4 << 20;
/// The frames that the allocator is given. It never touches what is in them, so none need exist.
const FRAMES: (Pfn, u64) = (Pfn(0x10_0000), 64 << 10);
const CORES_MAX: usize = 8;
/// Shadow pages of each guest.
const PAGES_EACH: usize = 16;
/// Operations of a mean: often around the core's cache.
const MANY: u32 = 1024;

#[repr(align(4096))]
struct Space(UnsafeCell<[u8; HEAP_BYTES]>);

// SAFETY: only `main` reaches it, once, to hand it to the heap.
unsafe impl Sync for Space {}

static SPACE: Space = Space(UnsafeCell::new([0; HEAP_BYTES]));

#[global_allocator]
static HEAP: linked_list_allocator::LockedHeap = linked_list_allocator::LockedHeap::empty();

const CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.kernel_stack_size = 128 * 1024;
    config
};

entry_point!(main, config = &CONFIG);

fn main(_: &'static mut BootInfo) -> ! {
    Serial::set_up();
    // SAFETY: the space is ours, for good, and nothing else refers to it.
    unsafe { HEAP.lock().init(SPACE.0.get().cast(), HEAP_BYTES) };
    frames();
    updates();
    for guests in [1, 10, 100, 1000] {
        query(format_args!("query_guests_{guests}"), guests, CORES_MAX);
    }
    for cores in [1, 2, 4, 8] {
        query(format_args!("query_cores_{cores}"), 100, cores);
    }
    let _ = writeln!(Serial, "umbra: exit 0");
    serial::end()
}

fn cost(name: core::fmt::Arguments<'_>, ticks: f64) {
    let _ = writeln!(Serial, "cost {name} {ticks:.1}");
}

fn guest(number: usize) -> Owner {
    let id = u16::try_from(number).ok().and_then(GuestId::new);
    Owner::Shadow(id.expect("fewer guests than there are numbers"))
}

/// One frame: the fast path, and what it costs together with the batches that go to and from the pool.
fn frames() {
    let frames = FrameAllocator::new(&[FRAMES], CORES_MAX, None);
    let owner = guest(0);
    let mut taken = Vec::with_capacity(MANY as usize);
    let (fast, sum) = least(MANY, || (), |()| frames.alloc(0, owner, Claim::Guest), |pfn| taken.push(pfn));
    cost(format_args!("frame_alloc"), fast as f64);
    cost(format_args!("frame_alloc_mean"), sum as f64 / f64::from(MANY));
    let next = || taken.pop().flatten().expect("most frames are free");
    let freed = |freed: Result<(), _>| freed.expect("the frame is the owner's");
    let (fast, sum) = least(MANY, next, |pfn| frames.free(0, pfn, owner), freed);
    cost(format_args!("frame_free"), fast as f64);
    cost(format_args!("frame_free_mean"), sum as f64 / f64::from(MANY));
}

/// An update of the counters.
fn updates() {
    let counters = Counters::new(CORES_MAX);
    let writer = counters.writer(0).expect("asked for once");
    // In memory, as where a core keeps its writer, and not in a register of this loop.
    let writer = black_box(&writer);
    let (allocated, _) = least(MANY, || (), |()| writer.shadow_page_allocated(), drop);
    cost(format_args!("counter_allocated"), allocated as f64);
    let (freed, _) = least(MANY, || (), |()| writer.shadow_pages_freed(1), drop);
    cost(format_args!("counter_freed"), freed as f64);
}

/// A query, with pages for so many guests from so many cores.
fn query(name: core::fmt::Arguments<'_>, guests: usize, cores: usize) {
    let frames = FrameAllocator::new(&[FRAMES], cores, None);
    let counters = Counters::new(cores);
    let writers: Vec<Writer<'_>> = (0..cores).filter_map(|core| counters.writer(core)).collect();
    let mut live = 0;
    for number in 0..guests {
        for page in 0..PAGES_EACH {
            let core = (number + page) % cores;
            frames.alloc(core, guest(number), Claim::Guest).expect("most frames are free");
            writers[core].shadow_page_allocated();
            live += 1;
        }
    }
    let right = |pages| assert_eq!(pages, Population::Exact(live));
    let (ticks, _) = least(16, || (), |()| counters.shadow_pages(), right);
    cost(name, ticks as f64);
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "umbra: error: costs: {info}");
    let _ = writeln!(Serial, "umbra: exit 1");
    serial::end()
}
