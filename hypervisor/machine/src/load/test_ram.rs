//! Guest RAM for tests: two vectors, at 0 and at 4 GiB.

use std::cell::RefCell;

use memory::{Gpa, GuestMemory, Unbacked};

use super::RamLayout;

pub(super) struct TestRam {
    low: RefCell<Vec<u8>>,
    high: RefCell<Vec<u8>>,
}

impl TestRam {
    pub(super) fn new(low_bytes: usize) -> Self {
        Self { low: RefCell::new(vec![0; low_bytes]), high: RefCell::new(Vec::new()) }
    }

    pub(super) fn with_high(low_bytes: usize, high_bytes: usize) -> Self {
        Self { low: RefCell::new(vec![0; low_bytes]), high: RefCell::new(vec![0; high_bytes]) }
    }

    pub(super) fn layout(&self) -> RamLayout {
        RamLayout { low_bytes: self.low.borrow().len() as u64, high_bytes: self.high.borrow().len() as u64 }
    }

    /// Fills all RAM with `byte`, as if it had been another guest's.
    pub(super) fn poison(&self, byte: u8) {
        self.low.borrow_mut().fill(byte);
        self.high.borrow_mut().fill(byte);
    }

    pub(super) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.read(Gpa(gpa), &mut buf).unwrap();
        buf
    }

    /// A NUL-terminated string.
    pub(super) fn text(&self, gpa: u64) -> String {
        let bytes = self.bytes(gpa, 4096);
        let end = bytes.iter().position(|&byte| byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }

    fn with<R>(&self, gpa: Gpa, len: usize, act: impl FnOnce(&mut [u8]) -> R) -> Result<R, Unbacked> {
        let (cell, start) = match gpa.0.checked_sub(RamLayout::HIGH_START) {
            Some(start) => (&self.high, start),
            None => (&self.low, gpa.0),
        };
        let mut ram = cell.borrow_mut();
        let start = usize::try_from(start).map_err(|_| Unbacked(gpa))?;
        let end = start.checked_add(len).ok_or(Unbacked(gpa))?;
        ram.get_mut(start..end).map(act).ok_or(Unbacked(gpa))
    }
}

impl GuestMemory for TestRam {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        self.with(gpa, buf.len(), |ram| buf.copy_from_slice(ram))
    }
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        self.with(gpa, bytes.len(), |ram| ram.copy_from_slice(bytes))
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        self.with(gpa, 4, |ram| u32::from_le_bytes((&*ram).try_into().unwrap()))
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        self.with(gpa, 8, |ram| u64::from_le_bytes((&*ram).try_into().unwrap()))
    }
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        let same = self.load_u32(gpa)? == old;
        if same {
            self.write(gpa, &new.to_le_bytes())?;
        }
        Ok(same)
    }
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        let same = self.load_u64(gpa)? == old;
        if same {
            self.write(gpa, &new.to_le_bytes())?;
        }
        Ok(same)
    }
}
