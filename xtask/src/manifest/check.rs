//! From the document to the plan: every rule, all problems at once.

use std::{fs, ops::Range};

use machine::{
    load::{self, Protocol},
    manifest::{self as rules, DeviceSet, Expect, HypervisorConfig, OnEnd, Rule},
};
use shadow::cache::{BUDGET_FRAMES_PER_VCPU, FRAMES_BEYOND_KEPT};
use toml::Spanned;

use super::document::{Document, Guest as GuestTable, Hypervisor as HypervisorTable};
use super::words::{self, Misspelt};
use super::{File, FileName, Guest, Limits, Plan, Problem, Problems, Source};
use crate::payload::{OWN_GUESTS, OwnGuest};

/// Memory of the machine that is not for guests: the hypervisor, the payload, the shadow pages.
const RESERVE_MIB: u64 = 64;
/// What of it is the hypervisor's and the payload's.
const OWN_MIB: u64 = 32;
/// Frames in a MiB.
const FRAMES_PER_MIB: u64 = 256;
/// Guest memory where the manifest gives none.
const MEMORY_DEFAULT: u64 = 128 << 20;

/// Checks a manifest for a machine.
pub fn check(source: &Source, limits: &Limits) -> Result<Plan, Problems> {
    let document: Document = toml::from_str(&source.text)
        .map_err(|error| Problems::new(source, vec![Problem::from_toml(&error, &source.text)]))?;
    let mut checker = Checker { source, limits, problems: Vec::new() };
    let hypervisor = checker.hypervisor(&document.hypervisor);
    let guests = checker.guests(&document.guest);
    checker.shadow_room(&document, &guests);
    if checker.problems.is_empty() {
        Ok(Plan { source: source.clone(), hypervisor, guests })
    } else {
        Err(Problems::new(source, checker.problems))
    }
}

