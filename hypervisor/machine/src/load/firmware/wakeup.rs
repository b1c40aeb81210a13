//! The multiprocessor wakeup mailbox (ACPI specification, "Multiprocessor Wakeup Structure"): how a guest starts
//! its other processors without real mode.
//!
//! Such a processor is not entered at all until the guest wakes it, and the mailbox is plain memory: the hypervisor
//! looks into it ([`wanted`]) when a processor of the guest looks around. The one that is wanted then [takes](take)
//! the command and starts in [`super::super::stage::secondary`]'s state.

use memory::{Gpa, GuestMemory, Unbacked};

const NOOP: u32 = 0;
const WAKEUP: u16 = 1;
/// Offsets in the mailbox: a 16-bit command, then these.
const APIC_ID: u64 = 4;
const VECTOR: u64 = 8;

/// Whom the guest wants woken, by APIC identifier: the command is still to be [taken](take). `None`: nobody.
///
/// # Errors
/// [`Unbacked`] if the mailbox is no RAM.
pub fn wanted(memory: &dyn GuestMemory, mailbox: Gpa) -> Result<Option<u32>, Unbacked> {
    if memory.load_u32(mailbox)? as u16 != WAKEUP {
        return Ok(None);
    }
    memory.load_u32(Gpa(mailbox.0 + APIC_ID)).map(Some)
}

/// Takes a wakeup meant for the processor `apic_id`: the address where it starts, or `None` if there is none.
///
/// The guest writes identifier and address before the command, and waits until the command is taken back.
///
/// # Errors
/// [`Unbacked`] if the mailbox is no RAM.
pub fn take(memory: &dyn GuestMemory, mailbox: Gpa, apic_id: u32) -> Result<Option<u64>, Unbacked> {
    let command = memory.load_u32(mailbox)?;
    if command as u16 != WAKEUP || memory.load_u32(Gpa(mailbox.0 + APIC_ID))? != apic_id {
        return Ok(None);
    }
    let vector = memory.load_u64(Gpa(mailbox.0 + VECTOR))?;
    // Taking the command back last tells the guest that the rest may be overwritten. If the guest changed it
    // meanwhile, this was no wakeup.
    let taken = memory.compare_exchange_u32(mailbox, command, NOOP)?;
    Ok(taken.then_some(vector))
}

#[cfg(test)]
mod tests {
    use super::super::super::test_ram::TestRam;
    use super::*;

    #[test]
    fn a_wakeup_is_taken_once_and_by_its_processor() {
        let ram = TestRam::new(0x2000);
        let mailbox = Gpa(0x1000);
        assert_eq!((wanted(&ram, mailbox), take(&ram, mailbox, 0)), (Ok(None), Ok(None)));
        ram.write(Gpa(0x1004), &3u32.to_le_bytes()).unwrap();
        ram.write(Gpa(0x1008), &0x9_8000u64.to_le_bytes()).unwrap();
        ram.write(mailbox, &1u16.to_le_bytes()).unwrap();
        assert_eq!((wanted(&ram, mailbox), take(&ram, mailbox, 2)), (Ok(Some(3)), Ok(None)));
        assert_eq!(take(&ram, mailbox, 3), Ok(Some(0x9_8000)));
        assert_eq!((wanted(&ram, mailbox), take(&ram, mailbox, 3)), (Ok(None), Ok(None)));
        assert_eq!(ram.load_u32(mailbox), Ok(0));
        assert!(take(&ram, Gpa(0x2000), 1).is_err());
    }
}
