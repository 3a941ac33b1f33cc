//! An export to the kernel's NBD driver, which makes it a block device (`/dev/nbdN`).
//!
//! One end of a socket pair goes to the kernel; the other is served like a client's socket. The
//! driver's old interface (ioctls) is used, since it needs no name service in the kernel.
#![expect(unsafe_code, reason = "ioctls of the NBD driver")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use bdev::Bdev;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tracing::debug;

use crate::connection::Client;
use crate::export::{Export, Shared, StartError};
use crate::held::Held;
use crate::negotiation::Chosen;

const NBD_SET_SOCK: libc::Ioctl = 0xab00;
const NBD_SET_BLKSIZE: libc::Ioctl = 0xab01;
const NBD_DO_IT: libc::Ioctl = 0xab03;
const NBD_CLEAR_SOCK: libc::Ioctl = 0xab04;
const NBD_SET_SIZE_BLOCKS: libc::Ioctl = 0xab07;
const NBD_SET_FLAGS: libc::Ioctl = 0xab0a;

/// The number of devices that the driver can have.
const DEVICES_MAX: u32 = 1 << 16;

/// Returns the first device of the driver that is not in use, below `/sys/block` and `/dev`.
#[must_use]
pub fn first_free_device(sys_block: &Path, dev: &Path) -> Option<PathBuf> {
    (0..DEVICES_MAX)
        .map(|number| format!("nbd{number}"))
        .take_while(|name| sys_block.join(name).exists())
        // The driver makes this file while the device has a connection.
        .find(|name| !sys_block.join(name).join("pid").exists())
        .map(|name| dev.join(name))
}

impl Export {
    /// Exports the bdev to the kernel, as the block device that `device` has open for writing.
    /// `on_end` is called when the export has ended and holds the bdev no more.
    ///
    /// # Errors
    /// EBUSY if the device is in use; EPERM without CAP_SYS_ADMIN, or in the sandbox; ENOTTY if it
    /// is another kind of device.
    pub fn start_kernel(
        bdev: Arc<dyn Bdev>,
        read_only: bool,
        device: File,
        on_end: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let system = |source| StartError::system("cannot connect the NBD device", source);
        let flags = SocketFlags::CLOEXEC;
        let (ours, kernels) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| system(e.into()))?;
        let fd = device.as_raw_fd();
        ioctl(fd, NBD_SET_SOCK, kernels.as_raw_fd() as libc::c_ulong).map_err(system)?;
        let shared = Shared::new(bdev, read_only, Box::new(on_end));
        let started = set_properties(fd, &shared).map_err(system).and_then(|()| {
            let ours = Held::new(ours, shared.account());
            shared.run(ours, |shared, socket, bdev| {
                shared.transmit(Client::new(socket), bdev, Chosen::default());
            })
        });
        if let Err(e) = started {
            shared.stop();
            let _ = ioctl(fd, NBD_CLEAR_SOCK, 0);
            return Err(e);
        }
        // The device stays with this thread, as closing it can wait for I/O.
        let run = move || {
            // Returns when the connection has ended.
            if let Err(e) = ioctl(device.as_raw_fd(), NBD_DO_IT, 0) {
                debug!("an NBD device has ended: {e}");
            }
            let _ = ioctl(device.as_raw_fd(), NBD_CLEAR_SOCK, 0);
            drop((kernels, device));
        };
        match thread::Builder::new().name("vhost-nbd-dev".into()).spawn(run) {
            Ok(_) => Ok(Self::of(shared)),
            Err(source) => {
                shared.stop();
                Err(system(source))
            }
        }
    }
}

fn set_properties(device: RawFd, shared: &Shared) -> io::Result<()> {
    let properties = shared.properties();
    let blocks = properties.size / u64::from(properties.block_size);
    ioctl(device, NBD_SET_BLKSIZE, properties.block_size.into())?;
    ioctl(device, NBD_SET_SIZE_BLOCKS, blocks)?;
    ioctl(device, NBD_SET_FLAGS, properties.flags().into())
}

fn ioctl(device: RawFd, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: these requests take numbers, not pointers; the fd is open.
    let result = unsafe { libc::ioctl(device, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_device_without_a_connection_is_free() {
        let root = tempfile::tempdir().unwrap();
        let dev = Path::new("/dev");
        let free = || first_free_device(root.path(), dev);
        assert_eq!(free(), None, "no driver");
        for name in ["nbd0", "nbd1"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        assert_eq!(free(), Some("/dev/nbd0".into()));
        std::fs::write(root.path().join("nbd0/pid"), "1").unwrap();
        assert_eq!(free(), Some("/dev/nbd1".into()));
        std::fs::write(root.path().join("nbd1/pid"), "1").unwrap();
        assert_eq!(free(), None);
    }
}
