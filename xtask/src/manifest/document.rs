//! The TOML document's shape, before anything in it is checked; and what is said about each of its keys.

use serde::Deserialize;
use toml::Spanned;

/// The whole file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    #[serde(default)]
    pub hypervisor: Hypervisor,
    #[serde(default)]
    pub guest: Vec<Spanned<Guest>>,
}

/// `[hypervisor]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hypervisor {
    pub shadow_frames: Option<Spanned<u32>>,
    pub min_frames: Option<Spanned<u32>>,
    pub low_frames: Option<Spanned<u32>>,
    pub high_frames: Option<Spanned<u32>>,
    pub stats_interval_ms: Option<Spanned<u32>>,
    pub audit_interval_ms: Option<Spanned<u32>>,
    pub escape: Option<Spanned<String>>,
    pub exit_when_done: Option<bool>,
}

/// `[[guest]]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    pub name: Option<Spanned<String>>,
    pub kernel: Option<Spanned<String>>,
    pub initrd: Option<Spanned<String>>,
    #[serde(default)]
    pub modules: Vec<Spanned<Module>>,
    pub cmdline: Option<Spanned<String>>,
    pub memory: Option<Spanned<String>>,
    pub vcpus: Option<Spanned<u32>>,
    #[serde(default)]
    pub cores: Vec<Spanned<u32>>,
    pub protocol: Option<Spanned<String>>,
    #[serde(default)]
    pub devices: Vec<Spanned<String>>,
    pub on_end: Option<Spanned<String>>,
    pub expect: Option<Spanned<String>>,
    pub shadow_guarantee: Option<Spanned<u32>>,
    pub shadow_cap: Option<Spanned<u32>>,
}

/// `{ file = "...", cmdline = "..." }` in `modules`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    pub file: Spanned<String>,
    pub cmdline: Option<Spanned<String>>,
}

/// How each key is written: the remedy where a value has the wrong type.
pub const EXAMPLES: &[(&str, &str)] = &[
    ("hypervisor", "[hypervisor]"),
    ("shadow_frames", "shadow_frames = 4096"),
    ("min_frames", "min_frames = 64"),
    ("low_frames", "low_frames = 256"),
    ("high_frames", "high_frames = 512"),
    ("stats_interval_ms", "stats_interval_ms = 10000"),
    ("audit_interval_ms", "audit_interval_ms = 1000"),
    ("escape", "escape = \"ctrl-a\""),
    ("exit_when_done", "exit_when_done = true"),
    ("guest", "[[guest]]"),
    ("name", "name = \"debian\""),
    ("kernel", "kernel = \"/boot/vmlinuz\""),
    ("initrd", "initrd = \"/boot/initrd.img\""),
    ("modules", "modules = [{ file = \"module.bin\", cmdline = \"\" }]"),
    ("file", "file = \"module.bin\""),
    ("cmdline", "cmdline = \"console=ttyS0,115200\""),
    ("memory", "memory = \"128M\""),
    ("vcpus", "vcpus = 1"),
    ("cores", "cores = [0, 1]"),
    ("protocol", "protocol = \"linux\""),
    ("devices", "devices = [\"exit-port\"]"),
    ("on_end", "on_end = \"stop\""),
    ("expect", "expect = \"power-off\""),
    ("shadow_guarantee", "shadow_guarantee = 256"),
    ("shadow_cap", "shadow_cap = 4096"),
];
