//! The guest's CPUID: an allow-list over the host's leaves.
//!
//! A bit is offered only if it works in the guest without us, or its VMX control is on, or it is emulated. The
//! answers are computed once per guest; a query is an index and, for four leaves, a patch of what depends on
//! the vCPU's state. Leaves and bits as in SDM Vol. 2 "CPUID—CPU Identification".

use alloc::vec::Vec;

use super::control::{ControlModel, Cr4, Efer, xcr0};
use super::msr::MsrModel;

/// EAX, EBX, ECX, EDX.
pub type Registers = [u32; 4];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What the hypervisor can offer one guest beside the host's own features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// The "enable RDTSCP" control is on; RDPID hangs on it too.
    pub rdtscp: bool,
    /// The "enable INVPCID" control is on.
    pub invpcid: bool,
    /// The "enable XSAVES/XRSTORS" control is on.
    pub xsaves: bool,
    /// The shadow MMU tells PCIDs apart.
    pub pcid: bool,
    /// SPEC_CTRL is switched with the vCPU and PRED_CMD is forwarded.
    pub speculation_control: bool,
    /// The guest's TSC runs at one rate whatever the host does.
    pub invariant_tsc: bool,
    /// XCR0 components that the hypervisor switches.
    pub xcr0: u64,
    /// The host's IA32_ARCH_CAPABILITIES, where it has one.
    pub arch_capabilities: Option<u64>,
    /// The host's microcode revision: the upper half of IA32_BIOS_SIGN_ID.
    pub microcode_revision: u32,
    /// Rate of the guest's TSC, kHz; 0 if not known.
    pub tsc_khz: u32,
    /// Rate of the guest's local-APIC timer before its divider, kHz.
    pub apic_khz: u32,
    /// Virtual processors, 1..=255. Their APIC ids are 0..vcpus.
    pub vcpus: u32,
}

impl Default for Offered {
    /// Nothing that needs a control; x87, SSE, AVX and AVX-512 state; one vCPU.
    fn default() -> Self {
        Self {
            rdtscp: false,
            invpcid: false,
            xsaves: false,
            pcid: false,
            speculation_control: false,
            invariant_tsc: false,
            xcr0: xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512,
            arch_capabilities: None,
            microcode_revision: 0,
            tsc_khz: 0,
            apic_khz: 0,
            vcpus: 1,
        }
    }
}

/// The state of a vCPU that shows in CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    /// Its APIC id.
    pub apic_id: u32,
    /// Its local APIC is globally enabled (IA32_APIC_BASE bit 11).
    pub apic_enabled: bool,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
}

/// First leaf of the hypervisor's own range.
pub const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// "UmbraUmbra", NUL-padded, as EBX, ECX, EDX of [`HYPERVISOR_BASE`].
pub const SIGNATURE: [u8; 12] = *b"UmbraUmbra\0\0";
/// The leaf that says the TSC's rate in EAX and the local APIC timer's in EBX, both in kHz.
pub const HYPERVISOR_TIMING: u32 = 0x4000_0010;

const EXTENDED_BASE: u32 = 0x8000_0000;
const EXTENDED_MAX: u32 = 0x8000_0008;
/// Highest basic leaf ever offered: TSC and crystal ratio.
const BASIC_MAX: usize = BASIC_LAST as usize;
const BASIC_LAST: u32 = 0x15;
/// XSAVE components that are looked at.
const COMPONENTS: usize = 32;

const fn bits<const N: usize>(positions: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut n = 0;
    while n < N {
        mask |= 1 << positions[n];
        n += 1;
    }
    mask
}

