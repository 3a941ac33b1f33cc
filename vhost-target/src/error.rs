//! Errors of operations on controllers.

use std::io;
use std::path::PathBuf;

use reactor::Core;

/// The reason why an operation on a controller failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// no controller has this name
    #[error("controller {0} does not exist")]
    NoController(String),
    /// another controller has this name
    #[error("controller {0} exists already")]
    Exists(String),
    /// the name is not usable as the name of a socket
    #[error("invalid controller name {0:?}: it must be a relative path without `.` and `..`")]
    Name(String),
    /// the path does not fit into a socket address
    #[error("socket path {0} is {1} bytes long; the limit is 107")]
    SocketPath(PathBuf, usize),
    /// no core, or a core without a reactor
    #[error("invalid cpumask: it names no core, or a core without a reactor")]
    Cpumask,
    /// a coalescing parameter is out of range
    #[error("coalescing parameter out of range")]
    Coalescing,
    /// no session with this id, or several sessions where the request names none
    #[error("controller {0} has no such session, or has several: pass the id of one session")]
    NoSession(String),
    /// no reactor serves a ring with this number
    #[error("ring {0} is not started")]
    NoQueue(usize),
    /// another move is under way
    #[error("ring {0} is being moved to another reactor; try again later")]
    Moving(usize),
    /// a reactor does not finish a poll iteration
    #[error("timed out waiting for the reactor on core {n} to finish a poll iteration", n = .0.0)]
    Stuck(Core),
    /// the system has no room for another wake source
    #[error("cannot register a completion eventfd with the reactor on core {n}: {1}", n = .0.0)]
    WakeSource(Core, io::Error),
    /// a front end is connected
    #[error("controller {0} has a connected front end")]
    Busy(String),
    /// the socket cannot be created
    #[error("cannot listen on {0}: {1}")]
    Listen(PathBuf, io::Error),
}

impl Error {
    /// SPDK's errno for this error, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoController(_) => libc::ENODEV,
            Self::Exists(_) => libc::EEXIST,
            Self::Cpumask | Self::Coalescing => libc::EINVAL,
            Self::Busy(_) | Self::Moving(_) => libc::EBUSY,
            Self::NoSession(_) | Self::NoQueue(_) => libc::ENOENT,
            Self::Stuck(_) => libc::ETIMEDOUT,
            Self::WakeSource(_, e) => e.raw_os_error().unwrap_or(libc::EIO),
            Self::Name(_) | Self::SocketPath(..) | Self::Listen(..) => libc::EIO,
        }
    }
}
