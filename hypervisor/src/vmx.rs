//! VT-x: what the processor can do, the controls we ask of it, and the thin layer of instructions.
//!
//! The order in which a core uses it:
//!
//! 1. [`enable::examine`] decides whether this processor can run Umbra, and why not if it cannot.
//! 2. [`enable::enable`] puts the core into VMX root operation.
//! 3. [`vmcs::Vmcs::load`] gives a [`vmcs::CurrentVmcs`], through which all fields are read and written.
//! 4. [`controls::Controls::write`], [`host_state::HostState::write`] and
//!    [`guest_state::GuestState::write`] fill it.
//! 5. [`entry::Entry::enter`] runs the guest until its next exit.
//!
//! What a register or field should hold is computed by pure functions with tests on the host; the privileged
//! instruction that puts it there is one thin line elsewhere.

pub mod capability;
pub mod controls;
pub mod enable;
pub mod entry;
pub mod fields;
pub mod guest_state;
pub mod host_state;
pub mod invvpid;
pub mod mitigation;
pub mod msr;
pub mod preemption;
pub mod vmcs;
