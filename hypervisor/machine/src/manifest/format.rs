//! The blob: header, encoded manifest, files.

use alloc::{collections::BTreeMap, vec::Vec};
use core::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::rules::Violation;
use super::types::{FileRef, Manifest};

/// The version of the format. Tool and hypervisor are built together: any other version is refused.
pub const VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"UMBRAPKG";
const HEADER_BYTES: usize = size_of::<Header>();
/// Files begin at multiples of this, so that whole pages can be copied or mapped.
const FILE_ALIGN: u64 = memory::PAGE_SIZE;
/// 64 guests with 16 modules each and every command line full are 2.2 MiB.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// Bytes of the encoded manifest, which follows the header.
    manifest_bytes: U32,
    /// Of all bytes behind the header up to `total_bytes`.
    checksum: U64,
    /// Where the file area begins, a multiple of 4 KiB.
    data_offset: U64,
    /// Bytes of header, manifest and files together. The ramdisk may be longer (padding of the medium).
    total_bytes: U64,
    reserved: [u8; 24],
}

/// Why a ramdisk is not a usable package. All of them mean: build the image anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnpackError {
    /// Shorter than a header; the length in bytes.
    TooShort(usize),
    /// It does not begin with the magic.
    NotAPackage,
    /// Made by a tool of another version.
    Version(u32),
    /// The header's lengths contradict each other or the ramdisk's.
    Lengths {
        /// Bytes the header declares.
        declared: u64,
        /// Bytes the ramdisk has.
        given: u64,
    },
    /// The bytes are not those that were packed.
    Checksum,
    /// The manifest cannot be decoded.
    Encoding,
    /// The manifest breaks a rule.
    Rule(Violation),
    /// A guest names a file that is not in the package; the guest's place in the list.
    File {
        /// 0 for the first guest.
        guest: usize,
    },
}

impl fmt::Display for UnpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort(bytes) => write!(f, "the payload has only {bytes} bytes")?,
            Self::NotAPackage => write!(f, "the ramdisk is no payload of Umbra's")?,
            Self::Version(found) => write!(f, "the payload has version {found}, this is {VERSION}")?,
            Self::Lengths { declared, given } => {
                write!(f, "the payload declares {declared} bytes, {given} were loaded")?;
            }
            Self::Checksum => write!(f, "the payload is damaged: its checksum does not fit")?,
            Self::Encoding => write!(f, "the payload's manifest cannot be decoded")?,
            Self::Rule(violation) => write!(f, "the payload's manifest: {violation}")?,
            Self::File { guest } => write!(f, "guest {}: a file lies outside the payload", guest + 1)?,
        }
        write!(f, "; make the image anew with `cargo xtask image`")
    }
}

impl core::error::Error for UnpackError {}

/// Why a manifest cannot be packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackError {
    /// It breaks a rule.
    Rule(Violation),
    /// A guest names a file that was not added to the [`FileArea`]; the guest's place in the list.
    File {
        /// 0 for the first guest.
        guest: usize,
    },
    /// More than 4 MiB of manifest.
    TooLarge,
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(violation) => violation.fmt(f),
            Self::File { guest } => write!(f, "guest {}: a file was not added to the payload", guest + 1),
            Self::TooLarge => write!(f, "the manifest is too large"),
        }
    }
}

impl core::error::Error for PackError {}

/// Collects the files of a package, each distinct content once.
#[derive(Default)]
pub struct FileArea {
    bytes: Vec<u8>,
    by_checksum: BTreeMap<u64, Vec<FileRef>>,
}

impl FileArea {
    /// An empty area.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file, or finds it if one of the same content is there.
    pub fn add(&mut self, file: &[u8]) -> FileRef {
        let same = self.by_checksum.entry(checksum(file)).or_default();
        for &known in same.iter() {
            if slice(&self.bytes, known) == Some(file) {
                return known;
            }
        }
        let offset = self.bytes.len().next_multiple_of(FILE_ALIGN as usize);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(file);
        let added = FileRef { offset: offset as u64, length_bytes: file.len() as u64 };
        same.push(added);
        added
    }
}

