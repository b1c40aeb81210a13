//! Reclaim: it changes nothing but time, it takes from who holds too much, and any instruction makes progress.

use std::{process::ExitCode, sync::OnceLock};

use anyhow::{Context, Error, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, Verdict, test};

/// What four guests do at once, on a core each.
const WORK: [(&str, &str); 4] = [
    ("wide", "work 1 3 8 80"),
    ("many", "work 2 3 13 45"),
    ("deep", "work 3 3 4 160"),
    ("long", "work 4 3 6 100"),
];
/// Phases of such a guest, each with a checksum.
const PHASES: usize = 5;
/// Frames for each virtual processor, below which a manifest is refused.
const BUDGET_FRAMES_MIN: u64 = 128;
/// A cap of less counts as this, in frames.
const CAP_FRAMES_MIN: u64 = 84;

/// A guest on a core of its own.
fn churn(name: &str, work: &str, core: usize, more: &str) -> String {
    format!(
        "[[guest]]\nname = \"{name}\"\nkernel = \"guest:churn\"\ncmdline = \"{work}\"\ncores = [{core}]\n{more}\n"
    )
}

fn boot(manifest: &str) -> Result<Verdict> {
    let mut boot = Boot::small(manifest).cores(4);
    boot.machine.memory_mib = 512;
    let verdict = boot.run(SMALL_TIMEOUT)?;
    verdict.never_says("BAD")?.success()?;
    Ok(verdict)
}

/// What the four guests found, and how much room they took.
#[derive(Clone, Debug)]
struct Found {
    /// The lines with checksums of each guest.
    checksums: Vec<Vec<String>>,
    /// The most that all shadow pages took at a time while all four ran, in frames.
    frames_max: u64,
    /// The same at any time.
    frames_ever: u64,
    /// Ticks of the slowest.
    ticks: u64,
}

impl Found {
    fn of(verdict: &Verdict) -> Result<Self> {
        let (mut checksums, mut ticks) = (Vec::new(), 0);
        for (name, _) in WORK {
            let lines = verdict.lines_of(name).into_iter().filter(|line| line.contains("checksum"));
            checksums.push(lines.map(str::to_owned).collect::<Vec<_>>());
            ticks = ticks.max(verdict.guest_ticks(name)?);
        }
        ensure!(
            checksums.iter().all(|lines| lines.len() == PHASES),
            "not {PHASES} lines each: {checksums:?}"
        );
        let (mut frames_max, mut frames_ever) = (0, 0);
        for line in verdict.statistics()? {
            let guests = line["guests"].as_array().context("no guests in the statistics")?;
            let frames = Verdict::shadow_frames(&line);
            frames_ever = frames_ever.max(frames);
            if guests.iter().all(|guest| guest["state"] == "runs") {
                frames_max = frames_max.max(frames);
            }
        }
        ensure!(frames_max > 0, "no line of statistics while all four ran");
        Ok(Self { checksums, frames_max, frames_ever, ticks })
    }
}

fn four(hypervisor: &str) -> Result<Verdict> {
    let guests = WORK.iter().enumerate().map(|(core, (name, work))| churn(name, work, core, ""));
    boot(&(format!("[hypervisor]\nstats_interval_ms = 2000\n{hypervisor}\n") + &guests.collect::<String>()))
}

/// With all the room there is, once for this file.
fn unlimited() -> Result<Found> {
    static FOUND: OnceLock<Result<Found, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let found = four("").and_then(|verdict| Found::of(&verdict)).map_err(|error| format!("{error:#}"))?;
        println!("no budget: {} shadow frames at most, {} ticks", found.frames_ever, found.ticks);
        Ok(found)
    });
    found.clone().map_err(Error::msg)
}

