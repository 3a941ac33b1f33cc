//! Connections of front ends: connect, disconnect and drain; events of the reactors.

use std::path::Path;
use std::sync::atomic::Ordering;

use reactor::Garbage;
use tracing::{debug, warn};

use super::{Attached, Connected, Inner, PendingReply, Target, opening};
use crate::queue::{Detached, Event, Leftover, QueueId};
use crate::session::Session;
use crate::transport::{ConnId, SharedConnection};

/// Connections of one controller, including those that still drain: a VM, its successor in a
/// migration, and a few that closed with I/O in flight. rte_vhost supports 1,024 connections of all
/// controllers.
pub(super) const CONNECTIONS_MAX: usize = 16;

/// Seconds after which a warning is logged that a front end waits for a drain, or for a device to
/// be opened.
const WARN_S: u64 = 3;

/// Seconds after which a connection is closed whose device is still being opened. Its front end can
/// connect again.
const OPEN_LIMIT_S: u64 = 30;

impl Target {
    /// Adds the connection of a front end to `socket`. Returns `None` if it is refused.
    pub fn connected(&self, socket: &Path, conn: SharedConnection) -> Option<ConnId> {
        // A VM may reconnect before the transport has reported its old connection as closed. The
        // I/O of that connection must still come first.
        self.hung_up_unreported(socket).into_iter().for_each(|conn| self.closed(conn));
        let mut inner = self.lock();
        let id = ConnId(inner.id());
        let Inner { controllers, connections, ending, .. } = &mut *inner;
        let controller = controllers.values_mut().find(|c| c.socket == socket)?;
        if controller.deleting || *ending {
            return None;
        }
        let controller_id = controller.id;
        let connected = connections.values().filter(|c| c.controller == controller_id).count();
        if connected >= CONNECTIONS_MAX {
            warn!(
                "controller {}: refused a front end: it has {connected} connections, the limit",
                controller.name
            );
            return None;
        }
        if opening::too_many(&controller.openers, &controller.name) {
            return None;
        }
        let number = controller.sessions_made;
        controller.sessions_made += 1;
        let name = controller.name.clone();
        let device = &controller.device;
        let mut session =
            Session::new(controller.features, device.queues(), device.clone().connect());
        if controller.config_changed {
            session.config_changed();
        }
        debug!("controller {name}: front end {number} connected");
        let connected = Connected {
            controller: controller_id,
            controller_name: name,
            number,
            vid: conn.vid(),
            session,
            conn: Some(conn),
            left_io: false,
            storage: device.storage(),
            hold: None,
            waited_for_lease: false,
            queues: Vec::new(),
            past_requests: (0, 0),
            opening: Default::default(),
            to_open: Default::default(),
            opens: false,
            opening_s: 0,
            pending_reply: None,
            unmapper: controller.unmapper.clone(),
        };
        inner.connections.insert(id, connected);
        Some(id)
    }

    /// Returns the connections to `socket` whose front ends have disconnected, but which the
    /// transport has not reported yet.
    fn hung_up_unreported(&self, socket: &Path) -> Vec<ConnId> {
        let inner = self.lock();
        let unreported = |(id, c): (&ConnId, &Connected)| {
            let controller = inner.controllers.get(&c.controller_name)?;
            let is_same = controller.id == c.controller && controller.socket == socket;
            (is_same && c.conn.as_ref().is_some_and(|conn| conn.hung_up())).then_some(*id)
        };
        inner.connections.iter().filter_map(unreported).collect()
    }

    /// Marks the connection as closed. Its I/O completes in the background.
    pub fn closed(&self, conn: ConnId) {
        let mut inner = self.lock();
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        if connected.conn.take().is_none() {
            return;
        }
        debug!(
            "controller {}: front end {} disconnected",
            connected.controller_name, connected.number
        );
        connected.pending_reply = None;
        let effects = connected.session.close();
        connected.left_io = connected.session.undrained();
        let mut starts = self.apply(&mut inner, conn, effects, None);
        starts.extend(self.reap(&mut inner, conn));
        drop(inner);
        self.open(starts);
        (self.changed)();
    }

    // Events of the reactors.

