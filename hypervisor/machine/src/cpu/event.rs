//! Events on their way into a guest: exceptions, interrupts, NMIs; what may be delivered when, and what two
//! events that meet become.

use core::fmt;

use bitflags::bitflags;

use super::exit::{InterruptionInfo, InterruptionType};

/// An interrupt vector; the first 32 are the architecture's exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vector(pub u8);

#[allow(missing_docs)] // the architecture's own mnemonics
impl Vector {
    pub const DE: Self = Self(0);
    pub const DB: Self = Self(1);
    pub const NMI: Self = Self(2);
    pub const BP: Self = Self(3);
    pub const OF: Self = Self(4);
    pub const BR: Self = Self(5);
    pub const UD: Self = Self(6);
    pub const NM: Self = Self(7);
    pub const DF: Self = Self(8);
    pub const TS: Self = Self(10);
    pub const NP: Self = Self(11);
    pub const SS: Self = Self(12);
    pub const GP: Self = Self(13);
    pub const PF: Self = Self(14);
    pub const MF: Self = Self(16);
    pub const AC: Self = Self(17);
    pub const MC: Self = Self(18);
    pub const XM: Self = Self(19);
    pub const VE: Self = Self(20);
    pub const CP: Self = Self(21);
}

impl Vector {
    /// Whether this exception pushes an error code (SDM Vol. 3 "Exception and Interrupt Vectors").
    #[must_use]
    #[inline]
    pub const fn pushes_error_code(self) -> bool {
        const WITH_CODE: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;
        self.0 < 32 && WITH_CODE >> self.0 & 1 != 0
    }

    /// The SDM's mnemonic; empty for vectors that are no named exception.
    #[must_use]
    pub const fn name(self) -> &'static str {
        const NAMES: [&str; 22] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP",
            "#PF", "", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
        ];
        if (self.0 as usize) < NAMES.len() { NAMES[self.0 as usize] } else { "" }
    }

    /// How it takes part in the making of a double fault (SDM Vol. 3 "Interrupt 8—Double Fault Exception (#DF)").
    #[must_use]
    pub const fn class(self) -> Class {
        match self {
            Self::DE | Self::TS | Self::NP | Self::SS | Self::GP | Self::CP => Class::Contributory,
            Self::PF | Self::VE => Class::PageFault,
            Self::DF => Class::DoubleFault,
            _ => Class::Benign,
        }
    }
}

impl fmt::Display for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            "" => write!(f, "vector {:#04x}", self.0),
            name => f.write_str(name),
        }
    }
}

/// Classes of exceptions in the double-fault table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Combines with nothing; interrupts and software interrupts are benign too.
    Benign,
    /// A fault that makes a second one a double fault.
    Contributory,
    /// #PF and #VE.
    PageFault,
    /// #DF: a second fault on top shuts the processor down.
    DoubleFault,
}

/// An exception that the guest's own doing has raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which.
    pub vector: Vector,
    /// Present exactly where the vector pushes one.
    pub error_code: Option<u32>,
    /// What CR2 is loaded with before a #PF is injected.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #UD.
    pub const UNDEFINED: Self = Self { vector: Vector::UD, error_code: None, cr2: None };
    /// #GP(0), the answer to most things a guest may not do.
    pub const PROTECTION: Self = Self::general_protection(0);
    /// #DB; the caller has updated the guest's DR6.
    pub const DEBUG: Self = Self { vector: Vector::DB, error_code: None, cr2: None };
    /// #NM.
    pub const DEVICE_NOT_AVAILABLE: Self = Self { vector: Vector::NM, error_code: None, cr2: None };

    /// #GP with a selector's error code.
    #[must_use]
    pub const fn general_protection(error_code: u32) -> Self {
        Self { vector: Vector::GP, error_code: Some(error_code), cr2: None }
    }
    /// #TS with a selector's error code.
    #[must_use]
    pub const fn invalid_tss(error_code: u32) -> Self {
        Self { vector: Vector::TS, error_code: Some(error_code), cr2: None }
    }
    /// #NP with a selector's error code.
    #[must_use]
    pub const fn not_present(error_code: u32) -> Self {
        Self { vector: Vector::NP, error_code: Some(error_code), cr2: None }
    }
    /// #SS with a selector's error code.
    #[must_use]
    pub const fn stack_fault(error_code: u32) -> Self {
        Self { vector: Vector::SS, error_code: Some(error_code), cr2: None }
    }
    /// #PF at a linear address.
    #[must_use]
    pub const fn page_fault(error_code: u32, address: u64) -> Self {
        Self { vector: Vector::PF, error_code: Some(error_code), cr2: Some(address) }
    }
}

