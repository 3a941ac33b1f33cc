//! Opens a file or block device: its kind, its size, and the alignment that direct I/O needs.
#![expect(unsafe_code, reason = "ioctls, statx, and a read for a probe")]

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::SeekFrom;

use super::admin::AdminData;
use crate::access::Access;
use crate::contract::{Extent, Storage};
use crate::error::Error;
use crate::geometry::check_block_size;
use crate::topology::Topology;

/// The alignment of each segment that direct I/O needs. Powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Alignment of the address, in bytes.
    pub memory: usize,
    /// Alignment of the length, in bytes.
    pub length: usize,
}

/// A file that can serve as a disk.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) storage: Storage,
    /// `None` if the file is not open for direct I/O.
    pub(super) direct: Option<Alignment>,
    pub(super) topology: Topology,
}

/// Opens a file or block device for a disk, with `O_DIRECT` if its file system supports that, or
/// what another [`Access`] names.
///
/// # Errors
/// [`Error::System`] with the file's name; [`not_of_kind`] if it is of another kind than `access`
/// requires.
pub fn open_file(filename: &Path, access: Access) -> Result<File, Error> {
    let path = open_kind_checked(filename, access)?;
    let system = |source| Error::System { what: filename.display().to_string(), source };
    if is_nvme(access) {
        let device = reopen(&path, access, 0).map_err(system)?;
        return match nvme_data(access) {
            None => Ok(device),
            Some(data) => data.read(&device).and_then(|data| pipe_with(&data)).map_err(system),
        };
    }
    reopen(&path, access, libc::O_DIRECT).or_else(|_| reopen(&path, access, 0)).map_err(system)
}

/// Returns the data that a pipe holds, for an access that opens one.
fn nvme_data(access: Access) -> Option<AdminData> {
    match access {
        Access::NvmeController => Some(AdminData::Controller),
        Access::NvmeNamespace => Some(AdminData::Namespace),
        Access::NvmeHealth => Some(AdminData::Health),
        _ => None,
    }
}

/// Returns whether an access is for paths of the NVMe driver.
fn is_nvme(access: Access) -> bool {
    access == Access::NvmeControl || nvme_data(access).is_some()
}

/// Returns a pipe that holds this data, at most a page.
fn pipe_with(data: &[u8]) -> io::Result<File> {
    let (reader, mut writer) = io::pipe()?;
    writer.write_all(data)?;
    Ok(OwnedFd::from(reader).into())
}

/// Returns the error for a path that is not of the kind that `access` requires.
#[must_use]
pub fn not_of_kind(filename: &Path, access: Access) -> Error {
    let expected = match access {
        Access::ReadWrite | Access::ReadOnly => "neither a file nor a block device",
        Access::Exclusive => "not the block device of an NVMe namespace",
        _ => "not a device of the NVMe driver",
    };
    Error::Invalid(format!("{}: {expected}", filename.display()))
}

/// Returns whether a path is that of a device of the kernel's NVMe driver (a controller, the
/// character device of a namespace, `nvme-fabrics`), or of an attribute that resets, rescans or
/// deletes a controller.
#[must_use]
pub fn is_nvme_control(path: &Path) -> bool {
    if is_numbered(path, "/dev/ng") {
        return true;
    }
    let Some(path) = path.to_str() else { return false };
    let is_controller = |name: &str| name.strip_prefix("nvme").is_some_and(is_number);
    if let Some(name) = path.strip_prefix("/dev/") {
        return name == "nvme-fabrics" || is_controller(name);
    }
    let attribute = path.strip_prefix("/sys/class/nvme/").and_then(|path| path.split_once('/'));
    attribute.is_some_and(|(name, attribute)| {
        is_controller(name)
            && ["reset_controller", "rescan_controller", "delete_controller"].contains(&attribute)
    })
}

/// Returns whether a path is that of the block device of a namespace.
fn is_nvme_block(path: &Path) -> bool {
    is_numbered(path, "/dev/nvme")
}

