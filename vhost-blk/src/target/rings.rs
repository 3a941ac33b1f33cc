//! What sessions want done with their rings, carried out: attach, publish, stop, answer.
#![expect(unsafe_code, reason = "owns a new queue's core")]

use std::sync::Arc;

use tracing::warn;

use super::gate::Place;
use super::{Attached, Connected, Inner, Target};
use crate::config::Disk;
use crate::notify::KickFd;
use crate::protocol;
use crate::queue::{Queue, QueueId, StartError, Tracked, View};
use crate::reactor::{BellRope, Reactor};
use crate::session::{Effect, RingState, Session};
use crate::transport::ConnId;

impl Target {
    /// Carries out what a session wants, but for the starts, which it returns: they open devices,
    /// and that is done without the lock. A reply goes to `reply` if the front end's message is
    /// being handled right now, otherwise to the connection.
    pub(super) fn apply(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        effects: Vec<Effect>,
        mut reply: Option<&mut Option<Vec<u8>>>,
    ) -> Vec<usize> {
        let mut starts = vec![];
        for effect in effects {
            match effect {
                Effect::Start(ring) => starts.push(ring),
                Effect::Gate(ring) if self.pass_gate(inner, conn, ring) => starts.push(ring),
                Effect::Gate(_) => {}
                Effect::Publish(ring) => self.publish(inner, conn, ring),
                Effect::Stop(ring) => self.stop(inner, conn, ring, Queue::stop),
                Effect::Reset(ring) => self.stop(inner, conn, ring, Queue::reset),
                Effect::MarkAll => mark_all(inner, conn),
                Effect::Reply(ring, base) => {
                    answer(inner, conn, protocol::vring_base(ring, base), &mut reply);
                }
                Effect::Acknowledge => answer(inner, conn, protocol::SUCCESS, &mut reply),
            }
        }
        if let Some(connected) = inner.connections.get_mut(&conn) {
            connected.end_unused_hold();
        }
        starts
    }

    fn stop(&self, inner: &Inner, conn: ConnId, ring: usize, how: fn(&Queue)) {
        let connected = inner.connections.get(&conn);
        if let Some(attached) = connected.and_then(|c| c.queues.get(ring)?.as_ref()) {
            how(&attached.queue);
            self.reactors[attached.reactor].wake();
        }
    }

    pub(super) fn publish(&self, inner: &mut Inner, conn: ConnId, ring: usize) {
        let generation = inner.id();
        let disk = inner.controller_of(conn).and_then(|c| c.disk.clone());
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let Some(Some(attached)) = connected.queues.get_mut(ring) else { return };
        let Some(mut view) = view_of(&connected.session, ring, generation, disk) else { return };
        let reactor = &self.reactors[attached.reactor];
        // Watched before the reactor can ask for kicks there, and the fd before for as long.
        let before = attached.kicks.take();
        let kick = connected.session.ring(ring).kick.as_ref();
        attached.kicks = match before {
            Some(rope) if is_between(&rope, kick, reactor) => Some(rope),
            _ => kick.and_then(|kick| rope(reactor, kick)),
        };
        view.kicks = attached.kicks.is_some();
        attached.place = Place::now(&connected.session, ring);
        self.reclaim.free(attached.queue.publish(view));
        reactor.wake();
    }

    /// Opens the disk for rings and attaches them to reactors.
    pub(super) fn start_rings(&self, conn: ConnId, rings: &[usize]) {
        for &ring in rings {
            self.start_ring(conn, ring);
        }
    }

    pub(super) fn start_all(&self, opened: Vec<(ConnId, Vec<usize>)>) {
        opened.into_iter().for_each(|(conn, rings)| self.start_rings(conn, &rings));
    }

