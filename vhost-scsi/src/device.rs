//! The virtio-scsi device of a controller, on the control side.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::{Bdev, UserCounts};
use served_bdev::{is_limited, storage_use, uses};
use tracing::warn;
use vhost_target::Target;
use vhost_target::device::{
    Device, DeviceChange, Negotiated, OpenError, Opened, OpenedQueue, StorageUse,
};
use vhost_target::device_queue::DeviceView;
use vhost_target::session::{VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_scsi::{
    VIRTIO_SCSI_F_CHANGE, VIRTIO_SCSI_F_HOTPLUG, VIRTIO_SCSI_F_INOUT,
};

use crate::control_queue::ControlQueue;
use crate::disk::Disk;
use crate::event_queue::EventQueue;
use crate::job::CHUNK_BYTES;
use crate::request_queue::RequestQueue;
use crate::session::{Arrival, Ends, Event, QueueLink, Session};
use crate::slots::{AddError, RemoveError, Slot, State, TargetInfo};
use crate::target::{FRONT_ENDS_MAX, ScsiTarget, TARGETS_MAX, nexus};
use crate::unit::Units;
use crate::view::{ScsiView, Shown, bits};

/// The virtqueues that are not request queues (virtio 1.2, section 5.6.2).
const CONTROL_QUEUE: usize = 0;
const EVENT_QUEUE: usize = 1;

/// A virtio-scsi device.
#[derive(Debug)]
pub struct Scsi {
    /// The name of its controller, for the log.
    name: String,
    units: Arc<Units>,
    /// Identifies the controller in the numbers of nexuses. Never reused.
    number: u64,
    state: Mutex<State>,
}

impl Scsi {
    /// Creates a device without targets. `name`: that of its controller, for the log.
    #[must_use]
    pub fn new(name: &str, units: &Arc<Units>) -> Arc<Self> {
        static CONTROLLERS: AtomicU64 = AtomicU64::new(0);
        let number = CONTROLLERS.fetch_add(1, Ordering::Relaxed);
        let (name, units) = (name.into(), Arc::clone(units));
        Arc::new(Self { name, units, number, state: Mutex::default() })
    }

    /// Returns the device of a controller, if it is a virtio-scsi device.
    #[must_use]
    pub fn of(device: &Arc<dyn Device>) -> Option<&Self> {
        (&**device as &dyn Any).downcast_ref()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the targets that are not being removed, by number.
    #[must_use]
    pub fn targets(&self) -> Vec<TargetInfo> {
        let state = self.lock();
        let used = state.slots.iter().filter_map(Slot::used);
        used.map(|target| TargetInfo {
            number: target.number,
            device: target.device.number,
            bdev: target.bdev().name().to_owned(),
            user: target.user.id(),
            counts: target.user.counts(),
        })
        .collect()
    }

    /// Returns what its queues have done for all targets, including removed ones up to their
    /// removal.
    #[must_use]
    pub fn counts(&self) -> UserCounts {
        self.lock().counts()
    }

    /// Returns whether no queue uses a removed target any more, and its number is free.
    #[must_use]
    pub fn is_free(&self, number: u8) -> bool {
        self.lock().slots.get(usize::from(number)).is_some_and(Slot::is_empty)
    }

    /// Returns whether a target's bdev is this one or is built on it.
    #[must_use]
    pub fn uses(&self, bdev: &Arc<dyn Bdev>) -> bool {
        let targets: Vec<_> = self.lock().slots.iter().filter_map(Slot::used).cloned().collect();
        targets.iter().any(|target| uses(target.bdev(), bdev))
    }

    /// Adds a target that shows `bdev`. `number`: `None` takes the first free one. Opens the bdev
    /// for all queues of running guests, which may take long. The guests are told. Returns the
    /// number.
    ///
    /// # Errors
    /// See [`AddError`]. No target was added then.
    pub fn add_target(
        &self,
        target: &Target,
        number: Option<u8>,
        bdev: &Arc<dyn Bdev>,
    ) -> Result<u8, AddError> {
        if bdev.block_size() as usize > CHUNK_BYTES {
            return Err(AddError::Blocks(bdev.name().into()));
        }
        // All of them, with their queues, under the lock under which `open_request_queue` adds a
        // queue. They are dropped last.
        let (added, sessions, queues) = {
            let mut state = self.lock();
            let number = state.free_number(number)?;
            let device = self.units.device().ok_or(AddError::NoSpace)?;
            let added = ScsiTarget::new(self.number, number, device, self.units.of(bdev));
            // From now on, new queues open it themselves.
            state.slots[usize::from(number)] = Slot::Opening(Arc::clone(&added));
            let sessions = state.sessions();
            let queues: Vec<_> = sessions.iter().flat_map(|s| s.queues().clone()).collect();
            (added, sessions, queues)
        };
        let number = added.number;
        for queue in queues {
            if let Err(e) = self.open_for(&added, &queue) {
                drop(self.take_back(number));
                return Err(e.into());
            }
        }
        {
            let mut state = self.lock();
            let slot = &mut state.slots[usize::from(number)];
            if !slot.opened().is_some_and(|target| Arc::ptr_eq(target, &added)) {
                return Err(AddError::Removed(bdev.name().into()));
            }
            // The bdev may have been resized since.
            added.unit.resized();
            *slot = Slot::Used(added);
        }
        self.changed(target);
        drop(sessions);
        Ok(number)
    }

    /// Begins to remove a target: its guests are told, and new commands are refused. It is removed
    /// when its commands have been answered: see [`Scsi::is_free`].
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn remove_target(&self, target: &Target, number: u8) -> Result<(), RemoveError> {
        if usize::from(number) >= TARGETS_MAX {
            return Err(RemoveError::Number);
        }
        drop(self.take_back(number).ok_or(RemoveError::Absent(number))?);
        self.changed(target);
        Ok(())
    }

    /// Removes a target, and takes it back from the queues that have not taken it yet. To drop what
    /// it returns may take long. `None`: there is no such target.
    fn take_back(&self, number: u8) -> Option<TakenBack> {
        if !self.lock().remove(number) {
            return None;
        }
        let sessions = self.lock().sessions();
        let take = |queue: &Arc<QueueLink>| queue.arrivals[usize::from(number)].take();
        let of = |session: &Arc<Session>| -> Vec<_> {
            session.queues().iter().filter_map(take).collect()
        };
        let arrivals = sessions.iter().flat_map(of).collect();
        Some(TakenBack { _arrivals: arrivals, _sessions: sessions })
    }

    /// Opens all targets for a new request queue of the front end `key`, with at most `depth`
    /// requests in flight. A target that it cannot open is not shown to the guest.
    ///
    /// # Errors
    /// The front end is gone, or the system has no fd left.
    pub fn open_request_queue(&self, key: u64, depth: u16) -> Result<RequestQueue, OpenError> {
        let link = QueueLink::new(depth).map_err(|e| OpenError(Box::new(e)))?;
        // Both under the lock under which `add_target` fills a slot and lists the queues: exactly
        // one of the two functions opens a target for this queue.
        let sessions;
        let (session, targets): (_, Vec<_>) = {
            let state = self.lock();
            sessions = state.sessions();
            let session = sessions.iter().find(|session| session.key == key);
            let session = session.ok_or_else(|| OpenError("the front end is gone".into()))?;
            session.add_queue(&link);
            let targets = state.slots.iter().filter_map(Slot::opened).cloned().collect();
            (session, targets)
        };
        for target in targets {
            if let Err(e) = self.open_for(&target, &link) {
                // The other targets are served.
                session.hide(target.number);
                let (name, number) = (&self.name, target.number);
                warn!("controller {name}: SCSI target {number} is not shown to a guest: {e}");
            }
        }
        Ok(RequestQueue::new(link))
    }

    /// Opens a target for a queue, which takes it when it adopts a view that shows it.
    fn open_for(&self, target: &Arc<ScsiTarget>, queue: &QueueLink) -> Result<(), bdev::Error> {
        let disk = Box::new(Disk::open(target, queue.depth, &queue.wake)?);
        let place = &queue.arrivals[usize::from(target.number)];
        // The previous target of this number was taken back before the number became free.
        drop(place.swap(Some(disk)));
        // If the target has been removed, either this or `take_back` sees the disk.
        let wanted = {
            let slot = &self.lock().slots[usize::from(target.number)];
            slot.opened().is_some_and(|opened| Arc::ptr_eq(opened, target))
        };
        if !wanted {
            drop(place.take());
        }
        Ok(())
    }

    /// Gives the queues of all front ends new views.
    fn changed(&self, target: &Target) {
        target.update_devices(|device| match Self::of(device) {
            Some(scsi) if scsi.number == self.number => DeviceChange::Storage,
            _ => DeviceChange::None,
        });
    }

    /// Returns the targets that a front end is shown: those whose leases are held.
    fn shown(&self, session: &Session) -> [Option<Shown>; TARGETS_MAX] {
        let state = self.lock();
        std::array::from_fn(|n| {
            let target = state.slots[n].used()?;
            let leases = storage_of(target).leases;
            let shown = leases.iter().all(|lease| lease.is_held()) && !session.hides(target.number);
            shown.then(|| Shown {
                target: Arc::downgrade(target),
                limited: is_limited(&**target.bdev()),
            })
        })
    }

    /// Returns the targets that are open or being opened.
    fn opened_targets(&self) -> Vec<Arc<ScsiTarget>> {
        self.lock().slots.iter().filter_map(Slot::opened).cloned().collect()
    }

    /// To be called when a removed target's number has become free: the leases of its bdev are
    /// given up.
    pub fn target_released(&self, target: &Target) {
        self.changed(target);
    }
}

/// What was taken back from queues. To drop it may take long.
struct TakenBack {
    _arrivals: Vec<Arrival>,
    _sessions: Vec<Arc<Session>>,
}

/// Returns the storage of a target's bdev.
fn storage_of(target: &ScsiTarget) -> StorageUse {
    storage_use(target.bdev(), !target.bdev().features().read_only)
}

/// Removes a bdev from all controllers that show it.
pub fn remove_bdev(target: &Target, bdev: &Arc<dyn Bdev>) {
    let (mut unused, mut used) = (vec![], vec![]);
    target.update_devices(|device| {
        let Some(scsi) = Scsi::of(device) else { return DeviceChange::None };
        let (targets, mut change) = (scsi.opened_targets(), DeviceChange::None);
        for target in targets.iter().filter(|target| Arc::ptr_eq(target.bdev(), bdev)) {
            let number = target.number;
            unused.extend(scsi.take_back(number));
            let name = &scsi.name;
            warn!("controller {name}: removing SCSI target {number}: bdev {} is gone", bdev.name());
            change = DeviceChange::Storage;
        }
        used.push(targets);
        change
    });
    // Not under the target's lock: closing a channel may take long.
    drop((unused, used));
}

/// Notifies guests of a bdev's new size: with an event, and with a unit attention.
pub fn bdev_resized(target: &Target, bdev: &Arc<dyn Bdev>) {
    let mut used = vec![];
    target.update_devices(|device| {
        let Some(scsi) = Scsi::of(device) else { return DeviceChange::None };
        let targets = scsi.opened_targets();
        let resized = targets.iter().filter(|target| Arc::ptr_eq(target.bdev(), bdev));
        let (sessions, mut change) = (scsi.lock().sessions(), DeviceChange::None);
        for resized in resized {
            resized.unit.resized();
            sessions.iter().for_each(|session| session.post(Event::Resized, resized.number));
            change = DeviceChange::View;
        }
        used.push((targets, sessions));
        change
    });
    // Not under the target's lock.
    drop(used);
}

/// Notifies reactors that rate limits of a bdev were set or removed.
pub fn limits_changed(target: &Target, bdev: &Arc<dyn Bdev>) {
    target.update_devices(|device| match Scsi::of(device) {
        Some(scsi) if scsi.uses(bdev) => DeviceChange::View,
        _ => DeviceChange::None,
    });
}

impl Device for Scsi {
    /// SPDK's features, and EVENT_IDX.
    fn features(&self) -> u64 {
        [
            VIRTIO_SCSI_F_INOUT,
            VIRTIO_SCSI_F_HOTPLUG,
            VIRTIO_SCSI_F_CHANGE,
            VIRTIO_F_ANY_LAYOUT,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VHOST_F_LOG_ALL,
            VHOST_USER_F_PROTOCOL_FEATURES,
            VIRTIO_F_VERSION_1,
        ]
        .into_iter()
        .fold(0, |bits, bit| bits | 1 << bit)
    }

    /// The front end has the configuration space. QEMU warns of a back end that offers it.
    fn has_config_space(&self) -> bool {
        false
    }

    fn connect(self: Arc<Self>) -> Box<dyn Negotiated> {
        let session = self.lock().connect(self.number);
        Box::new(ScsiSession { device: self, session })
    }

    fn storage(&self) -> StorageUse {
        let state = self.lock();
        let mut all = StorageUse::default();
        for target in state.slots.iter().filter_map(Slot::accessed) {
            let StorageUse { storages, leases, writes } = storage_of(&target);
            all.storages.extend(storages);
            all.leases.extend(leases);
            all.writes |= writes;
        }
        all
    }

    fn open_queue(
        self: Arc<Self>,
        key: u64,
        index: usize,
        depth: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError> {
        match index {
            CONTROL_QUEUE => return Ok(Box::new(Opened(ControlQueue::new(depth)))),
            EVENT_QUEUE => return Ok(Box::new(Opened(EventQueue::default()))),
            _ => {}
        }
        Ok(Box::new(Opened(self.open_request_queue(key, depth)?)))
    }
}

/// Its front ends cannot come back: their registrations end.
impl Drop for Scsi {
    fn drop(&mut self) {
        for unit in self.units.all() {
            let mut state = unit.lock();
            for front_end in 0..FRONT_ENDS_MAX {
                for target in (0_u8..).take(TARGETS_MAX) {
                    let nexus = nexus(self.number, front_end, target);
                    state.logical_unit.nexus_removed(nexus);
                }
            }
        }
    }
}

/// The state of one front end's negotiation.
#[derive(Debug)]
struct ScsiSession {
    device: Arc<Scsi>,
    session: Arc<Session>,
}

impl ScsiSession {
    /// The driver has ended: RESERVE ends with it. Registrations for persistent reservations stay.
    fn nexus_lost(&self) {
        for target in self.device.opened_targets() {
            let nexus = self.session.nexus(target.number);
            target.unit.lock().logical_unit.nexus_lost(nexus);
        }
    }

    /// Does the control side's part of a task management function that has begun: resets the
    /// logical unit, or the nexus. Commands that come before the function's end do not reach the
    /// unit, so its unit attention is for those after.
    fn apply_new_barrier(&self) {
        let Some(barrier) = self.session.new_barrier() else { return };
        let targets = self.device.opened_targets();
        let Some(target) = targets.iter().find(|target| target.number == barrier.target) else {
            return;
        };
        match barrier.ends {
            Ends::Reset => target.unit.lock().logical_unit.reset(),
            Ends::NexusReset => {
                let nexus = self.session.nexus(target.number);
                target.unit.lock().logical_unit.nexus_reset(nexus);
            }
            Ends::Nothing | Ends::Aborted => {}
        }
    }
}

/// The connection is gone, and its I/O has ended.
impl Drop for ScsiSession {
    fn drop(&mut self) {
        self.nexus_lost();
        self.device.lock().disconnect(&self.session);
    }
}

impl Negotiated for ScsiSession {
    fn key(&self) -> u64 {
        self.session.key
    }

    fn set_features(&mut self, features: u64) {
        self.nexus_lost();
        self.session.set_features(features);
    }

    fn read_config(&self) -> Vec<u8> {
        vec![]
    }

    fn write_config(&mut self, _: u32, _: &[u8]) -> bool {
        false
    }

    fn view(&self) -> Option<DeviceView> {
        self.apply_new_barrier();
        let targets = self.device.shown(&self.session);
        self.session.show(bits(&targets));
        Some(ScsiView::erased(targets, &self.session))
    }
}