/// An event that the next VM entry is to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingEvent {
    /// How it comes about.
    pub kind: InterruptionType,
    /// Which vector.
    pub vector: Vector,
    /// Pushed behind the frame.
    pub error_code: Option<u32>,
    /// For software interrupts and exceptions: bytes of the instruction that the return address skips, 0..=15.
    pub instruction_bytes: u8,
    /// Loaded into CR2 before entry. `None` for an event that is delivered again: CR2 holds it already.
    pub cr2: Option<u64>,
}

/// The three VM-entry fields that inject an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFields {
    /// VM-entry interruption-information field.
    pub info: u32,
    /// VM-entry exception error code; meaningful where `info` bit 11 is set.
    pub error_code: u32,
    /// VM-entry instruction length, bytes; meaningful for the software kinds.
    pub instruction_bytes: u32,
}

impl From<Exception> for PendingEvent {
    #[inline]
    fn from(exception: Exception) -> Self {
        Self {
            kind: InterruptionType::HardwareException,
            vector: exception.vector,
            error_code: exception.error_code,
            instruction_bytes: 0,
            cr2: exception.cr2,
        }
    }
}

impl PendingEvent {
    /// A non-maskable interrupt.
    pub const NMI: Self = Self {
        kind: InterruptionType::Nmi,
        vector: Vector::NMI,
        error_code: None,
        instruction_bytes: 0,
        cr2: None,
    };

    /// An interrupt that the guest's interrupt controller has handed out.
    #[must_use]
    #[inline]
    pub const fn external(vector: u8) -> Self {
        Self {
            kind: InterruptionType::External,
            vector: Vector(vector),
            error_code: None,
            instruction_bytes: 0,
            cr2: None,
        }
    }

    /// INT1, whose #DB is a trap: it returns behind the instruction.
    #[must_use]
    pub const fn int1(instruction_bytes: u32) -> Self {
        Self {
            kind: InterruptionType::PrivilegedSoftwareException,
            vector: Vector::DB,
            error_code: None,
            instruction_bytes: (instruction_bytes & 15) as u8,
            cr2: None,
        }
    }

    /// The event whose delivery an exit interrupted, to be injected once more (SDM Vol. 3 "Information for VM
    /// Exits That Occur During Event Delivery"). `None` if no delivery was under way.
    #[must_use]
    #[inline]
    pub fn from_vectoring(info: InterruptionInfo, error_code: u32, instruction_bytes: u32) -> Option<Self> {
        if !info.valid() {
            return None;
        }
        let kind = info.kind();
        Some(Self {
            kind,
            vector: info.vector(),
            error_code: info.has_error_code().then_some(error_code),
            instruction_bytes: if kind.has_instruction_length() { (instruction_bytes & 15) as u8 } else { 0 },
            cr2: None,
        })
    }

    /// What to write into the VM-entry fields.
    #[must_use]
    #[inline]
    pub const fn encode(&self) -> EntryFields {
        let mut info = 1 << 31 | (self.kind as u32) << 8 | self.vector.0 as u32;
        let error_code = match self.error_code {
            Some(code) => {
                info |= 1 << 11;
                code
            }
            None => 0,
        };
        // An error code above 15 bits fails VM entry on processors without CET.
        EntryFields {
            info,
            error_code: error_code & 0x7fff,
            instruction_bytes: self.instruction_bytes as u32,
        }
    }

