//! The operator's side of the target: creates, deletes and lists controllers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use closer::Account;
use guest_memory::SLOTS_MAX;
use reactor::{Cause, Core, ReactorInfo, ticks_per_second};
use tracing::{info, warn};

use super::{Attached, Connected, Inner, Reactor, Target};
use crate::controller::{
    Controller, ControllerId, ControllerInfo, ControllerSpec, QueueInfo, SessionInfo, check_name,
};
use crate::device::{Device, DeviceChange};
use crate::error::Error;
use crate::transport::{ConnId, Offer, Transport};

/// Mappings that all connections of one controller may have together. Dirty logs and in-flight
/// areas are included, and earlier mappings that I/O in flight still uses or that are not unmapped
/// yet. The process has room for ten times as many.
const MAPPINGS_OF_CONTROLLER_MAX: usize = 3 * SLOTS_MAX;

/// A controller's socket that is to be opened.
struct Opening {
    name: String,
    socket: PathBuf,
    offer: Offer,
    account: Account,
}

impl Opening {
    fn of(controller: &Controller) -> Self {
        let config = controller.device.has_config_space();
        Self {
            name: controller.name.clone(),
            socket: controller.socket.clone(),
            offer: Offer { features: controller.features, config },
            account: controller.account.clone(),
        }
    }

    fn listen(self, transport: &dyn Transport) -> Result<(), Error> {
        let Self { name, socket, offer, account } = self;
        match transport.listen(&socket, offer, &account) {
            Ok(()) => info!("controller {name}: listening on {}", socket.display()),
            Err(e) => return Err(Error::Listen(socket, e)),
        }
        Ok(())
    }
}

impl Target {
    /// Creates a controller and opens its socket. Blocks in `transport`. Not for the control
    /// thread.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind then.
    pub fn create_controller(
        &self,
        spec: ControllerSpec,
        transport: &dyn Transport,
    ) -> Result<(), Error> {
        let name = spec.name.clone();
        let opening = self.insert_controller(spec, false)?;
        opening.listen(transport).inspect_err(|_| {
            self.lock().controllers.remove(&name);
        })
    }

    /// Creates a controller without a socket: [`Target::start_controller`] opens it. Until then no
    /// front end can connect, so its device can be completed first.
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind then.
    pub fn create_delayed_controller(&self, spec: ControllerSpec) -> Result<(), Error> {
        let name = spec.name.clone();
        self.insert_controller(spec, true)?;
        info!("controller {name}: created without a socket, which opens when it is started");
        Ok(())
    }

    /// Opens the socket of a controller that was created without one. Does nothing if the socket is
    /// open. Blocks in `transport`. Not for the control thread.
    ///
    /// # Errors
    /// [`Error::NoController`]; [`Error::Busy`] if the controller is being deleted;
    /// [`Error::Listen`]: the controller still waits to be started then.
    pub fn start_controller(&self, name: &str, transport: &dyn Transport) -> Result<(), Error> {
        let (id, opening) = {
            let mut inner = self.lock();
            let controller = inner.controller(name)?;
            if !controller.delayed {
                return Ok(());
            }
            if controller.deleting {
                return Err(Error::Busy(name.into()));
            }
            (controller.id, Opening::of(controller))
        };
        opening.listen(transport)?;
        if let Ok(controller) = self.lock().controller(name)
            && controller.id == id
        {
            controller.delayed = false;
        }
        Ok(())
    }

    fn insert_controller(&self, spec: ControllerSpec, delayed: bool) -> Result<Opening, Error> {
        check_name(&spec.name, &spec.socket)?;
        let cores = self.choose_cores(spec.cores.as_deref())?;
        let mut inner = self.lock();
        if inner.controllers.contains_key(&spec.name) {
            return Err(Error::Exists(spec.name));
        }
        let number = inner.controllers_made;
        inner.controllers_made += 1;
        let unmapper = self.unmapper.limited(MAPPINGS_OF_CONTROLLER_MAX);
        let id = ControllerId(inner.id());
        let account = inner.account(&spec.name);
        let mut controller = Controller::new(id, number, spec, cores, unmapper, account);
        controller.delayed = delayed;
        let opening = Opening::of(&controller);
        inner.controllers.insert(controller.name.clone(), controller);
        Ok(opening)
    }