/// The same work in a share of the room that it would like, or in the least that a manifest may give.
fn correct(percent: Option<u64>, audits_min: usize) -> Result<()> {
    let unlimited = unlimited()?;
    let least = BUDGET_FRAMES_MIN * WORK.len() as u64;
    let budget = percent.map_or(least, |percent| unlimited.frames_ever * percent / 100);
    ensure!(budget >= least, "{percent:?} percent of {} frames are no budget", unlimited.frames_ever);
    let audits = if audits_min > 0 { "\naudit_interval_ms = 3000" } else { "" };
    let verdict = four(&format!("shadow_frames = {budget}{audits}"))?;
    let found = Found::of(&verdict)?;
    ensure!(
        found.checksums == unlimited.checksums,
        "in {budget} frames other checksums than in {}: {:#?} for {:#?}",
        unlimited.frames_ever,
        found.checksums,
        unlimited.checksums
    );
    let [pages, batches, fills, created] =
        ["reclaimed", "reclaims", "fills", "pages_made"].map(|name| verdict.counter(name));
    let (pages, sound) = (pages?, verdict.outcome.output.matches(": sound").count());
    println!(
        "a budget of {budget} frames: {pages} pages reclaimed in {} batches, {} fills, {} pages made, \
         {} frames at most ({} while a guest began or ended), {} ticks, {sound} audits",
        batches?, fills?, created?, found.frames_max, found.frames_ever, found.ticks
    );
    ensure!(found.frames_max <= budget, "{} frames in a budget of {budget}", found.frames_max);
    ensure!(percent == Some(100) || pages > 0, "nothing was reclaimed in {budget} frames");
    ensure!(sound >= audits_min, "{sound} audits while it ran");
    Ok(())
}

/// Those that stay in the room they have, and how many percent the one that does not may cost them.
const FITTING: [&str; 3] = ["first", "second", "third"];
const LOSS_PERCENT_MAX: f64 = 5.0;
/// Their leaf tables take some 200 frames each; a fair share is 400.
const FIT: &str = "fit 60 2500";
const FAIR_BUDGET: u32 = 1600;

fn fit_ticks(verdict: &Verdict, guest: &str) -> Result<u64> {
    let lines = verdict.lines_of(guest);
    let line = lines.iter().find_map(|line| line.strip_prefix("churn fit: ")?.strip_suffix(" ticks"));
    line.and_then(|ticks| ticks.parse().ok()).with_context(|| format!("no ticks of {guest}: {lines:?}"))
}

/// One that goes over far more tables than there is room for loses, and the others do not.
fn fair() -> Result<()> {
    let hypervisor = format!("[hypervisor]\nshadow_frames = {FAIR_BUDGET}\nstats_interval_ms = 500\n");
    let fitting: String = FITTING.iter().enumerate().map(|(n, name)| churn(name, FIT, n + 1, "")).collect();
    let thrashing = churn("thrashing", "thrash 1500 12", 0, "");
    let alone = boot(&(hypervisor.clone() + &fitting))?;
    let mixed = boot(&(hypervisor + &fitting + &thrashing))?;
    let taken = |guest: &str| mixed.shadow_count(guest, "reclaimed");
    let of_thrashing = taken("thrashing")?;
    let (mut of_fitting, mut worst) = (0, 0.0_f64);
    for guest in FITTING {
        let (before, after) = (fit_ticks(&alone, guest)?, fit_ticks(&mixed, guest)?);
        let loss = (after as f64 / before as f64 - 1.0) * 100.0;
        println!("{guest}: {before} ticks, {after} beside the other: {loss:+.2} %");
        worst = worst.max(loss);
        of_fitting += taken(guest)?;
    }
    for guest in FITTING.into_iter().chain(["thrashing"]) {
        let count = |name: &str| mixed.shadow_count(guest, name);
        // The count of pages that came back soon after they went.
        let thrash = count("thrash").map_or_else(|_| "no count".to_owned(), |count| count.to_string());
        println!(
            "{guest}: {} fills, {} pages made, {} reclaimed, thrash: {thrash}",
            count("fills")?,
            count("pages_made")?,
            count("reclaimed")?
        );
    }
    let share = of_thrashing as f64 * 100.0 / (of_thrashing + of_fitting) as f64;
    println!("of the pages reclaimed {share:.1} % were the one's that thrashes, {of_fitting} the others'");
    ensure!(of_thrashing > 1000, "only {of_thrashing} pages were reclaimed of the one that thrashes");
    let ends: Vec<&str> = mixed.outcome.output.lines().filter(|line| line.contains(" ended: ")).collect();
    ensure!(ends.last().is_some_and(|line| line.contains("thrashing")), "it ended too soon: {ends:?}");
    ensure!(worst <= LOSS_PERCENT_MAX, "one of those that fit lost {worst:.2} %");
    ensure!(share > 95.0, "{share:.1} % of the pages reclaimed were the one's that thrashes");
    Ok(())
}

