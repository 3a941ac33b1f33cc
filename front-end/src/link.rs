//! One connection to a back end: sends vhost-user messages and receives replies, each with a time
//! limit.

use std::fmt;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserHeaderFlag;

use crate::error::{Error, Result};
use crate::features::ProtocolFeatures;
use crate::raw::connect_stream;
use crate::watchdog::Watchdog;

/// The number of rings that can be addressed before the back end has sent its number of queues.
const QUEUES_MAX: u64 = 256;

/// One connection, and its negotiated state.
#[derive(Debug)]
pub(crate) struct Link {
    node: Node,
    pub(crate) socket: UnixStream,
    watchdog: Watchdog,
    limit: Duration,
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) acks: bool,
    /// Set when regions have been added one by one.
    pub(crate) has_memory: bool,
}

/// Ends a connection from any thread.
#[derive(Debug)]
pub struct Killer {
    pub(crate) socket: UnixStream,
}

impl Killer {
    /// Shuts the socket down: the back end sees the end of the stream, and a call that waits fails.
    pub fn kill(&self) {
        // A socket that is shut down already is in the wanted state.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

impl Link {
    pub(crate) fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let socket = connect_stream(path, limit)?;
        Ok(Self {
            node: Node(Frontend::from_stream(clone(&socket)?, QUEUES_MAX)),
            watchdog: Watchdog::new(clone(&socket)?, limit)?,
            limit,
            socket,
            protocol: ProtocolFeatures::empty(),
            acks: false,
            has_memory: false,
        })
    }

    /// Sends a message whose reply carries data.
    pub(crate) fn ask<T>(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        let (result, expired) = self.watchdog.guard(|| call(&mut self.node.0));
        result.map_err(|source| {
            if expired {
                Error::NoAnswer { message, limit: self.limit }
            } else {
                Error::Protocol { message, source }
            }
        })
    }

    /// Sends a message that is acknowledged only if the front end requests it.
    pub(crate) fn tell(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<()>,
    ) -> Result<()> {
        if self.acks {
            self.node.0.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let result = self.ask(message, call);
        self.node.0.set_hdr_flags(VhostUserHeaderFlag::empty());
        result
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Clones of the socket may exist in a Killer or a RawConnection.
        drop(self.socket.shutdown(Shutdown::Both));
    }
}

/// The `vhost` crate's front end, with a `Debug` implementation.
struct Node(Frontend);

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Node").field(&self.0.as_raw_fd()).finish()
    }
}

pub(crate) fn clone(socket: &UnixStream) -> Result<UnixStream> {
    socket.try_clone().map_err(Error::system("cannot duplicate a socket"))
}
