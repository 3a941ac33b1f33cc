//! The open stores.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bdev::method::MethodError;
use bdev::{Aside, Bdev, Claim, Error, Host};
use uuid::Uuid;

use super::copy::Copies;
use crate::facts::Facts;
use crate::store::LvStore;

/// The longest time that the caller of an operation waits for it. The operation goes on.
pub(super) const LIMIT: Duration = Duration::from_secs(3600);
/// The same for operations that copy a volume.
pub(super) const COPY_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Operations on a store at a time. They wait for one another.
const OPERATIONS: usize = 32;

/// An open store.
pub(super) struct OpenStore {
    pub(super) store: Arc<LvStore>,
    /// The bdev that it is on. Not kept, since its removal waits until nobody keeps it.
    pub(super) base: Weak<dyn Bdev>,
    /// Runs operations.
    pub(super) aside: Aside,
    /// The claim on the base.
    pub(super) claim: Cell<Option<Claim>>,
}

/// What the module keeps.
#[derive(Default)]
pub(super) struct State {
    stores: RefCell<Vec<Rc<OpenStore>>>,
    pub(super) copies: Copies,
}

/// The way in which the parameters name a store.
pub(super) struct Selector {
    pub(super) uuid: Option<String>,
    pub(super) name: Option<String>,
}

impl OpenStore {
    pub(super) fn new(store: LvStore, base: &Arc<dyn Bdev>, claim: Claim) -> Rc<Self> {
        let aside = Aside::new(format!("lvstore on {}", base.name()), OPERATIONS);
        Rc::new(Self {
            store: Arc::new(store),
            base: Arc::downgrade(base),
            aside,
            claim: Cell::new(Some(claim)),
        })
    }

    pub(super) fn facts(&self) -> Facts {
        self.store.facts()
    }

    /// Runs an operation on a thread of its own.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        host: &Rc<dyn Host>,
        limit: Duration,
        operation: impl FnOnce(&LvStore) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = Arc::clone(&self.store);
        self.aside.run(host, limit, move || operation(&store)).await
    }

    pub(super) fn is_on(&self, bdev: &Arc<dyn Bdev>) -> bool {
        std::ptr::addr_eq(self.base.as_ptr(), Arc::as_ptr(bdev))
    }
}

impl State {
    pub(super) fn all(&self) -> Vec<Rc<OpenStore>> {
        self.stores.borrow().clone()
    }

    pub(super) fn take_all(&self) -> Vec<Rc<OpenStore>> {
        self.stores.take()
    }

    pub(super) fn add(&self, store: Rc<OpenStore>) {
        self.stores.borrow_mut().push(store);
    }

    /// Removes a store. Returns whether it was there.
    pub(super) fn remove(&self, store: &Rc<OpenStore>) -> bool {
        let mut stores = self.stores.borrow_mut();
        let before = stores.len();
        stores.retain(|other| !Rc::ptr_eq(other, store));
        stores.len() < before
    }

    pub(super) fn named(&self, name: &str) -> Option<Rc<OpenStore>> {
        self.all().into_iter().find(|store| store.facts().store.name == name)
    }

    /// Finds the store that the parameters name.
    ///
    /// # Errors
    /// EINVAL if not exactly one of UUID and name was given; ENODEV if there is no such store.
    pub(super) fn select(&self, selector: &Selector) -> Result<Rc<OpenStore>, MethodError> {
        let found = match (&selector.uuid, &selector.name) {
            (Some(uuid), None) => {
                let uuid = Uuid::try_parse(uuid).ok();
                self.all().into_iter().find(|store| Some(store.facts().store.uuid) == uuid)
            }
            (None, Some(name)) => self.named(name),
            _ => return Err(MethodError::errno(libc::EINVAL)),
        };
        found.ok_or_else(|| MethodError::errno(libc::ENODEV))
    }
}
