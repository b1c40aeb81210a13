//! What a person types, as a library: the tests in qemu-tests build, pack and boot with it.

pub mod emulator;
pub mod hypervisor;
pub mod image;
pub mod kernels;
pub mod manifest;
pub mod packages;
pub mod payload;
pub mod prepare;
pub mod progress;
pub mod symbols;
pub mod terminal;
pub mod workspace;
