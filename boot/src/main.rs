//! From the bootloader's entry point to [`hypervisor::start`].
#![no_std]
#![no_main]

use bootloader_api::config::{BootloaderConfig, Mapping};
use bootloader_api::{BootInfo, entry_point};

const CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.mappings.physical_memory = Some(Mapping::FixedAddress(hypervisor::host::DIRECT_MAP));
    config.mappings.kernel_base = Mapping::FixedAddress(hypervisor::host::IMAGE_BASE);
    config.kernel_stack_size = 64 * 1024;
    config
};

entry_point!(main, config = &CONFIG);

fn main(info: &'static mut BootInfo) -> ! {
    hypervisor::start(info)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    hypervisor::host::panic(info)
}
