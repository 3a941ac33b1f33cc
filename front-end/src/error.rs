//! What can go wrong between a front end and its back end.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long anything here waits for the other side before it gives up: far more than a back end
/// that works needs, little enough for a test to end.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The result of most of what this crate does.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the system refused
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// nobody answers at this path
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// guest memory could not be mapped
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// guest memory is used up
    #[error("no {0} bytes of guest memory left")]
    NoRam(u64),
    /// not an address of guest memory
    #[error("{len} bytes at {gpa:#x} are not inside guest memory")]
    Address {
        /// The first byte, guest-physical.
        gpa: u64,
        /// How many bytes.
        len: u64,
    },
    /// the back end refused a message, or answered nonsense
    #[error("{message}: {source}")]
    Protocol {
        /// Name of the message.
        message: &'static str,
        /// The reason, as the `vhost` crate tells it.
        source: vhost::Error,
    },
    /// the back end did not answer in time
    #[error("{message}: no answer within {limit:?}")]
    NoAnswer {
        /// Name of the message.
        message: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// the back end closed the connection
    #[error("the back end closed the connection")]
    Closed,
    /// the back end does not offer what is needed
    #[error("the back end does not offer {0}")]
    NotOffered(&'static str),
    /// a message that no back end should send
    #[error("the back end sent a message that makes no sense: {0}")]
    Nonsense(&'static str),
    /// the queue has no room for this request now
    #[error("the queue is full")]
    Full,
    /// more segments than the queue was made for
    #[error("{have} segments, the queue was made for {most}")]
    Segments {
        /// In the request.
        have: usize,
        /// What the queue has room for.
        most: usize,
    },
    /// the queue has no such size
    #[error("{0} is not the size of a split ring: a power of two up to 32768")]
    Size(u16),
    /// the device gave back a buffer that it does not hold
    #[error("the device returned buffer {id}, which it does not hold")]
    NotHeld {
        /// What the used ring says.
        id: u32,
    },
    /// nothing completed within [`LIMIT`]
    #[error("{0} requests in flight and none completed within {LIMIT:?}")]
    Stalled(usize),
}

impl Error {
    /// For `map_err` on a system call.
    pub fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing, source: source.into() }
    }
}
