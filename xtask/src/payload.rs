//! The payload: from a checked plan to the packed blob the hypervisor gets as its ramdisk.

mod assemble;
mod own;

pub use assemble::{Options, Payload, assemble};
pub use own::{OWN_GUESTS, OwnGuest};
