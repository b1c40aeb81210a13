//! Names for the addresses in a backtrace.
//!
//! The booted ELF is stripped. A panic prints `umbra: backtrace: 0xOFFSET` lines, offsets into the image; the
//! function and its place are looked up in the ELF that kept its symbols, and printed beneath.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

const MARK: &str = "umbra: backtrace: ";
/// A longer line is no backtrace, and is not kept.
const LINE_BYTES_MAX: usize = 256;

/// Passes output on, with the names inserted.
pub struct Annotator<W> {
    out: W,
    symbols: PathBuf,
    line: Vec<u8>,
}

impl<W: Write> Annotator<W> {
    /// `symbols`: the unstripped ELF.
    pub fn new(out: W, symbols: PathBuf) -> Self {
        Self { out, symbols, line: Vec::new() }
    }

    /// Passes these bytes on at once; names follow when a line is whole.
    pub fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.out.write_all(piece)?;
            if self.line.len() < LINE_BYTES_MAX {
                self.line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                let offset = offset_in(&String::from_utf8_lossy(&self.line));
                self.line.clear();
                if let Some(offset) = offset {
                    for name in resolve(&self.symbols, offset) {
                        write!(self.out, "    {name}\r\n")?;
                    }
                }
            }
        }
        self.out.flush()
    }
}

/// The offset in a backtrace line, whatever stands before its mark.
fn offset_in(line: &str) -> Option<u64> {
    let word = line.split_once(MARK)?.1.split_whitespace().next()?;
    u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()
}

/// The function at a return address and those inlined there, innermost first, each with its place in the source.
pub fn resolve(symbols: &Path, offset: u64) -> Vec<String> {
    // The call is before the address to which it returns, which may belong to the next line, even function.
    let address = offset.saturating_sub(1);
    let Ok(loader) = addr2line::Loader::new(symbols) else { return Vec::new() };
    let mut names = Vec::new();
    if let Ok(mut frames) = loader.find_frames(address) {
        while let Ok(Some(frame)) = frames.next() {
            let function =
                frame.function.as_ref().and_then(|name| name.demangle().ok().map(|name| name.into_owned()));
            let place =
                frame.location.as_ref().and_then(|place| Some((short(place.file?), place.line.unwrap_or(0))));
            names.push(match (function, place) {
                (Some(function), Some((file, line))) => format!("{function} at {file}:{line}"),
                (Some(function), None) => function,
                (None, Some((file, line))) => format!("{file}:{line}"),
                (None, None) => continue,
            });
        }
    }
    if names.is_empty()
        && let Some(symbol) = loader.find_symbol(address)
    {
        names.push(addr2line::demangle_auto(symbol.into(), None).into_owned());
    }
    names
}

/// The file below the project's folder, or with its last folders only.
fn short(file: &str) -> &str {
    let root = crate::workspace::root().to_string_lossy();
    file.strip_prefix(root.as_ref()).map_or(file, |rest| rest.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_found_behind_the_mark() {
        assert_eq!(offset_in("umbra: backtrace: 0x13e5\r\n"), Some(0x13e5));
        assert_eq!(offset_in("[0.1] umbra: backtrace: 000013e5 main\n"), Some(0x13e5));
        assert_eq!(offset_in("umbra: backtrace: none\n"), None);
        assert_eq!(offset_in("umbra: exit 0\n"), None);
    }

    #[test]
    fn names_follow_the_line_that_holds_the_address() {
        // This test's own binary has symbols; an address in it is known from the ELF, not from the process.
        let own = std::env::current_exe().unwrap();
        let mut out = Vec::new();
        let mut annotator = Annotator::new(&mut out, own);
        annotator.feed(b"one\numbra: back").unwrap();
        annotator.feed(b"trace: 0x0\r\ntwo\n").unwrap();
        assert!(String::from_utf8(out).unwrap().starts_with("one\numbra: backtrace: 0x0\r\n"));
    }

    #[test]
    fn long_lines_are_passed_on_whole() {
        let mut out = Vec::new();
        let mut annotator = Annotator::new(&mut out, PathBuf::new());
        annotator.feed(&[b'x'; 10_000]).unwrap();
        annotator.feed(b"\n").unwrap();
        assert!(annotator.line.is_empty());
        assert_eq!(out.len(), 10_001);
    }
}
