//! The block devices by name, in the order of their creation, and what each was made with.
//!
//! Lives on the control thread and never blocks it: devices are made elsewhere while their name is
//! reserved here. A wrapper (delay, error) may name a base that does not exist; it waits for it and
//! comes to life when the base is created, which SPDK calls *examine*.

mod disk;

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use bdev::{Bdev, ErrorDisk, ErrorOptions, FileDisk, Latency};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tracing::{debug, error};
use uuid::Uuid;

use disk::make_delay;
pub(crate) use disk::{Disk, Kind, Wrapper, latency_params};

/// A positive errno, as SPDK's RPCs answer it.
pub(crate) type Errno = i32;

/// A device's name or UUID, as a caller gave it. Parsed once, then compared with many devices.
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

impl<'a> From<&'a String> for Name<'a> {
    fn from(text: &'a String) -> Self {
        text.as_str().into()
    }
}

enum State {
    /// It is being made on the blocking pool.
    Making,
    /// Its base does not exist.
    Waiting(Wrapper),
    Live(Disk),
}

struct Device {
    id: u64,
    name: String,
    uuid: Uuid,
    /// What its create method was given, with the name and the UUID that came of it.
    params: Map<String, Value>,
    state: State,
}

impl Device {
    fn disk(&self) -> Option<&Disk> {
        match &self.state {
            State::Live(disk) => Some(disk),
            State::Making | State::Waiting(_) => None,
        }
    }

    fn has_name<'a>(&self, name: impl Into<Name<'a>>) -> bool {
        let Name { text, uuid } = name.into();
        self.name == text || uuid == Some(self.uuid)
    }

    fn is_on(&self, base: &Arc<dyn Bdev>) -> bool {
        self.disk().and_then(Disk::base).is_some_and(|mine| Arc::ptr_eq(mine, base))
    }

    /// What `save_config` writes; none for a device that is being made.
    fn config(&self) -> Option<(Kind, Map<String, Value>)> {
        let mut params = self.params.clone();
        let kind = match &self.state {
            State::Making => return None,
            State::Waiting(Wrapper { latency: None, .. }) => Kind::Error,
            State::Waiting(Wrapper { latency: Some(_), .. }) => Kind::Delay,
            State::Live(disk) => {
                match disk {
                    Disk::Null(null) => {
                        params.insert("num_blocks".into(), null.num_blocks().into());
                    }
                    Disk::Delay(delay) => params.extend(latency_params(delay.latency())),
                    Disk::Malloc(_) | Disk::File(_) | Disk::Error(_) => {}
                }
                disk.kind()
            }
        };
        Some((kind, params))
    }
}

/// Identifies a device; never used again after it is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BdevId(u64);

/// A live device as the RPCs show it.
pub(crate) struct Shown {
    pub(crate) disk: Disk,
    pub(crate) bdev: Arc<dyn Bdev>,
    /// What its create method was given.
    pub(crate) params: Map<String, Value>,
    /// Whether a wrapper is on it.
    pub(crate) claimed: bool,
}

#[derive(Default)]
struct Inner {
    /// By ascending `id`.
    devices: Vec<Device>,
    /// Names given to `bdev_examine`: wrappers on these devices are created automatically.
    examined: Vec<String>,
    ids: u64,
    /// Number of the next malloc disk without a name.
    malloc_number: u64,
}

/// All block devices.
pub(crate) struct Bdevs {
    inner: RefCell<Inner>,
    /// Told when a device has come to life.
    arrived: watch::Sender<()>,
    /// Whether wrappers come to life by themselves (`bdev_auto_examine`).
    pub(crate) auto_examine: Cell<bool>,
}

/// A name that nobody else can take while its device is made. Dropping it gives the name up.
pub(crate) struct Reservation<'a> {
    bdevs: &'a Bdevs,
    id: u64,
    /// The device's name.
    pub(crate) name: String,
    /// The device's identity.
    pub(crate) uuid: Uuid,
}

impl Default for Bdevs {
    fn default() -> Self {
        Self {
            inner: RefCell::default(),
            arrived: watch::Sender::new(()),
            auto_examine: Cell::new(true),
        }
    }
}

