//! The waker: ends a reactor's sleep on a guest's kick, a completion of a disk, or a change by the
//! control side.
#![expect(unsafe_code, reason = "epoll")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Events that one wait takes. If there are more, the next wait returns at once.
const EVENTS: i32 = 64;

/// A waker: an epoll instance.
///
/// It is edge-triggered: each write to a registered eventfd wakes the reactor once, and no thread
/// reads the eventfd. Reading could block, because a front end can make its eventfd blocking at any
/// time.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// Creates a waker without wake sources.
    ///
    /// # Errors
    /// The process has no fd left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the fd is new, and this is its only owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Registers `fd`, which then wakes the reactor whenever it becomes readable. If it is readable
    /// already, it wakes the reactor once. The registration ends when all duplicates of the fd are
    /// closed.
    ///
    /// # Errors
    /// The system allows no more registrations.
    pub fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: 0 };
        let (epoll, fd) = (self.0.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: both fds are open, and the event is a local variable.
        let rc = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Ends the registration of `fd`.
    pub fn forget(&self, fd: BorrowedFd<'_>) {
        let (epoll, fd) = (self.0.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: both fds are open. Failure is not expected, and could not be handled.
        unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Waits until a wake source signals, at most until `until`. Returns at once if one has
    /// signalled since the last wait. Returns whether one has signalled. May return false before
    /// `until`.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS as usize];
        let (epoll, at, most) = (self.0.as_raw_fd(), events.as_mut_ptr(), EVENTS);
        let limit = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
            }
        });
        let limit_ptr = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let no_mask = std::ptr::null::<libc::sigset_t>();
        // SAFETY: there is room for the events, and the limit outlives the call.
        let mut rc = unsafe {
            libc::syscall(libc::SYS_epoll_pwait2, epoll, at, most, limit_ptr, no_mask, 0_usize)
        };
        let errno = || io::Error::last_os_error().raw_os_error();
        if rc < 0 && matches!(errno(), Some(libc::ENOSYS | libc::EPERM)) {
            // Kernels before 5.11 lack `epoll_pwait2`, and some sandboxes forbid it. `epoll_wait`
            // counts in milliseconds.
            let ms = |limit: libc::timespec| limit.tv_sec * 1000 + limit.tv_nsec / 1_000_000 + 1;
            let limit_ms = limit.map_or(-1, |limit| i32::try_from(ms(limit)).unwrap_or(i32::MAX));
            // SAFETY: as above.
            rc = unsafe { libc::epoll_wait(epoll, at, most, limit_ms) }.into();
        }
        rc > 0
    }
}

/// An fd that is registered with a reactor's waker until this value is dropped. The front end may
/// have a duplicate of the fd, so that closing the fd here would not end the registration.
#[derive(Debug)]
pub struct WakeSource<F: AsFd> {
    waker: Arc<Waker>,
    fd: Arc<F>,
}

impl<F: AsFd> WakeSource<F> {
    /// Registers `fd` with `waker`.
    ///
    /// # Errors
    /// The system allows no more registrations.
    pub fn new(waker: &Arc<Waker>, fd: &Arc<F>) -> io::Result<Self> {
        waker.watch(fd.as_fd())?;
        Ok(Self { waker: Arc::clone(waker), fd: Arc::clone(fd) })
    }

    /// Returns whether this value registers `fd` with `waker`.
    pub fn is_between(&self, fd: &Arc<F>, waker: &Arc<Waker>) -> bool {
        Arc::ptr_eq(&self.fd, fd) && Arc::ptr_eq(&self.waker, waker)
    }
}

impl<F: AsFd> Drop for WakeSource<F> {
    fn drop(&mut self) {
        self.waker.forget(self.fd.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_fd::EventFd;

    fn woken(waker: &Waker) -> bool {
        waker.wait(Some(Instant::now()))
    }

    #[test]
    fn each_signal_wakes_once_and_is_not_read() {
        let waker = Arc::new(Waker::new().unwrap());
        let (one, other) = (Arc::new(EventFd::new().unwrap()), Arc::new(EventFd::new().unwrap()));
        one.signal();
        let source = WakeSource::new(&waker, &one).unwrap();
        let _other = WakeSource::new(&waker, &other).unwrap();
        assert!(woken(&waker), "signalled before the registration");
        assert!(!woken(&waker));
        for _ in 0..3 {
            one.signal();
            assert!(woken(&waker));
        }
        other.signal();
        assert!(woken(&waker));
        assert_eq!(one.take(), 4);
        one.signal();
        drop(source);
        assert!(!woken(&waker), "no longer registered");
    }
}
