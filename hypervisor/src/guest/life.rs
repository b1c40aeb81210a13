//! The life of the guests: who starts when, what happens at an end, and when all is over.
//!
//! A guest's [`Phase`] in the registry says who may touch it: whoever moves it on, under the registry's lock, has it
//! to itself until the next move. So a restart from the console, a restart by policy and an end on another core never
//! meet in the middle.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use machine::load::EntryState;
use machine::manifest::{End, OnEnd, Package};
use memory::Event;
use shadow::Stats;
use spin::Once;

use super::Guest;
use super::account;
use super::budget;
use super::registry::{self, Last, Line, Phase};
use super::start;
use crate::console;
use crate::host::{Host, frames, heap, power, time};
use crate::schedule::{self, Core};
use crate::vcpu::Vcpu;

/// What all guests are made from.
pub struct Payload {
    /// The manifest and the files.
    pub package: Package<'static>,
    /// The machine.
    pub host: &'static Host,
}

static PAYLOAD: Once<Payload> = Once::new();

/// All guests shall end, and the machine then.
static QUITTING: AtomicBool = AtomicBool::new(false);
/// Frames free before any guest was built: as many are to be free when all have ended.
static FREE_AT_REST: AtomicU64 = AtomicU64::new(0);
/// The last words are being said.
static FINISHING: AtomicBool = AtomicBool::new(false);

/// Takes the manifest's guests into the registry. Once.
pub fn adopt(package: Package<'static>, host: &'static Host) -> &'static Payload {
    registry::enter(&package.manifest.guests);
    PAYLOAD.call_once(|| Payload { package, host })
}

/// What the guests are made from; `None` before [`adopt`].
pub fn payload() -> Option<&'static Payload> {
    PAYLOAD.get()
}

/// Starts every guest of the manifest. All have their memory before the first one runs, so that the marks, and the
/// run, do not depend on who is first.
pub fn start_all(core: &Core) {
    FREE_AT_REST.store(frames::allocator().free_frames(), Ordering::Relaxed);
    let places = registry::with(|lines| {
        for line in lines.iter_mut() {
            line.phase = Phase::Starting;
        }
        lines.len()
    });
    let built: Vec<_> = (0..places).filter_map(|place| build(core, place)).collect();
    if let Some(payload) = PAYLOAD.get() {
        budget::apply(&payload.package.manifest.hypervisor, built.iter().map(|(guest, _)| &**guest));
    }
    for (guest, entry) in built {
        launch(guest, entry);
    }
}

/// Moves a guest that is down on to its start, which is then the caller's to do.
fn claim(place: usize) -> bool {
    registry::with(|lines| {
        let free = lines.get(place).is_some_and(|line| line.phase == Phase::Down);
        if free {
            lines[place].phase = Phase::Starting;
        }
        free
    })
}

/// Starts the guest at `place`, which the caller has claimed.
fn start(core: &Core, place: usize) {
    if let Some((guest, entry)) = build(core, place) {
        launch(guest, entry);
    }
}

/// Builds the guest at `place`, which the caller has claimed; says why if it cannot be, and ends its turn.
fn build(core: &Core, place: usize) -> Option<(Arc<Guest>, EntryState)> {
    let payload = PAYLOAD.get()?;
    let config = payload.package.manifest.guests.get(place)?;
    let heap_before = heap::usage().0;
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
                let line = &mut lines[place];
                line.guest = Some(Arc::clone(&guest));
                line.phase = Phase::Up;
                line.last = None;
                line.restart_wanted = false;
                line.heap_bytes = heap::usage().0.saturating_sub(heap_before);
            });
            Some((guest, entry))
        }
        Err(error) => {
            log::error!("guest {} is not started: {error}", config.name);
            down(place);
            None
        }
    }
}

/// Lets a built guest run: each of its vCPUs is made on the core that it is to live on.
fn launch(guest: Arc<Guest>, entry: EntryState) {
    let Some(payload) = PAYLOAD.get() else { return };
    // Asked for while it was being made: the console's quit.
    if QUITTING.load(Ordering::SeqCst) {
        guest.end(End::Stopped);
    }
    let host = payload.host;
    for index in 0..guest.vcpus.len() {
        let target = schedule::choose_core(&guest.config.cores, host.cores);
        guest.vcpus[index].place(target);
        let guest = Arc::clone(&guest);
        let make = move |core: &Core| {
            let vcpu = Vcpu::new(host, Arc::clone(&guest), index, &entry);
            if vcpu.is_none() {
                log::error!("guest {}: no frames are left for its vCPU {index}", guest.name());
                guest.end(End::Crash);
                gone(core, guest);
            }
            vcpu
        };
        schedule::place(target, Box::new(make));
    }
}

/// The guest at `place` did not come to run.
fn down(place: usize) {
    registry::with(|lines| {
        lines[place].last = Some(Last { end: End::Crash, exits: 0, ticks: 0 });
        lines[place].phase = Phase::Down;
    });
}