/// How often the worst instructions are executed.
const WORST_ROUNDS: u64 = 100;
/// Pages that the instruction and the delivery behind it touch, two of each: code and both operands of the MOVSQ,
/// gates, segments, TSS and stack; for the INT n no operands; for the CALL its far pointer and the LDT, and no gates of
/// the IDT. Each hangs on three tables of its own below the root.
const WORST: [(&str, u64); 3] = [("movs", 2 * (3 + 4)), ("int", 2 * (1 + 4)), ("call", 2 * (2 + 4))];

/// An instruction that needs as many tables at once as any is carried out with the least room there may be, by a number
/// of fills that has a bound, each time.
fn bounded(hypervisor: &str, more: &str, beside: Option<&str>) -> Result<()> {
    let more = format!("{more}\ndevices = [\"bench-marks\"]");
    let mut guests: String = WORST
        .iter()
        .enumerate()
        .map(|(core, (name, _))| churn(name, &format!("worst {name} {WORST_ROUNDS}"), core, &more))
        .collect();
    if let Some(work) = beside {
        guests += &churn("beside", work, 3, "");
    }
    let verdict = boot(&format!("[hypervisor]\n{hypervisor}\n{guests}"))?;
    for (name, pages) in WORST {
        let begin = format!("guest {name}: exits=");
        let lines = verdict.outcome.output.lines().filter_map(|line| line.split_once(&begin));
        let exits: Vec<u64> = lines
            .map(|(_, exits)| exits.trim().parse())
            .collect::<Result<_, _>>()
            .context("exits that are no number")?;
        ensure!(exits.len() as u64 == WORST_ROUNDS, "{} rounds of {name}", exits.len());
        let (all, most) = (exits.iter().sum::<u64>(), exits.iter().copied().max().unwrap_or(0));
        println!(
            "{name}: {:.2} exits in the mean and {most} at most for one that touches {pages} pages by {} tables; {} ticks",
            all as f64 / exits.len() as f64,
            1 + 3 * pages,
            verdict.guest_ticks(name)?
        );
        // Else the tables were there, and the test shows nothing.
        let forgotten = exits.iter().filter(|&&exits| exits >= pages).count() as u64;
        ensure!(
            forgotten > WORST_ROUNDS / 2,
            "it was all forgotten before only {forgotten} of {WORST_ROUNDS}"
        );
        // Pages and tables, twice: far below `shadow::fills_max` for the IRET, the instruction and the delivery.
        ensure!(most <= 2 * (1 + 4 * pages), "{most} exits for one instruction");
    }
    Ok(())
}

fn main() -> ExitCode {
    let least = format!("shadow_frames = {}", 4 * BUDGET_FRAMES_MIN);
    let cap = format!("shadow_cap = {CAP_FRAMES_MIN}");
    qemu_tests::main(vec![
        test("correct_in_100_percent", || correct(Some(100), 0)),
        test("correct_in_50_percent", || correct(Some(50), 3)),
        test("correct_in_25_percent", || correct(Some(25), 0)),
        test("correct_in_10_percent", || correct(Some(10), 3)),
        test("correct_in_the_least", || correct(None, 3)),
        test("fair", fair),
        test("bounded_at_the_least_cap", move || bounded("", &cap, None)),
        test("bounded_in_the_least_budget", move || bounded(&least, "", Some("thrash 400 40"))),
    ])
}