impl Bdevs {
    /// Reserves a name, `Malloc<n>` if there is none, and a UUID, a random one if there is none.
    ///
    /// # Errors
    /// EEXIST if the name or the UUID is in use, also by a device that is being made; EBUSY while
    /// closing the file of a deleted device of this name blocks.
    pub(crate) fn reserve(
        &self,
        name: Option<String>,
        uuid: Option<Uuid>,
        params: Map<String, Value>,
    ) -> Result<Reservation<'_>, Errno> {
        let mut inner = self.inner.borrow_mut();
        let name = name.unwrap_or_else(|| inner.next_malloc_name());
        let account = bdev::account_name(&name);
        if closer::stuck().iter().any(|stuck| stuck.name == account) {
            error!("{account}: the file of the deleted device of this name is still being closed");
            return Err(libc::EBUSY);
        }
        let (id, uuid) = inner.add(&name, uuid, params, State::Making)?;
        Ok(Reservation { bdevs: self, id, name, uuid })
    }

    /// Makes a wrapper, now or when its base is created.
    ///
    /// # Errors
    /// EEXIST if the name or the UUID is taken, EPERM if the base has a wrapper already.
    pub(crate) fn add_wrapper(
        &self,
        name: &str,
        uuid: Option<Uuid>,
        wrapper: Wrapper,
        params: Map<String, Value>,
    ) -> Result<(), Errno> {
        let mut inner = self.inner.borrow_mut();
        if let Some(base) = inner.live(&wrapper.base)
            && inner.is_claimed(&base.bdev())
        {
            return Err(libc::EPERM);
        }
        let (id, _) = inner.add(name, uuid, params, State::Waiting(wrapper))?;
        inner.wake(id);
        inner.arrived(self);
        Ok(())
    }

    /// The live device with this name or UUID.
    pub(crate) fn disk(&self, name: &str) -> Option<Disk> {
        self.inner.borrow().live(name)
    }

    /// The live device with this name or UUID, to be shown.
    pub(crate) fn shown(&self, name: &str) -> Option<Shown> {
        self.shown_by_id(self.id(name)?)
    }

    /// All live devices.
    pub(crate) fn all(&self) -> Vec<Arc<dyn Bdev>> {
        self.inner.borrow().devices.iter().filter_map(Device::disk).map(Disk::bdev).collect()
    }

    /// All live disks in files.
    pub(crate) fn files(&self) -> Vec<Arc<FileDisk>> {
        let file = |disk: &Disk| match disk {
            Disk::File(file) => Some(Arc::clone(file)),
            _ => None,
        };
        self.inner.borrow().devices.iter().filter_map(Device::disk).filter_map(file).collect()
    }

    /// The live device with this name or UUID.
    pub(crate) fn id(&self, name: &str) -> Option<BdevId> {
        let (inner, name) = (self.inner.borrow(), Name::from(name));
        let device = inner.devices.iter().find(|d| d.disk().is_some() && d.has_name(name))?;
        Some(BdevId(device.id))
    }

    /// The ids of all devices in the order of their creation, for callers that process a few at a
    /// time. They must not hold a device between two steps: it may be deleted, and must not be
    /// dropped by them.
    pub(crate) fn ids(&self) -> Vec<BdevId> {
        self.inner.borrow().devices.iter().map(|device| BdevId(device.id)).collect()
    }

    /// This device, to be shown; `None` if it is not live or does not exist any more.
    pub(crate) fn shown_by_id(&self, id: BdevId) -> Option<Shown> {
        let inner = self.inner.borrow();
        inner.device(id).and_then(|device| inner.show(device))
    }

    /// Whether this very device is registered.
    pub(crate) fn holds(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.inner.borrow().position(bdev).is_some()
    }

    /// Whether a wrapper is on this device, so that nobody else may write to it.
    pub(crate) fn is_claimed(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.inner.borrow().is_claimed(bdev)
    }

    /// The device itself and what is on it.
    pub(crate) fn with_uppers(&self, bdev: &Arc<dyn Bdev>) -> Vec<Arc<dyn Bdev>> {
        self.inner.borrow().with_uppers(bdev)
    }

    /// Waits until a device of this name is there, for `limit` at most.
    pub(crate) async fn wait_for(&self, name: &str, limit: Duration) -> Option<Shown> {
        let mut arrived = self.arrived.subscribe();
        let wait = async {
            loop {
                if let Some(shown) = self.shown(name) {
                    return shown;
                }
                // The sender lives as long as `self`.
                let _ = arrived.changed().await;
            }
        };
        crate::lived::timeout(limit, wait).await
    }

    /// Takes a device of this kind out, and what is on it. Gives the devices that were live, the
    /// uppermost first; somebody may still use them.
    ///
    /// As in SPDK, a delay whose base goes stays known and comes back with its base; an error
    /// device does not. A wrapper that waits is taken out too.
    ///
    /// # Errors
    /// ENODEV if there is none, or it is of another kind.
    pub(crate) fn remove(&self, name: &str, kind: Kind) -> Result<Vec<Arc<dyn Bdev>>, Errno> {
        let mut inner = self.inner.borrow_mut();
        let name = Name::from(name);
        let is_it = |d: &Device| d.has_name(name) && d.config().is_some_and(|(k, _)| k == kind);
        let at = inner.devices.iter().position(is_it).ok_or(libc::ENODEV)?;
        let Some(bdev) = inner.devices[at].disk().map(Disk::bdev) else {
            inner.devices.remove(at);
            return Ok(vec![]);
        };
        let all = inner.with_uppers(&bdev);
        inner.devices.remove(at);
        for upper in all.iter().filter(|upper| !Arc::ptr_eq(upper, &bdev)) {
            inner.base_gone(upper);
        }
        // The base is free now, for which another wrapper may have waited.
        inner.arrived(self);
        Ok(all)
    }

    /// Creates the wrappers on this device automatically, now or when it is created.
    ///
    /// # Errors
    /// EEXIST if the name was given before.
    pub(crate) fn examine(&self, name: &str) -> Result<(), Errno> {
        let mut inner = self.inner.borrow_mut();
        if inner.examined.iter().any(|examined| examined == name) {
            return Err(libc::EEXIST);
        }
        inner.examined.push(name.to_owned());
        inner.arrived(self);
        Ok(())
    }

    /// The names that [`examine`](Self::examine) was given.
    pub(crate) fn examined(&self) -> Vec<String> {
        self.inner.borrow().examined.clone()
    }

    /// Changes a latency of a delay bdev that waits for its base. False if there is none of this
    /// name.
    pub(crate) fn update_waiting(&self, name: &str, change: impl FnOnce(&mut Latency)) -> bool {
        let mut inner = self.inner.borrow_mut();
        let waiting = inner.devices.iter_mut().filter(|d| d.has_name(name)).find_map(|d| {
            match &mut d.state {
                State::Waiting(Wrapper { latency: Some(latency), .. }) => {
                    Some((latency, &mut d.params))
                }
                _ => None,
            }
        });
        let Some((latency, params)) = waiting else { return false };
        change(latency);
        params.extend(latency_params(*latency));
        true
    }

    /// The entry of this device in `save_config`; `None` if it is being made or does not exist any
    /// more.
    pub(crate) fn config(&self, id: BdevId) -> Option<(Kind, Map<String, Value>)> {
        self.inner.borrow().device(id).and_then(Device::config)
    }
}

