//! A socket whose owner never accepts and whose backlog is full, like that of a stopped process. A
//! client that connects to it and waits blocks for ever.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use crate::error::{Error, Result};

/// The socket, and the clients in its backlog. Its file stays when this is dropped.
#[derive(Debug)]
pub struct UnresponsiveSocket {
    _listener: OwnedFd,
    _waiting: Vec<OwnedFd>,
}

impl UnresponsiveSocket {
    /// Binds to `path`, and fills the backlog.
    ///
    /// # Errors
    /// The file exists, or the directory does not.
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
    fn a_non_blocking_connect_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("unresponsive");
        let _unresponsive = UnresponsiveSocket::bind(&path).unwrap();
        let client = socket(SocketFlags::NONBLOCK).unwrap();
        let refused = connect(&client, &SocketAddrUnix::new(&path).unwrap());
        assert_eq!(refused, Err(Errno::AGAIN));
    }
}
