//! A namespace's bdev as the module knows it.

use std::rc::Rc;
use std::sync::Arc;

use bdev::method::Call;
use bdev::module::{Description, Entry};
use bdev::{Bdev, BdevId, FileDisk, Registry, show_lease};
use serde_json::{Map, Value, json};

use crate::controller::{Controller, Path};
use crate::sysfs::Namespace;
use crate::target::Transport;

/// SPDK's name of the module.
pub(crate) const NAME: &str = "nvme";

pub(crate) struct NvmeEntry {
    pub(crate) controller: Rc<Controller>,
    pub(crate) namespace: Namespace,
    pub(crate) disk: Arc<FileDisk>,
    /// Several controllers may use the namespace.
    pub(crate) can_share: bool,
}

/// Returns the bdevs of a controller, by the ids of their namespaces.
pub(crate) fn bdevs_of(
    controller: &Rc<Controller>,
    registry: &Registry,
) -> Vec<(BdevId, Rc<NvmeEntry>)> {
    let mut all = registry.entries_of::<NvmeEntry>();
    all.retain(|(_, entry)| Rc::ptr_eq(&entry.controller, controller));
    all.sort_by_key(|(_, entry)| entry.namespace.id);
    all
}

impl NvmeEntry {
    pub(crate) fn name(&self) -> &str {
        self.disk.name()
    }

    /// SPDK's object for one path of the namespace.
    fn show(&self, path: &Path) -> Value {
        let mut shown = Map::new();
        if path.target.transport == Transport::Pcie {
            shown.insert("pci_address".into(), path.target.address.clone().into());
        }
        shown.insert("trid".into(), path.target.show());
        shown.insert("ctrlr_data".into(), path.identity.show());
        shown.insert("vs".into(), path.identity.version());
        let namespace = json!({ "id": self.namespace.id, "can_share": self.can_share });
        shown.insert("ns_data".into(), namespace);
        shown.into()
    }
}

impl Entry for NvmeEntry {
    fn module(&self) -> &'static str {
        NAME
    }

    fn bdev(&self) -> Arc<dyn Bdev> {
        Arc::clone(&self.disk) as _
    }

    fn describe(&self) -> Description {
        let paths = self.controller.paths.borrow();
        let shown: Value = paths.iter().map(|path| self.show(path)).collect();
        // Not in SPDK.
        let mut kernel = json!({
            "filename": self.disk.filename().display().to_string(),
            "io_path": self.disk.service().show(),
        });
        show_lease(&mut kernel, self.disk.lease_state());
        let driver_specific = Map::from_iter([
            (NAME.to_owned(), shown),
            ("mp_policy".to_owned(), "active_passive".into()),
            ("kernel".to_owned(), kernel),
        ]);
        Description { driver_specific, ..Description::default() }
    }

    /// The calls that attach its controller create it.
    fn config(&self) -> Vec<Call> {
        vec![]
    }

    fn each_second(&self) {
        self.disk.check_lease();
    }
}
