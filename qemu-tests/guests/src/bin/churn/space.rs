//! Address spaces of processes: pages that come when they are touched, copies that share until one writes.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use test_guests::paging::{D, P, W};
use test_guests::trap::{Frame, handle};
use test_guests::{cpu, println};

use crate::frames;

/// Where a process's pages lie: from 512 GiB on.
pub const USER: u64 = 1 << 39;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Copy when it is written: a bit that the processor ignores.
const COPY: u64 = 1 << 9;
const PAGE_FAULT: u8 = 14;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;

/// The entry for the first 512 GiB, which all spaces share.
static IDENTITY: AtomicU64 = AtomicU64::new(0);
static HOME: AtomicU64 = AtomicU64::new(0);
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Takes over the identity map, and the page faults.
pub fn adopt(root: u64) {
    HOME.store(root, Relaxed);
    IDENTITY.store(cpu::read64(root), Relaxed);
    handle(PAGE_FAULT, page_fault);
}

/// Leaves all processes.
pub fn go_home() {
    cpu::write_cr3(HOME.load(Relaxed));
}

/// Page faults so far.
pub fn faults() -> u64 {
    FAULTS.load(Relaxed)
}

fn page_fault(frame: &mut Frame) {
    FAULTS.fetch_add(1, Relaxed);
    let address = cpu::read_cr2();
    let slot = Space { root: cpu::read_cr3() }.slot(address, 1);
    let entry = cpu::read64(slot);
    let frame_of = entry & FRAME;
    let new = match (frame.error & PRESENT, entry & P) {
        (0, 0) if address >= USER => frames::take() | P | W,
        (PRESENT, P) if frame.error & WRITE != 0 && entry & COPY != 0 => {
            if frames::is_shared(frame_of) {
                let own = frames::take();
                frames::copy(frame_of, own);
                frames::give(frame_of);
                own | P | W
            } else {
                frame_of | P | W
            }
        }
        _ => panic!("#PF at {address:#x}, error {:#x}, entry {entry:#x}: BAD", frame.error),
    };
    cpu::write64(slot, new);
    cpu::invlpg(address);
}

/// The address space of a process.
#[derive(Clone, Copy)]
pub struct Space {
    root: u64,
}

impl Space {
    /// An empty one.
    pub fn new() -> Self {
        let root = frames::take();
        cpu::write64(root, IDENTITY.load(Relaxed));
        Self { root }
    }

    /// Its top table.
    pub fn root(self) -> u64 {
        self.root
    }

    /// Lets the processor use it.
    pub fn load(self) {
        cpu::write_cr3(self.root);
    }

    /// Where the entry of this level for an address lies; tables are made on the way.
    pub fn slot(self, address: u64, level: u32) -> u64 {
        let mut table = self.root;
        for above in (level + 1..=4).rev() {
            let slot = slot_in(table, address, above);
            let mut entry = cpu::read64(slot);
            if entry & P == 0 {
                entry = frames::take() | P | W;
                cpu::write64(slot, entry);
            }
            table = entry & FRAME;
        }
        slot_in(table, address, level)
    }

    /// A second process with the same pages, until either writes. Forgets nothing: load a root afterwards.
    pub fn fork(self) -> Self {
        let root = frames::take();
        cpu::write64(root, IDENTITY.load(Relaxed));
        for slot in (8..4096).step_by(8) {
            copy_entry(self.root + slot, root + slot, 4);
        }
        Self { root }
    }

    /// Gives all of it back. The processor uses another one.
    pub fn end(self) {
        for slot in (8..4096).step_by(8) {
            give_entry(self.root + slot, 4);
        }
        frames::give(self.root);
    }

    /// Pages that the processor sees otherwise than a walk of the tables by hand; it uses this space.
    pub fn differences(self, pages: impl Iterator<Item = u64>) -> u32 {
        let mut bad = 0;
        for address in pages {
            let entry = cpu::read64(self.slot(address, 1));
            if entry & P == 0 {
                continue;
            }
            let by_hand = (entry & FRAME) + (address & 0xfff);
            for word in [0, 8, 16, 2048, 4088] {
                bad += u32::from(cpu::read64(address + word) != cpu::read64(by_hand + word));
            }
        }
        if bad != 0 {
            println!("churn: {bad} words are not what the tables say: BAD");
        }
        bad
    }
}

fn slot_in(table: u64, address: u64, level: u32) -> u64 {
    table + (address >> (12 + 9 * (level - 1)) & 511) * 8
}

fn copy_entry(from: u64, to: u64, level: u32) {
    let entry = cpu::read64(from);
    if entry & P == 0 {
        return;
    }
    let target = entry & FRAME;
    if level == 1 {
        frames::share(target);
        let shared = entry & !(W | D) | COPY;
        cpu::write64(from, shared);
        cpu::write64(to, shared);
        return;
    }
    let table = frames::take();
    for slot in (0..4096).step_by(8) {
        copy_entry(target + slot, table + slot, level - 1);
    }
    cpu::write64(to, table | P | W);
}

fn give_entry(slot: u64, level: u32) {
    let entry = cpu::read64(slot);
    if entry & P == 0 {
        return;
    }
    if level > 1 {
        for slot in (0..4096).step_by(8) {
            give_entry((entry & FRAME) + slot, level - 1);
        }
    }
    frames::give(entry & FRAME);
}
