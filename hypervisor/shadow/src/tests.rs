//! The whole MMU on a model machine: RAM in a vector, a processor that walks the shadow tables and knows
//! nothing else, and random guests.

mod machine;
mod random;
mod units;
