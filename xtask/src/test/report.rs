//! Follows a test program and counts.

use std::{
    fmt,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// One program of tests may take this long.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// What the tests came to.
#[derive(Debug, Default)]
pub struct Totals {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// What failed, by name.
    pub failures: Vec<String>,
    /// All tests there were, by name.
    pub names: Vec<String>,
}

impl Totals {
    /// Counts a failure outside of any test.
    pub fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// Counts what could not be run here.
    pub fn skip(&mut self, tests: u64) {
        self.skipped += tests;
    }

    /// Whether nothing was run.
    pub fn is_empty(&self) -> bool {
        self.passed + self.failed + self.skipped == 0
    }

    /// Takes one line of a test program's output; whether it was its line of totals.
    fn take(&mut self, program: &str, line: &str) -> bool {
        if let Some(test) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(format!("{program}: {test}"));
        }
        let Some(result) = line.strip_prefix("test result: ") else { return false };
        let count = |word: &str| -> u64 {
            let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
            words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
        self.skipped += count("ignored");
        true
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs a test program, shows its output, and adds to the totals.
pub fn follow(command: &mut Command, name: &str, totals: &mut Totals) {
    let mut child = match command.stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return totals.fail(format!("{name}: cannot start: {error}")),
    };
    let Some(stdout) = child.stdout.take() else { return totals.fail(format!("{name}: no output")) };
    let child = Arc::new(Mutex::new(child));
    let ended = kill_when_late(Arc::clone(&child));
    let (mut complete, failures_before) = (false, totals.failures.len());
    for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        complete |= totals.take(name, &line);
    }
    drop(ended);
    let status = child.lock().unwrap_or_else(PoisonError::into_inner).wait();
    let succeeded = status.as_ref().is_ok_and(|status| status.success());
    if !complete || (!succeeded && totals.failures.len() == failures_before) {
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        totals.fail(format!("{name}: ended early ({status})"));
    }
}

/// Kills the program when it takes too long; dropping what is returned ends the watch.
fn kill_when_late(child: Arc<Mutex<Child>>) -> mpsc::Sender<()> {
    let (ended, watch) = mpsc::channel();
    thread::spawn(move || {
        if watch.recv_timeout(PROGRAM_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = child.lock().unwrap_or_else(PoisonError::into_inner).kill();
        }
    });
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_libtest_are_counted() {
        let mut totals = Totals::default();
        assert!(!totals.take("memory", "test a::b ... ok"));
        assert!(!totals.take("memory", "test a::c ... FAILED"));
        assert!(totals.take(
            "memory",
            "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 3 filtered out; finished in 0.10s"
        ));
        totals.fail("x does not build".into());
        assert_eq!(totals.to_string(), "12 passed, 2 failed, 2 skipped");
        assert_eq!(totals.failures, ["memory: a::c", "x does not build"]);
    }

    #[test]
    fn a_program_that_ends_early_has_failed() {
        let mut totals = Totals::default();
        follow(Command::new("sh").args(["-c", "echo 'test a ... ok'; exit 3"]), "sh", &mut totals);
        assert_eq!(totals.to_string(), "0 passed, 1 failed, 0 skipped");
        let mut totals = Totals::default();
        let script = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out'";
        follow(Command::new("sh").args(["-c", script]), "sh", &mut totals);
        assert_eq!(totals.to_string(), "1 passed, 0 failed, 0 skipped");
    }
}