    fn start_ring(&self, conn: ConnId, ring: usize) {
        let mut inner = self.lock();
        let (id, generation) = (QueueId(inner.id()), inner.id());
        let plan = inner.controller_of(conn).and_then(|controller| {
            let connected = inner.connections.get(&conn)?;
            // It may have been stopped or reset since this was decided.
            connected.session.ring(ring).is_wanted().then_some(())?;
            let view = view_of(&connected.session, ring, generation, controller.disk.clone())?;
            let base = connected.session.ring(ring).base;
            let area = connected.session.inflight().cloned();
            Some((view, base, area, Arc::clone(&controller.coalescing)))
        });
        drop(inner);
        let queue = plan.map(|(view, base, area, coalescing)| {
            let tracked = area.as_ref().map(|area| Tracked { area, ring });
            Queue::tracked(id, &self.domain, view, base, coalescing, tracked)
        });
        let mut inner = self.lock();
        // The cores as they are now: they may have changed while the disk was being opened.
        let cores = inner.controller_of(conn).map(|c| c.cores.clone()).unwrap_or_default();
        let reactor = self.reactors_on(&inner, &cores).first().copied().unwrap_or(0);
        let queue = queue.map(|opened| opened.and_then(|queue| self.aim(queue, reactor)));
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let state = connected.session.ring(ring);
        let (live, wanted) = (state.state == RingState::Live, state.is_wanted());
        match queue {
            Some(Ok(queue)) if wanted => {
                if !live {
                    // Stopped before it was served: only its reactor may look into the ring for
                    // the answer.
                    queue.stop();
                }
                if connected.queues.len() <= ring {
                    connected.queues.resize_with(ring + 1, || None);
                }
                connected.queues[ring] = Some(Attached {
                    queue: Arc::clone(&queue),
                    reactor,
                    moving: false,
                    place: None,
                    kicks: None,
                });
                inner.queues.insert(id, (conn, ring));
                // What changed while the lock was not held is in the first view that the reactor
                // sees: a front end may have been told that it is in effect.
                self.publish(&mut inner, conn, ring);
                inner.attached[reactor].push(queue);
                self.publish_set(&inner, reactor);
                return;
            }
            Some(Ok(queue)) => self.reclaim.free(queue),
            Some(Err(e)) => {
                warn!("controller {}: cannot serve ring {ring}: {e}", connected.controller_name);
                if let Some(conn) = &connected.conn {
                    conn.shut_down();
                }
            }
            None => {}
        }
        // It cannot be served, or was stopped meanwhile: it never had anything in flight.
        let base = connected.session.ring(ring).base;
        let effects = if live {
            connected.session.start_failed(ring);
            vec![]
        } else {
            connected.session.drained(ring, base)
        };
        let starts = self.apply(&mut inner, conn, effects, None);
        let opened = self.reap(&mut inner, conn);
        drop(inner);
        self.start_rings(conn, &starts);
        self.start_all(opened);
    }

    /// Has what the disk of a new queue completes wake its reactor, should that sleep.
    fn aim(&self, queue: Arc<Queue>, reactor: usize) -> Result<Arc<Queue>, StartError> {
        let bell = self.reactors[reactor].bell().map(|bell| &**bell);
        // SAFETY: no reactor has it yet.
        unsafe { queue.aim(None, bell) }.map_err(|source| {
            let what = "cannot watch a disk for completions".into();
            bdev::Error::System { what, source }
        })?;
        Ok(queue)
    }
}

fn mark_all(inner: &Inner, conn: ConnId) {
    let Some(Connected { session, .. }) = inner.connections.get(&conn) else { return };
    if let (Some(log), Some(memory)) = (session.log(), session.memory()) {
        memory.ranges().for_each(|(gpa, len)| log.mark(gpa, len));
    }
}

/// Answers the message that is being handled, or the one whose answer is owed.
fn answer(
    inner: &mut Inner,
    conn: ConnId,
    payload: [u8; 8],
    reply: &mut Option<&mut Option<Vec<u8>>>,
) {
    if let Some(reply) = reply {
        **reply = Some(payload.into());
        return;
    }
    let Some(connected) = inner.connections.get_mut(&conn) else { return };
    let (Some(owed), Some(conn)) = (connected.owed.take(), &connected.conn) else { return };
    if conn.send(&protocol::reply(owed.request, &payload)).is_err() {
        conn.shut_down();
    }
}

/// Whether `kick`, as it is now, already wakes `reactor`.
fn is_between(rope: &BellRope<KickFd>, kick: Option<&Arc<KickFd>>, reactor: &Reactor) -> bool {
    kick.zip(reactor.bell()).is_some_and(|(kick, bell)| rope.is_between(kick, bell))
}

/// Has a guest's kicks wake `reactor`, if that ever sleeps. `None` has it poll the ring.
fn rope(reactor: &Reactor, kick: &Arc<KickFd>) -> Option<BellRope<KickFd>> {
    match BellRope::new(reactor.bell()?, kick) {
        Ok(rope) => Some(rope),
        Err(e) => {
            warn!("a ring has to be polled: cannot watch for its kicks: {e}");
            None
        }
    }
}

/// A view of a ring as the session has it now.
fn view_of(
    session: &Session,
    ring: usize,
    generation: u64,
    disk: Option<Arc<Disk>>,
) -> Option<View> {
    let memory = session.memory()?;
    let state = session.ring(ring);
    let (layout, call) = (session.layout(), state.call.clone());
    let mut view =
        View::new(generation, memory, state.num, state.addrs?, layout, call, disk).ok()?;
    view.log = session.log().cloned();
    view.write_through = session.write_through();
    Some(view)
}
