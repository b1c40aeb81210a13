//! The processor that a guest sees: which features it is offered, what its registers may hold, why it left
//! guest mode and what it is given on its way back.
//!
//! Everything here is calculation. The hypervisor reads and writes the VMCS; what a field should hold, and what
//! a guest's value means, is decided here and tested on the host.

pub mod control;
pub mod cpuid;
pub mod event;
pub mod exit;
pub mod msr;
pub mod registers;
pub mod report;
pub mod task;

pub use control::{ControlModel, ControlState, Cr0, Cr4, Efer, Paging};
pub use cpuid::{CpuidModel, Offered};
pub use event::{Exception, PendingEvent, Vector};
pub use exit::ExitReason;
pub use msr::{MsrModel, MsrRead, MsrState, MsrWrite};
pub use registers::{CodeSize, Gpr, SegmentName, SegmentState, Width};