/// Packs a manifest whose [`FileRef`]s came from `files`.
pub fn pack(manifest: &Manifest, files: &FileArea) -> Result<Vec<u8>, PackError> {
    manifest.check().map_err(PackError::Rule)?;
    if let Some(guest) = first_missing_file(manifest, &files.bytes) {
        return Err(PackError::File { guest });
    }
    let encoded = postcard::to_allocvec(manifest).map_err(|_| PackError::TooLarge)?;
    if encoded.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(PackError::TooLarge);
    }
    let data_offset = (HEADER_BYTES + encoded.len()).next_multiple_of(FILE_ALIGN as usize);
    let total = data_offset + files.bytes.len();
    let mut blob = Vec::with_capacity(total);
    blob.resize(HEADER_BYTES, 0);
    blob.extend_from_slice(&encoded);
    blob.resize(data_offset, 0);
    blob.extend_from_slice(&files.bytes);
    let header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        manifest_bytes: (encoded.len() as u32).into(),
        checksum: checksum(&blob[HEADER_BYTES..]).into(),
        data_offset: (data_offset as u64).into(),
        total_bytes: (total as u64).into(),
        reserved: [0; 24],
    };
    blob[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    Ok(blob)
}

/// A package whose every length and rule has been checked; the files stay where they are.
#[derive(Clone, Debug)]
pub struct Package<'a> {
    /// What it says.
    pub manifest: Manifest,
    data: &'a [u8],
}

impl<'a> Package<'a> {
    /// The bytes of a file of this package's manifest. (A [`FileRef`] from elsewhere may give none.)
    #[must_use]
    pub fn file(&self, file: FileRef) -> &'a [u8] {
        slice(self.data, file).unwrap_or_default()
    }
}

/// Checks a ramdisk and borrows the package in it.
pub fn unpack(ramdisk: &[u8]) -> Result<Package<'_>, UnpackError> {
    let Ok((header, _)) = Header::read_from_prefix(ramdisk) else {
        return Err(UnpackError::TooShort(ramdisk.len()));
    };
    if header.magic != MAGIC {
        return Err(UnpackError::NotAPackage);
    }
    if header.version.get() != VERSION {
        return Err(UnpackError::Version(header.version.get()));
    }
    let (total, data_offset) = (header.total_bytes.get(), header.data_offset.get());
    let lengths = UnpackError::Lengths { declared: total, given: ramdisk.len() as u64 };
    let manifest_bytes = u64::from(header.manifest_bytes.get());
    if manifest_bytes > MAX_MANIFEST_BYTES || !data_offset.is_multiple_of(FILE_ALIGN) {
        return Err(lengths);
    }
    let Some(blob) = usize::try_from(total).ok().and_then(|total| ramdisk.get(..total)) else {
        return Err(lengths);
    };
    let manifest_end = HEADER_BYTES as u64 + manifest_bytes;
    if data_offset < manifest_end || data_offset > total {
        return Err(lengths);
    }
    // Both lie within `blob` now, so they fit a usize.
    let (encoded, data) = (&blob[HEADER_BYTES..manifest_end as usize], &blob[data_offset as usize..]);
    if checksum(&blob[HEADER_BYTES..]) != header.checksum.get() {
        return Err(UnpackError::Checksum);
    }
    let manifest: Manifest = match postcard::take_from_bytes(encoded) {
        Ok((manifest, [])) => manifest,
        _ => return Err(UnpackError::Encoding),
    };
    manifest.check().map_err(UnpackError::Rule)?;
    if let Some(guest) = first_missing_file(&manifest, data) {
        return Err(UnpackError::File { guest });
    }
    Ok(Package { manifest, data })
}

fn slice(data: &[u8], file: FileRef) -> Option<&[u8]> {
    let start = usize::try_from(file.offset).ok()?;
    let end = start.checked_add(usize::try_from(file.length_bytes).ok()?)?;
    data.get(start..end)
}

fn first_missing_file(manifest: &Manifest, data: &[u8]) -> Option<usize> {
    manifest.guests.iter().position(|guest| {
        let modules = guest.modules.iter().map(|module| module.file);
        [guest.kernel]
            .into_iter()
            .chain(guest.initrd)
            .chain(modules)
            .any(|file| !file.offset.is_multiple_of(FILE_ALIGN) || slice(data, file).is_none())
    })
}

