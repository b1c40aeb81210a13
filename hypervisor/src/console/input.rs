//! Typed keys on their way: from the port to the guest with the focus, or into a command.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use machine::manifest::Manifest;
use spin::Mutex;

use super::command::{self, KeyName};
use super::keys::{Keys, Request};
use super::perform;
use super::{COMMAND_LINE, LIVE, focus, show_focused};
use crate::guest::registry;
use crate::host::serial::{self, Ring};
use crate::schedule::Core;

/// Typed bytes kept for a guest that takes no more, at most; what comes on top is lost.
const WAITING_BYTES: usize = 4096;
/// Bytes taken from the port at once.
const PIECE_BYTES: usize = 64;
const PROMPT: &[u8] = b"umbra> ";

struct Input {
    keys: Keys,
    /// What each guest has not yet taken.
    waiting: Vec<Ring<WAITING_BYTES>>,
    /// Somebody was told that the guest with the focus does not run.
    told: bool,
}

/// Locked by the boot core's chores, and by a core that ends a guest.
static INPUT: Mutex<Option<Input>> = Mutex::new(None);

/// Opens the keyboard.
pub fn open(manifest: &Manifest) {
    let escape = manifest.hypervisor.escape;
    let waiting = manifest.guests.iter().map(|_| Ring::new()).collect();
    *INPUT.lock() = Some(Input { keys: Keys::new(escape), waiting, told: false });
    if let Some(guest) = manifest.guests.first() {
        log::info!(
            "console: keys go to {}; {} h: help, {} n: the next guest",
            guest.name,
            KeyName(escape),
            KeyName(escape)
        );
    }
}

/// What was typed for a guest that has ended is not for its successor.
pub fn forget(place: usize) {
    if let Some(input) = INPUT.lock().as_mut()
        && let Some(waiting) = input.waiting.get_mut(place)
    {
        waiting.consume(WAITING_BYTES);
    }
}

/// Deals with everything that was typed.
pub fn poll(core: &Core) {
    if serial::has_input() {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let count = serial::take_input(&mut piece);
            for &byte in &piece[..count] {
                key(core, byte);
            }
            if count < piece.len() {
                break;
            }
        }
    }
    deliver();
}

/// One key. The lock is not held while a command runs: that may end a guest, which calls [`forget`].
fn key(core: &Core, byte: u8) {
    let (request, line, escape) = {
        let mut input = INPUT.lock();
        let Some(input) = input.as_mut() else { return };
        let request = input.keys.feed(byte);
        if let Request::Type(byte) = request {
            if let Some(waiting) = input.waiting.get_mut(focus()) {
                waiting.push(&[byte]);
            }
            return;
        }
        input.told = false;
        (
            request,
            heapless::String::<{ super::keys::COMMAND_BYTES_MAX }>::try_from(input.keys.line()),
            input.keys.escape(),
        )
    };
    let line = line.unwrap_or_default();
    match request {
        Request::Nothing | Request::Type(_) => {}
        Request::Key(key) => perform::report(command::of_key(key, perform::guests()).map(Some), core, escape),
        Request::Opened => {
            LIVE.store(false, Ordering::Relaxed);
            serial::write_piece(COMMAND_LINE, &[PROMPT], b"", false);
        }
        Request::Added(byte) => {
            let before = &line.as_bytes()[..line.len().saturating_sub(1)];
            serial::write_piece(COMMAND_LINE, &[PROMPT, before], &[byte], false);
        }
        Request::Erased if serial::is_open_by(COMMAND_LINE) => {
            serial::write_piece(COMMAND_LINE, &[], b"\x08 \x08", false);
        }
        Request::Erased | Request::Changed => show(&line),
        Request::Entered => {
            serial::write_piece(COMMAND_LINE, &[PROMPT, line.as_bytes()], b"", true);
            LIVE.store(true, Ordering::Relaxed);
            perform::report(command::parse(&line, perform::guests(), &perform::find), core, escape);
        }
        Request::Cancelled => {
            serial::write_piece(COMMAND_LINE, &[], b"", true);
            LIVE.store(true, Ordering::Relaxed);
            show_focused();
        }
    }
}

/// Shows the whole command line.
fn show(line: &str) {
    if serial::is_open_by(COMMAND_LINE) {
        for part in [b"\r\x1b[K", PROMPT, line.as_bytes()] {
            serial::write_piece(COMMAND_LINE, &[], part, false);
        }
    } else {
        serial::write_piece(COMMAND_LINE, &[PROMPT, line.as_bytes()], b"", false);
    }
}

/// Shows a command line again that somebody's output came between.
pub fn settle() {
    let input = INPUT.lock();
    if let Some(input) = input.as_ref()
        && input.keys.is_editing()
        && !serial::is_open_by(COMMAND_LINE)
    {
        show(input.keys.line());
    }
}

/// Hands on what was typed, as far as the guests take it.
fn deliver() {
    let mut input = INPUT.lock();
    let Some(input) = input.as_mut() else { return };
    for (place, waiting) in input.waiting.iter_mut().enumerate().filter(|(_, waiting)| !waiting.is_empty()) {
        let Some(guest) = registry::running(place) else {
            waiting.consume(WAITING_BYTES);
            if !core::mem::replace(&mut input.told, true) {
                perform::tell_down(place, input.keys.escape());
            }
            continue;
        };
        let kicks = {
            let mut devices = guest.devices.lock();
            while !waiting.is_empty() {
                let count = devices.push_input(waiting.front());
                waiting.consume(count);
                if count == 0 {
                    break;
                }
            }
            devices.take_kicks()
        };
        guest.kick(kicks);
    }
}