impl Reservation<'_> {
    /// The device is made.
    pub(crate) fn complete(self, disk: Disk) {
        let mut inner = self.bdevs.inner.borrow_mut();
        if let Some(device) = inner.devices.iter_mut().find(|d| d.id == self.id) {
            device.state = State::Live(disk);
        }
        inner.arrived(self.bdevs);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let making = |d: &Device| d.id == self.id && matches!(d.state, State::Making);
        self.bdevs.inner.borrow_mut().devices.retain(|d| !making(d));
    }
}

impl Inner {
    fn next_malloc_name(&mut self) -> String {
        loop {
            let name = format!("Malloc{}", self.malloc_number);
            self.malloc_number += 1;
            if !self.devices.iter().any(|d| d.has_name(&name)) {
                return name;
            }
        }
    }

    fn add(
        &mut self,
        name: &str,
        uuid: Option<Uuid>,
        mut params: Map<String, Value>,
        state: State,
    ) -> Result<(u64, Uuid), Errno> {
        let uuid = uuid.unwrap_or_else(Uuid::new_v4);
        let text = uuid.to_string();
        let as_uuid = Uuid::try_parse(name).ok();
        let (given, given_uuid) = (Name::from(name), Name::from(&text));
        let taken = |d: &Device| {
            d.has_name(given)
                || d.has_name(given_uuid)
                || as_uuid.is_some_and(|uuid| uuid == d.uuid)
        };
        if let Some(other) = self.devices.iter().find(|d| taken(d)) {
            error!("bdev {name}: the name or the UUID {text} is taken by {}", other.name);
            return Err(libc::EEXIST);
        }
        if !matches!(&state, State::Waiting(Wrapper { latency: None, .. })) {
            params.insert("name".into(), name.into());
        }
        params.insert("uuid".into(), text.into());
        self.ids += 1;
        let id = self.ids;
        let name = name.to_owned();
        self.devices.push(Device { id, name, uuid, params, state });
        Ok((id, uuid))
    }

