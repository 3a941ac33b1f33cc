//! Assigns queues to reactors, and moves a queue to another reactor while it is in use.
//!
//! A queue is moved in two steps. No reactor visits it between them:
//!
//! 1. Its reactor gets a poll set without it ([`Target::begin_move`]).
//! 2. Once that reactor has been quiescent, it cannot visit the queue again, and this thread owns
//!    the queue's core. The queue's wake sources are registered with the waker of the new reactor,
//!    whose poll set then gets the queue ([`Target::end_move`]).
//!
//! I/O in flight moves with the core and its channel. What the front end or the operator publishes
//! or stops between the two steps is in flags and views, which the new reactor sees at its first
//! visit.
#![expect(unsafe_code, reason = "owns a queue's core between two reactors")]

use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use qsbr::Epoch;
use reactor::{Core, active_time};
use tracing::{info, warn};

use super::{Attached, Connected, Inner, Target};
use crate::error::Error;
use crate::queue::QueueId;
use crate::transport::ConnId;

/// The time limit for a reactor to finish its poll iteration. After it, a move is given up. A poll
/// iteration takes microseconds. One that takes this long is stuck in the kernel.
const GRACE_MAX: Duration = Duration::from_secs(5);

/// The number of checks, without a pause, whether a reactor has finished its poll iteration. The
/// further checks pause.
const CHECKS_WITHOUT_PAUSE: u32 = 16;
const PAUSE: Duration = Duration::from_micros(50);

/// A queue between two reactors. No reactor serves it until [`Target::end_move`] has returned a
/// result.
#[must_use]
#[derive(Debug)]
pub struct Moving {
    queue: QueueId,
    from: usize,
    to: usize,
    epoch: Epoch,
}

/// Orphan I/O of a queue: the reactor that served the queue before has submitted it.
#[derive(Debug)]
pub(super) struct Orphan {
    pub(super) reactor: usize,
    queue: QueueId,
    /// The queue has got a new view with its new reactor, so the I/O in flight under older views is
    /// the orphan I/O. If it has not, because it is being stopped, all of its I/O is.
    renewed: bool,
}

impl Target {
    /// Moves a ring of a controller's session to the reactor on `core`, and returns when that
    /// reactor serves it. If `session` is `None`, the controller must have one session only. Waits
    /// for a reactor's poll iteration to end. Not for the control thread.
    ///
    /// # Errors
    /// The controller, the session or the started ring does not exist, or `core` is not one of the
    /// controller's. See also [`Target::end_move`].
    pub fn move_queue(
        &self,
        controller: &str,
        session: Option<u32>,
        ring: usize,
        core: Core,
    ) -> Result<(), Error> {
        let _placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        match self.begin_move(controller, session, ring, core)? {
            Some(moving) => self.finish_move(&moving),
            None => Ok(()),
        }
    }

    /// The first half of [`Target::move_queue`]. Does not wait. Returns `None` if the reactor on
    /// `core` serves the ring already.
    ///
    /// # Errors
    /// As [`Target::move_queue`]. Also if the ring is being moved already.
    pub fn begin_move(
        &self,
        controller: &str,
        session: Option<u32>,
        ring: usize,
        core: Core,
    ) -> Result<Option<Moving>, Error> {
        let mut inner = self.lock();
        let found = inner.controller(controller)?;
        let id = found.id;
        let allowed = found.cores.contains(&core);
        let to = self.reactors.iter().position(|reactor| allowed && reactor.core() == core);
        let to = to.ok_or(Error::Cpumask)?;
        let wanted = |c: &Connected| match session {
            Some(number) => c.number == number,
            None => c.conn.is_some(),
        };
        let mut sessions =
            inner.connections.iter().filter(|(_, c)| c.controller == id && wanted(c));
        let (Some((&conn, _)), None) = (sessions.next(), sessions.next()) else {
            return Err(Error::NoSession(controller.into()));
        };
        self.begin(&mut inner, conn, ring, to)
    }

    fn begin(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        ring: usize,
        to: usize,
    ) -> Result<Option<Moving>, Error> {
        let attached = inner.attached_mut(conn, ring).ok_or(Error::NoQueue(ring))?;
        if attached.moving {
            return Err(Error::Moving(ring));
        }
        if attached.reactor == to {
            return Ok(None);
        }
        let from = std::mem::replace(&mut attached.reactor, to);
        attached.moving = true;
        let queue = attached.queue.control().id;
        inner.attached[from].retain(|other| other.control().id != queue);
        self.publish_set(inner, from);
        Ok(Some(Moving { queue, from, to, epoch: self.domain.advance() }))
    }

