//! The machine we run on: from the bootloader's hand-over to every core on our own tables.
//!
//! [`boot::bring_up`] runs the stages in order; each module below is one of them.

pub mod acpi;
pub mod apic;
pub mod boot;
pub mod cores;
pub mod cpu;
pub mod framebuffer;
pub mod frames;
pub mod heap;
pub mod image;
pub mod interrupts;
pub mod ioapic;
pub mod legacy;
pub mod log;
pub mod machine_check;
pub mod memory_map;
pub mod paging;
pub mod panic;
pub mod port;
pub mod power;
pub mod serial;
pub mod stacks;
pub mod tables;
pub mod time;
pub mod trampoline;

pub use self::panic::panic;
pub use boot::Host;
pub use cores::{PerCore, this_core};
pub use frames::{DirectMap, direct};

/// Where host physical address 0 is mapped, read-write and no-execute. The bootloader maps it there
/// (`Mapping::FixedAddress`), and our own tables do again.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;

/// Where the image is linked to run (`Mapping::FixedAddress` for the kernel base).
pub const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

/// Every stack, with an unmapped hole below it (see [`stacks`]).
pub const STACKS: u64 = 0xffff_d000_0000_0000;

/// Device registers and the framebuffer.
pub const DEVICES: u64 = 0xffff_e000_0000_0000;
