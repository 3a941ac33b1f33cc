//! The state of one connection's running requests.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// The state of one connection's running requests.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Calls that have yielded and resume without an event.
    paused: Cell<usize>,
    /// Bytes of answers in unfinished batches.
    buffered: Cell<usize>,
    /// Whether a request holds the connection: the next one does not start.
    held: Rc<Cell<bool>>,
    /// Notified when an answer is queued, and when a request resumes, ends or lets the next one start.
    pub(crate) changed: Notify,
}

impl Load {
    /// Whether a call has yielded and resumes without an event.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get() > 0
    }

    /// Whether a request holds the connection.
    pub(crate) fn is_held(&self) -> bool {
        self.held.get()
    }

    /// Bytes of answers in unfinished batches.
    pub(crate) fn buffered(&self) -> usize {
        self.buffered.get()
    }

    pub(crate) fn add_buffered(&self, bytes: usize) {
        self.buffered.update(|buffered| buffered + bytes);
    }

    pub(crate) fn remove_buffered(&self, bytes: usize) {
        self.buffered.update(|buffered| buffered - bytes);
    }
}

/// Holds back the next request of a connection, or the next member of a batch, until it is dropped.
pub(crate) struct Hold {
    taken: Rc<Cell<bool>>,
    load: Rc<Load>,
}

impl Hold {
    /// Holds a connection, which no request holds yet.
    pub(crate) fn of_connection(load: &Rc<Load>) -> Self {
        Self::take(Rc::clone(&load.held), load)
    }

    /// Holds a member's batch. [`Hold::taken`] tells the batch when it is over.
    pub(crate) fn of_member(load: &Rc<Load>) -> Self {
        Self::take(Rc::default(), load)
    }

    fn take(taken: Rc<Cell<bool>>, load: &Rc<Load>) -> Self {
        let before = taken.replace(true);
        debug_assert!(!before, "two requests hold a connection");
        Self { taken, load: Rc::clone(load) }
    }

    /// True until this is dropped.
    pub(crate) fn taken(&self) -> Rc<Cell<bool>> {
        Rc::clone(&self.taken)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.taken.set(false);
        self.load.changed.notify_one();
    }
}

/// Counts a call as paused until it resumes or is dropped.
pub(crate) struct Paused {
    own: Rc<Cell<bool>>,
    load: Rc<Load>,
}

impl Paused {
    pub(crate) fn new(own: &Rc<Cell<bool>>, load: &Rc<Load>) -> Self {
        own.set(true);
        load.paused.update(|count| count + 1);
        Self { own: Rc::clone(own), load: Rc::clone(load) }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        self.own.set(false);
        self.load.paused.update(|count| count - 1);
        self.load.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_unfinished_batches_add_up() {
        let load = Load::default();
        load.add_buffered(3000);
        load.add_buffered(600);
        load.remove_buffered(600);
        assert_eq!(load.buffered(), 3000);
        load.remove_buffered(3000);
        assert_eq!(load.buffered(), 0);
    }
}
