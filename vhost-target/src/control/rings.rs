//! Carries out the effects of sessions on their rings: attach, publish, stop, reply.
#![expect(unsafe_code, reason = "owns a new queue's core")]

use std::sync::{Arc, MutexGuard};

use tracing::warn;
use virtqueue::Layout;

use super::gate::Place;
use super::{Attached, Connected, Inner, Reactor, Target};
use crate::device::{OpenError, OpenedQueue};
use crate::notify::KickFd;
use crate::protocol;
use crate::queue::{
    Coalescing, Control, Detached, NewQueue, QueueId, TargetQueue, Tracked, ViewSpec,
};
use crate::session::{Effect, Ring, RingState, Session};
use crate::transport::ConnId;
use reactor::WakeSource;
use virtqueue::inflight::Area;

/// Connections with rings whose device has to be opened. That is done without the lock:
/// [`Target::open`].
#[must_use]
#[derive(Debug, Default)]
pub(super) struct Starts(pub(super) Vec<ConnId>);

impl Starts {
    /// Returns the connection if any of its rings passed the gate.
    pub(super) fn of(conn: ConnId, any: bool) -> Self {
        Self(any.then_some(conn).into_iter().collect())
    }

    /// Adds others.
    pub(super) fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }
}

/// The parameters of a new queue, taken under the lock.
struct Plan {
    view: ViewSpec,
    base: u16,
    area: Option<Arc<Area>>,
    coalescing: Arc<Coalescing>,
}