/// Returns whether a path is the prefix and the numbers of a controller and a namespace, `0n1`.
fn is_numbered(path: &Path, prefix: &str) -> bool {
    let name = path.to_str().and_then(|path| path.strip_prefix(prefix));
    let numbers = name.and_then(|name| name.split_once('n'));
    numbers.is_some_and(|(controller, id)| is_number(controller) && is_number(id))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Checks that a file from [`open_file`] is compatible with the block size.
pub(super) fn check(file: File, filename: &Path, block_size: Option<u32>) -> Result<Opened, Error> {
    let what = filename.display();
    let system = |source| Error::System { what: what.to_string(), source };
    let device_block = logical_block_size(&file).map_err(system)?;
    let size = size(&file).map_err(system)?;
    let block_size = fitting_block_size(filename, size, device_block, block_size)?;
    let direct = alignment(&file, block_size);
    if direct.is_none() {
        use_page_cache(&file).map_err(system)?;
    }
    let is_device = device_block.is_some();
    let topology = topology(&file, block_size, is_device);
    let storage = storage(&file).map_err(system)?;
    Ok(Opened { file, size, block_size, storage, direct, topology })
}

/// Checks whether a file can be a disk, as far as this is possible without opening it.
///
/// # Errors
/// [`Error::Invalid`], as for [`FileDisk::create`](super::FileDisk::create).
pub fn check_unopened(
    filename: &Path,
    metadata: &Metadata,
    block_size: Option<u32>,
) -> Result<(), Error> {
    let kind = metadata.file_type();
    check_kind(filename, kind)?;
    if kind.is_file() {
        fitting_block_size(filename, metadata.len(), None, block_size)?;
    }
    Ok(())
}

/// Returns the block size for a file of `size` bytes. `device` is the block size of a block device,
/// `given` that of the operator.
fn fitting_block_size(
    filename: &Path,
    size: u64,
    device: Option<u32>,
    given: Option<u32>,
) -> Result<u32, Error> {
    let what = filename.display();
    let Some(block_size) = given.or(device) else {
        return Err(Error::Invalid(format!("{what}: a regular file needs a block_size")));
    };
    check_block_size(&what.to_string(), block_size)?;
    if let Some(device) = device
        && block_size < device
    {
        return Err(Error::Invalid(format!(
            "{what}: block size {block_size} is smaller than the device's, {device}"
        )));
    }
    if size == 0 || !size.is_multiple_of(u64::from(block_size)) {
        return Err(Error::Invalid(format!(
            "{what}: size {size} is not a positive multiple of the block size {block_size}"
        )));
    }
    Ok(block_size)
}

/// Returns whether the first bytes of a range of a regular file are in a hole, and how many.
pub(super) fn extent(file: &File, offset: u64, len: u64) -> io::Result<Extent> {
    // Changes the position of the file, which no I/O of a disk uses.
    let next = |from| match rustix::fs::seek(file, from) {
        Ok(at) => Ok(at),
        // Neither data nor a hole begins before the end of the file.
        Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
        Err(e) => Err(io::Error::from(e)),
    };
    let data = next(SeekFrom::Data(offset))?;
    let allocated = data <= offset;
    let end = if allocated { next(SeekFrom::Hole(offset))? } else { data };
    // Another process may change the file between the two calls.
    Ok(Extent { len: end.saturating_sub(offset).clamp(1, len), allocated })
}

fn storage(file: &File) -> io::Result<Storage> {
    let metadata = file.metadata()?;
    Ok(if metadata.file_type().is_block_device() {
        Storage::BlockDevice(metadata.rdev())
    } else {
        Storage::File { device: metadata.dev(), inode: metadata.ino() }
    })
}

/// Turns direct I/O off, if it is on.
fn use_page_cache(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: reads the flags of an open file.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: sets those flags without O_DIRECT, on a file without I/O in flight.
    let rc = unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_DIRECT) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Finds the file without opening it for I/O, and refuses anything but files and block devices.
/// Opening a fifo waits, and opening some character devices has side effects.
fn open_kind_checked(filename: &Path, access: Access) -> Result<File, Error> {
    let what = filename.display();
    let system = |source| Error::System { what: what.to_string(), source };
    // The driver's names are no links; a link is then found as such, and refused.
    let link = if is_nvme(access) || access == Access::Exclusive { libc::O_NOFOLLOW } else { 0 };
    let path = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC | link)
        .open(filename)
        .map_err(system)?;
    let kind = path.metadata().map_err(system)?.file_type();
    match access {
        Access::ReadWrite | Access::ReadOnly => {
            check_kind(filename, kind)?;
            check_file_system(&path).map_err(system)?;
        }
        Access::Exclusive if is_nvme_block(filename) && kind.is_block_device() => {}
        Access::Exclusive => return Err(not_of_kind(filename, access)),
        _ if is_nvme_control(filename) && !kind.is_symlink() => {}
        _ => return Err(not_of_kind(filename, access)),
    }
    Ok(path)
}

