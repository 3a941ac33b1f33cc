//! Requests whose I/O waits for a rate limit of the disk.

use std::collections::VecDeque;

use bdev::{Io, Op};

use crate::opened::Opened;

/// The requests of a queue that wait for a rate limit, by slot. Reads and the other operations wait
/// separately: a limit of one kind does not hold up the other. Within a kind, the oldest is first;
/// a new request may pass before those that wait.
#[derive(Debug)]
pub struct Throttled {
    reads: VecDeque<u16>,
    others: VecDeque<u16>,
    /// The other operations are released first next time.
    others_first: bool,
}

impl Throttled {
    /// Makes room for `depth` requests of each kind, so that adding one does not allocate.
    #[must_use]
    pub fn new(depth: u16) -> Self {
        let empty = || VecDeque::with_capacity(depth.into());
        Self { reads: empty(), others: empty(), others_first: false }
    }

    /// Returns whether no request waits.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.reads.is_empty() && self.others.is_empty()
    }

    /// Returns the number of requests that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.reads.len() + self.others.len()
    }

    /// Adds the request with this I/O, behind those of its kind, and counts it.
    pub fn push(&mut self, io: &Io, open: Option<&Opened>) {
        if let Some(open) = open {
            open.counters.record_throttled();
        }
        let kind = if io.op == Op::Read { &mut self.reads } else { &mut self.others };
        kind.push_back(io.tag.0);
    }

    /// Removes a request. Returns whether it waited.
    pub fn remove(&mut self, slot: u16) -> bool {
        let before = self.len();
        self.reads.retain(|other| *other != slot);
        self.others.retain(|other| *other != slot);
        self.len() < before
    }

    /// Calls `submit` for the requests of each kind, oldest first, until it returns false. Removes
    /// those for which it returned true. The kinds alternate in being first.
    pub fn release(&mut self, mut submit: impl FnMut(u16) -> bool) {
        let Self { reads, others, others_first } = self;
        let kinds = if *others_first { [others, reads] } else { [reads, others] };
        *others_first = !*others_first;
        for kind in kinds {
            while let Some(&slot) = kind.front()
                && submit(slot)
            {
                kind.pop_front();
            }
        }
    }
}
