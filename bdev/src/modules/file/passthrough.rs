//! NVMe commands through an io_uring (`IORING_OP_URING_CMD`) on the character device of a
//! namespace, which spares the block layer's part of each read and write.
//!
//! The block device stays open beside it, and does what does not fit: other operations, transfers
//! that the controller cannot do in one command, and all I/O that fails here. The kernel neither
//! repeats a passthrough command nor moves it to another path, so the block device decides whether
//! an I/O fails.
//!
//! The ring does not poll the device's queues (`IORING_SETUP_IOPOLL`): Linux 6.1 crashes if a process
//! with such a ring is killed.
//!
//! No call waits for I/O. If the device's queue has no free request, the kernel hands the command to
//! a thread (io-wq) that it makes for the reactor: in `io_uring_enter`, which then allocates. This
//! happens only with more commands in flight than the queue takes, some 1,000 by all channels
//! together, so no limit for each channel prevents it. At most [`WORKERS_MAX`] such threads exist
//! for each reactor.
//!
//! The ring is restricted to this request and this file. A thread that can write to the ring can
//! send any I/O command to the namespace, but no admin command: the device takes those from `ioctl`
//! only, which reactors cannot call.
#![expect(unsafe_code, reason = "ioctls, and hands a guest's memory to the kernel")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::backing::{device_attribute, logical_block_size, queue_attribute};
use super::engine::{Submitter, joined};
use super::ring::{Ring, restrict};
use crate::error::Error;
use crate::io::{Io, Op, Segment, Tag};

/// The index of the file in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// `_IOWR('N', 0x80, struct nvme_uring_cmd)`: data in one range.
const CMD_IO: u32 = 0xc048_4e80;
/// The same in a list of ranges.
const CMD_IO_VEC: u32 = 0xc048_4e81;
/// `_IO('N', 0x40)`: returns the namespace's id.
const IOCTL_ID: libc::Ioctl = 0x4e40;
/// `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const IOCTL_ADMIN: libc::Ioctl = 0xc048_4e41;

const CMD_WRITE: u8 = 1;
const CMD_READ: u8 = 2;

/// The page of a controller. Data of one command has no gap within a page.
const PAGE: usize = 4096;

/// The most kernel threads of a reactor, for commands that have to wait for a free request.
const WORKERS_MAX: u32 = 4;

/// The most blocks of a command: it has 16 bits for their number less one.
const BLOCKS_MAX: u64 = 1 << 16;

/// `struct nvme_uring_cmd`, and with `result` as the last field `struct nvme_admin_cmd`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const COMMAND_BYTES: usize = size_of::<Command>();
const _: () = assert!(COMMAND_BYTES == 72, "the kernel's size");

/// The character device of an NVMe namespace, with what commands need to know of the namespace.
#[derive(Clone, Debug)]
pub struct Passthrough {
    file: Arc<File>,
    nsid: u32,
    block_shift: u32,
    /// The most bytes of a command.
    transfer_max: u64,
}

impl Passthrough {
    /// Prepares I/O through the character device `file` of the namespace whose block device is
    /// `block`, and reads the first block that way.
    ///
    /// # Errors
    /// The reason for which this is not possible: the kernel is older than 5.19, it does not allow
    /// it to this process (before 6.2, it needs CAP_SYS_ADMIN), the namespace's blocks have
    /// metadata, or the read has failed.
    pub fn probe(file: Arc<File>, block: &File) -> Result<Self, Error> {
        let system = |what: &str| {
            let what = what.to_owned();
            move |source| Error::System { what, source }
        };
        if !file.metadata().map_err(system("stat"))?.file_type().is_char_device() {
            return Err(Error::Invalid("not a character device".into()));
        }
        let nsid = namespace_id(&file).map_err(system("NVME_IOCTL_ID"))?;
        let block_size = logical_block_size(block).map_err(system("BLKSSZGET"))?;
        let block_shift = block_size.filter(|size| size.is_power_of_two()).map(u32::trailing_zeros);
        let block_shift = block_shift.ok_or_else(|| Error::Invalid("not a block device".into()))?;
        let rdev = block.metadata().map_err(system("stat"))?.rdev();
        if !lacks_metadata(|attribute| device_attribute(rdev, attribute)) {
            return Err(Error::Unsupported(
                "blocks with metadata, or none known not to have".into(),
            ));
        }
        let attribute = |name| queue_attribute(rdev, name).unwrap_or(0);
        let probed = Self {
            file,
            nsid,
            block_shift,
            transfer_max: transfer_max(attribute("max_hw_sectors_kb"), attribute("max_segments")),
        };
        if probed.transfer_max < 1 << block_shift {
            return Err(Error::Unsupported("the size of the controller's transfers".into()));
        }
        forget_cached(block).map_err(system("page cache"))?;
        probed.read_first_block().map_err(system("read"))?;
        Ok(probed)
    }

