//! The whole MMU on the model machine of [`crate::model`]: guests written by hand, and random ones.

mod audit;
mod bound;
mod cache;
mod contents;
mod cores;
mod defects;
mod dirty;
mod exhaustion;
mod guest;
mod large;
mod modes;
mod pcid;
mod races;
pub mod random;
mod reclaim;
mod rights;
mod stale;
mod tables;
mod tags;
mod tracker;