    /// The second half of [`Target::move_queue`]. Returns `None` if the previous reactor is still
    /// in the poll iteration in which it had the queue.
    ///
    /// # Errors
    /// The system has no room for another wake source. The queue stays with its reactor then.
    pub fn end_move(&self, moving: &Moving) -> Option<Result<(), Error>> {
        self.domain.passed(moving.epoch).then(|| self.hand_over(moving))
    }

    fn hand_over(&self, moving: &Moving) -> Result<(), Error> {
        let &Moving { queue: id, from, to, .. } = moving;
        let mut inner = self.lock();
        let Some((conn, ring)) = inner.queues.get(&id).copied() else { return Ok(()) };
        let Some(Attached { queue, .. }) = inner.attached_mut(conn, ring) else { return Ok(()) };
        let waker = |n: usize| self.reactors[n].waker().map(|waker| &**waker);
        // SAFETY: the previous reactor has been quiescent since it lost the queue. Another one gets
        // it only below, under the lock that this thread holds. So this thread owns the core.
        let moved = unsafe { queue.set_waker(waker(from), waker(to)) };
        let orphans = queue.control().inflight() > 0;
        self.attach(&mut inner, conn, ring, if moved.is_ok() { to } else { from }, |renewed| {
            (orphans && moved.is_ok()).then_some(Orphan { reactor: from, queue: id, renewed })
        });
        drop(inner);
        (self.changed)();
        moved.map_err(|e| Error::WakeSource(self.reactors[to].core(), e))
    }

    /// Adds a queue that no reactor owns to a reactor's poll set.
    fn attach(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        ring: usize,
        reactor: usize,
        orphan: impl FnOnce(bool) -> Option<Orphan>,
    ) {
        let Some(attached) = inner.attached_mut(conn, ring) else { return };
        attached.reactor = reactor;
        attached.moving = false;
        let queue = Arc::clone(&attached.queue);
        // The guest's kicks wake another waker. The guest is not asked for kicks before the
        // reactor's next sleep.
        let view = inner.connections.get(&conn).map(|c| c.session.publish_where(|n| n == ring));
        let view = view.unwrap_or_default();
        if let Some(orphan) = orphan(!view.is_empty()) {
            let from = orphan.reactor;
            inner.orphans.retain(|s| (s.reactor, s.queue) != (from, orphan.queue));
            inner.orphans.push(orphan);
            self.publish_set(inner, from);
        }
        // These effects only publish views. No ring starts.
        let _ = self.apply(inner, conn, view, None);
        inner.attached[reactor].push(queue);
        self.publish_set(inner, reactor);
    }

    /// Waits for the end of a reactor's poll iteration, and completes the move.
    fn finish_move(&self, moving: &Moving) -> Result<(), Error> {
        let mut waited = Duration::ZERO;
        for check in 0_u32.. {
            if let Some(result) = self.end_move(moving) {
                return result;
            }
            if check < CHECKS_WITHOUT_PAUSE {
                thread::yield_now();
            } else if waited < GRACE_MAX {
                waited += active_time::sleep(PAUSE);
            } else {
                break;
            }
        }
        // The reactor may still own the queue, so it can get it back at any time.
        let core = self.reactors[moving.from].core();
        warn!(
            "timed out waiting for reactor {} to finish a poll iteration; the ring stays there",
            core.0
        );
        let mut inner = self.lock();
        if let Some((conn, ring)) = inner.queues.get(&moving.queue).copied() {
            self.attach(&mut inner, conn, ring, moving.from, |_| None);
        }
        Err(Error::Stuck(core))
    }

    /// Makes the reactors on `cores` serve a controller from now on. The controller's queues are
    /// spread evenly over them. Returns when these reactors serve them. Waits for the end of
    /// reactors' poll iterations. Not for the control thread.
    ///
    /// # Errors
    /// The controller does not exist, or a core has no reactor. See also [`Target::end_move`].
    pub fn set_cores(&self, name: &str, cores: &[Core]) -> Result<(), Error> {
        let _placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        let cores = self.choose_cores(Some(cores))?;
        let plan = {
            let mut inner = self.lock();
            let controller = inner.controller(name)?;
            controller.cores.clone_from(&cores);
            let id = controller.id;
            let of_controller = inner.connections.iter().filter(|(_, c)| c.controller == id);
            let queues_of = |(conn, c): (&ConnId, &Connected)| {
                let queues = c.queues.iter().enumerate();
                let conn = *conn;
                queues.filter_map(move |(n, q)| Some((conn, n, q.as_ref()?.reactor))).collect()
            };
            let queues: Vec<(ConnId, usize, usize)> =
                of_controller.flat_map::<Vec<_>, _>(queues_of).collect();
            let mut places: Vec<usize> = queues.iter().map(|queue| queue.2).collect();
            spread(&mut places, &self.reactors_on(&inner, &cores));
            queues.into_iter().zip(places).map(|((conn, ring, _), to)| (conn, ring, to)).collect()
        };
        info!(
            "controller {name}: moving its rings to cores {:?}",
            cores.iter().map(|c| c.0).collect::<Vec<_>>()
        );
        self.carry_out(plan)
    }

