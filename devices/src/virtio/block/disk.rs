//! A disk image on the host: opened, locked, read and written through imago, which knows the formats.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder,
    file::File as ImageFile,
    format::PreallocateMode,
    io_buffers::{IoVector, IoVectorMut},
    qcow2::Qcow2,
    raw::Raw,
    storage::StorageOpenOptions,
};
use rustix::fs::{OFlags, fcntl_getfl};
use thiserror::Error;
use vm_memory::VolatileSlice;

use crate::sync::RwLock;

/// Unit of the protocol, whatever the sector size of the image.
pub const SECTOR_SIZE: u64 = 512;
/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where the header of qcow2 has `crypt_method`, a big-endian word; 0 is no encryption (QEMU
/// `docs/interop/qcow2.rst`).
const QCOW2_CRYPT_METHOD: u64 = 32;

/// Format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("{}: cannot open it{}", path.display(), if *writable { " for writing; for a disk that the guest only reads, set readonly" } else { "" })]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether it was to be written.
        writable: bool,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file was opened in a way that does not suit a disk. Only one that is handed over can be.
    #[error("{}: {problem}", path.display())]
    Flags {
        /// The image.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: &'static str,
    },
    /// Another process has it.
    #[error("{}: in use by another process; stop that first, or give each its own image", .0.display())]
    InUse(PathBuf),
    /// The file looks like another format than the default.
    #[error("{}: this is a qcow2 image: set format to qcow2, or to raw to give the guest the bytes of the file", .0.display())]
    Ambiguous(PathBuf),
    /// The file is not of the format that was named.
    #[error("{}: not a qcow2 image; set format to raw", .0.display())]
    NotQcow2(PathBuf),
    /// The image is encrypted, which the library below does not look at: it would write plain text into it.
    #[error("{}: an encrypted qcow2 image; decrypt it with `qemu-img convert`", .0.display())]
    Encrypted(PathBuf),
    /// The image needs something that is not supported, or is damaged.
    #[error("{}: cannot use this qcow2 image; `qemu-img check` says if it is damaged, and images with backing or data files must be converted first", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No whole sectors.
    #[error("{}: its size, {size} bytes, is not a multiple of {SECTOR_SIZE}, or zero", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
}

/// Why a file with these flags cannot be a disk, and what to do.
fn unsuitable(flags: OFlags, readonly: bool) -> Option<&'static str> {
    let mode = flags & OFlags::RWMODE;
    if mode == OFlags::WRONLY {
        Some("it is not open for reading; open it for reading and writing")
    } else if !readonly && mode != OFlags::RDWR {
        Some("it is not open for writing; for a disk that the guest only reads, set readonly")
    } else if flags.contains(OFlags::APPEND) {
        Some(
            "it is open for appending, so all writes would go to its end; open it without O_APPEND",
        )
    } else if flags.contains(OFlags::DIRECT) {
        Some("it is open with O_DIRECT, which disks do not support; open it without")
    } else {
        None
    }
}

/// An open image. Several queues use it at the same time.
#[derive(Debug)]
pub struct DiskImage {
    /// Discarding needs it exclusively: it may give a cluster away that another request is about to use.
    access: RwLock<FormatAccess<ImageFile>>,
    size: AtomicU64,
    readonly: bool,
}