/// Leaf 1 ECX, straight from the host: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT,
/// AESNI, XSAVE, AVX, F16C, RDRAND.
const LEAF1_ECX: u32 = bits([0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
const LEAF1_ECX_PCID: u32 = 1 << 17;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_XSAVE: u32 = 1 << 26;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_AVX: u32 = 1 << 28;
/// AVX and what is built on it: FMA, AVX, F16C.
const LEAF1_ECX_NEEDS_AVX: u32 = bits([12, 28, 29]);
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX, straight from the host: FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PSE-36, CLFSH, MMX,
/// FXSR, SSE, SSE2, SS.
const LEAF1_EDX: u32 = bits([0, 1, 2, 3, 4, 5, 6, 8, 11, 13, 15, 17, 19, 23, 24, 25, 26, 27]);
/// Emulated, so there whatever the host has: MCE, APIC, MTRR, MCA, PAT.
const LEAF1_EDX_EMULATED: u32 = bits([7, 9, 12, 14, 16]);
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 6 EAX: ARAT. The emulated timer never stops.
const LEAF6_EAX_ARAT: u32 = 1 << 2;
/// Leaf 7.0 EBX: FSGSBASE, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, deprecated FCS/FDS, AVX512F, AVX512DQ,
/// RDSEED, ADX, SMAP, AVX512_IFMA, CLFLUSHOPT, CLWB, AVX512PF, AVX512ER, AVX512CD, SHA, AVX512BW, AVX512VL.
const LEAF7_EBX: u32 =
    bits([0, 3, 5, 6, 7, 8, 9, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]);
const LEAF7_EBX_TSC_ADJUST: u32 = 1 << 1;
const LEAF7_EBX_INVPCID: u32 = 1 << 10;
const LEAF7_EBX_AVX2: u32 = 1 << 5;
const LEAF7_EBX_AVX512: u32 = bits([16, 17, 21, 26, 27, 28, 30, 31]);
/// Leaf 7.0 ECX: AVX512_VBMI, UMIP, AVX512_VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512_VNNI, AVX512_BITALG,
/// AVX512_VPOPCNTDQ, CLDEMOTE, MOVDIRI, MOVDIR64B.
const LEAF7_ECX: u32 = bits([1, 2, 6, 8, 9, 10, 11, 12, 14, 25, 27, 28]);
const LEAF7_ECX_RDPID: u32 = 1 << 22;
const LEAF7_ECX_AVX: u32 = bits([9, 10]);
const LEAF7_ECX_AVX512: u32 = bits([1, 6, 11, 12, 14]);
/// Leaf 7.0 EDX: AVX512_4VNNIW, AVX512_4FMAPS, FSRM, AVX512_VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX512_FP16.
const LEAF7_EDX: u32 = bits([2, 3, 4, 8, 10, 14, 23]);
const LEAF7_EDX_AVX512: u32 = bits([2, 3, 8, 23]);
/// IBRS and IBPB, STIBP, SSBD.
const LEAF7_EDX_SPECULATION: u32 = bits([26, 27, 31]);
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
/// Leaf 7.1 EAX: SHA512, SM3, SM4, AVX-VNNI, AVX512_BF16, fast zero-length MOVSB, fast short STOSB and CMPSB,
/// AVX-IFMA.
const LEAF7_1_EAX: u32 = bits([0, 1, 2, 4, 5, 10, 11, 12, 23]);
const LEAF7_1_EAX_AVX: u32 = bits([0, 1, 2, 4, 23]);
const LEAF7_1_EAX_AVX512: u32 = 1 << 5;
/// Leaf 7.1 EDX: AVX-VNNI-INT8, AVX-NE-CONVERT, PREFETCHI.
const LEAF7_1_EDX: u32 = bits([4, 5, 14]);
const LEAF7_1_EDX_AVX: u32 = bits([4, 5]);
/// Leaf 0xD.1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
const LEAFD_1_EAX: u32 = bits([0, 1, 2]);
const LEAFD_1_EAX_XSAVES: u32 = 1 << 3;
/// Leaf 0x80000001 ECX: LAHF in 64-bit mode, LZCNT, PREFETCHW.
const EXTENDED1_ECX: u32 = bits([0, 5, 8]);
/// Leaf 0x80000001 EDX: SYSCALL, NX, 1 GiB pages, long mode.
const EXTENDED1_EDX: u32 = bits([11, 20, 26, 29]);
const EXTENDED1_EDX_RDTSCP: u32 = 1 << 27;
const EXTENDED7_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// IA32_ARCH_CAPABILITIES bits that say something about the processor and come with no MSR to program: RDCL_NO,
/// RSBA, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO,
/// FB_CLEAR, RRSBA, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, RFDS_CLEAR.
const ARCH_CAPABILITIES_SAFE: u64 =
    bits([0, 2, 3, 4, 5, 6, 8, 13, 14, 15, 17, 19, 20, 24, 26, 27, 28]) as u64;
/// IBRS_ALL, which speaks of SPEC_CTRL.
const ARCH_CAPABILITIES_IBRS_ALL: u64 = 1 << 1;

/// Where the answers of a leaf are: `count` of them, one per subleaf, from `first` on. Count 0: not offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    first: u8,
    count: u8,
    /// Every subleaf gets the one answer: the leaf ignores ECX.
    any_subleaf: bool,
}

/// One XSAVE component beyond x87 and SSE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    size_bytes: u32,
    offset_bytes: u32,
    aligned: bool,
}

/// Slots for answers that never change: more than [`BASIC_LAST`], so that each basic leaf has its own.
const FIXED_SLOTS: usize = 32;

/// An answer that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(32))]
struct Fixed {
    leaf: u32,
    answer: Registers,
}

impl Fixed {
    /// No leaf has this number: its slot is that of leaf 31.
    const NONE: Self = Self { leaf: u32::MAX - FIXED_SLOTS as u32, answer: [0; 4] };
}

/// What one guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidModel {
    /// Answers that depend on neither the subleaf nor the processor's state, by the low bits of the leaf.
    fixed: [Fixed; FIXED_SLOTS],
    answers: Vec<Registers>,
    basic: [Slot; BASIC_MAX + 1],
    extended: [Slot; (EXTENDED_MAX - EXTENDED_BASE) as usize + 1],
    basic_max: u32,
    signature: Registers,
    timing: Registers,
    components: [Component; COMPONENTS],
    xcr0_allowed: u64,
    arch_capabilities: Option<u64>,
    offered: Offered,
}

