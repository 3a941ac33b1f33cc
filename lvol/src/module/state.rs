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
    aside: Aside,
    /// Closes it, however many operations are under way.
    closing: Aside,
    /// Set when it is closed or deleted: no call finds it, and no bdev is made on it any more.
    pub(super) gone: Cell<bool>,
    /// The claim on the base.
    pub(super) claim: Cell<Option<Claim>>,
}

/// What the module keeps.
#[derive(Default)]
pub(super) struct State {
    stores: RefCell<Vec<Rc<OpenStore>>>,
    /// Names of stores that are being made or renamed.
    names: Rc<RefCell<Vec<String>>>,
    pub(super) copies: Copies,
}

/// A name of a store that is being made or renamed. Dropping it releases the name.
pub(super) struct ReservedName {
    name: String,
    names: Rc<RefCell<Vec<String>>>,
}

impl Drop for ReservedName {
    fn drop(&mut self) {
        self.names.borrow_mut().retain(|name| *name != self.name);
    }
}

/// The way in which the parameters name a store.
pub(super) struct Selector {
    pub(super) uuid: Option<String>,
    pub(super) name: Option<String>,
}

impl OpenStore {
    pub(super) fn new(store: LvStore, base: &Arc<dyn Bdev>, claim: Claim) -> Rc<Self> {
        let name = format!("lvstore on {}", base.name());
        Rc::new(Self {
            store: Arc::new(store),
            base: Arc::downgrade(base),
            aside: Aside::new(name.clone(), OPERATIONS),
            closing: Aside::new(name, 2),
            gone: Cell::new(false),
            claim: Cell::new(Some(claim)),
        })
    }

    pub(super) fn facts(&self) -> Arc<Facts> {
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

    /// Closes or deletes it.
    pub(super) async fn end(
        &self,
        host: &Rc<dyn Host>,
        operation: impl FnOnce(&LvStore) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        self.gone.set(true);
        let store = Arc::clone(&self.store);
        self.closing.run(host, LIMIT, move || operation(&store)).await
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
        let all = self.stores.take();
        all.iter().for_each(|store| store.gone.set(true));
        all
    }

    pub(super) fn add(&self, store: Rc<OpenStore>) {
        self.stores.borrow_mut().push(store);
    }

    /// Removes a store. Returns whether it was there.
    pub(super) fn remove(&self, store: &Rc<OpenStore>) -> bool {
        let mut stores = self.stores.borrow_mut();
        let before = stores.len();
        stores.retain(|other| !Rc::ptr_eq(other, store));
        store.gone.set(true);
        stores.len() < before
    }

    pub(super) fn named(&self, name: &str) -> Option<Rc<OpenStore>> {
        self.all().into_iter().find(|store| store.facts().store.name == name)
    }

    /// Reserves a name for a store. `None`: it is taken.
    pub(super) fn reserve(&self, name: &str) -> Option<ReservedName> {
        let taken = self.names.borrow().iter().any(|taken| taken == name);
        if taken || self.named(name).is_some() {
            return None;
        }
        self.names.borrow_mut().push(name.to_owned());
        Some(ReservedName { name: name.to_owned(), names: Rc::clone(&self.names) })
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
