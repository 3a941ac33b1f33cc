//! The bdevs by name, in the order of their creation.
//!
//! It is used on the control thread and never blocks it: a bdev is created on another thread while
//! its name is reserved here. No module's code runs, and no module's object is dropped, while the
//! registry is borrowed.

mod examine;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use tracing::{debug, error};
use uuid::Uuid;

use crate::contract::Bdev;
use crate::control::claims::{Claim, ClaimKind, Claimed, Claims};
use crate::control::method::Call;
use crate::control::module::{Entry, Waiting};

pub(crate) use examine::Due;

/// A positive errno, as SPDK's RPCs return it.
pub type Errno = i32;

/// Identifies a bdev, or a request that waits to become one. It is never reused, except by a bdev
/// that is created again because its base has returned. Ordered by creation; the bdevs of one call
/// are in the order in which the call creates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BdevId {
    call: u64,
    part: u32,
}

impl BdevId {
    pub(crate) const fn new(call: u64) -> Self {
        Self { call, part: 0 }
    }
}

/// A bdev's name or UUID, as a caller gave it. Parsed once, then compared with many bdevs.
#[derive(Clone, Copy)]
struct Name<'a> {
    text: &'a str,
    uuid: Option<Uuid>,
}

impl<'a> From<&'a str> for Name<'a> {
    fn from(text: &'a str) -> Self {
        Self { text, uuid: Uuid::try_parse(text).ok() }
    }
}

#[derive(Clone)]
enum State {
    /// The bdev is being created.
    Reserved,
    /// The base does not exist, or is claimed.
    Waiting {
        waiting: Rc<dyn Waiting>,
        /// The base on which it could not be created.
        refused: Option<BdevId>,
    },
    Live(Live),
}

/// A live bdev.
#[derive(Clone)]
pub struct Live {
    /// The bdev.
    pub bdev: Arc<dyn Bdev>,
    /// The module's entry for it.
    pub entry: Rc<dyn Entry>,
    /// Set when the modules have examined it, or are about to.
    examined: bool,
    /// Set when operators have been told of it.
    announced: bool,
}

impl Live {
    fn new(bdev: Arc<dyn Bdev>, entry: Rc<dyn Entry>) -> Self {
        Self { bdev, entry, examined: false, announced: false }
    }
}

struct Row {
    id: BdevId,
    /// `None` if a waiting request does not know its names yet.
    name: Option<String>,
    /// `None` if a waiting request does not know it yet.
    uuid: Option<Uuid>,
    /// A further name of a live bdev.
    alias: Option<String>,
    state: State,
}

impl Row {
    fn live(&self) -> Option<&Live> {
        match &self.state {
            State::Live(live) => Some(live),
            State::Reserved | State::Waiting { .. } => None,
        }
    }

    fn waiting(&self) -> Option<Rc<dyn Any>> {
        match &self.state {
            State::Waiting { waiting, .. } => Some(Rc::clone(waiting) as _),
            State::Reserved | State::Live(_) => None,
        }
    }

    fn has_name<'a>(&self, name: impl Into<Name<'a>>) -> bool {
        let Name { text, uuid } = name.into();
        [&self.name, &self.alias].iter().any(|name| name.as_deref() == Some(text))
            || (uuid.is_some() && uuid == self.uuid)
    }

    /// `None` if it is being created.
    fn module(&self) -> Option<&'static str> {
        match &self.state {
            State::Reserved => None,
            State::Waiting { waiting, .. } => Some(waiting.module()),
            State::Live(live) => Some(live.entry.module()),
        }
    }
}

pub(crate) struct Inner {
    /// By ascending id.
    rows: RefCell<Vec<Row>>,
    ids: Cell<u64>,
    claims: Rc<Claims>,
    /// Names given to `bdev_examine`: the bdevs of these names are examined.
    examined: RefCell<Vec<String>>,
    /// Whether all bdevs are examined (`bdev_auto_examine`).
    auto_examine: Cell<bool>,
    /// The number of examinations under way.
    examining: Cell<usize>,
    changed: Box<dyn Fn()>,
}

