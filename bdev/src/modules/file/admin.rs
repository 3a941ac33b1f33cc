//! Admin commands that read data, sent to a device of the kernel's NVMe driver.
#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IO('N', 0x40)`: returns the namespace's id.
const IOCTL_ID: libc::Ioctl = 0x4e40;
/// `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const IOCTL_ADMIN: libc::Ioctl = 0xc048_4e41;

/// `struct nvme_admin_cmd`.
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

const _: () = assert!(size_of::<Command>() == 72, "the kernel's size");

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