impl CpuidModel {
    /// The model for a guest on a host that answers CPUID so. `host(leaf, subleaf)` is called a few dozen times.
    #[must_use]
    pub fn new(host: impl Fn(u32, u32) -> Registers, offered: &Offered) -> Self {
        let mut offered = *offered;
        offered.vcpus = offered.vcpus.clamp(1, 255);
        let host_max = host(0, 0)[EAX];
        let read = |leaf: u32, subleaf: u32| if leaf <= host_max { host(leaf, subleaf) } else { [0; 4] };

        let mut model = Self {
            fixed: [Fixed::NONE; FIXED_SLOTS],
            answers: Vec::with_capacity(48),
            basic: [Slot::default(); BASIC_MAX + 1],
            extended: [Slot::default(); (EXTENDED_MAX - EXTENDED_BASE) as usize + 1],
            basic_max: 0,
            signature: signature(),
            timing: [offered.tsc_khz, offered.apic_khz, 0, 0],
            components: [Component::default(); COMPONENTS],
            xcr0_allowed: allowed_xcr0(&read, offered.xcr0),
            arch_capabilities: offered.arch_capabilities.map(|host| {
                let ibrs = if offered.speculation_control { ARCH_CAPABILITIES_IBRS_ALL } else { 0 };
                host & (ARCH_CAPABILITIES_SAFE | ibrs)
            }),
            offered,
        };
        model.set(1, model.features(read(1, 0)));
        model.set(2, read(2, 0));
        model.set_each(4, cache_leaves(&read, offered.vcpus));
        model.set(6, [LEAF6_EAX_ARAT, 0, 0, 0]);
        if host_max >= 7 {
            model.set_each(7, model.structured_features(&read));
        }
        model.set_each(0xb, topology(offered.vcpus));
        if model.xcr0_allowed != 0 {
            let leaves = model.extended_state(&read);
            model.set_each(0xd, leaves);
        }
        if let Some(ratio) = crystal_ratio(offered.tsc_khz, offered.apic_khz) {
            model.set(0x15, ratio);
        }
        let vendor = host(0, 0);
        model.set(0, [model.basic_max, vendor[EBX], vendor[ECX], vendor[EDX]]);
        model.set_extended(&host);
        for leaf in 0..=BASIC_MAX {
            let slot = model.basic[leaf];
            if leaf != 1 && (slot.any_subleaf || slot.count == 0) {
                model.fixed[leaf] = Fixed { leaf: leaf as u32, answer: model.stored(leaf, 0) };
            }
        }
        model
    }

    /// What CPUID answers. Leaves out of range answer as Intel's do: like the highest basic leaf.
    #[must_use]
    #[inline]
    pub fn query(&self, leaf: u32, subleaf: u32, state: &Dynamic) -> Registers {
        match self.fixed(leaf) {
            Some(answer) => *answer,
            None => self.look_up(leaf, subleaf, state),
        }
    }

    /// What CPUID answers for a leaf that is the same always and everywhere; `None` for others. For the exit path:
    /// half a dozen instructions.
    #[must_use]
    #[inline(always)]
    pub fn fixed(&self, leaf: u32) -> Option<&Registers> {
        let slot = &self.fixed[leaf as usize % FIXED_SLOTS];
        (slot.leaf == leaf).then_some(&slot.answer)
    }

    #[inline(never)]
    fn look_up(&self, leaf: u32, subleaf: u32, state: &Dynamic) -> Registers {
        let (leaf, slot) = match leaf {
            0..=BASIC_LAST => (leaf, self.basic[leaf as usize]),
            EXTENDED_BASE..=EXTENDED_MAX => (leaf, self.extended[(leaf - EXTENDED_BASE) as usize]),
            HYPERVISOR_BASE => return self.signature,
            HYPERVISOR_TIMING => return self.timing,
            0x4000_0001..=0x4fff_ffff => return [0; 4],
            // Between our highest leaf and 0x15, `basic` is empty; beyond it the same answer is given.
            _ => (self.basic_max, self.basic[self.basic_max as usize]),
        };
        let subleaf = if slot.any_subleaf { 0 } else { subleaf };
        let mut answer = if subleaf < u32::from(slot.count) {
            self.answers[usize::from(slot.first) + subleaf as usize]
        } else {
            [0; 4]
        };
        match leaf {
            1 => {
                answer[EBX] |= state.apic_id << 24;
                if state.osxsave {
                    answer[ECX] |= LEAF1_ECX_OSXSAVE;
                }
                if !state.apic_enabled {
                    answer[EDX] &= !LEAF1_EDX_APIC;
                }
            }
            0xb if slot.count != 0 => {
                answer[ECX] |= subleaf & 0xff;
                answer[EDX] = state.apic_id;
            }
            0xd if slot.count != 0 => match subleaf {
                0 => answer[EBX] = self.standard_size(state.xcr0),
                1 if answer[EAX] & (LEAFD_1_EAX_XSAVES | 1 << 1) != 0 => {
                    answer[EBX] = self.compacted_size(state.xcr0 | state.xss);
                }
                _ => {}
            },
            _ => {}
        }
        answer
    }