/// All bdevs, and the requests that wait to become bdevs. Clones share one registry.
#[derive(Clone)]
pub struct Registry(Rc<Inner>);

/// A name that is reserved while its bdev is created. Dropping the reservation releases the name.
pub struct Reservation {
    registry: Registry,
    id: BdevId,
    /// The bdev's name.
    pub name: String,
    /// The bdev's identity.
    pub uuid: Uuid,
}

impl Registry {
    /// Makes an empty registry, which calls `changed` when a bdev was added or removed, or
    /// examinations have ended.
    pub fn new(changed: impl Fn() + 'static) -> Self {
        Self(Rc::new(Inner {
            rows: RefCell::default(),
            ids: Cell::new(0),
            claims: Rc::default(),
            examined: RefCell::default(),
            auto_examine: Cell::new(true),
            examining: Cell::new(0),
            changed: Box::new(changed),
        }))
    }

    /// Reserves a name and a UUID; without a UUID, a random one.
    ///
    /// # Errors
    /// EEXIST if the name or the UUID is in use, also by a bdev that is being created; EBUSY while
    /// the close of the file of a deleted bdev of this name blocks.
    pub fn reserve(&self, name: String, uuid: Option<Uuid>) -> Result<Reservation, Errno> {
        let account = account_name(&name);
        if closer::stuck().iter().any(|stuck| stuck.name == account) {
            error!("{account}: the file of the deleted device of this name is still being closed");
            return Err(libc::EBUSY);
        }
        let uuid = uuid.unwrap_or_else(Uuid::new_v4);
        let id = self.add(Some(&name), Some(uuid), State::Reserved)?;
        Ok(Reservation { registry: self.clone(), id, name, uuid })
    }

    /// Adds a request that waits for its base.
    ///
    /// # Errors
    /// EEXIST if its name or UUID is in use.
    pub(crate) fn add_waiting(&self, waiting: Rc<dyn Waiting>) -> Result<BdevId, Errno> {
        let (name, uuid) = (waiting.name().map(str::to_owned), waiting.uuid());
        self.add(name.as_deref(), uuid, State::Waiting { waiting, refused: None })
    }

    fn add(&self, name: Option<&str>, uuid: Option<Uuid>, state: State) -> Result<BdevId, Errno> {
        self.check_free(name, uuid, None)?;
        self.0.ids.set(self.0.ids.get() + 1);
        let id = BdevId::new(self.0.ids.get());
        let name = name.map(str::to_owned);
        self.0.rows.borrow_mut().push(Row { id, name, uuid, alias: None, state });
        Ok(id)
    }

    /// Fails if another row than `own` has the name or the UUID.
    fn check_free(
        &self,
        name: Option<&str>,
        uuid: Option<Uuid>,
        own: Option<BdevId>,
    ) -> Result<(), Errno> {
        let text = uuid.map(|uuid| uuid.to_string());
        let names = [name, text.as_deref()].map(|name| name.map(Name::from));
        let taken = |row: &&Row| names.iter().flatten().any(|name| row.has_name(*name));
        let rows = self.0.rows.borrow();
        let Some(other) = rows.iter().filter(|row| Some(row.id) != own).find(taken) else {
            return Ok(());
        };
        let (name, other) = (name.unwrap_or_default(), other.name.as_deref().unwrap_or_default());
        let text = text.unwrap_or_default();
        error!("bdev {name}: the name or the UUID {text} is taken by {other}");
        Err(libc::EEXIST)
    }

    /// Gives a bdev another alias, or none. The bdev's module describes the alias.
    ///
    /// # Errors
    /// EEXIST if another bdev has this name; ENODEV if the bdev is not registered.
    pub fn set_alias(&self, bdev: &Arc<dyn Bdev>, alias: Option<String>) -> Result<(), Errno> {
        let id = self.id_of(bdev).ok_or(libc::ENODEV)?;
        self.check_free(alias.as_deref(), None, Some(id))?;
        let mut rows = self.0.rows.borrow_mut();
        if let Some(row) = rows.iter_mut().find(|row| row.id == id) {
            row.alias = alias;
        }
        Ok(())
    }

