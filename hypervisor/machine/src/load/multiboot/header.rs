//! The Multiboot header in a kernel's file.

use alloc::vec;

use crate::load::error::Fault;
use crate::load::image::{Image, Segment, slice};

const MAGIC: u32 = 0x1bad_b002;
/// The header lies within so many bytes.
const SEARCH_BYTES: usize = 8192;
/// Bits 0 to 15 are requirements: page-aligned modules (0), memory information (1), video (2) are met or, as
/// video, may be left to the kernel to notice.
const REQUIREMENTS: u32 = 0xffff;
const KNOWN_REQUIREMENTS: u32 = 0b111;
/// The address fields are valid.
const HAS_ADDRESSES: u32 = 1 << 16;

/// A valid header.
pub(super) struct Header {
    /// Its offset in the file.
    offset: u64,
    flags: u32,
    pub(super) addresses: Option<Addresses>,
}

/// The "a.out kludge": where a flat image goes, in physical addresses.
#[derive(Clone, Copy)]
pub(super) struct Addresses {
    header: u64,
    load: u64,
    /// 0: to the end of the file.
    load_end: u64,
    /// 0: no bss.
    bss_end: u64,
    entry: u64,
}

/// Finds the header: 4-byte aligned, wholly in the first 8 KiB, its first three words adding up to 0.
pub(super) fn find(file: &[u8]) -> Option<Header> {
    let file = file.get(..SEARCH_BYTES).unwrap_or(file);
    let word = |offset: usize| {
        let bytes = file.get(offset..offset + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    (0..file.len()).step_by(4).find_map(|offset| {
        if word(offset)? != MAGIC {
            return None;
        }
        let (flags, checksum) = (word(offset + 4)?, word(offset + 8)?);
        if MAGIC.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = if flags & HAS_ADDRESSES == 0 {
            None
        } else {
            let field = |index: usize| word(offset + 12 + 4 * index).map(u64::from);
            Some(Addresses {
                header: field(0)?,
                load: field(1)?,
                load_end: field(2)?,
                bss_end: field(3)?,
                entry: field(4)?,
            })
        };
        Some(Header { offset: offset as u64, flags, addresses })
    })
}

impl Header {
    /// The requirements that we do not know, as bits.
    pub(super) const fn unknown_requirements(&self) -> u32 {
        self.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS
    }

    /// The flat image that the address fields describe.
    pub(super) fn image<'a>(&self, file: &'a [u8]) -> Result<Image<'a>, Fault> {
        let addresses = self.addresses.ok_or(Fault::NotMultiboot)?;
        let Addresses { header, load, load_end, bss_end, entry } = addresses;
        let before = header
            .checked_sub(load)
            .ok_or(Fault::Inconsistent("the Multiboot header_addr lies below load_addr"))?;
        let offset = self
            .offset
            .checked_sub(before)
            .ok_or(Fault::Inconsistent("the Multiboot load_addr lies before the file"))?;
        let file_bytes = match load_end {
            0 => file.len() as u64 - offset,
            end => end
                .checked_sub(load)
                .ok_or(Fault::Inconsistent("the Multiboot load_end_addr lies below load_addr"))?,
        };
        let bytes = slice(file, offset, file_bytes, "the Multiboot image")?;
        let memory_bytes = match bss_end {
            0 => file_bytes,
            end => end
                .checked_sub(load)
                .filter(|&bytes| bytes >= file_bytes)
                .ok_or(Fault::Inconsistent("the Multiboot bss_end_addr lies below load_end_addr"))?,
        };
        if !(load..load + memory_bytes).contains(&entry) {
            return Err(Fault::Entry { entry });
        }
        Ok(Image { segments: vec![Segment { start: load, bytes, memory_bytes }], entry })
    }
}
