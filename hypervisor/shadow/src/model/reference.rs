//! The architecture's page walk and access rights, written from the SDM's text, for tests to compare with.
//!
//! Slow, and with nothing of the crate's own: neither its types nor its constants. All chapters named are of Intel SDM
//! Vol. 3.

/// CR0.WP: supervisor writes heed R/W.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging is on.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: eight-byte entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57: five levels in IA-32e mode.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.PCIDE: bits 11:0 of CR3 are a process-context identifier.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.SMEP: the supervisor fetches nothing from user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: the supervisor reads and writes user pages only where EFLAGS.AC says so.
pub const CR4_SMAP: u64 = 1 << 21;
/// IA32_EFER.LMA: IA-32e mode.
pub const EFER_LMA: u64 = 1 << 10;
/// IA32_EFER.NXE: execute-disable counts.
pub const EFER_NXE: u64 = 1 << 11;

/// The registers that translation depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// The PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
    /// MAXPHYADDR.
    pub maxphyaddr: u32,
    /// CPUID.80000001H:EDX.Page1GB.
    pub gib_pages: bool,
}

/// An access to memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    pub write: bool,
    pub fetch: bool,
    /// Made at CPL 3, explicitly.
    pub user: bool,
    /// An explicit supervisor access with EFLAGS.AC set.
    pub ac: bool,
}

/// The control bits that rights depend on.
#[derive(Clone, Copy, Debug)]
pub struct Controls {
    pub wp: bool,
    pub smep: bool,
    pub smap: bool,
    /// XD bits count (EFER.NXE, and a format that has them).
    pub xd: bool,
}

/// What the entries on a path say together: R/W and U/S set in every one, XD set in any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub all_writable: bool,
    pub all_user: bool,
    pub any_xd: bool,
}

impl Path {
    /// The path before its first entry.
    pub const OPEN: Path = Path { all_writable: true, all_user: true, any_xd: false };

    /// One entry further down.
    pub fn through(self, entry: u64) -> Path {
        Path {
            all_writable: self.all_writable && entry & 0b010 != 0,
            all_user: self.all_user && entry & 0b100 != 0,
            any_xd: self.any_xd || entry >> 63 == 1,
        }
    }
}

/// "Determination of Access Rights", sentence by sentence.
pub fn permitted(controls: Controls, path: Path, attempt: Attempt) -> bool {
    let executable = !(controls.xd && path.any_xd);
    if attempt.user {
        // "For user-mode accesses": never to a supervisor-mode address.
        if !path.all_user {
            return false;
        }
        if attempt.fetch {
            return executable;
        }
        return !attempt.write || path.all_writable;
    }
    // "For supervisor-mode accesses".
    if attempt.fetch {
        return executable && !(controls.smep && path.all_user);
    }
    if controls.smap && path.all_user && !attempt.ac {
        return false;
    }
    !attempt.write || !controls.wp || path.all_writable
}

/// The paging modes ("Paging Modes and Control Bits").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// CR0.PG is 0.
    None,
    /// 32-bit paging.
    Legacy,
    /// PAE paging.
    Pae,
    /// 4-level and 5-level paging.
    Long {
        /// 4 or 5.
        levels: u8,
    },
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// P is 0.
    Absent,
    /// A reserved bit is set.
    Reserved,
    /// It references the table at this address.
    Table(u64),
    /// It maps the page of `1 << shift` bytes at `base`.
    Page { base: u64, shift: u32 },
}

/// Where a translation leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The physical address.
    pub physical: u64,
    /// log2 of the page's bytes.
    pub shift: u32,
}

/// A page fault's error code ("Interrupt 14 - Page-Fault Exception (#PF)").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(pub u32);

/// The table that a walk begins at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Top {
    pub level: u8,
    pub table: u64,
}

impl Registers {
    /// The paging mode.
    pub fn format(&self) -> Format {
        if self.cr0 & CR0_PG == 0 {
            Format::None
        } else if self.cr4 & CR4_PAE == 0 {
            Format::Legacy
        } else if self.efer & EFER_LMA == 0 {
            Format::Pae
        } else {
            Format::Long { levels: if self.cr4 & CR4_LA57 == 0 { 4 } else { 5 } }
        }
    }

    /// The control bits that rights depend on, as they count in the present mode.
    pub fn controls(&self) -> Controls {
        Controls {
            wp: self.cr0 & CR0_WP != 0,
            smep: self.cr4 & CR4_SMEP != 0,
            smap: self.cr4 & CR4_SMAP != 0,
            // "Execute-disable" is no part of 32-bit paging.
            xd: self.cr4 & CR4_PAE != 0 && self.efer & EFER_NXE != 0,
        }
    }

    /// The PCID of the address space in use: 0 while CR4.PCIDE is 0.
    pub fn pcid(&self) -> u16 {
        if self.cr4 & CR4_PCIDE == 0 { 0 } else { (self.cr3 & 0xfff) as u16 }
    }

    /// Where the walk of `linear` begins; `None` where a PDPTE register is not present.
    pub fn top(&self, linear: u64) -> Option<Top> {
        match self.format() {
            Format::None => None,
            Format::Legacy => Some(Top { level: 2, table: self.cr3 & 0xffff_f000 }),
            Format::Pae => {
                let pdpte = self.pdpte[(linear >> 30 & 3) as usize];
                (pdpte & 1 != 0).then_some(Top { level: 2, table: pdpte & 0x000f_ffff_ffff_f000 })
            }
            Format::Long { levels } => Some(Top { level: levels, table: self.cr3 & 0x000f_ffff_ffff_f000 }),
        }
    }

