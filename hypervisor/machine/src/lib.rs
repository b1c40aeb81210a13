//! One guest's virtual machine: CPU model, instruction emulation, devices, loaders, manifest.
//!
//! Pure: it sees guest memory through [`memory::GuestMemory`] and time as nanoseconds it is told.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod cpu;
pub mod device;
pub mod emulate;
pub mod load;
pub mod manifest;