    /// What the guest may set in its control registers.
    #[must_use]
    pub fn control_model(&self) -> ControlModel {
        let one = self.stored(1, 0);
        let seven = self.stored(7, 0);
        let extended = self.stored_extended(1);
        let mut cr4 = Cr4::TSD | Cr4::PCE | Cr4::MCE;
        let mut allow = |offered: bool, bits: Cr4| {
            if offered {
                cr4 |= bits;
            }
        };
        let has = |register: u32, bit: u32| register >> bit & 1 != 0;
        allow(has(one[EDX], 1), Cr4::VME | Cr4::PVI);
        allow(has(one[EDX], 2), Cr4::DE);
        allow(has(one[EDX], 3), Cr4::PSE);
        allow(has(one[EDX], 6), Cr4::PAE);
        allow(has(one[EDX], 13), Cr4::PGE);
        allow(has(one[EDX], 24), Cr4::OSFXSR);
        allow(has(one[EDX], 25), Cr4::OSXMMEXCPT);
        allow(has(one[ECX], 17), Cr4::PCIDE);
        allow(has(one[ECX], 26), Cr4::OSXSAVE);
        allow(has(seven[EBX], 0), Cr4::FSGSBASE);
        allow(has(seven[EBX], 7), Cr4::SMEP);
        allow(has(seven[EBX], 20), Cr4::SMAP);
        allow(has(seven[ECX], 2), Cr4::UMIP);
        let mut efer = Efer::empty();
        for (bit, flags) in [(11, Efer::SCE), (20, Efer::NXE), (29, Efer::LME)] {
            if has(extended[EDX], bit) {
                efer |= flags;
            }
        }
        ControlModel {
            cr4_allowed: cr4,
            efer_allowed: efer,
            xcr0_allowed: self.xcr0_allowed,
            physical_bits: self.physical_bits(),
        }
    }

    /// What the guest's model-specific registers are to be.
    #[must_use]
    pub fn msr_model(&self) -> MsrModel {
        MsrModel {
            physical_bits: self.physical_bits(),
            arch_capabilities: self
                .arch_capabilities
                .filter(|_| self.stored(7, 0)[EDX] & LEAF7_EDX_ARCH_CAPABILITIES != 0),
            speculation_control: self.stored(7, 0)[EDX] & LEAF7_EDX_SPECULATION != 0,
            rdtscp: self.stored_extended(1)[EDX] & EXTENDED1_EDX_RDTSCP != 0,
            xsaves: self.stored(0xd, 1)[EAX] & LEAFD_1_EAX_XSAVES != 0,
            microcode_revision: self.offered.microcode_revision,
            tsc_khz: self.offered.tsc_khz,
        }
    }

    /// The guest's MAXPHYADDR, 36..=52: the host's own.
    #[must_use]
    pub fn physical_bits(&self) -> u8 {
        self.stored_extended(8)[EAX] as u8
    }

    fn stored(&self, leaf: usize, subleaf: u8) -> Registers {
        let slot = self.basic[leaf];
        if subleaf < slot.count { self.answers[usize::from(slot.first + subleaf)] } else { [0; 4] }
    }

    fn stored_extended(&self, leaf: usize) -> Registers {
        let slot = self.extended[leaf];
        if slot.count != 0 { self.answers[usize::from(slot.first)] } else { [0; 4] }
    }

    fn append(&mut self, answers: &[Registers], any_subleaf: bool) -> Slot {
        // Some 40 answers in all: the casts cannot lose anything.
        let slot = Slot { first: self.answers.len() as u8, count: answers.len() as u8, any_subleaf };
        self.answers.extend_from_slice(answers);
        slot
    }

    fn set(&mut self, leaf: u32, answer: Registers) {
        self.basic[leaf as usize] = self.append(&[answer], true);
        self.basic_max = self.basic_max.max(leaf);
    }

    fn set_each(&mut self, leaf: u32, answers: Vec<Registers>) {
        self.basic[leaf as usize] = self.append(&answers, false);
        self.basic_max = self.basic_max.max(leaf);
    }

    fn avx(&self) -> bool {
        self.xcr0_allowed & xcr0::AVX != 0
    }

    fn avx512(&self) -> bool {
        self.xcr0_allowed & xcr0::AVX512 == xcr0::AVX512
    }

    fn features(&self, host: Registers) -> Registers {
        let mut ecx = host[ECX] & LEAF1_ECX;
        if self.offered.pcid {
            ecx |= host[ECX] & LEAF1_ECX_PCID;
        }
        if self.xcr0_allowed == 0 {
            ecx &= !LEAF1_ECX_XSAVE;
        }
        if !self.avx() {
            ecx &= !LEAF1_ECX_NEEDS_AVX;
        }
        ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
        let mut edx = host[EDX] & LEAF1_EDX | LEAF1_EDX_EMULATED;
        let mut ebx = host[EBX] & 0xffff;
        if self.offered.vcpus > 1 {
            edx |= LEAF1_EDX_HTT;
            ebx |= self.offered.vcpus.next_power_of_two().min(255) << 16;
        } else {
            ebx |= 1 << 16;
        }
        [host[EAX], ebx, ecx, edx]
    }

