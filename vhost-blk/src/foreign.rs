//! Fds that front ends hand over: what they are is found out without asking whoever is behind them,
//! and they are closed where nobody waits.
//!
//! A front end may pass anything: a file of a FUSE file system that it serves itself, a TCP socket
//! that lingers, a memory file of which ours is the last reference. `fstat`, and even `close`, can
//! then take as long as it likes. So the kind is told by questions that only the kernel answers,
//! and what is dropped is closed by a thread of its own.
#![expect(unsafe_code, reason = "system calls that tell what an fd is")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

/// An fd of a front end. Dropping it closes it, on another thread.
#[derive(Debug)]
pub struct ForeignFd(Option<OwnedFd>);

/// Why an fd was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// something else than an eventfd
    #[error("the call or kick fd is not an eventfd")]
    NotEventFd,
    /// something else than a Unix socket
    #[error("the backend channel is not a Unix socket")]
    NotSocket,
    /// something else than memory
    #[error("the memory fd is not a memfd or a file on tmpfs or hugetlbfs")]
    NotMemory,
    /// the system refused
    #[error("fd: {0}")]
    System(#[from] io::Error),
}

impl ForeignFd {
    /// Takes an fd that a front end has sent.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }

    /// Checks that it is an eventfd. It stays foreign: to close even an eventfd can take as long as a
    /// front end likes, if it is the last to be closed and an epoll instance of theirs watches it.
    ///
    /// # Errors
    /// It is something else.
    pub fn check_eventfd(&self) -> Result<(), Error> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", self.as_fd().as_raw_fd()))?;
        if link.as_os_str() == "anon_inode:[eventfd]" { Ok(()) } else { Err(Error::NotEventFd) }
    }

    /// Checks that it is a Unix stream socket.
    ///
    /// # Errors
    /// It is something else.
    pub fn check_unix_socket(&self) -> Result<(), Error> {
        let option = |name| {
            let mut value: libc::c_int = 0;
            let mut len = size_of_val(&value) as libc::socklen_t;
            let (fd, to) = (self.as_fd().as_raw_fd(), (&raw mut value).cast());
            // SAFETY: the value is ours and as long as it says. The fd may be anything.
            let got = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, to, &raw mut len) };
            (got == 0).then_some(value)
        };
        let unix = option(libc::SO_DOMAIN) == Some(libc::AF_UNIX);
        if unix && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM) {
            Ok(())
        } else {
            Err(Error::NotSocket)
        }
    }

    /// Checks that it is a file of memory: seals are something that only such files have.
    ///
    /// # Errors
    /// It is something else.
    pub fn check_memory(&self) -> Result<(), Error> {
        // SAFETY: a query. The fd may be anything.
        let seals = unsafe { libc::fcntl(self.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 { Err(Error::NotMemory) } else { Ok(()) }
    }
}

impl AsFd for ForeignFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().expect("taken only where self ends").as_fd()
    }
}

impl Drop for ForeignFd {
    fn drop(&mut self) {
        let Some(fd) = self.0.take() else { return };
        if let Some(closer) = closer() {
            // The thread outlives every sender.
            let _ = closer.send(fd);
        }
    }
}

/// The way to the thread that closes; `None` if the system has no thread to give.
fn closer() -> Option<&'static Sender<OwnedFd>> {
    static CLOSER: OnceLock<Option<Sender<OwnedFd>>> = OnceLock::new();
    let start = || {
        let (sender, receiver) = channel::<OwnedFd>();
        let close = move || receiver.into_iter().for_each(drop);
        thread::Builder::new().name("vhost-close".into()).spawn(close).ok()?;
        Some(sender)
    };
    CLOSER.get_or_init(start).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn kinds_are_told_apart() {
        let memory = || ForeignFd::new(crate::memory::tests::memfd(4096));
        let (pipe, _) = io::pipe().unwrap();
        let pipe = ForeignFd::new(pipe.into());
        let (unix, _other) = UnixStream::pair().unwrap();
        let unix = ForeignFd::new(unix.into());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = ForeignFd::new(tcp.into());
        let disk = ForeignFd::new(std::fs::File::open("/proc/self/exe").unwrap().into());
        assert!(memory().check_memory().is_ok());
        for other in [&pipe, &unix, &tcp, &disk] {
            assert!(matches!(other.check_memory(), Err(Error::NotMemory)));
        }
        assert!(unix.check_unix_socket().is_ok());
        for other in [&pipe, &tcp, &disk, &memory()] {
            assert!(matches!(other.check_unix_socket(), Err(Error::NotSocket)));
        }
        for other in [pipe, unix, tcp, disk, memory()] {
            assert!(matches!(other.check_eventfd(), Err(Error::NotEventFd)));
        }
    }
}