    /// Returns the alias of a live bdev.
    #[must_use]
    pub fn alias(&self, id: BdevId) -> Option<String> {
        self.0.rows.borrow().iter().find(|row| row.id == id)?.alias.clone()
    }

    /// Returns whether a bdev has this name or UUID, or will have it.
    #[must_use]
    pub fn is_taken(&self, name: &str) -> bool {
        self.0.rows.borrow().iter().any(|row| row.has_name(name))
    }

    /// Returns the id of the live bdev with this name or UUID.
    #[must_use]
    pub fn id(&self, name: &str) -> Option<BdevId> {
        let (rows, name) = (self.0.rows.borrow(), Name::from(name));
        rows.iter().find(|row| row.live().is_some() && row.has_name(name)).map(|row| row.id)
    }

    /// Returns all ids, for callers that process a few at a time. Between two steps they must not
    /// hold a bdev: it may be deleted, and they must not be the ones to drop it.
    #[must_use]
    pub fn ids(&self) -> Vec<BdevId> {
        self.0.rows.borrow().iter().map(|row| row.id).collect()
    }

    /// Returns this bdev; `None` if it is not live or does not exist any more.
    #[must_use]
    pub fn live(&self, id: BdevId) -> Option<Live> {
        let rows = self.0.rows.borrow();
        let at = rows.binary_search_by_key(&id, |row| row.id).ok()?;
        rows[at].live().cloned()
    }

    /// Returns the live bdev with this name or UUID.
    #[must_use]
    pub fn bdev(&self, name: &str) -> Option<Arc<dyn Bdev>> {
        self.live(self.id(name)?).map(|live| live.bdev)
    }

    /// Returns the entry of the live bdev with this name or UUID, if it is of this type.
    #[must_use]
    pub fn entry<E: Entry>(&self, name: &str) -> Option<Rc<E>> {
        let entry: Rc<dyn Any> = self.live(self.id(name)?)?.entry;
        entry.downcast().ok()
    }

    /// Returns the waiting request with this name or UUID, if it is of this type.
    #[must_use]
    pub fn waiting_named<W: Waiting>(&self, name: &str) -> Option<Rc<W>> {
        let (rows, name) = (self.0.rows.borrow(), Name::from(name));
        let mut named = rows.iter().filter(|row| row.has_name(name));
        named.find_map(|row| row.waiting()?.downcast().ok())
    }

    /// Returns all live bdevs.
    #[must_use]
    pub fn all(&self) -> Vec<Live> {
        self.0.rows.borrow().iter().filter_map(Row::live).cloned().collect()
    }

    /// Returns all live bdevs whose entries are of this type.
    #[must_use]
    pub fn entries_of<E: Entry>(&self) -> Vec<(BdevId, Rc<E>)> {
        let rows = self.0.rows.borrow();
        let of_type = |row: &Row| {
            let entry: Rc<dyn Any> = Rc::clone(&row.live()?.entry) as _;
            Some((row.id, entry.downcast().ok()?))
        };
        rows.iter().filter_map(of_type).collect()
    }

    /// Returns all waiting requests of this type.
    #[must_use]
    pub fn waiting_of<W: Waiting>(&self) -> Vec<(BdevId, Rc<W>)> {
        let rows = self.0.rows.borrow();
        let of_type = |row: &Row| Some((row.id, row.waiting()?.downcast().ok()?));
        rows.iter().filter_map(of_type).collect()
    }

    /// Returns whether this bdev object is registered.
    #[must_use]
    pub fn holds(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.id_of(bdev).is_some()
    }

    fn id_of(&self, bdev: &Arc<dyn Bdev>) -> Option<BdevId> {
        let is_it = |row: &&Row| row.live().is_some_and(|live| Arc::ptr_eq(&live.bdev, bdev));
        self.0.rows.borrow().iter().find(is_it).map(|row| row.id)
    }

