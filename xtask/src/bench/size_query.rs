//! `cargo xtask bench --size-query`: what it costs to ask how many shadow pages live, in four ways. The figures go
//! into docs/counting.md, which says what they mean.

mod figures;
mod page;
mod plot;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};
use figures::Figures;
use xtask::{
    hypervisor,
    packages::{self, Need},
    progress::stage,
    workspace,
};

use super::costs;

/// Operations of callgrind's two runs, whose difference counts; multiples of the 128 updates of a burst and its end.
const FEW: u64 = 1280;
const MANY: u64 = FEW + 12800;

/// Builds, measures, prints, and writes the page's figures and plot.
pub fn run() -> Result<ExitCode> {
    packages::ensure_rust()?;
    packages::ensure(&[Need::Bochs])?;
    let program = stage("building the benchmark", build)?;
    let mut figures = stage("asking while two threads allocate and free", || errors(&program))?;
    stage("timing queries and updates", || times(&program, &mut figures))?;
    if workspace::has_program("valgrind") {
        stage("counting instructions", || instructions(&program, &mut figures))?;
    } else {
        println!("no instruction counts: valgrind is not installed (apt-get install valgrind)");
    }
    let costs = stage("timing frames and counters in Bochs", costs::measure)?;
    for (name, table) in [("host", figures::table(&figures)), ("ticks", costs.table())] {
        println!("{table}");
        page::replace(name, &table)?;
    }
    let plot = page::folder().join("counting.svg");
    fs::write(&plot, plot::svg(&figures)?).with_context(|| format!("cannot write {}", plot.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The program of hypervisor/memory/benches/size_query.
fn build() -> Result<PathBuf> {
    let messages = workspace::output_of(
        workspace::cargo()
            .args(["bench", "--package", "memory", "--bench", "size_query", "--no-run"])
            .arg("--message-format=json-render-diagnostics")
            .stderr(Stdio::inherit()),
    )?;
    hypervisor::executables(&messages).pop().context("cargo names no benchmark program")
}

/// Every way, with how wrong it is.
fn errors(program: &Path) -> Result<Vec<Figures>> {
    let output = workspace::output_of(Command::new(program).arg("errors"))?;
    let figures = figures::read(&output);
    if figures.is_empty() {
        bail!("the benchmark printed no figure; its output:\n{output}");
    }
    Ok(figures)
}

/// Adds criterion's medians.
fn times(program: &Path, figures: &mut [Figures]) -> Result<()> {
    let folder = workspace::cache_folder("size-query")?;
    workspace::output_of(Command::new(program).arg("--bench").env("CRITERION_HOME", &folder))?;
    let median = |group: &str, way: &str| -> Result<f64> {
        let path = folder.join(group).join(way).join("new/estimates.json");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        figures::median(&text).with_context(|| format!("{} has no median", path.display()))
    };
    for way in figures {
        way.query_ns = median("query", &way.name)?;
        way.update_ns = median("update", &way.name)?;
    }
    Ok(())
}

/// Adds callgrind's counts.
fn instructions(program: &Path, figures: &mut [Figures]) -> Result<()> {
    let each = |way: &str, operation: &str| -> Result<f64> {
        let few = callgrind(program, way, operation, FEW)?;
        let many = callgrind(program, way, operation, MANY)?;
        Ok((many as f64 - few as f64) / (MANY - FEW) as f64)
    };
    let (loop_of_queries, loop_of_updates) = (each("nothing", "query")?, each("nothing", "update")?);
    for way in figures {
        way.query_instructions = Some(each(&way.name, "query")? - loop_of_queries);
        way.update_instructions = Some(each(&way.name, "update")? - loop_of_updates);
    }
    Ok(())
}

/// Instructions of the whole program.
fn callgrind(program: &Path, way: &str, operation: &str, times: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["instructions", way, operation, &times.to_string()])
        .output()
        .context("cannot start valgrind")?;
    let told = String::from_utf8_lossy(&output.stderr);
    figures::collected(&told).with_context(|| format!("valgrind told no count:\n{told}"))
}
