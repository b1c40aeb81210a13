//! A model machine for tests and for the fuzzer: guest RAM, processors, and the architecture to compare with.
//!
//! | part | what it is |
//! | --- | --- |
//! | [`surroundings`] | what the MMU sees: guest RAM, table frames, counters, the other vCPUs |
//! | [`processor`] | the hardware: walks the shadow tables, keeps TLBs and paging-structure caches by tag, forgets only what it is told to |
//! | [`machine`] | one guest on that hardware: the exits, as the hypervisor's exit path handles them |
//! | [`tenants`] | several of them, which share the frames by the real allocator and reclaim |
//! | [`cores`] | the same on as many threads as it has cores |
//! | [`mod@reference`] | a page walk and the access rights, from the SDM's text; shares no code with the crate |
//! | [`architecture`] | which translations the SDM lets a guest's processor still use |
//! | [`contents`] | which values the shadow tables may hold |
//! | [`listing`] | sequences of steps as text, and as bytes |
//! | [`step`] | what a random guest does, one number a step |
//! | [`trial`] | runs steps and compares, after each of them, every translation that the shadow permits |
//!
//! The emulator that boots images cannot stand in for this: it empties its TLB at every VM entry and exit, so a
//! flush that is missing never shows there.

pub mod architecture;
pub mod contents;
pub mod cores;
pub mod listing;
pub mod machine;
pub mod processor;
pub mod reference;
pub mod step;
pub mod surroundings;
pub mod tenants;
pub mod trial;
