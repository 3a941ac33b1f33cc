//! Who has asked for nothing for long, and so may be closed for another who waits.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How long a client has to be idle before it is closed for another.
const IDLE_MIN: Duration = Duration::from_secs(300);

/// How a connection says whether it is idle, and hears that it is to end.
#[derive(Debug, Default)]
pub(crate) struct Idle {
    since: Cell<Option<Instant>>,
    close: Notify,
}

impl Idle {
    /// Nothing runs for the client, everything is sent, and no byte comes.
    pub(crate) fn begin(&self) {
        if self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
    }

    /// The client has sent something.
    pub(crate) fn end(&self) {
        self.since.set(None);
    }

    /// Waits until the connection has to make way.
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

    /// Ends the one that has been idle longest, if that is long.
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
