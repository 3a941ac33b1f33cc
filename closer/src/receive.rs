//! Receives bytes from an untrusted process, with every fd in their messages.
#![expect(unsafe_code, reason = "recvmsg, and the fds that it creates")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::account::Account;
use crate::foreign::ForeignFd;
use crate::message::FDS_MAX;

/// The control buffer: a header, and the fds.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fds: [c_int; FDS_MAX],
}

/// Reads into `bytes` from a Unix socket, with `flags` of `recvmsg`. Charges the message's fds to
/// `account`. (With a plain `read`, the kernel closes them on the calling thread.)
///
/// # Errors
/// As `recvmsg`. `EMFILE` if the message's fds could exceed the limits ([`Account::has_room`]);
/// nothing is read then.
pub fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    flags: c_int,
    account: &Account,
) -> io::Result<(usize, Vec<ForeignFd>)> {
    if !account.has_room(FDS_MAX) {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero `Control` is valid: a header without fds.
    let mut control: Control = unsafe { std::mem::zeroed() };
    // SAFETY: an all-zero message is valid and empty.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the kernel writes to `bytes` and `control`, which are live, within the given lengths.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let is_fds = |header: &libc::cmsghdr| {
        header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS
    };
    if message.msg_controllen < size_of::<libc::cmsghdr>() || !is_fds(&control.header) {
        return Ok((got, Vec::new()));
    }
    let len = control.header.cmsg_len.saturating_sub(size_of::<libc::cmsghdr>());
    let count = (len / size_of::<c_int>()).min(FDS_MAX);
    let own = |fd: &c_int| {
        // SAFETY: the kernel has just created the fd for this process; nothing else owns it.
        ForeignFd::new(unsafe { OwnedFd::from_raw_fd(*fd) }, account)
    };
    Ok((got, control.fds[..count].iter().map(own).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{AsFd, RawFd};
    use std::os::unix::net::UnixStream;

    /// Sends `bytes` with `fd`, `count` times.
    fn send(socket: &UnixStream, bytes: &[u8], fd: RawFd, count: usize) {
        let mut part =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let header = libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + count * size_of::<c_int>(),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        let mut control = Control { header, fds: [fd; FDS_MAX] };
        // SAFETY: an all-zero message is valid and empty.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = control.header.cmsg_len.next_multiple_of(8);
        // SAFETY: the kernel only reads the message's memory, which is live.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
    }

    #[test]
    fn bytes_and_fds_arrive_together_and_none_is_lost() {
        let account = Account::new("receiver");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let fd = ours.as_raw_fd();
        ours.write_all(b"plain").unwrap();
        send(&ours, b"one", fd, 1);
        send(&ours, b"all", fd, FDS_MAX);
        let mut bytes = [0; 64];
        let mut received = (0, 0);
        while received != (11, 1 + FDS_MAX) {
            let (count, fds) = receive(theirs.as_fd(), &mut bytes, 0, &account).unwrap();
            assert!(count > 0);
            received = (received.0 + count, received.1 + fds.len());
        }
        drop(ours);
        let (count, fds) = receive(theirs.as_fd(), &mut bytes, 0, &account).unwrap();
        assert_eq!((count, fds.len()), (0, 0), "the end");
    }

    #[test]
    fn nothing_is_read_if_fds_could_exceed_the_limits() {
        let account = Account::new("full");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut kept = vec![];
        while account.has_room(FDS_MAX) {
            kept.push(ForeignFd::new(theirs.try_clone().unwrap().into(), &account));
        }
        ours.write_all(b"x").unwrap();
        let refused = receive(theirs.as_fd(), &mut [0], 0, &account).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EMFILE));
        drop(kept);
        while !account.has_room(FDS_MAX) {
            std::thread::yield_now();
        }
        assert_eq!(receive(theirs.as_fd(), &mut [0], 0, &account).unwrap().0, 1);
    }
}
