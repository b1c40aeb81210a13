//! What was counted, for a person (`list`, `stats`) and for programs (`umbra-stats: {...}`).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use memory::counters::{ExitCounts, Population, Total};
use memory::{Owner, PAGE_SIZE};

use super::focus;
use super::json::Json;
use crate::guest::Guest;
use crate::guest::life::Reason;
use crate::guest::registry::{self, Last, Phase};
use crate::host::log::raw;
use crate::host::{Host, frames, heap, serial, time};
use crate::schedule::{self, Core};

const KIB: u64 = 1024;
const NS_PER_MS: u64 = 1_000_000;
/// A guest's exits by reason on a line.
const REASONS_PER_LINE: usize = 6;

/// A guest's shadow MMU at one moment.
struct ShadowRow {
    pages: u32,
    frames: u64,
    stats: shadow::Stats,
}

type Shadow = Option<ShadowRow>;

/// A guest's vCPUs on a line.
const VCPUS_PER_LINE: usize = 4;

/// A guest's line at one moment.
struct Row {
    name: heapless::String<32>,
    memory_bytes: u64,
    heap_bytes: u64,
    vcpus: u32,
    phase: Phase,
    last: Option<Last>,
    guest: Option<Arc<Guest>>,
}

impl Row {
    fn exits(&self) -> u64 {
        match &self.guest {
            Some(guest) => guest.exits(),
            None => self.last.map_or(0, |last| last.exits),
        }
    }

    fn uptime_ms(&self) -> u64 {
        match &self.guest {
            Some(guest) => guest.now_ns() / NS_PER_MS,
            None => self.last.map_or(0, |last| time::ticks_to_ns(last.ticks) / NS_PER_MS),
        }
    }

    /// Live shadow pages.
    fn shadow_pages(&self) -> u64 {
        self.guest.as_ref().map_or(0, |guest| guest.mmu.lock().live_pages().into())
    }

    /// What its MMU holds and has counted; `None` unless it runs.
    fn shadow(&self) -> Shadow {
        let mmu = self.guest.as_ref()?.mmu.lock();
        Some(ShadowRow { pages: mmu.live_pages(), frames: mmu.frames(), stats: *mmu.stats() })
    }

    /// Its exits by reason, the most frequent first.
    fn exits_by_reason(&self) -> Vec<Total> {
        let mut counts = ExitCounts::default();
        for vcpu in self.guest.iter().flat_map(|guest| &guest.vcpus) {
            counts.add_between(&ExitCounts::default(), &vcpu.account.lock().now());
        }
        let mut totals: Vec<Total> = counts.totals().filter(|total| total.sum > 0).collect();
        totals.sort_by_key(|total| core::cmp::Reverse(total.sum));
        totals
    }

    /// Where the guest is, in one word.
    fn state(&self) -> &'static str {
        match self.phase {
            Phase::Up => "runs",
            Phase::Starting => "starts",
            Phase::Ending => "ends",
            Phase::Down if self.last.is_some() => "ended",
            Phase::Down => "down",
        }
    }
}

/// Copies the registry, so that it is free again before any guest's lock is taken.
fn rows() -> Vec<Row> {
    registry::with(|lines| {
        let row = |line: &registry::Line| Row {
            name: heapless::String::try_from(line.config.name.as_str()).unwrap_or_default(),
            memory_bytes: line.config.memory_bytes,
            heap_bytes: line.heap_bytes as u64,
            vcpus: line.config.vcpus,
            phase: line.phase,
            last: line.last,
            guest: line.guest.clone(),
        };
        lines.iter().map(row).collect()
    })
}

/// All guests, what their MMUs hold, and all counters with what those have counted.
fn counted() -> (Vec<Row>, Vec<Shadow>, Vec<Total>) {
    registry::settled(|| {
        let rows = rows();
        let shadows: Vec<Shadow> = rows.iter().map(Row::shadow).collect();
        let totals = totals(&shadows).filter(|total| total.sum > 0).collect();
        (rows, shadows, totals)
    })
}

