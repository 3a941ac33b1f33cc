//! The transport of vhost-user messages between front ends and the target.
//!
//! The crate `rte-vhost` is the one implementation in the product. The trait keeps DPDK out of this
//! crate: no reactor can take one of DPDK's locks, and a native transport can replace it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use closer::Account;

/// Identity of a connection, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// What a socket offers to front ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The virtio and vhost feature bits.
    pub features: u64,
    /// Whether GET_CONFIG and SET_CONFIG are offered.
    pub config: bool,
}

/// The server side of vhost-user sockets.
///
/// `listen` and `unlisten` may block, and are called by one thread at a time. The implementer
/// delivers the messages of each connection in order, to the [`crate::Target`] that it was created
/// for.
pub trait Transport: Send + Sync {
    /// Opens a socket at `path` and starts to accept front ends. The sockets, and the fds that
    /// front ends send, are charged to `account`.
    ///
    /// # Errors
    /// The socket cannot be created. Nothing is left of it then.
    fn listen(&self, path: &Path, offer: Offer, account: &Account) -> io::Result<()>;

    /// Closes the socket and all its connections, and removes the file. When it returns, no
    /// callback for the path is running, and none follows.
    fn unlisten(&self, path: &Path);
}

/// One connection, for messages that the control side starts.
///
/// Dropping it gives up the right to send messages.
pub trait Connection: Send + Sync + fmt::Debug {
    /// The transport's own number of the connection (rte_vhost: vid).
    fn vid(&self) -> i32;

    /// Sends a message, header and payload, without blocking.
    ///
    /// # Errors
    /// The front end does not read, or has disconnected.
    fn send(&self, message: &[u8]) -> io::Result<()>;

    /// Returns whether the front end has disconnected, even if the transport has not reported it
    /// yet.
    fn hung_up(&self) -> bool {
        false
    }

    /// Closes the connection. The transport then reports it as closed.
    fn shut_down(&self);
}

/// What the target tells the transport to do with a message.
#[derive(Debug)]
pub enum Verdict {
    /// The transport's own handler processes the message.
    Pass,
    /// Handled. Acknowledge the message if the front end asked for that.
    Done,
    /// Handled. Send this payload as the reply.
    Reply(Vec<u8>),
    /// Handled. Send this payload and this fd as the reply.
    ReplyWithFd(Vec<u8>, OwnedFd),
    /// The reply follows through [`Connection::send`]. Send nothing now, not even an
    /// acknowledgement.
    Deferred,
    /// Refused: close the connection.
    Reject,
}

/// A connection that the session and the control side share.
pub type SharedConnection = Arc<dyn Connection>;