impl DiskImage {
    /// Opens and locks an image. Without a format it is raw. A raw image that looks like qcow2 is refused as a user's
    /// mistake. With detection of the format, a guest could write a qcow2 header into its raw disk. At its next start
    /// it could then read other host files.
    pub fn open(
        path: &Path,
        readonly: bool,
        format: Option<DiskFormat>,
    ) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            // Opening a FIFO would wait until another process opens its other end.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| DiskError::Open {
                path: path.into(),
                writable: !readonly,
                source,
            })?;
        Self::from_file(file, path, readonly, format)
    }

    /// Takes over an open image and locks it; `path` is what messages call it.
    pub fn from_file(
        file: File,
        path: &Path,
        readonly: bool,
        format: Option<DiskFormat>,
    ) -> Result<Self, DiskError> {
        if let Some(problem) = fcntl_getfl(&file)
            .ok()
            .and_then(|flags| unsuitable(flags, readonly))
        {
            let path = path.into();
            return Err(DiskError::Flags { path, problem });
        }
        lock(&file, readonly).map_err(|source| match source.kind() {
            ErrorKind::WouldBlock | ErrorKind::PermissionDenied => DiskError::InUse(path.into()),
            _ => DiskError::Open {
                path: path.into(),
                writable: !readonly,
                source,
            },
        })?;
        let mut magic = [0; 4];
        let looks_like_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC;
        let format = match (format, looks_like_qcow2) {
            (None, true) => return Err(DiskError::Ambiguous(path.into())),
            (Some(DiskFormat::Qcow2), false) => return Err(DiskError::NotQcow2(path.into())),
            (format, _) => format.unwrap_or(DiskFormat::Raw),
        };
        let options = StorageOpenOptions::new().filename(path).write(!readonly);
        let bad = |source| DiskError::Format {
            path: path.into(),
            source,
        };
        if format == DiskFormat::Qcow2 {
            let mut method = [0; 4];
            file.read_exact_at(&mut method, QCOW2_CRYPT_METHOD)
                .map_err(bad)?;
            if method != [0; 4] {
                return Err(DiskError::Encrypted(path.into()));
            }
        }
        let storage = ImageFile::from_open_file(file, options).map_err(bad)?;
        let gate = DenyImplicitOpenGate::default();
        let access = match format {
            DiskFormat::Raw => Raw::builder(storage)
                .write(!readonly)
                .open(gate)
                .map(FormatAccess::new),
            DiskFormat::Qcow2 => Qcow2::<ImageFile>::builder(storage)
                .write(!readonly)
                .open(gate)
                .map(FormatAccess::new),
        }
        .map_err(bad)?;
        let size = access.size();
        if size == 0 || size % SECTOR_SIZE != 0 {
            return Err(DiskError::Size {
                path: path.into(),
                size,
            });
        }
        Ok(Self {
            access: RwLock::new(access),
            size: size.into(),
            readonly,
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Grows the disk to `size` bytes: whole sectors, and not less than it has. A block device must have that size
    /// already.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        let invalid = |text| io::Error::new(ErrorKind::InvalidInput, text);
        if self.readonly {
            return Err(invalid("the disk may only be read"));
        }
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(invalid("its size must be a multiple of 512 bytes"));
        }
        let access = self.access.write();
        if size < access.size() {
            return Err(invalid("it cannot be made smaller"));
        }
        access.resize_grow(size, PreallocateMode::None)?;
        // The header of the image must be on the disk before this returns.
        access.flush()?;
        self.size.store(access.size(), Ordering::Release);
        Ok(())
    }

    /// Whether the disk may only be read.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    fn access(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.access.read()
    }

    /// Fills guest memory from `offset` on.
    pub fn read(&self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVectorMut::from_volatile_slice(slices);
        self.access().readv(vector, offset)
    }

    /// Writes guest memory from `offset` on.
    pub fn write(&self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(slices);
        self.access().writev(vector, offset)
    }

    /// Makes everything written so far survive a loss of power.
    pub fn flush(&self) -> io::Result<()> {
        let access = self.access();
        access.flush()?;
        access.sync()
    }

    /// Makes a range read as zeroes, and releases its space if `unmap`.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            let mut access = self.access.write();
            match access.discard_to_zero(offset, len) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        self.access().write_zeroes(offset, len)
    }

    /// Releases the space of a range, whose content is undefined then. Only a hint.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut access = self.access.write();
        match access.discard_to_any(offset, len) {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }
}

