//! An open image.
#![expect(unsafe_code, reason = "calls librbd")]

use std::ffi::{c_char, c_void};
use std::fmt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bdev::Error;
use closer::Account;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::cluster::{Cluster, c_string};
use crate::library::{
    ImageInfo, ImagePtr, ImageWatcher, IoCtx, LOCK_EXCLUSIVE, Library, checked, owned,
};
use crate::predecessors;

/// Which image to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    /// The pool.
    pub pool: String,
    /// The namespace in the pool.
    pub namespace: Option<String>,
    /// The image.
    pub image: String,
    /// Refuse writes. The image is then not watched for changes.
    pub read_only: bool,
}

impl ImageName {
    /// Returns whether both name the same data in one cluster.
    pub(crate) fn is_same_image(&self, other: &Self) -> bool {
        (&self.pool, &self.namespace, &self.image) == (&other.pool, &other.namespace, &other.image)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.pool)?;
        self.namespace.iter().try_for_each(|namespace| write!(f, "{namespace}/"))?;
        f.write_str(&self.image)
    }
}

/// What an image's callbacks report, for the task that watches the disk.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Wakes the task: the image may have changed, the cluster has blocklisted this client, the
    /// next attempt to open the image is due, or the disk is deleted.
    pub(crate) any: Notify,
    /// The image's size or snapshots may have changed.
    changed: AtomicBool,
    /// The disk is deleted.
    gone: AtomicBool,
}

impl Events {
    /// Returns whether the image may have changed since the last call.
    pub(crate) fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }

    /// Records that the image may have changed.
    pub(crate) fn report_change(&self) {
        self.changed.store(true, Ordering::Relaxed);
        self.any.notify_one();
    }

    /// Ends the task that watches the disk.
    pub(crate) fn end(&self) {
        self.gone.store(true, Ordering::Relaxed);
        self.any.notify_one();
    }

    /// Returns whether the disk is deleted.
    pub(crate) fn has_ended(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// An open image. Any thread may drop it: a thread of the closer closes it.
#[derive(Debug)]
pub(crate) struct Image {
    open: Option<Open>,
    account: Account,
}

/// The open image itself. Dropping it waits for the cluster, and for ever if an I/O is under way.
#[derive(Debug)]
struct Open {
    library: &'static Library,
    pool: Pool,
    image: ImagePtr,
    watch: Option<u64>,
    /// Held by the update callback until the watch has ended.
    _events: Arc<Events>,
}

// SAFETY: librbd is documented as thread-safe; the pointers are only passed to its functions.
unsafe impl Send for Open {}
// SAFETY: as above.
unsafe impl Sync for Open {}

/// An I/O context for a pool. Keeps the connection to the cluster.
#[derive(Debug)]
struct Pool {
    library: &'static Library,
    context: IoCtx,
    cluster: Arc<Cluster>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the context is valid, and the image in it is closed.
        unsafe { (self.library.rados_ioctx_destroy)(self.context) };
    }
}

/// The sizes of an image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) image: u64,
    pub(crate) object: u64,
}

impl Image {
    /// Opens an image, and takes its exclusive lock from dead processes of this host. May block for
    /// ever.
    ///
    /// # Errors
    /// ENOENT if the pool or the image does not exist; EPERM if the user may not write;
    /// ESHUTDOWN if the cluster has blocklisted this client.
    pub(crate) fn open(
        cluster: &Arc<Cluster>,
        name: &ImageName,
        account: &Account,
        events: &Arc<Events>,
    ) -> Result<Self, Error> {
        let library = Library::get()?;
        let context = cluster.pool(&name.pool, name.namespace.as_deref())?;
        let pool = Pool { library, context, cluster: Arc::clone(cluster) };
        let text = c_string("rbd_name", &name.image)?;
        let open = if name.read_only { library.rbd_open_read_only } else { library.rbd_open };
        let mut image = ptr::null_mut();
        // SAFETY: the context is valid; the call fills `image`.
        let opened = unsafe { open(context, text.as_ptr(), &raw mut image, ptr::null()) };
        checked(|| format!("cannot open the Ceph image {name}"), opened)?;
        let events = Arc::clone(events);
        let mut open = Open { library, pool, image, watch: None, _events: events };
        open.watch(name)?;
        if !name.read_only {
            open.break_dead_locks(name);
        }
        Ok(Self { open: Some(open), account: account.clone() })
    }