    /// Where the entry for `linear` lies in the table of `level` at `table`.
    pub fn entry_address(&self, level: u8, table: u64, linear: u64) -> u64 {
        match self.format() {
            Format::Legacy if level == 2 => table + 4 * (linear >> 22 & 0x3ff),
            Format::Legacy => table + 4 * (linear >> 12 & 0x3ff),
            _ => table + 8 * (linear >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff),
        }
    }

    /// Bytes of an entry.
    pub fn entry_bytes(&self) -> u64 {
        if self.format() == Format::Legacy { 4 } else { 8 }
    }

    /// What `entry`, of the table of `level`, says: the tables "Format of ..." of the chapter on paging.
    pub fn meaning(&self, level: u8, entry: u64) -> Meaning {
        if entry & 1 == 0 {
            return Meaning::Absent;
        }
        let page_size = entry & 0x80 != 0;
        if self.format() == Format::Legacy {
            if level == 2 && page_size && self.cr4 & CR4_PSE != 0 {
                // PSE-36, for M = min(40, MAXPHYADDR): "Bits (M-20):13: bits (M-1):32 of physical address";
                // "Bits 21:(M-19): reserved".
                let m = self.maxphyaddr.min(40);
                let reserved: u64 = (m - 19..=21).map(|bit| 1 << bit).sum();
                if entry & reserved != 0 {
                    return Meaning::Reserved;
                }
                let base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
                return Meaning::Page { base, shift: 22 };
            }
            let base = entry & 0xffff_f000;
            return if level == 2 { Meaning::Table(base) } else { Meaning::Page { base, shift: 12 } };
        }
        // "If the P flag is 1 and bits 51:MAXPHYADDR ...", and in PAE paging 62:MAXPHYADDR.
        let last = if self.format() == Format::Pae { 62 } else { 51 };
        let mut reserved: u64 = (self.maxphyaddr..=last).map(|bit| 1 << bit).sum();
        if self.efer & EFER_NXE == 0 {
            reserved |= 1 << 63;
        }
        let shift = match level {
            1 => Some(12),
            2 if page_size => Some(21),
            3 if page_size && self.gib_pages => Some(30),
            _ => None,
        };
        match shift {
            // "Bits 20:13" and "bits 29:13: reserved"; bit 12 is PAT.
            Some(shift) if shift > 12 => reserved |= (13..shift).map(|bit| 1_u64 << bit).sum::<u64>(),
            Some(_) => {}
            // "Reserved (must be 0)", or, at level 3 without 1 GiB pages, the same.
            None if level > 2 => reserved |= 0x80,
            None => {}
        }
        if entry & reserved != 0 {
            return Meaning::Reserved;
        }
        let frame = entry & 0x000f_ffff_ffff_f000;
        match shift {
            Some(shift) => Meaning::Page { base: frame & !((1 << shift) - 1), shift },
            None => Meaning::Table(frame),
        }
    }

    /// The error code of a fault of `attempt`.
    fn fault(&self, attempt: Attempt, present: bool, reserved: bool) -> Fault {
        // I/D: "it was an instruction fetch and either (1) CR4.SMEP = 1 or (2) CR4.PAE = 1 and IA32_EFER.NXE = 1".
        let fetch = attempt.fetch && (self.cr4 & CR4_SMEP != 0 || self.controls().xd);
        Fault(
            u32::from(present)
                | u32::from(attempt.write) << 1
                | u32::from(attempt.user) << 2
                | u32::from(reserved) << 3
                | u32::from(fetch) << 4,
        )
    }

    /// Translates `linear`. `load` reads the entry at a physical address; what is no RAM reads as 0. `used` is told
    /// of each entry on the path: its level and address.
    ///
    /// # Errors
    /// The error code of the page fault.
    pub fn translate(
        &self,
        linear: u64,
        attempt: Attempt,
        load: impl Fn(u64) -> u64,
        mut used: impl FnMut(u8, u64),
    ) -> Result<Target, Fault> {
        if self.format() == Format::None {
            return Ok(Target { physical: linear & 0xffff_ffff, shift: 32 });
        }
        let Some(Top { mut level, mut table }) = self.top(linear) else {
            return Err(self.fault(attempt, false, false));
        };
        let mut path = Path::OPEN;
        loop {
            let address = self.entry_address(level, table, linear);
            let entry = load(address);
            match self.meaning(level, entry) {
                Meaning::Absent => return Err(self.fault(attempt, false, false)),
                Meaning::Reserved => return Err(self.fault(attempt, true, true)),
                Meaning::Table(next) => {
                    used(level, address);
                    path = path.through(entry);
                    table = next;
                    level -= 1;
                }
                Meaning::Page { base, shift } => {
                    path = path.through(entry);
                    if !permitted(self.controls(), path, attempt) {
                        return Err(self.fault(attempt, true, false));
                    }
                    used(level, address);
                    let physical = base | linear & ((1 << shift) - 1);
                    return Ok(Target { physical, shift });
                }
            }
        }
    }

    /// What the PDPTE registers are loaded with from `cr3`; `None` if that is #GP(0) ("PDPTE Registers": "If any PDPTE
    /// sets both the P flag and any reserved bit").
    pub fn pdptes(&self, cr3: u64, load: impl Fn(u64) -> u64) -> Option<[u64; 4]> {
        let pdptes: [u64; 4] = core::array::from_fn(|i| load((cr3 & 0xffff_ffe0) + 8 * i as u64));
        // "Format of a PAE Page-Directory-Pointer-Table Entry": bits 2:1, 8:5, 63:MAXPHYADDR.
        let reserved = 0b1_1110_0110 | (self.maxphyaddr..64).map(|bit| 1_u64 << bit).sum::<u64>();
        pdptes.iter().all(|pdpte| pdpte & 1 == 0 || pdpte & reserved == 0).then_some(pdptes)
    }
}
