//! How a vCPU beside the first one comes to run, and how it is put to rest: the ACPI wakeup mailbox, INIT, start-up
//! messages, HLT.
//!
//! No vCPU runs in real mode here, so the first one wakes the others through the mailbox in memory that ACPI's MADT
//! names. Nothing exits when it writes there: while any vCPU waits to be woken, those that run look into the mailbox
//! whenever they look around, every millisecond at least; with all of them up it costs nothing.

use core::sync::atomic::Ordering;

use machine::device::lapic::Startup;
use machine::load::firmware::wakeup;
use machine::load::stage;
use machine::manifest::End;

use super::{BOOTSTRAP, Leave, Next, Vcpu};
use crate::host::time;
use crate::schedule::Core;

/// How long a vCPU that runs may go on without a look into the mailbox.
const MAILBOX_NS: u64 = 1_000_000;

impl Vcpu {
    /// It waits for its guest to wake it.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.parked
    }

    fn bit(&self) -> u64 {
        1 << self.index
    }

    /// Whether its guest has woken it: it then starts where the mailbox says.
    #[cold]
    pub(super) fn wake(&mut self, core: &Core) -> bool {
        let startup = self.guest.devices.lock().take_startup(self.index);
        if let Some(Startup::Run { page }) = startup {
            self.refuse_startup(page);
        }
        let Some(mailbox) = self.guest.mailbox else { return false };
        if wakeup::wanted(&self.guest.ram, mailbox) != Ok(Some(self.index as u32)) {
            return false;
        }
        // Once the mailbox is free again the one that wakes it may halt for ever: that must not be its guest's end.
        self.guest.parked.fetch_and(!self.bit(), Ordering::SeqCst);
        let Ok(Some(vector)) = wakeup::take(&self.guest.ram, mailbox, self.index as u32) else {
            self.guest.parked.fetch_or(self.bit(), Ordering::SeqCst);
            return false;
        };
        {
            let mut devices = self.guest.devices.lock();
            devices.started(self.index);
            // A processor that waits to be started takes no NMI.
            devices.take_nmi(self.index);
        }
        self.parked = false;
        self.unload();
        // SAFETY: this core is in VMX operation; no other VMCS is in use at this moment (see `schedule`).
        let vmcs = unsafe { self.vmcs.load() }.expect("a VMCS of ours can be loaded");
        self.begin(core.host, &vmcs, &stage::secondary(vector));
        true
    }

    /// Looks whether the guest wants one of its vCPUs woken, while any waits for that. Returns the TSC value by which to
    /// look again.
    #[inline]
    pub(super) fn look_into_mailbox(&self) -> u64 {
        match self.guest.parked.load(Ordering::Relaxed) {
            0 => u64::MAX,
            parked => self.kick_wanted(parked),
        }
    }

    #[cold]
    fn kick_wanted(&self, parked: u64) -> u64 {
        if let Some(mailbox) = self.guest.mailbox
            && let Ok(Some(id)) = wakeup::wanted(&self.guest.ram, mailbox)
        {
            self.guest.kick(parked & 1_u64.checked_shl(id).unwrap_or(0));
        }
        time::tsc() + time::ns_to_ticks(MAILBOX_NS)
    }

    /// INIT or a start-up message came for it while it ran.
    #[cold]
    pub(super) fn heed(&mut self, startup: Startup) -> Next {
        match startup {
            // It would go on at the reset vector, as after a reset of the machine.
            Startup::Init if self.index == BOOTSTRAP => Next::Leave(Leave::Ended(End::Reset)),
            Startup::Init => {
                self.parked = true;
                self.guest.parked.fetch_or(self.bit(), Ordering::SeqCst);
                Next::Leave(if self.guest.is_dead() { Leave::Ended(End::Halted) } else { self.sleep(None) })
            }
            Startup::Run { page } => {
                self.refuse_startup(page);
                Next::Resume
            }
        }
    }

    fn refuse_startup(&self, page: u8) {
        self.guest.startup_told.call_once(|| {
            log::warn!(
                "guest {}: its vCPU {} is not started by a start-up message, at {:#x}: there is no real mode; processors \
                 are woken through the mailbox that ACPI's MADT names (\"multiprocessor wakeup\")",
                self.guest.name(),
                self.index,
                u32::from(page) << 12
            );
        });
    }

    /// It has nothing to do until `until_tsc`, unless it is kicked.
    pub(super) fn sleep(&self, until_tsc: Option<u64>) -> Leave {
        if self.presence.try_to_sleep() { Leave::Halted(until_tsc) } else { Leave::Slice }
    }

    /// It halted with interrupts off.
    pub(super) fn die(&self) {
        self.guest.dead.fetch_or(self.bit(), Ordering::SeqCst);
    }

    /// It looks what it has to do, and may have taken an NMI afterwards: nobody is to think it dead from here on.
    #[inline]
    pub(super) fn revive(&self) {
        if self.guest.dead.load(Ordering::SeqCst) & self.bit() != 0 {
            self.guest.dead.fetch_and(!self.bit(), Ordering::SeqCst);
        }
    }
}
