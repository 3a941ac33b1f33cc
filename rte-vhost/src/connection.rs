//! A front end's connection, as the control side uses it.
#![expect(unsafe_code, reason = "system calls on sockets")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use closer::ForeignFd;
use vhost_target::Connection;
use vhost_target::protocol::HEADER_BYTES;

use crate::front_ends::Accepted;
use crate::interpose;
use crate::shared::shared;
use crate::socket::{send_with_fd, shut_down};

/// A connection: the front end's socket, and the socket through which replies go to the front end.
#[derive(Debug)]
pub(crate) struct DpdkConnection {
    vid: c_int,
    socket: Arc<ForeignFd>,
    answers: OwnedFd,
    /// Used where replies cannot be deferred: passes the reply to the handler that waits for it.
    answer: Mutex<Option<Vec<u8>>>,
    answered: Condvar,
}

impl DpdkConnection {
    /// Waits for the reply that the control side would send itself if replies could be deferred, or
    /// for the end of the connection. The control side ends a connection that waits longer than the
    /// drain limit.
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
        if !shared().deferral() {
            self.give_answer(message[HEADER_BYTES..].to_vec());
            return Ok(());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: `send` only reads the given bytes, and the socket is owned and open.
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
        // SAFETY: the array holds one pollfd, and the timeout is 0.
        let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
        n > 0 && poll.revents & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
    }

    fn shut_down(&self) {
        // The connection's task then reads the end of the stream and ends rte_vhost's side.
        shut_down(&self.socket);
        self.give_answer(Vec::new());
    }
}

impl Drop for DpdkConnection {
    fn drop(&mut self) {
        // rte_vhost closes its own end; `answers` was a duplicate of that end.
        shut_down(&self.socket);
    }
}

/// Returns the connection to `path` that rte_vhost has just accepted on the calling thread.
pub(crate) fn take_accepted(path: &Path, vid: c_int) -> io::Result<DpdkConnection> {
    let accepted = interpose::accepted().filter(|accepted| accepted.path == path);
    let Accepted { socket, answers, .. } = accepted
        .ok_or_else(|| io::Error::other("rte_vhost does not call this program's accept"))?;
    Ok(DpdkConnection { vid, socket, answers, answer: Mutex::default(), answered: Condvar::new() })
}
