//! What carries vhost-user messages between front ends and the target.
//!
//! The one implementation in the product is the crate `rte-vhost`. The trait keeps DPDK out of this
//! crate, so that no reactor can take one of its locks, and lets a native transport replace it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use closer::Account;

/// Identity of a connection, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// The server side of vhost-user sockets.
///
/// `listen` and `unlisten` may block and are called from one thread at a time. The implementer
/// delivers each connection's messages in order, to the [`crate::Target`] it was made for.
pub trait Transport: Send + Sync {
    /// Opens a socket at `path` and starts to accept front ends. The sockets, and the fds that
    /// front ends send, are charged to `account`.
    ///
    /// # Errors
    /// The socket cannot be made; nothing is left of it.
    fn listen(&self, path: &Path, features: u64, account: &Account) -> io::Result<()>;

    /// Closes the socket and all its connections, removes the file. When it returns, no callback
    /// for the path is running and none will follow.
    fn unlisten(&self, path: &Path);
}

/// One connection, as the control side uses it when it is the one who speaks.
///
/// Dropping it gives up the right to speak.
pub trait Connection: Send + Sync + fmt::Debug {
    /// The transport's own number for it (rte_vhost: vid).
    fn vid(&self) -> i32;

    /// Sends a message without blocking: header and payload in one.
    ///
    /// # Errors
    /// The front end does not read, or is gone.
    fn send(&self, message: &[u8]) -> io::Result<()>;

    /// Whether the front end has gone, although the transport has not reported it yet.
    fn hung_up(&self) -> bool {
        false
    }

    /// Ends the connection. The transport then reports it closed.
    fn shut_down(&self);
}

/// What the transport is to do with a message that the target has looked at.
#[derive(Debug)]
pub enum Verdict {
    /// Let the transport's own handler deal with it.
    Pass,
    /// Done. Acknowledge if the front end asked for that.
    Done,
    /// Done. Send this payload.
    Reply(Vec<u8>),
    /// Done. Send this payload and this fd.
    ReplyWithFd(Vec<u8>, OwnedFd),
    /// The answer follows through [`Connection::send`]; send nothing, not even an acknowledgement.
    Deferred,
    /// Refused: close the connection.
    Reject,
}

/// Boxed for sharing between the session and the control side.
pub type SharedConnection = Arc<dyn Connection>;
