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
    /// Whether a request has the turn: the next one does not start.
    turn: Rc<Cell<bool>>,
    /// Notified when an answer is queued, and when a request resumes, ends or passes its turn.
    pub(crate) changed: Notify,
}

impl Load {
    /// Whether a call has yielded and resumes without an event.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get() > 0
    }

    /// Whether a request has the turn.
    pub(crate) fn turn_is_taken(&self) -> bool {
        self.turn.get()
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

/// The turn of a request among those of its connection, or of a member of a batch among those of
/// its batch, until it is dropped.
pub(crate) struct Turn {
    taken: Rc<Cell<bool>>,
    load: Rc<Load>,
}

impl Turn {
    /// Takes the turn of a connection, which must be free.
    pub(crate) fn of_connection(load: &Rc<Load>) -> Self {
        Self::take(Rc::clone(&load.turn), load)
    }

    /// Takes the turn of a member. [`Turn::taken`] tells its batch when it is over.
    pub(crate) fn of_member(load: &Rc<Load>) -> Self {
        Self::take(Rc::default(), load)
    }

    fn take(taken: Rc<Cell<bool>>, load: &Rc<Load>) -> Self {
        let before = taken.replace(true);
        debug_assert!(!before, "two requests have the turn");
        Self { taken, load: Rc::clone(load) }
    }

    /// True until the turn is over.
    pub(crate) fn taken(&self) -> Rc<Cell<bool>> {
        Rc::clone(&self.taken)
    }
}

impl Drop for Turn {
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
