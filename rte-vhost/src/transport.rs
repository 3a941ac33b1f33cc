//! rte_vhost as a [`Transport`]: sockets, the event thread's callbacks, and replies of the
//! application.
//!
//! rte_vhost accepts, reads, negotiates and acknowledges. The *pre* handler answers every message
//! that concerns memory, rings or fds, so rte_vhost never sees a guest's memory: it maps and unmaps
//! nothing, and one VM's unmapping cannot block the event thread, which serves every VM.
//!
//! The reply to GET_VRING_BASE is *deferred*: the pre handler returns "done" and sends nothing, and
//! the control side sends the reply on its own duplicate of the connection's fd when the I/O has
//! completed. DPDK does not document that rte_vhost allows this, so [`DpdkTransport::start`] tests
//! it on a private socket, the *anchor*. If it fails, handlers wait for a bounded time.
//!
//! The anchor is registered first and never unregistered. This avoids waiting for the end of the
//! event thread, which unregistering the last socket would cause. In DPDK releases before 24.07,
//! connecting to the anchor also wakes the event thread, which would otherwise notice a new
//! listener only after up to a second.
#![expect(unsafe_code, reason = "calls rte_vhost")]

use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{panic, thread};

use closer::{Account, ForeignFd};
use spdk_sys as sys;
use tempfile::TempDir;
use tracing::warn;
use vhost_target::{Offer, OnStart, Target, Transport, protocol};

use crate::callbacks::{self, DEVICE_OPS};
use crate::interpose::{BoundSocket, OnBound};
use crate::shared::{self, shared};
use crate::{event_thread, front_ends, interpose, log, self_test};

/// The file name of the anchor. Below: the path length limit for its directory's parent, so that
/// the anchor's path fits into a socket address.
const ANCHOR: &str = "anchor";
const BASE_BYTES_MAX: usize = 80;

/// The transport. A process has one.
#[derive(Debug)]
pub struct DpdkTransport {
    /// The file of the anchor's socket, which is removed from its directory.
    anchor: File,
    on_bound: Bound,
}

/// [`OnBound`], with the [`fmt::Debug`] that functions do not have.
struct Bound(OnBound);

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnBound")
    }
}

impl DpdkTransport {
    /// Opens the anchor in `dir`, removes `dir`, and tests whether rte_vhost allows deferred
    /// replies. EAL must be started. Each thread that serves front ends calls `on_thread` when it
    /// starts. [`Transport::listen`] calls `on_bound`, and passes on its error.
    ///
    /// # Errors
    /// The socket cannot be created in `dir`, or rte_vhost refuses it.
    pub fn start(
        target: &Arc<Target>,
        dir: TempDir,
        on_thread: OnStart,
        on_bound: OnBound,
    ) -> io::Result<Self> {
        let path = dir.path().join(ANCHOR);
        front_ends::start(Arc::clone(&on_thread))?;
        shared::begin(target, &path, on_thread)?;
        register_first(&path, &Account::new("the start-up self-test"))?;
        let deferral = match self_test::run(&path) {
            Ok(()) => true,
            Err(e) => {
                warn!(
                    "rte_vhost does not defer replies ({e}): stopping a ring with I/O in flight \
                       delays other VMs' control messages, up to the drain limit"
                );
                false
            }
        };
        shared().set_deferral(deferral);
        if !shared().fds_arrive() {
            return Err(io::Error::other(
                "fds from front ends do not arrive: rte_vhost does not call this program's recvmsg",
            ));
        }
        // The file is removed here, so that a killed process leaves no file behind.
        let anchor = File::options().read(true).custom_flags(libc::O_PATH).open(&path)?;
        dir.close()?;
        Ok(Self { anchor, on_bound: Bound(on_bound) })
    }

    /// In releases that use poll(), makes the event thread read its list of sockets again.
    fn wake_event_thread(&self) {
        if event_thread::POLLS {
            drop(UnixStream::connect(format!("/proc/self/fd/{}", self.anchor.as_raw_fd())));
        }
    }
}

impl Transport for DpdkTransport {
    fn listen(&self, path: &Path, offer: Offer, account: &Account) -> io::Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir.filter(|dir| !dir.is_dir()) {
            let what = format!("{} is not a directory", dir.display());
            return Err(io::Error::new(io::ErrorKind::NotADirectory, what));
        }
        remove_stale_socket(path)?;
        register(path, offer, account, &self.on_bound.0)?;
        self.wake_event_thread();
        Ok(())
    }

    fn unlisten(&self, path: &Path) {
        let Ok(c_path) = c_path(path) else { return };
        let unregister = || {
            // SAFETY: the string outlives the call; this is not the event thread, and the caller
            // holds no lock that a callback takes.
            unsafe { sys::rte_vhost_driver_unregister(c_path.as_ptr()) }
        };
        let shared = shared();
        let (_, _) = log::errors_of(|| match shared.listeners.owns_file(path) {
            true => unregister(),
            false => interpose::keeping_files(unregister),
        });
        shared.listeners.end(path);
        // rte_vhost has closed the socket's connections without calling the callbacks.
        callbacks::forget(path);
    }
}

