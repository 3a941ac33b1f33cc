//! Opens devices for rings, off the event thread: a device may take long to open, or never end to.
//!
//! Each connection has at most one thread that opens, for one ring after the other. A connection that
//! ends leaves its thread behind, if that is in the middle of opening; a controller that has too many
//! such threads takes no new connection.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;

use tracing::warn;

use super::connections::CONNECTIONS_MAX;
use super::rings::Starts;
use super::{Connected, Inner, Target};
use crate::device::{Device, OpenError};
use crate::queue::{DEPTH_MAX, QueueId};
use crate::transport::ConnId;

/// A handle on the thread that starts the ones that open, so that they all have its rights.
#[derive(Debug)]
pub(super) struct Opener(Sender<(Weak<Target>, ConnId)>);

impl Opener {
    /// Starts the thread, which ends when the handle is dropped.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, requests) = channel::<(Weak<Target>, ConnId)>();
        thread::Builder::new().name("vhost-open".into()).spawn(move || {
            for (target, conn) in requests {
                let opens = Weak::clone(&target);
                let started = thread::Builder::new()
                    .name("vhost-open-dev".into())
                    .spawn(move || Target::open_all(&opens, conn));
                if let (Err(e), Some(target)) = (started, target.upgrade()) {
                    target.cannot_open(conn, &e);
                }
            }
        })?;
        Ok(Self(sender))
    }
}

/// A ring whose device is to be opened.
struct Next {
    ring: usize,
    id: QueueId,
    depth: u16,
    device: Arc<dyn Device>,
    /// Counts the threads of a controller that open, while it is kept.
    _openers: Arc<()>,
}

impl Target {
    /// Has the devices of rings opened, and their queues attached then.
    pub(super) fn open(&self, starts: Starts) {
        for (conn, ring) in starts.0 {
            let mut inner = self.lock();
            let id = QueueId(inner.id());
            let Some(connected) = inner.connections.get_mut(&conn) else { continue };
            connected.opening.insert(ring, id);
            connected.to_open.push_back((ring, id));
            if std::mem::replace(&mut connected.opens, true) {
                continue;
            }
            drop(inner);
            if self.stepped {
                while self.open_next(conn) {}
            } else {
                // Its thread ends with the target.
                let _ = self.opener.0.send((Weak::clone(&self.weak), conn));
            }
        }
    }

    /// Opens what a connection has to open, on a thread of its own.
    fn open_all(target: &Weak<Self>, conn: ConnId) {
        // Not kept while a device is being opened: the target can be dropped meanwhile.
        while let Some(next) = target.upgrade().and_then(|target| target.next_to_open(conn)) {
            let Next { ring, id, depth, device, _openers } = next;
            let opened = device.open_queue(ring, depth);
            let Some(target) = target.upgrade() else { return };
            target.opened(conn, ring, id, opened);
        }
    }

    fn open_next(&self, conn: ConnId) -> bool {
        let Some(Next { ring, id, depth, device, .. }) = self.next_to_open(conn) else {
            return false;
        };
        self.opened(conn, ring, id, device.open_queue(ring, depth));
        true
    }

    /// The next ring of a connection whose device is to be opened. `None`: its thread ends.
    fn next_to_open(&self, conn: ConnId) -> Option<Next> {
        let mut inner = self.lock();
        loop {
            let Inner { controllers, connections, .. } = &mut *inner;
            let connected = connections.get_mut(&conn)?;
            let Some((ring, id)) = connected.to_open.pop_front() else {
                connected.opens = false;
                return None;
            };
            // It may have been stopped or reset since.
            if connected.opening.get(&ring) != Some(&id) || !connected.session.is_opening(ring) {
                continue;
            }
            let controller = controllers.get(&connected.controller_name);
            let controller = controller.filter(|c| c.id == connected.controller);
            let Some(controller) = controller else {
                connected.session.start_failed(ring);
                continue;
            };
            let depth = connected.session.ring(ring).num.min(DEPTH_MAX);
            let device = Arc::clone(&controller.device);
            let openers = Arc::clone(&controller.openers);
            return Some(Next { ring, id, depth, device, _openers: openers });
        }
    }

    /// No thread could be started to open a connection's devices.
    fn cannot_open(&self, conn: ConnId, error: &io::Error) {
        let rings: Vec<(usize, QueueId)> = {
            let mut inner = self.lock();
            let Some(connected) = inner.connections.get_mut(&conn) else { return };
            connected.opens = false;
            connected.to_open.drain(..).collect()
        };
        for (ring, id) in rings {
            let error = io::Error::new(error.kind(), format!("cannot start a thread: {error}"));
            self.opened(conn, ring, id, Err(OpenError(Box::new(error))));
        }
    }
}

/// Threads that open devices of a controller.
pub(super) fn openers(count: &Arc<()>) -> usize {
    Arc::strong_count(count) - 1
}

/// Whether a controller has so many openings that never end that it takes no new connection.
pub(super) fn too_many(count: &Arc<()>, name: &str) -> bool {
    let stuck = openers(count);
    if stuck >= CONNECTIONS_MAX {
        warn!(
            "controller {name}: refused a front end: {stuck} threads are still opening its device"
        );
    }
    stuck >= CONNECTIONS_MAX
}

impl Connected {
    /// Rings whose device is being opened.
    pub(super) fn is_opening(&self) -> bool {
        self.opening.keys().any(|ring| self.session.is_opening(*ring))
    }
}