    fn structured_features(&self, read: &impl Fn(u32, u32) -> Registers) -> Vec<Registers> {
        let host = read(7, 0);
        let mut ebx = host[EBX] & LEAF7_EBX | LEAF7_EBX_TSC_ADJUST;
        let mut ecx = host[ECX] & LEAF7_ECX;
        let mut edx = host[EDX] & LEAF7_EDX;
        let one = if host[EAX] >= 1 { read(7, 1) } else { [0; 4] };
        let mut one = [one[EAX] & LEAF7_1_EAX, 0, 0, one[EDX] & LEAF7_1_EDX];
        // INVPCID without PCID is legal, but no kernel expects it.
        if self.offered.invpcid && self.offered.pcid {
            ebx |= host[EBX] & LEAF7_EBX_INVPCID;
        }
        if self.offered.rdtscp {
            ecx |= host[ECX] & LEAF7_ECX_RDPID;
        }
        if self.offered.speculation_control {
            edx |= host[EDX] & LEAF7_EDX_SPECULATION;
        }
        if self.arch_capabilities.is_some() {
            edx |= LEAF7_EDX_ARCH_CAPABILITIES;
        }
        if !self.avx() {
            ebx &= !LEAF7_EBX_AVX2;
            ecx &= !LEAF7_ECX_AVX;
            one[EAX] &= !LEAF7_1_EAX_AVX;
            one[EDX] &= !LEAF7_1_EDX_AVX;
        }
        if !self.avx512() {
            ebx &= !LEAF7_EBX_AVX512;
            ecx &= !LEAF7_ECX_AVX512;
            edx &= !LEAF7_EDX_AVX512;
            one[EAX] &= !LEAF7_1_EAX_AVX512;
        }
        if host[EAX] == 0 {
            return alloc::vec![[0, ebx, ecx, edx]];
        }
        alloc::vec![[1, ebx, ecx, edx], one]
    }

    fn extended_state(&mut self, read: &impl Fn(u32, u32) -> Registers) -> Vec<Registers> {
        let allowed = self.xcr0_allowed;
        for index in 2..COMPONENTS {
            if allowed >> index & 1 != 0 {
                let [size_bytes, offset_bytes, flags, _] = read(0xd, index as u32);
                self.components[index] = Component { size_bytes, offset_bytes, aligned: flags & 1 << 1 != 0 };
            }
        }
        let xsaves = if self.offered.xsaves { LEAFD_1_EAX_XSAVES } else { 0 };
        let mut leaves = alloc::vec![
            [allowed as u32, 0, self.standard_size(allowed), (allowed >> 32) as u32],
            [read(0xd, 1)[EAX] & (LEAFD_1_EAX | xsaves), 0, 0, 0],
        ];
        let highest = 63 - allowed.leading_zeros() as usize;
        for component in &self.components[2..COMPONENTS.min(highest + 1).max(2)] {
            let aligned = if component.aligned { 1 << 1 } else { 0 };
            leaves.push([component.size_bytes, component.offset_bytes, aligned, 0]);
        }
        leaves
    }

    /// Bytes of an XSAVE area in standard format: computed, not the host's word, so that it fits the components.
    fn standard_size(&self, features: u64) -> u32 {
        let mut size = 576;
        for (index, component) in self.components.iter().enumerate() {
            if features >> index & 1 != 0 {
                size = size.max(component.offset_bytes.saturating_add(component.size_bytes));
            }
        }
        size
    }

    /// Bytes of an XSAVE area in compacted format (SDM Vol. 1 "Compacted Format").
    fn compacted_size(&self, features: u64) -> u32 {
        let mut size: u32 = 576;
        for (index, component) in self.components.iter().enumerate() {
            if features >> index & 1 != 0 && component.size_bytes != 0 {
                if component.aligned {
                    size = size.checked_next_multiple_of(64).unwrap_or(size);
                }
                size = size.saturating_add(component.size_bytes);
            }
        }
        size
    }

    fn set_extended(&mut self, host: &impl Fn(u32, u32) -> Registers) {
        let host_max = host(EXTENDED_BASE, 0)[EAX].clamp(EXTENDED_BASE, EXTENDED_MAX);
        let read = |leaf: u32| if leaf <= host_max { host(leaf, 0) } else { [0; 4] };
        for leaf in EXTENDED_BASE..=EXTENDED_MAX {
            let host = read(leaf);
            let answer = match leaf - EXTENDED_BASE {
                0 => [EXTENDED_MAX, 0, 0, 0],
                1 => {
                    let rdtscp = if self.offered.rdtscp { EXTENDED1_EDX_RDTSCP } else { 0 };
                    [0, 0, host[ECX] & EXTENDED1_ECX, host[EDX] & (EXTENDED1_EDX | rdtscp)]
                }
                // The brand string, and the cache of level 2.
                2..=4 => host,
                6 => [0, 0, host[ECX], 0],
                7 => {
                    let invariant = if self.offered.invariant_tsc { EXTENDED7_EDX_INVARIANT_TSC } else { 0 };
                    [0, 0, 0, host[EDX] & invariant]
                }
                8 => {
                    // 36 bits is what the SDM gives a processor that has no such leaf.
                    let physical = match host[EAX] & 0xff {
                        0 => 36,
                        bits => bits.clamp(32, 52),
                    };
                    // Linear addresses have 48 bits: LA57 is not offered.
                    [48 << 8 | physical, 0, 0, 0]
                }
                _ => [0; 4],
            };
            self.extended[(leaf - EXTENDED_BASE) as usize] = self.append(&[answer], true);
        }
    }
}