    /// Processes the events of the reactors. Called by the control thread.
    pub fn process_events(&self) {
        self.events.wake().take();
        let mut any = false;
        while let Some(event) = self.events.pop() {
            any = true;
            match event {
                Event::Drained(queue) => self.drained(queue),
                Event::Broken(queue) => self.broken(queue),
                Event::Released(_, leftover) => self.reclaim.free(DropLater(leftover)),
                Event::ViewsWanted(queue) => self.views_wanted(queue),
            }
        }
        if any {
            (self.changed)();
        }
    }

    /// Counts one second of active time. Warns of drains that take long, and closes connections
    /// whose drain takes too long. Called by the control thread.
    ///
    /// Must not be called for time in which the process was stopped or its control group was
    /// frozen, because the reactors did not run then.
    pub fn tick(&self) {
        // Completed drains must not be reported as late below.
        self.process_events();
        let limit_s = self.drain_limit_s.load(Ordering::Relaxed);
        let mut inner = self.lock();
        self.release_orphans(&mut inner);
        for connected in inner.connections.values_mut() {
            connected.announce_config();
            connected.tick_reply(limit_s);
            connected.tick_opening();
        }
    }

    fn drained(&self, queue: QueueId) {
        let mut inner = self.lock();
        let Some((conn, ring)) = inner.queues.remove(&queue) else { return };
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let Some(attached) = connected.queues[ring].take() else { return };
        // If the queue is being moved to this reactor, the move has no effect.
        let Attached { queue, reactor, .. } = attached;
        let control = queue.control();
        let (requests, errors) = control.requests();
        connected.past_requests.0 += requests;
        connected.past_requests.1 += errors;
        let effects = connected.session.drained(ring, control.last_avail());
        let id = control.id;
        inner.attached[reactor].retain(|other| other.control().id != id);
        self.publish_set(&inner, reactor);
        self.reclaim.free(Detached(queue));
        let mut starts = self.apply(&mut inner, conn, effects, None);
        if let Some(connected) = inner.connections.get_mut(&conn) {
            connected.announce_config();
        }
        starts.extend(self.reap(&mut inner, conn));
        drop(inner);
        self.open(starts);
    }

    fn views_wanted(&self, queue: QueueId) {
        let mut inner = self.lock();
        let Some((conn, _)) = inner.queues.get(&queue).copied() else { return };
        self.republish(&mut inner, |id, _| id == conn);
    }

    fn broken(&self, queue: QueueId) {
        let inner = self.lock();
        if let Some((conn, ring)) = inner.queues.get(&queue)
            && let Some(connected) = inner.connections.get(conn)
        {
            warn!(
                "controller {}: the guest made ring {ring} of front end {} invalid; it is not \
                 served until the guest resets the device",
                connected.controller_name, connected.number
            );
        }
    }
}

impl Connected {
    /// Counts a second of waiting for a pending reply. Warns if the wait is long, and closes the
    /// connection if it is too long.
    fn tick_reply(&mut self, limit_s: u64) {
        let Some(PendingReply { waited_s, warned, .. }) = &mut self.pending_reply else { return };
        // The first second was not a complete one.
        let whole_s = *waited_s;
        *waited_s += 1;
        let name = &self.controller_name;
        if whole_s >= limit_s {
            warn!(
                "controller {name}: I/O still in flight after {limit_s} s; closing the connection"
            );
            if let Some(conn) = &self.conn {
                conn.shut_down();
            }
            self.pending_reply = None;
        } else if whole_s >= WARN_S && !*warned {
            *warned = true;
            warn!(
                "controller {name}: the front end has been waiting {whole_s} s for its I/O to \
                 complete"
            );
        }
    }

    /// Counts a second of opening devices, with the same consequences.
    fn tick_opening(&mut self) {
        if !self.is_opening() {
            self.opening_s = 0;
            return;
        }
        let whole_s = self.opening_s;
        self.opening_s += 1;
        let name = &self.controller_name;
        if whole_s == WARN_S {
            warn!("controller {name}: its device is still being opened after {whole_s} s");
        } else if whole_s == OPEN_LIMIT_S {
            warn!(
                "controller {name}: its device did not open in {whole_s} s; closing the connection"
            );
            if let Some(conn) = &self.conn {
                conn.shut_down();
            }
        }
    }
}

/// A value to be dropped on the reclaim thread.
struct DropLater(Leftover);

impl Garbage for DropLater {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        drop(self.0);
        None
    }
}
