//! The attached controllers.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bdev::BdevId;
use bdev::method::Call;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::identity::Identity;
use crate::target::{Target, Transport};

/// A controller as SPDK names it: one subsystem, reached by one or more paths.
pub(crate) struct Controller {
    /// The name that the operator gave.
    pub(crate) name: String,
    /// The most namespaces.
    pub(crate) max_bdevs: usize,
    /// At least one until it is detached.
    pub(crate) paths: RefCell<Vec<Path>>,
    /// What its first path said of further paths.
    pub(crate) further: FurtherPaths,
    /// New namespaces that could not be opened.
    pub(crate) refused: RefCell<Vec<Refused>>,
    /// The bdevs that are being removed, as their namespaces are gone.
    pub(crate) leaving: RefCell<Vec<BdevId>>,
    /// An operation that changes it is under way, such as a detach.
    pub(crate) changing: Cell<bool>,
}

/// What becomes of further paths to a controller: the parameter `multipath`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FurtherPaths {
    Failover,
    /// SPDK's schema says that failover is the default, but its code has this one.
    #[default]
    #[serde(rename = "multipath")]
    Merge,
    #[serde(rename = "disable")]
    Refuse,
}

/// A namespace that could not be opened, and when it is tried again.
pub(crate) struct Refused {
    pub(crate) block: String,
    pub(crate) pause: Duration,
    pub(crate) next: Instant,
}

/// A controller of the kernel's driver.
#[derive(Clone)]
pub(crate) struct Path {
    /// The kernel's name, such as `nvme0`.
    pub(crate) kernel: String,
    pub(crate) target: Target,
    /// The host's side of a connection: NQN, address and port.
    pub(crate) host: [String; 3],
    pub(crate) identity: Identity,
    /// The call that attaches it.
    pub(crate) params: Map<String, Value>,
}

impl Path {
    /// Returns whether it is a connection, which a detach ends.
    pub(crate) fn is_connection(&self) -> bool {
        self.target.transport == Transport::Tcp
    }

    /// SPDK's object for a path in `bdev_nvme_get_controllers`.
    pub(crate) fn show(&self, state: &str) -> Value {
        let [nqn, addr, svcid] = &self.host;
        json!({
            "state": state,
            "trid": self.target.show(),
            "cntlid": self.identity.controller_id(),
            "host": { "nqn": nqn, "addr": addr, "svcid": svcid, "no_shn_notification": false },
            // Not in SPDK.
            "device": format!("/dev/{}", self.kernel),
        })
    }
}

impl Controller {
    /// Marks it as changing until the returned value is dropped; `None` if it is changing already.
    pub(crate) fn change(self: &Rc<Self>) -> Option<Changing> {
        (!self.changing.replace(true)).then(|| Changing(Rc::clone(self)))
    }
}

/// Marks a controller as changing.
pub(crate) struct Changing(Rc<Controller>);

impl Drop for Changing {
    fn drop(&mut self) {
        self.0.changing.set(false);
    }
}

/// All attached controllers, in the order in which they were attached.
#[derive(Default)]
pub(crate) struct Controllers {
    all: RefCell<Vec<Rc<Controller>>>,
    /// What is being attached or detached.
    reserved: RefCell<Vec<Key>>,
}

impl Controllers {
    pub(crate) fn all(&self) -> Vec<Rc<Controller>> {
        self.all.borrow().clone()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Rc<Controller>> {
        self.all.borrow().iter().find(|controller| controller.name == name).cloned()
    }

    /// Returns whether a controller is still attached.
    pub(crate) fn has(&self, controller: &Rc<Controller>) -> bool {
        self.all.borrow().iter().any(|other| Rc::ptr_eq(other, controller))
    }

    /// Returns whether a path of some controller is this one of the kernel.
    pub(crate) fn has_path(&self, kernel: &str) -> bool {
        let has = |controller: &Rc<Controller>| {
            controller.paths.borrow().iter().any(|path| path.kernel == kernel)
        };
        self.all.borrow().iter().any(has)
    }

    /// Reserves a name or target until the returned value is dropped; `None` if it is reserved
    /// already.
    pub(crate) fn reserve(self: &Rc<Self>, key: Key) -> Option<Reserved> {
        let mut reserved = self.reserved.borrow_mut();
        if reserved.contains(&key) {
            return None;
        }
        reserved.push(key.clone());
        Some(Reserved { controllers: Rc::clone(self), key })
    }

    pub(crate) fn add(&self, controller: Rc<Controller>) {
        self.all.borrow_mut().push(controller);
    }

    pub(crate) fn remove(&self, controller: &Rc<Controller>) {
        self.all.borrow_mut().retain(|other| !Rc::ptr_eq(other, controller));
    }

    /// Returns the calls that attach all of them again.
    pub(crate) fn config(&self, method: &'static str) -> Vec<Call> {
        let all = self.all.borrow();
        let paths = all.iter().flat_map(|controller| controller.paths.borrow().clone());
        paths.map(|path| Call { method, params: path.params }).collect()
    }
}

/// What an operation on a controller reserves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// The name that the operator gave.
    Name(String),
    /// The [place](Target::place) of a target: a connection that one operation is about to end must
    /// not be adopted by another.
    Place([String; 4]),
}

/// The name or target of a controller that is being attached or detached.
pub(crate) struct Reserved {
    controllers: Rc<Controllers>,
    key: Key,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.controllers.reserved.borrow_mut().retain(|key| *key != self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Given;

    #[test]
    fn a_target_is_reserved_for_one_operation() {
        let target = |subnqn, trtype, traddr| {
            let (trsvcid, subnqn) = (Some("4420"), Some(subnqn));
            Target::parse(Given { trtype, traddr, trsvcid, subnqn, adrfam: None }).unwrap()
        };
        let tcp = |subnqn| target(subnqn, "TCP", "10.0.0.1").place();
        let controllers = Rc::new(Controllers::default());
        let first = controllers.reserve(Key::Place(tcp("a"))).unwrap();
        assert!(controllers.reserve(Key::Place(tcp("a"))).is_none());
        let _other = controllers.reserve(Key::Place(tcp("b"))).unwrap();
        drop(first);
        controllers.reserve(Key::Place(tcp("a"))).unwrap();
        let pcie = |subnqn| target(subnqn, "PCIe", "0000:00:04.0").place();
        assert_eq!(pcie("a"), pcie("b"), "the address names the controller");
    }
}
