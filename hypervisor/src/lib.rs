//! Umbra's hardware side: cores, VMX, host tables, scheduler, console, the exit loop.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod console;
pub mod guest;
pub mod host;
pub mod vcpu;
pub mod vmx;
