//! The control side of a kind of virtio device.
//!
//! A [`Device`] is the device of one controller. [`Negotiated`] is what one front end has
//! negotiated with it. [`OpenedQueue`] creates a queue of an opened device. The reactor side is
//! [`crate::device_queue`].

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use virtqueue::QUEUES_MAX;

use crate::device_queue::{DeviceQueue, DeviceView};
use crate::queue::{NewQueue, Queue, StartError, TargetQueue};

/// A virtio device that a controller offers to front ends.
///
/// The implementer guarantees: no method but [`Device::open_queue`] waits or makes a system call
/// that can wait, and feature bits do not change. It may rely on being called only by threads of
/// the control side.
pub trait Device: Any + Send + Sync + fmt::Debug {
    /// Returns the offered feature bits, including those of rings and vhost. The controller adds
    /// VIRTIO_F_RING_PACKED.
    fn features(&self) -> u64;

    /// Returns the number of virtqueues, at most [`QUEUES_MAX`].
    fn queues(&self) -> u16 {
        QUEUES_MAX
    }

    /// Returns whether front ends get the configuration space from this target. If not, they have
    /// one of their own.
    fn has_config_space(&self) -> bool {
        true
    }

    /// Returns the state of a new connection.
    fn connect(self: Arc<Self>) -> Box<dyn Negotiated>;

    /// Returns the storage that the device's requests access.
    fn storage(&self) -> StorageUse {
        StorageUse::default()
    }

    /// Opens the device for virtqueue `index` of the front end `key` ([`Negotiated::key`]). The
    /// queue has at most `depth` requests at a time. May take long: it is called on a thread for
    /// which no other thread waits.
    ///
    /// # Errors
    /// The device's error. The connection is then closed.
    fn open_queue(
        self: Arc<Self>,
        key: u64,
        index: usize,
        depth: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError>;
}

/// The reason why a device could not be opened for a queue.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct OpenError(#[from] pub Box<dyn std::error::Error + Send + Sync>);

/// The state of one front end: what it has negotiated with a device, and what its driver has set.
///
/// The implementer guarantees that no method waits.
pub trait Negotiated: Send + Sync + fmt::Debug {
    /// Identifies the front end to [`Device::open_queue`], if the device tells front ends apart.
    fn key(&self) -> u64 {
        0
    }

    /// Sets the feature bits that the driver has accepted; 0 after a reset.
    fn set_features(&mut self, features: u64);

    /// Returns the device's configuration space.
    fn read_config(&self) -> Vec<u8>;

    /// Applies a write of the driver to the configuration space. Returns whether queues need a new
    /// view.
    fn write_config(&mut self, offset: u32, contents: &[u8]) -> bool;

    /// Returns what the connection's queues need to know of the device: a [`DeviceView`]. `None` if
    /// the device cannot serve requests any more. The engine then refuses requests, and releases
    /// the device when none is in flight.
    fn view(&self) -> Option<DeviceView>;
}

/// A change of a device, for [`crate::Target::update_devices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChange {
    /// No change.
    None,
    /// What its queues need to know of it: they get a new view.
    View,
    /// Its storage was removed: requests are refused from now on.
    Removed,
    /// Its configuration space has changed: guests are notified.
    Config,
    /// The storage that its requests access has changed: leases are used and released, and queues
    /// get a new view, also when a lease has become held.
    Storage,
}

/// A device that was opened for a queue.
pub trait OpenedQueue: Send {
    /// Creates the queue. Reads the ring and the in-flight area, and does not wait.
    ///
    /// # Errors
    /// The ring or the area is invalid.
    fn start(self: Box<Self>, new: NewQueue<'_>) -> Result<Arc<dyn TargetQueue>, StartError>;
}

/// A device that was opened for a queue.
#[derive(Debug)]
pub struct Opened<D>(pub D);

impl<D: DeviceQueue> OpenedQueue for Opened<D> {
    fn start(self: Box<Self>, new: NewQueue<'_>) -> Result<Arc<dyn TargetQueue>, StartError> {
        Ok(Queue::new(self.0, new)?)
    }
}

/// The storage that a device's requests access, for the detection of conflicting I/O.
#[derive(Clone, Debug, Default)]
pub struct StorageUse {
    /// The places that store the data. Two devices whose places overlap may access the same data.
    pub storages: Vec<StorageId>,
    /// The leases that exclude other processes while rings use the storage.
    pub leases: Vec<Arc<dyn Lease>>,
    /// Whether the guest may write.
    pub writes: bool,
}

/// A place where data is stored: a range of something that `kind` and `number` identify.
#[derive(Clone, Debug)]
pub struct StorageId {
    /// The kind of `number`.
    pub kind: &'static str,
    /// The number.
    pub number: (u64, u64),
    /// The bytes of it that the device may access.
    pub bytes: Range<u64>,
    /// Keeps `number` from being used for something else.
    pub keeps: Option<Arc<dyn Any + Send + Sync>>,
}

impl StorageId {
    /// Returns whether an access to one may be an access to the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        (self.kind, self.number) == (other.kind, other.number)
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}

/// The callback of a [`Lease`] that has become held. Called on any thread, with no lock held.
pub type Granted = Arc<dyn Fn() + Send + Sync>;

/// Excludes other processes from a storage while rings use it.
///
/// The user adds itself first, waits until the lease is held, and removes itself when all of its
/// I/O has ended. The implementer guarantees: no method waits or makes a system call that can wait,
/// and `granted` is called after the lease has become held, unless its user was removed.
pub trait Lease: fmt::Debug + Send + Sync {
    /// Adds a user. Returns whether the lease is held. If it is not, `granted` is called when it
    /// is.
    fn add_user(&self, granted: &Granted) -> bool;
    /// Removes a user. When the last user is removed, the storage is released.
    fn remove_user(&self);
    /// Returns whether I/O may start.
    fn is_held(&self) -> bool;
}