/// Takes an open-file-description lock on the whole file: shared for a reader, else exclusive. It conflicts with
/// other Fanlight processes and with QEMU, which locks single bytes.
fn lock(file: &File, readonly: bool) -> io::Result<()> {
    let kind = if readonly {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `range` outlives the call, which only reads it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use imago::FormatCreateBuilder;

    use super::*;

    fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let file = image(&[0; 512]);
        let writer = DiskImage::open(file.path(), false, None).unwrap();
        for readonly in [false, true] {
            assert!(matches!(
                DiskImage::open(file.path(), readonly, None),
                Err(DiskError::InUse(_))
            ));
        }
        drop(writer);
        let _reader = DiskImage::open(file.path(), true, None).unwrap();
        assert!(DiskImage::open(file.path(), true, None).is_ok());
        assert!(DiskImage::open(file.path(), false, None).is_err());
    }

    #[test]
    fn formats_are_not_guessed() {
        let mut header = [0; 512];
        header[..4].copy_from_slice(&QCOW2_MAGIC);
        let file = image(&header);
        assert!(matches!(
            DiskImage::open(file.path(), false, None),
            Err(DiskError::Ambiguous(_))
        ));
        assert!(DiskImage::open(file.path(), false, Some(DiskFormat::Raw)).is_ok());
        assert!(matches!(
            DiskImage::open(file.path(), false, Some(DiskFormat::Qcow2)),
            Err(DiskError::Format { .. })
        ));
        let raw = image(&[0; 512]);
        assert!(matches!(
            DiskImage::open(raw.path(), false, Some(DiskFormat::Qcow2)),
            Err(DiskError::NotQcow2(_))
        ));
    }

    /// With such an image, a guest could name any file of the host and read it at the next start.
    #[test]
    fn images_that_name_other_files_are_refused() {
        let storage = |file: &tempfile::NamedTempFile| {
            let options = StorageOpenOptions::new().write(true);
            ImageFile::from_open_file(file.reopen().unwrap(), options).unwrap()
        };
        let builder = |file| Qcow2::<ImageFile>::create_builder(storage(file)).size(1 << 20);
        let other = image(&[7; 1 << 20]);
        let name = other.path().to_str().unwrap().to_owned();
        let [plain, backed, split] = [(); 3].map(|()| image(&[]));
        builder(&plain).create().unwrap();
        let with_backing = builder(&backed).backing(name.clone(), "raw".into());
        with_backing.create().unwrap();
        let with_data = builder(&split).data_file(name, storage(&other));
        with_data.create().unwrap();
        let open = |file: &tempfile::NamedTempFile| {
            DiskImage::open(file.path(), false, Some(DiskFormat::Qcow2))
        };
        assert!(open(&plain).is_ok());
        for file in [backed, split] {
            assert!(matches!(open(&file), Err(DiskError::Format { .. })));
        }
    }

    #[test]
    fn files_that_are_opened_for_something_else_are_refused() {
        let file = image(&[1; 1024]);
        let hand_over = |options: &mut OpenOptions, readonly| {
            let file = options.open(file.path()).unwrap();
            DiskImage::from_file(file, Path::new("fd:3"), readonly, None)
        };
        let mut both = OpenOptions::new();
        let both = both.read(true).write(true);
        assert!(hand_over(both, false).is_ok());
        assert!(hand_over(both, true).is_ok());
        assert!(hand_over(OpenOptions::new().read(true), true).is_ok());
        let refused = |options: &mut OpenOptions, readonly| {
            matches!(hand_over(options, readonly), Err(DiskError::Flags { .. }))
        };
        // The kernel would put each write at the end of the file.
        assert!(refused(OpenOptions::new().read(true).append(true), false));
        assert!(refused(OpenOptions::new().read(true), false));
        assert!(refused(OpenOptions::new().write(true), true));
        assert!(refused(OpenOptions::new().write(true), false));
    }

    /// Offsets are those of QEMU's `docs/interop/qcow2.rst`.
    #[test]
    fn images_that_are_not_understood_are_refused() {
        const INCOMPATIBLE_FEATURES: u64 = 72;
        let file = image(&[]);
        let options = StorageOpenOptions::new().write(true);
        let storage = ImageFile::from_open_file(file.reopen().unwrap(), options).unwrap();
        let builder = Qcow2::<ImageFile>::create_builder(storage).size(1 << 20);
        builder.create().unwrap();
        let open = || DiskImage::open(file.path(), false, Some(DiskFormat::Qcow2));
        let set = |offset: u64, bytes: &[u8]| file.as_file().write_all_at(bytes, offset).unwrap();
        assert!(open().is_ok());
        // AES, LUKS, and what nobody has defined yet.
        for method in [1u32, 2, 3, 1 << 31] {
            set(QCOW2_CRYPT_METHOD, &method.to_be_bytes());
            assert!(matches!(open(), Err(DiskError::Encrypted(_))));
        }
        set(QCOW2_CRYPT_METHOD, &[0; 4]);
        // Dirty, corrupt, data file, compression, extended L2 entries, and the rest.
        for bit in 0..64 {
            set(INCOMPATIBLE_FEATURES, &(1u64 << bit).to_be_bytes());
            assert!(matches!(open(), Err(DiskError::Format { .. })), "bit {bit}");
        }
        set(INCOMPATIBLE_FEATURES, &[0; 8]);
        assert!(open().is_ok());
    }

    #[test]
    fn a_disk_grows_by_whole_sectors_and_never_shrinks() {
        let file = image(&[1; 1024]);
        let disk = DiskImage::open(file.path(), false, None).unwrap();
        disk.grow(4096).unwrap();
        assert_eq!(disk.size(), 4096);
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
        for bad in [512, 4097] {
            assert!(disk.grow(bad).is_err());
        }
        assert_eq!(disk.size(), 4096);
        drop(disk);
        let disk = DiskImage::open(file.path(), true, None).unwrap();
        assert!(disk.grow(8192).is_err());
    }

    #[test]
    fn odd_sizes_and_missing_files_are_named() {
        for bytes in [&[0; 0][..], &[0; 513]] {
            let file = image(bytes);
            assert!(matches!(
                DiskImage::open(file.path(), false, None),
                Err(DiskError::Size { .. })
            ));
        }
        let error = DiskImage::open(Path::new("/nowhere"), false, None).unwrap_err();
        assert!(error.to_string().starts_with("/nowhere: cannot open it"));
    }
}
