//! A target as one request queue has opened it.

use std::collections::VecDeque;
use std::sync::Arc;

use bdev::{Begun, Channel, Grace, InFlight, Limiting, WakeSet};
use scsi::{Facts, Gate, Nexus};
use served_bdev::{Opened, Tallies, Throttled};

use crate::job::Jobs;
use crate::target::ScsiTarget;
use crate::unit::Locked;

/// A target that a request queue has opened. It is dropped outside of the reactors.
pub(crate) struct Disk {
    pub(crate) opened: Opened,
    /// What the shortcut has done in this visit.
    pub(crate) tallies: Tallies,
    /// Requests whose I/O waits for a rate limit.
    pub(crate) throttled: Throttled,
    /// Requests whose I/O waits for room in the channel, oldest first.
    pub(crate) full: VecDeque<u16>,
    /// For commands that take several I/Os.
    pub(crate) jobs: Jobs,
    /// I/Os in the channel.
    pub(crate) queued: u32,
    /// Commands that have not been answered.
    pub(crate) commands: u32,
    /// It is not shown any more: it is released when its commands have been answered.
    pub(crate) leaves: bool,
    /// As of `generation`, for the queue's nexus.
    pub(crate) facts: Facts,
    pub(crate) gate: Gate,
    /// Writes have to be checked against an exclusive command.
    pub(crate) writes_are_slow: bool,
    generation: u64,
    /// The queue's commands that change blocks.
    writes: Arc<InFlight>,
    /// The queue's wake fds, which include those of the channel.
    wake: Arc<WakeSet>,
    /// Dropped last: the target's number is free when the channel has been closed.
    pub(crate) target: Arc<ScsiTarget>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.target.unit.writes().remove(&self.writes);
        self.wake.remove(self.opened.channel.wake_fds());
    }
}

impl Disk {
    /// Opens a target for a queue with at most `depth` requests in flight.
    ///
    /// # Errors
    /// The bdev cannot be opened.
    pub(crate) fn open(
        target: &Arc<ScsiTarget>,
        depth: u16,
        wake: &Arc<WakeSet>,
    ) -> Result<Self, bdev::Error> {
        let opened = Opened::open(&target.user, depth)?;
        wake.add(opened.channel.wake_fds()).map_err(|source| bdev::Error::System {
            what: format!("{}: cannot watch the channel", target.bdev().name()),
            source,
        })?;
        let facts = *target.unit.lock().logical_unit.facts();
        Ok(Self {
            target: Arc::clone(target),
            opened,
            tallies: Tallies::default(),
            throttled: Throttled::new(depth),
            full: VecDeque::with_capacity(depth.into()),
            jobs: Jobs::new(),
            queued: 0,
            commands: 0,
            leaves: false,
            facts,
            gate: Gate::SLOW,
            writes_are_slow: true,
            generation: 0,
            writes: target.unit.writes().add(),
            wake: Arc::clone(wake),
        })
    }

    /// Returns whether the copies of gate and facts are current.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        self.target.unit.generation() == self.generation
    }

    /// Renews the copies of gate and facts.
    pub(crate) fn renew(&mut self, state: &Locked<'_>, nexus: Nexus) {
        self.facts = *state.logical_unit.facts();
        self.gate = state.logical_unit.gate(nexus);
        self.writes_are_slow = state.has_exclusive();
        self.generation = state.next_generation();
    }

    /// Counts a command that begins to change blocks. The caller looks at the unit's generation
    /// afterwards.
    #[inline]
    pub(crate) fn begin_write(&self) -> Begun {
        self.target.unit.writes().begin(&self.writes)
    }

    /// Counts the end of that command.
    #[inline]
    pub(crate) fn end_write(&self, begun: Begun) {
        Grace::end(&self.writes, begun);
    }

    /// Applies the rate limits of the bdev, or ends them.
    pub(crate) fn limit(&mut self, limited: bool) {
        if limited || self.opened.limited {
            self.opened.set_limiting(Limiting::Apply(self.target.user.id()), limited);
        }
    }

    /// From now on, requests do not wait for rate limits.
    pub(crate) fn stop_limiting(&mut self) {
        if self.opened.limited {
            self.opened.set_limiting(Limiting::ChargeOnly, true);
        }
    }

    /// Returns whether it has I/O in the channel, or requests that wait to submit theirs.
    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        self.queued > 0 || !self.throttled.is_empty() || !self.full.is_empty()
    }

    /// Abandons all I/O.
    pub(crate) fn abandon(&mut self) {
        self.opened.channel.abandon();
    }
}
