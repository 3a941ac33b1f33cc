//! Which clients have been idle for long, and so may be disconnected when another client waits.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How long a client has to be idle before it may be disconnected for another.
const IDLE_MIN: Duration = Duration::from_secs(300);

/// The idle state of one connection, and the request to close it.
#[derive(Debug, Default)]
pub(crate) struct Idle {
    since: Cell<Option<Instant>>,
    close: Notify,
}

impl Idle {
    /// Nothing runs for the client, every answer is sent, and no request is being received.
    pub(crate) fn begin(&self) {
        if self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
    }

    /// The client has sent something.
    pub(crate) fn end(&self) {
        self.since.set(None);
    }

    /// Waits until the connection is to be closed for another client.
    pub(crate) async fn closed(&self) {
        loop {
            self.close.notified().await;
            if self.since.get().is_some() {
                return;
            }
        }
    }
}

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Connections(RefCell<Vec<Weak<Idle>>>);

impl Connections {
    /// A new one.
    pub(crate) fn add(&self) -> Rc<Idle> {
        let idle = Rc::new(Idle::default());
        let mut all = self.0.borrow_mut();
        all.retain(|idle| idle.strong_count() > 0);
        all.push(Rc::downgrade(&idle));
        idle
    }

    /// Closes the connection that has been idle longest, if that is at least [`IDLE_MIN`].
    pub(crate) fn close_idlest(&self) {
        let all: Vec<Rc<Idle>> = self.0.borrow().iter().filter_map(Weak::upgrade).collect();
        let idlest =
            all.iter().filter_map(|idle| Some((idle.since.get()?, idle))).min_by_key(|i| i.0);
        if let Some((since, idle)) = idlest
            && since.elapsed() >= IDLE_MIN
        {
            idle.close.notify_one();
        }
    }
}
