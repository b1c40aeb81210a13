//! The I/O APICs: all inputs masked, but for the PIT as an NMI where a slice has no other end.

use spin::Mutex;

const INDEX: usize = 0;
const DATA: usize = 4;
const VERSION: u32 = 1;
const TABLE: u32 = 0x10;

const MASKED: u32 = 1 << 16;
const DELIVERY_NMI: u32 = 4 << 8;

/// A mapped I/O APIC.
struct IoApic {
    registers: *mut u32,
    first_gsi: u32,
}

// SAFETY: the registers are reached only under the lock of `ALL`.
unsafe impl Send for IoApic {}

static ALL: Mutex<heapless::Vec<IoApic, 8>> = Mutex::new(heapless::Vec::new());

impl IoApic {
    fn select(&self, register: u32) {
        // SAFETY: `add` was given the mapping of the registers.
        let index = unsafe { self.registers.add(INDEX) };
        // SAFETY: as above; the index register only chooses.
        unsafe { index.write_volatile(register) }
    }

    fn write(&self, register: u32, value: u32) {
        self.select(register);
        // SAFETY: `add` was given the mapping of the registers.
        let data = unsafe { self.registers.add(DATA) };
        // SAFETY: as above.
        unsafe { data.write_volatile(value) }
    }

    fn read(&self, register: u32) -> u32 {
        self.select(register);
        // SAFETY: `add` was given the mapping of the registers.
        let data = unsafe { self.registers.add(DATA) };
        // SAFETY: as above.
        unsafe { data.read_volatile() }
    }

    fn inputs(&self) -> u32 {
        (self.read(VERSION) >> 16 & 0xff) + 1
    }
}

/// Takes an I/O APIC whose first input is `first_gsi`, and masks all its inputs. Returns how many it has.
///
/// # Safety
/// `registers` maps its page, uncached, for ever.
pub unsafe fn add(registers: u64, first_gsi: u32) -> u32 {
    let apic = IoApic { registers: registers as *mut u32, first_gsi };
    let inputs = apic.inputs();
    for input in 0..inputs {
        apic.write(TABLE + 2 * input, MASKED);
    }
    let _ = ALL.lock().push(apic);
    inputs
}

/// Sends the edges of input `gsi` as NMIs to the core with this APIC id (up to 255; 255 means every core).
/// `false` if no I/O APIC has that input.
#[must_use]
pub fn route_nmi(gsi: u32, target: u8) -> bool {
    with_input(gsi, |apic, input| {
        apic.write(TABLE + 2 * input + 1, u32::from(target) << 24);
        apic.write(TABLE + 2 * input, DELIVERY_NMI);
    })
}

/// Masks input `gsi` again.
pub fn mask(gsi: u32) {
    let _ = with_input(gsi, |apic, input| apic.write(TABLE + 2 * input, MASKED));
}

fn with_input(gsi: u32, act: impl FnOnce(&IoApic, u32)) -> bool {
    let all = ALL.lock();
    let found = all.iter().find_map(|apic| {
        let input = gsi.checked_sub(apic.first_gsi)?;
        (input < apic.inputs()).then_some((apic, input))
    });
    found.map(|(apic, input)| act(apic, input)).is_some()
}
