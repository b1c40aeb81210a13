//! What the shadow MMU asks of its surroundings.

use memory::{GuestMemory, Slots, TableMemory};

/// The surroundings of one guest's MMU: its memory, the frames of its tables, its other processors.
pub trait Host {
    /// The guest's RAM.
    type Guest: GuestMemory;
    /// The frames that hold shadow tables.
    type Tables: TableMemory;

    /// The guest's RAM.
    fn guest(&self) -> &Self::Guest;
    /// The frames that hold shadow tables.
    fn tables(&self) -> &Self::Tables;
    /// Where the guest's RAM lies.
    fn slots(&self) -> &Slots;
    /// A shadow page went live: one step of this core's `allocated` counter.
    fn page_allocated(&self);
    /// `pages` shadow pages ceased to be, their frames free: this core's `freed` counter.
    fn pages_freed(&self, pages: u64);
    /// Sptes were removed or narrowed: advances the guest's flush generation and returns the new one. A core
    /// flushes a tag that is older before it enters with it.
    fn advance_generation(&self) -> u64;
    /// The flush generation now.
    fn generation(&self) -> u64;
    /// Returns once no other core runs this guest with translations older than the present generation.
    fn shoot_down(&self);
}
