//! What can be wrong with a guest's files: said so that the person who chose them can mend it.

use core::fmt;

use memory::{Gpa, Unbacked};

use super::Protocol;

/// What an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The kernel's file.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A Multiboot module, by its index from 0.
    Module(usize),
    /// The kernel's command line.
    CommandLine,
    /// The guest as a whole: its memory or its processors.
    Guest,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("kernel"),
            Self::Initrd => f.write_str("initrd"),
            Self::Module(index) => write!(f, "module {index}"),
            Self::CommandLine => f.write_str("cmdline"),
            Self::Guest => f.write_str("guest"),
        }
    }
}

/// Why a guest cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadError {
    /// What is wrong.
    pub part: Part,
    /// How it is wrong.
    pub fault: Fault,
}

impl LoadError {
    pub(super) const fn kernel(fault: Fault) -> Self {
        Self { part: Part::Kernel, fault }
    }

    /// The loader's own doing: it keeps to the RAM it was told of, so the layout and the slots disagree.
    pub(super) const fn backing(unbacked: Unbacked) -> Self {
        Self { part: Part::Guest, fault: Fault::Unbacked(unbacked.0) }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.fault)
    }
}

impl core::error::Error for LoadError {}

/// What is wrong with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The file is compressed as a whole; the name of the format and of the tool that unpacks it.
    Compressed {
        /// The format.
        format: &'static str,
        /// The command that unpacks it.
        tool: &'static str,
    },
    /// Neither a bzImage nor a vmlinux.
    NotLinux,
    /// The bzImage's boot protocol has no 64-bit entry yet.
    BootProtocol {
        /// As in the setup header: major in the upper byte.
        version: u16,
    },
    /// A 32-bit bzImage.
    No64BitEntry,
    /// An old "zImage" that loads below 1 MiB.
    NotLoadedHigh,
    /// The file ends before something it announces.
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// File size that would hold it, in bytes.
        needed_bytes: u64,
        /// The file's size, in bytes.
        file_bytes: u64,
    },
    /// The file's own numbers contradict each other.
    Inconsistent(&'static str),
    /// Not an ELF file at all, or a damaged one.
    NotElf,
    /// An ELF file, but not such a one.
    ElfKind {
        /// What the file is.
        is: &'static str,
        /// What it should be, and how that is made.
        remedy: &'static str,
    },
    /// An ELF file without a loadable segment.
    NoSegments,
    /// More of something than the loader takes.
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A fixed place that is not usable RAM.
    OutsideRam {
        /// First byte.
        start: Gpa,
        /// How many.
        bytes: u64,
        /// End of the guest's low RAM.
        low_end: Gpa,
    },
    /// Two segments claim the same bytes.
    Overlap {
        /// First byte of the second.
        start: Gpa,
        /// Its length.
        bytes: u64,
    },
    /// The entry point lies in no loaded segment.
    Entry {
        /// The address.
        entry: u64,
    },
    /// No free RAM is large enough.
    NoRoom {
        /// How much is needed in one piece.
        bytes: u64,
        /// It has to end below this address.
        below: Gpa,
    },
    /// No Multiboot header in the first 8 KiB.
    NotMultiboot,
    /// The Multiboot header requires what we do not know.
    MultibootFlags {
        /// The unknown ones of bits 0 to 15.
        unknown: u32,
    },
    /// Longer than the kernel or the loader takes.
    TooLong {
        /// Its length in bytes.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A NUL byte inside a string.
    Nul,
    /// The protocol has no use for this part.
    NotUsedBy(Protocol),
    /// The guest's RAM has an impossible size.
    RamLayout {
        /// Bytes below 4 GiB.
        low_bytes: u64,
        /// Bytes above.
        high_bytes: u64,
    },
    /// An impossible number of processors.
    Vcpus {
        /// As given.
        vcpus: u32,
        /// The limit.
        max: u32,
    },
    /// An address within the RAM layout is not backed: the layout and the guest's slots disagree.
    Unbacked(Gpa),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Compressed { format, tool } => {
                write!(f, "a {format} file; unpack it first (`{tool}`)")
            }
            Self::NotLinux => f.write_str(
                "not a bzImage (no 'HdrS' at 0x202) and not a vmlinux (no ELF64); give an x86-64 Linux kernel \
                 such as arch/x86/boot/bzImage or /boot/vmlinuz-*, or another protocol",
            ),
            Self::BootProtocol { version } => write!(
                f,
                "its Linux boot protocol {}.{:02} has no 64-bit entry; version 2.12 (Linux 3.8) or later is needed",
                version >> 8,
                version & 0xff
            ),
            Self::No64BitEntry => f.write_str(
                "a bzImage without a 64-bit entry (XLF_KERNEL_64 is clear); build the kernel with CONFIG_64BIT",
            ),
            Self::NotLoadedHigh => {
                f.write_str("a zImage that loads below 1 MiB (LOADED_HIGH is clear); give a bzImage")
            }
            Self::Truncated { what, needed_bytes, file_bytes } => write!(
                f,
                "cut off: {what} needs {needed_bytes} bytes of file, it has {file_bytes}; copy the file again"
            ),
            Self::Inconsistent(what) => write!(f, "damaged: {what}"),
            Self::NotElf => f.write_str("not an ELF file, or its header is damaged"),
            Self::ElfKind { is, remedy } => write!(f, "{is}; {remedy}"),
            Self::NoSegments => f.write_str("an ELF file with nothing to load; link it as an executable"),
            Self::TooMany { what, max } => write!(f, "more than {max} {what}"),
            Self::OutsideRam { start, bytes, low_end } => write!(
                f,
                "wants {bytes:#x} bytes at {start}, which is not free RAM (0x1000-0x9fc00, 0x100000-{low_end}); \
                 give the guest more memory or link it elsewhere"
            ),
            Self::Overlap { start, bytes } => {
                write!(f, "its segment of {bytes:#x} bytes at {start} overlaps another; link it again")
            }
            Self::Entry { entry } => {
                write!(f, "its entry point {entry:#x} lies in no loaded segment below 4 GiB")
            }
            Self::NoRoom { bytes, below } => write!(
                f,
                "{} KiB in one piece below {below} are not free; give the guest more memory",
                bytes.div_ceil(1024)
            ),
            Self::NotMultiboot => f.write_str(
                "no Multiboot 1 header (0x1BADB002) in its first 8 KiB; link it at the front, or give another protocol",
            ),
            Self::MultibootFlags { unknown } => write!(
                f,
                "its Multiboot header requires features that are not known (flags {unknown:#x}); clear them"
            ),
            Self::TooLong { bytes, max } => {
                write!(f, "{bytes} bytes are too long; at most {max} are taken")
            }
            Self::Nul => f.write_str("contains a NUL byte"),
            Self::NotUsedBy(protocol) => {
                write!(f, "protocol \"{}\" has no use for it; leave it out", protocol.name())
            }
            Self::RamLayout { low_bytes, high_bytes } => write!(
                f,
                "{low_bytes} bytes of RAM below 3 GiB and {high_bytes} above 4 GiB are not possible; \
                 give a multiple of 2 MiB"
            ),
            Self::Vcpus { vcpus, max } => {
                write!(f, "{vcpus} processors are not possible; give 1 to {max}")
            }
            Self::Unbacked(gpa) => write!(f, "its RAM has a hole at {gpa}"),
        }
    }
}