fn signature() -> Registers {
    let word =
        |n: usize| u32::from_le_bytes([SIGNATURE[n], SIGNATURE[n + 1], SIGNATURE[n + 2], SIGNATURE[n + 3]]);
    [HYPERVISOR_TIMING, word(0), word(4), word(8)]
}

/// XCR0 components that the host has and we switch, made consistent; 0 where the host has no XSAVE.
fn allowed_xcr0(read: &impl Fn(u32, u32) -> Registers, switched: u64) -> u64 {
    let features = read(1, 0)[ECX];
    if features & LEAF1_ECX_XSAVE == 0 {
        return 0;
    }
    let leaf = read(0xd, 0);
    let mut allowed = u64::from(leaf[EAX]) & switched & (xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512);
    if allowed & (xcr0::X87 | xcr0::SSE) != xcr0::X87 | xcr0::SSE {
        return 0;
    }
    if features & LEAF1_ECX_AVX == 0 {
        allowed &= !xcr0::AVX;
    }
    if allowed & xcr0::AVX == 0 || allowed & xcr0::AVX512 != xcr0::AVX512 {
        allowed &= !xcr0::AVX512;
    }
    allowed
}

/// Bits of an APIC id that tell vCPUs apart.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// One package; every vCPU a core of one thread.
fn topology(vcpus: u32) -> Vec<Registers> {
    alloc::vec![[0, 1, 1 << 8, 0], [id_bits(vcpus), vcpus, 2 << 8, 0]]
}

/// The host's caches, shared as the guest's vCPUs would: levels 1 and 2 private, the rest common.
fn cache_leaves(read: &impl Fn(u32, u32) -> Registers, vcpus: u32) -> Vec<Registers> {
    let span = vcpus.next_power_of_two();
    let mut leaves = Vec::new();
    for subleaf in 0..8 {
        let [eax, ebx, ecx, edx] = read(4, subleaf);
        if eax & 0x1f == 0 {
            break;
        }
        let sharing = if eax >> 5 & 7 <= 2 { 0 } else { span - 1 };
        let cores = (span - 1).min(63);
        leaves.push([eax & 0x3fff | sharing << 14 | cores << 26, ebx, ecx, edx]);
    }
    leaves
}