    fn device(&self, id: BdevId) -> Option<&Device> {
        let at = self.devices.binary_search_by_key(&id.0, |device| device.id).ok()?;
        self.devices.get(at)
    }

    fn live(&self, name: &str) -> Option<Disk> {
        let name = Name::from(name);
        self.devices.iter().filter(|d| d.has_name(name)).find_map(Device::disk).cloned()
    }

    fn position(&self, bdev: &Arc<dyn Bdev>) -> Option<usize> {
        let is_it = |d: &Device| d.disk().is_some_and(|disk| Arc::ptr_eq(&disk.bdev(), bdev));
        self.devices.iter().position(is_it)
    }

    fn is_examined(&self, at: usize) -> bool {
        self.examined.iter().any(|name| self.devices[at].has_name(name))
    }

    fn is_claimed(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.devices.iter().any(|d| d.is_on(bdev))
    }

    fn with_uppers(&self, bdev: &Arc<dyn Bdev>) -> Vec<Arc<dyn Bdev>> {
        let uppers = self.devices.iter().filter(|d| d.is_on(bdev)).filter_map(Device::disk);
        let mut all: Vec<_> = uppers.flat_map(|disk| self.with_uppers(&disk.bdev())).collect();
        all.push(Arc::clone(bdev));
        all
    }

    fn show(&self, device: &Device) -> Option<Shown> {
        let disk = device.disk()?.clone();
        let bdev = disk.bdev();
        Some(Shown { claimed: self.is_claimed(&bdev), params: device.params.clone(), disk, bdev })
    }

    /// A wrapper's base is gone.
    fn base_gone(&mut self, wrapper: &Arc<dyn Bdev>) {
        let Some(at) = self.position(wrapper) else { return };
        let device = &mut self.devices[at];
        debug!("bdev {}: removed with its base", device.name);
        match device.disk() {
            Some(Disk::Delay(delay)) => {
                let latency = delay.latency();
                device.params.extend(latency_params(latency));
                let base = device.params.get("base_bdev_name").and_then(Value::as_str);
                let base = base.unwrap_or_default().to_owned();
                device.state = State::Waiting(Wrapper { base, latency: Some(latency) });
            }
            _ => drop(self.devices.remove(at)),
        }
    }

    /// Brings a waiting wrapper to life if its base is there.
    fn wake(&mut self, id: u64) {
        let Some(at) = self.devices.iter().position(|d| d.id == id) else { return };
        let State::Waiting(Wrapper { base, latency }) = &self.devices[at].state else { return };
        let Some(base) = self.live(base).map(|disk| disk.bdev()) else { return };
        let (name, uuid) = (self.devices[at].name.clone(), Some(self.devices[at].uuid));
        if self.is_claimed(&base) {
            error!("bdev {name}: its base {} has another bdev on it", base.name());
            return;
        }
        let made = match *latency {
            Some(latency) => make_delay(name, base, latency, uuid).map(Disk::Delay),
            None => ErrorDisk::create(ErrorOptions { name, base, uuid }).map(Disk::Error),
        };
        match made {
            Ok(disk) => self.devices[at].state = State::Live(disk),
            Err(e) => error!("bdev {}: {e}", self.devices[at].name),
        }
    }

    /// A device may have come to life: wakes wrappers that waited for it, if they come to life by
    /// themselves, and whoever waits for a name.
    fn arrived(&mut self, bdevs: &Bdevs) {
        loop {
            let may_wake = |base: &Disk| {
                let base = base.bdev();
                let is_examined = || self.position(&base).is_some_and(|at| self.is_examined(at));
                (bdevs.auto_examine.get() || is_examined()) && !self.is_claimed(&base)
            };
            let waiting = |d: &&Device| {
                matches!(&d.state, State::Waiting(w)
                    if self.live(&w.base).is_some_and(|base| may_wake(&base)))
            };
            let Some(id) = self.devices.iter().find(waiting).map(|d| d.id) else { break };
            self.wake(id);
            if self.devices.iter().any(|d| d.id == id && d.disk().is_none()) {
                break;
            }
        }
        bdevs.arrived.send_replace(());
    }
}
