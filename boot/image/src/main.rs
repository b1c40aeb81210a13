//! Packs one disk image that boots from BIOS and from UEFI.
//!
//! `image KERNEL OUTPUT [RAMDISK]`: KERNEL is a stripped ELF, RAMDISK the packed payload.
//!
//! The `bootloader` crate makes one image for each firmware. Both want the same files in a FAT file system and
//! differ only in how they find it, so the BIOS image is given the UEFI loader beside its own stages: a stick with
//! an MBR and a FAT partition (type 0x0c) that holds `efi/boot/bootx64.efi` is what every UEFI firmware boots as a
//! removable medium. The type cannot be 0xef, the EFI system partition's: the BIOS stages refuse it.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use bootloader::{BootConfig, DiskImageBuilder};

/// Where a removable medium keeps the loader (UEFI specification, "Removable Media Boot Behavior").
const UEFI_LOADER: &str = "efi/boot/bootx64.efi";
/// The name under which the bootloader crate hands out its UEFI loader.
const TFTP_LOADER: &str = "bootloader";

/// One cylinder of 16 heads and 63 sectors: Bochs takes only whole ones.
const CYLINDER_BYTES: u64 = 16 * 63 * 512;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let result = match arguments.as_slice() {
        [kernel, output] => pack(kernel, output, None),
        [kernel, output, ramdisk] => pack(kernel, output, Some(ramdisk)),
        _ => {
            eprintln!("usage: image KERNEL OUTPUT [RAMDISK]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn pack(kernel: &Path, output: &Path, ramdisk: Option<&Path>) -> Result<()> {
    let mut builder = DiskImageBuilder::new(kernel.to_owned());
    builder.set_boot_config(&quiet());
    if let Some(ramdisk) = ramdisk {
        builder.set_ramdisk(ramdisk.to_owned());
    }
    builder.set_file_contents(UEFI_LOADER.to_owned(), uefi_loader()?);
    builder.create_bios_image(output)?;
    let disk = File::options().write(true).open(output)?;
    let bytes = disk.metadata()?.len();
    disk.set_len(bytes.next_multiple_of(CYLINDER_BYTES)).context("cannot pad the image")
}

/// The loader draws and prints nothing: in an emulator each line costs a million instructions, and the
/// hypervisor speaks for itself from its first instruction on.
fn quiet() -> BootConfig {
    let mut config = BootConfig::default();
    config.frame_buffer.minimum_framebuffer_width = Some(640);
    config.frame_buffer.minimum_framebuffer_height = Some(480);
    config.frame_buffer_logging = false;
    config.serial_logging = false;
    config
}

/// The UEFI loader's bytes; the crate gives them away only as a file for network booting.
fn uefi_loader() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    DiskImageBuilder::empty().create_uefi_tftp_folder(folder.path())?;
    fs::read(folder.path().join(TFTP_LOADER)).context("the bootloader crate gave no UEFI loader")
}
