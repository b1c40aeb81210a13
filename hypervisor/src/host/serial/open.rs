//! Whose unfinished line stands at the end of the output: no two writers ever share a line.

/// Somebody who may leave a line unfinished, to go on with it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer(pub u16);

/// The line at the end of the output.
#[derive(Debug, Default)]
pub struct Open {
    writer: Option<Writer>,
    changes: u64,
}

impl Open {
    /// At the start of a line.
    #[must_use]
    pub const fn new() -> Self {
        Self { writer: None, changes: 0 }
    }

    /// Whether the unfinished line is this writer's.
    #[must_use]
    pub fn is_by(&self, writer: Writer) -> bool {
        self.writer == Some(writer)
    }

    /// How often anything was written.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// Ends what another writer left unfinished; the caller then writes whole lines.
    pub fn end(&mut self, out: &mut dyn FnMut(&[u8])) {
        self.changes += 1;
        if self.writer.take().is_some() {
            out(b"\r\n");
        }
    }

    /// Writes a piece of a line. Where the writer's own line is still open, `text` goes on there; else a new one
    /// begins with `head`. `ends`: the line is finished.
    pub fn piece(
        &mut self,
        out: &mut dyn FnMut(&[u8]),
        writer: Writer,
        head: &[&[u8]],
        text: &[u8],
        ends: bool,
    ) {
        if self.is_by(writer) {
            self.changes += 1;
        } else {
            self.end(out);
            head.iter().for_each(|part| out(part));
        }
        out(text);
        self.writer = (!ends).then_some(writer);
        if ends {
            out(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_writers_share_a_line() {
        let mut text = Vec::new();
        let mut open = Open::default();
        let [a, b] = [Writer(1), Writer(2)];
        {
            let mut out = |bytes: &[u8]| text.extend_from_slice(bytes);
            open.piece(&mut out, a, &[b"[a] "], b"one", false);
            open.piece(&mut out, a, &[b"[a] ", b"one"], b" two", false);
            open.piece(&mut out, b, &[b"[b] "], b"x", true);
            open.piece(&mut out, a, &[b"[a] ", b"one two"], b" three", false);
            open.end(&mut out);
            out(b"a line\r\n");
            open.end(&mut out);
        }
        assert_eq!(text, b"[a] one two\r\n[b] x\r\n[a] one two three\r\na line\r\n");
        assert!(!open.is_by(a) && open.changes() == 6);
    }
}