    /// Returns the namespace's id.
    #[must_use]
    pub fn namespace_id(&self) -> u32 {
        self.nsid
    }

    /// Makes the ring of a channel.
    pub(super) fn queue(&self, depth: u16) -> io::Result<NvmeQueue> {
        let mut builder = IoUring::<squeue::Entry128, cqueue::Entry32>::builder();
        builder.dontfork().setup_r_disabled();
        builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
        let ring = builder.build(depth.into())?;
        ring.submitter().register_files(&[self.file.as_raw_fd()])?;
        ring.submitter().register_iowq_max_workers(&mut [WORKERS_MAX; 2])?;
        restrict(&ring, &[opcode::UringCmd80::CODE])?;
        Ok(NvmeQueue { ring: Ring::new(ring), device: self.clone() })
    }

    fn read_first_block(&self) -> io::Result<()> {
        let mut queue = self.queue(1)?;
        let mut memory = vec![0_u8; PAGE.max(1 << self.block_shift) + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        let len = 1_usize << self.block_shift;
        let segments = [Segment::new(memory.as_mut_ptr().wrapping_add(start), len)];
        let read = Io::rw(Op::Read, Tag(0), 0, len as u64, &segments);
        // SAFETY: the memory is valid until the command has ended, below.
        unsafe { queue.push(&read) };
        loop {
            queue.kick();
            if !queue.is_behind() {
                // A signal makes it return early.
                let _ = queue.ring.ring.submit_and_wait(1);
            }
            queue.refresh();
            match queue.next_result() {
                Some((_, 0)) => return Ok(()),
                Some((_, errno @ ..0)) => return Err(io::Error::from_raw_os_error(-errno)),
                Some((_, status)) => {
                    return Err(io::Error::other(format!("NVMe status {status:#x}")));
                }
                None => {}
            }
        }
    }

    fn command(&self, io: &Io) -> Command {
        let block = io.offset >> self.block_shift;
        #[expect(clippy::cast_possible_truncation, reason = "`takes` has limited the length")]
        let blocks = (io.len >> self.block_shift) as u32;
        #[expect(clippy::cast_possible_truncation, reason = "the lower half")]
        let low = block as u32;
        Command {
            opcode: if io.op == Op::Read { CMD_READ } else { CMD_WRITE },
            nsid: self.nsid,
            cdw10: low,
            cdw11: (block >> 32) as u32,
            cdw12: blocks - 1,
            ..Command::default()
        }
    }
}

/// Writes back what an earlier user has left in the page cache of the block device, and forgets it:
/// written back later, it would overwrite what commands have written.
fn forget_cached(block: &File) -> io::Result<()> {
    block.sync_data()?;
    Ok(rustix::fs::fadvise(block, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Returns the most bytes of a command, from the queue's attributes. In the worst case each page is
/// a segment, and the range begins within a page.
fn transfer_max(kib: u64, segments: u64) -> u64 {
    let pages = segments.saturating_sub(1).saturating_mul(PAGE as u64);
    kib.saturating_mul(1 << 10).min(pages).min(BLOCKS_MAX << 9).min(1 << 30)
}

/// Returns the id of the namespace whose character device this is.
fn namespace_id(file: &File) -> io::Result<u32> {
    // SAFETY: this ioctl has no argument.
    let id = unsafe { libc::ioctl(file.as_raw_fd(), IOCTL_ID) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

/// The data structures that admin commands read (NVM Express Base Specification).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdminData {
    /// Of the controller.
    Controller,
    /// Of the namespace whose character device is asked.
    Namespace,
    /// The log page SMART / Health Information of the controller.
    Health,
}

impl AdminData {
    /// Reads the data from a device of the kernel's NVMe driver. May block for a minute.
    ///
    /// # Errors
    /// EACCES if the kernel does not allow the command to this process; an error without an errno
    /// for the controller's status.
    pub(super) fn read(self, file: &File) -> io::Result<Vec<u8>> {
        const IDENTIFY: u8 = 6;
        const IDENTIFY_BYTES: u32 = 4096;
        const GET_LOG_PAGE: u8 = 2;
        const HEALTH_BYTES: u32 = 512;
        const HEALTH_LOG: u32 = 2;
        let dwords = HEALTH_BYTES / 4 - 1;
        let (opcode, nsid, cdw10, len) = match self {
            Self::Controller => (IDENTIFY, 0, 1, IDENTIFY_BYTES),
            Self::Namespace => (IDENTIFY, namespace_id(file)?, 0, IDENTIFY_BYTES),
            Self::Health => (GET_LOG_PAGE, u32::MAX, dwords << 16 | HEALTH_LOG, HEALTH_BYTES),
        };
        let mut data = vec![0_u8; len as usize];
        let addr = data.as_mut_ptr() as u64;
        let mut command =
            Command { opcode, nsid, addr, data_len: len, cdw10, ..Command::default() };
        // SAFETY: the kernel stores at most `data_len` bytes, which `data` has.
        let rc = unsafe { libc::ioctl(file.as_raw_fd(), IOCTL_ADMIN, &raw mut command) };
        match rc {
            0 => Ok(data),
            status @ 1.. => Err(io::Error::other(format!("NVMe status {status:#x}"))),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Returns whether the kernel's attributes of a namespace's block device say that blocks have no
/// metadata. Linux 6.8 and newer tell the bytes. Before, the block layer has a profile for each
/// format with metadata, if it is built with that.
fn lacks_metadata(attribute: impl Fn(&str) -> Option<String>) -> bool {
    match attribute("metadata_bytes") {
        Some(bytes) => bytes == "0",
        None => attribute("integrity/format").is_some_and(|format| format == "none"),
    }
}

/// The commands of one channel.
pub(super) struct NvmeQueue {
    ring: Ring<squeue::Entry128, cqueue::Entry32>,
    device: Passthrough,
}

impl NvmeQueue {
    /// Returns a completion: 0, a positive NVMe status, or a negative errno.
    #[inline]
    fn next_result(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.ring.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }
}

impl Submitter for NvmeQueue {
    fn nowait(&self) -> (bool, bool) {
        (true, true)
    }

    #[inline]
    unsafe fn takes(&self, io: &Io) -> bool {
        if io.len > self.device.transfer_max || io.len >> self.device.block_shift > BLOCKS_MAX {
            return false;
        }
        // SAFETY: the caller guarantees that the segments are valid.
        let segments = unsafe { io.segments() };
        // Otherwise the kernel would copy the data to memory that it allocates.
        let joint = |pair: &[Segment]| {
            let end = (pair[0].base() as usize).wrapping_add(pair[0].len());
            (end | pair[1].base() as usize) & (PAGE - 1) == 0
        };
        segments.windows(2).all(joint)
    }

    #[inline]
    unsafe fn push(&mut self, io: &Io) {
        let mut command = self.device.command(io);
        // SAFETY: the caller guarantees that the segments are valid.
        let (addr, len, cmd_op) = match joined(unsafe { io.segments() }) {
            Some(one) => (one.base() as u64, one.len(), CMD_IO),
            None => {
                let (iovecs, count) = io.iovecs();
                (iovecs as u64, count as usize, CMD_IO_VEC)
            }
        };
        command.addr = addr;
        #[expect(clippy::cast_possible_truncation, reason = "`takes` has limited the length")]
        let len = len as u32;
        command.data_len = len;
        let mut bytes = [0_u8; 80];
        // SAFETY: both are plain data, and the array is larger than the command.
        unsafe { bytes.as_mut_ptr().cast::<Command>().write_unaligned(command) };
        let entry = opcode::UringCmd80::new(FILE, cmd_op).cmd(bytes).build();
        let entry = entry.user_data(io.len << 16 | u64::from(io.tag.0));
        // SAFETY: by the contract, the memory that the entry refers to stays valid until the I/O is
        // reported.
        unsafe { self.ring.push(&entry) };
    }

    #[inline]
    fn kick(&mut self) {
        self.ring.kick();
    }

    fn is_behind(&self) -> bool {
        self.ring.is_behind()
    }

    fn refresh(&mut self) {
        self.ring.refresh();
    }

    #[inline]
    fn next(&mut self) -> Option<(Tag, i32)> {
        let (data, result) = self.next_result()?;
        #[expect(clippy::cast_possible_truncation, reason = "`push` stored tag and length there")]
        let (tag, len) = (Tag(data as u16), (data >> 16) as i32);
        let result = match result {
            0 => len,
            // The kernel never allows this kind of command to this process.
            refused if [-libc::EACCES, -libc::EPERM].contains(&refused) => -libc::EOPNOTSUPP,
            // The block device repeats it.
            _ => -libc::EAGAIN,
        };
        Some((tag, result))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.wake_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Namespace;
    use super::*;

    fn device() -> Passthrough {
        // No command is submitted to this file.
        let file = Arc::new(File::options().read(true).write(true).open("/dev/null").unwrap());
        let transfer_max = transfer_max(512, 127);
        Passthrough { file, nsid: 7, block_shift: 12, transfer_max }
    }

    fn queue() -> NvmeQueue {
        device().queue(8).unwrap()
    }

    #[test]
    fn commands_do_not_mix_with_the_page_cache() {
        let uses = |is_direct| {
            let passthrough = device();
            let file = Arc::clone(&passthrough.file);
            let namespace = Namespace { file, passthrough: Some(passthrough) };
            namespace.for_block_device(is_direct).passthrough.is_some()
        };
        assert!(uses(true) && !uses(false));
    }

    fn takes(queue: &NvmeQueue, segments: &[(usize, usize)]) -> bool {
        let segments: Vec<_> =
            segments.iter().map(|(at, len)| Segment::new(*at as *mut u8, *len)).collect();
        let len = segments.iter().map(|segment| segment.len() as u64).sum();
        // SAFETY: the segments are valid; nobody accesses the memory that they name.
        unsafe { queue.takes(&Io::rw(Op::Read, Tag(0), 0, len, &segments)) }
    }

    #[test]
    fn only_what_the_controller_can_do_at_once_is_taken() {
        let queue = queue();
        assert!(takes(&queue, &[(0x1200, 4096)]), "one range begins anywhere");
        assert!(takes(&queue, &[(0x1200, 0xe00), (0x5000, 0x200)]));
        assert!(!takes(&queue, &[(0x1000, 0xe00), (0x5000, 0x200)]), "a gap at a range's end");
        assert!(!takes(&queue, &[(0x1200, 0xe00), (0x5200, 0x200)]), "a gap at a range's start");
        assert!(takes(&queue, &[(0x1000, 126 << 12)]));
        assert!(!takes(&queue, &[(0x1000, 127 << 12)]), "its pages may be too many segments");
        assert_eq!(transfer_max(128, 1000), 128 << 10);
        assert_eq!(transfer_max(128, 0), 0);
    }

    #[test]
    fn a_command_has_the_blocks_of_the_io() {
        let queue = queue();
        let memory = [Segment::new(0x1000 as *mut u8, 0x3000)];
        let io = Io::rw(Op::Write, Tag(1), 0x1234_5678_9000_0000, 0x3000, &memory);
        let command = queue.device.command(&io);
        assert_eq!((command.opcode, command.nsid), (CMD_WRITE, 7));
        assert_eq!((command.cdw10, command.cdw11, command.cdw12), (0x6789_0000, 0x1_2345, 2));
    }

    #[test]
    fn metadata_is_refused_and_so_is_what_the_kernel_does_not_tell() {
        let lacks = |known: &[(&str, &str)]| {
            let find = |name: &str| known.iter().find(|(other, _)| *other == name);
            lacks_metadata(|name| find(name).map(|(_, text)| (*text).to_owned()))
        };
        assert!(lacks(&[("metadata_bytes", "0")]));
        assert!(!lacks(&[("metadata_bytes", "8"), ("integrity/format", "none")]));
        assert!(lacks(&[("integrity/format", "none")]));
        assert!(!lacks(&[("integrity/format", "T10-DIF-TYPE1-CRC")]));
        assert!(!lacks(&[("integrity/format", "nop")]) && !lacks(&[]));
    }

    #[test]
    fn results_become_those_of_a_read_and_errors_go_to_the_block_device() {
        let mut queue = queue();
        let memory = [Segment::new(0x1000 as *mut u8, 0x2000)];
        let io = Io::rw(Op::Read, Tag(5), 0, 0x2000, &memory);
        // SAFETY: the file does not access the memory.
        unsafe { queue.push(&io) };
        queue.kick();
        assert!(!queue.is_behind());
        let mut next = None;
        while next.is_none() {
            queue.refresh();
            next = queue.next();
        }
        let (tag, result) = next.unwrap();
        assert_eq!(tag, Tag(5));
        assert!(result == 0x2000 || result == -libc::EAGAIN, "{result}");
    }

    #[test]
    fn a_file_is_no_namespace() {
        let file = tempfile::tempfile().unwrap();
        let same = file.try_clone().unwrap();
        assert_eq!(Passthrough::probe(Arc::new(file), &same).unwrap_err().errno(), libc::EINVAL);
        let null = Arc::new(File::open("/dev/null").unwrap());
        Passthrough::probe(null, &same).unwrap_err();
    }
}