    fn carry_out(&self, plan: Vec<(ConnId, usize, usize)>) -> Result<(), Error> {
        let mut result = Ok(());
        for (conn, ring, to) in plan {
            let begun = self.begin(&mut self.lock(), conn, ring, to);
            result = result.and(match begun {
                Ok(Some(moving)) => self.finish_move(&moving),
                // The queue is there already, or is not served any more.
                Ok(None) | Err(Error::NoQueue(_)) => Ok(()),
                Err(e) => Err(e),
            });
        }
        result
    }

    /// Returns the reactors on `cores`, those with the fewest queues first.
    pub(super) fn reactors_on(&self, inner: &Inner, cores: &[Core]) -> Vec<usize> {
        let on = |n: &usize| cores.contains(&self.reactors[*n].core());
        let mut reactors: Vec<usize> = (0..self.reactors.len()).filter(on).collect();
        reactors.sort_by_key(|n| inner.attached[*n].len());
        reactors
    }

    /// Returns the numbers of the reactors with orphan I/O in flight, as of the last
    /// [`Target::tick`].
    #[must_use]
    pub fn reactors_with_orphans(&self) -> Vec<usize> {
        self.lock().orphans.iter().map(|orphan| orphan.reactor).collect()
    }

    /// Publishes the poll set of a reactor.
    pub(super) fn publish_set(&self, inner: &Inner, reactor: usize) {
        let orphans = inner.orphans.iter().any(|orphan| orphan.reactor == reactor);
        let queues = inner.attached[reactor].iter().map(|queue| Arc::clone(queue) as _).collect();
        self.reactors[reactor].publish_with(queues, orphans, &self.reclaim);
    }

    /// Removes the records of orphan I/O that has completed. To be called periodically.
    pub(super) fn release_orphans(&self, inner: &mut Inner) {
        let mut orphans = std::mem::take(&mut inner.orphans);
        let had: Vec<usize> = orphans.iter().map(|orphan| orphan.reactor).collect();
        orphans.retain(|orphan| {
            let place = inner.queues.get(&orphan.queue).copied();
            let attached = place.and_then(|(conn, ring)| inner.attached_mut(conn, ring));
            attached.is_some_and(|a| !orphan.renewed || a.queue.control().past_views() > 0)
        });
        inner.orphans = orphans;
        for reactor in 0..self.reactors.len() {
            let has = inner.orphans.iter().any(|orphan| orphan.reactor == reactor);
            if had.contains(&reactor) && !has {
                self.publish_set(inner, reactor);
            }
        }
    }
}

impl Inner {
    fn attached_mut(&mut self, conn: ConnId, ring: usize) -> Option<&mut Attached> {
        self.connections.get_mut(&conn)?.queues.get_mut(ring)?.as_mut()
    }
}

/// Changes `places` so that each place in `allowed` has as many of them, to within one, with as few
/// changes as possible. Earlier places in `allowed` are preferred.
fn spread(places: &mut [usize], allowed: &[usize]) {
    let count = |places: &[usize], at: usize| places.iter().filter(|place| **place == at).count();
    for n in 0..places.len() {
        if !allowed.contains(&places[n]) {
            let Some(least) = allowed.iter().min_by_key(|at| count(places, **at)) else { return };
            places[n] = *least;
        }
    }
    loop {
        let least = allowed.iter().min_by_key(|at| count(places, **at));
        let most = allowed.iter().max_by_key(|at| count(places, **at));
        let (Some(&least), Some(&most)) = (least, most) else { return };
        if count(places, most) <= count(places, least) + 1 {
            return;
        }
        if let Some(place) = places.iter_mut().find(|place| **place == most) {
            *place = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_spread_evenly_with_few_changes() {
        for (places, allowed, expected) in [
            (vec![], vec![1], vec![]),
            (vec![0, 0, 0], vec![1], vec![1, 1, 1]),
            (vec![0, 1, 0, 1], vec![0, 1], vec![0, 1, 0, 1]),
            (vec![0, 0, 0, 0], vec![1, 0], vec![1, 1, 0, 0]),
            (vec![0, 1, 2], vec![2, 1], vec![2, 1, 2]),
            (vec![5, 5, 5, 5, 5], vec![5, 6, 7], vec![6, 7, 6, 5, 5]),
            (vec![0, 0], vec![3, 2, 1], vec![3, 2]),
        ] {
            let mut is = places.clone();
            spread(&mut is, &allowed);
            assert_eq!(is, expected, "{places:?} on {allowed:?}");
        }
    }
}