    pub(super) fn choose_cores(&self, wanted: Option<&[Core]>) -> Result<Vec<Core>, Error> {
        let mut all = self.cores();
        all.sort_unstable();
        let Some(wanted) = wanted else { return Ok(all) };
        if wanted.is_empty() || wanted.iter().any(|core| !all.contains(core)) {
            return Err(Error::Cpumask);
        }
        Ok(wanted.to_vec())
    }

    /// Returns the id of the controller that has this name now. The id is never reused.
    #[must_use]
    pub fn controller_id(&self, name: &str) -> Option<u64> {
        self.lock().controllers.get(name).map(|controller| controller.id.0)
    }

    /// Sets interrupt coalescing.
    ///
    /// # Errors
    /// The controller does not exist, or a value is out of range.
    pub fn set_coalescing(&self, name: &str, delay_us: u32, iops: u32) -> Result<(), Error> {
        self.lock().controller(name)?.set_coalescing(delay_us, iops)?;
        // A reactor may sleep until a time that follows from the previous values.
        self.reactors.iter().for_each(|reactor| reactor.wake());
        Ok(())
    }

    /// Returns all controllers, by name.
    #[must_use]
    pub fn controllers(&self) -> Vec<ControllerInfo> {
        let (inner, cores) = (self.lock(), self.cores());
        // Closed connections of a deleted controller of the same name are listed here too: the
        // operator has to wait for them.
        let mut sessions: HashMap<&str, Vec<SessionInfo>> = HashMap::new();
        for connected in inner.connections.values() {
            let of_name = sessions.entry(&connected.controller_name).or_default();
            of_name.push(session_info(connected, &cores));
        }
        let mut sessions_of = |name: &str| sessions.remove(name).unwrap_or_default();
        inner.controllers.values().map(|c| controller_info(c, sessions_of(&c.name))).collect()
    }

    /// Returns the controller of this name.
    #[must_use]
    pub fn controller(&self, name: &str) -> Option<ControllerInfo> {
        let (inner, cores) = (self.lock(), self.cores());
        let controller = inner.controllers.get(name)?;
        let sessions = inner.connections.values().filter(|c| c.controller_name == name);
        Some(controller_info(controller, sessions.map(|c| session_info(c, &cores)).collect()))
    }

    /// Returns the closed connections that still have I/O in flight, including those of deleted
    /// controllers.
    #[must_use]
    pub fn left_behind(&self) -> Vec<SessionInfo> {
        let (inner, cores) = (self.lock(), self.cores());
        let closed = inner.connections.values().filter(|c| c.conn.is_none());
        closed.map(|c| session_info(c, &cores)).collect()
    }

    /// Returns the number of these connections, of their I/Os in flight, and of their bytes of
    /// memory.
    #[must_use]
    pub fn quarantine(&self) -> (usize, u64, u64) {
        self.left_behind().iter().fold((0, 0, 0), |(n, ios, bytes), s| {
            (n + 1, ios + s.inflight, bytes + s.quarantined_bytes)
        })
    }

    /// Returns each reactor's longest poll iteration so far in microseconds, and what happened in
    /// it. With `reset`, the next call covers the time after this one.
    #[must_use]
    pub fn longest_iterations(&self, reset: bool) -> Vec<(ReactorInfo, f64, Vec<Cause>)> {
        let longest_of = |reactor: &Arc<Reactor>| {
            let (ticks, causes) = reactor.longest_iteration(reset);
            (reactor.info(), ticks as f64 * 1e6 / ticks_per_second() as f64, causes)
        };
        self.reactors.iter().map(longest_of).collect()
    }

    /// Returns information about the reactors.
    #[must_use]
    pub fn reactors(&self) -> Vec<ReactorInfo> {
        let inner = self.lock();
        let with_queues = |(reactor, queues): (&Arc<Reactor>, &Vec<_>)| ReactorInfo {
            queues: queues.len(),
            ..reactor.info()
        };
        self.reactors.iter().zip(&inner.attached).map(with_queues).collect()
    }

