//! What typed keys mean: they go to the guest with the focus, until the escape key makes the next one a command.

use heapless::{Deque, String};

/// Bytes in a command line, at most.
pub const COMMAND_BYTES_MAX: usize = 128;
/// Command lines that are remembered.
const HISTORY: usize = 8;

const CTRL_C: u8 = 0x03;
const CTRL_G: u8 = 0x07;
const CTRL_N: u8 = 0x0e;
const CTRL_P: u8 = 0x10;
const CTRL_U: u8 = 0x15;
const CTRL_W: u8 = 0x17;
const ESC: u8 = 0x1b;
const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7f;

/// A command line.
pub type CommandLine = String<COMMAND_BYTES_MAX>;

/// What a key asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing to be done.
    Nothing,
    /// The byte is for the guest with the focus.
    Type(u8),
    /// The command of this key, behind the escape.
    Key(u8),
    /// A command line is begun: show it.
    Opened,
    /// This was appended to the command line: show it.
    Added(u8),
    /// The last byte of the command line is gone.
    Erased,
    /// The command line is another one: show it anew.
    Changed,
    /// The command line is finished; it is [`Keys::line`] until the next key.
    Entered,
    /// The command line is given up.
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Keys are the guest's.
    Typing,
    /// The next key is a command.
    Escaped,
    /// A command line is being written.
    Editing,
    /// In it, ESC was typed: an arrow key, or a wish to leave.
    EditingEscape,
    /// ... and `[`.
    EditingSequence,
}

/// The keyboard's state.
#[derive(Debug)]
pub struct Keys {
    escape: u8,
    state: State,
    line: CommandLine,
    history: Deque<CommandLine, HISTORY>,
    /// How far back in the history; 0: the new line.
    back: usize,
}

impl Keys {
    /// A keyboard whose escape is this control character.
    #[must_use]
    pub const fn new(escape: u8) -> Self {
        Self { escape, state: State::Typing, line: String::new(), history: Deque::new(), back: 0 }
    }

    /// The escape.
    #[must_use]
    pub const fn escape(&self) -> u8 {
        self.escape
    }

    /// The command line, finished or not.
    #[must_use]
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Whether a command line is being written.
    #[must_use]
    pub fn is_editing(&self) -> bool {
        matches!(self.state, State::Editing | State::EditingEscape | State::EditingSequence)
    }

    /// A byte was typed.
    pub fn feed(&mut self, byte: u8) -> Request {
        match self.state {
            State::Typing if byte == self.escape => {
                self.state = State::Escaped;
                Request::Nothing
            }
            State::Typing => Request::Type(byte),
            State::Escaped => self.escaped(byte),
            State::Editing => self.edit(byte),
            State::EditingEscape if byte == b'[' => {
                self.state = State::EditingSequence;
                Request::Nothing
            }
            State::EditingEscape => {
                self.state = State::Typing;
                Request::Cancelled
            }
            State::EditingSequence => {
                // Parameters go before the letter.
                if !(0x40..=0x7e).contains(&byte) {
                    return Request::Nothing;
                }
                self.state = State::Editing;
                match byte {
                    b'A' => self.recall(1),
                    b'B' => self.recall(-1),
                    _ => Request::Nothing,
                }
            }
        }
    }

    fn escaped(&mut self, byte: u8) -> Request {
        self.state = State::Typing;
        match byte {
            b':' => {
                self.state = State::Editing;
                self.line.clear();
                self.back = 0;
                Request::Opened
            }
            // The escape twice is the escape itself.
            _ if byte == self.escape => Request::Type(byte),
            // A second thought.
            ESC | b'\r' | b'\n' | b' ' => Request::Nothing,
            _ => Request::Key(byte),
        }
    }

    fn edit(&mut self, byte: u8) -> Request {
        match byte {
            b'\r' | b'\n' => {
                self.state = State::Typing;
                self.remember();
                Request::Entered
            }
            CTRL_C | CTRL_G => {
                self.state = State::Typing;
                Request::Cancelled
            }
            ESC => {
                self.state = State::EditingEscape;
                Request::Nothing
            }
            BACKSPACE | DELETE => self.line.pop().map_or(Request::Nothing, |_| Request::Erased),
            CTRL_U => {
                self.line.clear();
                Request::Changed
            }
            CTRL_W => {
                let kept = self.line.trim_end().rfind(' ').map_or(0, |space| space + 1);
                self.line.truncate(kept);
                Request::Changed
            }
            CTRL_P => self.recall(1),
            CTRL_N => self.recall(-1),
            b' '..=b'~' if self.line.push(byte.into()).is_ok() => Request::Added(byte),
            _ => Request::Nothing,
        }
    }

