//! The rules a manifest keeps, in one place for the tool that writes it and the hypervisor that reads it.

use alloc::string::String;
use core::fmt;

use super::types::{GuestConfig, HypervisorConfig, Manifest, OnEnd};

/// Most guests in a manifest.
pub const MAX_GUESTS: usize = 64;
/// Longest name of a guest in bytes.
pub const MAX_NAME_BYTES: usize = 32;
/// Longest command line in bytes: Linux on x86 cuts at 2,048 with its closing NUL.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// Most Multiboot modules of one guest.
pub const MAX_MODULES: usize = 16;
/// Most virtual processors of a guest: what its devices and the processor's tags (VPIDs) have room for.
pub const MAX_VCPUS: u32 = crate::device::VCPUS_MAX;
/// Most cores a guest may name, and the first core number that is none.
pub const MAX_CORES: u32 = 256;
/// Guest memory comes in blocks of this many bytes.
pub const MEMORY_UNIT_BYTES: u64 = memory::BLOCK_SIZE;
/// Least guest memory in bytes: a kernel linked at 2 MiB, and the first megabytes below it.
pub const MIN_MEMORY_BYTES: u64 = 2 * MEMORY_UNIT_BYTES;
/// Most guest memory in bytes (1 TiB).
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;

/// A rule that is broken. Its `Display` says what is wrong and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// No guest at all.
    NoGuests,
    /// More than [`MAX_GUESTS`].
    TooManyGuests(usize),
    /// A name that is empty, too long, or holds other characters than `[a-z0-9-]`.
    Name,
    /// A second guest of one name.
    DuplicateName,
    /// A command line of more than [`MAX_CMDLINE_BYTES`].
    CmdlineLength(usize),
    /// A control character in a command line.
    CmdlineCharacter,
    /// Memory that is not a multiple of 2 MiB.
    MemoryUnit(u64),
    /// Memory below [`MIN_MEMORY_BYTES`].
    MemoryTooSmall(u64),
    /// Memory above [`MAX_MEMORY_BYTES`].
    MemoryTooLarge(u64),
    /// Not 1..=64 virtual processors.
    Vcpus(u32),
    /// A core number that no machine has.
    CoreNumber(u32),
    /// A core named twice.
    DuplicateCore(u32),
    /// More than [`MAX_MODULES`] modules.
    TooManyModules(usize),
    /// An empty kernel.
    EmptyKernel,
    /// A guarantee above the cap.
    GuaranteeAboveCap,
    /// The marks are not `min < low < high`.
    MarkOrder,
    /// An escape that is not a usable control character.
    Escape(u8),
    /// A count that has to be at least 1.
    Zero(&'static str),
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoGuests => write!(f, "there is no guest: give at least one [[guest]]"),
            Self::TooManyGuests(n) => write!(f, "{n} guests are too many: give at most {MAX_GUESTS}"),
            Self::Name => {
                write!(f, "this cannot be a guest's name: give 1 to {MAX_NAME_BYTES} of a-z, 0-9 and '-'")
            }
            Self::DuplicateName => write!(f, "two guests have this name: each needs its own"),
            Self::CmdlineLength(n) => {
                write!(f, "a command line of {n} bytes is too long: give at most {MAX_CMDLINE_BYTES}")
            }
            Self::CmdlineCharacter => write!(f, "a control character in a command line: leave it out"),
            Self::MemoryUnit(bytes) => {
                let down = bytes & !(MEMORY_UNIT_BYTES - 1);
                let down_mib = (down >> 20).max(MIN_MEMORY_BYTES >> 20);
                write!(f, "memory comes in units of 2 MiB, {bytes} bytes are no multiple: ")?;
                write!(f, "give \"{down_mib}M\" or \"{}M\"", down_mib.saturating_add(2))
            }
            Self::MemoryTooSmall(bytes) => {
                write!(f, "{} KiB of memory are too small: give at least \"4M\"", bytes >> 10)
            }
            Self::MemoryTooLarge(bytes) => {
                write!(f, "{} GiB of memory are too large: give at most \"1024G\"", bytes >> 30)
            }
            Self::Vcpus(n) => write!(f, "{n} virtual processors are impossible: give 1 to {MAX_VCPUS}"),
            Self::CoreNumber(n) => write!(f, "no machine has a core {n}: give 0 to {}", MAX_CORES - 1),
            Self::DuplicateCore(n) => write!(f, "core {n} is named twice: name it once"),
            Self::TooManyModules(n) => write!(f, "{n} modules are too many: give at most {MAX_MODULES}"),
            Self::EmptyKernel => {
                write!(f, "the kernel is an empty file: give the file that a boot loader would start")
            }
            Self::GuaranteeAboveCap => {
                write!(f, "the shadow guarantee is above the cap: lower the one or raise the other")
            }
            Self::MarkOrder => write!(f, "the frame marks must rise: min_frames < low_frames < high_frames"),
            Self::Escape(code) => {
                write!(f, "character {code} cannot be the console's escape: give a letter with Ctrl, ")?;
                write!(f, "such as \"ctrl-a\", but none that is Backspace, Tab, Return or Escape")
            }
            Self::Zero(what) => write!(f, "{what} is 0: give at least 1, or leave it out"),
        }
    }
}

