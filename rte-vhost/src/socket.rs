//! System calls on Unix sockets.
#![expect(unsafe_code, reason = "system calls on sockets")]

use std::ffi::c_int;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Returns the path that a Unix socket is bound to.
pub(crate) fn bound_path(socket: BorrowedFd<'_>) -> Option<PathBuf> {
    // SAFETY: all zeroes is a valid value of this plain C struct.
    let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of_val(&addr)).expect("110 bytes");
    // SAFETY: the buffer is a local variable and has the given length.
    let result =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut addr).cast(), &raw mut len) };
    if result != 0 || c_int::from(addr.sun_family) != libc::AF_UNIX {
        return None;
    }
    let bytes: Vec<u8> =
        addr.sun_path.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    (!bytes.is_empty()).then(|| std::ffi::OsStr::from_bytes(&bytes).into())
}

/// Identifies the file of a bound socket: device and inode. The inode is not used again while the
/// socket is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// The file at `path`. A link is not followed.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        fs::symlink_metadata(path).ok().map(|meta| Self(meta.dev(), meta.ino()))
    }

    /// Returns whether this file is at `path`.
    pub(crate) fn is_at(self, path: &Path) -> bool {
        Self::of(path) == Some(self)
    }

    /// Removes this file from `path`, unless another process has put its own file there.
    ///
    /// Linux has no call that removes a name only if it belongs to a given file. So a process that
    /// may write to the directory loses a file that it puts there between the check and the
    /// removal, or between `bind` and [`FileId::of`].
    pub(crate) fn remove_from(self, path: &Path) {
        if self.is_at(path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Accepts a connection without blocking. The new socket is non-blocking.
pub(crate) fn accept4(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let (nobody, none) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the fd is open, and the peer's address is not requested.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), nobody, none, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the fd; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends a connection in both directions, even if the fd stays open.
pub(crate) fn shut_down(socket: &impl AsRawFd) {
    // SAFETY: the fd is open; on a socket that is not connected, the call has no effect.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Sends `bytes` together with `fd`.
pub(crate) fn send_with_fd(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
    flags: c_int,
) -> io::Result<()> {
    /// A control message with one fd, aligned as its header needs.
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fd: c_int,
    }
    let header = libc::cmsghdr {
        cmsg_len: size_of::<libc::cmsghdr>() + size_of::<c_int>(),
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    let mut control = Control { header, fd: fd.as_raw_fd() };
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: the message points to local memory, and `sendmsg` only reads it.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    match usize::try_from(sent) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
