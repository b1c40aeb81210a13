//! Reads, builds or fetches every file of a plan, and packs them.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use machine::{
    load::{self, Module, Part, Parts, Protocol, RamLayout},
    manifest::{self as blob, FileArea, GuestConfig, Manifest, ModuleRef},
};

use crate::kernels::{self, Debian};
use crate::manifest::{File, FileName, Guest, Plan, Problem, Problems};
use crate::workspace;

/// The command line of Linux guests that give none.
const LINUX_CMDLINE: &str = "console=ttyS0,115200 quiet";

/// Payloads older than this are removed when a new one is made.
const PAYLOAD_KEPT: Duration = Duration::from_secs(3600);

/// How the payload is to be made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A person is at the console: Debian guests end in a shell. Else they run a script and power off.
    pub interactive: bool,
}

/// A packed payload.
#[derive(Clone, Debug)]
pub struct Payload {
    /// The blob's file, named by its content.
    pub path: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
    /// What the person should know: guests that were left out, and why.
    pub notes: Vec<String>,
}

/// Makes the payload of a plan.
pub fn assemble(plan: &Plan, options: &Options) -> Result<Payload> {
    let mut assembler =
        Assembler { plan, options, files: FileArea::new(), read: HashMap::new(), debian: None };
    let mut notes = Vec::new();
    let mut manifest = Manifest { hypervisor: plan.hypervisor.clone(), guests: Vec::new() };
    manifest.hypervisor.interactive = options.interactive;
    for guest in &plan.guests {
        match assembler.guest(guest)? {
            Found::Guest(config) => manifest.guests.push(*config),
            Found::LeftOut(reason) => {
                if !notes.contains(&reason) {
                    notes.push(reason);
                }
            }
        }
    }
    if manifest.guests.is_empty() {
        bail!("no guest is left to run: {}", notes.join("; "));
    }
    let packed = blob::pack(&manifest, &assembler.files)?;
    let folder = workspace::cache_folder("payload")?;
    prune(&folder);
    let unfinished = tempfile::NamedTempFile::new_in(&folder)?;
    fs::write(unfinished.path(), &packed)?;
    let path = folder.join(format!("{}.bin", workspace::content_key(&[unfinished.path()])?));
    unfinished.persist(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Payload { path, manifest, notes })
}

