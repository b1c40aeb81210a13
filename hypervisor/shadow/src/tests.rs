//! The whole MMU on a model machine: RAM in a vector, a processor whose TLBs forget only what is flushed, and
//! guests, some written by hand and some random.

mod architecture;
mod audit;
mod contents;
mod dirty;
mod exhaustion;
mod guest;
mod large;
mod machine;
mod modes;
mod oracle;
mod processor;
mod races;
mod random;
mod reclaim;
mod rights;
mod stale;
mod surroundings;
mod tables;
mod tags;
mod tracker;