/// Prints all guests on a line each.
pub fn list(_core: &Core) {
    raw(format_args!(
        "    # name                 state   memory    vcpus         cores      exits   shadow pages  uptime"
    ));
    for (place, row) in rows().iter().enumerate() {
        let mark = if place == focus() { '*' } else { ' ' };
        let mut cores = heapless::String::<CORES_WIDTH>::new();
        if let Some(guest) = &row.guest {
            write_cores(&mut cores, guest);
        }
        let mut end = heapless::String::<40>::new();
        if let (None, Some(last)) = (&row.guest, row.last) {
            let _ = write!(end, "  ({})", Reason(last.end));
        }
        raw(format_args!(
            "  {mark}{:2} {:20} {:7} {:5} MiB {:5} {cores:>CORES_WIDTH$} {:10} {:14} {:>5}.{:03} s{end}",
            place + 1,
            row.name,
            row.state(),
            row.memory_bytes >> 20,
            row.vcpus,
            row.exits(),
            row.shadow_pages(),
            row.uptime_ms() / 1000,
            row.uptime_ms() % 1000,
        ));
    }
}

/// Columns for a guest's cores in the list.
const CORES_WIDTH: usize = 13;

/// The cores of a guest's vCPUs, in the vCPUs' order, as far as there is room.
fn write_cores(out: &mut heapless::String<CORES_WIDTH>, guest: &Guest) {
    for (number, vcpu) in guest.vcpus.iter().enumerate() {
        let mut next = heapless::String::<4>::new();
        // A core's number has two digits at most.
        let _ = write!(next, "{}{}", if number == 0 { "" } else { "," }, vcpu.core());
        let last = number + 1 == guest.vcpus.len();
        if out.len() + next.len() + if last { 0 } else { 2 } > CORES_WIDTH {
            let _ = out.push_str("..");
            return;
        }
        let _ = out.push_str(&next);
    }
}

/// What the hypervisor itself takes of the machine's RAM, beside the payload, in bytes: all that was never given to
/// the frame allocator (the image, its tables, stacks and heap, what the bootloader left) and its own frames.
fn own_bytes(host: &Host) -> u64 {
    let allocator = frames::allocator();
    let payload = (host.payload.len() as u64).next_multiple_of(PAGE_SIZE);
    let outside = host.ram_bytes.saturating_sub(allocator.total_frames() * PAGE_SIZE).saturating_sub(payload);
    outside + allocator.owned_by(Owner::Hypervisor) * PAGE_SIZE
}

/// Shadow pages, exactly or between two bounds.
struct Pages(Population);

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Population::Exact(count) => write!(f, "{count}"),
            Population::Between { low, high } => write!(f, "between {low} and {high}"),
        }
    }
}

/// Prints everything that was counted.
pub fn print(core: &Core) {
    let (rows, _, mut totals) = counted();
    let allocator = frames::allocator();
    let marks = allocator.marks();
    let counters = schedule::counters();
    let now_ms = time::now_ns() / NS_PER_MS;
    raw(format_args!("after {}.{:03} s:", now_ms / 1000, now_ms % 1000));
    raw(format_args!("  shadow pages: {}", Pages(counters.shadow_pages())));
    raw(format_args!(
        "  frames: {} of {} free; marks: min {}, low {}, high {}",
        allocator.free_frames(),
        allocator.total_frames(),
        marks.min_frames(),
        marks.low_frames(),
        marks.high_frames()
    ));
    let (heap_used, heap_free) = heap::usage();
    raw(format_args!(
        "  memory: the hypervisor {} KiB (of it heap {} KiB, {} KiB in use), the payload {} KiB",
        own_bytes(core.host) / KIB,
        (heap_used + heap_free) as u64 / KIB,
        heap_used as u64 / KIB,
        core.host.payload.len() as u64 / KIB
    ));
    for index in 0..core.host.cores {
        let now = time::tsc().max(1);
        raw(format_args!("  core {index}: idle {} %", percent(schedule::idle_ticks(index), now)));
    }
    for row in &rows {
        guest(row);
    }
    // Each kind in the order of its frequency; the sort keeps the declared order where they are equal.
    totals.sort_by_key(|total| (total.name.starts_with("exit_"), core::cmp::Reverse(total.sum)));
    let exits: u64 =
        totals.iter().filter(|total| total.name.starts_with("exit_")).map(|total| total.sum).sum();
    raw(format_args!("  in all, on all cores:"));
    let mut in_exits = false;
    for total in &totals {
        if !in_exits && total.name.starts_with("exit_") {
            in_exits = true;
            raw(format_args!("  exits by reason, {exits} in all:"));
        }
        raw(format_args!("  {:12} {:22} {}", total.sum, total.name, total.description));
    }
}