    fn inner(&self) -> &Open {
        self.open.as_ref().expect("taken only in drop")
    }

    /// The handle of the image, for librbd's functions.
    pub(crate) fn as_ptr(&self) -> ImagePtr {
        self.inner().image
    }

    /// The cluster of the image.
    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.inner().pool.cluster
    }

    /// Returns the present sizes. May wait for the cluster.
    ///
    /// # Errors
    /// The cluster's errno.
    pub(crate) fn sizes(&self) -> Result<Sizes, Error> {
        let (open, mut info) = (self.inner(), ImageInfo::zeroed());
        // SAFETY: the image is open; the call fills `info`, of the given size.
        let result =
            unsafe { (open.library.rbd_stat)(open.image, &raw mut info, size_of::<ImageInfo>()) };
        checked(|| "cannot read the size of a Ceph image".into(), result)?;
        Ok(Sizes { image: info.size, object: info.object_size })
    }

    /// Makes the image larger. May wait for the cluster.
    ///
    /// # Errors
    /// The cluster's errno.
    pub(crate) fn resize(&self, size: u64) -> Result<(), Error> {
        let open = self.inner();
        // SAFETY: the image is open.
        let result = unsafe { (open.library.rbd_resize)(open.image, size) };
        checked(|| format!("cannot resize a Ceph image to {size} bytes"), result).map(drop)
    }

    /// Finds out who has owned the image since the cluster blocklisted this process's client with
    /// the address `former`. Called when a new client has opened the image. Takes the exclusive
    /// lock from the former client. May wait for the cluster.
    pub(crate) fn owner_since(&self, former: &str) -> Owner {
        let (open, mut owners) = (self.inner(), self.inner().lock_owners());
        if owners.iter().any(|owner| owner == former) {
            // A client that has the image open may take the lock as soon as it is broken.
            let ours = [former, &open.pool.cluster.address];
            let alone = open.watchers().is_some_and(|all| all.iter().all(|a| ours.contains(&&**a)));
            let broken = open.break_lock(former);
            return if alone && broken { Owner::Former } else { Owner::Unknown };
        }
        owners.pop().map_or(Owner::Unknown, Owner::Other)
    }
}

impl Image {
    /// Closes the image on this thread, which releases its lock. Waits for the cluster.
    pub(crate) fn close(mut self) {
        drop(self.open.take());
    }
}

/// Who has owned an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The former client of this process: no other client has written or has the image open.
    Former,
    /// The client with this address owns it now.
    Other(String),
    /// It is not known: nobody owns the image now, it has no exclusive lock, or another client has
    /// it open. Another client may have written.
    Unknown,
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            self.account.drop_later(open);
        }
    }
}

impl Open {
    /// Makes librbd report changes of the image by other clients.
    fn watch(&mut self, name: &ImageName) -> Result<(), Error> {
        let mut handle = 0;
        let events = Arc::as_ptr(&self._events).cast_mut().cast();
        // SAFETY: the image is open; `_events` outlives the watch.
        let result = unsafe {
            (self.library.rbd_update_watch)(self.image, &raw mut handle, on_update, events)
        };
        checked(|| format!("cannot watch the Ceph image {name}"), result)?;
        self.watch = Some(handle);
        Ok(())
    }