    fn remember(&mut self) {
        if self.line.trim().is_empty() || self.history.back() == Some(&self.line) {
            return;
        }
        if self.history.is_full() {
            self.history.pop_front();
        }
        // There is room.
        let _ = self.history.push_back(self.line.clone());
    }

    fn recall(&mut self, step: isize) -> Request {
        let Some(back) = self.back.checked_add_signed(step).filter(|&back| back <= self.history.len()) else {
            return Request::Nothing;
        };
        self.back = back;
        self.line.clear();
        if let Some(line) = self.history.iter().nth_back(back.wrapping_sub(1)) {
            self.line = line.clone();
        }
        Request::Changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESCAPE: u8 = 1;

    fn feed(keys: &mut Keys, bytes: &[u8]) -> Vec<Request> {
        bytes.iter().map(|&byte| keys.feed(byte)).filter(|request| *request != Request::Nothing).collect()
    }

    #[test]
    fn keys_go_to_the_guest_and_one_behind_the_escape_is_a_command() {
        let mut keys = Keys::new(ESCAPE);
        assert_eq!(feed(&mut keys, b"l\x1b"), [Request::Type(b'l'), Request::Type(ESC)]);
        assert_eq!(feed(&mut keys, b"\x01ll"), [Request::Key(b'l'), Request::Type(b'l')]);
        assert_eq!(feed(&mut keys, b"\x01\x01:"), [Request::Type(ESCAPE), Request::Type(b':')]);
        assert_eq!(feed(&mut keys, b"\x01\rq"), [Request::Type(b'q')]);
        let mut other = Keys::new(0x1d);
        assert_eq!(feed(&mut other, b"\x01\x1d2"), [Request::Type(1), Request::Key(b'2')]);
    }

    #[test]
    fn a_command_line_is_edited() {
        let mut keys = Keys::new(ESCAPE);
        let requests = feed(&mut keys, b"\x01:stop a\x7fbc\r");
        assert_eq!(requests[0], Request::Opened);
        assert!(requests.contains(&Request::Erased) && requests.ends_with(&[Request::Entered]));
        assert_eq!(keys.line(), "stop bc");
        assert!(!keys.is_editing());
        feed(&mut keys, b"\x01:list now\x17x");
        assert_eq!((keys.line(), keys.is_editing()), ("list x", true));
        feed(&mut keys, b"\x15");
        assert_eq!(feed(&mut keys, b"\x7f\x7f"), []);
        assert_eq!(feed(&mut keys, b"\x03q"), [Request::Cancelled, Request::Type(b'q')]);
        assert_eq!(
            feed(&mut keys, b"\x01:q\x1bx"),
            [Request::Opened, Request::Added(b'q'), Request::Cancelled]
        );
    }

    #[test]
    fn a_command_line_is_bounded() {
        let mut keys = Keys::new(ESCAPE);
        feed(&mut keys, b"\x01:");
        feed(&mut keys, &[b'x'; 1000]);
        assert_eq!(keys.line().len(), COMMAND_BYTES_MAX);
    }

    #[test]
    fn command_lines_are_remembered() {
        let mut keys = Keys::new(ESCAPE);
        for number in 0..20 {
            feed(&mut keys, format!("\x01:stop {number}\r").as_bytes());
        }
        feed(&mut keys, b"\x01:\x1b[A");
        assert_eq!(keys.line(), "stop 19");
        feed(&mut keys, b"\x10\x1b[A");
        assert_eq!(keys.line(), "stop 17");
        feed(&mut keys, b"\x1b[B\x0e\x0e\x0e");
        assert_eq!(keys.line(), "");
        for _ in 0..20 {
            feed(&mut keys, b"\x10");
        }
        assert_eq!(keys.line(), "stop 12");
    }
}