    /// Takes a claim on a bdev. `owner` is the module's name, or the controller's.
    ///
    /// # Errors
    /// Returns the claim that excludes this one. A bdev that is not registered any more has no
    /// claims.
    pub fn claim(
        &self,
        bdev: &Arc<dyn Bdev>,
        kind: ClaimKind,
        owner: &str,
    ) -> Result<Claim, Claimed> {
        // No other bdev has this id.
        let id = self.id_of(bdev).unwrap_or(BdevId::new(0));
        self.0.claims.take(id, kind, owner)
    }

    /// Returns the claim on this bdev as `bdev_get_bdevs` shows it.
    #[must_use]
    pub fn claim_type(&self, id: BdevId) -> Option<&'static str> {
        self.0.claims.shown(id)
    }

    /// Returns the calls that create this bdev again. Empty if it is being created or does not
    /// exist any more. Empty too for a request whose base exists but is in use: loaded, it could
    /// take the base before the present user does.
    #[must_use]
    pub fn config(&self, id: BdevId) -> Vec<Call> {
        let state = {
            let rows = self.0.rows.borrow();
            rows.binary_search_by_key(&id, |row| row.id).ok().map(|at| rows[at].state.clone())
        };
        if let Some(State::Waiting { waiting, .. }) = &state
            && let Some(base) = self.id(waiting.base())
            && self.0.claims.in_the_way(base, waiting.claims(), waiting.module()).is_some()
        {
            return vec![];
        }
        match state {
            Some(State::Live(live)) => live.entry.config(),
            Some(State::Waiting { waiting, .. }) => waiting.config(),
            Some(State::Reserved) | None => vec![],
        }
    }

    /// Returns the bdevs that have this one as a base.
    fn uppers(&self, bdev: &Arc<dyn Bdev>) -> Vec<Live> {
        let is_base = |base: &Arc<dyn Bdev>| Arc::ptr_eq(base, bdev);
        self.all().into_iter().filter(|live| live.bdev.bases().iter().any(is_base)).collect()
    }

    /// Adds the bdev and the bdevs on it, the uppermost first, each once.
    fn add_with_uppers(
        &self,
        bdev: &Arc<dyn Bdev>,
        follow: &dyn Fn(&Live, &Arc<dyn Bdev>) -> bool,
        all: &mut Vec<Arc<dyn Bdev>>,
    ) {
        if all.iter().any(|known| Arc::ptr_eq(known, bdev)) {
            return;
        }
        for upper in self.uppers(bdev).iter().filter(|upper| follow(upper, bdev)) {
            self.add_with_uppers(&upper.bdev, follow, all);
        }
        all.push(Arc::clone(bdev));
    }

    /// Tells the entries on a bdev that its size has changed. Returns all bdevs whose size has
    /// changed, the uppermost first.
    pub(crate) fn resized(&self, bdev: &Arc<dyn Bdev>) -> Vec<Arc<dyn Bdev>> {
        let mut all = vec![];
        self.add_with_uppers(bdev, &|upper, _| upper.entry.base_resized(), &mut all);
        all
    }

    /// Returns the id of this module's bdev, live or waiting, with this name or UUID.
    pub(crate) fn of_module(&self, name: &str, module: &str) -> Option<BdevId> {
        let (rows, name) = (self.0.rows.borrow(), Name::from(name));
        let is_it = |row: &&Row| row.has_name(name) && row.module() == Some(module);
        rows.iter().find(is_it).map(|row| row.id)
    }

    /// Removes bdevs, the bdevs on them that do not go on without them, and the waiting requests with
    /// these ids. Returns the bdevs that were live, the uppermost first; they may still have users.
    pub(crate) fn remove(&self, ids: &[BdevId]) -> Vec<Arc<dyn Bdev>> {
        let mut all = vec![];
        let goes_too = |upper: &Live, base: &Arc<dyn Bdev>| !upper.entry.base_leaving(base);
        for live in ids.iter().filter_map(|id| self.live(*id)) {
            self.add_with_uppers(&live.bdev, &goes_too, &mut all);
        }
        let lives = all.iter().filter_map(|bdev| self.live(self.id_of(bdev)?));
        lives.for_each(|live| live.entry.deleting());
        let named = self.take_rows(|row| ids.contains(&row.id));
        for id in all.iter().filter_map(|bdev| self.id_of(bdev)).collect::<Vec<_>>() {
            self.base_gone(id);
        }
        drop(named);
        all
    }

    /// Removes a bdev whose base is gone.
    fn base_gone(&self, id: BdevId) {
        let Some(live) = self.live(id) else { return };
        debug!("bdev {}: removed with its base", live.bdev.name());
        self.0.claims.end_all(id);
        let Some(waiting) = live.entry.base_gone() else {
            drop(self.take_rows(|row| row.id == id));
            return;
        };
        let mut rows = self.0.rows.borrow_mut();
        if let Some(row) = rows.iter_mut().find(|row| row.id == id) {
            row.name = waiting.name().map(str::to_owned);
            row.uuid = waiting.uuid();
            row.alias = None;
            row.state = State::Waiting { waiting, refused: None };
        }
        // `live` keeps the entry until the registry is not borrowed any more.
        drop(rows);
    }

    fn take_rows(&self, which: impl Fn(&Row) -> bool) -> Vec<Row> {
        self.0.rows.borrow_mut().extract_if(.., |row| which(row)).collect()
    }

    /// Replaces a waiting request by the bdevs that it has created.
    ///
    /// # Errors
    /// EEXIST if a name or a UUID of the bdevs is taken; ENODEV if the request or a base is gone.
    pub(crate) fn come_to_life(&self, id: BdevId, made: &[Rc<dyn Entry>]) -> Result<(), Errno> {
        let mut new = vec![];
        for (part, entry) in (0..).zip(made) {
            let bdev = entry.bdev();
            self.check_free(Some(bdev.name()), Some(bdev.uuid()), Some(id))?;
            if !bdev.bases().iter().all(|base| self.holds(base)) {
                return Err(libc::ENODEV);
            }
            let (name, uuid) = (Some(bdev.name().to_owned()), Some(bdev.uuid()));
            let state = State::Live(Live::new(bdev, Rc::clone(entry)));
            new.push(Row { id: BdevId { part, ..id }, name, uuid, alias: None, state });
        }
        // Dropped when the registry is not borrowed any more.
        let before = self.take_rows(|row| row.id == id);
        if before.is_empty() {
            return Err(libc::ENODEV);
        }
        let mut rows = self.0.rows.borrow_mut();
        let at = rows.partition_point(|row| row.id < id);
        rows.splice(at..at, new);
        Ok(())
    }
}

