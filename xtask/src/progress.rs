//! What is being done, for a person who waits: a spinner in a terminal, a line each otherwise.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// A stage takes at least this long to be worth its own line when it is over.
const WORTH_A_LINE: Duration = Duration::from_secs(2);

/// Shows `what` while `work` runs.
pub fn stage<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    if !io::stderr().is_terminal() {
        eprintln!("{what} ...");
        return work();
    }
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(120));
    let result = work();
    spinner.finish_and_clear();
    if started.elapsed() > WORTH_A_LINE {
        eprintln!("{what}: {} s", started.elapsed().as_secs());
    }
    result
}
