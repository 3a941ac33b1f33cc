//! A connection to a Ceph cluster: librados' cluster handle.
#![expect(unsafe_code, reason = "calls librados")]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bdev::Error;
use closer::Account;

use crate::library::{IoCtx, Library, Rados, checked, owned, text_of};
use crate::predecessors::Own;

/// How a cluster is reached. Disks with equal options share a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterOptions {
    /// The name under which it is registered.
    pub name: Option<String>,
    /// The Ceph user, without `client.`; `None`: `admin`.
    pub user_id: Option<String>,
    /// Which configuration files librados reads.
    pub file: ConfigFile,
    /// Options that are set after the file is read.
    pub options: BTreeMap<String, String>,
    /// A keyring.
    pub key_file: Option<String>,
    /// The CPUs of librados' threads; empty: the CPUs of the calling thread.
    pub cpus: Vec<usize>,
    /// An I/O that the cluster does not answer fails after this number of seconds; 0: it never
    /// fails.
    pub timeout_s: u32,
}

/// A cluster's configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConfigFile {
    /// The first that librados finds: `$CEPH_CONF`, `/etc/ceph/ceph.conf`, … One must exist.
    #[default]
    Found,
    /// The same, but none has to exist.
    FoundIfAny,
    /// This one.
    Given(String),
    /// No file: the options have to hold all that librados needs.
    None,
}

/// Seconds that a connection attempt may take, unless the operator sets `client_mount_timeout`.
/// librados' own limit is 300.
const CONNECT_TIMEOUT_S: u32 = 10;
const CONNECT_TIMEOUT: &str = "client_mount_timeout";

/// A connected cluster handle. Any thread may drop it: a thread of the closer disconnects it.
#[derive(Debug)]
pub struct Cluster {
    connected: Option<Connected>,
    account: Account,
    /// The cluster's identity.
    pub(crate) fsid: String,
    /// The client's address at the cluster.
    pub(crate) address: String,
    /// The cluster has blocklisted this client.
    blocklisted: AtomicBool,
}

/// The connection itself. Dropping it waits for the cluster, and for ever if an I/O is under way.
#[derive(Debug)]
struct Connected {
    library: &'static Library,
    rados: Rados,
    /// Tells later processes of this host whether this client is still alive.
    _own: Option<Own>,
}

// SAFETY: librados is documented as thread-safe; the handle is only passed to its functions.
unsafe impl Send for Connected {}
// SAFETY: as above.
unsafe impl Sync for Connected {}

impl Cluster {
    /// Connects, on the calling thread, whose CPUs librados' threads inherit. Blocks for up to ten
    /// seconds, or for the operator's `client_mount_timeout`.
    ///
    /// # Errors
    /// The library is missing; the configuration is invalid or its file is missing; librados'
    /// errno: ENOENT without a keyring, EACCES with a wrong key, ETIMEDOUT without a monitor.
    pub fn connect(options: &ClusterOptions) -> Result<Arc<Self>, Error> {
        let library = Library::get()?;
        pin_to(&options.cpus)?;
        let user = options.user_id.as_deref().unwrap_or("admin");
        let name = c_string("user_id", &format!("client.{user}"))?;
        let mut rados = ptr::null_mut();
        // SAFETY: the strings live during the call, which fills `rados`.
        let made =
            unsafe { (library.rados_create2)(&raw mut rados, c"ceph".as_ptr(), name.as_ptr(), 0) };
        checked(|| format!("cannot create a Ceph client for client.{user}"), made)?;
        let unconnected = Unconnected { library, rados };
        unconnected.configure(options)?;
        // SAFETY: the handle is valid and not connected.
        let connected = unsafe { (library.rados_connect)(rados) };
        checked(|| format!("cannot connect to the Ceph cluster as client.{user}"), connected)?;
        std::mem::forget(unconnected);
        let mut connected = Connected { library, rados, _own: None };
        let (fsid, address) = (connected.fsid()?, connected.address()?);
        connected._own = Own::announce(&fsid, &address);
        Ok(Arc::new(Self {
            connected: Some(connected),
            account: Account::new(format!("Ceph client.{user}")),
            fsid,
            address,
            blocklisted: AtomicBool::new(false),
        }))
    }

    /// Opens a pool, with the given namespace.
    ///
    /// # Errors
    /// ENOENT if the pool does not exist.
    pub(crate) fn pool(&self, pool: &str, namespace: Option<&str>) -> Result<IoCtx, Error> {
        let name = c_string("pool_name", pool)?;
        let namespace = namespace.map(|name| c_string("namespace", name)).transpose()?;
        let Connected { library, rados, .. } = self.connected.as_ref().expect("taken only in drop");
        let mut context = ptr::null_mut();
        // SAFETY: the handle is connected, and the call fills `context`.
        let result =
            unsafe { (library.rados_ioctx_create)(*rados, name.as_ptr(), &raw mut context) };
        checked(|| format!("cannot open the Ceph pool {pool}"), result)?;
        if let Some(namespace) = namespace {
            // SAFETY: the context is valid; the call copies the string.
            unsafe { (library.rados_ioctx_set_namespace)(context, namespace.as_ptr()) };
        }
        Ok(context)
    }

