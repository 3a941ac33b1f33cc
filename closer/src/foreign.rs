//! An fd that an untrusted process has sent: its type is checked without relying on that process,
//! and it is closed on another thread.
//!
//! The sender may send anything: a file of a FUSE file system that it serves itself, a TCP socket
//! with `SO_LINGER`, the last reference to a huge memory file. `fstat`, and even `close`, can then
//! block for as long as the sender likes. So the type is checked only with system calls that the
//! kernel answers by itself.
#![expect(unsafe_code, reason = "system calls that tell what an fd is")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::account::Account;

/// An fd that came from an untrusted process, or a socket that may have fds in unread messages.
/// When it is dropped, its account closes it on another thread.
#[derive(Debug)]
pub struct ForeignFd {
    /// Taken when `self` is dropped.
    fd: Option<OwnedFd>,
    account: Account,
}

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
    /// Takes `fd`; it is closed by `account`.
    #[must_use]
    pub fn new(fd: OwnedFd, account: &Account) -> Self {
        account.opened();
        Self { fd: Some(fd), account: account.clone() }
    }

    /// Takes `fd`, with an account of its own.
    #[must_use]
    pub fn alone(fd: OwnedFd) -> Self {
        Self::new(fd, &Account::new("an fd"))
    }

    /// A duplicate of the fd, charged to the same account.
    ///
    /// # Errors
    /// The process has too many fds.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.as_fd().try_clone_to_owned()?, &self.account))
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
        self.fd.as_ref().expect("taken only where self ends").as_fd()
    }
}

impl AsRawFd for ForeignFd {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for ForeignFd {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.account.close_later(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn kinds_are_told_apart() {
        let account = Account::new("test");
        let foreign = |fd: OwnedFd| ForeignFd::new(fd, &account);
        let memory = || {
            // SAFETY: a name of ours, and flags.
            let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
            // SAFETY: just made.
            foreign(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let (pipe, _) = io::pipe().unwrap();
        let pipe = foreign(pipe.into());
        let (unix, _other) = UnixStream::pair().unwrap();
        let unix = foreign(unix.into());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = foreign(tcp.into());
        let disk = foreign(std::fs::File::open("/proc/self/exe").unwrap().into());
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

    #[test]
    fn fds_count_until_they_are_closed() {
        let account = Account::new("counted");
        let (pipe, mut other) = io::pipe().unwrap();
        let first = ForeignFd::new(pipe.into(), &account);
        let second = first.try_clone().unwrap();
        assert_eq!(account.open(), 2);
        drop((first, second));
        // The other end learns of the close.
        while std::io::Write::write(&mut other, b"x").is_ok() {
            std::thread::yield_now();
        }
        while account.open() > 0 {
            std::thread::yield_now();
        }
    }
}
