//! The console's commands, and the words for them.

use core::fmt;

/// A command, its guests found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// What is typed goes to the guest at this place of the manifest.
    Focus(usize),
    /// The focus goes this far along the guests, and round.
    Move(isize),
    /// All guests on a line each.
    List,
    /// What was counted.
    Stats,
    /// Check every shadow page of every guest.
    Audit,
    /// End a guest; `None`: the one with the focus.
    Stop(Option<usize>),
    /// End a guest, if it runs, and start it again; `None`: the one with the focus.
    Restart(Option<usize>),
    /// End all guests, and the machine.
    Quit,
    /// What can be typed.
    Help,
}

/// What was wrong with a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mistake<'a> {
    /// No command is on this key.
    Key(u8),
    /// There is no such command.
    Command(&'a str),
    /// There is no such guest.
    Guest(&'a str),
    /// The command needs a guest's name.
    GuestWanted(&'static str),
    /// There is a word too many.
    Word(&'a str),
}

impl fmt::Display for Mistake<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(byte) => write!(f, "no command is on the key {}", KeyName(*byte)),
            Self::Command(word) => write!(f, "there is no command `{word}`: try `help`"),
            Self::Guest(word) => write!(f, "there is no guest `{word}`"),
            Self::GuestWanted(command) => write!(f, "`{command}` wants the name or number of a guest"),
            Self::Word(word) => write!(f, "`{word}` is one word too many"),
        }
    }
}

/// A key as a person calls it: `Ctrl-a`, `x`.
pub struct KeyName(pub u8);

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            b'\r' => f.write_str("Enter"),
            0x1b => f.write_str("Esc"),
            0x20 => f.write_str("Space"),
            byte @ 0x01..=0x1a => write!(f, "Ctrl-{}", char::from(byte | 0x60)),
            byte @ 0x00..=0x1f => write!(f, "Ctrl-{}", char::from(byte | 0x40)),
            byte @ b'!'..=b'~' => write!(f, "`{}`", char::from(byte)),
            byte => write!(f, "{byte:#04x}"),
        }
    }
}

/// The command of a key behind the escape, with `guests` guests.
///
/// # Errors
/// [`Mistake::Key`]; [`Mistake::Guest`] for a digit without a guest.
pub fn of_key(key: u8, guests: usize) -> Result<Command, Mistake<'static>> {
    const DIGITS: &str = "0123456789";
    Ok(match key {
        b'0'..=b'9' => {
            let digit = usize::from(key - b'0');
            // The keys stand in this order: 1 to 9, then 0 for the tenth.
            let place = (digit + 9) % 10;
            if place >= guests {
                return Err(Mistake::Guest(&DIGITS[digit..=digit]));
            }
            Command::Focus(place)
        }
        b'n' | b'N' => Command::Move(1),
        b'p' | b'P' => Command::Move(-1),
        b'l' | b'L' => Command::List,
        b's' | b'S' => Command::Stats,
        b'x' | b'X' => Command::Stop(None),
        b'r' | b'R' => Command::Restart(None),
        b'q' | b'Q' => Command::Quit,
        b'h' | b'H' | b'?' => Command::Help,
        _ => return Err(Mistake::Key(key)),
    })
}

/// Reads a command line. `find` gives the place of the guest with a name; numbers count from 1 to `guests`. An empty
/// line is no command.
///
/// # Errors
/// [`Mistake`], to be shown.
pub fn parse<'a>(
    line: &'a str,
    guests: usize,
    find: &dyn Fn(&str) -> Option<usize>,
) -> Result<Option<Command>, Mistake<'a>> {
    let mut words = line.split_ascii_whitespace();
    let Some(word) = words.next() else { return Ok(None) };
    let mut guest = || {
        let Some(name) = words.next() else { return Ok(None) };
        let number = || name.parse::<usize>().ok()?.checked_sub(1).filter(|&place| place < guests);
        find(name).or_else(number).map(Some).ok_or(Mistake::Guest(name))
    };
    let command = match word {
        "focus" | "f" => Command::Focus(guest()?.ok_or(Mistake::GuestWanted("focus"))?),
        "next" | "n" => Command::Move(1),
        "previous" | "prev" | "p" => Command::Move(-1),
        "list" | "l" | "ls" => Command::List,
        "stats" | "s" => Command::Stats,
        "audit" => Command::Audit,
        "stop" | "x" => Command::Stop(guest()?),
        "restart" | "r" => Command::Restart(guest()?),
        "quit" | "q" | "exit" => Command::Quit,
        "help" | "h" | "?" => Command::Help,
        // A number alone, or a name alone, means its guest.
        name => {
            let number = || name.parse::<usize>().ok()?.checked_sub(1).filter(|&place| place < guests);
            Command::Focus(find(name).or_else(number).ok_or(Mistake::Command(name))?)
        }
    };
    match words.next() {
        Some(word) => Err(Mistake::Word(word)),
        None => Ok(Some(command)),
    }
}

