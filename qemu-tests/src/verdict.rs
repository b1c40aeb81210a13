//! What a machine said, and whether that is what was expected.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::emulator::{End, Outcome};

/// How much of the output a failure shows.
const LINES_SHOWN: usize = 40;

/// A finished run, to be asked.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// All there is.
    pub outcome: Outcome,
}

impl Verdict {
    /// Takes over a finished run.
    #[must_use]
    pub fn new(outcome: Outcome) -> Self {
        Self { outcome }
    }

    /// Every guest ended as expected, `umbra: exit 0`, and left all frames behind.
    pub fn success(&self) -> Result<&Self> {
        self.never_says("did not come back")?.exit(0)
    }

    /// The run ended with this verdict.
    pub fn exit(&self, code: u8) -> Result<&Self> {
        let end = self.outcome.end;
        ensure!(end == End::Verdict(code), "the run ended with {end:?}, not {code}; {}", self.tail());
        Ok(self)
    }

    /// This text was printed somewhere.
    pub fn says(&self, text: &str) -> Result<&Self> {
        ensure!(self.outcome.output.contains(text), "nobody said `{text}`; {}", self.tail());
        Ok(self)
    }

    /// This text was not printed.
    pub fn never_says(&self, text: &str) -> Result<&Self> {
        let line = self.outcome.output.lines().find(|line| line.contains(text));
        ensure!(line.is_none(), "somebody said `{}`; {}", line.unwrap_or_default(), self.tail());
        Ok(self)
    }

    /// A guest printed a line that holds this text.
    pub fn guest_says(&self, guest: &str, text: &str) -> Result<&Self> {
        ensure!(self.count(guest, text) > 0, "guest {guest} never said `{text}`; {}", self.tail());
        Ok(self)
    }

    /// A guest printed that many lines that hold this text.
    pub fn guest_says_times(&self, guest: &str, text: &str, times: usize) -> Result<&Self> {
        let count = self.count(guest, text);
        ensure!(count == times, "guest {guest} said `{text}` {count} times, not {times}; {}", self.tail());
        Ok(self)
    }

    /// A guest ended for a reason that begins so.
    pub fn guest_ended(&self, guest: &str, reason: &str) -> Result<&Self> {
        let line = format!("umbra: guest {guest} ended: {reason}");
        let found = self.outcome.output.lines().any(|printed| without_stamp(printed).starts_with(&line));
        ensure!(found, "there is no line `{line}`; {}", self.tail());
        Ok(self)
    }

    /// A guest's lines, without its name.
    pub fn lines_of(&self, guest: &str) -> Vec<&str> {
        let prefix = format!("[{guest}] ");
        self.outcome.output.lines().filter_map(|line| line.strip_prefix(prefix.as_str())).collect()
    }

