//! A manifest of every bad kind, and what is said about it.

use super::*;
use crate::manifest::{Limits, Source};

const LIMITS: Limits = Limits { memory_mib: Some(1024), cores: Some(2) };

/// What is said, as `line: what [label] help: remedy`, one line a problem.
fn said(text: &str) -> Vec<String> {
    let source = Source::from_text("guests.toml", text);
    let problems = check(&source, &LIMITS).expect_err("a bad manifest");
    let rendered = problems.to_string();
    problems
        .problems()
        .iter()
        .map(|problem| {
            assert!(rendered.contains("guests.toml:"), "no place in: {rendered}");
            assert!(rendered.contains(&problem.what), "{rendered}");
            let line = text[..problem.span.start].lines().count().max(1);
            let line = if text[..problem.span.start].ends_with('\n') { line + 1 } else { line };
            format!("{line}: {} [{}] help: {}", problem.what, problem.label, problem.remedy)
        })
        .collect()
}

fn guest(lines: &str) -> String {
    format!("[[guest]]\nname = \"a\"\nkernel = \"guest:hello\"\n{lines}\n")
}

#[track_caller]
fn one(text: &str, golden: &str) {
    assert_eq!(said(text), [golden]);
}

#[test]
fn a_whole_message_is_shown_at_its_place() {
    let source = Source::from_text("guests.toml", &guest("memory = \"5M\"\nvcpus = 65"));
    let problems = check(&source, &LIMITS).expect_err("bad");
    let golden = r#"error: memory comes in units of 2 MiB, 5242880 bytes are no multiple
 --> guests.toml:4:10
  |
4 | memory = "5M"
  |          ^^^^ here
  |
  = help: give "4M" or "6M""#;
    assert!(problems.render(false).starts_with(golden), "{}", problems.render(false));
    assert!(
        problems.to_string().starts_with("the manifest guests.toml has 3 problems\nerror: "),
        "{problems}"
    );
}

#[test]
fn unknown_keys_are_told_with_a_suggestion() {
    one(
        &guest("memroy = \"16M\""),
        "4: there is no key `memroy` [not known here] help: did you mean `memory`?",
    );
    one(
        "[[guests]]\nname = \"a\"\n",
        "1: there is no key `guests` [not known here] help: did you mean `guest`?",
    );
    one(
        "[hypervisor]\nshadowframes = 3\n",
        "2: there is no key `shadowframes` [not known here] help: did you mean `shadow_frames`?",
    );
    let [other] = &said(&guest("zzz = 1"))[..] else { panic!("one problem") };
    assert!(
        other.starts_with("4: there is no key `zzz` [not known here] help: known are `name`, `kernel`"),
        "{other}"
    );
}

#[test]
fn wrong_types_and_broken_toml() {
    one(
        &guest("memory = 128"),
        "4: invalid type: integer `128`, expected a string [here] help: write it like this: memory = \"128M\"",
    );
    one(
        &guest("cores = 1"),
        "4: invalid type: integer `1`, expected a sequence [here] help: write it like this: cores = [0, 1]",
    );
    let [broken] = &said("[[guest]\nname = 1\n")[..] else { panic!("one problem") };
    assert!(broken.starts_with("1: "), "{broken}");
    let [negative] = &said(&guest("vcpus = -1"))[..] else { panic!("one problem") };
    assert!(negative.ends_with("help: write it like this: vcpus = 1"), "{negative}");
}

#[test]
fn no_guest_no_name_no_kernel() {
    one("", "1: there is no guest [here] help: give at least one [[guest]]");
    one(
        "[[guest]]\nkernel = \"guest:hello\"\n",
        "1: a guest has no name [this guest] help: add: name = \"debian\"",
    );
    one(
        "[[guest]]\nname = \"a\"\n",
        "1: a guest has no kernel [this guest] help: add: kernel = \"/boot/vmlinuz-...\", or \"debian\", or \
         \"guest:hello\"",
    );
}

#[test]
fn names() {
    for name in ["", "UPPER", "with space", "ümlaut"] {
        one(
            &format!("[[guest]]\nname = \"{name}\"\nkernel = \"guest:hello\"\n"),
            "2: this cannot be a guest's name [here] help: give 1 to 32 of a-z, 0-9 and '-'",
        );
    }
    let twice = guest("") + &guest("");
    one(&twice, "6: two guests have the name `a` [again here] help: give each guest its own name");
}