/// The help: for a console whose escape is `escape`.
pub fn help(escape: u8, mut line: impl FnMut(fmt::Arguments<'_>)) {
    let name = KeyName(escape);
    line(format_args!(
        "what you type goes to the guest with the focus; after {name} the next key is a command:"
    ));
    for (key, meaning) in [
        ("1 to 9, 0", "focus on that guest (0: the tenth)"),
        ("n, p", "focus on the next, the previous guest"),
        ("l", "list the guests"),
        ("s", "statistics: exits by reason, shadow pages, memory"),
        ("x", "stop the guest with the focus"),
        ("r", "restart the guest with the focus, also an ended one"),
        ("q", "quit: stop all guests and the machine"),
        (
            ":",
            "type a command: focus, list, stats, audit, stop, restart, quit, help; guests by name or number",
        ),
        ("h, ?", "this help"),
    ] {
        line(format_args!("  {key:10} {meaning}"));
    }
    line(format_args!("  :audit     check every shadow page of every guest"));
    line(format_args!("  {name:10} send {name} itself to the guest", name = Padded(escape)));
}

/// A key's name, padded.
struct Padded(u8);

impl fmt::Display for Padded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = heapless::String::<16>::new();
        fmt::write(&mut name, format_args!("{}", KeyName(self.0)))?;
        f.pad(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(name: &str) -> Option<usize> {
        ["debian-1", "debian-2", "3"].iter().position(|&known| known == name)
    }

    #[test]
    fn guests_by_name_and_by_number() {
        let parse = |line| parse(line, 3, &find);
        assert_eq!(parse(" stop  debian-2 "), Ok(Some(Command::Stop(Some(1)))));
        assert_eq!(parse("restart 1"), Ok(Some(Command::Restart(Some(0)))));
        assert_eq!(parse("stop"), Ok(Some(Command::Stop(None))));
        assert_eq!(parse("2"), Ok(Some(Command::Focus(1))));
        // A name that is a number is a name first.
        assert_eq!(parse("focus 3"), Ok(Some(Command::Focus(2))));
        assert_eq!(parse("audit"), Ok(Some(Command::Audit)));
        assert_eq!(parse(""), Ok(None));
        for (line, mistake) in [
            ("stop debian", Mistake::Guest("debian")),
            ("stop 0", Mistake::Guest("0")),
            ("stop 4", Mistake::Guest("4")),
            ("stop 99999999999999999999", Mistake::Guest("99999999999999999999")),
            ("focus", Mistake::GuestWanted("focus")),
            ("stopp", Mistake::Command("stopp")),
            ("0", Mistake::Command("0")),
            ("list all", Mistake::Word("all")),
            ("stop 1 2", Mistake::Word("2")),
        ] {
            assert_eq!(parse(line), Err(mistake), "{line}");
        }
    }

    #[test]
    fn keys() {
        assert_eq!(of_key(b'1', 2), Ok(Command::Focus(0)));
        assert_eq!(of_key(b'0', 10), Ok(Command::Focus(9)));
        assert_eq!(of_key(b'3', 2), Err(Mistake::Guest("3")));
        assert_eq!(of_key(b'q', 2), Ok(Command::Quit));
        assert_eq!(of_key(b'z', 2).unwrap_err().to_string(), "no command is on the key `z`");
        assert_eq!(of_key(0x1b, 2).unwrap_err().to_string(), "no command is on the key Esc");
        assert_eq!(format!("{} {}", KeyName(1), KeyName(0x1d)), "Ctrl-a Ctrl-]");
    }

    #[test]
    fn every_key_in_the_help_is_a_command() {
        let mut text = String::new();
        help(1, |line| text += &format!("{line}\n"));
        assert!(text.contains("  Ctrl-a     send Ctrl-a itself"), "{text}");
        for key in *b"nplsxrqh?1" {
            assert!(of_key(key, 1).is_ok() && text.contains(char::from(key)));
        }
    }
}
