//! The virtio-blk device of a controller, on the control side.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bdev::{Bdev, QosUser, UserCounts};
use served_bdev::{storage_use, uses};
use vhost_target::Target;
use vhost_target::device::{
    Device, DeviceChange, Negotiated, OpenError, Opened, OpenedQueue, StorageUse,
};
use vhost_target::device_queue::DeviceView;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::config::{Disk, config_space, written_write_cache};
use crate::queue::BlkQueue;
use crate::view::BlkView;

/// A virtio-blk device.
#[derive(Debug)]
pub struct Blk {
    /// `None` if the bdev was removed.
    disk: Mutex<Option<Arc<Disk>>>,
    bdev_configured: String,
    read_only: bool,
    features: u64,
    /// A driver has switched the write cache off. Its front end does not send this again when it
    /// reconnects, because the guest does not notice the reconnection. The target cannot tell which
    /// guest reconnects. So later connections begin with the cache off.
    cache_off: AtomicBool,
    /// What its queues had done when the bdev was removed.
    counts_before: Mutex<UserCounts>,
}

impl Blk {
    /// Creates a device that shows `bdev`. `read_only`: guests may not write.
    #[must_use]
    pub fn new(bdev: Arc<dyn Bdev>, read_only: bool) -> Arc<Self> {
        let disk = Disk::new(bdev, read_only);
        Arc::new(Self {
            bdev_configured: disk.bdev.name().to_owned(),
            read_only,
            features: disk.features(),
            cache_off: AtomicBool::new(false),
            disk: Mutex::new(Some(Arc::new(disk))),
            counts_before: Mutex::default(),
        })
    }

    /// Returns the device of a controller, if it is a virtio-blk device.
    #[must_use]
    pub fn of(device: &Arc<dyn Device>) -> Option<&Self> {
        (&**device as &dyn Any).downcast_ref()
    }

    fn disk(&self) -> Option<Arc<Disk>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the name of its bdev, or `None` if the bdev was removed.
    #[must_use]
    pub fn bdev(&self) -> Option<String> {
        self.disk().map(|disk| disk.bdev.name().to_owned())
    }

    /// Returns the name of the bdev that it was created with.
    #[must_use]
    pub fn bdev_configured(&self) -> &str {
        &self.bdev_configured
    }

    /// Returns whether the operator has made the controller read-only.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Returns the user whose counters and limits its queues have at the bdev. `None` if the bdev
    /// was removed.
    #[must_use]
    pub fn user(&self) -> Option<QosUser> {
        self.disk().map(|disk| disk.user.id())
    }

