//! Umbra's hardware side: cores, VMX, host tables, scheduler, console, the exit loop.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

use bootloader_api::BootInfo;

pub mod console;
pub mod guest;
pub mod host;
pub mod vcpu;
pub mod vmx;

/// Takes the machine over from the bootloader: what boot's entry point calls, and all it does.
pub fn start(info: &'static mut BootInfo) -> ! {
    // SAFETY: this is the entry point's one call, with what the bootloader gave it.
    unsafe { host::boot::bring_up(info, run) }
}

/// What the boot core does once the machine is up.
fn run(host: &'static host::Host) -> ! {
    log::info!("payload: {} bytes", host.payload.len());
    host::cores::run_on_others(|core| {
        log::info!("core {} (APIC id {}) has nothing to do", core.index(), core.apic_id())
    });
    host::power::halt()
}
