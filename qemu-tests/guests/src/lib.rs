//! The runtime of the small test guests: entry, console, exit, traps, page tables.
//!
//! A guest is a static ELF64 program at 2 MiB, entered in long mode with interrupts off and the first 4 GiB
//! identity-mapped (the plain ELF64 protocol). [`entry!`](crate::entry!) names its main function, whose
//! result goes to the exit port.
#![no_std]

pub mod console;
pub mod cpu;
pub mod entry;
pub mod legacy;
pub mod paging;
pub mod smp;
pub mod trap;
