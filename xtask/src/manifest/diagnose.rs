//! What is wrong with a manifest, shown where it is.

use std::{error, fmt, ops::Range};

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

use super::Source;
use super::document::EXAMPLES;
use super::words;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, in one line.
    pub what: String,
    /// Where: bytes of the manifest's text.
    pub span: Range<usize>,
    /// What stands at that place.
    pub label: String,
    /// Another place that has to do with it, and what stands there.
    pub other: Option<(Range<usize>, String)>,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// A problem at one place.
    pub fn new(
        span: Range<usize>,
        what: impl Into<String>,
        label: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { what: what.into(), span, label: label.into(), other: None, remedy: remedy.into() }
    }

    /// What the TOML parser or serde says, with a remedy.
    pub fn from_toml(error: &toml::de::Error, text: &str) -> Self {
        let span = error.span().unwrap_or(0..0);
        let message = error.message().trim();
        let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
        if message.starts_with("unknown field")
            && let Some((&unknown, known)) = quoted.split_first()
        {
            let remedy = words::suggest(unknown, known.iter().copied());
            return Self::new(span, format!("there is no key `{unknown}`"), "not known here", remedy);
        }
        let key = key_at(text, span.start);
        let example = EXAMPLES.iter().find(|(name, _)| *name == key);
        let remedy = match example {
            Some((_, example)) => format!("write it like this: {example}"),
            None => "a manifest is TOML: https://toml.io/".to_owned(),
        };
        Self::new(span, message.lines().next().unwrap_or("this is not TOML"), "here", remedy)
    }
}

/// The key of the line at `at`.
fn key_at(text: &str, at: usize) -> &str {
    let before = text.get(..at).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text.get(line_start..).unwrap_or_default().lines().next().unwrap_or_default();
    line.split(['=', '.']).next().unwrap_or_default().trim().trim_matches(['[', ']'])
}

/// All that is wrong with a manifest.
#[derive(Clone, Debug)]
pub struct Problems {
    source: Source,
    problems: Vec<Problem>,
}

impl Problems {
    /// Problems of a manifest, in the order of their places.
    pub fn new(source: &Source, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| (problem.span.start, problem.span.end));
        Self { source: source.clone(), problems }
    }

    /// The problems, in the order of their places.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// As text, with or without colours.
    pub fn render(&self, colours: bool) -> String {
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        let path = self.source.path.display().to_string();
        let rendered: Vec<String> = self
            .problems
            .iter()
            .map(|problem| {
                let length = self.source.text.len();
                let inside = |span: &Range<usize>| span.start.min(length)..span.end.min(length);
                let primary = AnnotationKind::Primary.span(inside(&problem.span)).label(&problem.label);
                let other = problem
                    .other
                    .iter()
                    .map(|(span, label)| AnnotationKind::Context.span(inside(span)).label(label));
                let snippet =
                    Snippet::source(&self.source.text).path(&path).annotation(primary).annotations(other);
                let group = Level::ERROR
                    .primary_title(&problem.what)
                    .element(snippet)
                    .element(Level::HELP.message(&problem.remedy));
                renderer.render(&[group])
            })
            .collect();
        rendered.join("\n\n")
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        let noun = if count == 1 { "problem" } else { "problems" };
        writeln!(f, "the manifest {} has {count} {noun}", self.source.path.display())?;
        f.write_str(&self.render(false))
    }
}

impl error::Error for Problems {}
