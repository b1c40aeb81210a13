//! The figures: read from what the benchmark, criterion and callgrind leave, and written as a table.

use super::super::markdown;

/// What is known of one way.
#[derive(Debug, Default, PartialEq)]
pub struct Figures {
    /// The benchmark's name of it: `WAY` or `WAY-NUMBER`.
    pub name: String,
    pub query_ns: f64,
    pub update_ns: f64,
    /// Without contention. `None` where there is no valgrind.
    pub query_instructions: Option<f64>,
    pub update_instructions: Option<f64>,
    /// With pages that are freed where they were allocated, and elsewhere.
    pub one_core: Option<Errors>,
    pub two_cores: Option<Errors>,
}

/// How its answers stood to the truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Errors {
    pub answers: u64,
    pub wrong: u64,
    /// Pages.
    pub largest: u64,
    pub exact: u64,
    /// Pages between the ends of 99 of 100 answers, at most.
    pub usual: u64,
    /// Pages between the ends of the widest bracket.
    pub widest: u64,
}

/// Every way that a line `error WAY LOAD answers=N ...` names, in the order of the lines.
pub fn read(output: &str) -> Vec<Figures> {
    let mut all: Vec<Figures> = Vec::new();
    for line in output.lines() {
        let Some((name, load, errors)) = errors(line) else { continue };
        if all.last().is_none_or(|last| last.name != name) {
            all.push(Figures { name: name.to_owned(), ..Figures::default() });
        }
        let Some(figures) = all.last_mut() else { continue };
        match load {
            "one-core" => figures.one_core = Some(errors),
            "two-cores" => figures.two_cores = Some(errors),
            _ => {}
        }
    }
    all
}

fn errors(line: &str) -> Option<(&str, &str, Errors)> {
    let mut words = line.strip_prefix("error ")?.split_whitespace();
    let (name, load) = (words.next()?, words.next()?);
    let mut value = |key: &str| words.next()?.strip_prefix(key)?.strip_prefix('=')?.parse().ok();
    let errors = Errors {
        answers: value("answers")?,
        wrong: value("wrong")?,
        largest: value("largest")?,
        exact: value("exact")?,
        usual: value("usual")?,
        widest: value("widest")?,
    };
    Some((name, load, errors))
}

/// The median in criterion's `estimates.json`, in nanoseconds.
pub fn median(estimates: &str) -> Option<f64> {
    let estimates: serde_json::Value = serde_json::from_str(estimates).ok()?;
    estimates["median"]["point_estimate"].as_f64()
}

/// The count in callgrind's line `Collected : N`.
pub fn collected(told: &str) -> Option<u64> {
    told.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
}

impl Figures {
    /// Which way, and the number that it was run with.
    pub fn way(&self) -> (&str, Option<u64>) {
        let number = self.name.rsplit_once('-').and_then(|(way, number)| Some((way, number.parse().ok()?)));
        number.map_or((&self.name, None), |(way, number)| (way, Some(number)))
    }

    /// The way in words.
    pub fn label(&self) -> String {
        let count = |number: Option<u64>, unit: &str| match number {
            Some(1) => format!("1 {unit}"),
            Some(number) => format!("{number} {unit}s"),
            None => String::new(),
        };
        match self.way() {
            ("locks", guests) => format!("locks of 2010, {}", count(guests, "guest")),
            ("shared", _) => "one shared number".into(),
            ("percpu-read", cores) => format!("percpu_counter, read, {}", count(cores, "core")),
            ("percpu-sum", cores) => format!("percpu_counter, sum, {}", count(cores, "core")),
            ("ours", cores) => format!("ours, {}", count(cores, "core")),
            (other, _) => other.into(),
        }
    }

    fn loads(&self) -> impl Iterator<Item = &Errors> {
        [&self.one_core, &self.two_cores].into_iter().flatten()
    }

    /// One of the figures under both loads: `A; B`.
    fn both(&self, figure: impl Fn(&Errors) -> String) -> String {
        self.loads().map(figure).collect::<Vec<_>>().join("; ")
    }

    fn row(&self) -> Vec<String> {
        let instructions = |count: Option<f64>| count.map_or("-".into(), |count| format!("{count:.1}"));
        // Only a way that says when it is exact has brackets.
        let ours = self.loads().any(|errors| errors.exact > 0);
        let of_brackets = |text: String| if ours { text } else { "-".into() };
        vec![
            self.label(),
            nanoseconds(self.query_ns),
            instructions(self.query_instructions),
            nanoseconds(self.update_ns),
            instructions(self.update_instructions),
            self.both(|errors| share(errors.wrong, errors.answers)),
            self.both(|errors| errors.largest.to_string()),
            of_brackets(self.both(|errors| share(errors.exact, errors.answers))),
            of_brackets(self.both(|errors| errors.usual.to_string())),
            of_brackets(self.both(|errors| errors.widest.to_string())),
        ]
    }
}

/// Three digits that count, or more.
fn nanoseconds(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A share in per cent. What is not all or none is not shown as such.
fn share(part: u64, whole: u64) -> String {
    let percent = part as f64 / whole.max(1) as f64 * 100.0;
    match percent {
        _ if part == 0 => "0 %".into(),
        _ if part == whole => "100 %".into(),
        ..0.01 => "< 0.01 %".into(),
        99.99.. => "> 99.99 %".into(),
        ..1.0 => format!("{percent:.2} %"),
        _ => format!("{percent:.1} %"),
    }
}

/// All of them, for a page and for a terminal.
pub fn table(figures: &[Figures]) -> String {
    let header = [
        "way",
        "query, ns",
        "instructions",
        "update, ns",
        "instructions",
        "wrong",
        "by up to",
        "exact",
        "width of 99 %",
        "widest",
    ];
    markdown::table(&header, &figures.iter().map(Figures::row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "error locks-10 one-core answers=200 wrong=3 largest=4 exact=0 usual=0 widest=0\n\
        error ours-2 one-core answers=100000 wrong=0 largest=0 exact=99999 usual=0 widest=7\n\
        anything\n\
        error ours-2 two-cores answers=100 wrong=0 largest=0 exact=50 usual=3 widest=9\n";

    #[test]
    fn lines_of_one_way_come_together() {
        let all = read(OUTPUT);
        let names: Vec<_> = all.iter().map(Figures::label).collect();
        assert_eq!(names, ["locks of 2010, 10 guests", "ours, 2 cores"]);
        assert_eq!(all[0].two_cores, None);
        assert_eq!(all[1].two_cores.map(|errors| (errors.usual, errors.widest)), Some((3, 9)));
        assert_eq!(all[0].row()[5..], ["1.5 %", "4", "-", "-", "-"]);
        assert_eq!(all[1].row()[5..], ["0 %; 0 %", "0; 0", "> 99.99 %; 50.0 %", "0; 3", "7; 9"]);
        assert!(read("error ours-2 one-core answers=100 wrong=0\n").is_empty());
    }

    #[test]
    fn what_the_tools_leave_is_read() {
        assert_eq!(median(r#"{"mean":{"point_estimate":2.0},"median":{"point_estimate":1.5}}"#), Some(1.5));
        assert_eq!(median("{}"), None);
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 484355\n"), Some(484_355));
        assert_eq!(collected("==1== I refs: 1\n"), None);
    }
}
