//! A file or block device as the medium of a store. Requests complete at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use blobstore::{Device, DeviceError, Properties};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FallocateFlags, OFlags};

/// Buffered I/O needs no larger alignment.
const BLOCK: u32 = 512;
/// Zeroes that are written at once.
const ZEROES: u64 = 1 << 20;

/// Opening a block device with it fails if it is mounted or another one has opened it so.
pub(crate) const EXCLUSIVE: i32 = OFlags::EXCL.bits().cast_signed();

/// An open file or block device.
#[derive(Debug)]
pub(crate) struct Disk {
    file: File,
    /// Bytes in whole blocks.
    size: u64,
    /// Bytes.
    bytes: u64,
    is_block_device: bool,
    external: Option<Box<Disk>>,
}

impl Disk {
    /// Opens it for reading.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::of(File::open(path)?)
    }

    /// Opens it for reading and writing, and fails if another process uses it: a block device that
    /// is mounted or open exclusively, a file that a server has locked.
    pub(crate) fn open_exclusively(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if std::fs::metadata(path)?.file_type().is_block_device() {
            options.custom_flags(EXCLUSIVE);
        }
        let disk = Self::of(options.open(path)?)?;
        lock(&disk.file)?;
        Ok(disk)
    }

    /// Whether `path` is the file or block device that is open here.
    pub(crate) fn is(&self, path: &Path) -> io::Result<bool> {
        let (this, other) = (self.file.metadata()?, std::fs::metadata(path)?);
        let same_file = (this.dev(), this.ino()) == (other.dev(), other.ino());
        let both_devices = self.is_block_device && other.file_type().is_block_device();
        Ok(same_file || both_devices && this.rdev() == other.rdev())
    }

    fn of(mut file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let is_block_device = kind.is_block_device();
        if !is_block_device && !kind.is_file() {
            return Err(io::Error::other("expected a file or a block device"));
        }
        let bytes = file.seek(SeekFrom::End(0))?;
        let size = bytes / u64::from(BLOCK) * u64::from(BLOCK);
        Ok(Self { file, size, bytes, is_block_device, external: None })
    }

    /// With the content of the one external snapshot that is needed.
    pub(crate) fn with_external(mut self, external: Self) -> Self {
        self.external = Some(Box::new(external));
        self
    }

    /// Its size, which need not be a multiple of the block size.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads `len` bytes, zeroes beyond the end.
    pub(crate) fn read_padded(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; len];
        let there = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(len).min(len);
        self.file.read_exact_at(&mut bytes[..there], offset).map_err(failed)?;
        Ok(bytes)
    }

    fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= self.size);
        if !fits {
            return Err(DeviceError { errno: 5 });
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).map_err(failed)?;
        Ok(bytes)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let zeroes = vec![0; usize::try_from(ZEROES.min(len)).unwrap_or(0)];
        let mut at = 0;
        while at < len {
            let part = usize::try_from(ZEROES.min(len - at)).unwrap_or(0);
            self.file.write_all_at(&zeroes[..part], offset + at).map_err(failed)?;
            at += part as u64;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, len)?)
    }
}

/// Locks the whole file for this open file description, as vhost and QEMU lock single bytes of it.
/// A lock of the process would end when any other descriptor of the file is closed.
#[expect(clippy::cast_possible_truncation, reason = "libc's constants are 0 to 2")]
fn lock(file: &File) -> io::Result<()> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        // Up to the largest offset.
        l_len: 0,
        // The kernel requires 0.
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole))?;
    Ok(())
}

fn failed(error: io::Error) -> DeviceError {
    DeviceError { errno: error.raw_os_error().unwrap_or(5) }
}

impl Device for Disk {
    fn properties(&self) -> Properties {
        let holes = !self.is_block_device;
        Properties { size: self.size, block_size: BLOCK, unmap: holes, unmap_zeroes: holes }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        self.read_at(offset, len)
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        self.file.write_all_at(&data, offset).map_err(failed)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(failed)
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.zero(offset, len)
    }

    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        // Some file systems have no holes.
        self.punch(offset, len).or_else(|_| self.zero(offset, len))
    }

    async fn read_external(
        &self,
        _id: &[u8],
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, DeviceError> {
        let external = self.external.as_ref().ok_or(DeviceError { errno: 19 })?;
        external.read_padded(offset, len)
    }
}
