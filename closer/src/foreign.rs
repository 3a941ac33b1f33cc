//! Fds from untrusted processes: checks of the fd's type that do not depend on the sender, and
//! closing on another thread.
//!
//! The sender may send any fd: a file of a FUSE file system that it serves, a TCP socket with
//! `SO_LINGER`, the last reference to a huge memory file. `fstat` and `close` can then block for as
//! long as the sender likes. So the checks use only system calls that do not involve the file's
//! server or peer.
#![expect(unsafe_code, reason = "getsockopt and fcntl on any fd")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use crate::account::Account;

/// An fd from an untrusted process, or a socket that may have fds in unread messages. When it is
/// dropped, its account closes it on another thread.
#[derive(Debug)]
pub struct ForeignFd {
    /// Taken when `self` is dropped.
    fd: Option<OwnedFd>,
    account: Account,
}

/// Why an fd was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the call or kick fd is not an eventfd
    #[error("the call or kick fd is not an eventfd")]
    NotEventFd,
    /// the backend channel is not a Unix stream socket
    #[error("the backend channel is not a Unix stream socket")]
    NotSocket,
    /// the memory fd is not a memfd or a file on tmpfs or hugetlbfs
    #[error("the memory fd is not a memfd or a file on tmpfs or hugetlbfs")]
    NotMemory,
    /// the type of the fd cannot be read
    #[error("cannot read the type of an fd: {0}")]
    System(#[from] io::Error),
}

impl ForeignFd {
    /// Takes `fd`, which `account` closes.
    #[must_use]
    pub fn new(fd: OwnedFd, account: &Account) -> Self {
        account.opened();
        Self { fd: Some(fd), account: account.clone() }
    }

    /// Takes `fd`, with a new account for it alone. For tests and fuzz targets.
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

    /// Checks that the fd is an eventfd. It must stay a `ForeignFd`: closing the last reference to
    /// an eventfd takes long if the sender's epoll instances watch it.
    ///
    /// # Errors
    /// [`Error::NotEventFd`], or an error of reading the type.
    pub fn check_eventfd(&self) -> Result<(), Error> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", self.as_fd().as_raw_fd()))?;
        if link.as_os_str() == "anon_inode:[eventfd]" { Ok(()) } else { Err(Error::NotEventFd) }
    }

    /// Checks that the fd is a Unix stream socket.
    ///
    /// # Errors
    /// [`Error::NotSocket`].
    pub fn check_unix_socket(&self) -> Result<(), Error> {
        let option = |name| {
            const INT_BYTES: libc::socklen_t = 4;
            const _: () = assert!(size_of::<libc::c_int>() == INT_BYTES as usize);
            let (mut value, mut len): (libc::c_int, _) = (0, INT_BYTES);
            let (fd, to) = (self.as_fd().as_raw_fd(), (&raw mut value).cast());
            // SAFETY: the kernel writes at most `len` bytes to `value`, and `len` is its size.
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

    /// Checks that the fd is a memory file: only memory files have seals.
    ///
    /// # Errors
    /// [`Error::NotMemory`].
    pub fn check_memory(&self) -> Result<(), Error> {
        // SAFETY: this command of `fcntl` takes no argument and has no precondition.
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
    fn types_are_distinguished() {
        let account = Account::new("test");
        let foreign = |fd: OwnedFd| ForeignFd::new(fd, &account);
        let memory = || {
            // SAFETY: the name is static.
            let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
            // SAFETY: `memfd_create` has just created the fd, and nothing else owns it.
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
