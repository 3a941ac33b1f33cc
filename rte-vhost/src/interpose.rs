//! Replaces libc functions that rte_vhost calls, so that rte_vhost never holds an fd that a front
//! end controls.
//!
//! With the front end's socket, rte_vhost would block in `read` for the rest of a message. It would
//! close fds on its event thread: fds that come with the payload, fds that do not fit its buffer,
//! and connections that it refuses. And it would leak the fds of messages that it refuses before
//! any handler runs. So it never gets a front end's socket:
//!
//! * [`accept`] returns one end of a socket pair, to whose other end `front_ends` writes whole
//!   messages;
//! * [`recvmsg`] reads such a message and takes its fds from the connection's [`Inbox`];
//! * [`listen`] calls the application before front ends can connect, and keeps a duplicate of each
//!   listening socket, as the socket's last close also closes the connections in its backlog;
//! * [`unlink`] keeps a socket file that another process has put at the path of this program's.
//!
//! This also makes the program independent of the place where a DPDK release stores fds in its
//! private structures.
#![expect(unsafe_code, reason = "stands in for functions of libc")]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_char, c_int};
use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use closer::ForeignFd;

use crate::front_ends::{self, Accepted, Inbox};
use crate::socket::{FileId, bound_path};

/// A function that is called with the path of a socket when its file exists, and before a front end
/// can connect. An error removes the file.
pub type OnBound = Arc<dyn Fn(&Path) -> io::Result<()> + Send + Sync>;

thread_local! {
    /// The inboxes of rte_vhost's sockets, by fd, on its event thread. Those of ended connections
    /// stay until their fd number is used again.
    static INBOXES: RefCell<HashMap<c_int, Weak<Inbox>>> = RefCell::default();
    /// The fds of the message that the thread is handling.
    static RECEIVED: RefCell<Vec<ForeignFd>> = const { RefCell::new(Vec::new()) };
    /// The connection that this thread has accepted last, until [`accepted`] takes it.
    static ACCEPTED: RefCell<Option<Accepted>> = const { RefCell::new(None) };
    /// What the next `listen` on this thread calls. It then keeps a duplicate of its socket.
    static ON_BOUND: RefCell<Option<OnBound>> = const { RefCell::new(None) };
    /// The duplicate that `listen` has kept, or why the socket must not be used.
    static LISTENER: RefCell<Option<io::Result<BoundSocket>>> = const { RefCell::new(None) };
    /// Whether `unlink` on this thread keeps the file.
    static KEEPS_FILES: Cell<bool> = const { Cell::new(false) };
}

/// A bound socket that rte_vhost is about to listen on.
pub(crate) struct BoundSocket {
    /// A duplicate of the socket.
    pub(crate) socket: OwnedFd,
    /// Its file. `None` if the file was removed before it was recorded.
    pub(crate) file: Option<FileId>,
}

/// Takes the connection that the calling thread has just accepted.
pub(crate) fn accepted() -> Option<Accepted> {
    ACCEPTED.take()
}

/// Runs `f`. Also returns a duplicate of the socket on which `f` has called `listen`. On an error,
/// among them that of `on_bound`, the socket's file is removed, so that no front end finds it, but
/// the socket is open. A file that another process has put there meanwhile stays.
pub(crate) fn keeping_listener<R>(
    on_bound: &OnBound,
    f: impl FnOnce() -> R,
) -> (R, Option<io::Result<BoundSocket>>) {
    ON_BOUND.set(Some(Arc::clone(on_bound)));
    let result = f();
    ON_BOUND.take();
    (result, LISTENER.take())
}

/// What [`listen`] does before the system call.
fn keep_listener(socket: BorrowedFd<'_>, on_bound: &OnBound) -> io::Result<BoundSocket> {
    let path = bound_path(socket).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let file = FileId::of(&path);
    let kept = on_bound(&path).and_then(|()| socket.try_clone_to_owned());
    if let (Err(_), Some(file)) = (&kept, file) {
        file.remove_from(&path);
    }
    Ok(BoundSocket { socket: kept?, file })
}

/// Drops the fds that no handler has taken.
pub(crate) fn forget_received() {
    RECEIVED.take();
}

