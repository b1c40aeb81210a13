//! Umbra's hardware side: cores, VMX, host tables, scheduler, console, the exit loop.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

use core::cell::Cell;

use bootloader_api::BootInfo;
use machine::manifest;
use memory::{Claim, Owner};

pub mod console;
pub mod guest;
pub mod host;
pub mod schedule;
pub mod vcpu;
pub mod vmx;

use guest::life;
use host::{Host, PerCore, frames, power};
use schedule::Core;
use vmx::enable;
use vmx::invvpid::Invvpid;
use vmx::vmcs::Region;

/// Takes the machine over from the bootloader: what boot's entry point calls, and all it does.
pub fn start(info: &'static mut BootInfo) -> ! {
    // SAFETY: this is the entry point's one call, with what the bootloader gave it.
    unsafe { host::boot::bring_up(info, run) }
}

/// What the boot core does once the machine is up.
fn run(host: &'static Host) -> ! {
    let package = match manifest::unpack(host.payload) {
        Ok(package) => package,
        Err(error) => {
            log::error!("the payload cannot be used: {error}");
            power::exit(1)
        }
    };
    if package.manifest.hypervisor.exit_when_done {
        power::allow_test_exit();
    }
    machine::emulate::init();
    let payload = life::adopt(package, host);
    console::open(&payload.package.manifest);
    host::cores::run_on_others(core_main);
    let Some(core) = enter_vmx(host, host::this_core()) else {
        power::exit(1);
    };
    schedule::announce(core.index, true);
    schedule::await_cores(host.cores);
    vcpu::take_shared(host);
    life::start_all(&core);
    life::finish_if_over();
    schedule::run(&core, &life::left, &|core| {
        console::chores(core);
        false
    })
}

/// What every other core does.
fn core_main(per_core: &'static PerCore) {
    let Some(payload) = life::payload() else { return };
    let core = enter_vmx(payload.host, per_core);
    schedule::announce(per_core.index(), core.is_some());
    if let Some(core) = core {
        schedule::run(&core, &life::left, &|_| false);
    }
}

/// Takes this core into VMX root operation.
fn enter_vmx(host: &'static Host, per_core: &'static PerCore) -> Option<Core> {
    let capabilities = &host.vmx.capabilities;
    let region = frames::allocator().alloc(per_core.index(), Owner::Hypervisor, Claim::Begun)?.address();
    // SAFETY: the frame is ours alone and mapped; a region is 4096 bytes without further demands.
    let page = unsafe { &mut *host::direct(region).cast::<Region>() };
    page.prepare(capabilities.revision);
    // SAFETY: the processor was examined at boot; the region is prepared and ours for ever.
    if let Err(refusal) = unsafe { enable::enable(capabilities, region) } {
        log::error!("core {}: {refusal}", per_core.index());
        return None;
    }
    Some(Core {
        index: per_core.index(),
        per_core,
        writer: schedule::counters().writer(per_core.index())?,
        invvpid: Invvpid::new(capabilities, &host.vmx.controls),
        host,
        last_guest: Cell::new(None),
    })
}