#[test]
fn memory() {
    let at = |memory: &str| guest(&format!("memory = \"{memory}\""));
    let own = "guest:hello uses more memory than that [too small] help: give at least \"16M\"";
    assert_eq!(
        said(&at("2M")),
        [
            "4: 2048 KiB of memory are too small [here] help: give at least \"4M\"".to_owned(),
            format!("4: {own}")
        ]
    );
    one(
        &at("33M"),
        "4: memory comes in units of 2 MiB, 34603008 bytes are no multiple [here] help: give \"32M\" or \"34M\"",
    );
    one(
        &at("128"),
        "4: the size `128` has no unit [not understood] help: give a number and its unit, such as \"128M\" or \"1G\"",
    );
    one(
        &at("16T"),
        "4: `T` is not a unit of size [not understood] help: give a number and its unit, such as \"128M\" or \"1G\"",
    );
    one(
        &(guest("memory = \"512M\"")
            + "[[guest]]\nname = \"b\"\nkernel = \"guest:hello\"\nmemory = \"640M\"\n"),
        "8: the guests' memory is 1152 MiB in all and 64 MiB are kept for the hypervisor, but the machine has 1024 \
         MiB [the largest guest] help: give the guests less, or the machine more: `--memory 1216`",
    );
    let unlimited = Source::from_text("guests.toml", &at("8G"));
    assert!(check(&unlimited, &Limits::default()).is_ok(), "an image for an unknown machine");
}

#[test]
fn processors_and_cores() {
    for (count, vcpus) in [(0, "vcpus = 0"), (65, "vcpus = 65")] {
        one(
            &guest(vcpus),
            &format!("4: {count} virtual processors are impossible [here] help: give 1 to 64"),
        );
    }
    let most = Source::from_text("guests.toml", &guest("vcpus = 64"));
    assert!(check(&most, &LIMITS).is_ok_and(|plan| plan.guests[0].vcpus == 64), "more than cores");
    one(
        &guest("cores = [0, 2]"),
        "4: there is no core 2: the machine has 2, numbered from 0 [here] help: give a lower number, or the machine \
         more: `--cores 3`",
    );
    one(&guest("cores = [1, 1]"), "4: core 1 is named twice [here] help: name it once");
    one(&guest("cores = [256]"), "4: no machine has a core 256 [here] help: give 0 to 255");
}

#[test]
fn files_and_kernels() {
    one(
        "[[guest]]\nname = \"a\"\nkernel = \"no/such/vmlinuz\"\n",
        "3: there is no kernel `no/such/vmlinuz` [here] help: names are relative to the current folder; \"debian\" \
         fetches Debian's cloud kernel",
    );
    one(
        "[[guest]]\nname = \"a\"\nkernel = \"src\"\n",
        "3: the kernel `src` is not a file [here] help: give the file's own name, not its folder's",
    );
    one(
        "[[guest]]\nname = \"a\"\nkernel = \"Cargo.toml\"\n",
        "3: `Cargo.toml` is not a kernel [neither bzImage nor vmlinux, Multiboot or ELF64] help: give the file that a \
         boot loader would start, such as /boot/vmlinuz-...",
    );
    one(
        "[[guest]]\nname = \"a\"\nkernel = \"guest:helo\"\n",
        "3: there is no guest of our own called `helo` [not known] help: did you mean `hello`?",
    );
    one(
        "[[guest]]\nname = \"a\"\nkernel = \"debian\"\ninitrd = \"none.cpio\"\n",
        "4: there is no initrd `none.cpio` [here] help: names are relative to the current folder; \"debian\" fetches \
         Debian's cloud initrd",
    );
}

#[test]
fn what_the_protocol_never_reads() {
    one(
        &guest("initrd = \"debian\""),
        "4: `initrd` is for the protocol `linux`, this is `elf64` [never read] help: leave `initrd` out",
    );
    one(
        &guest("modules = [{ file = \"Cargo.toml\" }]"),
        "4: `modules` is for the protocol `multiboot`, this is `elf64` [never read] help: leave `modules` out",
    );
    one(
        &guest("cmdline = \"quiet\""),
        "4: the protocol `elf64` has no command line [never read] help: leave `cmdline` out",
    );
    one(
        &guest("protocol = \"elf\""),
        "4: there is no protocol `elf` [not understood] help: did you mean `elf64`?",
    );
}