    /// A counter's sum in all, as the last line of statistics has it; 0 where it is left out. For manifests with
    /// `stats_interval_ms`.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let stats = self.statistics()?.pop();
        let stats = stats.with_context(|| format!("there is no line of statistics; {}", self.tail()))?;
        let counters = stats.get("counters").with_context(|| format!("no counters in: {stats}"))?;
        Ok(counters.get(name).and_then(Value::as_u64).unwrap_or(0))
    }

    /// The most that a guest's shadow MMU had counted under this name in any line of statistics.
    pub fn shadow_count(&self, guest: &str, name: &str) -> Result<u64> {
        let lines = self.statistics()?;
        let guests = lines.iter().filter_map(|stats| stats.get("guests")?.as_array()).flatten();
        let counts = guests
            .filter(|row| row["name"] == guest)
            .filter_map(|row| row.get("shadow")?.get(name)?.as_u64());
        counts.max().with_context(|| format!("guest {guest} never had a count of {name}; {}", self.tail()))
    }

    /// The lines of statistics, which are printed with `stats_interval_ms`.
    pub fn statistics(&self) -> Result<Vec<Value>> {
        let lines = self.outcome.output.lines().filter_map(|line| line.strip_prefix("umbra-stats: "));
        lines.map(|line| serde_json::from_str(line).with_context(|| format!("is not JSON: {line}"))).collect()
    }

    /// Frames that the shadow pages of all guests took when a line of [`Verdict::statistics`] was printed.
    #[must_use]
    pub fn shadow_frames(line: &Value) -> u64 {
        let guests = line["guests"].as_array().into_iter().flatten();
        guests.filter_map(|guest| guest["shadow_frames"].as_u64()).sum()
    }

    /// The ticks from a guest's start to its last end.
    pub fn guest_ticks(&self, guest: &str) -> Result<u64> {
        let begin = format!("umbra: guest {guest} ended: ");
        let mut lines = self.outcome.output.lines().rev().map(without_stamp);
        let line = lines.find(|line| line.starts_with(&begin)).unwrap_or_default();
        let ticks = line.strip_suffix(" ticks)").and_then(|rest| rest.rsplit(' ').next());
        ticks
            .and_then(|ticks| ticks.parse().ok())
            .with_context(|| format!("no ticks of guest {guest} in `{line}`; {}", self.tail()))
    }

    fn count(&self, guest: &str, text: &str) -> usize {
        self.lines_of(guest).iter().filter(|line| line.contains(text)).count()
    }

    fn tail(&self) -> String {
        let lines: Vec<&str> = self.outcome.output.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES_SHOWN)..].join("\n");
        let log: Vec<&str> = self.outcome.emulator_log.lines().collect();
        let log = log[log.len().saturating_sub(8)..].join("\n");
        format!("the last output:\n{last}\nthe emulator's last words:\n{log}")
    }
}

/// A line of the hypervisor's without its time, `[milliseconds] `. A guest's line keeps its name, so that no
/// guest can speak for the hypervisor.
fn without_stamp(line: &str) -> &str {
    line.strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
        .filter(|(stamp, _)| {
            (stamp.starts_with(' ') || stamp.len() >= 6) && stamp.trim().bytes().all(|b| b.is_ascii_digit())
        })
        .map_or(line, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hypervisors_lines_lose_their_stamp() {
        assert_eq!(without_stamp("[   134] umbra: x"), "umbra: x");
        assert_eq!(without_stamp("[189554] umbra: x"), "umbra: x");
        assert_eq!(without_stamp("umbra: x"), "umbra: x");
        assert_eq!(without_stamp("[221609] umbra: x"), "umbra: x");
        assert_eq!(without_stamp("[hello] umbra: x"), "[hello] umbra: x");
        assert_eq!(without_stamp("[134] umbra: x"), "[134] umbra: x");
    }

    #[test]
    fn figures_are_read_from_the_last_line_that_has_them() {
        let output = "umbra-stats: {\"guests\":[{\"name\":\"a\",\"shadow\":{\"fills\":4}}],\"counters\":{\"reclaims\":1}}\n\
            umbra-stats: {\"time_ms\":9,\"counters\":{\"reclaims\":7}}\n\
            [a] umbra-stats: {\"counters\":{\"reclaims\":9}}\n\
            [a] umbra: guest a ended: exit 0 (1 exits, 3 ticks)\n\
            [     5] umbra: guest a ended: exit 0 (12 exits, 345 ticks)\n";
        let verdict = |output: &str| {
            Verdict::new(Outcome {
                end: End::Died,
                exit_code: None,
                ticks: None,
                output: output.to_owned(),
                emulator_log: String::new(),
            })
        };
        assert_eq!(verdict(output).counter("reclaims").unwrap(), 7);
        assert_eq!(verdict(output).counter("pages_zapped").unwrap(), 0);
        assert_eq!(verdict(output).guest_ticks("a").unwrap(), 345);
        assert_eq!(verdict(output).shadow_count("a", "fills").unwrap(), 4);
        assert!(verdict(output).shadow_count("b", "fills").is_err());
        assert!(verdict(output).guest_ticks("b").is_err());
        assert!(verdict("hello").counter("reclaims").is_err());
    }
}
