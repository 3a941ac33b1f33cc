//! A socket whose owner accepts nobody, with a backlog that is full, as that of a process that is
//! stopped. Whoever connects to it and waits does so for ever.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use crate::error::{Error, Result};

/// The socket, and those who wait to be accepted. Its file stays when this is dropped.
#[derive(Debug)]
pub struct Deaf {
    _listener: OwnedFd,
    _waiting: Vec<OwnedFd>,
}

impl Deaf {
    /// Binds to `path`, and fills the backlog.
    ///
    /// # Errors
    /// There is such a file, or no such directory.
    pub fn bind(path: &Path) -> Result<Self> {
        Self::make(path).map_err(Error::system("cannot make a socket with a full backlog"))
    }

    fn make(path: &Path) -> rustix::io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let listener = socket(SocketFlags::CLOEXEC)?;
        bind(&listener, &address)?;
        listen(&listener, 0)?;
        let mut waiting = Vec::new();
        loop {
            let client = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
            match connect(&client, &address) {
                Ok(()) => waiting.push(client),
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(Self { _listener: listener, _waiting: waiting })
    }
}

fn socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_connect_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deaf");
        let _deaf = Deaf::bind(&path).unwrap();
        let client = socket(SocketFlags::NONBLOCK).unwrap();
        let refused = connect(&client, &SocketAddrUnix::new(&path).unwrap());
        assert_eq!(refused, Err(Errno::AGAIN));
    }
}