#[test]
fn command_lines() {
    let linux =
        |cmdline: &str| format!("[[guest]]\nname = \"a\"\nkernel = \"debian\"\ncmdline = \"{cmdline}\"\n");
    one(&linux("a\\nb"), "4: a control character in a command line [here] help: leave it out");
    one(
        &linux(&"x".repeat(2048)),
        "4: a command line of 2048 bytes is too long [here] help: give at most 2047",
    );
}

#[test]
fn devices_and_ends() {
    one(
        &guest("devices = [\"exit-port\", \"debug-consol\"]"),
        "4: there is no device `debug-consol` [not understood] help: did you mean `debug-console`?",
    );
    one(
        &guest("expect = \"poweroff\""),
        "4: `poweroff` is no way for a guest to end [not understood] help: did you mean `power-off`?",
    );
    one(
        &guest("expect = \"exit 256\""),
        "4: `exit 256` is no way for a guest to end [not understood] help: give \"power-off\", \"exit N\" (N from 0 to \
         255), \"reset\", \"crash\" or \"any\"",
    );
    one(
        &guest("on_end = \"restart\""),
        "4: `restart` is nothing that can be done at a guest's end [not understood] help: give \"stop\", or \"restart N\" \
         for N restarts at most",
    );
}

#[test]
fn the_hypervisors_settings() {
    let with = |lines: &str| format!("[hypervisor]\n{lines}\n") + &guest("");
    one(
        &with("min_frames = 300\nlow_frames = 200"),
        "3: the frame marks must rise [not above the lower mark] help: give min_frames < low_frames < high_frames",
    );
    one(
        &with("shadow_frames = 127"),
        "2: 127 frames for shadow pages are too few: a virtual processor cannot do with fewer than 128 [the budget] \
         help: give at least 128",
    );
    one(
        &(with("shadow_frames = 511") + "vcpus = 3\n[[guest]]\nname = \"b\"\nkernel = \"guest:hello\"\n"),
        "2: 511 frames for shadow pages are too few: a virtual processor cannot do with fewer than 128 [the budget] \
         help: give at least 512",
    );
    one(&with("shadow_frames = 0"), "2: shadow_frames is 0 [here] help: give at least 1, or leave it out");
    one(
        &with("escape = \"a\""),
        "2: `a` is not a key that can be the console's escape [not understood] help: give a letter with Ctrl, such as \
         \"ctrl-a\"",
    );
    one(
        &with("escape = \"ctrl-m\""),
        "2: character 13 cannot be the console's escape [here] help: give a letter with Ctrl, such as \"ctrl-a\", but \
         none that is Backspace, Tab, Return or Escape",
    );
}

#[test]
fn shadow_shares() {
    one(
        &guest("shadow_guarantee = 9\nshadow_cap = 8"),
        "4: the shadow guarantee is above the cap [the guarantee] help: lower the one or raise the other",
    );
    one(
        &guest("shadow_guarantee = 4000000000"),
        "4: the guests' shadow pages must have 15625001 MiB, and 976 MiB are left beside their memory [the largest \
         guarantee] help: lower it, give the guests less memory, or the machine more: `--memory 15625088`",
    );
    one(
        &(String::from("[hypervisor]\nshadow_frames = 500\nlow_frames = 9\n") + &guest("")),
        "3: `low_frames` is not used beside `shadow_frames`, which makes marks of its own [never read] help: leave one \
         of the two out",
    );
    one(&guest("shadow_cap = 0"), "4: the shadow cap is 0 [here] help: give at least 1, or leave it out");
}

#[test]
fn all_problems_are_told_at_once() {
    let lines = said(&guest("vcpus = 65\ndevices = [\"lpt\"]\nexpect = \"never\""));
    assert_eq!(lines.len(), 3, "{lines:?}");
}

#[test]
fn the_default_manifest_is_good() {
    let plan = check(&Source::default_manifest(), &LIMITS).unwrap_or_else(|problems| panic!("{problems}"));
    let names: Vec<&str> = plan.guests.iter().map(|guest| guest.name.as_str()).collect();
    assert_eq!(names, ["debian-1", "debian-2", "hello"]);
    assert_eq!(plan.guests[0].memory_bytes, 256 << 20);
    assert_eq!(plan.guests[0].expect, Expect::PowerOff);
    assert_eq!(plan.guests[2].expect, Expect::Exit(0));
    assert!(plan.guests[2].devices.exit_port);
}