/// A vCPU has left its guest, for this reason or because another one has: its guest ends, and when all vCPUs have
/// left, it is taken down.
pub fn left(core: &Core, vcpu: Box<Vcpu>, end: End) {
    let guest = vcpu.owner();
    guest.end(end);
    vcpu.dispose(core);
    gone(core, guest);
}

/// A vCPU of `guest` is gone. The last one takes everything back, and restarts the guest or not.
fn gone(core: &Core, guest: Arc<Guest>) {
    if !guest.vcpu_gone() {
        return;
    }
    core.writer.count(Event::GuestEnded);
    console::finish(&guest);
    let place = guest.id.index();
    let end = guest.ends().unwrap_or(End::Crash);
    let (exits, ticks) = (guest.exits(), time::tsc().saturating_sub(guest.start_tsc()));
    let mut counted = Stats::default();
    registry::hand_over(|| {
        registry::with(|lines| {
            lines[place].phase = Phase::Ending;
            lines[place].guest = None;
        });
        counted = *guest.mmu.lock().stats();
        account::close(&core.writer, &Stats::default(), &counted);
    });
    // What taking it down counts comes on top.
    if let Some(leak) = start::dispose(&guest, core) {
        log::error!("guest {}: {leak}", guest.name());
    }
    account::close(&core.writer, &counted, guest.mmu.lock().stats());
    log::info!("guest {} ended: {} ({exits} exits, {ticks} ticks)", guest.name(), Reason(end));
    drop(guest);
    let again = registry::with(|lines| {
        let line = &mut lines[place];
        line.last = Some(Last { end, exits, ticks });
        let again = wants_again(line, end);
        line.phase = if again { Phase::Starting } else { Phase::Down };
        again
    });
    if again {
        start(core, place);
    }
    finish_if_over();
}

fn wants_again(line: &mut Line, end: End) -> bool {
    if core::mem::take(&mut line.restart_wanted) {
        return !QUITTING.load(Ordering::SeqCst);
    }
    match line.config.on_end {
        OnEnd::Restart { max } if line.restarts < max && end != End::Stopped => {
            line.restarts += 1;
            !QUITTING.load(Ordering::SeqCst)
        }
        _ => false,
    }
}

/// Asks the guest at `place` to end. Returns whether there was anything to end.
pub fn stop(place: usize) -> bool {
    let guest = registry::with(|lines| {
        let line = lines.get_mut(place)?;
        line.restart_wanted = false;
        line.guest.clone()
    });
    let Some(guest) = guest else { return false };
    guest.end(End::Stopped);
    true
}

/// Ends the guest at `place`, if it runs, and starts it again.
pub fn restart(core: &Core, place: usize) {
    if claim(place) {
        start(core, place);
        return;
    }
    stop(place);
    let down = registry::with(|lines| {
        let Some(line) = lines.get_mut(place) else { return false };
        line.restart_wanted = true;
        line.phase == Phase::Down
    });
    // It came down between the two looks.
    if down && claim(place) {
        start(core, place);
    }
}

/// Ends all guests, and the machine when they have ended.
pub fn quit() {
    QUITTING.store(true, Ordering::SeqCst);
    for place in 0..registry::with(|lines| lines.len()) {
        stop(place);
    }
    finish_if_over();
}

/// Ends the machine if no guest is left.
pub fn finish_if_over() {
    let over = registry::with(|lines| lines.iter().all(|line| line.phase == Phase::Down));
    if over && !FINISHING.swap(true, Ordering::SeqCst) {
        finish();
    }
}

/// All guests have ended.
fn finish() -> ! {
    let failed = registry::with(|lines| {
        let met = |line: &Line| line.last.is_some_and(|last| line.config.expect.is_met_by(last.end));
        let failed = lines.iter().filter(|line| !met(line));
        failed.map(|line| (line.config.name.clone(), line.last)).collect::<Vec<_>>()
    });
    for (name, last) in &failed {
        if last.is_some_and(|last| last.end == End::Stopped) {
            log::warn!("guest {name} was stopped before it could end as its manifest expects");
        } else {
            log::error!("guest {name} did not end as its manifest expects");
        }
    }
    let (at_rest, free) = (FREE_AT_REST.load(Ordering::Relaxed), frames::allocator().free_frames());
    if free < at_rest {
        log::error!(
            "{} frames did not come back from the guests: a leak of the hypervisor's",
            at_rest - free
        );
    } else if free > at_rest {
        log::error!("{} frames too many came back from the guests: our own error", free - at_rest);
    }
    if failed.is_empty() {
        log::info!("all guests ended as expected");
    }
    power::exit(u8::from(!failed.is_empty() || free != at_rest))
}

/// How a guest ended, in words.
pub struct Reason(pub End);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            End::PowerOff => f.write_str("power-off"),
            End::Exit(code) => write!(f, "exit {code}"),
            End::Reset => f.write_str("reset"),
            End::Halted => f.write_str("halted"),
            End::Crash => f.write_str("crash"),
            End::Stopped => f.write_str("stopped from the console"),
        }
    }
}
