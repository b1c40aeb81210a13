//! The payload: which guests to run, and the bytes of their kernels and files, as one packed blob.
//!
//! `xtask` reads a person's TOML, checks it and calls [`pack`]; the hypervisor gets the blob as the
//! bootloader's ramdisk and calls [`unpack`]. Nothing in the blob is believed: [`unpack`] checks every
//! length and every rule again ([`Manifest::check`]), borrows the files in place, and never panics.
//!
//! ```text
//! 0       header (64 bytes, little-endian): magic, version, checksum, lengths     see `format`
//! 64      the Manifest, encoded by postcard
//! data    the files' bytes, each at a multiple of 4 KiB from here; identical files are stored once
//! ```

mod format;
mod rules;
mod types;

pub use format::{FileArea, PackError, Package, UnpackError, VERSION, pack, unpack};
pub use rules::{
    MAX_CMDLINE_BYTES, MAX_CORES, MAX_GUESTS, MAX_MEMORY_BYTES, MAX_MODULES, MAX_NAME_BYTES, MAX_VCPUS,
    MEMORY_UNIT_BYTES, MIN_MEMORY_BYTES, Rule, Subject, Violation, check_cmdline, check_escape, check_memory,
    check_name, check_vcpus,
};
pub use types::{
    DEFAULT_ESCAPE, DeviceSet, End, Expect, FileRef, GuestConfig, HypervisorConfig, Manifest, ModuleRef,
    OnEnd,
};