    /// Records that the cluster has blocklisted this client. Only a new connection can do I/O.
    pub(crate) fn set_blocklisted(&self) {
        self.blocklisted.store(true, Ordering::Relaxed);
    }

    /// Returns whether the cluster has blocklisted this client.
    pub(crate) fn is_blocklisted(&self) -> bool {
        self.blocklisted.load(Ordering::Relaxed)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(connected) = self.connected.take() {
            self.account.drop_later(connected);
        }
    }
}

impl Connected {
    fn fsid(&self) -> Result<String, Error> {
        let mut text = [0; 64];
        // SAFETY: the call writes at most the given number of bytes.
        let result =
            unsafe { (self.library.rados_cluster_fsid)(self.rados, text.as_mut_ptr(), text.len()) };
        checked(|| "cannot read the Ceph cluster's id".into(), result)?;
        Ok(text_of(&text))
    }

    /// The client's address at the cluster.
    fn address(&self) -> Result<String, Error> {
        let mut text: *mut c_char = ptr::null_mut();
        // SAFETY: the call allocates a C string, which is freed below.
        let result = unsafe { (self.library.rados_getaddrs)(self.rados, &raw mut text) };
        checked(|| "cannot read the client's address at the Ceph cluster".into(), result)?;
        // SAFETY: the call has succeeded, so it is a C string.
        let address = unsafe { owned(text) };
        // SAFETY: it came from librados and is not used any more.
        unsafe { (self.library.rados_buffer_free)(text) };
        Ok(address)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        // SAFETY: the handle is connected, and nothing uses it any more: every user of the cluster
        // holds an `Arc`.
        unsafe { (self.library.rados_shutdown)(self.rados) };
    }
}

/// A handle before `rados_connect`.
struct Unconnected {
    library: &'static Library,
    rados: Rados,
}

impl Unconnected {
    fn configure(&self, options: &ClusterOptions) -> Result<(), Error> {
        match &options.file {
            ConfigFile::None => {}
            ConfigFile::Given(path) => {
                let text = c_string("config_file", path)?;
                // SAFETY: the handle is valid, and the string lives during the call.
                let read =
                    unsafe { (self.library.rados_conf_read_file)(self.rados, text.as_ptr()) };
                checked(|| format!("cannot read the Ceph configuration {path}"), read)?;
            }
            ConfigFile::Found | ConfigFile::FoundIfAny => {
                // SAFETY: the handle is valid; without a path, librados looks for a file.
                let read = unsafe { (self.library.rados_conf_read_file)(self.rados, ptr::null()) };
                if options.file == ConfigFile::Found || read != -libc::ENOENT {
                    let what = "cannot read a Ceph configuration ($CEPH_CONF, \
                                /etc/ceph/ceph.conf); check that it exists and is readable";
                    checked(|| what.into(), read)?;
                }
            }
        }
        let default = self.get(CONNECT_TIMEOUT).and_then(|text| text.parse::<f64>().ok());
        if default == Some(300.0) {
            self.set(CONNECT_TIMEOUT, &CONNECT_TIMEOUT_S.to_string())?;
        }
        if options.timeout_s > 0 {
            self.set("rados_osd_op_timeout", &options.timeout_s.to_string())?;
            self.set("rados_mon_op_timeout", &options.timeout_s.to_string())?;
        }
        // A write that is only in the cache is lost when the client is blocklisted, and the host
        // that a guest moves to does not see it.
        self.set("rbd_cache", "false")?;
        for (option, value) in &options.options {
            self.set(option, value)?;
        }
        options.key_file.iter().try_for_each(|path| self.set("keyring", path))
    }

    fn get(&self, option: &str) -> Option<String> {
        let option = CString::new(option).ok()?;
        let mut value = [0; 64];
        // SAFETY: the call writes at most the given number of bytes.
        let result = unsafe {
            (self.library.rados_conf_get)(
                self.rados,
                option.as_ptr(),
                value.as_mut_ptr(),
                value.len(),
            )
        };
        (result == 0).then(|| text_of(&value))
    }

    fn set(&self, option: &str, value: &str) -> Result<(), Error> {
        let (name, text) = (c_string("option", option)?, c_string("value", value)?);
        // SAFETY: the handle is valid, and the strings live during the call.
        let set =
            unsafe { (self.library.rados_conf_set)(self.rados, name.as_ptr(), text.as_ptr()) };
        checked(|| format!("invalid Ceph option {option}, or invalid value for it"), set).map(drop)
    }
}

impl Drop for Unconnected {
    fn drop(&mut self) {
        // SAFETY: librados allows it before a connection and after a failed one.
        unsafe { (self.library.rados_shutdown)(self.rados) };
    }
}

/// Restricts this thread, and those that it starts, to these CPUs, if any are given.
fn pin_to(cpus: &[usize]) -> Result<(), Error> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| Error::System {
        what: format!("core_mask: cannot run on CPUs {cpus:?}"),
        source: e.into(),
    })
}

/// Converts a text to a C string.
///
/// # Errors
/// The text contains a zero byte.
pub(crate) fn c_string(what: &str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Invalid(format!("{what} contains a zero byte")))
}
