//! Umbra's hardware side: cores, VMX, host tables, scheduler, console, the exit loop.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

use alloc::boxed::Box;
use alloc::sync::Arc;

use bootloader_api::BootInfo;
use machine::manifest::{self, End, HypervisorConfig, OnEnd, Package};
use memory::{Claim, Event, Marks, Owner};
use spin::Once;

pub mod console;
pub mod guest;
pub mod host;
pub mod schedule;
pub mod vcpu;
pub mod vmx;

use guest::{registry, start};
use host::{Host, PerCore, frames, power};
use schedule::Core;
use vcpu::Vcpu;
use vmx::enable;
use vmx::invvpid::Invvpid;
use vmx::vmcs::Region;

/// Takes the machine over from the bootloader: what boot's entry point calls, and all it does.
pub fn start(info: &'static mut BootInfo) -> ! {
    // SAFETY: this is the entry point's one call, with what the bootloader gave it.
    unsafe { host::boot::bring_up(info, run) }
}

struct Payload {
    package: Package<'static>,
    host: &'static Host,
}

static PAYLOAD: Once<Payload> = Once::new();

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
    registry::enter(&package.manifest.guests);
    PAYLOAD.call_once(|| Payload { package, host });
    host::cores::run_on_others(core_main);
    let Some(core) = enter_vmx(host, host::this_core()) else {
        power::exit(1);
    };
    start_guests(&core);
    schedule::run(&core, &ended, &chores)
}

/// What every other core does.
fn core_main(per_core: &'static PerCore) {
    let Some(payload) = PAYLOAD.get() else { return };
    if let Some(core) = enter_vmx(payload.host, per_core) {
        schedule::run(&core, &ended, &|_| false);
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
    })
}

fn start_guests(core: &Core) {
    let Some(payload) = PAYLOAD.get() else { return };
    let count = payload.package.manifest.guests.len();
    for place in 0..count {
        start_guest(core, place);
    }
    set_marks(&payload.package.manifest.hypervisor);
    if registry::with(|lines| lines.iter().all(|line| line.guest.is_none())) {
        finish();
    }
}

/// Starts the guest at `place` of the manifest; says why if it cannot.
fn start_guest(core: &Core, place: usize) {
    let Some(payload) = PAYLOAD.get() else { return };
    let Some(config) = payload.package.manifest.guests.get(place) else { return };
    match start::start(payload.host, core, place, config, &payload.package) {
        Ok((guest, entry)) => {
            log::info!(
                "guest {}: {} MiB, {} kernel, starts at {:#x}",
                config.name,
                config.memory_bytes >> 20,
                config.protocol.name(),
                entry.rip
            );
            registry::with(|lines| {
                lines[place].guest = Some(Arc::clone(&guest));
                lines[place].ended = None;
            });
            let target = schedule::choose_core(&config.cores, payload.host.cores);
            let host = payload.host;
            schedule::place(target, Box::new(move |_| Vcpu::new(host, guest, 0, &entry)));
        }
        Err(error) => {
            log::error!("guest {} is not started: {error}", config.name);
            registry::with(|lines| lines[place].ended = Some(End::Crash));
        }
    }
}

/// The marks of the frame allocator: the manifest's, or those that make a shadow budget.
fn set_marks(config: &HypervisorConfig) {
    let allocator = frames::allocator();
    let default = allocator.marks();
    let marks = if let Some(budget) = config.shadow_frames {
        // All but the budget counts as kept: claims fail, and reclaim starts, as if the machine were so small.
        let min = allocator.free_frames().saturating_sub(budget.into()).max(default.min_frames());
        let step = u64::from(budget / 16).clamp(8, 256);
        Marks::new(min, min + step, min + 2 * step)
    } else {
        let pick = |own: Option<u32>, default| own.map_or(default, u64::from);
        Marks::new(
            pick(config.min_frames, default.min_frames()),
            pick(config.low_frames, default.low_frames()),
            pick(config.high_frames, default.high_frames()),
        )
    };
    if let Err(error) = marks.and_then(|marks| allocator.set_marks(marks)) {
        log::warn!("the manifest's marks are not used: {error}");
    }
}

/// A guest has ended: takes everything back, and restarts it or not.
fn ended(core: &Core, vcpu: Box<Vcpu>, end: End) {
    core.writer.count(Event::GuestEnded);
    let (place, name, exits, ticks) = {
        let guest = vcpu.guest();
        {
            let mut devices = guest.devices.lock();
            console::drain(guest, &mut devices);
        }
        (guest.id.index(), guest.config.name.clone(), vcpu.exits(), host::time::tsc() - guest.start_tsc())
    };
    let guest = registry::with(|lines| lines[place].guest.take());
    vcpu.dispose(core);
    if let Some(guest) = guest {
        let leaked = start::dispose(&guest, core);
        if leaked != 0 {
            log::error!("guest {name}: {leaked} frames did not come back");
        }
    }
    log::info!("guest {name} ended: {} ({exits} exits, {ticks} ticks)", Reason(end));
    let restart = registry::with(|lines| {
        let line = &mut lines[place];
        line.ended = Some(end);
        match line.config.on_end {
            OnEnd::Restart { max } if line.restarts < max && end != End::Stopped => {
                line.restarts += 1;
                true
            }
            _ => false,
        }
    });
    if restart {
        start_guest(core, place);
    } else if registry::with(|lines| lines.iter().all(|line| line.guest.is_none())) {
        finish();
    }
}

/// All guests have ended.
fn finish() -> ! {
    let failed = registry::with(|lines| {
        lines
            .iter()
            .filter(|line| line.ended.is_none_or(|end| !line.config.expect.is_met_by(end)))
            .map(|line| line.config.name.clone())
            .collect::<alloc::vec::Vec<_>>()
    });
    for name in &failed {
        log::error!("guest {name} did not end as its manifest expects");
    }
    if failed.is_empty() {
        log::info!("all guests ended as expected");
    }
    power::exit(u8::from(!failed.is_empty()))
}

struct Reason(End);

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            End::PowerOff => f.write_str("power-off"),
            End::Exit(code) => write!(f, "exit {code}"),
            End::Reset => f.write_str("reset"),
            End::Crash => f.write_str("crash"),
            End::Stopped => f.write_str("stopped from the console"),
        }
    }
}

/// What the boot core does between slices. Returns whether there is more to do at once.
fn chores(_core: &Core) -> bool {
    false
}
