//! The errors between a front end and its back end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long this crate waits for the back end before it fails: far longer than a working back end
/// needs, short enough for a test to end.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The result of most functions of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The reason of a failure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a system call failed
    #[error("{doing}: {source}")]
    System {
        /// The action.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// no back end accepts connections at this path
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// guest memory could not be mapped
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// guest memory is used up
    #[error("guest memory is used up: {0} bytes requested")]
    NoRam(u64),
    /// an address outside of guest memory
    #[error("{len} bytes at {gpa:#x} are outside of guest memory")]
    Address {
        /// The guest-physical address of the first byte.
        gpa: u64,
        /// The number of bytes.
        len: u64,
    },
    /// the back end refused a message, or its reply is invalid
    #[error("{message}: {source}")]
    Protocol {
        /// Name of the message.
        message: &'static str,
        /// The error of the `vhost` crate.
        source: vhost::Error,
    },
    /// the back end did not reply in time
    #[error("{message}: no reply within {limit:?}")]
    NoAnswer {
        /// Name of the message.
        message: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// the back end closed the connection
    #[error("the back end closed the connection")]
    Closed,
    /// the back end does not offer a required feature
    #[error("the back end does not offer {0}")]
    NotOffered(&'static str),
    /// the back end sent an invalid message
    #[error("the back end sent an invalid message: {0}")]
    Nonsense(&'static str),
    /// the queue has no room for this request now
    #[error("the queue is full")]
    Full,
    /// the request has more segments than the queue was made for
    #[error("the request has {have} segments, but the queue was made for {most}")]
    Segments {
        /// The segments of the request.
        have: usize,
        /// The limit of the queue.
        most: usize,
    },
    /// the queue size is invalid
    #[error("invalid queue size {0}: must be a power of two up to 32768")]
    Size(u16),
    /// the device returned a buffer that it does not hold
    #[error("the device returned buffer {id}, which it does not hold")]
    NotHeld {
        /// The id in the used ring.
        id: u32,
    },
    /// no request completed within [`LIMIT`]
    #[error("{0} requests are in flight, and none completed within {LIMIT:?}")]
    Stalled(usize),
}

impl Error {
    /// Returns a function for `map_err` on a system call.
    pub fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing, source: source.into() }
    }
}