    /// Takes the exclusive lock from clients of this host that are dead.
    fn break_dead_locks(&self, name: &ImageName) {
        let fsid = &self.pool.cluster.fsid;
        let owners = self.lock_owners().into_iter();
        for owner in owners.filter(|owner| predecessors::is_dead(fsid, owner)) {
            if self.break_lock(&owner) {
                info!(
                    "Ceph image {name}: took the lock from {owner}, a process of this host that \
                     has ended"
                );
            }
        }
    }

    /// Takes the exclusive lock from the client with this address, and makes the cluster blocklist
    /// that client. Returns false if that fails; the first write then waits for the lock.
    fn break_lock(&self, owner: &str) -> bool {
        let Ok(text) = c_string("owner", owner) else { return false };
        // SAFETY: the image is open, and the string lives during the call.
        let result =
            unsafe { (self.library.rbd_lock_break)(self.image, LOCK_EXCLUSIVE, text.as_ptr()) };
        let broken =
            checked(|| format!("cannot break the exclusive lock of client {owner}"), result);
        broken.inspect_err(|e| warn!("{e}")).is_ok()
    }

    /// The addresses of the clients that have the image open, this one included. `None` if the
    /// cluster does not answer with them, or if there are more than 16.
    fn watchers(&self) -> Option<Vec<String>> {
        const WATCHERS_MAX: usize = 16;
        let mut watchers = [const { ImageWatcher::none() }; WATCHERS_MAX];
        let mut count = WATCHERS_MAX;
        // SAFETY: the image is open; the array has room for `count` watchers.
        let result = unsafe {
            (self.library.rbd_watchers_list)(self.image, watchers.as_mut_ptr(), &raw mut count)
        };
        if result < 0 {
            return None;
        }
        let filled = &mut watchers[..count.min(WATCHERS_MAX)];
        // SAFETY: the call has filled in C strings.
        let addresses = filled.iter().map(|watcher| unsafe { owned(watcher.address) }).collect();
        // SAFETY: the watchers come from this call and are not used any more.
        unsafe { (self.library.rbd_watchers_list_cleanup)(filled.as_mut_ptr(), filled.len()) };
        Some(addresses)
    }

    /// The addresses of the clients that hold the exclusive lock. Empty if it is free, if the image
    /// has no such lock, or if the cluster does not answer with them.
    fn lock_owners(&self) -> Vec<String> {
        const OWNERS_MAX: usize = 8;
        let mut owners: [*mut c_char; OWNERS_MAX] = [ptr::null_mut(); OWNERS_MAX];
        let (mut count, mut mode) = (OWNERS_MAX, 0);
        // SAFETY: the image is open; the array has room for `count` pointers.
        let result = unsafe {
            (self.library.rbd_lock_get_owners)(
                self.image,
                &raw mut mode,
                owners.as_mut_ptr(),
                &raw mut count,
            )
        };
        if result < 0 {
            return vec![];
        }
        let filled = &mut owners[..count.min(OWNERS_MAX)];
        // SAFETY: the call has filled in C strings.
        let addresses = filled.iter().map(|owner| unsafe { owned(*owner) }).collect();
        // SAFETY: the strings come from this call and are not used any more.
        unsafe { (self.library.rbd_lock_get_owners_cleanup)(filled.as_mut_ptr(), filled.len()) };
        addresses
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(watch) = self.watch {
            // SAFETY: the image is open and has this watch; the call waits for running callbacks.
            unsafe { (self.library.rbd_update_unwatch)(self.image, watch) };
        }
        // SAFETY: the image is open, and nothing uses it any more: every I/O holds an `Arc`.
        unsafe { (self.library.rbd_close)(self.image) };
    }
}

/// Called by librbd, on a thread of its own, after each change of the image.
unsafe extern "C" fn on_update(events: *mut c_void) {
    // SAFETY: `Open::watch` has passed this pointer, and the events outlive the watch.
    let events = unsafe { &*events.cast::<Events>() };
    events.report_change();
}
