//! Reclaim in Bochs, on four processors: Umbra's order against KVM's of until 2024, on the same guests.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use xtask::{
    emulator::{Backend, Machine},
    hypervisor::{self, Hypervisor},
    image,
    manifest::{self, Limits, Source},
    payload::{self, Options},
    progress::stage,
    workspace,
};

use super::run;

const TIMEOUT: Duration = Duration::from_secs(600);
/// The workloads: three guests that fit beside one that goes round many more tables than there is room for; and four that
/// work on page tables, in a tenth of what they would like.
const WORKLOADS: [(&str, u32, [&str; 4]); 2] = [
    (
        "three that fit, one that thrashes",
        1600,
        ["fit 60 2500", "fit 60 2500", "fit 60 2500", "thrash 1500 12"],
    ),
    (
        "four that work on page tables",
        662,
        ["work 1 3 8 80", "work 2 3 13 45", "work 3 3 4 160", "work 4 3 6 100"],
    ),
];
/// What is compared, as the statistics call it.
const COUNTS: [&str; 4] = ["fills", "pages_made", "reclaimed", "thrash"];

/// One guest's figures.
struct Figures {
    counts: [u64; COUNTS.len()],
    ticks: u64,
}

/// Measures both orders and prints a table; fails where Umbra's makes more pages again.
pub fn compare(umbra: &Hypervisor) -> Result<bool> {
    let other = stage("building the hypervisor with KVM's order", first_guest)?;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "guest",
        "order",
        "fills",
        "pages made",
        "reclaimed",
        "thrash",
        "ticks",
    ]);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut fewer = true;
    let mut summaries = Vec::new();
    for (what, budget, work) in WORKLOADS {
        let title = format!("timing {what}");
        let [ours, theirs] =
            stage(&title, || anyhow::Ok([four(umbra, budget, &work)?, four(&other, budget, &work)?]))?;
        for ((command, ours), theirs) in work.iter().zip(&ours).zip(&theirs) {
            for (order, figures) in [("Umbra's", ours), ("first guest", theirs)] {
                let mut row = vec![(*command).to_owned(), order.to_owned()];
                row.extend(figures.counts.iter().map(u64::to_string));
                row.push(figures.ticks.to_string());
                table.add_row(row);
            }
        }
        let sum = |all: &[Figures], count: usize| all.iter().map(|one| one.counts[count]).sum::<u64>();
        let share = |count| 100.0 * (1.0 - sum(&ours, count) as f64 / sum(&theirs, count).max(1) as f64);
        summaries.push(format!(
            "{what}, {budget} frames: {:.1} % fewer pages made, {:.1} % fewer fills",
            share(1),
            share(0)
        ));
        fewer &= sum(&ours, 1) <= sum(&theirs, 1);
    }
    println!("{table}\n");
    summaries.iter().for_each(|line| println!("{line}"));
    if !fewer {
        eprintln!("missed: the first guest's oldest page is the better order");
    }
    Ok(fewer)
}

/// The hypervisor with the other order, in a folder of its own: it must never be taken for the product.
fn first_guest() -> Result<Hypervisor> {
    let folder = workspace::root().join("target/first-guest");
    let arguments = ["--quiet", "--features", "first-guest", "--target-dir"];
    let folder = folder.to_str().context("the workspace's path is not UTF-8")?;
    let arguments: Vec<&str> = arguments.into_iter().chain([folder]).collect();
    let built = hypervisor::build_bare_metal("boot", &arguments)?;
    let symbols = built.into_iter().next().context("package boot has no binary")?;
    let stripped = hypervisor::strip(&symbols)?;
    Ok(Hypervisor { symbols, stripped })
}

/// Runs four guests, on a processor each.
fn four(umbra: &Hypervisor, budget: u32, work: &[&str; 4]) -> Result<Vec<Figures>> {
    let mut text = format!("[hypervisor]\nshadow_frames = {budget}\nstats_interval_ms = 500\n");
    for (number, command) in work.iter().enumerate() {
        text += &format!(
            "[[guest]]\nname = \"g{number}\"\nkernel = \"guest:churn\"\ncmdline = \"{command}\"\ncores = [{number}]\n"
        );
    }
    let cores = work.len() as u32;
    let limits = Limits { cores: Some(cores), ..Limits::default() };
    let plan = manifest::check(&Source::from_text("reclaim", &text), &limits)?;
    let payload = payload::assemble(&plan, &Options::default())?.path;
    let image = image::pack(&umbra.stripped, Some(&payload))?;
    let machine = Machine { cores, memory_mib: 512, backend: Backend::Bochs, ..Machine::new(image) };
    let outcome = run(&machine, TIMEOUT)?;
    ensure!(outcome.exit_code == Some(0), "the guests did not end well; the output:\n{}", outcome.output);
    (0..work.len()).map(|number| figures(&outcome.output, &format!("g{number}"))).collect()
}

/// The guest's last counts, and the ticks that it took.
fn figures(output: &str, guest: &str) -> Result<Figures> {
    let last = output
        .lines()
        .rev()
        .filter_map(|line| line.split_once("umbra-stats: "))
        .filter_map(|(_, json)| serde_json::from_str::<serde_json::Value>(json).ok())
        .find_map(|line| {
            line["guests"].as_array()?.iter().find(|row| row["name"] == guest)?.get("shadow").cloned()
        })
        .with_context(|| format!("no statistics of {guest}"))?;
    let ended = format!("umbra: guest {guest} ended: ");
    let ticks = output
        .lines()
        .find_map(|line| {
            line.split_once(&ended)?.1.rsplit_once(", ")?.1.strip_suffix(" ticks)")?.parse().ok()
        })
        .with_context(|| format!("{guest} did not end"))?;
    Ok(Figures { counts: COUNTS.map(|name| last[name].as_u64().unwrap_or(0)), ticks })
}

#[cfg(test)]
mod tests {
    use super::figures;

    #[test]
    fn the_last_counts_and_the_ticks_are_read() {
        let output = "umbra-stats: {\"guests\":[{\"name\":\"g0\",\"shadow\":{\"fills\":1,\"thrash\":2}}]}\n\
            umbra-stats: {\"guests\":[{\"name\":\"g0\",\"shadow\":{\"fills\":7,\"reclaimed\":3}}]}\n\
            [ 12] umbra: guest g0 ended: exit 0 (52 exits, 156 ticks)\n";
        let found = figures(output, "g0").unwrap();
        assert_eq!((found.counts, found.ticks), ([7, 0, 3, 0], 156));
        assert!(figures(output, "g1").is_err());
    }
}
