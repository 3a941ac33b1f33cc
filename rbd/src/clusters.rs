//! The connections to clusters: those that the operator registered, and those of disks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bdev::Error;
use serde_json::{Map, Value};

use crate::cluster::{Cluster, ClusterOptions};

/// The longest time that an operation waits for a cluster: to connect, or to open or resize an
/// image.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A registered cluster.
struct Registered {
    name: String,
    options: ClusterOptions,
    /// As the operator gave them.
    params: Map<String, Value>,
    /// Keeps the connection.
    cluster: Arc<Cluster>,
    /// Lets disks find the connection.
    _connector: Arc<Connector>,
}

/// All connections. Disks with equal options share one.
#[derive(Default)]
pub(crate) struct Clusters {
    registered: RefCell<Vec<Registered>>,
    connectors: RefCell<BTreeMap<ClusterOptions, Weak<Connector>>>,
}

/// Makes the connection for some options, for use on threads that may block.
pub(crate) struct Connector {
    options: ClusterOptions,
    /// The number of attempts to connect that have begun.
    attempts: AtomicU64,
    last: Mutex<Last>,
}

/// The last attempt.
#[derive(Default)]
struct Last {
    cluster: Weak<Cluster>,
    /// The error, as an errno and a text.
    failure: Option<(i32, String)>,
}

impl Connector {
    /// Returns the present connection, or connects. Threads that call this at the same time share
    /// one attempt, also if it fails.
    ///
    /// # Errors
    /// As [`Cluster::connect`].
    fn cluster(&self) -> Result<Arc<Cluster>, Error> {
        let seen = self.attempts.load(Ordering::Relaxed);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cluster) = last.cluster.upgrade().filter(|known| !known.is_blocklisted()) {
            return Ok(cluster);
        }
        if let Some((errno, text)) = &last.failure
            && self.attempts.load(Ordering::Relaxed) != seen
        {
            let source = io::Error::from_raw_os_error(*errno);
            return Err(Error::System { what: text.clone(), source });
        }
        self.attempts.fetch_add(1, Ordering::Relaxed);
        match Cluster::connect(&self.options) {
            Ok(cluster) => {
                *last = Last { cluster: Arc::downgrade(&cluster), failure: None };
                Ok(cluster)
            }
            Err(e) => {
                last.failure = Some((e.errno(), e.to_string()));
                Err(e)
            }
        }
    }

    /// Calls `f` with the connection. If the cluster has blocklisted its client, calls `f` once
    /// more, with a new connection.
    ///
    /// # Errors
    /// As [`Cluster::connect`] and `f`.
    pub(crate) fn with<T>(
        &self,
        f: impl Fn(&Arc<Cluster>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let cluster = self.cluster()?;
        match f(&cluster) {
            Err(e) if e.errno() == libc::ESHUTDOWN => {
                cluster.set_blocklisted();
                f(&self.cluster()?)
            }
            other => other,
        }
    }
}

impl Clusters {
    /// Returns the connector for these options. Users of its connection keep it.
    pub(crate) fn connector(&self, options: &ClusterOptions) -> Arc<Connector> {
        let mut connectors = self.connectors.borrow_mut();
        if let Some(known) = connectors.get(options).and_then(Weak::upgrade) {
            return known;
        }
        connectors.retain(|_, connector| connector.strong_count() > 0);
        let connector = Arc::new(Connector {
            options: options.clone(),
            attempts: AtomicU64::new(0),
            last: Mutex::default(),
        });
        connectors.insert(options.clone(), Arc::downgrade(&connector));
        connector
    }

    /// Records a new connection with these options. It replaces the registered one if the cluster
    /// has blocklisted the client of that.
    pub(crate) fn connected(&self, options: &ClusterOptions, cluster: &Arc<Cluster>) {
        for registered in self.registered.borrow_mut().iter_mut() {
            if registered.options == *options && registered.cluster.is_blocklisted() {
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
        let _connector = self.connector(&options);
        let registered = Registered { name, options, params, cluster, _connector };
        self.registered.borrow_mut().push(registered);
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
        // Disks hold the other references, also deleted ones that still have I/O under way.
        let unused = Arc::strong_count(&registered[at].cluster) == 1;
        if unused {
            drop(registered.remove(at));
        }
        unused
    }

    /// Returns the parameters with which the clusters were registered, in the order of
    /// registration.
    pub(crate) fn all(&self) -> Vec<Map<String, Value>> {
        self.registered.borrow().iter().map(|registered| registered.params.clone()).collect()
    }
}