/// Fails with EPERM for a file through which the kernel shows or takes something, such as
/// `/proc/self/mem`: it is no disk, and writing to it would do anything.
fn check_file_system(path: &File) -> io::Result<()> {
    /// From the kernel's `magic.h`: procfs, sysfs, debugfs, tracefs, securityfs, configfs, bpf,
    /// efivarfs, cgroup, cgroup2, and SELinux.
    const OF_KERNEL: [u32; 11] = [
        0x9fa0,
        0x6265_6572,
        0x6462_6720,
        0x7472_6163,
        0x7363_6673,
        0x6265_6570,
        0xcafe_4a11,
        0xde5e_81e4,
        0x0027_e0eb,
        0x6367_7270,
        0xf97c_ff8c,
    ];
    #[expect(clippy::cast_possible_truncation, reason = "magic numbers have 32 bits")]
    #[expect(clippy::cast_sign_loss, reason = "a number without a sign")]
    let magic = rustix::fs::fstatfs(path)?.f_type as u32;
    if OF_KERNEL.contains(&magic) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(())
}

fn check_kind(filename: &Path, kind: FileType) -> Result<(), Error> {
    if kind.is_dir() {
        let source = io::Error::from_raw_os_error(libc::EISDIR);
        return Err(Error::System { what: filename.display().to_string(), source });
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(not_of_kind(filename, Access::ReadWrite));
    }
    Ok(())
}

/// Opens what `path` found, and nothing that has taken its name since.
fn reopen(path: &File, access: Access, flags: i32) -> io::Result<File> {
    let exclusive = if access == Access::Exclusive { libc::O_EXCL } else { 0 };
    let is_attribute = is_nvme(access) && path.metadata()?.is_file();
    OpenOptions::new()
        .read(!is_attribute)
        .write(access != Access::ReadOnly)
        .custom_flags(flags | exclusive | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", path.as_raw_fd()))
}

/// Returns the size in bytes of a file or block device.
pub(super) fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        return Ok(metadata.len());
    }
    /// `_IOR(0x12, 114, size_t)`, missing from libc.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    let mut size: u64 = 0;
    // SAFETY: this ioctl stores one u64.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(size) }
}

/// Returns a block device's logical block size; `None` for a file.
fn logical_block_size(file: &File) -> io::Result<Option<u32>> {
    if !file.metadata()?.file_type().is_block_device() {
        return Ok(None);
    }
    limit(file, Limit::LogicalBlock).map(Some)
}

/// The limits that a block device reports as a 32-bit number of bytes.
#[derive(Clone, Copy)]
enum Limit {
    LogicalBlock,
    PhysicalBlock,
    MinIo,
    OptimalIo,
}

fn limit(file: &File, limit: Limit) -> io::Result<u32> {
    let request = match limit {
        Limit::LogicalBlock => libc::BLKSSZGET,
        Limit::PhysicalBlock => libc::BLKPBSZGET,
        Limit::MinIo => libc::BLKIOMIN,
        Limit::OptimalIo => libc::BLKIOOPT,
    };
    let mut bytes: u32 = 0;
    // SAFETY: each of these ioctls stores one int.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut bytes) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Returns the I/O sizes that a block device prefers. For a file, this is only the alignment that
/// direct I/O needs, and 0 if the kernel does not report it: the file's `st_blksize` describes the
/// page cache.
fn topology(file: &File, block_size: u32, is_device: bool) -> Topology {
    if !is_device {
        let physical_block_size = told(file.as_raw_fd()).map_or(0, |(_, offset)| offset);
        return Topology { physical_block_size, ..Topology::default() };
    }
    let bytes = |which| limit(file, which).unwrap_or(0);
    let blocks = |which| {
        let bytes = bytes(which);
        if bytes.is_multiple_of(block_size) { bytes / block_size } else { 0 }
    };
    Topology {
        physical_block_size: bytes(Limit::PhysicalBlock),
        min_io_blocks: blocks(Limit::MinIo),
        optimal_io_blocks: blocks(Limit::OptimalIo),
    }
}

/// Returns the alignment that direct I/O needs on this file; `None` if it does not work, or not for
/// every block.
fn alignment(file: &File, block_size: u32) -> Option<Alignment> {
    let fd = file.as_raw_fd();
    // SAFETY: reads the flags of an open file.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags & libc::O_DIRECT == 0 {
        return None;
    }
    let block = block_size as usize;
    let alignment = match told(fd) {
        Some((memory, offset)) => Alignment { memory: memory as usize, length: offset as usize },
        // Kernels before 6.1 and some file systems do not report it: test whether a block can be
        // read.
        None => Alignment { memory: block, length: block },
    };
    let fits = alignment.memory.is_power_of_two()
        && alignment.memory <= super::blocking::BOUNCE_ALIGN
        && alignment.length.is_power_of_two()
        && alignment.length <= block;
    (fits && reads_one_block(fd, block)).then_some(alignment)
}