/// What a rule was broken by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The hypervisor's settings.
    Hypervisor,
    /// The list of guests as a whole.
    Guests,
    /// One guest, by its place in the list (the name may be the very thing that is wrong).
    Guest {
        /// 0 for the first guest.
        index: usize,
        /// Its name, cut to 32 characters.
        name: String,
    },
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hypervisor => write!(f, "hypervisor"),
            Self::Guests => write!(f, "guests"),
            Self::Guest { index, name } => write!(f, "guest {} ({name:?})", index + 1),
        }
    }
}

/// A broken rule and who broke it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Who.
    pub subject: Subject,
    /// Which rule.
    pub rule: Rule,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.rule)
    }
}

impl core::error::Error for Violation {}

/// A guest's name: 1 to 32 bytes of `[a-z0-9-]`.
pub fn check_name(name: &str) -> Result<(), Rule> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(legal) {
        return Err(Rule::Name);
    }
    Ok(())
}

/// A command line: at most 2,047 bytes, none of them a control character.
pub fn check_cmdline(cmdline: &str) -> Result<(), Rule> {
    if cmdline.len() > MAX_CMDLINE_BYTES {
        return Err(Rule::CmdlineLength(cmdline.len()));
    }
    if cmdline.bytes().any(|b| b.is_ascii_control()) {
        return Err(Rule::CmdlineCharacter);
    }
    Ok(())
}

/// A guest's memory in bytes.
pub fn check_memory(bytes: u64) -> Result<(), Rule> {
    if bytes < MIN_MEMORY_BYTES {
        return Err(Rule::MemoryTooSmall(bytes));
    }
    if bytes > MAX_MEMORY_BYTES {
        return Err(Rule::MemoryTooLarge(bytes));
    }
    if !bytes.is_multiple_of(MEMORY_UNIT_BYTES) {
        return Err(Rule::MemoryUnit(bytes));
    }
    Ok(())
}

/// A guest's virtual processors.
pub fn check_vcpus(count: u32) -> Result<(), Rule> {
    if (1..=MAX_VCPUS).contains(&count) { Ok(()) } else { Err(Rule::Vcpus(count)) }
}

/// The console's escape: a control character that a shell user does not need every minute.
pub fn check_escape(code: u8) -> Result<(), Rule> {
    match code {
        8 | 9 | 10 | 13 | 27 => Err(Rule::Escape(code)),
        1..=31 => Ok(()),
        _ => Err(Rule::Escape(code)),
    }
}