/// All counters, with what the MMUs of the running guests have counted and not yet handed over.
fn totals(live: &[Shadow]) -> impl Iterator<Item = Total> {
    let running: Vec<_> = live.iter().flatten().flat_map(|shadow| shadow.stats.each()).collect();
    schedule::counters().totals().map(move |total| {
        let more = running.iter().filter(|(event, _)| event.name() == total.name);
        Total { sum: more.fold(total.sum, |sum, (_, count)| sum.wrapping_add(*count)), ..total }
    })
}

fn percent(part: u64, whole: u64) -> u64 {
    (u128::from(part) * 100 / u128::from(whole.max(1))) as u64
}

fn guest(row: &Row) {
    let Some(guest) = &row.guest else {
        raw(format_args!("  guest {}: {}", row.name, row.state()));
        return;
    };
    let Some(ShadowRow { pages, frames: shadow_frames, stats }) = row.shadow() else { return };
    let memory_frames = frames::allocator().owned_by(Owner::Memory(guest.id));
    let beside = (memory_frames * PAGE_SIZE).saturating_sub(row.memory_bytes) + row.heap_bytes;
    raw(format_args!(
        "  guest {}: {} exits; RAM {} KiB, beside it {} KiB; {pages} shadow pages, {} KiB in {shadow_frames} frames",
        row.name,
        row.exits(),
        row.memory_bytes / KIB,
        beside / KIB,
        shadow_frames * PAGE_SIZE / KIB,
    ));
    let mut line = heapless::String::<256>::new();
    for (event, count) in stats.each() {
        // What does not fit is cut: eleven names and numbers do.
        let _ = write!(line, " {} {count}", event.name());
    }
    raw(format_args!("   {line}"));
    for (first, vcpus) in guest.vcpus.chunks(VCPUS_PER_LINE).enumerate().filter(|_| guest.vcpus.len() > 1) {
        let mut line = heapless::String::<256>::new();
        for (number, vcpu) in (first * VCPUS_PER_LINE..).zip(vcpus) {
            let exits = vcpu.exits.load(Ordering::Relaxed);
            let _ = write!(line, " vcpu {number} on core {}: {exits} exits;", vcpu.core());
        }
        raw(format_args!("   {}", line.trim_end_matches(';')));
    }
    for reasons in row.exits_by_reason().chunks(REASONS_PER_LINE) {
        let mut line = heapless::String::<256>::new();
        for total in reasons {
            let _ = write!(line, " {} {}", total.name, total.sum);
        }
        raw(format_args!("   {line}"));
    }
}

/// Between two lines of JSON, in nanoseconds; 0: none are printed.
static INTERVAL_NS: AtomicU64 = AtomicU64::new(0);
/// When the next one is due, in nanoseconds since the start.
static NEXT_NS: AtomicU64 = AtomicU64::new(0);

