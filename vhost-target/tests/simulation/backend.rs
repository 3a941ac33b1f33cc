//! What a controller's device gets its data from: a simulated disk, or a simulated source of
//! entropy. Both have the same state and the same faults; see [`super::disk`].

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, Weak};

use bdev::{Bdev, Completion, Status};
use reactor::EventFd;
use vhost_blk::Blk;
use vhost_target::Target;
use vhost_target::device::{
    Device, DeviceChange, Granted, Lease, OpenError, StorageId, StorageUse,
};
use vhost_target::device_queue::WakeFds;

use super::disk::{Job, Meanwhile, Part, SimDisk, SimLease, State, lock, open};
use crate::entropy::{Entropy, Source, Stream, Supply};

/// The kind of a controller's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Block,
    Entropy,
}

/// A disk or a source.
#[derive(Clone)]
pub(crate) enum Backend {
    Disk(Arc<SimDisk>),
    Source(Arc<SimSource>),
}

impl Backend {
    pub(crate) fn new(
        kind: DeviceKind,
        name: String,
        meanwhile: &Meanwhile,
    ) -> (Self, Arc<Mutex<State>>) {
        let state = Arc::<Mutex<State>>::default();
        let (theirs, meanwhile) = (Arc::clone(&state), Arc::clone(meanwhile));
        let backend = match kind {
            DeviceKind::Block => Self::Disk(SimDisk::new(name, theirs, meanwhile)),
            DeviceKind::Entropy => Self::Source(Arc::new(SimSource { state: theirs, meanwhile })),
        };
        (backend, state)
    }

    /// Returns a device for a controller.
    pub(crate) fn device(&self) -> Arc<dyn Device> {
        match self.clone() {
            Self::Disk(disk) => Blk::new(disk, false),
            Self::Source(source) => Entropy::new(source),
        }
    }

    /// Returns a reference that counts the users.
    pub(crate) fn weak(&self) -> Weak<dyn Any + Send + Sync> {
        let any: Arc<dyn Any + Send + Sync> = match self.clone() {
            Self::Disk(disk) => disk,
            Self::Source(source) => source,
        };
        Arc::downgrade(&any)
    }

    /// Removes it from all controllers' devices.
    pub(crate) fn remove_from(&self, target: &Target) {
        match self {
            Self::Disk(disk) => {
                vhost_blk::remove_bdev(target, &(Arc::clone(disk) as Arc<dyn Bdev>));
            }
            Self::Source(source) => target.update_devices(|device| {
                let entropy = entropy(device).filter(|entropy| {
                    let used = entropy.source();
                    used.is_some_and(|s| std::ptr::addr_eq(Arc::as_ptr(&s), Arc::as_ptr(source)))
                });
                entropy.map_or(DeviceChange::None, |entropy| {
                    entropy.remove();
                    DeviceChange::Removed
                })
            }),
        }
    }
}

fn entropy(device: &Arc<dyn Device>) -> Option<&Entropy> {
    (&**device as &dyn Any).downcast_ref()
}

/// Returns whether the backend of a device was not removed.
pub(crate) fn has_backend(device: &Arc<dyn Device>) -> bool {
    match Blk::of(device) {
        Some(blk) => blk.bdev().is_some(),
        None => entropy(device).expect("one of the two devices").source().is_some(),
    }
}

/// A source of entropy. A request's tag is its number.
pub(crate) struct SimSource {
    state: Arc<Mutex<State>>,
    meanwhile: Meanwhile,
}

impl std::fmt::Debug for SimSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimSource").finish_non_exhaustive()
    }
}

impl Source for SimSource {
    fn open(self: Arc<Self>) -> Result<Box<dyn Stream>, OpenError> {
        let opened = open(&self.state, &self.meanwhile);
        let (number, wake) = opened.ok_or_else(|| OpenError("simulated".into()))?;
        Ok(Box::new(SimStream { number, wake, source: self }))
    }

    /// All users of a source use all of it.
    fn storage(self: Arc<Self>) -> StorageUse {
        let address = Arc::as_ptr(&self).cast::<()>() as u64;
        // A weak reference keeps the address from being reused.
        let keeps: Arc<dyn Any + Send + Sync> = Arc::new(Arc::downgrade(&self));
        let (kind, number) = ("entropy source", (address, 0));
        let storages = vec![StorageId { kind, number, bytes: 0..1, keeps: Some(keeps) }];
        let lease = SimLease(Arc::clone(&self.state));
        let leases = lock(&self.state).leased.then(|| Arc::new(lease) as Arc<dyn Lease>);
        StorageUse { storages, leases: leases.into_iter().collect(), writes: true }
    }
}

impl Lease for SimLease {
    fn add_user(&self, granted: &Granted) -> bool {
        bdev::Lease::add_user(self, granted)
    }
    fn remove_user(&self) {
        bdev::Lease::remove_user(self);
    }
    fn is_held(&self) -> bool {
        bdev::Lease::is_held(self)
    }
}

struct SimStream {
    number: u64,
    wake: Arc<EventFd>,
    source: Arc<SimSource>,
}

impl Stream for SimStream {
    fn request(&mut self, slot: u16, tag: u64, _bytes: u64) -> Supply {
        let mut state = lock(&self.source.state);
        let part = Part { request: tag, flush: false };
        if !state.accept(part) {
            return Supply::Full;
        }
        if state.at_once {
            state.done_at_once(part);
            return Supply::Ended(true);
        }
        state.fly(part, self.number, Job::Supply(slot));
        Supply::Later
    }

    fn poll(&mut self, ended: &mut Vec<(u16, bool)>) {
        let mut state = lock(&self.source.state);
        let done = state.done(self.number).map_or_else(VecDeque::new, std::mem::take);
        let end = |done: Completion| (done.tag.0, done.status == Status::Ok);
        ended.extend(done.into_iter().map(end));
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        [self.wake.as_fd()].into_iter().collect()
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        lock(&self.source.state).close(self.number);
    }
}
