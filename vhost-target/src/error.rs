//! Why an operation on a controller failed.

use std::io;
use std::path::PathBuf;

use reactor::Core;

/// Why an operation on a controller failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// there is none with this name
    #[error("no controller {0}")]
    NoController(String),
    /// the name is taken
    #[error("controller {0} exists")]
    Exists(String),
    /// the name cannot be a socket's
    #[error("{0:?} cannot be the name of a controller")]
    Name(String),
    /// the path does not fit into a socket address
    #[error("socket path {0} has {1} bytes, a socket address holds 107")]
    SocketPath(PathBuf, usize),
    /// no core, or one without a reactor
    #[error("the cpumask names no core, or one without a reactor")]
    Cpumask,
    /// a coalescing parameter is out of range
    #[error("coalescing parameter out of range")]
    Coalescing,
    /// no session of this number, or several where one would do without a number
    #[error("controller {0} has no such session, or more than one")]
    NoSession(String),
    /// no ring of this number is served
    #[error("ring {0} is not served")]
    NoQueue(usize),
    /// another move is under way
    #[error("ring {0} is being moved already")]
    Moving(usize),
    /// a reactor is stuck in a turn
    #[error("the reactor on core {0:?} does not end its turn")]
    Stuck(Core),
    /// the system has no room for another watch
    #[error("cannot watch a disk for completions on core {0:?}: {1}")]
    Watch(Core, io::Error),
    /// a virtual machine is connected
    #[error("controller {0} has a connected front end")]
    Busy(String),
    /// the socket cannot be made
    #[error("cannot listen on {0}: {1}")]
    Listen(PathBuf, io::Error),
}

impl Error {
    /// SPDK's errno for it, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoController(_) => libc::ENODEV,
            Self::Exists(_) => libc::EEXIST,
            Self::Cpumask | Self::Coalescing => libc::EINVAL,
            Self::Busy(_) | Self::Moving(_) => libc::EBUSY,
            Self::NoSession(_) | Self::NoQueue(_) => libc::ENOENT,
            Self::Stuck(_) => libc::ETIMEDOUT,
            Self::Watch(_, e) => e.raw_os_error().unwrap_or(libc::EIO),
            Self::Name(_) | Self::SocketPath(..) | Self::Listen(..) => libc::EIO,
        }
    }
}