impl HypervisorConfig {
    /// Checks the hypervisor's settings.
    pub fn check(&self) -> Result<(), Rule> {
        check_escape(self.escape)?;
        let counts = [
            ("shadow_frames", self.shadow_frames),
            ("min_frames", self.min_frames),
            ("low_frames", self.low_frames),
            ("high_frames", self.high_frames),
            ("stats_interval_ms", self.stats_interval_ms),
            ("audit_interval_ms", self.audit_interval_ms),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, value)| *value == Some(0)) {
            return Err(Rule::Zero(name));
        }
        // A mark that is not given follows from the others: only given ones are compared.
        let mut below = None;
        for mark in [self.min_frames, self.low_frames, self.high_frames].into_iter().flatten() {
            if below.is_some_and(|below| mark <= below) {
                return Err(Rule::MarkOrder);
            }
            below = Some(mark);
        }
        Ok(())
    }
}

impl GuestConfig {
    /// Checks one guest by itself (its name against the others' is [`Manifest::check`]'s).
    pub fn check(&self) -> Result<(), Rule> {
        check_name(&self.name)?;
        check_cmdline(&self.cmdline)?;
        check_memory(self.memory_bytes)?;
        check_vcpus(self.vcpus)?;
        // Each number below MAX_CORES and none twice also bounds the list.
        let mut seen = [false; MAX_CORES as usize];
        for &core in &self.cores {
            let slot = seen.get_mut(core as usize).ok_or(Rule::CoreNumber(core))?;
            if core::mem::replace(slot, true) {
                return Err(Rule::DuplicateCore(core));
            }
        }
        if self.modules.len() > MAX_MODULES {
            return Err(Rule::TooManyModules(self.modules.len()));
        }
        for module in &self.modules {
            check_cmdline(&module.cmdline)?;
        }
        if self.kernel.length_bytes == 0 {
            return Err(Rule::EmptyKernel);
        }
        if self.on_end == (OnEnd::Restart { max: 0 }) {
            return Err(Rule::Zero("the number of restarts"));
        }
        match (self.shadow_guarantee_frames, self.shadow_cap_frames) {
            (_, Some(0)) => Err(Rule::Zero("the shadow cap")),
            (Some(guarantee), Some(cap)) if guarantee > cap => Err(Rule::GuaranteeAboveCap),
            _ => Ok(()),
        }
    }
}

