//! A volume in the registry.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::Call;
use bdev::module::{Description, Entry};
use bdev::{Bdev, Claim};

use super::state::OpenStore;
use super::{NAME, show};
use crate::disk::LvolDisk;
use crate::facts::{Facts, VolumeFacts};

pub(super) struct LvolEntry {
    pub(super) disk: Arc<LvolDisk>,
    pub(super) store: Rc<OpenStore>,
    /// The claim on the external snapshot.
    pub(super) _claim: Option<Claim>,
}

impl LvolEntry {
    /// What is known of the store, and of this volume.
    pub(super) fn facts(&self) -> (Arc<Facts>, Option<VolumeFacts>) {
        let facts = self.store.facts();
        let volume = facts.volume(self.disk.id()).cloned();
        (facts, volume)
    }
}

impl Entry for LvolEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        match self.facts() {
            (facts, Some(volume)) => Description::specific(NAME, show::specific(&facts, &volume)),
            _ => Description::default(),
        }
    }

    /// Examine finds it again.
    fn config(&self) -> Vec<Call> {
        vec![]
    }

    /// A store uses a base that has grown when it is told to.
    fn base_resized(&self) -> bool {
        false
    }
}