impl Reservation {
    /// Gives the bdev an alias.
    ///
    /// # Errors
    /// EEXIST if another bdev has this name.
    pub fn set_alias(&self, alias: String) -> Result<(), Errno> {
        self.registry.check_free(Some(&alias), None, Some(self.id))?;
        let mut rows = self.registry.0.rows.borrow_mut();
        if let Some(row) = rows.iter_mut().find(|row| row.id == self.id) {
            row.alias = Some(alias);
        }
        Ok(())
    }

    /// Registers the created bdev.
    ///
    /// # Errors
    /// ENODEV if one of its bases was deleted meanwhile.
    pub fn complete(self, entry: Rc<dyn Entry>) -> Result<(), Errno> {
        let bdev = entry.bdev();
        if !bdev.bases().iter().all(|base| self.registry.holds(base)) {
            return Err(libc::ENODEV);
        }
        let mut rows = self.registry.0.rows.borrow_mut();
        if let Some(row) = rows.iter_mut().find(|row| row.id == self.id) {
            row.state = State::Live(Live::new(bdev, entry));
        }
        drop(rows);
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let reserved = |row: &Row| row.id == self.id && matches!(row.state, State::Reserved);
        drop(self.registry.take_rows(reserved));
    }
}

/// Returns the name of the [`closer::Account`] that closes the file of the disk `name`.
#[must_use]
pub fn account_name(name: &str) -> String {
    format!("bdev {name}")
}