/// Takes the fds that came with the message that the calling thread is handling.
pub(crate) fn received() -> Vec<ForeignFd> {
    RECEIVED.take()
}

/// Runs `f`, whose calls of `unlink` then remove no file.
pub(crate) fn keeping_files<R>(f: impl FnOnce() -> R) -> R {
    KEEPS_FILES.set(true);
    let result = f();
    KEEPS_FILES.set(false);
    result
}

/// Overrides libc's `accept` for the whole process. Only rte_vhost calls it by this name.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn accept(
    socket: c_int,
    _address: *mut libc::sockaddr,
    _len: *mut libc::socklen_t,
) -> c_int {
    // SAFETY: the caller keeps its listening socket open during the call.
    let listener = unsafe { BorrowedFd::borrow_raw(socket) };
    let Some((accepted, inbox, theirs)) = front_ends::accept(listener) else { return -1 };
    ACCEPTED.set(Some(accepted));
    let fd = theirs.into_raw_fd();
    INBOXES.with_borrow_mut(|inboxes| inboxes.insert(fd, Arc::downgrade(&inbox)));
    fd
}

/// Overrides libc's `recvmsg` for the whole process.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn recvmsg(
    socket: c_int,
    message: *mut libc::msghdr,
    flags: c_int,
) -> libc::ssize_t {
    // SAFETY: passes on the caller's arguments unchanged; the caller guarantees that they are
    // valid.
    let got = unsafe { libc::syscall(libc::SYS_recvmsg, socket, message, flags) };
    let inbox = INBOXES.with_borrow(|inboxes| inboxes.get(&socket).and_then(Weak::upgrade));
    if let Some(inbox) = inbox {
        RECEIVED.set(inbox.take());
        inbox.taken.notify_one();
        // SAFETY: the kernel has just filled it in. The message carries no fds: they go through the
        // inbox.
        unsafe { (*message).msg_controllen = 0 };
    }
    libc::ssize_t::try_from(got).unwrap_or(-1)
}

/// Overrides libc's `listen` for the whole process.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn listen(socket: c_int, backlog: c_int) -> c_int {
    if let Some(on_bound) = ON_BOUND.take() {
        // SAFETY: the caller keeps its socket open during the call.
        let listener = unsafe { BorrowedFd::borrow_raw(socket) };
        LISTENER.set(Some(keep_listener(listener, &on_bound)));
    }
    // SAFETY: passes on the caller's arguments unchanged; the caller guarantees that they are
    // valid.
    let result = unsafe { libc::syscall(libc::SYS_listen, socket, backlog) };
    c_int::try_from(result).unwrap_or(-1)
}

/// Overrides libc's `unlink` for the whole process.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    if KEEPS_FILES.get() {
        return 0;
    }
    // SAFETY: passes on the caller's argument unchanged; the caller guarantees that it is valid.
    let result = unsafe { libc::syscall(libc::SYS_unlink, path) };
    c_int::try_from(result).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Binds a socket, whose file `on_bound` refuses. Returns what is at its path then.
    fn refused(on_bound: impl Fn(&Path) + Send + Sync + 'static) -> Option<FileId> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let on_bound: OnBound = Arc::new(move |path| {
            on_bound(path);
            Err(io::Error::other("no"))
        });
        let (socket, kept) = keeping_listener(&on_bound, || UnixListener::bind(&path).unwrap());
        assert!(kept.expect("the socket listens").is_err());
        drop(socket);
        FileId::of(&path)
    }

    #[test]
    fn a_refused_socket_is_removed_and_that_of_another_process_stays() {
        assert_eq!(refused(|_| {}), None);
        assert_eq!(refused(|path| fs::remove_file(path).unwrap()), None);
        let others = Arc::new(std::sync::Mutex::new(None));
        let noted = Arc::clone(&others);
        let found = refused(move |path| {
            fs::remove_file(path).unwrap();
            let other = UnixListener::bind(path).unwrap();
            *noted.lock().unwrap() = Some((FileId::of(path), other));
        });
        assert!(found.is_some());
        assert_eq!(others.lock().unwrap().as_ref().map(|(file, _)| *file), Some(found));
    }
}
