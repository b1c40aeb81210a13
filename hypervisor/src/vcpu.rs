//! One virtual processor: its VMCS, the state that is not in it, and the loop from entry to exit.

mod apic;
mod control;
mod events;
mod exit;
mod fault;
mod io;
mod mmio;
mod msr;
mod recent;
mod report;
mod startup;
mod state;
mod task;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use machine::cpu::control::{self as rules, ControlState, Efer};
use machine::cpu::cpuid::Dynamic;
use machine::cpu::event::PendingEvent;
use machine::cpu::exit::ExitReason;
use machine::cpu::msr::MsrState;
use machine::cpu::report::ExitLog;
use machine::device::lapic::Startup;
use machine::device::{Devices, Requests};
use machine::load::{EntryState, Mode as StartMode};
use machine::manifest::End;
use memory::{Event, Hpa, Owner};
use shadow::{Flush, VcpuMmu};

use crate::guest::Guest;
use crate::guest::presence::Presence;
use crate::host::{Host, direct, frames, time};
use crate::schedule::{Core, Turn};
use crate::vmx::controls::{Controls, Feature, SecondaryControls};
use crate::vmx::entry::{Entry, EntryOutcome, GuestRegisters, write_cr2};
use crate::vmx::fields;
use crate::vmx::guest_state::{AccessRights, GuestState, Segment, SegmentName, Table};
use crate::vmx::host_state::HostState;
use crate::vmx::preemption;
use crate::vmx::vmcs::{CurrentVmcs, Region, Vmcs};

use state::Extended;

/// Why a vCPU gave its core back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Its time slice is used up, or the core is wanted.
    Slice,
    /// It halted: nothing to do until this TSC value of the host's, or until it is kicked.
    Halted(Option<u64>),
    /// Its guest has ended.
    Ended(End),
}

/// What an exit's handler wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Next {
    /// Enter again.
    Resume,
    /// Give the core back.
    Leave(Leave),
}

/// One virtual processor of a guest.
pub struct Vcpu {
    pub(crate) guest: Arc<Guest>,
    /// What others see of it.
    pub(crate) presence: Arc<Presence>,
    /// Its number in the guest.
    pub(crate) index: usize,
    pub(crate) entry: Entry,
    vmcs: Vmcs,
    pub(crate) controls: Controls,
    /// The primary controls as the VMCS holds them: the window exits come and go.
    primary: u32,
    pub(crate) mmu: VcpuMmu,
    /// What the guest believes.
    pub(crate) control: ControlState,
    pub(crate) msrs: MsrState,
    pub(crate) cpuid_state: Dynamic,
    /// To be injected by the next entry.
    pub(crate) event: Option<PendingEvent>,
    /// An interrupt that a fault kept from delivery: comes after `event`.
    pub(crate) postponed: Option<PendingEvent>,
    /// It executed HLT and waits for an event.
    pub(crate) halted: bool,
    /// An NMI waits.
    pub(crate) nmi: bool,
    /// The host's TSC at which something is due in the guest's devices or its slice ends; 0: at once.
    due_tsc: u64,
    /// The same, whatever else wants a look before.
    deadline_tsc: u64,
    tsc_offset: u64,
    pub(crate) log: ExitLog,
    extended: Extended,
    /// The pages through which the processor serves the local APIC, where it can.
    apic: Option<apic::ApicPages>,
    /// Faults in a row at one place: a guest that makes no progress is stopped (H27).
    pub(crate) stuck: fault::Stuck,
    /// The emulator's translations.
    pub(crate) recent: recent::Recent,
    vpid_base: u16,
    /// It ran before: its VMCS knows its core, its MMU has a root.
    loaded: bool,
    /// The core holds its state.
    on_core: bool,
    /// It waits for its guest to wake it, and has no turn until then.
    parked: bool,
    /// Exits and allocations of the heap when the present benchmark operation began.
    bench_start: (u64, u64),
}

/// The vCPU that starts a guest; the others wait until it wakes them.
const BOOTSTRAP: usize = 0;

/// Returns a frame of a vCPU's to the allocator.
fn give_back(core: usize, frame: Hpa) {
    if let Err(error) = frames::allocator().free(core, frame.page(), Owner::Hypervisor) {
        panic!("{error}");
    }
}