/// Removes the files of all sockets. For a process that ends without unregistering them.
pub fn remove_sockets() {
    shared().listeners.remove_files();
}

/// Returns the protocol features to offer. An in-flight area needs replies of the application,
/// which carry its fd.
fn protocol_features(offer: Offer) -> u64 {
    let area = if shared().deferral() { 0 } else { protocol::INFLIGHT_SHMFD };
    let config = if offer.config { 0 } else { protocol::CONFIG };
    protocol::PROTOCOL_FEATURES & !area & !config
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Registers the first socket, which makes rte_vhost start its event thread. rte_vhost cannot name
/// that thread under the sandbox, which forbids writing the thread's `comm` file in /proc. A new
/// thread inherits the name of the thread that starts it, so a thread of that name does it.
fn register_first(socket: &Path, account: &Account) -> io::Result<()> {
    let unchanged: OnBound = Arc::new(|_| Ok(()));
    let offer = Offer { features: 0, config: true };
    thread::scope(|scope| {
        let starter = thread::Builder::new().name(event_thread::NAME.into());
        let register = || register(socket, offer, account, &unchanged);
        let registered = starter.spawn_scoped(scope, register)?.join();
        registered.unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}

/// Registers a socket, and starts to listen.
fn register(socket: &Path, offer: Offer, account: &Account, on_bound: &OnBound) -> io::Result<()> {
    let c_path = c_path(socket)?;
    let (registered, listener) =
        interpose::keeping_listener(on_bound, || register_with_rte_vhost(&c_path, offer));
    if let (Err(_), Some(Ok(BoundSocket { file: Some(file), .. }))) = (&registered, &listener) {
        file.remove_from(socket);
    }
    registered?;
    let listener = listener.unwrap_or_else(|| Err(io::Error::other("rte_vhost does not listen")));
    let BoundSocket { socket: listener, file } = listener.inspect_err(|_| unregister(&c_path))?;
    shared().listeners.add(socket, file, ForeignFd::new(listener, account), account.clone());
    Ok(())
}

/// Unregisters a socket whose registration has failed. Keeps the file at its path: the socket's own
/// file is removed elsewhere, and another process may have put its own there.
fn unregister(path: &CStr) {
    interpose::keeping_files(|| {
        // SAFETY: the string outlives the call.
        unsafe { sys::rte_vhost_driver_unregister(path.as_ptr()) };
    });
}

/// On an error, the socket's file stays.
fn register_with_rte_vhost(c_path: &CStr, offer: Offer) -> io::Result<()> {
    let path = c_path.as_ptr();
    let steps: [(&str, &dyn Fn() -> c_int); 5] = [
        ("register", &|| {
            // SAFETY: the string outlives the call.
            unsafe { sys::rte_vhost_driver_register(path, 0) }
        }),
        // This also disables rte_vhost's built-in network device.
        ("set features of", &|| {
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_set_features(path, offer.features) }
        }),
        ("set protocol features of", &|| {
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_set_protocol_features(path, protocol_features(offer)) }
        }),
        ("set callbacks of", &|| {
            // SAFETY: as above, and the table is static.
            unsafe { sys::rte_vhost_driver_callback_register(path, &raw const DEVICE_OPS.0) }
        }),
        ("listen on", &|| {
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_start(path) }
        }),
    ];
    for (n, (what, step)) in steps.iter().enumerate() {
        let (result, errors) = log::errors_of(step);
        if result == 0 {
            continue;
        }
        if n > 0 {
            unregister(c_path);
        }
        let said = errors.join("; ");
        return Err(io::Error::other(format!("rte_vhost failed to {what} the socket: {said}")));
    }
    Ok(())
}

/// Makes a private directory for the anchor.
///
/// # Errors
/// No base directory is usable.
pub fn private_dir() -> io::Result<TempDir> {
    let mut bases: Vec<PathBuf> = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"]
        .iter()
        .filter_map(std::env::var_os)
        // systemd may list several directories, separated by colons.
        .filter_map(|dirs| std::env::split_paths(&dirs).next())
        .filter(|dir| dir.is_absolute() && dir.as_os_str().len() <= BASE_BYTES_MAX)
        .collect();
    bases.push(std::env::temp_dir());
    let mut made = Err(io::ErrorKind::NotFound.into());
    for base in bases {
        made = tempfile::Builder::new().prefix("vhost-").tempdir_in(base);
        if made.is_ok() {
            break;
        }
    }
    made
}

/// Removes a socket that no process listens on. Any other file at the path is an error: rte_vhost,
/// like SPDK, would replace a socket that another process serves.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the path exists and is not a socket: remove it or use another -S directory",
        ));
    }
    if is_listened_on(path)? {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens on this socket",
        ));
    }
    fs::remove_file(path)
}

/// Returns whether a process listens on the socket at `path`. Does not block if that process is
/// stopped and its backlog is full.
fn is_listened_on(path: &Path) -> io::Result<bool> {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