/// Removes payloads that no run can still be reading; what fails stays, it only costs space.
fn prune(folder: &Path) {
    let old = |path: &Path| {
        let age = fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()?;
        Some(age > PAYLOAD_KEPT)
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if old(&entry.path()) == Some(true) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

enum Found {
    Guest(Box<GuestConfig>),
    /// One line: why not, and what to do about it.
    LeftOut(String),
}

struct Assembler<'a> {
    plan: &'a Plan,
    options: &'a Options,
    files: FileArea,
    read: HashMap<PathBuf, Vec<u8>>,
    debian: Option<Result<Debian, String>>,
}

impl Assembler<'_> {
    fn guest(&mut self, guest: &Guest) -> Result<Found> {
        let wants_debian = guest.kernel.file == File::Debian
            || guest.initrd.as_ref().is_some_and(|it| it.file == File::Debian);
        if wants_debian && let Err(reason) = self.debian() {
            if self.plan.source.lenient {
                return Ok(Found::LeftOut(reason));
            }
            let what = format!("Debian's kernel cannot be had: {reason}");
            return Err(self
                .problem(&guest.kernel, &what, "wanted here", "give a kernel of your own")
                .into());
        }
        let kernel = self.bytes(&guest.kernel, Wanted::Kernel)?;
        let initrd = match &guest.initrd {
            Some(initrd) => Some(self.bytes(initrd, Wanted::Initramfs)?),
            None => None,
        };
        let mut modules = Vec::new();
        for (file, _) in &guest.modules {
            modules.push(self.bytes(file, Wanted::Kernel)?);
        }
        let Some(protocol) = guest.protocol.or_else(|| load::identify(&kernel)) else {
            let remedy = "give the file that a boot loader would start, such as /boot/vmlinuz-...";
            return Err(self.problem(&guest.kernel, "this is not a kernel", "here", remedy).into());
        };
        let cmdline = self.cmdline(guest, protocol);
        let parts = Parts {
            kernel: &kernel,
            initrd: initrd.as_deref(),
            modules: &modules
                .iter()
                .zip(&guest.modules)
                .map(|(bytes, (_, cmdline))| Module { bytes, cmdline })
                .collect::<Vec<_>>(),
            cmdline: &cmdline,
        };
        // The loader itself, over memory that forgets: whatever it would refuse at boot is refused here.
        if let Err(error) = load::check(protocol, &parts, &RamLayout::split(guest.memory_bytes), guest.vcpus)
        {
            let place = match error.part {
                Part::Initrd => guest.initrd.as_ref().unwrap_or(&guest.kernel),
                Part::Module(index) => guest.modules.get(index).map_or(&guest.kernel, |(file, _)| file),
                _ => &guest.kernel,
            };
            // The loader's errors end in what to do, behind a semicolon.
            let text = format!("guest `{}` cannot be loaded: {error}", guest.name);
            let (text, remedy) =
                text.rsplit_once("; ").unwrap_or((&text, "give another file, or the guest other settings"));
            return Err(self.problem(place, text, "here", remedy).into());
        }
        let config = GuestConfig {
            name: guest.name.clone(),
            protocol,
            kernel: self.files.add(&kernel),
            initrd: initrd.map(|bytes| self.files.add(&bytes)),
            modules: modules
                .iter()
                .zip(&guest.modules)
                .map(|(bytes, (_, cmdline))| ModuleRef {
                    file: self.files.add(bytes),
                    cmdline: cmdline.clone(),
                })
                .collect(),
            cmdline,
            memory_bytes: guest.memory_bytes,
            vcpus: guest.vcpus,
            cores: guest.cores.clone(),
            devices: guest.devices,
            on_end: guest.on_end,
            expect: guest.expect,
            shadow_guarantee_frames: guest.shadow_guarantee_frames,
            shadow_cap_frames: guest.shadow_cap_frames,
        };
        Ok(Found::Guest(Box::new(config)))
    }

    /// The command line, with what our own initramfs wants to know.
    fn cmdline(&self, guest: &Guest, protocol: Protocol) -> String {
        let default = if protocol == Protocol::Linux { LINUX_CMDLINE } else { "" };
        let mut cmdline = guest.cmdline.clone().unwrap_or_else(|| default.to_owned());
        if guest.initrd.as_ref().is_some_and(|initrd| initrd.file == File::Debian) {
            if !cmdline.split_whitespace().any(|word| word.starts_with("hostname=")) {
                cmdline += &format!(" hostname={}", guest.name);
            }
            if !self.options.interactive
                && !cmdline.split_whitespace().any(|word| word == kernels::SCRIPT_WORD)
            {
                cmdline += &format!(" {}", kernels::SCRIPT_WORD);
            }
        }
        cmdline.trim().to_owned()
    }

    fn bytes(&mut self, name: &FileName, wanted: Wanted) -> Result<Vec<u8>> {
        let path = match (&name.file, wanted) {
            (File::Host(path), _) => path.clone(),
            (File::Own(own), _) => own.build()?,
            (File::Debian, Wanted::Kernel) => self.debian().map_err(anyhow::Error::msg)?.kernel,
            (File::Debian, Wanted::Initramfs) => self.debian().map_err(anyhow::Error::msg)?.initramfs,
        };
        if let Some(known) = self.read.get(&path) {
            return Ok(known.clone());
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        self.read.insert(path, bytes.clone());
        Ok(bytes)
    }

    /// Debian's files, fetched at the first call.
    fn debian(&mut self) -> Result<Debian, String> {
        self.debian.get_or_insert_with(kernels::debian).clone()
    }

    fn problem(&self, at: &FileName, what: &str, label: &str, remedy: &str) -> Problems {
        Problems::new(&self.plan.source, vec![Problem::new(at.span.clone(), what, label, remedy)])
    }
}

#[derive(Clone, Copy)]
enum Wanted {
    Kernel,
    Initramfs,
}
