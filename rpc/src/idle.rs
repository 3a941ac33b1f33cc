//! Idle times of clients. The client that has been idle longest is disconnected if another waits.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// The minimum idle time of a client that is disconnected for another.
const IDLE_MIN: Duration = Duration::from_secs(300);

/// The idle state of one connection, and the request to close it.
#[derive(Debug, Default)]
pub(crate) struct Idle {
    since: Cell<Option<Instant>>,
    close: Notify,
}

impl Idle {
    /// Starts the idle time, unless it has started: no request runs or is being received, and all
    /// answers are sent.
    pub(crate) fn begin(&self) {
        if self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
    }

    /// Makes the connection the first one to be closed when another client waits.
    pub(crate) fn begin_expired(&self) {
        let now = Instant::now();
        self.since.set(Some(now.checked_sub(IDLE_MIN).unwrap_or(now)));
    }

    /// Ends the idle time: the client has sent bytes.
    pub(crate) fn end(&self) {
        self.since.set(None);
    }

    /// Waits for a request to close the connection for another client.
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
    /// Adds a connection.
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, timeout};

    async fn has_to_close(idle: &Idle) -> bool {
        timeout(Duration::ZERO, idle.closed()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_is_idle_longest_is_closed_after_the_minimum() {
        let connections = Connections::default();
        let [busy, later, first] = [(); 3].map(|()| connections.add());
        busy.begin();
        busy.end();
        first.begin();
        advance(Duration::from_secs(1)).await;
        later.begin();
        advance(IDLE_MIN - Duration::from_secs(2)).await;
        connections.close_idlest();
        assert!(!has_to_close(&first).await);
        advance(Duration::from_secs(1)).await;
        connections.close_idlest();
        assert!(has_to_close(&first).await);
        assert!(!has_to_close(&later).await && !has_to_close(&busy).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_of_a_client_that_has_gone_is_closed_at_once() {
        let connections = Connections::default();
        let [idle, gone] = [(); 2].map(|()| connections.add());
        idle.begin();
        gone.begin_expired();
        connections.close_idlest();
        assert!(has_to_close(&gone).await && !has_to_close(&idle).await);
    }

    #[test]
    fn connections_that_have_ended_are_removed() {
        let connections = Connections::default();
        for _ in 0..3 {
            drop(connections.add());
        }
        let _last = connections.add();
        assert_eq!(connections.0.borrow().len(), 1);
    }
}