    /// Returns what its queues have done at the bdev, or had done when the bdev was removed.
    #[must_use]
    pub fn counts(&self) -> UserCounts {
        match self.disk() {
            Some(disk) => disk.counts(),
            None => *self.counts_before.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Returns whether its bdev is this one or is built on it.
    #[must_use]
    pub fn uses(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.disk().is_some_and(|disk| uses(&disk.bdev, bdev))
    }

    fn shows(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.disk().is_some_and(|disk| Arc::ptr_eq(&disk.bdev, bdev))
    }
}

/// Removes a bdev from all controllers that show it. Their requests fail from now on, and the
/// channels are closed once their I/O has completed.
pub fn remove_bdev(target: &Target, bdev: &Arc<dyn Bdev>) {
    target.update_devices(|device| match Blk::of(device) {
        Some(blk) if blk.shows(bdev) => {
            let disk = blk.disk.lock().unwrap_or_else(PoisonError::into_inner).take();
            let counts = disk.map(|disk| disk.counts()).unwrap_or_default();
            *blk.counts_before.lock().unwrap_or_else(PoisonError::into_inner) = counts;
            DeviceChange::Removed
        }
        _ => DeviceChange::None,
    });
}

/// Notifies reactors, and then guests, of a bdev's new size. A guest that cannot be notified now is
/// notified later.
pub fn bdev_resized(target: &Target, bdev: &Arc<dyn Bdev>) {
    target.update_devices(|device| match Blk::of(device) {
        Some(blk) if blk.shows(bdev) => DeviceChange::Config,
        _ => DeviceChange::None,
    });
}

/// Notifies reactors that rate limits of a bdev were set or removed. They apply to all controllers
/// whose bdev is this one or is built on it.
pub fn limits_changed(target: &Target, bdev: &Arc<dyn Bdev>) {
    target.update_devices(|device| match Blk::of(device) {
        Some(blk) if blk.uses(bdev) => DeviceChange::View,
        _ => DeviceChange::None,
    });
}

impl Device for Blk {
    fn features(&self) -> u64 {
        self.features
    }

    fn connect(self: Arc<Self>) -> Box<dyn Negotiated> {
        let write_cache = self.cache_off.load(Ordering::Relaxed).then_some(false);
        Box::new(BlkSession { device: self, features: 0, write_cache })
    }

    fn storage(&self) -> StorageUse {
        let Some(disk) = self.disk() else { return StorageUse::default() };
        let writes = !disk.read_only && !disk.bdev.features().read_only;
        storage_use(&disk.bdev, writes)
    }

    fn open_queue(
        self: Arc<Self>,
        _key: u64,
        _index: usize,
        depth: u16,
    ) -> Result<Box<dyn OpenedQueue>, OpenError> {
        let queue = BlkQueue::open(self.disk().as_deref(), depth);
        Ok(Box::new(Opened(queue.map_err(|e| OpenError(Box::new(e)))?)))
    }
}

/// The state of one front end's negotiation.
#[derive(Debug)]
struct BlkSession {
    device: Arc<Blk>,
    features: u64,
    /// The config space's `wce`, if it was set. True means that the driver flushes.
    write_cache: Option<bool>,
}

impl BlkSession {
    fn negotiated(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    fn offers(&self, feature: u32) -> bool {
        self.device.features & (1 << feature) != 0
    }

    /// Returns the config space's `wce` (virtio 1.2, section 5.2.4). It is 0 if it is not offered,
    /// and initially 0 for a driver that cannot flush (section 5.2.5.2).
    fn write_cache(&self) -> bool {
        self.offers(VIRTIO_BLK_F_CONFIG_WCE) && self.write_cache.unwrap_or(!self.cannot_flush())
    }

    /// Returns whether the driver can switch the cache, but not flush it.
    fn cannot_flush(&self) -> bool {
        self.negotiated(VIRTIO_BLK_F_CONFIG_WCE) && !self.negotiated(VIRTIO_BLK_F_FLUSH)
    }

    /// Returns whether writes have to be durable when they are answered: the driver has switched
    /// the cache off, or it has not negotiated FLUSH (virtio 1.2, section 5.2.6.2).
    fn write_through(&self) -> bool {
        if self.negotiated(VIRTIO_BLK_F_CONFIG_WCE) {
            !self.write_cache()
        } else {
            self.offers(VIRTIO_BLK_F_FLUSH) && !self.negotiated(VIRTIO_BLK_F_FLUSH)
        }
    }
}

impl Negotiated for BlkSession {
    fn set_features(&mut self, features: u64) {
        self.features = features;
        if self.cannot_flush() {
            // The setting of an earlier driver does not apply to this one.
            self.write_cache = None;
        }
    }

    fn read_config(&self) -> Vec<u8> {
        config_space(self.device.disk().as_deref(), self.write_cache()).into()
    }

    /// A write to `wce` has no effect before CONFIG_WCE is negotiated, but its value is kept.
    fn write_config(&mut self, offset: u32, contents: &[u8]) -> bool {
        let Some(write_cache) = written_write_cache(offset, contents) else { return false };
        if !write_cache {
            self.device.cache_off.store(true, Ordering::Relaxed);
        }
        let before = self.write_through();
        self.write_cache = Some(write_cache);
        self.write_through() != before
    }

    fn view(&self) -> Option<DeviceView> {
        let disk = self.device.disk()?;
        Some(BlkView::erased(&disk, self.write_through()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdev::{Malloc, MallocOptions, Null, NullOptions, Part, Passthru};

    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
    const BOTH: u64 = FLUSH | CONFIG_WCE;

    /// Returns a device that offers both FLUSH and CONFIG_WCE, and one that offers neither.
    fn devices() -> [Arc<Blk>; 2] {
        let (num_blocks, block_size, uuid) = (64, 512, None);
        let malloc = MallocOptions { name: "m".into(), num_blocks, block_size, uuid };
        let null = NullOptions { name: "n".into(), num_blocks, block_size, uuid };
        let (malloc, null) = (Malloc::create(malloc).unwrap(), Null::create(null).unwrap());
        [Blk::new(malloc, false), Blk::new(null, false)]
    }

    fn write_cache(session: &dyn Negotiated) -> bool {
        session.read_config()[32] == 1
    }

    fn write_through(session: &dyn Negotiated) -> bool {
        session.view().unwrap().downcast_ref::<BlkView>().unwrap().write_through
    }

    /// SET_CONFIG of `wce`.
    fn set(session: &mut dyn Negotiated, on: bool) -> bool {
        session.write_config(32, &[on.into()])
    }

    #[test]
    fn writes_are_durable_unless_the_driver_flushes() {
        // Whether both are offered, the negotiated features, the cache setting, and the expected
        // result: whether writes have to be durable when they are answered.
        for (offers, negotiated, cache, expected) in [
            (true, BOTH, None, false),
            (true, BOTH, Some(true), false),
            (true, BOTH, Some(false), true),
            (true, CONFIG_WCE, None, true),
            (true, CONFIG_WCE, Some(true), false),
            (true, FLUSH, Some(true), false),
            (true, FLUSH, Some(false), false),
            (true, 0, Some(true), true),
            (false, 0, Some(false), false),
        ] {
            let [both, neither] = devices();
            let device = if offers { both } else { neither };
            assert_eq!(device.features() & BOTH == BOTH, offers);
            let mut session = device.connect();
            session.set_features(negotiated);
            cache.map(|on| set(&mut *session, on));
            assert_eq!(write_through(&*session), expected, "{negotiated:#x} {cache:?}");
        }
    }

    /// A driver that cannot flush begins without a cache (virtio 1.2, 5.2.5.2), whatever the
    /// previous driver has set.
    #[test]
    fn a_driver_that_cannot_flush_begins_without_a_cache() {
        let [device, _] = devices();
        let mut session = device.connect();
        session.set_features(BOTH);
        set(&mut *session, true);
        session.set_features(CONFIG_WCE);
        assert!(write_through(&*session) && !write_cache(&*session));
        assert!(set(&mut *session, true));
        assert!(!write_through(&*session) && write_cache(&*session));
    }

    #[test]
    fn queues_get_a_view_when_the_cache_changes() {
        let [device, _] = devices();
        let mut session = device.clone().connect();
        session.set_features(BOTH);
        assert!(!set(&mut *session, true), "the cache was on already");
        assert!(set(&mut *session, false));
        assert!(!write_cache(&*session));
        assert!(set(&mut *session, true) && write_cache(&*session));
        assert!(!session.write_config(31, &[0]) && !session.write_config(32, &[2]));
        // A front end that reconnects does not send its guest's setting again.
        set(&mut *session, false);
        let mut later = device.connect();
        later.set_features(BOTH);
        assert!(write_through(&*later));
    }

    #[test]
    fn parts_of_a_bdev_overlap_with_the_bdev_and_not_with_each_other() {
        let base = devices()[0].disk().unwrap().bdev.clone();
        let part = |offset| Part::create("p".into(), Arc::clone(&base), offset, 4);
        let bdevs: [Arc<dyn Bdev>; 5] = [
            Arc::clone(&base),
            part(0).unwrap(),
            part(4).unwrap(),
            Passthru::create("on part".into(), part(4).unwrap(), None).unwrap(),
            part(3).unwrap(),
        ];
        let storages = bdevs.map(|bdev| Blk::new(bdev, false).storage().storages);
        let overlap = |one: usize, other: usize| {
            storages[one].iter().any(|mine| storages[other].iter().any(|o| mine.overlaps(o)))
        };
        for (one, other, expected) in
            [(1, 2, false), (1, 3, false), (2, 3, true), (1, 4, true), (4, 2, true)]
        {
            assert_eq!(overlap(one, other), expected, "{one} {other}");
            assert_eq!(overlap(other, one), expected, "{other} {one}");
            assert!(overlap(0, one) && overlap(other, 0));
        }
    }

    #[test]
    fn a_device_whose_bdev_was_removed_has_no_view() {
        let [device, _] = devices();
        let session = Arc::clone(&device).connect();
        *device.disk.lock().unwrap() = None;
        assert!(session.view().is_none() && device.bdev().is_none());
        assert_eq!(device.bdev_configured(), "m");
        assert!(device.storage().storages.is_empty());
        assert_eq!(session.read_config()[..8], [0; 8]);
    }
}
