//! Devices that have not answered the reads of an examination.

use std::any::Any;
use std::cell::RefCell;
use std::sync::{Arc, Weak};

use crate::contract::{Bdev, with_bases};

/// Devices whose reads have not ended in time, so that each device holds up its users once only.
#[derive(Default)]
pub struct Unanswered(RefCell<Vec<Reads>>);

/// A device, and a value that lives as long as its reads.
type Reads = (Weak<dyn Bdev>, Weak<dyn Any + Send + Sync>);

impl Unanswered {
    /// Adds the devices below a bdev that has not answered. `reads` lives until its reads have
    /// ended.
    pub fn add(&self, bdev: &Arc<dyn Bdev>, reads: &Weak<dyn Any + Send + Sync>) {
        let devices = devices(bdev).map(|device| (Arc::downgrade(&device), Weak::clone(reads)));
        self.0.borrow_mut().extend(devices);
    }

    /// Returns whether reads of a device below the bdev have not ended.
    #[must_use]
    pub fn has_device_of(&self, bdev: &Arc<dyn Bdev>) -> bool {
        let mut unanswered = self.0.borrow_mut();
        unanswered.retain(|(_, reads)| reads.strong_count() > 0);
        devices(bdev).any(|below| {
            let is_it =
                |(device, _): &Reads| std::ptr::addr_eq(device.as_ptr(), Arc::as_ptr(&below));
            unanswered.iter().any(is_it)
        })
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

/// The bdevs without bases that a bdev is built on.
fn devices(bdev: &Arc<dyn Bdev>) -> impl Iterator<Item = Arc<dyn Bdev>> {
    with_bases(bdev).into_iter().filter(|bdev| bdev.bases().is_empty())
}