/// A checksum against damage in transport, not against malice: four instructions for eight bytes, because
/// an emulated processor runs it over tens of megabytes at each boot.
fn checksum(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut sum = bytes.len() as u64;
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        sum = (sum.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(ODD);
    }
    for &byte in rest {
        sum = (sum.rotate_left(5) ^ u64::from(byte)).wrapping_mul(ODD);
    }
    sum ^ (sum >> 32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::manifest::rules::tests::guest;
    use crate::manifest::{ModuleRef, Rule};

    fn sample() -> Vec<u8> {
        let mut files = FileArea::new();
        let kernel = files.add(b"kernel");
        let initrd = files.add(&[7; 5000]);
        let mut a = guest("a");
        a.kernel = kernel;
        a.initrd = Some(initrd);
        a.modules.push(ModuleRef { file: files.add(b"module"), cmdline: "x=y".into() });
        let mut b = guest("b");
        b.kernel = files.add(b"kernel");
        b.cores = vec![0, 1];
        pack(&Manifest { guests: vec![a, b], ..Manifest::default() }, &files).unwrap()
    }

    #[test]
    fn what_was_packed_comes_out() {
        let mut blob = sample();
        blob.extend_from_slice(&[0xee; 700]); // The medium may pad.
        let package = unpack(&blob).unwrap();
        let [a, b] = &package.manifest.guests[..] else { panic!("two guests") };
        assert_eq!(package.file(a.kernel), b"kernel");
        assert_eq!(package.file(a.initrd.unwrap()), [7; 5000]);
        assert_eq!(package.file(a.modules[0].file), b"module");
        assert_eq!(a.kernel, b.kernel, "identical files are stored once");
        assert_eq!(a.initrd.unwrap().offset % 4096, 0);
        assert_eq!(package.file(FileRef { offset: 1 << 40, length_bytes: u64::MAX }), b"");
    }

    #[test]
    fn damage_is_named() {
        let blob = sample();
        assert_eq!(unpack(&[]).unwrap_err(), UnpackError::TooShort(0));
        assert_eq!(unpack(&blob[..63]).unwrap_err(), UnpackError::TooShort(63));
        assert_eq!(unpack(&[0; 64]).unwrap_err(), UnpackError::NotAPackage);
        let cut = unpack(&blob[..blob.len() - 1]).unwrap_err();
        assert_eq!(cut, UnpackError::Lengths { declared: blob.len() as u64, given: blob.len() as u64 - 1 });
        let mut other = blob.clone();
        other[8] += 1;
        assert_eq!(unpack(&other).unwrap_err(), UnpackError::Version(VERSION + 1));
        for at in [64, 100, blob.len() - 1] {
            let mut other = blob.clone();
            other[at] ^= 0x10;
            assert_eq!(unpack(&other).unwrap_err(), UnpackError::Checksum, "byte {at}");
        }
    }

    #[test]
    fn a_file_must_have_been_added() {
        let mut files = FileArea::new();
        let mut config = guest("a");
        config.kernel = files.add(b"kernel");
        config.initrd = Some(FileRef { offset: 4096, length_bytes: 1 });
        let mut manifest = Manifest { guests: vec![config], ..Manifest::default() };
        assert_eq!(pack(&manifest, &files), Err(PackError::File { guest: 0 }));
        manifest.guests[0].initrd = Some(FileRef { offset: 1, length_bytes: 1 });
        assert_eq!(pack(&manifest, &files), Err(PackError::File { guest: 0 }), "not aligned");
        manifest.guests.clear();
        let Err(PackError::Rule(violation)) = pack(&manifest, &files) else { panic!("no guests") };
        assert_eq!(violation.rule, Rule::NoGuests);
    }

    /// Repairs the checksum after a mutation, so that the mutation reaches the code behind it.
    fn seal(blob: &mut [u8]) {
        let Ok((header, _)) = Header::read_from_prefix(blob) else { return };
        let Some(end) = usize::try_from(header.total_bytes.get()).ok() else { return };
        let Some(covered) = blob.get(HEADER_BYTES..end) else { return };
        let sum = checksum(covered).to_le_bytes();
        blob[16..24].copy_from_slice(&sum);
    }

    /// What [`unpack`] promises of whatever it accepts.
    fn check_promises(blob: &[u8]) {
        let Ok(package) = unpack(blob) else { return };
        assert_eq!(package.manifest.check(), Ok(()));
        for guest in &package.manifest.guests {
            let modules = guest.modules.iter().map(|module| module.file);
            for file in [guest.kernel].into_iter().chain(guest.initrd).chain(modules) {
                assert_eq!(package.file(file).len() as u64, file.length_bytes);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            check_promises(&bytes);
        }

        #[test]
        fn any_mutation_is_survived(
            writes in prop::collection::vec((0usize..400, any::<u8>()), 1..8),
            cut in prop::option::of(0usize..20_000),
            sealed in any::<bool>(),
        ) {
            let mut blob = sample();
            for (at, value) in writes {
                blob[at] = value;
            }
            blob.truncate(cut.unwrap_or(usize::MAX));
            if sealed {
                seal(&mut blob);
            }
            check_promises(&blob);
        }

        #[test]
        fn any_encoded_manifest_is_survived(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut blob = sample();
            blob[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
            blob[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(&body);
            seal(&mut blob);
            check_promises(&blob);
        }
    }
}