struct Checker<'a> {
    source: &'a Source,
    limits: &'a Limits,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    fn report(&mut self, span: Range<usize>, what: &str, label: &str, remedy: &str) {
        self.problems.push(Problem::new(span, what, label, remedy));
    }

    /// A rule's text is "what: what to do".
    fn rule(&mut self, span: Range<usize>, rule: Rule) {
        let text = rule.to_string();
        let (what, remedy) = text.split_once(": ").unwrap_or((&text, "change it"));
        self.report(span, what, "here", remedy);
    }

    fn obey<T: Default>(&mut self, span: Range<usize>, result: Result<T, Rule>) -> T {
        result.unwrap_or_else(|rule| {
            self.rule(span, rule);
            T::default()
        })
    }

    fn read<T: Default>(&mut self, word: &Spanned<String>, parse: fn(&str) -> Result<T, Misspelt>) -> T {
        self.parse(word, parse).unwrap_or_default()
    }

    fn parse<T>(&mut self, word: &Spanned<String>, parse: fn(&str) -> Result<T, Misspelt>) -> Option<T> {
        match parse(word.get_ref()) {
            Ok(value) => Some(value),
            Err(misspelt) => {
                self.report(word.span(), &misspelt.what, "not understood", &misspelt.remedy);
                None
            }
        }
    }

    fn hypervisor(&mut self, table: &HypervisorTable) -> HypervisorConfig {
        let default = HypervisorConfig::default();
        let escape = match &table.escape {
            None => default.escape,
            Some(word) => self.parse(word, words::escape).map_or(default.escape, |code| {
                self.obey(word.span(), rules::check_escape(code));
                code
            }),
        };
        let numbers = [
            ("shadow_frames", &table.shadow_frames),
            ("min_frames", &table.min_frames),
            ("low_frames", &table.low_frames),
            ("high_frames", &table.high_frames),
            ("stats_interval_ms", &table.stats_interval_ms),
            ("audit_interval_ms", &table.audit_interval_ms),
        ];
        for (name, number) in numbers {
            if let Some(number) = number
                && *number.get_ref() == 0
            {
                self.rule(number.span(), Rule::Zero(name));
            }
        }
        let marks = [&table.min_frames, &table.low_frames, &table.high_frames];
        if table.shadow_frames.is_some() {
            for (mark, key) in marks.iter().zip(["min_frames", "low_frames", "high_frames"]) {
                if let Some(mark) = mark {
                    let what =
                        format!("`{key}` is not used beside `shadow_frames`, which makes marks of its own");
                    self.report(mark.span(), &what, "never read", "leave one of the two out");
                }
            }
        }
        let given: Vec<_> = marks.into_iter().flatten().collect();
        for pair in given.windows(2) {
            if pair[1].get_ref() <= pair[0].get_ref() {
                let mut problem = Problem::new(
                    pair[1].span(),
                    "the frame marks must rise",
                    "not above the lower mark",
                    "give min_frames < low_frames < high_frames",
                );
                problem.other = Some((pair[0].span(), "the lower mark".to_owned()));
                self.problems.push(problem);
            }
        }
        let number = |value: &Option<Spanned<u32>>| value.as_ref().map(|value| *value.get_ref());
        HypervisorConfig {
            shadow_frames: number(&table.shadow_frames),
            min_frames: number(&table.min_frames),
            low_frames: number(&table.low_frames),
            high_frames: number(&table.high_frames),
            stats_interval_ms: number(&table.stats_interval_ms),
            audit_interval_ms: number(&table.audit_interval_ms),
            escape,
            exit_when_done: table.exit_when_done.unwrap_or(default.exit_when_done),
            interactive: false,
        }
    }

    fn guests(&mut self, tables: &[Spanned<GuestTable>]) -> Vec<Guest> {
        if tables.is_empty() {
            self.rule(0..0, Rule::NoGuests);
        }
        if tables.len() > rules::MAX_GUESTS {
            self.rule(tables[rules::MAX_GUESTS].span(), Rule::TooManyGuests(tables.len()));
        }
        let guests: Vec<Guest> =
            tables.iter().map(|table| self.guest(header(&table.span()), table.get_ref())).collect();
        self.names(tables);
        self.memory_sum(tables, &guests);
        guests
    }

    fn names(&mut self, tables: &[Spanned<GuestTable>]) {
        let names: Vec<&Spanned<String>> =
            tables.iter().filter_map(|table| table.get_ref().name.as_ref()).collect();
        for (index, name) in names.iter().enumerate() {
            if let Some(first) = names[..index].iter().find(|earlier| earlier.get_ref() == name.get_ref()) {
                let what = format!("two guests have the name `{}`", name.get_ref());
                let mut problem =
                    Problem::new(name.span(), what, "again here", "give each guest its own name");
                problem.other = Some((first.span(), "first used here".to_owned()));
                self.problems.push(problem);
            }
        }
    }

    fn memory_sum(&mut self, tables: &[Spanned<GuestTable>], guests: &[Guest]) {
        let Some(machine_mib) = self.limits.memory_mib else { return };
        let sum_mib = guests.iter().fold(0u64, |sum, guest| sum.saturating_add(guest.memory_bytes >> 20));
        let needed_mib = sum_mib.saturating_add(RESERVE_MIB);
        if needed_mib <= u64::from(machine_mib) {
            return;
        }
        // The largest guest is where there is most to save.
        let largest = guests.iter().zip(tables).max_by_key(|(guest, _)| guest.memory_bytes);
        let span = largest.map_or(0..0, |(_, table)| match &table.get_ref().memory {
            Some(memory) => memory.span(),
            None => header(&table.span()),
        });
        self.report(
            span,
            &format!(
                "the guests' memory is {sum_mib} MiB in all and {RESERVE_MIB} MiB are kept for the hypervisor, \
                 but the machine has {machine_mib} MiB"
            ),
            "the largest guest",
            &format!("give the guests less, or the machine more: `--memory {}`", needed_mib.next_multiple_of(64)),
        );
    }

    /// A guest that cannot get what one operation of its shadow MMU needs is stopped: better said before it runs.
    fn shadow_room(&mut self, document: &Document, guests: &[Guest]) {
        let smallest = |guest: &Guest| u64::from(guest.vcpus) * BUDGET_FRAMES_PER_VCPU;
        let least = guests.iter().map(smallest).sum();
        let guaranteed = guests
            .iter()
            .map(|guest| {
                let guarantee = guest.shadow_guarantee_frames.unwrap_or(0);
                smallest(guest).max(u64::from(guarantee) + u64::from(guest.vcpus) * FRAMES_BEYOND_KEPT)
            })
            .sum::<u64>();
        let Some(budget) = &document.hypervisor.shadow_frames else {
            return self.shadow_memory(document, guests, guaranteed.div_ceil(FRAMES_PER_MIB));
        };
        let frames = u64::from(*budget.get_ref());
        if frames == 0 {
            // Told already.
        } else if frames < least {
            let what = format!(
                "{frames} frames for shadow pages are too few: a virtual processor cannot do with fewer than \
                 {BUDGET_FRAMES_PER_VCPU}"
            );
            self.report(budget.span(), &what, "the budget", &format!("give at least {guaranteed}"));
        } else if frames < guaranteed {
            let what =
                format!("{frames} frames for shadow pages are fewer than what is guaranteed to the guests");
            let remedy = format!("give at least {guaranteed}, or lower a shadow_guarantee");
            self.report(budget.span(), &what, "the budget", &remedy);
        }
    }

    /// Without a budget, what is guaranteed must be there beside the guests' memory.
    fn shadow_memory(&mut self, document: &Document, guests: &[Guest], guaranteed_mib: u64) {
        let Some(machine_mib) = self.limits.memory_mib else { return };
        let sum_mib = guests.iter().fold(0u64, |sum, guest| sum.saturating_add(guest.memory_bytes >> 20));
        let left_mib = u64::from(machine_mib).saturating_sub(sum_mib).saturating_sub(OWN_MIB);
        if guaranteed_mib <= left_mib || sum_mib.saturating_add(RESERVE_MIB) > u64::from(machine_mib) {
            // There, or too much memory for guests, which is told already.
            return;
        }
        let largest = document.guest.iter().max_by_key(|table| {
            let guarantee = table.get_ref().shadow_guarantee.as_ref();
            guarantee.map_or(0, |guarantee| *guarantee.get_ref())
        });
        let span = largest.map_or(0..0, |table| match &table.get_ref().shadow_guarantee {
            Some(guarantee) => guarantee.span(),
            None => header(&table.span()),
        });
        let needed_mib = (sum_mib + OWN_MIB + guaranteed_mib).next_multiple_of(64);
        self.report(
            span,
            &format!(
                "the guests' shadow pages must have {guaranteed_mib} MiB, and {left_mib} MiB are left beside their memory"
            ),
            "the largest guarantee",
            &format!("lower it, give the guests less memory, or the machine more: `--memory {needed_mib}`"),
        );
    }

    fn guest(&mut self, span: Range<usize>, table: &GuestTable) -> Guest {
        let name = match &table.name {
            Some(name) => {
                self.obey(name.span(), rules::check_name(name.get_ref()));
                name.get_ref().clone()
            }
            None => {
                self.report(span.clone(), "a guest has no name", "this guest", "add: name = \"debian\"");
                String::new()
            }
        };
        let (kernel, found_protocol) = match &table.kernel {
            Some(kernel) => self.kernel(kernel),
            None => {
                let remedy = "add: kernel = \"/boot/vmlinuz-...\", or \"debian\", or \"guest:hello\"";
                self.report(span.clone(), "a guest has no kernel", "this guest", remedy);
                (FileName { file: File::Debian, span: span.clone() }, None)
            }
        };
        let said_protocol = table.protocol.as_ref().and_then(|word| self.parse(word, words::protocol));
        let protocol = said_protocol.or(found_protocol);
        let memory_bytes = self.memory(table, &kernel);
        let vcpus = self.vcpus(table, &kernel);
        let cores = self.cores(table);
        self.uses(table, protocol);
        let mut devices = match kernel.file {
            File::Own(own) => own.devices,
            _ => DeviceSet::default(),
        };
        for device in &table.devices {
            if let Err(misspelt) = words::device(device.get_ref(), &mut devices) {
                self.report(device.span(), &misspelt.what, "not understood", &misspelt.remedy);
            }
        }
        let default_expect = match kernel.file {
            File::Own(own) => own.expect,
            _ => Expect::default(),
        };
        let on_end = table.on_end.as_ref().map_or(OnEnd::default(), |word| self.read(word, words::on_end));
        let expect = table.expect.as_ref().map_or(default_expect, |word| self.read(word, words::expect));
        self.shadow_share(table);
        Guest {
            name,
            protocol,
            initrd: table.initrd.as_ref().map(|initrd| self.file(initrd, "initrd")),
            modules: table
                .modules
                .iter()
                .map(|module| {
                    let module = module.get_ref();
                    let cmdline = module.cmdline.as_ref().map_or("", |cmdline| cmdline.get_ref());
                    if let Some(cmdline) = &module.cmdline {
                        self.obey(cmdline.span(), rules::check_cmdline(cmdline.get_ref()));
                    }
                    (self.file(&module.file, "module"), cmdline.to_owned())
                })
                .collect(),
            kernel,
            cmdline: table.cmdline.as_ref().map(|cmdline| {
                self.obey(cmdline.span(), rules::check_cmdline(cmdline.get_ref()));
                cmdline.get_ref().clone()
            }),
            memory_bytes,
            vcpus,
            cores,
            devices,
            on_end,
            expect,
            shadow_guarantee_frames: table.shadow_guarantee.as_ref().map(|frames| *frames.get_ref()),
            shadow_cap_frames: table.shadow_cap.as_ref().map(|frames| *frames.get_ref()),
        }
    }

    fn memory(&mut self, table: &GuestTable, kernel: &FileName) -> u64 {
        let own = match kernel.file {
            File::Own(own) => Some(own),
            _ => None,
        };
        let Some(memory) = &table.memory else {
            return own.map_or(MEMORY_DEFAULT, |own| own.memory_bytes);
        };
        let Some(bytes) = self.parse(memory, words::size) else { return 0 };
        self.obey(memory.span(), rules::check_memory(bytes));
        if let Some(own) = own
            && bytes < own.memory_bytes
        {
            self.report(
                memory.span(),
                &format!("guest:{} uses more memory than that", own.name),
                "too small",
                &format!("give at least \"{}M\"", own.memory_bytes >> 20),
            );
        }
        bytes
    }

    fn vcpus(&mut self, table: &GuestTable, kernel: &FileName) -> u32 {
        let Some(vcpus) = &table.vcpus else {
            return match kernel.file {
                File::Own(own) => own.vcpus,
                _ => 1,
            };
        };
        self.obey(vcpus.span(), rules::check_vcpus(*vcpus.get_ref()));
        *vcpus.get_ref()
    }

    fn cores(&mut self, table: &GuestTable) -> Vec<u32> {
        let mut cores: Vec<u32> = Vec::new();
        for core in &table.cores {
            let number = *core.get_ref();
            if number >= rules::MAX_CORES {
                self.rule(core.span(), Rule::CoreNumber(number));
            } else if let Some(count) = self.limits.cores
                && number >= count
            {
                let what = format!("there is no core {number}: the machine has {count}, numbered from 0");
                let remedy = format!("give a lower number, or the machine more: `--cores {}`", number + 1);
                self.report(core.span(), &what, "here", &remedy);
            }
            if cores.contains(&number) {
                self.rule(core.span(), Rule::DuplicateCore(number));
            }
            cores.push(number);
        }
        cores
    }

    /// What the protocol has no use for would be lost in silence.
    fn uses(&mut self, table: &GuestTable, protocol: Option<Protocol>) {
        let Some(protocol) = protocol else { return };
        let given = [
            (table.initrd.as_ref().map(Spanned::span), "initrd", Protocol::Linux),
            (table.modules.first().map(Spanned::span), "modules", Protocol::Multiboot),
        ];
        for (span, key, user) in given {
            if let Some(span) = span
                && protocol != user
            {
                let what =
                    format!("`{key}` is for the protocol `{}`, this is `{}`", user.name(), protocol.name());
                self.report(span, &what, "never read", &format!("leave `{key}` out"));
            }
        }
        if protocol == Protocol::Elf64
            && let Some(cmdline) = &table.cmdline
            && !cmdline.get_ref().is_empty()
        {
            let what = "the protocol `elf64` has no command line";
            self.report(cmdline.span(), what, "never read", "leave `cmdline` out");
        }
        if let Some(extra) = table.modules.get(rules::MAX_MODULES) {
            self.rule(extra.span(), Rule::TooManyModules(table.modules.len()));
        }
    }

    fn shadow_share(&mut self, table: &GuestTable) {
        if let Some(cap) = &table.shadow_cap {
            if *cap.get_ref() == 0 {
                self.rule(cap.span(), Rule::Zero("the shadow cap"));
            } else if let Some(guarantee) = &table.shadow_guarantee
                && guarantee.get_ref() > cap.get_ref()
            {
                let mut problem = Problem::new(
                    guarantee.span(),
                    "the shadow guarantee is above the cap",
                    "the guarantee",
                    "lower the one or raise the other",
                );
                problem.other = Some((cap.span(), "the cap".to_owned()));
                self.problems.push(problem);
            }
        }
    }

    /// The kernel, and the protocol its file shows.
    fn kernel(&mut self, name: &Spanned<String>) -> (FileName, Option<Protocol>) {
        let text = name.get_ref();
        if let Some(own) = text.strip_prefix("guest:") {
            return match OwnGuest::find(own) {
                Some(own) => (FileName { file: File::Own(own), span: name.span() }, Some(own.protocol)),
                None => {
                    let names: Vec<&str> = OWN_GUESTS.iter().map(|own| own.name).collect();
                    let what = format!("there is no guest of our own called `{own}`");
                    self.report(name.span(), &what, "not known", &words::suggest(own, names));
                    (FileName { file: File::Debian, span: name.span() }, None)
                }
            };
        }
        let kernel = self.file(name, "kernel");
        let File::Host(path) = &kernel.file else { return (kernel, Some(Protocol::Linux)) };
        // A file that cannot be read has been reported.
        let Ok(bytes) = fs::read(path) else { return (kernel, None) };
        let protocol = load::identify(&bytes);
        if protocol.is_none() {
            self.report(
                name.span(),
                &format!("`{text}` is not a kernel"),
                "neither bzImage nor vmlinux, Multiboot or ELF64",
                "give the file that a boot loader would start, such as /boot/vmlinuz-...",
            );
        }
        (kernel, protocol)
    }

    fn file(&mut self, name: &Spanned<String>, what: &str) -> FileName {
        let text = name.get_ref();
        if text == "debian" && what != "module" {
            return FileName { file: File::Debian, span: name.span() };
        }
        let path = self.source.folder.join(text);
        let problem = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => match fs::File::open(&path) {
                Ok(_) => None,
                Err(error) => Some((
                    format!("the {what} `{text}` cannot be read: {error}"),
                    format!("make it readable, for instance: sudo chmod a+r {}", path.display()),
                )),
            },
            Ok(_) => Some((
                format!("the {what} `{text}` is not a file"),
                "give the file's own name, not its folder's".to_owned(),
            )),
            Err(_) => {
                let folder = match self.source.folder.as_os_str().is_empty() {
                    true => "the current folder".to_owned(),
                    false => self.source.folder.display().to_string(),
                };
                Some((
                    format!("there is no {what} `{text}`"),
                    format!("names are relative to {folder}; \"debian\" fetches Debian's cloud {what}"),
                ))
            }
        };
        if let Some((what, remedy)) = problem {
            self.report(name.span(), &what, "here", &remedy);
        }
        FileName { file: File::Host(path), span: name.span() }
    }
}

/// The header line of a table, out of the span of all of it.
fn header(span: &Range<usize>) -> Range<usize> {
    const HEADER: usize = "[[guest]]".len();
    span.start..span.end.min(span.start + HEADER)
}

#[cfg(test)]
mod tests;