    /// Applies changes of devices: reactors get new views, and guests are notified. `change`
    /// returns the change of a controller's device. It is called under a lock, so it must not wait
    /// or call the target.
    ///
    /// A guest that cannot be notified of a new configuration space now is notified later.
    pub fn update_devices(&self, mut change: impl FnMut(&Arc<dyn Device>) -> DeviceChange) {
        let mut inner = self.lock();
        let (mut changed, mut config, mut storage) = (Vec::new(), Vec::new(), Vec::new());
        for controller in inner.controllers.values_mut() {
            match change(&controller.device) {
                DeviceChange::None => continue,
                DeviceChange::View => {}
                DeviceChange::Storage => storage.push((controller.id, controller.device.storage())),
                DeviceChange::Removed => {
                    warn!("controller {}: its bdev was removed", controller.name);
                }
                DeviceChange::Config => {
                    controller.config_changed = true;
                    config.push(controller.id);
                }
            }
            changed.push(controller.id);
        }
        for (id, storage) in storage {
            // The I/O in flight of a closed connection uses what the connection has used.
            let open = |c: &&mut Connected| c.controller == id && c.conn.is_some();
            inner.connections.values_mut().filter(open).for_each(|c| {
                c.change_storage(storage.clone(), &self.granted);
            });
        }
        self.republish(&mut inner, |_, connected| changed.contains(&connected.controller));
        for connected in inner.connections.values_mut() {
            if config.contains(&connected.controller) {
                connected.session.config_changed();
                connected.announce_config();
            }
        }
    }

    /// Gives the rings of the connections that `which` selects new views.
    pub(super) fn republish(&self, inner: &mut Inner, which: impl Fn(ConnId, &Connected) -> bool) {
        let conns = inner.connections.iter().filter(|(id, c)| which(**id, c));
        let effects: Vec<_> =
            conns.map(|(id, c)| (*id, c.session.publish_where(|_| true))).collect();
        for (conn, effects) in effects {
            // These effects only publish views. No ring starts.
            let _ = self.apply(inner, conn, effects, None);
        }
    }
}

fn controller_info(controller: &Controller, sessions: Vec<SessionInfo>) -> ControllerInfo {
    ControllerInfo {
        name: controller.name.clone(),
        number: controller.number,
        made_ticks: controller.made_ticks,
        cores: controller.cores.clone(),
        delay_base_us: controller.delay_base_us,
        iops_threshold: controller.iops_threshold,
        socket: controller.socket.clone(),
        packed_ring: controller.packed_ring,
        delayed: controller.delayed,
        device: Arc::clone(&controller.device),
        deleting: controller.deleting,
        fds: controller.account.open(),
        fds_closing: controller.account.waiting(),
        fds_stuck: controller.account.is_stuck(),
        sessions,
    }
}

/// `cores`: the cores of the reactors.
fn session_info(connected: &Connected, cores: &[Core]) -> SessionInfo {
    let place = |(ring, attached): (usize, &Option<Attached>)| {
        let attached = attached.as_ref()?;
        let core = cores[attached.reactor];
        Some(QueueInfo { ring, core, inflight: attached.queue.control().inflight() })
    };
    let places = connected.queues.iter().enumerate().filter_map(place).collect();
    let queues = || connected.queues.iter().flatten().map(|attached| attached.queue.control());
    let inflight = queues().map(|queue| u64::from(queue.inflight())).sum();
    let mut quarantined_bytes = queues().map(|queue| queue.quarantined_bytes()).sum();
    if connected.conn.is_none() && inflight > 0 {
        quarantined_bytes += connected.session.memory().map_or(0, |memory| memory.size_bytes());
    }
    let (requests, errors) = queues()
        .map(|queue| queue.requests())
        .fold(connected.past_requests, |(r, e), q| (r + q.0, e + q.1));
    SessionInfo {
        vid: connected.vid,
        id: connected.number,
        phase: connected.session.phase(),
        rings: connected.session.rings().len(),
        inflight,
        quarantined_bytes,
        requests,
        errors,
        queues: places,
    }
}
