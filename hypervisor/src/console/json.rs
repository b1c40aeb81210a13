//! JSON, as far as statistics need it: objects, lists, numbers and text, written as they come.

use core::fmt::{self, Write};

/// An object or a list being written; [`Json::end`] ends it.
pub struct Json<'a> {
    out: &'a mut dyn Write,
    first: bool,
    close: char,
    /// Where writing failed, everything after is left out.
    result: fmt::Result,
}

impl<'a> Json<'a> {
    /// Begins an object.
    pub fn object(out: &'a mut dyn Write) -> Self {
        Self::begin(out, '{', '}')
    }

    fn begin(out: &'a mut dyn Write, open: char, close: char) -> Self {
        let result = out.write_char(open);
        Self { out, first: true, close, result }
    }

    fn put(&mut self, write: impl FnOnce(&mut dyn Write) -> fmt::Result) {
        if self.result.is_ok() {
            self.result = write(self.out);
        }
    }

    fn next(&mut self) {
        if !core::mem::take(&mut self.first) {
            self.put(|out| out.write_char(','));
        }
    }

    /// Names the next member of an object.
    fn key(&mut self, key: &str) {
        self.next();
        self.put(|out| text(out, key));
        self.put(|out| out.write_char(':'));
    }

    /// A number.
    pub fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        self.put(|out| write!(out, "{value}"));
    }

    /// A text.
    pub fn text(&mut self, key: &str, value: &str) {
        self.key(key);
        self.put(|out| text(out, value));
    }

    /// A number in a list.
    pub fn item(&mut self, value: u64) {
        self.next();
        self.put(|out| write!(out, "{value}"));
    }

    /// An object in an object.
    pub fn member(&mut self, key: &str) -> Json<'_> {
        self.key(key);
        Json::begin(self.out, '{', '}')
    }

    /// A list in an object.
    pub fn list(&mut self, key: &str) -> Json<'_> {
        self.key(key);
        Json::begin(self.out, '[', ']')
    }

    /// An object in a list.
    pub fn element(&mut self) -> Json<'_> {
        self.next();
        Json::begin(self.out, '{', '}')
    }

    /// The end.
    ///
    /// # Errors
    /// Where the writer failed.
    pub fn end(mut self) -> fmt::Result {
        let close = self.close;
        self.put(|out| out.write_char(close));
        self.result
    }
}

/// A text in quotes (RFC 8259, section 7, "Strings").
fn text(out: &mut dyn Write, text: &str) -> fmt::Result {
    out.write_char('"')?;
    for letter in text.chars() {
        match letter {
            '"' | '\\' => write!(out, "\\{letter}")?,
            '\0'..='\x1f' => write!(out, "\\u{:04x}", u32::from(letter))?,
            _ => out.write_char(letter)?,
        }
    }
    out.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_and_lists_nest() {
        let mut out = String::new();
        let mut json = Json::object(&mut out);
        json.number("a", 1);
        json.text("b", "x\"\\\n");
        let mut list = json.list("c");
        list.item(1);
        list.item(2);
        list.end().unwrap();
        let mut list = json.list("d");
        for _ in 0..2 {
            let mut element = list.element();
            element.number("e", u64::MAX);
            element.end().unwrap();
        }
        list.end().unwrap();
        json.member("f").end().unwrap();
        json.end().unwrap();
        assert_eq!(
            out,
            r#"{"a":1,"b":"x\"\\\u000a","c":[1,2],"d":[{"e":18446744073709551615},{"e":18446744073709551615}],"f":{}}"#
        );
    }
}
