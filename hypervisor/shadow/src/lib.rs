//! The shadow MMU: page tables for the processor, made from the guest's own.
//!
//! A guest's page tables say where its *physical* pages are, the processor needs to know where they are in the
//! machine, and without EPT it walks one set of tables only. So every guest table gets a **shadow page**: a
//! table of the same shape whose entries (**sptes**) hold host frames. The shadow pages are a cache, filled by
//! page faults and emptied by flushes, by changes of the guest's tables, and by reclaim.
//!
//! | event | reaction |
//! | --- | --- |
//! | #PF exit | [`walk::walk`] the guest's tables; its own fault goes back to it; else [`Mmu::fill`] |
//! | write to a shadowed table | the table becomes writable and its shadow **unsync** (part of the fill) |
//! | INVLPG | [`Mmu::invlpg`]: upper tables are synced, that address's leaf entry is looked at again |
//! | MOV to CR3, mode changes | [`Mmu::load_root`]: root by (gfn, [`Role`]), unsync pages below it are synced |
//! | MOV to CR3 with bit 63 | the same, but what a processor could have cached under the PCID may stay stale |
//! | INVPCID | [`Mmu::flush_address`], [`Mmu::flush_pcid`], [`Mmu::flush`] |
//! | a device or the emulator writes | [`Mmu::before_write`] |
//! | frames run low | [`cache`]: [`Mmu::reclaim`] of the guest that has most |
//! | the guest stops | [`Mmu::zap_all`] |
//!
//! The crate is pure: it sees the guest's memory, its own tables and the other processors through [`Host`].
#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod audit;
pub mod cache;
#[cfg_attr(
    not(any(test, feature = "model")),
    allow(dead_code, reason = "named where nothing is switched on")
)]
pub mod defect;
mod fill;
mod host;
mod leaf;
mod link;
mod mmu;
#[cfg(any(test, feature = "model"))]
#[allow(missing_docs, reason = "for tests; each module says what it is")]
pub mod model;
mod pages;
pub mod paging;
mod reclaim;
mod rmap;
mod role;
mod root;
pub mod spte;
mod sync;
mod trail;
pub mod walk;
mod zap;

#[cfg(all(test, loom))]
mod interleavings;
#[cfg(all(test, not(loom)))]
mod tests;

pub use audit::{Audited, Violation};
pub use fill::Fill;
pub use host::Host;
pub use mmu::{
    Config, FRAMES_PER_OPERATION, Mmu, PAGES_MIN, PAGES_PER_INSTRUCTION, PAGES_PER_OPERATION, Stats,
    fills_max, pages_min,
};
pub use paging::{Mode, Paging, Rights};
pub use reclaim::{Class, Share, next_guest};
pub use role::Role;
pub use root::{Flush, Short, TAGS, VcpuMmu};
pub use walk::{Access, ErrorCode, Kind, PageFault, Walk};
