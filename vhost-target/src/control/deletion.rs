//! The deletion of a controller: begun, and then finished or cancelled.

use std::sync::Arc;

use tracing::{info, warn};

use super::{Attached, Target};
use crate::controller::ControllerId;
use crate::error::Error;
use crate::transport::{ConnId, Transport};

/// The progress of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeleteProgress {
    /// The number of connected front ends.
    pub connected: usize,
    /// The number of closed connections with I/O in flight.
    pub draining: usize,
}

/// A deletion of a controller that has begun. The controller accepts no new connection. Dropping
/// this value cancels the deletion: the controller accepts connections again.
#[must_use = "dropping it cancels the deletion"]
#[derive(Debug)]
pub struct Deletion {
    target: Arc<Target>,
    name: String,
    id: ControllerId,
}

impl Target {
    /// Begins to delete a controller. With `force`, its connections are closed.
    ///
    /// # Errors
    /// The controller does not exist, or is being deleted.
    pub fn begin_delete(self: &Arc<Self>, name: &str, force: bool) -> Result<Deletion, Error> {
        let mut inner = self.lock();
        let controller = inner.controller(name)?;
        if std::mem::replace(&mut controller.deleting, true) {
            return Err(Error::Busy(name.to_owned()));
        }
        let id = controller.id;
        if force {
            let of_controller = inner.connections.values().filter(|c| c.controller == id);
            of_controller.filter_map(|c| c.conn.as_ref()).for_each(|conn| conn.shut_down());
        }
        Ok(Deletion { target: Arc::clone(self), name: name.to_owned(), id })
    }

    /// Returns whether this controller is being deleted.
    #[must_use]
    pub fn is_deleting(&self, name: &str) -> bool {
        self.lock().controllers.get(name).is_some_and(|c| c.deleting)
    }

    /// Removes all controllers, at the end of the program. Blocks in `transport`. Not for the
    /// control thread.
    pub fn remove_controllers(&self, transport: &dyn Transport) {
        let all: Vec<_> =
            self.lock().controllers.values().map(|c| (c.name.clone(), c.id)).collect();
        all.into_iter().for_each(|(name, id)| self.remove_controller(&name, id, transport));
    }

    fn remove_controller(&self, name: &str, id: ControllerId, transport: &dyn Transport) {
        let (socket, delayed) = match self.lock().controller(name) {
            Ok(controller) if controller.id == id => {
                (controller.socket.clone(), controller.delayed)
            }
            _ => return,
        };
        // Another process may have a socket at the path of one that was never opened.
        if !delayed {
            transport.unlisten(&socket);
        }
        // `unlisten` closes the remaining connections, and rte_vhost does not report that.
        let left: Vec<ConnId> = {
            let inner = self.lock();
            let of_controller = inner.connections.iter().filter(|(_, c)| c.controller == id);
            of_controller.map(|(conn, _)| *conn).collect()
        };
        left.into_iter().for_each(|conn| self.closed(conn));
        self.abandon_rings(name, id);
        self.lock().controllers.remove(name);
        info!("controller {name}: deleted");
        (self.changed)();
    }

    /// Makes the queues of a deleted controller's connections stop accessing their rings. After
    /// this returns, other queues may use these rings.
    fn abandon_rings(&self, name: &str, id: ControllerId) {
        let left: Vec<u64> = {
            let inner = self.lock();
            let of_controller = inner.connections.values().filter(|c| c.controller == id);
            let queues = of_controller.flat_map(|c| c.queues.iter().flatten());
            queues.map(|attached| self.abandon(attached)).collect()
        };
        let ios: u64 = left.iter().sum();
        if ios > 0 {
            warn!(
                "controller {name}: deleted with {ios} I/Os in flight, which may still write into \
                 guest memory and to the disk; the memory stays mapped until they complete"
            );
        }
        if !left.is_empty() && !self.settle() {
            warn!(
                "controller {name}: timed out waiting for the reactors to stop accessing the \
                 controller's rings"
            );
        }
    }

    /// Abandons the ring of a queue. Returns the number of I/Os that the queue has in flight.
    fn abandon(&self, attached: &Attached) -> u64 {
        attached.queue.control().abandon();
        self.reactors[attached.reactor].wake();
        attached.queue.control().inflight().into()
    }
}

impl Deletion {
    /// Returns what the deletion has to wait for.
    #[must_use]
    pub fn progress(&self) -> DeleteProgress {
        let inner = self.target.lock();
        let of_controller = || inner.connections.values().filter(|c| c.controller == self.id);
        let connected = of_controller().filter(|c| c.conn.is_some()).count();
        DeleteProgress { connected, draining: of_controller().count() - connected }
    }

    /// Finishes the deletion: closes the socket and removes the controller. The remaining
    /// connections drain in the background. Blocks in `transport`. Not for the control thread.
    pub fn finish(self, transport: &dyn Transport) {
        self.target.remove_controller(&self.name, self.id, transport);
    }
}

impl Drop for Deletion {
    /// Cancels the deletion, unless the controller was removed.
    fn drop(&mut self) {
        let cancelled = match self.target.lock().controller(&self.name) {
            Ok(controller) if controller.id == self.id => {
                controller.deleting = false;
                true
            }
            _ => false,
        };
        if cancelled {
            (self.target.changed)();
        }
    }
}
