//! What travels between interrupt controllers: from the IOAPIC or a local APIC to local APICs.

/// Which local APICs a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The one with this APIC ID.
    Physical(u32),
    /// All whose logical destination matches.
    Logical(u32),
    /// The sender itself.
    Sender,
    /// Every one.
    All,
    /// Every one but the sender.
    Others,
}

/// What a message does to its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The vector at every destination.
    Fixed,
    /// The vector at the destination with the lowest priority.
    Lowest,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up at page `vector`.
    Startup,
}

impl Delivery {
    /// From bits 10:8 of an ICR or a redirection entry; SMI, ExtINT and reserved modes do nothing here.
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Self> {
        match mode & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::Lowest),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::Startup),
            _ => None,
        }
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an interrupt message is lost unless it is delivered"]
pub struct Message {
    /// For whom.
    pub destination: Destination,
    /// To what effect.
    pub delivery: Delivery,
    /// Interrupt vector, or start-up page.
    pub vector: u8,
    /// Level-triggered: its EOI is reported to the IOAPIC.
    pub level: bool,
}
