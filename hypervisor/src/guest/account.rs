//! A guest's share of what the cores count, without a counter of its own on the exit path: the core's counters are
//! read when its vCPU comes and when it goes.

use memory::counters::{ExitCounts, Writer};
use shadow::Stats;

use crate::schedule;

/// The exits of a guest's vCPU by reason.
#[derive(Debug, Default)]
pub struct ExitAccount {
    counts: ExitCounts,
    /// The core that the vCPU is on, and what that core had counted when it came.
    on: Option<(usize, ExitCounts)>,
}

impl ExitAccount {
    /// The vCPU comes onto a core.
    pub fn begin(&mut self, core: usize) {
        self.end();
        self.on = Some((core, schedule::counters().exits_on(core)));
    }

    /// The vCPU leaves its core to another one.
    pub fn end(&mut self) {
        self.counts = self.now();
        self.on = None;
    }

    /// The exits so far.
    #[must_use]
    pub fn now(&self) -> ExitCounts {
        let mut counts = self.counts.clone();
        if let Some((core, before)) = &self.on {
            counts.add_between(before, &schedule::counters().exits_on(*core));
        }
        counts
    }
}

/// A guest ends: the counters take over what its MMU counted from `from` to `to`.
pub fn close(writer: &Writer<'_>, from: &Stats, to: &Stats) {
    for ((event, before), (_, count)) in from.each().zip(to.each()) {
        writer.add(event, count - before);
    }
}
