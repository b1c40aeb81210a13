//! What one guest prints, put into lines behind its name.
//!
//! In a *live* text (the guest has the focus) everything shows as it comes, prompts included; where another writer
//! came in between, the unfinished line is ended, and shown anew from its start when the guest goes on. In all other
//! texts only whole lines show, and an unfinished one after it has stood still for a while.

use heapless::{String, Vec};

#[cfg(test)]
use crate::host::serial::Open;
use crate::host::serial::Writer;

/// Bytes of an unfinished line that are kept; a longer one is shown in pieces.
pub const LINE_BYTES_MAX: usize = 512;
/// An unfinished line that has stood still for so long is shown also where only whole lines are: a prompt, mostly.
pub const STILL_NS: u64 = 500_000_000;

/// Where text goes.
pub trait Screen {
    /// One line.
    fn line(&mut self, head: &[u8], text: &[u8]);
    /// A piece of a line: see [`crate::host::serial::Open::piece`].
    fn piece(&mut self, writer: Writer, head: &[&[u8]], text: &[u8], ends: bool);
    /// Whether the unfinished line is this writer's.
    fn is_open_by(&self, writer: Writer) -> bool;
}

/// How a guest's text is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As it comes.
    Live,
    /// In whole lines.
    Lines,
}

/// One guest's text.
#[derive(Debug)]
pub struct Text {
    writer: Writer,
    /// `[name] `.
    prefix: String<40>,
    /// The unfinished line so far, as the guest wrote it.
    line: Vec<u8, LINE_BYTES_MAX>,
    /// How much of it was shown already.
    shown: usize,
    /// The last byte was a carriage return: the end of the line, if a line feed follows.
    returned: bool,
    /// When it last grew.
    grown_ns: u64,
}

impl Text {
    /// A guest's text; `writer` is its own.
    #[must_use]
    pub fn new(writer: Writer, name: &str) -> Self {
        let mut prefix = String::new();
        for part in ["[", name, "] "] {
            // A name has 32 bytes at most.
            let _ = prefix.push_str(part);
        }
        Self { writer, prefix, line: Vec::new(), shown: 0, returned: false, grown_ns: 0 }
    }

    /// Takes over what the guest printed.
    pub fn print(&mut self, screen: &mut dyn Screen, mode: Mode, bytes: &[u8], now_ns: u64) {
        self.grown_ns = now_ns;
        let mut rest = bytes;
        while let Some(&first) = rest.first() {
            match first {
                b'\n' => {
                    self.returned = false;
                    self.end_line(screen, mode);
                    rest = &rest[1..];
                }
                b'\r' => {
                    self.returned = true;
                    rest = &rest[1..];
                }
                _ => {
                    if core::mem::take(&mut self.returned) {
                        self.write_over(screen, mode);
                    }
                    let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
                    let (text, after) = rest.split_at(end.unwrap_or(rest.len()));
                    self.add(screen, mode, text);
                    rest = after;
                }
            }
        }
    }

    fn add(&mut self, screen: &mut dyn Screen, mode: Mode, mut text: &[u8]) {
        while !text.is_empty() {
            if self.line.is_full() {
                match mode {
                    // What was shown is too long to be shown again.
                    Mode::Live => self.clear(),
                    Mode::Lines => self.end_line(screen, mode),
                }
            }
            let (part, after) = text.split_at(text.len().min(LINE_BYTES_MAX - self.line.len()));
            if mode == Mode::Live {
                screen.piece(self.writer, &[self.prefix.as_bytes(), &self.line], part, false);
            }
            // There is room.
            let _ = self.line.extend_from_slice(part);
            if mode == Mode::Live {
                self.shown = self.line.len();
            }
            text = after;
        }
    }

    fn clear(&mut self) {
        self.line.clear();
        self.shown = 0;
    }

    /// Everything in the line is on the screen already, though maybe in a line that was ended since.
    fn is_shown(&self) -> bool {
        !self.line.is_empty() && self.shown == self.line.len()
    }

    fn end_line(&mut self, screen: &mut dyn Screen, mode: Mode) {
        let prefix = self.prefix.as_bytes();
        if screen.is_open_by(self.writer) {
            let new = &self.line[self.shown..];
            screen.piece(self.writer, &[prefix, &self.line[..self.shown]], new, true);
        } else if !self.is_shown() {
            match mode {
                Mode::Live => screen.piece(self.writer, &[prefix], &self.line, true),
                Mode::Lines => screen.line(prefix, &plain(&self.line)),
            }
        }
        self.clear();
    }

