//! The connections to clusters: those that the operator registered, and those of disks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bdev::Error;
use serde_json::{Map, Value};

use crate::cluster::{Cluster, ClusterOptions};

/// Limit on the wait for a cluster: to connect, open an image, or resize it.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A registered cluster.
pub(crate) struct Registered {
    pub(crate) name: String,
    pub(crate) options: ClusterOptions,
    /// As the operator gave them.
    pub(crate) params: Map<String, Value>,
    /// Keeps the connection.
    cluster: Arc<Cluster>,
}

/// All connections. Disks with equal options share one.
#[derive(Default)]
pub(crate) struct Clusters {
    registered: RefCell<Vec<Registered>>,
    connected: RefCell<BTreeMap<ClusterOptions, Weak<Cluster>>>,
}

impl Clusters {
    /// Returns the connection with these options, if there is one that the cluster accepts.
    pub(crate) fn get(&self, options: &ClusterOptions) -> Option<Arc<Cluster>> {
        let cluster = self.connected.borrow().get(options)?.upgrade()?;
        (!cluster.is_blocklisted()).then_some(cluster)
    }

    /// Returns the connection with these options, for use on a thread that may block: the present
    /// one, or a new one.
    pub(crate) fn connector(
        &self,
        options: ClusterOptions,
    ) -> impl FnOnce() -> Result<Arc<Cluster>, Error> + Send + use<> {
        let present = self.get(&options);
        move || present.map_or_else(|| Cluster::connect(&options), Ok)
    }

    /// Adds a connection, in place of one that the cluster refuses.
    pub(crate) fn put(&self, options: &ClusterOptions, cluster: &Arc<Cluster>) {
        let mut connected = self.connected.borrow_mut();
        connected.retain(|_, cluster| cluster.strong_count() > 0);
        connected.insert(options.clone(), Arc::downgrade(cluster));
        for registered in self.registered.borrow_mut().iter_mut() {
            if registered.options == *options {
                registered.cluster = Arc::clone(cluster);
            }
        }
    }

    /// Registers a connection.
    pub(crate) fn register(
        &self,
        name: String,
        options: ClusterOptions,
        params: Map<String, Value>,
        cluster: Arc<Cluster>,
    ) {
        self.put(&options, &cluster);
        self.registered.borrow_mut().push(Registered { name, options, params, cluster });
    }

    /// Returns whether a cluster of this name is registered.
    pub(crate) fn is_registered(&self, name: &str) -> bool {
        self.registered.borrow().iter().any(|registered| registered.name == name)
    }

    /// Returns the parameters with which a cluster was registered.
    pub(crate) fn params(&self, name: &str) -> Option<Map<String, Value>> {
        let registered = self.registered.borrow();
        registered.iter().find(|known| known.name == name).map(|known| known.params.clone())
    }

    /// Returns the options of a registered cluster.
    pub(crate) fn options(&self, name: &str) -> Option<ClusterOptions> {
        let registered = self.registered.borrow();
        registered.iter().find(|known| known.name == name).map(|known| known.options.clone())
    }

    /// Removes a registered cluster that no disk uses. Returns whether it did.
    pub(crate) fn unregister(&self, name: &str) -> bool {
        let mut registered = self.registered.borrow_mut();
        let Some(at) = registered.iter().position(|known| known.name == name) else {
            return false;
        };
        // Other references are of disks, also of deleted ones that still have I/O under way.
        let unused = Arc::strong_count(&registered[at].cluster) == 1;
        if unused {
            drop(registered.remove(at));
        }
        unused
    }

    /// Returns the parameters with which the clusters were registered, in this order.
    pub(crate) fn all(&self) -> Vec<Map<String, Value>> {
        self.registered.borrow().iter().map(|registered| registered.params.clone()).collect()
    }
}
