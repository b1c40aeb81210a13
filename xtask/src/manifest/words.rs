//! The words that stand for values: sizes, keys, devices, ends.

use machine::{
    load::Protocol,
    manifest::{DeviceSet, Expect, OnEnd},
};

/// What cannot be read, and how it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misspelt {
    /// What is wrong.
    pub what: String,
    /// What to write.
    pub remedy: String,
}

impl Misspelt {
    fn new(what: String, remedy: impl Into<String>) -> Self {
        Self { what, remedy: remedy.into() }
    }
}

/// The known word that is most like `word`, if one is.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const LIKE_ENOUGH: f64 = 0.75;
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&word.to_lowercase(), candidate), candidate))
        .filter(|(likeness, _)| *likeness >= LIKE_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// "did you mean `x`?", or all that is known.
pub fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> String {
    match nearest(word, known.clone()) {
        Some(candidate) => format!("did you mean `{candidate}`?"),
        None => {
            let all: Vec<String> = known.into_iter().map(|word| format!("`{word}`")).collect();
            format!("known are {}", all.join(", "))
        }
    }
}

/// A size in bytes: a number and `K`, `M` or `G` (powers of 1024).
pub fn size(text: &str) -> Result<u64, Misspelt> {
    let remedy = "give a number and its unit, such as \"128M\" or \"1G\"";
    let wrong = |what: String| Misspelt::new(what, remedy);
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(wrong(format!("`{text}` is not a size")));
    }
    let shift = match unit.trim() {
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "" => return Err(wrong(format!("the size `{text}` has no unit"))),
        other => return Err(wrong(format!("`{other}` is not a unit of size"))),
    };
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Misspelt::new(format!("the size `{text}` is too large"), "give at most \"1024G\""))
}

/// `"ctrl-a"`: the control character.
pub fn escape(text: &str) -> Result<u8, Misspelt> {
    let lower = text.to_lowercase();
    let letter = lower.strip_prefix("ctrl-").or_else(|| lower.strip_prefix('^')).unwrap_or_default();
    match letter.as_bytes() {
        &[letter @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_')] => Ok(letter & 0x1f),
        _ => Err(Misspelt::new(
            format!("`{text}` is not a key that can be the console's escape"),
            "give a letter with Ctrl, such as \"ctrl-a\"",
        )),
    }
}

const PROTOCOLS: [Protocol; 3] = [Protocol::Linux, Protocol::Multiboot, Protocol::Elf64];

/// `"linux"`, `"multiboot"`, `"elf64"`.
pub fn protocol(text: &str) -> Result<Protocol, Misspelt> {
    PROTOCOLS.into_iter().find(|protocol| protocol.name() == text).ok_or_else(|| {
        let names = PROTOCOLS.map(Protocol::name);
        Misspelt::new(format!("there is no protocol `{text}`"), suggest(text, names))
    })
}

const DEVICES: [&str; 4] = ["exit-port", "shutdown-port", "debug-console", "bench-marks"];

/// Adds the device of this name.
pub fn device(text: &str, devices: &mut DeviceSet) -> Result<(), Misspelt> {
    let switch = match text {
        "exit-port" => &mut devices.exit_port,
        "shutdown-port" => &mut devices.shutdown_port,
        "debug-console" => &mut devices.debug_console,
        "bench-marks" => &mut devices.bench_marks,
        _ => {
            return Err(Misspelt::new(format!("there is no device `{text}`"), suggest(text, DEVICES)));
        }
    };
    *switch = true;
    Ok(())
}

/// The number behind a word: `"exit 3"`.
fn numbered<T: std::str::FromStr>(text: &str, word: &str) -> Option<T> {
    text.strip_prefix(word)?.strip_prefix(' ')?.trim().parse().ok()
}

/// `"stop"`, `"restart 3"`.
pub fn on_end(text: &str) -> Result<OnEnd, Misspelt> {
    match numbered(text, "restart") {
        Some(max @ 1..) => Ok(OnEnd::Restart { max }),
        _ if text == "stop" => Ok(OnEnd::Stop),
        _ => Err(Misspelt::new(
            format!("`{text}` is nothing that can be done at a guest's end"),
            "give \"stop\", or \"restart N\" for N restarts at most",
        )),
    }
}

const EXPECTATIONS: [&str; 6] = ["power-off", "exit 0", "reset", "halt", "crash", "any"];

/// `"power-off"`, `"exit N"`, `"reset"`, `"halt"`, `"crash"`, `"any"`.
pub fn expect(text: &str) -> Result<Expect, Misspelt> {
    match text {
        "power-off" => Ok(Expect::PowerOff),
        "reset" => Ok(Expect::Reset),
        "halt" => Ok(Expect::Halt),
        "crash" => Ok(Expect::Crash),
        "any" => Ok(Expect::Any),
        _ => numbered(text, "exit").map(Expect::Exit).ok_or_else(|| {
            Misspelt::new(
                format!("`{text}` is no way for a guest to end"),
                match nearest(text, EXPECTATIONS) {
                    Some("exit 0") | None => {
                        "give \"power-off\", \"exit N\" (N from 0 to 255), \"reset\", \"crash\" or \"any\""
                            .to_owned()
                    }
                    Some(word) => format!("did you mean `{word}`?"),
                },
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("128M"), Ok(128 << 20));
        assert_eq!(size("2 GiB"), Ok(2 << 30));
        assert_eq!(size("4096K"), Ok(4 << 20));
        for bad in ["", "M", "128", "128X", "-1M", "1.5G", "99999999999999999999G", "18014398509481984K"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn escapes_are_control_characters() {
        assert_eq!(escape("ctrl-a"), Ok(1));
        assert_eq!(escape("Ctrl-Z"), Ok(26));
        assert_eq!(escape("^]"), Ok(29));
        for bad in ["", "a", "ctrl-", "ctrl-1", "ctrl-ab", "esc"] {
            assert!(escape(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ends_are_words_with_numbers() {
        assert_eq!(expect("exit 255"), Ok(Expect::Exit(255)));
        assert_eq!(expect("power-off"), Ok(Expect::PowerOff));
        for bad in ["exit", "exit 256", "exit-1", "poweroff", ""] {
            assert!(expect(bad).is_err(), "{bad}");
        }
        assert_eq!(expect("poweroff").unwrap_err().remedy, "did you mean `power-off`?");
        assert_eq!(on_end("restart 2"), Ok(OnEnd::Restart { max: 2 }));
        assert!(on_end("restart 0").is_err() && on_end("restart").is_err());
    }

    #[test]
    fn a_suggestion_is_like_the_word() {
        assert_eq!(suggest("exitport", DEVICES), "did you mean `exit-port`?");
        assert!(suggest("zzz", DEVICES).starts_with("known are `exit-port`, "));
    }
}
