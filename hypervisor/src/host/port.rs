//! One I/O port whose device we own: unsafe to make, safe to use.

use x86_64::instructions::port::Port;

/// An I/O port. The promise made once at its creation is what makes the accesses safe.
#[derive(Clone, Copy, Debug)]
pub struct IoPort(u16);

impl IoPort {
    /// Names a port.
    ///
    /// # Safety
    /// No access to this port may change memory or the processor: it belongs to a device that this module
    /// drives alone, and the device does no DMA.
    #[must_use]
    pub const unsafe fn new(port: u16) -> Self {
        Self(port)
    }

    /// Reads a byte.
    #[must_use]
    pub fn read(self) -> u8 {
        // SAFETY: `new` promised that the access touches the device alone.
        unsafe { Port::new(self.0).read() }
    }

    /// Writes a byte.
    pub fn write(self, value: u8) {
        // SAFETY: `new` promised that the access touches the device alone.
        unsafe { Port::new(self.0).write(value) }
    }

    /// Reads four bytes.
    #[must_use]
    pub fn read_u32(self) -> u32 {
        // SAFETY: `new` promised that the access touches the device alone.
        unsafe { Port::new(self.0).read() }
    }

    /// Writes four bytes.
    pub fn write_u32(self, value: u32) {
        // SAFETY: `new` promised that the access touches the device alone.
        unsafe { Port::new(self.0).write(value) }
    }
}
