//! What is counted: each counter declared once, with its description.

/// Declares [`Event`]: `Variant name "description";`.
macro_rules! events {
    ($($variant:ident $name:literal $description:literal;)*) => {
        /// Something a core counts.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Event {
            $(#[doc = $description] $variant,)*
        }

        impl Event {
            /// Every event, in the order of declaration.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$variant),*];

            /// Its name in dumps: one word in lower case, with underscores.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One line that says what is counted.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self { $(Self::$variant => $description,)* }
            }
        }
    };
}

events! {
    EntryAborted "entries_aborted" "entries given up for a request that arrived on the way in";
    Idle "idle" "times a core had no guest to run";
    SliceEnd "slice_ends" "time slices used up";
    VcpuSwitch "vcpu_switches" "times a core changed to another vCPU";
    FaultShadow "faults_shadow" "page faults of the shadow tables, filled without the guest's knowledge";
    FaultGuest "faults_guest" "page faults that were the guest's own, reflected";
    Fill "fills" "shadow entries that were filled";
    Prefill "prefills" "shadow entries filled ahead of their first access";
    PageMade "pages_made" "shadow pages made";
    Zap "pages_zapped" "shadow pages zapped";
    Sync "syncs" "shadow pages brought up to date with the guest's table";
    Unsync "unsyncs" "shadow pages whose guest table was made writable";
    RootLoad "root_loads" "changes of root, and flushes that come as such";
    Invlpg "invlpgs" "addresses invalidated at a guest's request";
    InvlpgLooked "invlpgs_looked" "those of them where a shadow page was behind its guest's table";
    FlushLocal "flushes_local" "TLB tags flushed by their own core";
    ShootDown "shoot_downs" "flushes that other cores had to take part in";
    Reclaim "reclaims" "batches of shadow pages reclaimed";
    ReclaimedPage "reclaimed" "shadow pages reclaimed";
    Thrash "thrash" "shadow pages made again before as many others of the guest were reclaimed as it had";
    FramesShort "frames_short" "reservations of frames that were refused at first";
    Mmio "mmio" "accesses to device memory that were emulated";
    MmioMarked "mmio_marked" "accesses to device memory recognised by the mark in the shadow entry";
    PortRead "port_reads" "port reads";
    PortWrite "port_writes" "port writes";
    PortUnclaimed "ports_unclaimed" "accesses to ports that no device has";
    MsrUnknown "msrs_unknown" "accesses to MSRs that the guest does not have";
    Interrupt "interrupts" "external interrupts injected";
    Exception "exceptions" "exceptions injected";
    NmiInjected "nmis_injected" "non-maskable interrupts injected";
    GuestEnded "guests_ended" "guests that ended, for whatever reason";
    GuestStopped "guests_stopped" "guests stopped for what they did";
}

/// Declares the table of exit reasons: `number name "description";`.
macro_rules! exit_reasons {
    ($($number:literal $name:literal $description:literal;)*) => {
        /// Name and description by basic exit reason; `None` where the SDM has none.
        const EXITS: [Option<(&str, &str)>; EXIT_REASONS] = {
            let mut table = [None; EXIT_REASONS];
            $(table[$number] = Some((concat!("exit_", $name), $description));)*
            table[EXIT_REASONS - 1] = Some(("exit_other", "exits for a reason that is not in the table"));
            table
        };
    };
}

/// Counters for exits by reason: a power of two, so that any reason finds one by a mask alone. The last is for
/// all reasons without a name.
pub(super) const EXIT_REASONS: usize = 128;

/// A counter of exits, by basic exit reason: an unknown reason is counted, not refused.
#[derive(Clone, Copy)]
pub(super) struct ExitCounter(u8);

impl ExitCounter {
    /// For bits 15:0 of the exit reason field.
    #[inline]
    pub const fn new(basic_reason: u16) -> Self {
        Self(basic_reason as u8 & (EXIT_REASONS as u8 - 1))
    }

    /// `0..EXIT_REASONS`.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether this counter is among those that `shown` stands for: itself, or, for the last, one without a name.
    pub fn counts_as(self, shown: Self) -> bool {
        self.0 == shown.0 || (shown.index() == EXIT_REASONS - 1 && EXITS[self.index()].is_none())
    }