/// Prints a line of JSON every so many milliseconds; `None`: never.
pub fn every(interval_ms: Option<u32>) {
    let interval_ns = u64::from(interval_ms.unwrap_or(0)) * NS_PER_MS;
    INTERVAL_NS.store(interval_ns, Ordering::Relaxed);
    NEXT_NS.store(time::now_ns() + interval_ns, Ordering::Relaxed);
}

/// Prints the line that is due; returns when the next one is, in nanoseconds since the start.
pub fn tick(now_ns: u64) -> u64 {
    let interval_ns = INTERVAL_NS.load(Ordering::Relaxed);
    if interval_ns == 0 {
        return u64::MAX;
    }
    let due_ns = NEXT_NS.load(Ordering::Relaxed);
    if now_ns < due_ns {
        return due_ns;
    }
    // A line that came late makes up for it, unless it missed the next one's time.
    let next_ns = if due_ns + interval_ns > now_ns { due_ns + interval_ns } else { now_ns + interval_ns };
    NEXT_NS.store(next_ns, Ordering::Relaxed);
    let (rows, shadows, counts) = counted();
    let reasons: Vec<_> = rows.iter().map(Row::exits_by_reason).collect();
    // Nothing in there takes a lock: its holder may be waiting to print.
    serial::write_line_with(|out| {
        // A port that takes nothing any more is dealt with there.
        let _ = out
            .write_str("umbra-stats: ")
            .and_then(|()| write(out, now_ns, &rows, &shadows, &reasons, &counts));
    });
    next_ns
}

/// One object. Counters that are still 0 are left out: most are, and the port is slow.
fn write(
    out: &mut dyn Write,
    now_ns: u64,
    rows: &[Row],
    shadows: &[Shadow],
    reasons: &[Vec<Total>],
    totals: &[Total],
) -> fmt::Result {
    let allocator = frames::allocator();
    let marks = allocator.marks();
    let counters = schedule::counters();
    let mut json = Json::object(out);
    json.number("time_ms", now_ns / NS_PER_MS);
    match counters.shadow_pages() {
        Population::Exact(count) => json.number("shadow_pages", count),
        Population::Between { low, high } => {
            json.number("shadow_pages_low", low);
            json.number("shadow_pages_high", high);
        }
    }
    json.number("free_frames", allocator.free_frames());
    json.number("total_frames", allocator.total_frames());
    json.number("min_frames", marks.min_frames());
    json.number("low_frames", marks.low_frames());
    json.number("high_frames", marks.high_frames());
    let mut idle = json.list("idle_ticks");
    for core in 0..crate::host::cores::count() {
        idle.item(schedule::idle_ticks(core));
    }
    idle.end()?;
    let mut guests = json.list("guests");
    for ((row, shadow), reasons) in rows.iter().zip(shadows).zip(reasons) {
        let mut guest = guests.element();
        guest.text("name", &row.name);
        guest.text("state", row.state());
        guest.number("uptime_ms", row.uptime_ms());
        guest.number("exits", row.exits());
        if let Some(ShadowRow { pages, frames, stats }) = shadow {
            guest.number("shadow_pages", (*pages).into());
            guest.number("shadow_frames", *frames);
            let mut counts = guest.member("shadow");
            for (event, count) in stats.each() {
                counts.number(event.name(), count);
            }
            counts.end()?;
        }
        let mut exits = guest.member("exits_by_reason");
        for total in reasons {
            exits.number(total.name, total.sum);
        }
        exits.end()?;
        guest.end()?;
    }
    guests.end()?;
    let mut counts = json.member("counters");
    for total in totals {
        counts.number(total.name, total.sum);
    }
    counts.end()?;
    json.end()
}

#[cfg(test)]
mod tests {
    #[test]
    fn percentages_do_not_overflow() {
        assert_eq!(super::percent(u64::MAX, u64::MAX), 100);
        assert_eq!(super::percent(1, 0), 100);
    }
}
