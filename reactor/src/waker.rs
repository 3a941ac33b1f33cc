//! What wakes a sleeping reactor: guests' kicks, disks' completions, the control side.
#![expect(unsafe_code, reason = "epoll")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Events taken in one wait. Those of more fds make the next wait a short one.
const EVENTS: usize = 64;

/// An epoll instance.
///
/// Fds are watched for edges: each write to an eventfd wakes the reactor once, and nobody reads it. A
/// front end's eventfd may be a blocking one, whatever it was when it came, so that reading it could
/// wait.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// One that nothing rings.
    ///
    /// # Errors
    /// Out of fds.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the fd was just made and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Has `fd` ring the waker whenever something arrives there, from now on and for what has arrived
    /// already, until nobody has it open any more.
    ///
    /// # Errors
    /// The system refuses: too many watches.
    pub fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: 0 };
        let (epoll, fd) = (self.0.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: two open fds and an event of ours.
        let rc = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Ends the watch on `fd`.
    pub fn forget(&self, fd: BorrowedFd<'_>) {
        let (epoll, fd) = (self.0.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: two open fds. Nothing can be done about a failure, nor is there one.
        unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Waits for the waker, at most until `until`, not at all if it has been rung since the last wait.
    /// Says whether it was; may return without, before the time.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let (epoll, at, most) = (self.0.as_raw_fd(), events.as_mut_ptr(), EVENTS as i32);
        let limit = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
            }
        });
        let limit_at = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let no_mask = std::ptr::null::<libc::sigset_t>();
        // SAFETY: room for the events, and a limit that outlives the call.
        let mut rc = unsafe {
            libc::syscall(libc::SYS_epoll_pwait2, epoll, at, most, limit_at, no_mask, 0_usize)
        };
        let errno = || io::Error::last_os_error().raw_os_error();
        if rc < 0 && matches!(errno(), Some(libc::ENOSYS | libc::EPERM)) {
            // Kernels before 5.11 count in milliseconds, and some sandboxes know no newer one.
            let ms = |limit: libc::timespec| limit.tv_sec * 1000 + limit.tv_nsec / 1_000_000 + 1;
            let limit_ms = limit.map_or(-1, |limit| i32::try_from(ms(limit)).unwrap_or(i32::MAX));
            // SAFETY: as above.
            rc = unsafe { libc::epoll_wait(epoll, at, most, limit_ms) }.into();
        }
        rc > 0
    }
}

/// An fd that rings a reactor's waker for as long as this lives. The fd itself may be open elsewhere,
/// in the hands of a front end, so that closing ours would not end the watch.
#[derive(Debug)]
pub struct WakeSource<F: AsFd> {
    waker: Arc<Waker>,
    fd: Arc<F>,
}

impl<F: AsFd> WakeSource<F> {
    /// Has `fd` ring `waker`.
    ///
    /// # Errors
    /// The system refuses: too many watches.
    pub fn new(waker: &Arc<Waker>, fd: &Arc<F>) -> io::Result<Self> {
        waker.watch(fd.as_fd())?;
        Ok(Self { waker: Arc::clone(waker), fd: Arc::clone(fd) })
    }

    /// Whether it is `fd` that rings `waker`.
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

    fn rung(waker: &Waker) -> bool {
        waker.wait(Some(Instant::now()))
    }

    #[test]
    fn each_ring_wakes_once_and_none_is_read() {
        let waker = Arc::new(Waker::new().unwrap());
        let (one, other) = (Arc::new(EventFd::new().unwrap()), Arc::new(EventFd::new().unwrap()));
        one.signal();
        let rope = WakeSource::new(&waker, &one).unwrap();
        let _other = WakeSource::new(&waker, &other).unwrap();
        assert!(rung(&waker), "it had been signalled before it was watched");
        assert!(!rung(&waker));
        for _ in 0..3 {
            one.signal();
            assert!(rung(&waker));
        }
        other.signal();
        assert!(rung(&waker));
        assert_eq!(one.take(), 4);
        one.signal();
        drop(rope);
        assert!(!rung(&waker), "no longer watched");
    }
}