    /// All counters.
    pub fn each() -> impl Iterator<Item = Self> {
        (0..EXIT_REASONS as u16).map(Self::new)
    }

    /// Every counter that has a name: (itself, name, description), ascending by reason.
    pub fn all() -> impl Iterator<Item = (Self, &'static str, &'static str)> {
        (0u16..).zip(EXITS).filter_map(|(basic, exit)| {
            let (name, description) = exit?;
            Some((Self::new(basic), name, description))
        })
    }
}

// SDM volume 3, appendix "VMX Basic Exit Reasons".
exit_reasons! {
    0 "exception_nmi" "an exception, or an NMI of the host";
    1 "external_interrupt" "an interrupt of the host";
    2 "triple_fault" "triple fault";
    3 "init" "INIT signal";
    4 "sipi" "start-up IPI";
    5 "io_smi" "I/O system-management interrupt";
    6 "other_smi" "other system-management interrupt";
    7 "interrupt_window" "the guest can take an interrupt now";
    8 "nmi_window" "the guest can take an NMI now";
    9 "task_switch" "task switch";
    10 "cpuid" "CPUID";
    11 "getsec" "GETSEC";
    12 "hlt" "HLT";
    13 "invd" "INVD";
    14 "invlpg" "INVLPG";
    15 "rdpmc" "RDPMC";
    16 "rdtsc" "RDTSC";
    17 "rsm" "RSM";
    18 "vmcall" "VMCALL";
    19 "vmclear" "VMCLEAR";
    20 "vmlaunch" "VMLAUNCH";
    21 "vmptrld" "VMPTRLD";
    22 "vmptrst" "VMPTRST";
    23 "vmread" "VMREAD";
    24 "vmresume" "VMRESUME";
    25 "vmwrite" "VMWRITE";
    26 "vmxoff" "VMXOFF";
    27 "vmxon" "VMXON";
    28 "cr" "control-register access";
    29 "dr" "debug-register access";
    30 "io" "I/O instruction";
    31 "rdmsr" "RDMSR";
    32 "wrmsr" "WRMSR";
    33 "bad_guest_state" "entry failed: invalid guest state";
    34 "bad_msr_load" "entry failed: MSR loading";
    36 "mwait" "MWAIT";
    37 "monitor_trap" "monitor trap flag";
    39 "monitor" "MONITOR";
    40 "pause" "PAUSE";
    41 "entry_machine_check" "entry failed: machine check";
    43 "tpr" "TPR below its threshold";
    44 "apic_access" "access to the APIC page";
    45 "virtual_eoi" "virtualized EOI";
    46 "gdtr_idtr" "access to GDTR or IDTR";
    47 "ldtr_tr" "access to LDTR or TR";
    48 "ept_violation" "EPT violation";
    49 "ept_misconfiguration" "EPT misconfiguration";
    50 "invept" "INVEPT";
    51 "rdtscp" "RDTSCP";
    52 "preemption_timer" "the time slice is used up";
    53 "invvpid" "INVVPID";
    54 "wbinvd" "WBINVD or WBNOINVD";
    55 "xsetbv" "XSETBV";
    56 "apic_write" "write to the APIC page";
    57 "rdrand" "RDRAND";
    58 "invpcid" "INVPCID";
    59 "vmfunc" "VMFUNC";
    60 "encls" "ENCLS";
    61 "rdseed" "RDSEED";
    62 "pml_full" "page-modification log full";
    63 "xsaves" "XSAVES";
    64 "xrstors" "XRSTORS";
    65 "pconfig" "PCONFIG";
    66 "spp" "sub-page permission";
    67 "umwait" "UMWAIT";
    68 "tpause" "TPAUSE";
    69 "loadiwkey" "LOADIWKEY";
    70 "enclv" "ENCLV";
    72 "enqcmd_pasid" "ENQCMD PASID translation failure";
    73 "enqcmds_pasid" "ENQCMDS PASID translation failure";
    74 "bus_lock" "bus lock";
    75 "notify_window" "no window for an event in too long a time";
    76 "seamcall" "SEAMCALL";
    77 "tdcall" "TDCALL";
    78 "rdmsrlist" "RDMSRLIST";
}
