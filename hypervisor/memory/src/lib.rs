//! What every other crate needs to speak of memory: addresses, guest memory slots, frames, counters.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod access;
pub mod address;
pub mod counters;
pub mod frames;
mod lock;
pub mod slots;

pub use access::{GuestMemory, TableMemory, Unbacked};
pub use address::{BLOCK_PAGES, BLOCK_SIZE, Gfn, Gpa, Gva, Hpa, PAGE_SHIFT, PAGE_SIZE, Pfn};
pub use counters::{Counters, Event, Population};
pub use frames::{
    Claim, FrameAllocator, FrameState, FreeError, GuestId, Marks, MarksError, Owner, POISON, Pressure,
    WriteAfterFree,
};
pub use slots::{Slots, SlotsError, block_gfns};