    /// The guest went back to the start of the line and writes over it: a progress bar, or a shell's line editor.
    fn write_over(&mut self, screen: &mut dyn Screen, mode: Mode) {
        if self.line.is_empty() {
            return;
        }
        match mode {
            Mode::Live => {
                if screen.is_open_by(self.writer) {
                    screen.piece(self.writer, &[], b"\r", false);
                    screen.piece(self.writer, &[], self.prefix.as_bytes(), false);
                }
                self.clear();
            }
            // A console that ends its lines so would else lose them.
            Mode::Lines => self.end_line(screen, mode),
        }
    }

    /// Shows the unfinished line where it shall stand now: the guest has got the focus, or another writer has come
    /// in between and is quiet again.
    pub fn show(&mut self, screen: &mut dyn Screen) {
        if !self.line.is_empty() && !(screen.is_open_by(self.writer) && self.is_shown()) {
            screen.piece(self.writer, &[self.prefix.as_bytes(), &self.line], b"", false);
            self.shown = self.line.len();
        }
    }

    /// Whether an unfinished line was shown and is no longer at the end of the output.
    #[must_use]
    pub fn is_interrupted(&self, screen: &dyn Screen) -> bool {
        self.shown > 0 && !screen.is_open_by(self.writer)
    }

    /// Shows an unfinished line that has stood still for [`STILL_NS`].
    pub fn settle(&mut self, screen: &mut dyn Screen, now_ns: u64) {
        let still = now_ns.saturating_sub(self.grown_ns) >= STILL_NS;
        if still && !self.line.is_empty() && !self.is_shown() {
            screen.line(self.prefix.as_bytes(), &plain(&self.line));
            self.shown = self.line.len();
        }
    }

    /// The guest has ended: shows what it left unfinished.
    pub fn finish(&mut self, screen: &mut dyn Screen, mode: Mode) {
        if !self.line.is_empty() {
            self.end_line(screen, mode);
        }
        self.returned = false;
    }
}

/// A line as text alone: without terminal commands and control characters, a backspace carried out.
fn plain(line: &[u8]) -> Vec<u8, LINE_BYTES_MAX> {
    const ESCAPE: u8 = 0x1b;
    let mut text = Vec::new();
    let mut bytes = line.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            ESCAPE => match bytes.next() {
                // A control sequence ends with its letter.
                Some(b'[') => drop(bytes.by_ref().find(|byte| (0x40..=0x7e).contains(byte))),
                // A title ends with BEL, or with the string terminator, whose first byte is ESC.
                Some(b']') => drop(bytes.by_ref().find(|&byte| byte == 7 || byte == b'\\')),
                _ => {}
            },
            8 => drop(text.pop()),
            b'\t' | b' '..=b'~' | 0x80.. => drop(text.push(byte)),
            _ => {}
        }
    }
    text
}

/// A screen that remembers, for tests.
#[derive(Default)]
#[cfg(test)]
pub struct Paper {
    /// What was printed.
    pub text: std::vec::Vec<u8>,
    open: Open,
}

#[cfg(test)]
impl Screen for Paper {
    fn line(&mut self, head: &[u8], text: &[u8]) {
        self.open.end(&mut |bytes| self.text.extend_from_slice(bytes));
        for part in [head, text, b"\r\n"] {
            self.text.extend_from_slice(part);
        }
    }

    fn piece(&mut self, writer: Writer, head: &[&[u8]], text: &[u8], ends: bool) {
        self.open.piece(&mut |bytes| self.text.extend_from_slice(bytes), writer, head, text, ends);
    }

