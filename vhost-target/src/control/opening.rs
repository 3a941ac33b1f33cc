//! Opens devices for rings, not on the event thread: a device may take long to open, or forever.
//!
//! Each connection has at most one thread that opens devices, for one ring after the other. If a
//! connection is closed while its thread opens a device, the thread is left behind. A controller
//! that has too many such threads accepts no new connection.

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

/// A handle of the thread that starts the opening threads, so that all of them have its rights.
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
struct NextOpening {
    ring: usize,
    id: QueueId,
    depth: u16,
    /// The device, and the front end's key.
    device: Arc<dyn Device>,
    key: u64,
    /// Counts the opening threads of a controller while it exists.
    _openers: Arc<()>,
}

impl Target {
    /// Starts the opening of devices for the rings of connections. Their queues are then attached.
    pub(super) fn open(&self, starts: Starts) {
        for conn in starts.0 {
            let mut inner = self.lock();
            let Some(connected) = inner.connections.get_mut(&conn) else { continue };
            if connected.to_open.is_empty() || std::mem::replace(&mut connected.opens, true) {
                continue;
            }
            drop(inner);
            if self.stepped {
                while self.open_next(conn) {}
            } else {
                // The receiving thread ends with the target.
                let _ = self.opener.0.send((Weak::clone(&self.weak), conn));
            }
        }
    }

    /// Opens all devices that a connection's rings need. Runs on a thread of its own.
    fn open_all(target: &Weak<Self>, conn: ConnId) {
        // No reference is kept while a device is being opened, so that the target can be dropped
        // meanwhile.
        while let Some(next) = target.upgrade().and_then(|target| target.next_to_open(conn)) {
            let NextOpening { ring, id, depth, device, key, _openers } = next;
            let opened = device.open_queue(key, ring, depth);
            let Some(target) = target.upgrade() else { return };
            target.opened(conn, ring, id, opened);
        }
    }

    fn open_next(&self, conn: ConnId) -> bool {
        let Some(NextOpening { ring, id, depth, device, key, .. }) = self.next_to_open(conn) else {
            return false;
        };
        self.opened(conn, ring, id, device.open_queue(key, ring, depth));
        true
    }

    /// Returns the next ring of a connection whose device has to be opened. `None`: the thread
    /// ends.
    fn next_to_open(&self, conn: ConnId) -> Option<NextOpening> {
        let mut inner = self.lock();
        loop {
            let Inner { controllers, connections, .. } = &mut *inner;
            let connected = connections.get_mut(&conn)?;
            let Some(ring) = connected.to_open.pop_front() else {
                connected.opens = false;
                return None;
            };
            let Some(&id) = connected.opening.get(&ring) else { continue };
            // The ring may have been reset since.
            if !connected.session.is_opening(ring) {
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
            let (key, openers) = (connected.session.device_key(), Arc::clone(&controller.openers));
            return Some(NextOpening { ring, id, depth, device, key, _openers: openers });
        }
    }

    /// Handles the failure to start a thread for a connection: its rings cannot start.
    fn cannot_open(&self, conn: ConnId, error: &io::Error) {
        let rings: Vec<(usize, QueueId)> = {
            let mut inner = self.lock();
            let Some(connected) = inner.connections.get_mut(&conn) else { return };
            connected.opens = false;
            let Connected { to_open, opening, .. } = connected;
            to_open.drain(..).filter_map(|ring| Some((ring, *opening.get(&ring)?))).collect()
        };
        for (ring, id) in rings {
            let error = io::Error::new(error.kind(), format!("cannot start a thread: {error}"));
            self.opened(conn, ring, id, Err(OpenError(Box::new(error))));
        }
    }
}

/// Returns the number of threads that open devices of a controller.
pub(super) fn openers(count: &Arc<()>) -> usize {
    Arc::strong_count(count) - 1
}

/// Returns whether a controller has so many stuck opening threads that it accepts no new
/// connection.
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
    /// Adds a ring to those whose device has to be opened. An earlier start of the ring, whose
    /// device may still be being opened with other parameters, has no effect any more.
    pub(super) fn add_opening(&mut self, ring: usize, id: QueueId) {
        self.opening.insert(ring, id);
        self.to_open.retain(|other| *other != ring);
        self.to_open.push_back(ring);
    }

    /// Returns whether a ring's device is being opened.
    pub(super) fn is_opening(&self) -> bool {
        self.opening.keys().any(|ring| self.session.is_opening(*ring))
    }
}
