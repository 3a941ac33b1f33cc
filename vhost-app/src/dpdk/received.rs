//! Takes the fds that front ends send before rte_vhost sees them, and remembers the one on which a
//! front end has just connected, which rte_vhost does not tell.
//!
//! rte_vhost leaks the fds of messages that it refuses before any handler of ours is called (a ring
//! number out of range, more fds than it expects, a payload that does not follow), so a hostile
//! front end could use up the process's fds. Therefore the program has its own `recvmsg`, which
//! rte_vhost calls instead of libc's: on the event thread it keeps the fds that arrive and tells
//! rte_vhost that there were none. The handler takes those of its message; what nobody has taken
//! is closed with the next message, or with the connection. This also makes the program independent
//! of where a DPDK release keeps the fds in its private structures.
#![expect(unsafe_code, reason = "stands in for a function of libc")]

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};

use closer::ForeignFd;

thread_local! {
    /// The fds of the message that is being handled; `None` on threads that are not rte_vhost's.
    static RECEIVED: RefCell<Option<Vec<ForeignFd>>> = const { RefCell::new(None) };
    /// What this thread has accepted last, -1 if nothing.
    static ACCEPTED: Cell<c_int> = const { Cell::new(-1) };
}

/// The fd of the connection that the calling thread has just accepted, if it has.
pub(super) fn accepted() -> Option<c_int> {
    let fd = ACCEPTED.replace(-1);
    (fd >= 0).then_some(fd)
}

/// `accept`, for everybody in the process who calls it by this name: rte_vhost.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn accept(
    socket: c_int,
    address: *mut libc::sockaddr,
    len: *mut libc::socklen_t,
) -> c_int {
    // SAFETY: the arguments are as the caller has given them, who answers for them.
    let fd = unsafe { libc::accept4(socket, address, len, libc::SOCK_CLOEXEC) };
    ACCEPTED.set(fd);
    fd
}

/// Makes the calling thread one whose received fds are kept, and closes those of earlier messages.
pub(super) fn begin() {
    RECEIVED.set(Some(Vec::new()));
}

/// The fds that came with the message that the calling thread is handling.
pub(super) fn take() -> Vec<ForeignFd> {
    RECEIVED.with_borrow_mut(|fds| fds.as_mut().map(std::mem::take)).unwrap_or_default()
}

/// `recvmsg`, for everybody in the process who calls it by this name.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn recvmsg(
    socket: c_int,
    message: *mut libc::msghdr,
    flags: c_int,
) -> libc::ssize_t {
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the arguments are as the caller has given them, who answers for them.
    let got = unsafe { libc::syscall(libc::SYS_recvmsg, socket, message, flags) };
    RECEIVED.with_borrow_mut(|kept| {
        let Some(kept) = kept else { return };
        // What an earlier message has left behind.
        kept.clear();
        if got >= 0 {
            // SAFETY: the system has just filled it in.
            unsafe { keep_fds(message, kept) };
        }
    });
    got as libc::ssize_t
}

/// Moves the fds of `message` into `kept` and leaves it without any.
///
/// # Safety
/// `message` was filled in by the system, and nobody has looked at it since.
unsafe fn keep_fds(message: *mut libc::msghdr, kept: &mut Vec<ForeignFd>) {
    // SAFETY: valid, as the caller says.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers inside the control buffer.
        let control = unsafe { &*header };
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: the data follows its header.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<c_int>();
            // SAFETY: a computation on a number.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (control.cmsg_len as usize).saturating_sub(head) / size_of::<c_int>();
            for n in 0..count {
                // SAFETY: the system says that there are `count` of them.
                let fd = unsafe { data.wrapping_add(n).read_unaligned() };
                // SAFETY: the system has just made it for this process, and nobody else knows it.
                kept.push(ForeignFd::alone(unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    // SAFETY: valid, as the caller says.
    unsafe { (*message).msg_controllen = 0 };
}
