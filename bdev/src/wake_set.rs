//! Many wake fds behind one.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// One fd for the wake fds of several channels: an epoll instance. For a channel with several bases
/// or with bases that come and go, whose [`wake_fds`](crate::Channel::wake_fds) may not change.
///
/// The fds in it are never read. They are watched edge-triggered, and so must [`WakeSet::fd`] be by
/// a caller that does not call [`WakeSet::clear`].
#[derive(Debug)]
pub struct WakeSet(OwnedFd);

impl WakeSet {
    /// Makes an empty set.
    ///
    /// # Errors
    /// The system has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Adds fds. Each file may be in it once: a caller duplicates an fd that it adds twice.
    ///
    /// # Errors
    /// As `epoll_ctl(2)`.
    pub fn add<'a>(&self, fds: impl IntoIterator<Item = BorrowedFd<'a>>) -> io::Result<()> {
        for fd in fds {
            epoll::add(&self.0, fd, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        }
        Ok(())
    }

    /// Removes fds, before they are closed: a file that is open elsewhere would stay in the set.
    pub fn remove<'a>(&self, fds: impl IntoIterator<Item = BorrowedFd<'a>>) {
        for fd in fds {
            // Fails only if it was not added.
            let _ = epoll::delete(&self.0, fd);
        }
    }

    /// The fd that becomes readable with any of them.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Forgets past events: the fd is readable again after the next event. Does not wait.
    pub fn clear(&self) {
        let mut events = [const { MaybeUninit::uninit() }; 4];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.0, &mut events, Some(&now));
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn signal(fd: &OwnedFd) {
        rustix::io::write(fd, &1_u64.to_ne_bytes()).unwrap();
    }

    fn is_readable(set: &WakeSet) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let fd = set.fd();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    #[test]
    fn each_event_of_a_member_makes_it_readable_again() {
        let (set, [one, other]) = (WakeSet::new().unwrap(), [event(), event()]);
        set.add([one.as_fd(), other.as_fd()]).unwrap();
        assert!(!is_readable(&set));
        for fd in [&one, &other, &one] {
            signal(fd);
            assert!(is_readable(&set));
            set.clear();
            assert!(!is_readable(&set), "although the member can still be read");
        }
        set.remove([one.as_fd()]);
        signal(&one);
        assert!(!is_readable(&set));
        signal(&other);
        assert!(is_readable(&set));
    }

    /// As a reactor does, which never clears it.
    #[test]
    fn an_edge_triggered_owner_sees_each_event() {
        let (set, member) = (WakeSet::new().unwrap(), event());
        set.add([member.as_fd()]).unwrap();
        let owner = WakeSet::new().unwrap();
        owner.add([set.fd()]).unwrap();
        for _ in 0..3 {
            assert!(!is_readable(&owner));
            signal(&member);
            assert!(is_readable(&owner));
            owner.clear();
        }
    }
}