/// The whole-file compression formats that kernels come in, told by their first bytes.
pub(super) fn compressed(file: &[u8]) -> Option<Fault> {
    const FORMATS: [(&[u8], &str, &str); 5] = [
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"\xfd7zXZ\0", "xz", "unxz"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"\x02\x21\x4c\x18", "lz4", "unlz4"),
    ];
    let found = FORMATS.iter().find(|(magic, ..)| file.starts_with(magic));
    found.map(|&(_, format, tool)| Fault::Compressed { format, tool })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_part_cause_and_remedy() {
        let text = LoadError::kernel(Fault::BootProtocol { version: 0x0205 }).to_string();
        assert_eq!(
            text,
            "kernel: its Linux boot protocol 2.05 has no 64-bit entry; version 2.12 (Linux 3.8) or later is needed"
        );
        let text = LoadError::kernel(compressed(b"\x1f\x8b\x08rest").unwrap()).to_string();
        assert_eq!(text, "kernel: a gzip file; unpack it first (`gunzip`)");
        let text =
            LoadError { part: Part::Module(2), fault: Fault::NoRoom { bytes: 4097, below: Gpa(1 << 21) } };
        assert_eq!(
            text.to_string(),
            "module 2: 5 KiB in one piece below 0x200000 are not free; give the guest more memory"
        );
    }
}