/// Where guests' VPIDs start: each vCPU has [`shadow::TAGS`] of them.
fn vpid_base(guest: &Guest, index: usize) -> u16 {
    let number = guest.id.index() * machine::device::VCPUS_MAX as usize + index;
    // The manifest's limits, 64 guests of 64 vCPUs, make 32768 of them.
    (1 + number * shadow::TAGS) as u16
}

/// Takes what all vCPUs share, before there is any: what is free then is to be free again when all are gone.
pub fn take_shared(host: &Host) {
    let _ = apic::access_page(&host.vmx.controls);
}

impl Vcpu {
    /// Makes a vCPU that will start as `start` says. To be called on the core that will run it.
    pub fn new(
        host: &'static Host,
        guest: Arc<Guest>,
        index: usize,
        start: &EntryState,
    ) -> Option<Box<Vcpu>> {
        let extended = Extended::new()?;
        let Some(frame) = frames::allocator().alloc(0, Owner::Hypervisor, memory::Claim::Begun) else {
            extended.dispose(0);
            return None;
        };
        let region = frame.address();
        // SAFETY: the frame is ours alone and mapped; a region is 4096 bytes without further demands.
        let page = unsafe { &mut *direct(region).cast::<Region>() };
        page.prepare(host.vmx.capabilities.revision);
        // SAFETY: this core is in VMX operation, and the page is prepared and ours.
        let vmcs = unsafe { Vmcs::new(region) }.expect("a page prepared as a VMCS can be cleared");
        let mut controls = host.vmx.controls;
        if guest.vcpus.len() == 1 {
            // It spins for nobody.
            controls.secondary.remove(SecondaryControls::PAUSE_LOOP_EXITING);
        }
        let Ok(apic) = apic::ApicPages::new(&mut controls) else {
            extended.dispose(0);
            give_back(0, region);
            return None;
        };
        let start_tsc = guest.start_tsc();
        let msrs = MsrState::new(&guest.model.msr);
        let vpid_base = vpid_base(&guest, index);
        let mut vcpu = Box::new(Vcpu {
            index,
            entry: Entry::new(host.vmx.mitigations),
            vmcs,
            primary: controls.primary.bits(),
            controls,
            mmu: VcpuMmu::new(index as u8),
            control: ControlState::PROTECTED,
            msrs,
            cpuid_state: Dynamic {
                apic_id: index as u32,
                apic_enabled: true,
                osxsave: false,
                xcr0: 1,
                xss: 0,
            },
            event: None,
            postponed: None,
            nmi: false,
            halted: false,
            due_tsc: 0,
            deadline_tsc: 0,
            tsc_offset: start_tsc.wrapping_neg(),
            log: ExitLog::default(),
            extended,
            apic,
            stuck: fault::Stuck::default(),
            recent: recent::Recent::default(),
            vpid_base,
            loaded: false,
            on_core: false,
            parked: index != BOOTSTRAP,
            bench_start: (0, 0),
            presence: Arc::clone(&guest.vcpus[index]),
            guest,
        });
        if vcpu.parked {
            // Its core finds it asleep; a kick that came before has its turn for itself.
            let _ = vcpu.presence.try_to_sleep();
        } else {
            // SAFETY: this core is in VMX operation; no other VMCS is in use at this moment (see `schedule`).
            let vmcs = unsafe { vcpu.vmcs.load() }.expect("a cleared VMCS can be loaded");
            vcpu.begin(host, &vmcs, start);
        }
        Some(vcpu)
    }

