//! The claims of controllers on the bdevs that they serve.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use bdev::Claim;

/// Where a bdev is served: the number of the controller
/// ([`ControllerInfo::number`](vhost_target::ControllerInfo::number)), and that of the target, if
/// the controller has targets.
pub(super) type Place = (u64, Option<u8>);

/// The claims, by place.
#[derive(Default)]
pub(super) struct Served {
    claims: RefCell<HashMap<Place, Claim>>,
    /// Places that a bdev is being added to.
    adding: RefCell<HashSet<Place>>,
}

/// Reserves a place while a bdev is added to it.
pub(super) struct Adding<'s> {
    served: &'s Served,
    place: Place,
}

impl Served {
    /// Holds a claim. A previous one of this place, whose bdev was removed, is released.
    pub(super) fn insert(&self, place: Place, claim: Claim) {
        self.claims.borrow_mut().insert(place, claim);
    }

    /// Takes out the claim of a place. `None` if there is none, as the bdev was removed.
    pub(super) fn remove(&self, place: Place) -> Option<Claim> {
        self.claims.borrow_mut().remove(&place)
    }

    /// Releases all claims of a controller.
    pub(super) fn remove_controller(&self, number: u64) {
        self.claims.borrow_mut().retain(|place, _| place.0 != number);
    }

    /// Returns whether a bdev is being added to this place.
    pub(super) fn is_adding(&self, place: Place) -> bool {
        self.adding.borrow().contains(&place)
    }

    /// Reserves a place that no bdev is being added to.
    pub(super) fn begin(&self, place: Place) -> Adding<'_> {
        self.adding.borrow_mut().insert(place);
        Adding { served: self, place }
    }
}

impl Drop for Adding<'_> {
    fn drop(&mut self) {
        self.served.adding.borrow_mut().remove(&self.place);
    }
}
