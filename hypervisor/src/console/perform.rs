//! Carrying out the console's commands.

use core::fmt;

use super::command::{self, Command, KeyName, Mistake};
use super::{audit, focus, set_focus, show_focused, stats};
use crate::guest::life::{self, Reason};
use crate::guest::registry::{self, Phase};
use crate::host::log::raw;
use crate::schedule::Core;

/// How many guests the manifest has.
pub fn guests() -> usize {
    registry::with(|lines| lines.len())
}

/// The place of the guest with this name.
pub fn find(name: &str) -> Option<usize> {
    registry::with(|lines| lines.iter().position(|line| line.config.name == name))
}

fn name(place: usize) -> heapless::String<32> {
    registry::with(|lines| {
        let name = lines.get(place).map_or("?", |line| line.config.name.as_str());
        heapless::String::try_from(name).unwrap_or_default()
    })
}

/// Carries out a command, or says what was wrong with it. `escape` is the key to be named in hints.
pub fn report(command: Result<Option<Command>, Mistake<'_>>, core: &Core, escape: u8) {
    match command {
        Ok(Some(command)) => perform(command, core, escape),
        Ok(None) => {}
        Err(mistake) => {
            raw(format_args!("umbra: {mistake}; {} h: help", KeyName(escape)));
            if matches!(mistake, Mistake::Guest(_) | Mistake::GuestWanted(_)) {
                raw(format_args!("umbra: the guests: {Names}"));
            }
        }
    }
    show_focused();
}

/// All guests' numbers and names.
struct Names;

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        registry::with(|lines| {
            lines.iter().enumerate().try_for_each(|(place, line)| {
                let comma = if place == 0 { "" } else { ", " };
                write!(f, "{comma}{} {}", place + 1, line.config.name)
            })
        })
    }
}

fn perform(command: Command, core: &Core, escape: u8) {
    match command {
        Command::Focus(place) => focus_on(place, escape),
        Command::Move(step) => {
            let count = guests().max(1) as isize;
            focus_on((focus() as isize + step).rem_euclid(count) as usize, escape);
        }
        Command::List => stats::list(core),
        Command::Stats => stats::print(core),
        Command::Audit => _ = audit::all(core),
        Command::Stop(place) => {
            let place = place.unwrap_or(focus());
            if life::stop(place) {
                raw(format_args!("umbra: {} is being stopped", name(place)));
            } else {
                tell_down(place, escape);
            }
        }
        Command::Restart(place) => {
            let place = place.unwrap_or(focus());
            raw(format_args!("umbra: {} is being restarted", name(place)));
            life::restart(core, place);
        }
        Command::Quit => {
            raw(format_args!("umbra: all guests are being stopped"));
            life::quit();
        }
        Command::Help => command::help(escape, raw),
    }
}

fn focus_on(place: usize, escape: u8) {
    let count = guests();
    raw(format_args!("umbra: keys go to {} (guest {} of {count})", name(place), place + 1));
    if registry::running(place).is_none() {
        tell_down(place, escape);
    }
    set_focus(place);
}

/// Says that a guest does not run, and what can be done.
pub fn tell_down(place: usize, escape: u8) {
    let (phase, last) =
        registry::with(|lines| lines.get(place).map_or((Phase::Down, None), |line| (line.phase, line.last)));
    let (name, escape) = (name(place), KeyName(escape));
    match (phase, last) {
        (Phase::Starting, _) => raw(format_args!("umbra: {name} is being started")),
        (Phase::Ending, _) => raw(format_args!("umbra: {name} is ending")),
        (_, Some(last)) => raw(format_args!(
            "umbra: {name} has ended ({}); {escape} r: start it again, {escape} n: the next guest",
            Reason(last.end)
        )),
        _ => {
            raw(format_args!("umbra: {name} does not run; {escape} r: start it, {escape} n: the next guest"))
        }
    }
}
