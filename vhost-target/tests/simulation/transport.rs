//! A transport without sockets: connections are records, and closing is delayed.
//!
//! Faults that it may show: a socket that cannot be created; a front end that does not read its
//! reply; and, as with rte_vhost, an `unlisten` that closes connections without reporting it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use closer::Account;
use vhost_target::{Connection, Offer, Transport};

use super::disk::lock;

/// One connection, as the target uses it.
#[derive(Debug, Default)]
pub(crate) struct FakeConnection {
    vid: i32,
    state: Mutex<ConnectionState>,
}

#[derive(Debug, Default)]
struct ConnectionState {
    sent: Vec<Vec<u8>>,
    shut: bool,
    unresponsive: bool,
}

impl FakeConnection {
    pub(crate) fn new(vid: usize) -> Arc<Self> {
        Arc::new(Self { vid: vid.try_into().expect("a small number"), state: Mutex::default() })
    }

    /// Returns whether either side has closed it. The target is told later.
    pub(crate) fn is_shut(&self) -> bool {
        lock(&self.state).shut
    }

    /// Makes the front end stop reading its socket.
    pub(crate) fn become_unresponsive(&self) {
        lock(&self.state).unresponsive = true;
    }

    /// Returns the messages that the target has sent since the last call.
    pub(crate) fn take_sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut lock(&self.state).sent)
    }
}

impl Connection for FakeConnection {
    fn vid(&self) -> i32 {
        self.vid
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.shut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if state.unresponsive {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.sent.push(message.to_vec());
        Ok(())
    }

    fn hung_up(&self) -> bool {
        self.is_shut()
    }

    fn shut_down(&self) {
        lock(&self.state).shut = true;
    }
}

/// All sockets.
#[derive(Default)]
pub(crate) struct FakeTransport {
    state: Mutex<TransportState>,
}

#[derive(Default)]
struct TransportState {
    listening: BTreeSet<PathBuf>,
    fails: bool,
    /// What the event thread still does while `unlisten` waits for it.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

impl FakeTransport {
    pub(crate) fn fail(&self, fails: bool) {
        lock(&self.state).fails = fails;
    }

    pub(crate) fn at_unlisten(&self, meanwhile: impl FnOnce() + Send + 'static) {
        lock(&self.state).meanwhile = Some(Box::new(meanwhile));
    }

    pub(crate) fn listening(&self) -> usize {
        lock(&self.state).listening.len()
    }
}

impl Transport for FakeTransport {
    fn listen(&self, path: &Path, _offer: Offer, _account: &Account) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.fails {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        assert!(state.listening.insert(path.into()), "{} is listened on twice", path.display());
        Ok(())
    }

    fn unlisten(&self, path: &Path) {
        let meanwhile = lock(&self.state).meanwhile.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        assert!(lock(&self.state).listening.remove(path), "{} is not open", path.display());
    }
}
