//! The test's side of the seam to the transport: no sockets, and connections that keep what the
//! target sends. Tests of other crates include this file by its path.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use closer::Account;
use vhost_target::{Connection, Offer, Transport};

/// A transport without sockets: the tests report connections.
pub(crate) struct NoSockets;

impl Transport for NoSockets {
    fn listen(&self, _: &Path, _: Offer, _: &Account) -> io::Result<()> {
        Ok(())
    }
    fn unlisten(&self, _: &Path) {}
}

/// The test's end of a connection.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    /// Messages that the target has sent.
    pub(crate) sent: Mutex<Vec<Vec<u8>>>,
    /// How often the target has closed the connection.
    pub(crate) ended: AtomicUsize,
}

impl Connection for Wire {
    fn vid(&self) -> i32 {
        0
    }
    fn send(&self, message: &[u8]) -> io::Result<()> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).push(message.to_vec());
        Ok(())
    }
    fn shut_down(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}