    /// Puts it into the state in which it starts, as after INIT but for what `start` says.
    fn begin(&mut self, host: &Host, vmcs: &CurrentVmcs, start: &EntryState) {
        self.control = match start.mode {
            StartMode::Long => ControlState::long(start.cr3.0),
            StartMode::Protected32 => ControlState::PROTECTED,
        };
        (self.event, self.postponed, self.nmi, self.halted) = (None, None, false, false);
        self.cpuid_state.osxsave = false;
        self.cpuid_state.xcr0 = self.control.xcr0;
        self.primary = self.controls.primary.bits();
        self.loaded = false;
        self.refresh_paging();
        let long = self.control.efer.contains(Efer::LMA);
        self.controls.write(vmcs, long);
        if self.controls.has(Feature::MsrBitmaps) {
            vmcs.write(fields::MSR_BITMAP, self.guest.model.msr_bitmap.0);
        }
        if let Some(apic) = &self.apic {
            apic.write(vmcs);
        }
        vmcs.write(fields::TSC_OFFSET, self.tsc_offset);
        let capabilities = &host.vmx.capabilities;
        let mut state = match start.mode {
            StartMode::Long => GuestState::long_mode(capabilities, 0, start.rip, start.rsp),
            StartMode::Protected32 => {
                GuestState::protected_mode(capabilities, 0, start.rip as u32, start.rsp as u32)
            }
        };
        let code = if long { AccessRights::CODE_64 } else { AccessRights::CODE_32 };
        *state.segment_mut(SegmentName::Cs) = Segment::flat(start.code, code);
        for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Fs, SegmentName::Gs, SegmentName::Ss] {
            *state.segment_mut(name) = Segment::flat(start.data, AccessRights::DATA);
        }
        state.gdtr = Table { base: start.gdt_base.0, limit: start.gdt_limit };
        state.write(vmcs, &self.controls);
        let model = &self.guest.model;
        vmcs.write(fields::CR0_GUEST_HOST_MASK, rules::cr0_host_mask());
        vmcs.write(fields::CR4_GUEST_HOST_MASK, rules::cr4_host_mask(&model.control, &model.fixed));
        self.write_control_registers(vmcs, None);
        self.entry.registers = GuestRegisters {
            rax: start.rax,
            rbx: start.rbx,
            rsi: start.rsi,
            rdi: start.rdi,
            ..GuestRegisters::default()
        };
    }

    /// Takes the vCPU onto this core: its VMCS becomes the current one, the state outside of it is loaded.
    fn load(&mut self, core: &Core) -> Result<CurrentVmcs, Leave> {
        // SAFETY: the core is in VMX operation; a vCPU belongs to one core, and the VMCS that was current before
        // is not used until its vCPU is loaded again.
        let vmcs = unsafe { self.vmcs.load() }.expect("a VMCS of ours can be loaded");
        if !self.loaded {
            self.loaded = true;
            // SAFETY: the core's tables and task register were loaded at its start.
            let host_state = unsafe { HostState::of_this_core() };
            host_state.write(&vmcs, &self.controls);
            self.mmu.forget_tags();
            self.place_apic_page(core);
            if let Err(Next::Leave(leave)) = self.load_root(core, &vmcs, Flush::All) {
                return Err(leave);
            }
        }
        core.writer.count(Event::VcpuSwitch);
        let another = core.last_guest.replace(Some(self.guest.identity())) != Some(self.guest.identity());
        core.host.vmx.mitigations.switch(self.msrs.speculation_control(), another);
        self.on_core = true;
        self.extended.load(&self.guest.model, &self.control);
        Ok(vmcs)
    }

    /// The core will run another vCPU.
    pub fn unload(&mut self) {
        if core::mem::take(&mut self.on_core) {
            self.extended.save(&self.guest.model, &self.control);
        }
    }

    /// Runs until its turn ends, it halts, or its guest ends.
    #[inline(never)]
    pub fn run(&mut self, core: &Core, turn: Turn) -> Leave {
        self.presence.wakes();
        self.presence.looks();
        if let Some(end) = self.guest.ends() {
            return Leave::Ended(end);
        }
        if self.parked && !self.wake(core) {
            return self.sleep(None);
        }
        let vmcs = if !self.on_core || !self.loaded {
            match self.load(core) {
                Ok(vmcs) => vmcs,
                Err(leave) => return leave,
            }
        } else {
            // SAFETY: no other VMCS was loaded on this core since this one.
            unsafe { self.vmcs.load() }.expect("a VMCS of ours can be loaded")
        };
        self.attend();
        // At hand: every entry and exit writes there.
        let presence = Arc::clone(&self.presence);
        loop {
            // One comparison finds what waits for a look, what is due in the devices, and the end of the slice.
            let now = time::tsc();
            if now >= self.due_tsc
                && let Next::Leave(leave) = self.overdue(core, &vmcs, now, turn)
            {
                return leave;
            }
            match self.enter(core, &vmcs, &presence, now) {
                EntryOutcome::Exited => {
                    if let Next::Leave(leave) = self.exited(core, &vmcs) {
                        return leave;
                    }
                }
                EntryOutcome::Aborted => {
                    core.writer.count(Event::EntryAborted);
                    self.attend();
                }
                EntryOutcome::Failed(error) => {
                    return self.stop(core, &vmcs, &format_args!("the processor refused its state: {error}"));
                }
            }
        }
    }

    /// One entry, from the last look at the flush generation to the exit.
    #[inline(always)]
    fn enter(&mut self, core: &Core, vmcs: &CurrentVmcs, presence: &Presence, now_tsc: u64) -> EntryOutcome {
        presence.enters(now_tsc);
        let generation = self.guest.generation.load(Ordering::SeqCst);
        if !self.mmu.is_good(generation) {
            core.invvpid.flush_context(self.vpid_base + self.mmu.tag() as u16);
            self.mmu.flushed(generation);
            presence.flushes(generation);
            core.writer.count(Event::FlushLocal);
        }
        // SAFETY: the VMCS is this vCPU's and current; its controls and state are ours, with CR3 a shadow root that
        // leads to this guest's frames alone; the host state is this core's; interrupts are off.
        let outcome = unsafe { self.entry.enter(vmcs, &core.per_core.kick) };
        presence.came_out();
        outcome
    }

    /// Something is due: a look around, or only the preemption timer's next count.
    #[inline(never)]
    fn overdue(&mut self, core: &Core, vmcs: &CurrentVmcs, now_tsc: u64, turn: Turn) -> Next {
        if self.due_tsc != 0 && now_tsc < self.deadline_tsc {
            self.arm(core, vmcs, now_tsc);
            return Next::Resume;
        }
        self.look_around(core, vmcs, turn)
    }

    /// Sees to it that the run ends at `deadline_tsc`.
    fn arm(&mut self, core: &Core, vmcs: &CurrentVmcs, now_tsc: u64) {
        self.due_tsc = self.deadline_tsc;
        if self.controls.has(Feature::PreemptionTimer) {
            let shift = core.host.vmx.capabilities.misc.preemption_timer_shift();
            vmcs.write(fields::PREEMPTION_TIMER_VALUE, preemption::count(now_tsc, self.deadline_tsc, shift));
            self.due_tsc = self.deadline_tsc.min(now_tsc + time::ns_to_ticks(preemption::BELIEVED_NS));
        } else {
            let wait = self.deadline_tsc.saturating_sub(now_tsc);
            crate::host::apic::arm_timer(time::ticks_to_ns(wait).max(1));
        }
    }

    /// What an entry may need and an exit may have changed: requests from outside, devices, deadlines, events.
    #[inline(never)]
    fn look_around(&mut self, core: &Core, vmcs: &CurrentVmcs, turn: Turn) -> Next {
        core.per_core.kick.store(0, Ordering::SeqCst);
        self.take_back_event(vmcs);
        // All that a kick may be for is looked at after this.
        self.presence.looks();
        if let Some(end) = self.guest.ends() {
            return Next::Leave(Leave::Ended(end));
        }
        self.presence.exits.store(self.exits(), Ordering::Relaxed);
        let typed = crate::console::tend(core.index);
        let turn_end_tsc = turn.end_on(core.index);
        if time::tsc() >= turn_end_tsc || typed {
            return Next::Leave(Leave::Slice);
        }
        self.take_task_priority();
        self.revive();
        let (next_tsc, startup) = self.update_devices(core);
        if let Some(startup) = startup
            && let Next::Leave(leave) = self.heed(startup)
        {
            return Next::Leave(leave);
        }
        if self.choose_event(core, vmcs) {
            self.halted = false;
        }
        self.give_task_priority(vmcs);
        // Also on the way to sleep: who is woken may be the one that this vCPU waits for.
        let mailbox_tsc = self.look_into_mailbox();
        if self.halted {
            return self.still_halted(vmcs, next_tsc);
        }
        let patience_tsc = crate::console::patience_tsc(core.index).min(mailbox_tsc);
        self.deadline_tsc = next_tsc.map_or(turn_end_tsc, |tsc| tsc.min(turn_end_tsc)).min(patience_tsc);
        self.arm(core, vmcs, time::tsc());
        Next::Resume
    }

    /// Does something with the guest's devices, and tells those for whom it raised something: other vCPUs look around
    /// soon, this one before it goes in again.
    #[inline]
    pub(crate) fn operate<R>(&mut self, operate: impl FnOnce(&mut Devices) -> R) -> R {
        let mut devices = self.guest.devices.lock();
        let result = operate(&mut devices);
        let kicks = devices.take_kicks();
        drop(devices);
        if kicks != 0 {
            self.notify(kicks);
        }
        result
    }

    #[inline(never)]
    fn notify(&mut self, kicks: u64) {
        let own = 1 << self.index;
        if kicks & own != 0 {
            self.attend();
        }
        self.guest.kick(kicks & !own);
    }

    /// Lets the devices catch up, drains their console, and says when they are due next and what was asked of the vCPU
    /// itself.
    fn update_devices(&mut self, core: &Core) -> (Option<u64>, Option<Startup>) {
        let guest = &*self.guest;
        let now_ns = guest.now_ns();
        let mut devices = guest.devices.lock();
        if devices.is_due(now_ns) {
            devices.advance(now_ns);
        }
        if devices.console_is_due() {
            crate::console::drain(guest, &mut devices);
        }
        let startup = match devices.requests(self.index).contains(Requests::STARTUP) {
            true => devices.take_startup(self.index),
            false => None,
        };
        let deadline_ns = devices.next_deadline_ns(self.index);
        let unclaimed = devices.take_unclaimed_port();
        // Its own requests are looked at next.
        let others = devices.take_kicks() & !(1 << self.index);
        drop(devices);
        if others != 0 {
            guest.kick(others);
        }
        if let Some(port) = unclaimed {
            core.writer.count(Event::PortUnclaimed);
            log::info!(
                "guest {}: first access ({:?}) to port {:#x}, which no device has: it reads all-ones",
                guest.name(),
                port.access,
                port.port
            );
        }
        (deadline_ns.map(|ns| guest.tsc_at(ns)), startup)
    }

    /// The exit: counts it, remembers it, handles it.
    #[inline(always)]
    fn exited(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let field = vmcs.read(fields::EXIT_REASON);
        let reason = ExitReason::from_field(field);
        let rip = vmcs.read(fields::GUEST_RIP);
        core.writer.exit(reason.0);
        self.log.push(reason, vmcs.read(fields::EXIT_QUALIFICATION), rip);
        // The cheapest to handle goes past the jump table, which would cost it a twentieth.
        if field == u32::from(ExitReason::CPUID.0) {
            self.cpuid(vmcs, rip);
            return Next::Resume;
        }
        self.handle(core, vmcs, reason)
    }

    /// Looks at events and deadlines before the next entry.
    #[inline]
    pub(crate) fn attend(&mut self) {
        self.due_tsc = 0;
    }

    /// Moves past the instruction that exited.
    #[inline]
    pub(crate) fn skip(&mut self, vmcs: &CurrentVmcs) {
        let length = u64::from(vmcs.read(fields::EXIT_INSTRUCTION_LENGTH));
        self.advance(vmcs, vmcs.read(fields::GUEST_RIP), length);
    }

    /// The exit that carries the last words is at hand: how many there were.
    pub(crate) fn exits(&self) -> u64 {
        self.log.total() as u64
    }

    /// The VMCS's page, to be given back when the vCPU is gone.
    fn region(&self) -> Hpa {
        self.vmcs.region()
    }

    /// Gives back what the vCPU holds. It runs no more.
    pub fn dispose(mut self: Box<Self>, core: &Core) {
        self.presence.exits.store(self.exits(), Ordering::Relaxed);
        self.guest.mmu.lock().drop_root(&mut self.mmu);
        // SAFETY: the core is in VMX operation and this vCPU's; its CurrentVmcs is gone.
        let cleared = unsafe { self.vmcs.clear() };
        debug_assert!(cleared.is_ok());
        self.extended.dispose(core.index);
        if let Some(apic) = &self.apic {
            apic.dispose(core.index);
        }
        give_back(core.index, self.region());
        write_cr2(0);
    }
}
