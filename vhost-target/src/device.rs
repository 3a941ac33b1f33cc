//! What a kind of virtio device is to the target: the control side of the device seam.
//!
//! A [`Device`] is the control side: one for each controller. [`Negotiated`] is what one front end has
//! negotiated with it. [`OpenedQueue`] makes a queue of an opened device. The reactor side is
//! [`crate::device_queue`].

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use virtqueue::QUEUES_MAX;

use crate::device_queue::{DeviceQueue, DeviceView};
use crate::queue::{NewQueue, Queue, StartError, TargetQueue};

/// A virtio device, as a controller offers it to front ends.
///
/// The implementer owes: no method but [`Device::open_queue`] waits, or makes a system call that can;
/// feature bits do not change. It may rely on being called on threads of the control side only.
pub trait Device: Any + Send + Sync + fmt::Debug {
    /// Feature bits that it offers, the ring's and vhost's included; VIRTIO_F_RING_PACKED is the
    /// controller's to add.
    fn features(&self) -> u64;

    /// Number of virtqueues, at most [`QUEUES_MAX`].
    fn queues(&self) -> u16 {
        QUEUES_MAX
    }

    /// The state of a new connection.
    fn connect(self: Arc<Self>) -> Box<dyn Negotiated>;

    /// The storage that its requests access.
    fn storage(&self) -> StorageUse {
        StorageUse::default()
    }

    /// Opens the device for virtqueue `index`, whose requests are at most `depth` at a time. May take
    /// long: it is called on a thread that nobody waits for.
    ///
    /// # Errors
    /// The device's error. The connection is closed then.
    fn open_queue(
        self: Arc<Self>,
        index: usize,
        depth: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError>;
}

/// Why a device could not be opened for a queue.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct OpenError(#[from] pub Box<dyn std::error::Error + Send + Sync>);

/// What one front end has negotiated with a device, and what its driver has set.
///
/// The implementer owes: no method waits.
pub trait Negotiated: Send + Sync + fmt::Debug {
    /// The driver has accepted these feature bits; 0 after a reset.
    fn set_features(&mut self, features: u64);

    /// The device's configuration space.
    fn read_config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space. Returns whether queues need a new view.
    fn write_config(&mut self, offset: u32, contents: &[u8]) -> bool;

    /// What the connection's queues need to know of the device: a
    /// [`DeviceView`]. `None` if
    /// the device cannot serve requests any more; then the engine refuses them, and releases the
    /// device when nothing is in flight.
    fn view(&self) -> Option<DeviceView>;
}

/// What has become of a device, for [`crate::Target::update_devices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChange {
    /// Nothing.
    None,
    /// Its storage was removed: requests are refused from now on.
    Removed,
    /// Its configuration space has changed: guests are told.
    Config,
}

/// A device that was opened for a queue.
pub trait OpenedQueue: Send {
    /// Makes the queue. Reads the ring and the in-flight area; does not wait.
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

/// The storage that a device's requests access, for what must not run beside them.
#[derive(Clone, Debug, Default)]
pub struct StorageUse {
    /// What stores the data: two devices that have one in common access the same data.
    pub storages: Vec<StorageId>,
    /// What keeps other processes from it while rings use it.
    pub leases: Vec<Arc<dyn Lease>>,
    /// The guest may write.
    pub writes: bool,
}

/// The identity of a place where data is stored. Equal identities mean the same data.
#[derive(Clone, Debug)]
pub struct StorageId {
    /// The kind of `number`.
    pub kind: &'static str,
    /// The number.
    pub number: (u64, u64),
    /// Keeps `number` from being used for something else.
    pub keeps: Option<Arc<dyn Any + Send + Sync>>,
}

impl PartialEq for StorageId {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.number) == (other.kind, other.number)
    }
}

/// Called, on any thread and with no lock held, when a [`Lease`] that was asked for may be held.
pub type Granted = Arc<dyn Fn() + Send + Sync>;

/// Keeps other processes from a storage while rings use it.
///
/// The user adds itself first, waits until the lease is held, and removes itself when all of its I/O
/// has ended. The implementer owes: no method waits, nor makes a system call that can; `granted` is
/// called after the lease has become held, unless its user was removed.
pub trait Lease: fmt::Debug + Send + Sync {
    /// Adds a user. Returns whether the lease is held; if not, calls `granted` when it is.
    fn add_user(&self, granted: &Granted) -> bool;
    /// Removes a user. The last one releases the storage.
    fn remove_user(&self);
    /// Whether I/O may start.
    fn is_held(&self) -> bool;
}
