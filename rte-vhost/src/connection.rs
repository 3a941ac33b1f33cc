//! A front end's connection as the control side uses it.
#![expect(unsafe_code, reason = "system calls on sockets")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use closer::ForeignFd;
use vhost_target::Connection;
use vhost_target::protocol::HEADER_BYTES;

use crate::front_ends::{Accepted, shut_down};
use crate::{callbacks, interpose};

/// A connection: the front end's socket, and the socket through which answers go to it.
#[derive(Debug)]
pub(crate) struct DpdkConnection {
    vid: c_int,
    socket: Arc<ForeignFd>,
    answers: OwnedFd,
    /// Where deferral does not work: the answer for the handler that waits for it.
    answer: Mutex<Option<Vec<u8>>>,
    answered: Condvar,
}

impl DpdkConnection {
    /// Waits for the answer that the control side would otherwise send itself, or for the end of
    /// the connection, which the control side sees to when it takes too long.
    pub(crate) fn wait_for_answer(&self) -> Option<Vec<u8>> {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.answered.wait_while(answer, |answer| answer.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).take().filter(|a| !a.is_empty())
    }

    /// Sends a message and an fd without blocking.
    pub(crate) fn send_with_fd(&self, message: &[u8], fd: &OwnedFd) -> io::Result<()> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        send_with_fd(self.answers.as_fd(), message, fd.as_fd(), flags)
    }

    fn give_answer(&self, answer: Vec<u8>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.answered.notify_all();
    }
}

impl Connection for DpdkConnection {
    fn vid(&self) -> i32 {
        self.vid
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        if !callbacks::shared().deferral() {
            self.give_answer(message[HEADER_BYTES..].to_vec());
            return Ok(());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: bytes of ours to a socket that we own.
        let sent = unsafe { libc::send(self.answers.as_raw_fd(), buffer, len, flags) };
        match usize::try_from(sent) {
            Ok(n) if n == len => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn hung_up(&self) -> bool {
        let (fd, events) = (self.socket.as_raw_fd(), libc::POLLRDHUP);
        let mut poll = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one pollfd of ours, and no wait.
        let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
        n > 0 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
    }

    fn shut_down(&self) {
        // The connection's task sees the end of the stream, and ends rte_vhost's side.
        shut_down(&self.socket);
        self.give_answer(Vec::new());
    }
}

impl Drop for DpdkConnection {
    fn drop(&mut self) {
        // rte_vhost closes its end by itself; `answers` was a duplicate of that.
        shut_down(&self.socket);
    }
}

/// Sends `bytes`, and `fd` with them.
pub(crate) fn send_with_fd(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: BorrowedFd<'_>,
    flags: c_int,
) -> io::Result<()> {
    /// A control message with one fd, aligned as its header.
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
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: the message names memory of ours, which it only reads.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    match usize::try_from(sent) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The connection to `path` that rte_vhost has just accepted on the calling thread.
pub(crate) fn take_accepted(path: &Path, vid: c_int) -> io::Result<DpdkConnection> {
    let accepted = interpose::accepted().filter(|accepted| accepted.path == path);
    let Accepted { socket, answers, .. } = accepted
        .ok_or_else(|| io::Error::other("rte_vhost does not call this program's accept"))?;
    Ok(DpdkConnection { vid, socket, answers, answer: Mutex::default(), answered: Condvar::new() })
}

/// The path that a Unix socket is bound to.
pub(crate) fn bound_path(socket: BorrowedFd<'_>) -> Option<PathBuf> {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&addr) as libc::socklen_t;
    // SAFETY: the buffer is ours and has the given length.
    let result =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut addr).cast(), &raw mut len) };
    if result != 0 || c_int::from(addr.sun_family) != libc::AF_UNIX {
        return None;
    }
    let bytes: Vec<u8> =
        addr.sun_path.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    (!bytes.is_empty()).then(|| std::ffi::OsStr::from_bytes(&bytes).into())
}
