//! The block devices by name, in the order of their creation, and what each was made with.
//!
//! Lives on the control thread and never blocks it: devices are made elsewhere while their name is
//! reserved here. A wrapper (delay, error) may name a base that does not exist; it waits for it and
//! comes to life when the base is created, which SPDK calls *examine*.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use bdev::{
    Bdev, Delay, DelayOptions, ErrorDisk, ErrorOptions, FileDisk, Flavour, Latency, Malloc, Null,
};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tracing::{debug, error};
use uuid::Uuid;

/// A positive errno, as SPDK's RPCs answer it.
pub(crate) type Errno = i32;

/// SPDK's modules that are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Malloc,
    Null,
    Aio,
    Uring,
    Delay,
    Error,
}

impl Kind {
    /// The method that makes one.
    pub(crate) fn create_method(self) -> &'static str {
        match self {
            Self::Malloc => "bdev_malloc_create",
            Self::Null => "bdev_null_create",
            Self::Aio => "bdev_aio_create",
            Self::Uring => "bdev_uring_create",
            Self::Delay => "bdev_delay_create",
            Self::Error => "bdev_error_create",
        }
    }
}

/// A device of one of the kinds.
#[derive(Clone)]
pub(crate) enum Disk {
    Malloc(Arc<Malloc>),
    Null(Arc<Null>),
    File(Arc<FileDisk>),
    Delay(Arc<Delay>),
    Error(Arc<ErrorDisk>),
}

impl Disk {
    /// The device, whatever its kind.
    pub(crate) fn bdev(&self) -> Arc<dyn Bdev> {
        match self {
            Self::Malloc(disk) => Arc::clone(disk) as _,
            Self::Null(disk) => Arc::clone(disk) as _,
            Self::File(disk) => Arc::clone(disk) as _,
            Self::Delay(disk) => Arc::clone(disk) as _,
            Self::Error(disk) => Arc::clone(disk) as _,
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Malloc(_) => Kind::Malloc,
            Self::Null(_) => Kind::Null,
            Self::File(disk) if disk.flavour() == Flavour::Aio => Kind::Aio,
            Self::File(_) => Kind::Uring,
            Self::Delay(_) => Kind::Delay,
            Self::Error(_) => Kind::Error,
        }
    }

    /// What a wrapper is on.
    pub(crate) fn base(&self) -> Option<&Arc<dyn Bdev>> {
        match self {
            Self::Delay(disk) => Some(disk.base()),
            Self::Error(disk) => Some(disk.base()),
            Self::Malloc(_) | Self::Null(_) | Self::File(_) => None,
        }
    }
}

/// A wrapper as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wrapper {
    /// Its base's name or UUID.
    pub(crate) base: String,
    /// A delay's latencies; none for an error device.
    pub(crate) latency: Option<Latency>,
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

    fn has_name(&self, name: &str) -> bool {
        self.name == name || Uuid::try_parse(name).is_ok_and(|uuid| uuid == self.uuid)
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

/// A delay's latencies under the names of `bdev_delay_create`.
pub(crate) fn latency_params(latency: Latency) -> Map<String, Value> {
    let Latency { avg_read_us, p99_read_us, avg_write_us, p99_write_us } = latency;
    [
        ("avg_read_latency", avg_read_us),
        ("p99_read_latency", p99_read_us),
        ("avg_write_latency", avg_write_us),
        ("p99_write_latency", p99_write_us),
    ]
    .into_iter()
    .map(|(name, us)| (name.to_owned(), us.into()))
    .collect()
}

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
    devices: Vec<Device>,
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
    /// EEXIST if the name or the UUID is taken, also by a device that is being made.
    pub(crate) fn reserve(
        &self,
        name: Option<String>,
        uuid: Option<Uuid>,
        params: Map<String, Value>,
    ) -> Result<Reservation<'_>, Errno> {
        let mut inner = self.inner.borrow_mut();
        let name = name.unwrap_or_else(|| inner.next_malloc_name());
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
        let inner = self.inner.borrow();
        inner
            .devices
            .iter()
            .find(|d| d.disk().is_some() && d.has_name(name))
            .and_then(|d| inner.show(d))
    }

    /// All live devices.
    pub(crate) fn all(&self) -> Vec<Arc<dyn Bdev>> {
        self.inner.borrow().devices.iter().filter_map(Device::disk).map(Disk::bdev).collect()
    }

    /// All live devices, to be shown, in the order of their creation.
    pub(crate) fn all_shown(&self) -> Vec<Shown> {
        let inner = self.inner.borrow();
        inner.devices.iter().filter_map(|device| inner.show(device)).collect()
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
        tokio::time::timeout(limit, wait).await.ok()
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
        Ok(all)
    }

    /// Brings wrappers to life that wait for this device.
    pub(crate) fn examine(&self, name: &str) {
        let mut inner = self.inner.borrow_mut();
        let waits = |d: &Device| matches!(&d.state, State::Waiting(w) if w.base == name);
        let ids: Vec<u64> = inner.devices.iter().filter(|d| waits(d)).map(|d| d.id).collect();
        ids.into_iter().for_each(|id| inner.wake(id));
        inner.arrived(self);
    }

    /// What `save_config` writes for each device.
    pub(crate) fn config(&self) -> Vec<(Kind, Map<String, Value>)> {
        self.inner.borrow().devices.iter().filter_map(Device::config).collect()
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
        let taken = |d: &Device| {
            d.has_name(name) || d.has_name(&text) || as_uuid.is_some_and(|uuid| uuid == d.uuid)
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

    fn live(&self, name: &str) -> Option<Disk> {
        self.devices.iter().filter(|d| d.has_name(name)).find_map(Device::disk).cloned()
    }

    fn position(&self, bdev: &Arc<dyn Bdev>) -> Option<usize> {
        let is_it = |d: &Device| d.disk().is_some_and(|disk| Arc::ptr_eq(&disk.bdev(), bdev));
        self.devices.iter().position(is_it)
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
            Some(latency) => {
                Delay::create(DelayOptions { name, base, latency, uuid }).map(Disk::Delay)
            }
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
        while bdevs.auto_examine.get() {
            let waiting = |d: &&Device| {
                matches!(&d.state, State::Waiting(w)
                    if self.live(&w.base).is_some_and(|base| !self.is_claimed(&base.bdev())))
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
