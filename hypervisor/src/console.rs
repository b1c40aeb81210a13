//! The console on COM1: what the guests print, and what a person types.
//!
//! Every guest has a `text::Text`, which puts its output into lines behind its name; the guest with the focus is
//! shown as it prints, the others line by line. Typed keys go to the guest with the focus, but for commands behind
//! the escape key. Guests' cores only print; the boot core alone reads keys, carries out commands and keeps the port
//! busy, in [`chores`].

mod audit;
mod command;
mod input;
mod json;
mod keys;
mod perform;
mod stats;
mod text;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use machine::device::Devices;
use machine::manifest::Manifest;
use spin::Mutex;

use crate::guest::Guest;
use crate::host::serial::{self, Writer};
use crate::host::{framebuffer, time};
use crate::schedule::Core;
use text::{Mode, Screen, Text};

/// Longest piece of a guest's output that is taken at once, in bytes.
const PIECE_BYTES: usize = 256;
/// How often unfinished lines are looked after.
const SETTLE_NS: u64 = 50_000_000;
/// The writer of the console's own command line. Guests are numbered from 0, far below.
const COMMAND_LINE: Writer = Writer(u16::MAX);

/// One for each guest. Held while bytes are copied, no longer, but where the serial ring is full.
static TEXTS: Mutex<Vec<Text>> = Mutex::new(Vec::new());
/// The place of the guest that keys go to.
static FOCUS: AtomicUsize = AtomicUsize::new(0);
/// Somebody is at the console, and no command line is being written: the guest with the focus shows as it prints.
static LIVE: AtomicBool = AtomicBool::new(false);
/// Somebody is at the console.
static INTERACTIVE: AtomicBool = AtomicBool::new(false);
/// When [`chores`] has something to do that nobody calls it for, in nanoseconds since the start.
static NEXT_CHORE_NS: AtomicU64 = AtomicU64::new(0);

/// COM1, or the screen where there is none.
struct Com1;

impl Screen for Com1 {
    fn line(&mut self, head: &[u8], text: &[u8]) {
        serial::write_line_of(&[head, text]);
        if !serial::is_present() {
            let mut line = heapless::Vec::<u8, { 40 + text::LINE_BYTES_MAX }>::new();
            // There is room: a prefix has 40 bytes at most.
            let _ = line.extend_from_slice(head).and_then(|()| line.extend_from_slice(text));
            framebuffer::write_line(&line);
        }
    }

    fn piece(&mut self, writer: Writer, head: &[&[u8]], text: &[u8], ends: bool) {
        serial::write_piece(writer, head, text, ends);
    }

    fn is_open_by(&self, writer: Writer) -> bool {
        serial::is_open_by(writer)
    }
}

/// Opens the console for the manifest's guests. From here on the log goes on in the background.
pub fn open(manifest: &Manifest) {
    let guests = manifest.guests.iter().enumerate();
    *TEXTS.lock() = guests.map(|(place, guest)| Text::new(Writer(place as u16), &guest.name)).collect();
    serial::go_on_in_background();
    stats::every(manifest.hypervisor.stats_interval_ms);
    audit::every(manifest.hypervisor.audit_interval_ms);
    if manifest.hypervisor.interactive {
        input::open(manifest);
        INTERACTIVE.store(true, Ordering::Relaxed);
        LIVE.store(true, Ordering::Relaxed);
        serial::receive();
    }
}

/// The place of the guest with the focus.
fn focus() -> usize {
    FOCUS.load(Ordering::Relaxed)
}

fn mode(place: usize) -> Mode {
    if LIVE.load(Ordering::Relaxed) && place == focus() { Mode::Live } else { Mode::Lines }
}

/// Prints what the guest's devices hold, each line behind the guest's name.
pub fn drain(guest: &Guest, devices: &mut Devices) {
    let place = guest.id.index();
    let mut texts = TEXTS.lock();
    let Some(text) = texts.get_mut(place) else { return };
    let mut piece = [0; PIECE_BYTES];
    loop {
        let count = devices.take_output(&mut piece);
        text.print(&mut Com1, mode(place), &piece[..count], time::now_ns());
        if count < piece.len() {
            break;
        }
    }
    drop(texts);
    serial::pump();
}

/// The guest has ended: prints its last words, the unfinished ones too.
pub fn finish(guest: &Guest) {
    let place = guest.id.index();
    drain(guest, &mut guest.devices.lock());
    if let Some(text) = TEXTS.lock().get_mut(place) {
        text.finish(&mut Com1, mode(place));
    }
    input::forget(place);
}

/// Tells how many exits a benchmark operation took, and whether the heap was used meanwhile.
pub fn bench(guest: &Guest, exits: u64, allocations: u64) {
    if allocations > 0 {
        log::warn!("guest {}: the heap was used {allocations} times", guest.name());
    }
    log::info!("guest {}: exits={exits}", guest.name());
}

/// Gives the focus to the guest at `place`, whose unfinished line then stands where keys will appear.
fn set_focus(place: usize) {
    FOCUS.store(place, Ordering::Relaxed);
    show_focused();
}

fn show_focused() {
    if LIVE.load(Ordering::Relaxed)
        && let Some(text) = TEXTS.lock().get_mut(focus())
    {
        text.show(&mut Com1);
    }
}

/// Keeps the port busy from between two entries of a guest. Returns whether [`chores`] should run soon. Never waits.
#[inline]
pub fn tend(core: usize) -> bool {
    if core != 0 || !serial::wants_pump() {
        return false;
    }
    serial::pump();
    serial::has_input()
}

/// How long this core may go on without [`tend`] or [`chores`], in nanoseconds.
#[inline]
pub fn patience_ns(core: usize) -> u64 {
    if core == 0 && serial::wants_pump() { serial::PUMP_NS } else { u64::MAX }
}

/// The TSC value by which this core must call [`tend`].
#[inline]
pub fn patience_tsc(core: usize) -> u64 {
    match patience_ns(core) {
        u64::MAX => u64::MAX,
        ns => time::tsc() + time::ns_to_ticks(ns),
    }
}

/// What the boot core does between slices: sends, reads keys, carries out commands, looks after unfinished lines,
/// prints statistics, audits.
pub fn chores(core: &Core) {
    serial::pump();
    if INTERACTIVE.load(Ordering::Relaxed) {
        input::poll(core);
    }
    let now_ns = time::now_ns();
    if now_ns >= NEXT_CHORE_NS.load(Ordering::Relaxed) {
        settle(now_ns);
        let next_ns = stats::tick(now_ns).min(audit::tick(core, now_ns)).min(now_ns + SETTLE_NS);
        NEXT_CHORE_NS.store(next_ns, Ordering::Relaxed);
    }
}

/// Looks after unfinished lines: those that stand still are shown, and one that was interrupted is shown again once
/// the others are quiet.
fn settle(now_ns: u64) {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let changes = serial::changes();
    let quiet = SEEN.swap(changes, Ordering::Relaxed) == changes;
    let mut texts = TEXTS.lock();
    for (place, text) in texts.iter_mut().enumerate() {
        match mode(place) {
            Mode::Lines => text.settle(&mut Com1, now_ns),
            Mode::Live if quiet && text.is_interrupted(&Com1) => text.show(&mut Com1),
            Mode::Live => {}
        }
    }
    drop(texts);
    if quiet && INTERACTIVE.load(Ordering::Relaxed) {
        input::settle();
    }
}