    fn is_open_by(&self, writer: Writer) -> bool {
        self.open.is_by(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn two() -> (Paper, Text, Text) {
        (Paper::default(), Text::new(Writer(1), "a"), Text::new(Writer(2), "b"))
    }

    fn said(paper: &Paper) -> std::string::String {
        std::string::String::from_utf8(paper.text.clone()).unwrap().replace('\r', "")
    }

    #[test]
    fn a_prompt_shows_at_once_and_the_answer_behind_it() {
        let (mut paper, mut a, _) = two();
        a.print(&mut paper, Mode::Live, b"hello\r\na:~# ", 0);
        assert_eq!(said(&paper), "[a] hello\n[a] a:~# ");
        a.print(&mut paper, Mode::Live, b"echo 42", 1);
        a.print(&mut paper, Mode::Live, b"\r", 2);
        a.print(&mut paper, Mode::Live, b"\n42\r\n\r\na:~# ", 3);
        assert_eq!(said(&paper), "[a] hello\n[a] a:~# echo 42\n[a] 42\n[a] \n[a] a:~# ");
    }

    #[test]
    fn an_interrupted_line_goes_on_from_its_start() {
        let (mut paper, mut a, mut b) = two();
        a.print(&mut paper, Mode::Live, b"a:~# l", 0);
        b.print(&mut paper, Mode::Lines, b"news", 0);
        assert_eq!(said(&paper), "[a] a:~# l");
        b.print(&mut paper, Mode::Lines, b"!\n", 0);
        assert!(a.is_interrupted(&paper));
        a.print(&mut paper, Mode::Live, b"s\n", 0);
        assert_eq!(said(&paper), "[a] a:~# l\n[b] news!\n[a] a:~# ls\n");
        a.print(&mut paper, Mode::Live, b"$ ", 0);
        b.print(&mut paper, Mode::Lines, b"x\n", 0);
        a.show(&mut paper);
        a.show(&mut paper);
        assert!(said(&paper).ends_with("[a] $ \n[b] x\n[a] $ "));
        assert!(!a.is_interrupted(&paper));
    }

    #[test]
    fn without_the_focus_a_prompt_shows_once_it_stands_still() {
        let (mut paper, _, mut b) = two();
        b.print(&mut paper, Mode::Lines, b"b:~# ", 5);
        b.settle(&mut paper, 6);
        assert_eq!(said(&paper), "");
        b.settle(&mut paper, 5 + STILL_NS);
        b.settle(&mut paper, 6 + STILL_NS);
        assert_eq!(said(&paper), "[b] b:~# \n");
        // It gets the focus: the prompt stands where the keys will appear.
        b.show(&mut paper);
        b.print(&mut paper, Mode::Live, b"id\n", 7);
        assert_eq!(said(&paper), "[b] b:~# \n[b] b:~# id\n");
    }

    #[test]
    fn a_line_that_was_shown_whole_is_not_shown_again_for_its_end() {
        let (mut paper, mut a, mut b) = two();
        b.print(&mut paper, Mode::Lines, b"slow", 0);
        b.settle(&mut paper, STILL_NS);
        b.print(&mut paper, Mode::Lines, b"\r\nnext\n", 0);
        assert_eq!(said(&paper), "[b] slow\n[b] next\n");
        // The focus went away from an open line.
        a.print(&mut paper, Mode::Live, b"$ ", 0);
        a.print(&mut paper, Mode::Lines, b"ls\n", 0);
        assert_eq!(said(&paper), "[b] slow\n[b] next\n[a] $ ls\n");
    }

    #[test]
    fn writing_over_a_line() {
        let (mut paper, mut a, mut b) = two();
        b.print(&mut paper, Mode::Lines, b"10%\r20%\r\r\n", 0);
        assert_eq!(said(&paper), "[b] 10%\n[b] 20%\n");
        a.print(&mut paper, Mode::Live, b"10%\r20%\n", 0);
        assert!(paper.text.ends_with(b"[a] 10%\r[a] 20%\r\n"));
    }

    #[test]
    fn whole_lines_are_text_alone() {
        assert_eq!(plain(b"\x1b[1;31mred\x1b[0m\x1b]0;title\x07 \x07b\x08c\x1b[6n").as_slice(), b"red c");
        assert_eq!(plain("\u{e9}\x1b".as_bytes()).as_slice(), "\u{e9}".as_bytes());
        assert_eq!(plain(b"\x08\x1b[").as_slice(), b"");
    }

    proptest! {
        /// Whatever guests print in whatever pieces: each line on the screen is one guest's, behind its name, and
        /// without the focus nothing is lost.
        #[test]
        fn lines_belong_to_one_guest(pieces in prop::collection::vec((any::<bool>(), "[ab\n]{0,30}"), 0..40), long in 0usize..3) {
            let (mut paper, mut a, mut b) = two();
            for (first, piece) in &pieces {
                let piece = piece.repeat(1 + long * 20);
                let (text, from, to) = if *first { (&mut a, 'b', 'a') } else { (&mut b, 'a', 'b') };
                text.print(&mut paper, if *first { Mode::Live } else { Mode::Lines }, piece.replace(from, &to.to_string()).as_bytes(), 0);
            }
            a.finish(&mut paper, Mode::Live);
            b.finish(&mut paper, Mode::Lines);
            let said = said(&paper);
            for line in said.lines() {
                let own = line.chars().nth(1).unwrap();
                let prefix = std::format!("[{own}] ");
                prop_assert!(line.starts_with(prefix.as_str()));
                prop_assert!(line[4..].chars().all(|letter| letter == own));
            }
            let printed: usize = pieces.iter().filter(|(first, _)| !first).map(|(_, piece)| piece.replace('\n', "").len() * (1 + long * 20)).sum();
            let shown: usize = said.lines().filter_map(|line| line.strip_prefix("[b] ")).map(str::len).sum();
            prop_assert_eq!(printed, shown);
        }
    }
}