    /// Its class when a fault meets its delivery: only true exceptions are more than benign, INT 13 is not #GP.
    #[must_use]
    pub const fn class(&self) -> Class {
        match self.kind {
            InterruptionType::HardwareException => self.vector.class(),
            _ => Class::Benign,
        }
    }
}

/// What becomes of a fault that the guest itself caused while an event was being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Inject this. An interrupt or NMI that it interrupted is `postponed`: it has left its controller, and is
    /// to be delivered once it is deliverable again; exceptions and software interrupts come back by themselves
    /// when their instruction is restarted.
    Inject {
        /// What the next entry injects.
        event: PendingEvent,
        /// What is owed to the guest afterwards.
        postponed: Option<PendingEvent>,
    },
    /// A fault on top of a double fault: the processor shuts down.
    TripleFault,
}

/// Combines the event under delivery, if any, with a fault of the guest's own (SDM Vol. 3 "Interrupt 8—Double
/// Fault Exception (#DF)", table of conditions).
#[must_use]
pub fn combine(under_delivery: Option<PendingEvent>, fault: Exception) -> Delivery {
    let plain = Delivery::Inject { event: fault.into(), postponed: None };
    let Some(first) = under_delivery else { return plain };
    match (first.class(), fault.vector.class()) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
            Delivery::TripleFault
        }
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            let event = PendingEvent {
                kind: InterruptionType::HardwareException,
                vector: Vector::DF,
                error_code: Some(0),
                instruction_bytes: 0,
                // A second page fault has loaded CR2 by the time #DF is raised.
                cr2: fault.cr2,
            };
            Delivery::Inject { event, postponed: None }
        }
        _ => {
            let postponed =
                matches!(first.kind, InterruptionType::External | InterruptionType::Nmi).then_some(first);
            Delivery::Inject { event: fault.into(), postponed }
        }
    }
}

bitflags! {
    /// The guest interruptibility-state field (SDM Vol. 3 "Guest Non-Register State").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// The instruction after STI.
        const STI = 1 << 0;
        /// The instruction after MOV SS or POP SS.
        const MOV_SS = 1 << 1;
        /// In system-management mode.
        const SMI = 1 << 2;
        /// In an NMI handler, until IRET.
        const NMI = 1 << 3;
    }
}

impl Interruptibility {
    /// STI and MOV SS, which hold for one instruction.
    pub const ONE_INSTRUCTION: Self = Self::STI.union(Self::MOV_SS);

    /// After an instruction that the hypervisor has carried out for the guest.
    #[must_use]
    #[inline]
    pub const fn after_instruction(self) -> Self {
        self.difference(Self::ONE_INSTRUCTION)
    }

    /// The state to enter with after an exit that a fault caused (SDM Vol. 3 "Information for VM Exits Due to
    /// Vectored Events", bit 12): an IRET that faulted has already ended NMI blocking, and must not have.
    #[must_use]
    pub const fn after_fault_exit(self, exit: InterruptionInfo, delivery_was_interrupted: bool) -> Self {
        let unblocked = exit.valid() && exit.nmi_unblocking_due_to_iret() && exit.vector().0 != Vector::DF.0;
        if unblocked && !delivery_was_interrupted { self.union(Self::NMI) } else { self }
    }

    /// The state to enter with when `event` is injected again: the interrupted delivery of an NMI had already
    /// set NMI blocking, with which VM entry would refuse to inject one.
    #[must_use]
    pub fn for_injection(self, event: &PendingEvent) -> Self {
        match event.kind {
            InterruptionType::Nmi => self.difference(Self::NMI.union(Self::ONE_INSTRUCTION)),
            InterruptionType::External => self.difference(Self::ONE_INSTRUCTION),
            _ => self,
        }
    }
}

/// BS in the pending-debug-exceptions field: a single step is due.
pub const PENDING_DEBUG_SINGLE_STEP: u64 = 1 << 14;
/// RFLAGS.TF.
pub const RFLAGS_TRAP: u64 = 1 << 8;
/// RFLAGS.IF.
pub const RFLAGS_INTERRUPT: u64 = 1 << 9;
/// RFLAGS.RF.
pub const RFLAGS_RESUME: u64 = 1 << 16;

