//! A socket that is never closed on the thread that drops it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use closer::Account;

/// A socket of which unread messages may have file descriptors of a client: closing it can take as
/// long as the client likes, so its account does that.
pub(crate) struct Held {
    /// Taken when this is dropped.
    socket: Option<OwnedFd>,
    account: Account,
}

impl Held {
    pub(crate) fn new(socket: OwnedFd, account: &Account) -> Self {
        Self { socket: Some(socket), account: account.clone() }
    }

    pub(crate) fn account(&self) -> &Account {
        &self.account
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("taken only in drop").as_fd()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.account.drop_later(self.socket.take());
    }
}