/// Leaf 0x15 with the local-APIC timer's rate as the crystal's: kernels then calibrate neither. Only where it
/// comes out exactly, without overflowing the 32-bit product in kHz that Linux computes from it.
fn crystal_ratio(tsc_khz: u32, apic_khz: u32) -> Option<Registers> {
    if tsc_khz == 0 || apic_khz == 0 {
        return None;
    }
    let (mut a, mut b) = (tsc_khz, apic_khz);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let (numerator, denominator) = (tsc_khz / a, apic_khz / a);
    apic_khz.checked_mul(numerator)?;
    Some([denominator, numerator, apic_khz.checked_mul(1000)?, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Dynamic = Dynamic { apic_id: 0, apic_enabled: true, osxsave: false, xcr0: 1, xss: 0 };

    /// A host that has every bit of everything.
    fn everything(leaf: u32, subleaf: u32) -> Registers {
        match (leaf, subleaf) {
            (0, _) => [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (4, 0..=3) => [!0x1f & !0xe0 | 1 | (subleaf + 1).min(3) << 5, 0x1c0_003f, 0x3f, 0],
            (4, _) => [0; 4],
            (7, 0) => [2, !0, !0, !0],
            (0xd, 0) => [0xe7, 0x1000, 0x1000, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5) => [64, 1088, 0, 0],
            (0xd, 6) => [512, 1152, 0, 0],
            (0xd, 7) => [1024, 1664, 2, 0],
            (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
            (0x8000_0008, _) => [57 << 8 | 46, 0, 0, 0],
            _ => [!0; 4],
        }
    }

    /// As Bochs' core2_penryn_t9600: no leaf 7, no AVX; XSAVE of x87 and SSE.
    fn penryn(leaf: u32, subleaf: u32) -> Registers {
        match (leaf, subleaf) {
            (0, _) => [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
            (1, _) => [0x1067a, 0x0002_0800, 0x0408_e3bd, 0xbfeb_fbff],
            (0xd, 0) => [3, 576, 576, 0],
            (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 1, 0x2010_0800],
            (0x8000_0008, _) => [0x3028, 0, 0, 0],
            _ => [0; 4],
        }
    }

    fn offered() -> Offered {
        Offered {
            rdtscp: true,
            invpcid: true,
            xsaves: true,
            arch_capabilities: Some(!0),
            tsc_khz: 100_000,
            apic_khz: 1_000_000,
            ..Offered::default()
        }
    }

    #[test]
    fn what_must_be_hidden_is() {
        let model = CpuidModel::new(everything, &offered());
        let one = model.query(1, 0, &NOW);
        for (bit, name) in [(2, "DTES64"), (3, "MONITOR"), (5, "VMX"), (6, "SMX"), (15, "PDCM"), (17, "PCID")]
        {
            assert_eq!(one[ECX] >> bit & 1, 0, "{name}");
        }
        assert_eq!(one[ECX] >> 31, 1, "hypervisor");
        let seven = model.query(7, 0, &NOW);
        for (bit, name) in [(2, "SGX"), (4, "HLE"), (10, "INVPCID"), (11, "RTM"), (14, "MPX"), (25, "PT")] {
            assert_eq!(seven[EBX] >> bit & 1, 0, "{name}");
        }
        for (bit, name) in [
            (3, "PKU"),
            (4, "OSPKE"),
            (5, "WAITPKG"),
            (7, "CET_SS"),
            (16, "LA57"),
            (29, "ENQCMD"),
            (31, "PKS"),
        ] {
            assert_eq!(seven[ECX] >> bit & 1, 0, "{name}");
        }
        for (bit, name) in [
            (16, "TSXLDTRK"),
            (18, "PCONFIG"),
            (20, "CET_IBT"),
            (24, "AMX"),
            (26, "IBRS"),
            (28, "L1D_FLUSH"),
            (31, "SSBD"),
        ] {
            assert_eq!(seven[EDX] >> bit & 1, 0, "{name}");
        }
        assert_eq!(model.query(0xa, 0, &NOW), [0; 4], "PMU");
        assert_eq!(model.query(5, 0, &NOW), [0; 4], "MWAIT");
        assert_eq!(model.query(0x14, 0, &NOW), [0; 4], "PT");
        assert_eq!(model.query(0xd, 1, &NOW)[EAX] & !0xf, 0);
        let extended = model.query(0x8000_0008, 0, &NOW);
        assert_eq!(extended[EAX], 48 << 8 | 46);
    }

    #[test]
    fn bits_that_hang_on_controls() {
        let with = CpuidModel::new(everything, &Offered { pcid: true, ..offered() });
        let without = CpuidModel::new(everything, &Offered::default());
        assert_ne!(with.query(7, 0, &NOW)[EBX] & LEAF7_EBX_INVPCID, 0);
        assert_eq!(without.query(7, 0, &NOW)[EBX] & LEAF7_EBX_INVPCID, 0);
        assert_ne!(with.query(0x8000_0001, 0, &NOW)[EDX] & EXTENDED1_EDX_RDTSCP, 0);
        assert_eq!(without.query(0x8000_0001, 0, &NOW)[EDX] & EXTENDED1_EDX_RDTSCP, 0);
        assert_eq!(without.query(7, 0, &NOW)[ECX] & LEAF7_ECX_RDPID, 0);
        assert_eq!(without.query(0xd, 1, &NOW)[EAX] & LEAFD_1_EAX_XSAVES, 0);
        assert_eq!(without.query(7, 0, &NOW)[EDX] & LEAF7_EDX_ARCH_CAPABILITIES, 0);
        let speculation = CpuidModel::new(everything, &Offered { speculation_control: true, ..offered() });
        assert_eq!(speculation.query(7, 0, &NOW)[EDX] & LEAF7_EDX_SPECULATION, LEAF7_EDX_SPECULATION);
    }

    #[test]
    fn arch_capabilities_lose_what_comes_with_an_msr() {
        let msr = CpuidModel::new(everything, &offered()).msr_model();
        let value = msr.arch_capabilities.unwrap();
        for (bit, name) in [
            (1, "IBRS_ALL"),
            (7, "TSX_CTRL"),
            (10, "MISC_PACKAGE_CTLS"),
            (12, "DOITM"),
            (18, "FB_CLEAR_CTRL"),
            (21, "XAPIC_DISABLE"),
            (25, "GDS_CTRL"),
            (62, "?"),
        ] {
            assert_eq!(value >> bit & 1, 0, "{name}");
        }
        assert_eq!(value & 1, 1, "RDCL_NO");
    }

    #[test]
    fn signature_and_timing() {
        let model = CpuidModel::new(everything, &offered());
        let [max, ebx, ecx, edx] = model.query(0x4000_0000, 7, &NOW);
        let text: Vec<u8> = [ebx, ecx, edx].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!((max, &text[..]), (0x4000_0010, &b"UmbraUmbra\0\0"[..]));
        assert_eq!(model.query(0x4000_0010, 0, &NOW), [100_000, 1_000_000, 0, 0]);
        assert_eq!(model.query(0x4000_0001, 0, &NOW), [0; 4]);
        // 1 GHz x 1 / 10 = 100 MHz.
        assert_eq!(model.query(0x15, 0, &NOW), [10, 1, 1_000_000_000, 0]);
        assert_eq!(crystal_ratio(2_893_203, 1_000_000), None, "2,893,203 x 1,000,000 kHz overflows in Linux");
        assert_eq!(crystal_ratio(3_500_000, 3_500_000), Some([1, 1, 3_500_000_000, 0]));
        assert_eq!(crystal_ratio(0, 1), None);
    }

    #[test]
    fn dynamic_parts() {
        let model = CpuidModel::new(everything, &Offered { vcpus: 3, ..offered() });
        let state = Dynamic { apic_id: 2, apic_enabled: false, osxsave: true, xcr0: 7, xss: 0 };
        let one = model.query(1, 0, &state);
        assert_eq!(one[EBX] >> 16, 0x0204);
        assert_ne!(one[ECX] & LEAF1_ECX_OSXSAVE, 0);
        assert_eq!(model.query(1, 0, &NOW)[ECX] & LEAF1_ECX_OSXSAVE, 0);
        assert_eq!(one[EDX] & LEAF1_EDX_APIC, 0);
        assert_eq!(model.query(0xb, 0, &state), [0, 1, 0x100, 2]);
        assert_eq!(model.query(0xb, 1, &state), [2, 3, 0x201, 2]);
        assert_eq!(model.query(0xb, 2, &state), [0, 0, 2, 2]);
        assert_eq!(model.query(0xd, 0, &state), [0xe7, 832, 2688, 0]);
        assert_eq!(model.query(0xd, 1, &state)[EBX], 832);
        let all = Dynamic { xcr0: 0xe7, ..state };
        assert_eq!(model.query(0xd, 1, &all)[EBX], 832 + 64 + 512 + 1024);
        assert_eq!(model.query(0xd, 7, &all), [1024, 1664, 2, 0]);
        assert_eq!(model.query(0xd, 8, &all), [0; 4]);
    }

    #[test]
    fn out_of_range_is_the_highest_basic_leaf() {
        let model = CpuidModel::new(everything, &offered());
        assert_eq!(model.query(0x1234, 0, &NOW), model.query(0x15, 0, &NOW));
        assert_eq!(model.query(0x8000_0009, 0, &NOW), model.query(0x15, 0, &NOW));
        assert_eq!(model.query(0, 0, &NOW)[EAX], 0x15);
    }

    #[test]
    fn caches_follow_the_topology() {
        let model = CpuidModel::new(everything, &Offered { vcpus: 4, ..offered() });
        assert_eq!(model.query(4, 0, &NOW)[EAX] >> 14, 3 << 12);
        assert_eq!(model.query(4, 2, &NOW)[EAX] >> 14, 3 << 12 | 3);
        assert_eq!(model.query(4, 4, &NOW), [0; 4]);
    }

    #[test]
    fn a_poor_host() {
        let model = CpuidModel::new(penryn, &Offered::default());
        assert_eq!(model.query(0, 0, &NOW)[EAX], 0xd);
        assert_eq!(model.query(7, 0, &NOW), [0, LEAF7_EBX_TSC_ADJUST, 0, 0]);
        let control = model.control_model();
        assert_eq!(control.physical_bits, 40);
        assert_eq!(control.xcr0_allowed, 3);
        assert!(control.cr4_allowed.contains(Cr4::PAE | Cr4::PGE | Cr4::OSXSAVE));
        assert!(
            !control.cr4_allowed.intersects(Cr4::SMEP | Cr4::SMAP | Cr4::FSGSBASE | Cr4::VMXE | Cr4::PCIDE)
        );
        assert_eq!(control.efer_allowed, Efer::SCE | Efer::LME | Efer::NXE);
        assert_eq!(model.query(0xd, 0, &Dynamic { xcr0: 3, ..NOW })[EBX], 576);
    }

    #[test]
    fn without_avx512_state_no_avx512_bit() {
        let model = CpuidModel::new(everything, &Offered { xcr0: 7, ..offered() });
        let seven = model.query(7, 0, &NOW);
        assert_eq!(seven[EBX] & LEAF7_EBX_AVX512, 0);
        assert_ne!(seven[EBX] & LEAF7_EBX_AVX2, 0);
        let model = CpuidModel::new(everything, &Offered { xcr0: 3, ..offered() });
        assert_eq!(model.query(7, 0, &NOW)[EBX] & LEAF7_EBX_AVX2, 0);
        assert_eq!(model.query(1, 0, &NOW)[ECX] & LEAF1_ECX_NEEDS_AVX, 0);
        assert_eq!(model.query(7, 1, &NOW)[EAX] & LEAF7_1_EAX_AVX, 0);
    }

    proptest::proptest! {
        #[test]
        fn any_query_is_answered(leaf: u32, subleaf: u32, apic_id: u32, xcr0: u64, xss: u64, seed: u32) {
            let host = move |leaf: u32, subleaf: u32| {
                let x = (leaf ^ seed).wrapping_mul(0x9e37_79b9).wrapping_add(subleaf);
                [x, x.rotate_left(7), x.rotate_left(13), x.rotate_left(21)]
            };
            let model = CpuidModel::new(host, &Offered { vcpus: seed, ..offered() });
            let state = Dynamic { apic_id, apic_enabled: true, osxsave: true, xcr0, xss };
            let _ = model.query(leaf, subleaf, &state);
            let _ = model.query(leaf & 0x1f, subleaf & 0x1f, &state);
            let bits = model.control_model().physical_bits;
            proptest::prop_assert!((32..=52).contains(&bits));
        }
    }
}