/// What the pending-debug-exceptions field must hold after an emulated instruction: with RFLAGS.TF the guest's
/// single step is due, as if the processor had executed it. (DEBUGCTL.BTF is never set for a guest.)
#[must_use]
#[inline]
pub const fn pending_debug_after_instruction(pending: u64, rflags: u64) -> u64 {
    if rflags & RFLAGS_TRAP != 0 { pending | PENDING_DEBUG_SINGLE_STEP } else { pending }
}

/// What waits to be delivered to a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// An event already under way: interrupted in its delivery, or an exception to inject.
    pub event: Option<PendingEvent>,
    /// An NMI.
    pub nmi: bool,
    /// The interrupt controller has a vector to hand out.
    pub interrupt: bool,
}

/// What the next VM entry injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// Nothing.
    None,
    /// The event under way.
    Event(PendingEvent),
    /// The NMI that waits.
    Nmi,
    /// Acknowledge the interrupt controller and inject the vector it gives.
    Interrupt,
}

/// The choice for one VM entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What is injected.
    pub injection: Injection,
    /// Ask for an exit as soon as an NMI can be taken.
    pub nmi_window: bool,
    /// Ask for an exit as soon as an interrupt can be taken.
    pub interrupt_window: bool,
}

/// Chooses what is delivered first (SDM Vol. 3 "Prioritization of Concurrent Events": what is under way, then
/// NMI, then interrupts) and which windows to ask for.
#[must_use]
#[inline]
pub fn choose(waiting: &Waiting, rflags: u64, state: Interruptibility) -> Choice {
    if let Some(event) = waiting.event {
        return Choice {
            injection: Injection::Event(event),
            nmi_window: waiting.nmi,
            interrupt_window: waiting.interrupt,
        };
    }
    // Some processors refuse to inject an NMI right after STI, so STI delays it for all.
    let nmi_open = (state & (Interruptibility::NMI | Interruptibility::ONE_INSTRUCTION)).is_empty();
    let interrupt_open =
        rflags & RFLAGS_INTERRUPT != 0 && (state & Interruptibility::ONE_INSTRUCTION).is_empty();
    if waiting.nmi && nmi_open {
        Choice { injection: Injection::Nmi, nmi_window: false, interrupt_window: waiting.interrupt }
    } else if waiting.interrupt && interrupt_open {
        Choice { injection: Injection::Interrupt, nmi_window: waiting.nmi, interrupt_window: false }
    } else {
        Choice { injection: Injection::None, nmi_window: waiting.nmi, interrupt_window: waiting.interrupt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hardware(vector: u8) -> PendingEvent {
        let vector = Vector(vector);
        PendingEvent {
            kind: InterruptionType::HardwareException,
            vector,
            error_code: vector.pushes_error_code().then_some(0),
            instruction_bytes: 0,
            cr2: None,
        }
    }

    fn exception(vector: u8) -> Exception {
        let vector = Vector(vector);
        Exception {
            vector,
            error_code: vector.pushes_error_code().then_some(0),
            cr2: (vector == Vector::PF).then_some(0x1000),
        }
    }

    /// The SDM's table, all 32 x 32 pairs: contributory = 0, 10-13, 21; page fault = 14, 20.
    #[test]
    fn double_fault_table() {
        let contributory = [0u8, 10, 11, 12, 13, 21];
        let page = [14u8, 20];
        for first in 0..32u8 {
            for second in 0..32u8 {
                let bad = contributory.contains(&second) || page.contains(&second);
                let got = combine(Some(hardware(first)), exception(second));
                if first == 8 && (bad || second == 8) {
                    assert_eq!(got, Delivery::TripleFault, "{first} then {second}");
                    continue;
                }
                let double = contributory.contains(&first) && contributory.contains(&second)
                    || page.contains(&first) && bad;
                let Delivery::Inject { event, postponed } = got else {
                    panic!("{first} then {second}: {got:?}")
                };
                assert_eq!(event.vector.0, if double { 8 } else { second }, "{first} then {second}");
                assert_eq!(event.error_code.is_some(), event.vector.pushes_error_code());
                assert_eq!(postponed, None);
            }
        }
    }

    #[test]
    fn software_interrupt_is_benign_and_external_is_postponed() {
        let int13 = PendingEvent {
            kind: InterruptionType::SoftwareInterrupt,
            instruction_bytes: 2,
            error_code: None,
            ..hardware(13)
        };
        let page_fault = exception(14);
        assert_eq!(
            combine(Some(int13), page_fault),
            Delivery::Inject { event: page_fault.into(), postponed: None }
        );
        for first in [PendingEvent::external(0xd), PendingEvent::NMI] {
            assert_eq!(
                combine(Some(first), page_fault),
                Delivery::Inject { event: page_fault.into(), postponed: Some(first) }
            );
        }
    }

    #[test]
    fn every_valid_vectoring_field_survives_the_round_trip() {
        for kind in 0..8u32 {
            for vector in 0..=255u32 {
                for code in [false, true] {
                    let info = 1 << 31 | u32::from(code) << 11 | kind << 8 | vector;
                    let event = PendingEvent::from_vectoring(InterruptionInfo(info), 0x7, 2).unwrap();
                    let fields = event.encode();
                    assert_eq!(fields.info, info);
                    assert_eq!(fields.error_code, if code { 7 } else { 0 });
                    assert_eq!(fields.instruction_bytes, if matches!(kind, 4..=6) { 2 } else { 0 });
                }
            }
        }
        assert_eq!(PendingEvent::from_vectoring(InterruptionInfo(0x30e), 0, 0), None);
    }

    #[test]
    fn nmi_blocking_after_a_faulting_iret() {
        let info =
            |vector: u32, iret: bool| InterruptionInfo(1 << 31 | u32::from(iret) << 12 | 3 << 8 | vector);
        let none = Interruptibility::empty();
        assert_eq!(none.after_fault_exit(info(14, true), false), Interruptibility::NMI);
        assert_eq!(none.after_fault_exit(info(14, true), true), none);
        assert_eq!(none.after_fault_exit(info(8, true), false), none);
        assert_eq!(none.after_fault_exit(info(14, false), false), none);
        assert_eq!(Interruptibility::NMI.for_injection(&PendingEvent::NMI), none);
    }

    /// Every combination of what waits and what blocks: what is injected could be, and nothing is forgotten.
    #[test]
    fn choice_over_the_whole_table() {
        for bits in 0..0b100_0000u32 {
            let waiting = Waiting {
                event: (bits & 1 != 0).then(|| hardware(14)),
                nmi: bits & 2 != 0,
                interrupt: bits & 4 != 0,
            };
            let rflags = if bits & 8 != 0 { RFLAGS_INTERRUPT } else { 0 };
            let state = Interruptibility::from_bits_truncate((bits >> 4 & 1) | (bits >> 5 & 1) << 3);
            let got = choose(&waiting, rflags, state);
            match got.injection {
                Injection::Event(_) => assert!(waiting.event.is_some()),
                Injection::Nmi => {
                    assert!(waiting.nmi && state.is_empty());
                }
                Injection::Interrupt => {
                    assert!(rflags != 0 && !state.contains(Interruptibility::STI));
                    assert!(!waiting.nmi || !state.is_empty());
                }
                Injection::None => assert!(waiting.event.is_none()),
            }
            assert_eq!(got.nmi_window, waiting.nmi && got.injection != Injection::Nmi);
            assert_eq!(got.interrupt_window, waiting.interrupt && got.injection != Injection::Interrupt);
        }
    }

    #[test]
    fn emulated_instruction_ends_blocking_and_steps() {
        let state = Interruptibility::STI | Interruptibility::NMI;
        assert_eq!(state.after_instruction(), Interruptibility::NMI);
        assert_eq!(pending_debug_after_instruction(0, RFLAGS_TRAP), PENDING_DEBUG_SINGLE_STEP);
        assert_eq!(pending_debug_after_instruction(0, 0), 0);
    }

    #[test]
    fn names() {
        assert_eq!(format!("{} {}", Vector::PF, Vector(0x80)), "#PF vector 0x80");
    }
}
