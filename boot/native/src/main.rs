//! Starts the one guest of a payload on the bare machine, in the hypervisor's place and by the same loader:
//! what a benchmark compares with. It runs in the emulator only.
//!
//! The guest's memory is made ready above itself, at [`STAGE`], and moved down to address 0 at the end, over the
//! bootloader, by code that lies above both ([`leap`]). The machine needs twice the guest's memory and a bit.
#![no_std]
#![no_main]

extern crate alloc;

mod leap;
mod serial;
mod stage;

use core::fmt::Write;

use bootloader_api::{
    BootInfo,
    config::{BootloaderConfig, Mapping},
    entry_point,
};
use machine::{
    load::{self, Parts, RamLayout},
    manifest,
};
use serial::Serial;
use stage::{DIRECT_MAP, STAGE, Stage};

/// For the manifest and what loading needs; the files stay where the bootloader has put them.
const HEAP_BYTES: usize = 4 << 20;

#[global_allocator]
static HEAP: linked_list_allocator::LockedHeap = linked_list_allocator::LockedHeap::empty();

const CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.mappings.physical_memory = Some(Mapping::FixedAddress(DIRECT_MAP));
    // The lowest 512 GiB of addresses are the guest's, see `leap`.
    config.mappings.dynamic_range_start = Some(0xffff_9000_0000_0000);
    config.mappings.kernel_base = Mapping::FixedAddress(0xffff_a000_0000_0000);
    config.kernel_stack_size = 128 * 1024;
    config
};

entry_point!(main, config = &CONFIG);

fn main(info: &'static mut BootInfo) -> ! {
    Serial::set_up();
    let ramdisk = info.ramdisk_addr.into_option().expect("no payload");
    let bytes = usize::try_from(info.ramdisk_len).expect("64 bits");
    // SAFETY: the bootloader has mapped its ramdisk here, for good, and nothing else refers to it.
    let blob = unsafe { core::slice::from_raw_parts(ramdisk as *const u8, bytes) };
    let heap = leap::CODE + leap::AREA_BYTES;
    // SAFETY: RAM above the stage and the leaping code, which the bootloader does not reach, mapped by it for good.
    unsafe { HEAP.lock().init((DIRECT_MAP + heap) as *mut u8, HEAP_BYTES) };

    let package = manifest::unpack(blob).expect("the payload is damaged");
    let guest = package.manifest.guests.first().expect("the payload has no guest");
    let memory_bytes = guest.memory_bytes;
    assert!(memory_bytes <= STAGE, "a guest of more than {STAGE} bytes");
    assert!(ramdisk_is_below(info), "the machine has too little memory");
    let file = |reference: &manifest::FileRef| package.file(*reference);
    let parts = Parts {
        kernel: file(&guest.kernel),
        initrd: guest.initrd.as_ref().map(file),
        modules: &[],
        cmdline: &guest.cmdline,
    };
    let stage = Stage::new(memory_bytes);
    let entry = load::load(guest.protocol, &parts, &RamLayout::split(memory_bytes), 1, &stage)
        .unwrap_or_else(|error| panic!("{error}"));
    // The number follows when the memory is in place: moving it is not the guest's time.
    let _ = write!(Serial, "umbra: guest {} entered at tick 0x", guest.name);
    leap::into(&entry, memory_bytes)
}

/// Whether the machine's memory reaches above all that is used here.
fn ramdisk_is_below(info: &BootInfo) -> bool {
    let top = leap::CODE + leap::AREA_BYTES + HEAP_BYTES as u64;
    info.memory_regions.iter().any(|region| region.start <= STAGE && region.end >= top)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "umbra: error: native: {info}");
    let _ = writeln!(Serial, "umbra: exit 1");
    serial::end()
}