impl Target {
    /// Carries out the effects of a session, except for the starts, which it returns. A reply goes
    /// to `reply` if the front end's message is being handled now, otherwise to the connection.
    pub(super) fn apply(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        effects: Vec<Effect>,
        mut reply: Option<&mut Option<Vec<u8>>>,
    ) -> Starts {
        let mut starts = false;
        for effect in effects {
            match effect {
                Effect::Gate(ring) => starts |= self.pass_gate(inner, conn, ring),
                Effect::Publish(ring) => self.publish(inner, conn, ring),
                Effect::Stop(ring) => self.stop(inner, conn, ring, Control::stop),
                Effect::Reset(ring) => self.stop(inner, conn, ring, Control::reset),
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
        Starts::of(conn, starts)
    }

    fn stop(&self, inner: &Inner, conn: ConnId, ring: usize, how: fn(&Control)) {
        let connected = inner.connections.get(&conn);
        if let Some(attached) = connected.and_then(|c| c.queues.get(ring)?.as_ref()) {
            how(attached.queue.control());
            self.reactors[attached.reactor].wake();
        }
    }

    pub(super) fn publish(&self, inner: &mut Inner, conn: ConnId, ring: usize) {
        let generation = inner.id();
        let served = inner.controller_of(conn).is_some();
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let Some(Some(attached)) = connected.queues.get_mut(ring) else { return };
        let view = view_of(&connected.session, ring, generation, served);
        let Some(mut view) = view else { return };
        let reactor = &self.reactors[attached.reactor];
        // The kick fd is registered before the reactor can ask for kicks there, and the previous fd
        // stays registered as long.
        let before = attached.kicks.take();
        let kick = connected.session.ring(ring).kick.as_ref();
        attached.kicks = match before {
            Some(source) if is_between(&source, kick, reactor) => Some(source),
            _ => kick.and_then(|kick| watch_kicks(reactor, kick)),
        };
        view.kicks = attached.kicks.is_some();
        attached.place = Place::now(&connected.session, ring);
        // Cannot fail: the session has checked the ring.
        if let Ok(before) = attached.queue.publish(view) {
            self.reclaim.free_boxed(before);
        }
        reactor.wake();
    }

    /// Handles the result of opening a ring's device: creates the queue and attaches it to a
    /// reactor. Has no effect if the ring was stopped or reset meanwhile: `id` identifies the
    /// start.
    pub(super) fn opened(
        &self,
        conn: ConnId,
        ring: usize,
        id: QueueId,
        opened: Result<Box<dyn OpenedQueue>, OpenError>,
    ) {
        let mut inner = self.lock();
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        if connected.opening.get(&ring) != Some(&id) || !connected.session.opened(ring) {
            return;
        }
        connected.opening.remove(&ring);
        connected.opening_s = 0;
        let plan = plan(&mut inner, conn, ring);
        drop(inner);
        let queue = match (opened, plan) {
            (Err(e), _) => Some(Err(format!("cannot open its device: {e}"))),
            (Ok(_), None) => None,
            (Ok(opened), Some(Plan { view, base, area, coalescing })) => {
                let tracked = area.as_ref().map(|area| Tracked { area, ring });
                let domain = &self.domain;
                let new = NewQueue { id, domain, view, base, coalescing, tracked };
                Some(opened.start(new).map_err(|e| e.to_string()))
            }
        };
        self.attach_new(conn, ring, id, queue);
    }

    /// Attaches a new queue to a reactor, or ends a start that has failed or is not wanted any
    /// more.
    fn attach_new(
        &self,
        conn: ConnId,
        ring: usize,
        id: QueueId,
        queue: Option<Result<Arc<dyn TargetQueue>, String>>,
    ) {
        let mut inner = self.lock();
        // The current cores: they may have changed while the device was being opened.
        let cores = inner.controller_of(conn).map(|c| c.cores.clone()).unwrap_or_default();
        let reactor = self.reactors_on(&inner, &cores).first().copied().unwrap_or(0);
        let queue = queue.map(|queue| queue.and_then(|queue| self.set_waker(queue, reactor)));
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let state = connected.session.ring(ring);
        let (live, wanted) = (state.state == RingState::Live, state.is_wanted());
        match queue {
            Some(Ok(queue)) if wanted => {
                if !live {
                    // Stopped before it was served. Only its reactor may read the ring's position
                    // for the reply.
                    queue.control().stop();
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
                // The first view that the reactor sees includes what changed while the lock was not
                // held: a front end may have been told that the change is in effect.
                self.publish(&mut inner, conn, ring);
                inner.attached[reactor].push(queue);
                self.publish_set(&inner, reactor);
                return;
            }
            Some(Ok(queue)) => self.reclaim.free(Detached(queue)),
            Some(Err(e)) => {
                warn!("controller {}: cannot serve ring {ring}: {e}", connected.controller_name);
                if let Some(conn) = &connected.conn {
                    conn.shut_down();
                }
            }
            None => {}
        }
        self.end_start(inner, conn, ring);
    }

    /// Handles a ring whose device could not be opened, or that was stopped during the opening. The
    /// ring never had I/O in flight.
    fn end_start(&self, mut inner: MutexGuard<'_, Inner>, conn: ConnId, ring: usize) {
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let session = &mut connected.session;
        let Ring { state, base, .. } = *session.ring(ring);
        let effects = if state == RingState::Live {
            session.start_failed(ring);
            vec![]
        } else {
            session.drained(ring, base)
        };
        let mut starts = self.apply(&mut inner, conn, effects, None);
        starts.extend(self.reap(&mut inner, conn));
        drop(inner);
        self.open(starts);
    }

    /// Makes completions of a new queue's device wake the queue's reactor, if that may sleep.
    fn set_waker(
        &self,
        queue: Arc<dyn TargetQueue>,
        reactor: usize,
    ) -> Result<Arc<dyn TargetQueue>, String> {
        let waker = self.reactors[reactor].waker().map(|waker| &**waker);
        // SAFETY: no reactor has the queue yet.
        match unsafe { queue.set_waker(None, waker) } {
            Ok(()) => Ok(queue),
            Err(e) => {
                // Not dropped here, under the lock: that closes a device's queue.
                self.reclaim.free(Detached(queue));
                Err(format!("cannot register the device's completion eventfd with a reactor: {e}"))
            }
        }
    }
}

/// Returns the parameters of a ring's queue, if the ring is still to be served.
fn plan(inner: &mut Inner, conn: ConnId, ring: usize) -> Option<Plan> {
    let generation = inner.id();
    let coalescing = Arc::clone(&inner.controller_of(conn)?.coalescing);
    let session = &inner.connections.get(&conn)?.session;
    session.ring(ring).is_wanted().then_some(())?;
    let view = view_of(session, ring, generation, true)?;
    let (base, area) = (session.ring(ring).base, session.inflight().cloned());
    Some(Plan { view, base, area, coalescing })
}

fn mark_all(inner: &Inner, conn: ConnId) {
    let Some(Connected { session, .. }) = inner.connections.get(&conn) else { return };
    if let (Some(log), Some(memory)) = (session.log(), session.memory()) {
        memory.ranges().for_each(|(gpa, len)| log.mark(gpa, len));
    }
}

/// Replies to the message that is being handled, or sends the pending reply.
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
    let (Some(pending), Some(conn)) = (connected.pending_reply.take(), &connected.conn) else {
        return;
    };
    if conn.send(&protocol::reply(pending.request, &payload)).is_err() {
        conn.shut_down();
    }
}

/// Returns whether `source` already connects `kick` with the waker of `reactor`.
fn is_between(source: &WakeSource<KickFd>, kick: Option<&Arc<KickFd>>, reactor: &Reactor) -> bool {
    kick.zip(reactor.waker()).is_some_and(|(kick, waker)| source.is_between(kick, waker))
}

/// Makes a guest's kicks wake `reactor`, if that ever sleeps. `None`: the ring has to be polled.
fn watch_kicks(reactor: &Reactor, kick: &Arc<KickFd>) -> Option<WakeSource<KickFd>> {
    match WakeSource::new(reactor.waker()?, kick) {
        Ok(source) => Some(source),
        Err(e) => {
            warn!(
                "cannot register a ring's kick eventfd with its reactor, which polls the ring: {e}"
            );
            None
        }
    }
}

/// Returns a view of a ring with the session's current state. `served`: its controller still
/// exists.
fn view_of(session: &Session, ring: usize, generation: u64, served: bool) -> Option<ViewSpec> {
    let memory = Arc::clone(session.memory()?);
    let state = session.ring(ring);
    let layout: Layout = session.layout();
    Some(ViewSpec {
        generation,
        memory,
        size: state.num,
        addrs: state.addrs?,
        layout,
        call: state.call.clone(),
        kicks: false,
        log: session.log().cloned(),
        device: session.device_view().filter(|_| served),
    })
}
