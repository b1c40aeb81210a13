//! Executable images: what a file wants at which physical address. ELF files are read here.

use alloc::vec::Vec;

use elf::ElfBytes;
use elf::abi::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::segment::ProgramHeader;
use memory::{Gpa, GuestMemory};

use super::error::{Fault, LoadError};
use super::place::{Plan, zero};

/// Loadable segments taken from one file; real kernels have fewer than ten.
const SEGMENTS_MAX: usize = 128;
/// Where the 4 GiB that an entry state maps end.
const MAPPED_END: u64 = 1 << 32;
/// Linux links itself here, in the last 2 GiB of the address space.
const LINUX_VIRTUAL_START: u64 = 0xffff_ffff_8000_0000;

/// Bytes of a file and the zeros behind them, for one physical place.
pub(super) struct Segment<'a> {
    /// Physical address.
    pub(super) start: u64,
    /// Content.
    pub(super) bytes: &'a [u8],
    /// Size in memory; at least that of `bytes`.
    pub(super) memory_bytes: u64,
}

/// An executable, ready to be placed.
pub(super) struct Image<'a> {
    pub(super) segments: Vec<Segment<'a>>,
    /// Physical address of the first instruction, below 4 GiB.
    pub(super) entry: u64,
}

impl Image<'_> {
    /// Takes the segments' places, then writes them.
    pub(super) fn place(&self, plan: &mut Plan, memory: &dyn GuestMemory) -> Result<(), LoadError> {
        for segment in &self.segments {
            plan.claim(segment.start, segment.memory_bytes).map_err(LoadError::kernel)?;
        }
        for segment in &self.segments {
            let file_bytes = segment.bytes.len() as u64;
            memory.write(Gpa(segment.start), segment.bytes).map_err(LoadError::backing)?;
            zero(memory, segment.start + file_bytes, segment.memory_bytes - file_bytes)
                .map_err(LoadError::backing)?;
        }
        Ok(())
    }

    /// Where the highest segment ends.
    pub(super) fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.start.saturating_add(segment.memory_bytes))
            .max()
            .unwrap_or(0)
    }
}

/// Which ELF classes a protocol takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Accept {
    /// x86-64 only.
    Elf64,
    /// i386 and x86-64.
    Both,
}

/// Reads an ELF executable.
pub(super) fn parse_elf(file: &[u8], accept: Accept) -> Result<Image<'_>, Fault> {
    let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(|_| Fault::NotElf)?;
    let header = &elf.ehdr;
    match (header.class, header.e_machine) {
        (Class::ELF64, EM_X86_64) => {}
        (Class::ELF32, EM_386) if accept == Accept::Both => {}
        (Class::ELF32, EM_386) => {
            let remedy = "build it for x86-64, or use protocol \"multiboot\" for a 32-bit entry";
            return Err(Fault::ElfKind { is: "a 32-bit ELF file", remedy });
        }
        _ => {
            let remedy = "build it for x86-64";
            return Err(Fault::ElfKind { is: "an ELF file for another machine", remedy });
        }
    }
    match header.e_type {
        ET_EXEC => {}
        ET_DYN => {
            let remedy = "link it statically at a fixed address (-static -no-pie, relocation-model=static)";
            return Err(Fault::ElfKind { is: "a position-independent ELF file", remedy });
        }
        _ => {
            let remedy = "link it as a static executable";
            return Err(Fault::ElfKind { is: "an ELF file that is no executable", remedy });
        }
    }
    let mut segments = Vec::new();
    let mut entry = None;
    for program in elf.segments().into_iter().flatten() {
        if program.p_type != PT_LOAD || program.p_memsz == 0 {
            continue;
        }
        if segments.len() == SEGMENTS_MAX {
            return Err(Fault::TooMany { what: "loadable segments", max: SEGMENTS_MAX });
        }
        segments.push(segment(file, &program)?);
        entry = entry.or_else(|| physical_entry(&program, header.e_entry));
    }
    if segments.is_empty() {
        return Err(Fault::NoSegments);
    }
    let entry = entry.filter(|&entry| entry < MAPPED_END);
    let entry = entry.ok_or(Fault::Entry { entry: header.e_entry })?;
    Ok(Image { segments, entry })
}

fn segment<'a>(file: &'a [u8], program: &ProgramHeader) -> Result<Segment<'a>, Fault> {
    if program.p_filesz > program.p_memsz {
        return Err(Fault::Inconsistent("a segment is larger in the file than in memory"));
    }
    let bytes = slice(file, program.p_offset, program.p_filesz, "a loadable segment")?;
    Ok(Segment { start: program.p_paddr, bytes, memory_bytes: program.p_memsz })
}

