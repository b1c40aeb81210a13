//! What a person types, as a library: the tests in qemu-tests build, pack and boot with it.

pub mod emulator;
pub mod hypervisor;
pub mod image;
pub mod workspace;
