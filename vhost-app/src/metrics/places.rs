//! The limit on connections. At the limit, a new connection takes the place of one that waits for
//! its client: that has not sent its request, or does not read its answer.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Notify;

/// The places of all connections.
#[derive(Debug)]
pub(super) struct Places {
    limit: usize,
    /// The oldest connection first.
    taken: RefCell<Vec<Rc<State>>>,
    /// Notified when a connection ends, or begins to wait for its client.
    changed: Notify,
}

/// The place of one connection. Dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Place {
    places: Rc<Places>,
    state: Rc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Its request is received, and the answer is not made yet.
    is_busy: Cell<bool>,
    lost: Notify,
}

impl Places {
    pub(super) fn new(limit: usize) -> Rc<Self> {
        Rc::new(Self { limit, taken: RefCell::default(), changed: Notify::new() })
    }

    /// Takes a place. If all are taken, takes that of the oldest connection that waits for its
    /// client; if none does, waits until one does or ends. Only one task at a time may call this.
    pub(super) async fn take(self: &Rc<Self>) -> Place {
        while self.taken.borrow().len() >= self.limit {
            if let Some(idle) = self.taken.borrow().iter().find(|state| !state.is_busy.get()) {
                idle.lost.notify_one();
            }
            self.changed.notified().await;
        }
        let state = Rc::<State>::default();
        self.taken.borrow_mut().push(Rc::clone(&state));
        Place { places: Rc::clone(self), state }
    }
}

impl Place {
    /// Waits until another connection needs the place. The connection must end then.
    pub(super) async fn lost(&self) {
        self.state.lost.notified().await;
    }

    /// Keeps the place while `work`, which makes the answer, runs.
    pub(super) async fn keep_during<T>(&self, work: impl Future<Output = T>) -> T {
        self.state.is_busy.set(true);
        let done = work.await;
        self.state.is_busy.set(false);
        self.places.changed.notify_one();
        done
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.borrow_mut().retain(|state| !Rc::ptr_eq(state, &self.state));
        self.places.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// The result of a future that does not wait.
    async fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        timeout(Duration::ZERO, future).await.ok()
    }

    #[tokio::test]
    async fn the_oldest_idle_connection_loses_its_place() {
        let places = Places::new(3);
        let [busy, first, second] = [places.take().await, places.take().await, places.take().await];
        busy.state.is_busy.set(true);
        assert!(now(places.take()).await.is_none());
        assert!(now(first.lost()).await.is_some());
        assert!(now(busy.lost()).await.is_none() && now(second.lost()).await.is_none());
        drop(first);
        let third = now(places.take()).await.unwrap();
        assert!(now(places.take()).await.is_none());
        assert!(now(second.lost()).await.is_some() && now(third.lost()).await.is_none());
    }

    #[tokio::test]
    async fn a_busy_connection_loses_its_place_once_its_answer_is_made() {
        let places = Places::new(1);
        let place = places.take().await;
        let taken = async {
            drop(places.take().await);
        };
        let answer = async {
            let made = place.keep_during(tokio::time::sleep(Duration::from_millis(20)));
            tokio::select! {
                biased;
                () = place.lost() => panic!("lost while busy"),
                () = made => {}
            }
            place.lost().await;
            drop(place);
        };
        assert!(
            timeout(Duration::from_secs(10), async { tokio::join!(answer, taken) }).await.is_ok()
        );
    }
}