/// The entry point as a physical address, if it lies in this segment. Kernels that link themselves high name it
/// either way: vmlinux physically, others virtually.
fn physical_entry(program: &ProgramHeader, entry: u64) -> Option<u64> {
    let inside = |start: u64| entry.checked_sub(start).filter(|&offset| offset < program.p_memsz);
    inside(program.p_paddr)
        .or_else(|| inside(program.p_vaddr))
        .and_then(|offset| program.p_paddr.checked_add(offset))
}

/// `bytes` of the file from `offset` on.
pub(super) fn slice<'a>(
    file: &'a [u8],
    offset: u64,
    bytes: u64,
    what: &'static str,
) -> Result<&'a [u8], Fault> {
    let end = offset.checked_add(bytes);
    let range = end.and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
    range.and_then(|range| file.get(range)).ok_or(Fault::Truncated {
        what,
        needed_bytes: end.unwrap_or(u64::MAX),
        file_bytes: file.len() as u64,
    })
}

/// Whether this is an ELF64 file for x86-64.
pub(super) fn is_elf64(file: &[u8]) -> bool {
    ElfBytes::<LittleEndian>::minimal_parse(file)
        .is_ok_and(|elf| elf.ehdr.class == Class::ELF64 && elf.ehdr.e_machine == EM_X86_64)
}

/// Whether this is a vmlinux: an ELF64 executable that links itself where Linux does and carries a note whose
/// owner is Linux, or Xen (its PVH entry).
pub(super) fn is_linux_elf(file: &[u8]) -> bool {
    let Ok(elf) = ElfBytes::<LittleEndian>::minimal_parse(file) else {
        return false;
    };
    if elf.ehdr.class != Class::ELF64 || elf.ehdr.e_machine != EM_X86_64 {
        return false;
    }
    let programs = || elf.segments().into_iter().flatten();
    let high = programs().any(|program| program.p_type == PT_LOAD && program.p_vaddr >= LINUX_VIRTUAL_START);
    let noted = programs().filter(|program| program.p_type == PT_NOTE).any(|program| {
        slice(file, program.p_offset, program.p_filesz, "notes").is_ok_and(|notes| {
            let owned_by = |owner: &[u8]| note_owners(notes).any(|name| name == owner);
            owned_by(b"Linux\0") || owned_by(b"Xen\0")
        })
    });
    high && noted
}

