//! The header of a bzImage (Linux `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header").

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::Path,
};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::LoadError;
use crate::layout;

/// Where the header starts, in the file and in the boot parameters.
pub const HEADER_OFFSET: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.12: `xloadflags`, and with it the 64-bit entry.
const MIN_VERSION: u16 = 0x020c;
const SECTOR: u64 = 512;
/// What `setup_sects` means when it is 0.
const DEFAULT_SETUP_SECTS: u8 = 4;
/// More than any kernel's payload: a corrupt length must not be believed.
const MAX_PAYLOAD: u64 = 1 << 30;

/// `loadflags`: the kernel proper shall randomize its memory regions.
pub const KASLR_FLAG: u8 = 1 << 1;
/// `xloadflags`: the kernel has an entry at 0x200 for 64-bit mode.
const XLF_KERNEL_64: u16 = 1 << 0;

/// The setup header, with the kernel's own field names.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct SetupHeader {
    pub setup_sects: u8,
    pub root_flags: u16,
    pub syssize: u32,
    pub ram_size: u16,
    pub vid_mode: u16,
    pub root_dev: u16,
    pub boot_flag: u16,
    pub jump: u16,
    pub header: u32,
    pub version: u16,
    pub realmode_swtch: u32,
    pub start_sys_seg: u16,
    pub kernel_version: u16,
    pub type_of_loader: u8,
    pub loadflags: u8,
    pub setup_move_size: u16,
    pub code32_start: u32,
    pub ramdisk_image: u32,
    pub ramdisk_size: u32,
    pub bootsect_kludge: u32,
    pub heap_end_ptr: u16,
    pub ext_loader_ver: u8,
    pub ext_loader_type: u8,
    pub cmd_line_ptr: u32,
    pub initrd_addr_max: u32,
    pub kernel_alignment: u32,
    pub relocatable_kernel: u8,
    pub min_alignment: u8,
    pub xloadflags: u16,
    pub cmdline_size: u32,
    pub hardware_subarch: u32,
    pub hardware_subarch_data: u64,
    pub payload_offset: u32,
    pub payload_length: u32,
    pub setup_data: u64,
    pub pref_address: u64,
    pub init_size: u32,
    pub handover_offset: u32,
    pub kernel_info_offset: u32,
}

/// A bzImage whose header makes sense.
#[derive(Debug)]
pub struct BzImage<'a> {
    path: &'a Path,
    file: &'a File,
    /// The header as it is in the file.
    pub header: SetupHeader,
    /// Length of the file's protected-mode part, in bytes.
    pub kernel_len: u64,
}

impl<'a> BzImage<'a> {
    /// Reads and checks the header.
    pub fn open(path: &'a Path, file: &'a File) -> Result<Self, LoadError> {
        let mut bytes = [0; size_of::<SetupHeader>()];
        file.read_exact_at(&mut bytes, HEADER_OFFSET)
            .map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => LoadError::NotAKernel(path.into()),
                _ => read_error(path, source),
            })?;
        let header: SetupHeader = zerocopy::transmute!(bytes);
        if (header.boot_flag, header.header) != (BOOT_FLAG, HEADER_MAGIC) {
            return Err(LoadError::NotAKernel(path.into()));
        }
        let bad = |problem: String| {
            Err(LoadError::BadKernel {
                path: path.into(),
                problem,
            })
        };
        let version = header.version;
        if version < MIN_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
            return bad(format!(
                "no 64-bit entry (boot protocol {}.{:02}): give an x86-64 kernel from Linux 3.8 on",
                version >> 8,
                version & 0xff
            ));
        }
        let (alignment, init_size) = (header.kernel_alignment, header.init_size);
        if !alignment.is_power_of_two() || u64::from(alignment) < layout::PAGE_SIZE {
            return bad(format!(
                "its header asks for an alignment of {alignment:#x}"
            ));
        }
        if init_size == 0 {
            return bad("its header asks for no memory".into());
        }
        let preferred = header.pref_address;
        if preferred >= layout::LOW_RAM_END {
            return bad(format!("its header asks for address {preferred:#x}"));
        }
        let kernel_len = u64::from(header.syssize) * 16;
        let image = Self {
            path,
            file,
            header,
            kernel_len,
        };
        let actual = file
            .metadata()
            .map_err(|source| read_error(path, source))?
            .len();
        let expected = image.kernel_offset() + kernel_len;
        // The last paragraph may be cut where the file is not padded to 16 bytes.
        if actual + 15 < expected {
            return Err(LoadError::Truncated {
                path: path.into(),
                expected,
                actual,
            });
        }
        Ok(image)
    }

    /// Where the protected-mode part starts in the file.
    pub fn kernel_offset(&self) -> u64 {
        let sectors = match self.header.setup_sects {
            0 => DEFAULT_SETUP_SECTS,
            sectors => sectors,
        };
        (u64::from(sectors) + 1) * SECTOR
    }

    /// The compressed kernel, if the header tells where it is.
    pub fn payload(&self) -> Result<Option<Vec<u8>>, LoadError> {
        let (offset, len) = (
            u64::from(self.header.payload_offset),
            u64::from(self.header.payload_length),
        );
        if len == 0 || len > MAX_PAYLOAD || offset + len > self.kernel_len {
            return Ok(None);
        }
        let mut payload = vec![0; len as usize];
        self.file
            .read_exact_at(&mut payload, self.kernel_offset() + offset)
            .map_err(|source| read_error(self.path, source))?;
        Ok(Some(payload))
    }
}

fn read_error(path: &Path, source: io::Error) -> LoadError {
    LoadError::Read {
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, mem::offset_of};

    use super::*;
    use crate::boot::test_image::bzimage;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn fields_lie_where_the_documentation_says() {
        let at = |offset: usize| HEADER_OFFSET as usize + offset;
        assert_eq!(at(offset_of!(SetupHeader, header)), 0x202);
        assert_eq!(at(offset_of!(SetupHeader, loadflags)), 0x211);
        assert_eq!(at(offset_of!(SetupHeader, cmd_line_ptr)), 0x228);
        assert_eq!(at(offset_of!(SetupHeader, xloadflags)), 0x236);
        assert_eq!(at(offset_of!(SetupHeader, pref_address)), 0x258);
        assert_eq!(at(size_of::<SetupHeader>()), 0x26c);
    }

    #[test]
    fn other_files_are_told_apart_from_broken_kernels() {
        let path = Path::new("k");
        for other in [&b"hello"[..], &[0; 4096]] {
            assert!(matches!(
                BzImage::open(path, &file(other)),
                Err(LoadError::NotAKernel(_))
            ));
        }
        let good = bzimage(&[0; 64]);
        assert!(BzImage::open(path, &file(&good)).is_ok());
        for (at, value, words) in [
            (0x206, &0x0209u16.to_le_bytes()[..], "boot protocol 2.09"),
            (0x230, &0x21_0000u32.to_le_bytes(), "alignment of 0x210000"),
            (0x258, &u64::MAX.to_le_bytes(), "address 0xffffffffffffffff"),
            (0x260, &0u32.to_le_bytes(), "no memory"),
        ] {
            let mut image = good.clone();
            image[at..at + value.len()].copy_from_slice(value);
            let error = BzImage::open(path, &file(&image)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_truncated_kernel_is_called_so() {
        let image = bzimage(&[0; 0x1_0000]);
        assert!(matches!(
            BzImage::open(Path::new("k"), &file(&image[..4096])),
            Err(LoadError::Truncated { actual: 4096, .. })
        ));
    }
}