impl Manifest {
    /// Checks every rule; the first that is broken is the answer.
    pub fn check(&self) -> Result<(), Violation> {
        self.hypervisor.check().map_err(|rule| Violation { subject: Subject::Hypervisor, rule })?;
        let guests = |rule| Violation { subject: Subject::Guests, rule };
        if self.guests.is_empty() {
            return Err(guests(Rule::NoGuests));
        }
        if self.guests.len() > MAX_GUESTS {
            return Err(guests(Rule::TooManyGuests(self.guests.len())));
        }
        for (index, guest) in self.guests.iter().enumerate() {
            let blame = |rule| {
                let name = guest.name.chars().take(MAX_NAME_BYTES).collect::<String>();
                Violation { subject: Subject::Guest { index, name }, rule }
            };
            guest.check().map_err(blame)?;
            // 64 names at most: the quadratic comparison needs no set.
            if self.guests.iter().take(index).any(|earlier| earlier.name == guest.name) {
                return Err(blame(Rule::DuplicateName));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::load::Protocol;
    use crate::manifest::{DeviceSet, Expect, FileRef};

    pub(in crate::manifest) fn guest(name: &str) -> GuestConfig {
        GuestConfig {
            name: name.into(),
            protocol: Protocol::Elf64,
            kernel: FileRef { offset: 0, length_bytes: 4 },
            initrd: None,
            modules: vec![],
            cmdline: "console=ttyS0,115200".into(),
            memory_bytes: 128 << 20,
            vcpus: 1,
            cores: vec![],
            devices: DeviceSet::default(),
            on_end: OnEnd::Stop,
            expect: Expect::PowerOff,
            shadow_guarantee_frames: None,
            shadow_cap_frames: None,
        }
    }

    fn broken(change: impl FnOnce(&mut GuestConfig)) -> Rule {
        let mut config = guest("a");
        change(&mut config);
        config.check().unwrap_err()
    }

    #[test]
    fn each_rule_of_a_guest_is_checked() {
        assert_eq!(guest("a").check(), Ok(()));
        for name in ["", "A", "a b", "a_b", "ä", "a]", &"a".repeat(33)] {
            assert_eq!(broken(|g| g.name = name.into()), Rule::Name, "{name:?}");
        }
        assert_eq!(broken(|g| g.cmdline = "x".repeat(2048)), Rule::CmdlineLength(2048));
        assert_eq!(broken(|g| g.cmdline = "a\nb".into()), Rule::CmdlineCharacter);
        assert_eq!(broken(|g| g.memory_bytes = 3 << 20), Rule::MemoryTooSmall(3 << 20));
        assert_eq!(broken(|g| g.memory_bytes = 5 << 20), Rule::MemoryUnit(5 << 20));
        assert_eq!(broken(|g| g.memory_bytes = u64::MAX), Rule::MemoryTooLarge(u64::MAX));
        assert_eq!(broken(|g| g.vcpus = 0), Rule::Vcpus(0));
        assert_eq!(broken(|g| g.vcpus = 65), Rule::Vcpus(65));
        assert_eq!(broken(|g| g.cores = vec![256]), Rule::CoreNumber(256));
        assert_eq!(broken(|g| g.cores = vec![1, 0, 1]), Rule::DuplicateCore(1));
        assert_eq!(broken(|g| g.kernel.length_bytes = 0), Rule::EmptyKernel);
        assert_eq!(broken(|g| g.on_end = OnEnd::Restart { max: 0 }), Rule::Zero("the number of restarts"));
        assert_eq!(
            broken(|g| (g.shadow_guarantee_frames, g.shadow_cap_frames) = (Some(9), Some(8))),
            Rule::GuaranteeAboveCap
        );
    }

    #[test]
    fn names_are_distinct_and_there_is_a_guest() {
        let mut manifest = Manifest::default();
        assert_eq!(manifest.check().unwrap_err().rule, Rule::NoGuests);
        manifest.guests = vec![guest("a"), guest("b"), guest("a")];
        let violation = manifest.check().unwrap_err();
        assert_eq!(violation.rule, Rule::DuplicateName);
        assert_eq!(violation.subject, Subject::Guest { index: 2, name: "a".into() });
        manifest.guests = (0..65).map(|n| guest(&format!("g{n}"))).collect();
        assert_eq!(manifest.check().unwrap_err().rule, Rule::TooManyGuests(65));
    }

    #[test]
    fn given_marks_must_rise() {
        let with = |min, low, high| HypervisorConfig {
            min_frames: min,
            low_frames: low,
            high_frames: high,
            ..HypervisorConfig::default()
        };
        assert_eq!(with(None, None, None).check(), Ok(()));
        assert_eq!(with(Some(1), Some(2), Some(3)).check(), Ok(()));
        assert_eq!(with(Some(2), Some(2), Some(3)).check(), Err(Rule::MarkOrder));
        assert_eq!(with(Some(5), None, Some(3)).check(), Err(Rule::MarkOrder));
        assert_eq!(with(None, Some(0), None).check(), Err(Rule::Zero("low_frames")));
        let escape = |escape| HypervisorConfig { escape, ..HypervisorConfig::default() };
        assert_eq!(escape(b'\r').check(), Err(Rule::Escape(13)));
        assert_eq!(escape(b'a').check(), Err(Rule::Escape(97)));
        assert_eq!(escape(29).check(), Ok(()));
    }
}