/// The owners' names in a note segment: each note is three words (name's length, content's length, type), the
/// name and the content, both padded to words.
fn note_owners(notes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = notes;
    core::iter::from_fn(move || {
        let word = |index: usize| {
            let bytes = rest.get(index * 4..index * 4 + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
        };
        let (name_bytes, content_bytes) = (word(0)?, word(1)?);
        let name = rest.get(12..12usize.checked_add(name_bytes)?)?;
        let next = 12usize
            .checked_add(name_bytes.checked_next_multiple_of(4)?)?
            .checked_add(content_bytes.checked_next_multiple_of(4)?)?;
        rest = rest.get(next..).unwrap_or(&[]);
        Some(name)
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One loadable segment of a synthetic ELF file.
    #[derive(Clone)]
    pub(in super::super) struct Load {
        pub(in super::super) virt: u64,
        pub(in super::super) phys: u64,
        pub(in super::super) bytes: Vec<u8>,
        pub(in super::super) memory_bytes: u64,
    }

    /// An ELF64 executable of these segments, with `notes` as PT_NOTE if there are any.
    pub(in super::super) fn elf64(entry: u64, loads: &[Load], notes: &[u8]) -> Vec<u8> {
        let count = loads.len() + usize::from(!notes.is_empty());
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        file.extend(entry.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend([0; 12]);
        file.extend([64, 0, 56, 0, count as u8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(file.len(), 64);
        let mut offset = 64 + 56 * count as u64;
        let mut program = |kind: u32, virt: u64, phys: u64, file_bytes: u64, memory_bytes: u64| {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            for field in [offset, virt, phys, file_bytes, memory_bytes, 4] {
                file.extend(field.to_le_bytes());
            }
            offset += file_bytes;
        };
        for load in loads {
            program(PT_LOAD, load.virt, load.phys, load.bytes.len() as u64, load.memory_bytes);
        }
        if !notes.is_empty() {
            program(PT_NOTE, 0, 0, notes.len() as u64, notes.len() as u64);
        }
        for load in loads {
            file.extend(&load.bytes);
        }
        file.extend(notes);
        file
    }

    /// An ELF32 executable of one segment.
    pub(in super::super) fn elf32(entry: u32, load: &Load) -> Vec<u8> {
        let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
        file.extend(entry.to_le_bytes());
        file.extend(52u32.to_le_bytes());
        file.extend([0; 8]);
        file.extend([52, 0, 32, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let bytes = load.bytes.len() as u32;
        for field in [1, 84, load.virt as u32, load.phys as u32, bytes, load.memory_bytes as u32, 7, 4] {
            file.extend(u32::to_le_bytes(field));
        }
        assert_eq!(file.len(), 84);
        file.extend(&load.bytes);
        file
    }

    /// A note by `owner`.
    pub(in super::super) fn note(owner: &str, content: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [owner.len() as u32 + 1, content.len() as u32, 18] {
            note.extend(word.to_le_bytes());
        }
        for part in [[owner.as_bytes(), b"\0"].concat(), content.to_vec()] {
            note.extend(&part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    fn load(virt: u64, phys: u64, bytes: usize, memory_bytes: u64) -> Load {
        Load { virt, phys, bytes: vec![0x90; bytes], memory_bytes }
    }

    #[test]
    fn entry_points_are_physical_or_virtual() {
        let high = load(0xffff_ffff_8100_0000, 0x100_0000, 16, 0x1000);
        let file = elf64(0x100_0010, std::slice::from_ref(&high), &[]);
        assert_eq!(parse_elf(&file, Accept::Elf64).unwrap().entry, 0x100_0010);
        let file = elf64(0xffff_ffff_8100_0020, std::slice::from_ref(&high), &[]);
        assert_eq!(parse_elf(&file, Accept::Elf64).unwrap().entry, 0x100_0020);
        let file = elf64(0x5000, &[high], &[]);
        assert_eq!(parse_elf(&file, Accept::Elf64).err(), Some(Fault::Entry { entry: 0x5000 }));
    }

    #[test]
    fn wrong_kinds_are_named() {
        let good = elf64(0x20_0000, &[load(0x20_0000, 0x20_0000, 16, 16)], &[]);
        let mut shared = good.clone();
        shared[16] = 3;
        let fault = parse_elf(&shared, Accept::Elf64).err().unwrap();
        assert!(fault.to_string().contains("-no-pie"), "{fault}");
        let mut arm = good.clone();
        arm[18] = 0xb7;
        assert!(parse_elf(&arm, Accept::Both).err().unwrap().to_string().contains("another machine"));
        let small = elf32(0x10_0000, &load(0x10_0000, 0x10_0000, 16, 16));
        assert!(parse_elf(&small, Accept::Both).is_ok());
        assert!(parse_elf(&small, Accept::Elf64).err().unwrap().to_string().contains("32-bit"));
        assert_eq!(parse_elf(b"MZ", Accept::Both).err(), Some(Fault::NotElf));
        assert_eq!(parse_elf(&elf64(0, &[], &[]), Accept::Both).err(), Some(Fault::NoSegments));
        let cut = &good[..good.len() - 1];
        assert!(matches!(parse_elf(cut, Accept::Both), Err(Fault::Truncated { .. })));
        let swollen = elf64(0x20_0000, &[load(0x20_0000, 0x20_0000, 16, 15)], &[]);
        assert!(matches!(parse_elf(&swollen, Accept::Both), Err(Fault::Inconsistent(_))));
        let many = vec![load(0x20_0000, 0x20_0000, 1, 1); SEGMENTS_MAX + 1];
        assert!(matches!(parse_elf(&elf64(0x20_0000, &many, &[]), Accept::Both), Err(Fault::TooMany { .. })));
    }

    #[test]
    fn linux_is_told_by_its_notes() {
        let high = [load(0xffff_ffff_8100_0000, 0x100_0000, 16, 0x1000)];
        let notes = [note("GNU", b"12345"), note("Xen", &[0; 8])].concat();
        assert!(is_linux_elf(&elf64(0x100_0000, &high, &notes)));
        assert!(is_linux_elf(&elf64(0x100_0000, &high, &note("Linux", b""))));
        assert!(!is_linux_elf(&elf64(0x100_0000, &high, &note("GNU", b"12345"))));
        let low = [load(0x20_0000, 0x20_0000, 16, 16)];
        assert!(!is_linux_elf(&elf64(0x20_0000, &low, &note("Linux", b""))));
        let wild = [&u32::MAX.to_le_bytes()[..], &[0xff; 40]].concat();
        assert!(!is_linux_elf(&elf64(0x100_0000, &high, &wild)));
    }
}
