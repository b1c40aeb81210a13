//! Our own image: where it runs, and which rights each part of it wants.

use core::sync::atomic::{AtomicU64, Ordering};

use elf::ElfBytes;
use elf::abi::{PF_W, PF_X, PT_GNU_RELRO, PT_LOAD};
use elf::endian::LittleEndian;
use memory::PAGE_SIZE;

use super::paging::Rights;

/// A page-aligned part of the image, in link addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte, relative to the image's base.
    pub start: u64,
    /// First byte after.
    pub end: u64,
    /// What may be done there.
    pub rights: Rights,
}

/// Parts that an image may have: four loadable ones as the linker lays them out, cut by the RELRO range.
pub type Segments = heapless::Vec<Segment, 16>;

/// Why the image in memory is not one that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadImage {
    /// No ELF64 little-endian file with program headers.
    NotElf,
    /// A segment both writable and executable, at this link address.
    WritableCode(u64),
    /// More segments than expected.
    TooMany,
}

/// The parts of the ELF file `file`, ascending. The data that only the relocations write (PT_GNU_RELRO) is
/// read-only by now.
///
/// # Errors
/// See [`BadImage`].
pub fn segments(file: &[u8]) -> Result<Segments, BadImage> {
    let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| BadImage::NotElf)?;
    let headers = elf.segments().ok_or(BadImage::NotElf)?;
    let relro = headers
        .iter()
        .find(|header| header.p_type == PT_GNU_RELRO)
        .map(|header| (page_down(header.p_vaddr), page_down(header.p_vaddr.saturating_add(header.p_memsz))));
    let mut segments = Segments::new();
    let mut push = |start: u64, end: u64, rights| {
        if start >= end {
            return Ok(());
        }
        segments.push(Segment { start, end, rights }).map_err(|_| BadImage::TooMany)
    };
    for header in headers.iter().filter(|header| header.p_type == PT_LOAD) {
        let start = page_down(header.p_vaddr);
        let end = header.p_vaddr.saturating_add(header.p_memsz).next_multiple_of(PAGE_SIZE);
        match (header.p_flags & PF_W != 0, header.p_flags & PF_X != 0) {
            (true, true) => return Err(BadImage::WritableCode(header.p_vaddr)),
            (false, true) => push(start, end, Rights::ReadExecute)?,
            (false, false) => push(start, end, Rights::ReadOnly)?,
            (true, false) => {
                let (from, to) = relro.unwrap_or((start, start));
                let (from, to) = (from.clamp(start, end), to.clamp(start, end));
                push(start, from, Rights::ReadWrite)?;
                push(from, to, Rights::ReadOnly)?;
                push(to, end, Rights::ReadWrite)?;
            }
        }
    }
    Ok(segments)
}

const fn page_down(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

static BASE: AtomicU64 = AtomicU64::new(0);
static TEXT_START: AtomicU64 = AtomicU64::new(0);
static TEXT_END: AtomicU64 = AtomicU64::new(0);

/// Remembers where the image runs, for backtraces.
pub fn set_base(base: u64) {
    BASE.store(base, Ordering::Relaxed);
}

/// Remembers where the code is, for backtraces.
pub fn set_text(start: u64, end: u64) {
    TEXT_START.store(start, Ordering::Relaxed);
    TEXT_END.store(end, Ordering::Relaxed);
}

/// A run-time address as a link address: what a debugger wants.
#[must_use]
pub fn offset(address: u64) -> u64 {
    address.wrapping_sub(BASE.load(Ordering::Relaxed))
}

/// Whether `address` can be code of ours; everything can before [`set_text`].
#[must_use]
pub fn is_text(address: u64) -> bool {
    let end = TEXT_END.load(Ordering::Relaxed);
    end == 0 || (TEXT_START.load(Ordering::Relaxed)..end).contains(&address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal ELF64 file with these (type, flags, vaddr, memsz).
    fn file(headers: &[(u32, u32, u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        bytes.resize(16, 0);
        bytes.extend(3u16.to_le_bytes());
        bytes.extend(62u16.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(64u64.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        for half in [64u16, 56, headers.len() as u16, 64, 0, 0] {
            bytes.extend(half.to_le_bytes());
        }
        for &(kind, flags, address, size) in headers {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            for word in [0, address, address, size, size, 0x1000] {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn the_relocated_data_is_read_only() {
        let segments = segments(&file(&[
            (PT_LOAD, 4, 0, 0x800),
            (PT_LOAD, 5, 0x1800, 0x1000),
            (PT_LOAD, 6, 0x3800, 0x800),
            (PT_LOAD, 6, 0x5000, 0x2100),
            (PT_GNU_RELRO, 4, 0x3800, 0x800),
        ]))
        .unwrap();
        let found: Vec<_> = segments.iter().map(|s| (s.start, s.end, s.rights)).collect();
        assert_eq!(
            found,
            [
                (0, 0x1000, Rights::ReadOnly),
                (0x1000, 0x3000, Rights::ReadExecute),
                (0x3000, 0x4000, Rights::ReadOnly),
                (0x5000, 0x8000, Rights::ReadWrite),
            ]
        );
    }

    #[test]
    fn writable_code_is_refused() {
        assert_eq!(segments(&file(&[(PT_LOAD, 7, 0x1000, 0x1000)])), Err(BadImage::WritableCode(0x1000)));
        assert_eq!(segments(b"nothing"), Err(BadImage::NotElf));
    }
}