/// Returns the alignment of memory and of offsets that the kernel reports; zeroes if direct I/O
/// does not work.
fn told(fd: RawFd) -> Option<(u32, u32)> {
    // SAFETY: all zeroes is a valid value of this plain C structure.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: passes an empty, NUL-terminated name and a structure of the right type.
    let rc = unsafe { libc::statx(fd, c"".as_ptr(), flags, libc::STATX_DIOALIGN, &raw mut statx) };
    (rc == 0 && statx.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((statx.stx_dio_mem_align, statx.stx_dio_offset_align))
}

/// Reads the first block directly, to test whether this works.
fn reads_one_block(fd: RawFd, block: usize) -> bool {
    let mut memory = vec![0u8; block * 2];
    let start = memory.as_ptr().align_offset(block);
    let at = memory.as_mut_ptr().wrapping_add(start);
    // SAFETY: `start < block`, so a block fits behind it.
    let n = unsafe { libc::pread(fd, at.cast(), block, 0) };
    usize::try_from(n) == Ok(block)
}

impl Opened {
    /// Returns whether the file system can punch a hole. The test changes no byte of the disk.
    pub(super) fn punches_holes(&self) -> bool {
        if let Storage::BlockDevice(number) = self.storage {
            return zeroes_by_command(number);
        }
        let Ok(past) = i64::try_from(self.size) else { return false };
        let len = i64::from(self.block_size);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: punches behind the end of the file, where there is no data.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, past, len) == 0 }
    }
}

/// Returns whether the block device can zero a range without being sent the zeroes. The kernel
/// punches a hole in a device by this command.
fn zeroes_by_command(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    // For a partition, the queue is in the parent directory.
    ["queue", "../queue"].into_iter().any(|queue| {
        let name = format!("/sys/dev/block/{major}:{minor}/{queue}/write_zeroes_max_bytes");
        std::fs::read_to_string(name)
            .is_ok_and(|text| text.trim().parse::<u64>().is_ok_and(|max| max > 0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_the_nvme_driver_are_controls() {
        let is = |path: &str| is_nvme_control(Path::new(path));
        for path in ["/dev/nvme0", "/dev/ng12n3", "/dev/nvme-fabrics"] {
            assert!(is(path), "{path}");
        }
        assert!(is("/sys/class/nvme/nvme10/delete_controller"));
        for path in [
            "/dev/nvme0n1",
            "/dev/nvme",
            "/dev/ng0",
            "/dev/ng0nx",
            "/dev/ngn1",
            "/dev/x/ng0n1",
            "/dev/sg0",
            "/dev/../dev/nvme0",
            "/tmp/nvme0",
            "/sys/class/nvme/nvme0/model",
            "/sys/class/nvme/nvme0/../reset_controller",
            "/sys/class/nvme/x/reset_controller",
        ] {
            assert!(!is(path), "{path}");
        }
    }

    #[test]
    fn a_pipe_holds_its_data_and_ends() {
        let mut read = vec![];
        io::Read::read_to_end(&mut pipe_with(&[7; 4096]).unwrap(), &mut read).unwrap();
        assert_eq!(read, [7; 4096]);
    }

    #[test]
    fn a_file_is_no_block_device_and_no_control() {
        let file = tempfile::NamedTempFile::new().unwrap();
        use Access::{Exclusive, NvmeControl, NvmeHealth};
        for access in [Exclusive, NvmeControl, NvmeHealth] {
            assert_eq!(open_file(file.path(), access).unwrap_err().errno(), libc::EINVAL);
        }
        open_file(file.path(), Access::ReadWrite).unwrap();
    }

    #[test]
    fn only_a_namespace_is_opened_exclusively() {
        assert!(is_nvme_block(Path::new("/dev/nvme0n1")));
        assert!(is_nvme_block(Path::new("/dev/nvme12n34")));
        for path in ["/dev/ng0n1", "/dev/nvme0", "/dev/nvme0n1p1", "/dev/sda"] {
            assert!(!is_nvme_block(Path::new(path)), "{path}");
        }
        let e = open_file(Path::new("/dev/null"), Access::Exclusive).unwrap_err();
        assert_eq!(e.errno(), libc::EINVAL);
    }

    #[test]
    fn files_of_the_kernel_are_no_disks() {
        for path in ["/proc/self/mem", "/proc/self/environ", "/sys/kernel/uevent_seqnum"] {
            for access in [Access::ReadWrite, Access::ReadOnly] {
                assert_eq!(open_file(Path::new(path), access).unwrap_err().errno(), libc::EPERM);
            }
        }
        // A name in procfs of a file that is elsewhere.
        let file = tempfile::tempfile().unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        open_file(Path::new(&path), Access::ReadWrite).unwrap();
    }
}
