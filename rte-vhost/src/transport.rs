//! rte_vhost as a [`Transport`]: sockets, the event thread's callbacks, and answers of our own.
//!
//! rte_vhost accepts, reads, negotiates and acknowledges. All that touches memory, rings or fds is
//! answered in the *pre* handler, so rte_vhost never sees a guest's memory: it maps and unmaps
//! nothing, and the event thread, which serves every VM, cannot be held up by one VM's unmapping.
//!
//! The answer to GET_VRING_BASE is *deferred*: the pre handler says "done" and sends nothing, and
//! the control side sends the answer on its own duplicate of the connection's fd once the I/O has
//! completed. That rte_vhost allows it is not documented, so [`DpdkTransport::start`] tries it on
//! a private socket, the *anchor*, and falls back to waiting in the handler for a bounded time.
//!
//! The anchor is registered first and never unregistered. It also spares the wait for the event
//! thread's end that unregistering the last socket means, and connecting to it wakes the event
//! thread of releases before 24.07, which would notice a new listener only after up to a second.
#![expect(unsafe_code, reason = "calls rte_vhost")]

use std::ffi::{CStr, CString, c_int};
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
use vhost_target::{OnStart, Target, Transport, protocol};

use crate::callbacks::{self, DEVICE_OPS};
use crate::shared::{self, shared};
use crate::{event_thread, front_ends, interpose, log, self_test};

/// The file name of the anchor, and the longest path of its directory's parent with which it fits
/// into a socket address.
const ANCHOR: &str = "anchor";
const BASE_BYTES_MAX: usize = 80;

/// The transport. There is one in a process.
#[derive(Debug)]
pub struct DpdkTransport {
    /// The file of the anchor's socket, which has no name any more.
    anchor: File,
}

impl DpdkTransport {
    /// Opens the anchor in `dir`, removes `dir`, and tests which answers rte_vhost lets us send.
    /// EAL must be up. The threads that serve front ends call `on_thread` when they start.
    ///
    /// # Errors
    /// No socket can be made in `dir`, or rte_vhost refuses it.
    pub fn start(target: &Arc<Target>, dir: TempDir, on_thread: OnStart) -> io::Result<Self> {
        let path = dir.path().join(ANCHOR);
        front_ends::start(Arc::clone(&on_thread))?;
        shared::begin(target, &path, on_thread)?;
        register_first(&path, &Account::new("the start-up self-test"))?;
        let deferral = match self_test::run(&path) {
            Ok(()) => true,
            Err(e) => {
                warn!(
                    "rte_vhost sends answers of its own ({e}): stopping a ring with I/O in \
                       flight holds up other VMs' control messages, up to the drain limit"
                );
                false
            }
        };
        shared().set_deferral(deferral);
        if !shared().fds_arrive() {
            return Err(io::Error::other(
                "front ends' fds do not arrive: rte_vhost does not call this program's recvmsg",
            ));
        }
        // The file is removed now, so that a killed process leaves nothing behind.
        let anchor = File::options().read(true).custom_flags(libc::O_PATH).open(&path)?;
        dir.close()?;
        Ok(Self { anchor })
    }

    /// Makes the event thread of releases that use poll() look at its list of sockets again.
    fn wake_event_thread(&self) {
        if event_thread::POLLS {
            drop(UnixStream::connect(format!("/proc/self/fd/{}", self.anchor.as_raw_fd())));
        }
    }
}

impl Transport for DpdkTransport {
    fn listen(&self, path: &Path, features: u64, account: &Account) -> io::Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir.filter(|dir| !dir.is_dir()) {
            let what = format!("{} is not a directory", dir.display());
            return Err(io::Error::new(io::ErrorKind::NotADirectory, what));
        }
        remove_stale_socket(path)?;
        register(path, features, account)?;
        self.wake_event_thread();
        Ok(())
    }

    fn unlisten(&self, path: &Path) {
        let Ok(c_path) = c_path(path) else { return };
        let unregister = || {
            // SAFETY: a string that outlives the call; this is not the event thread, and no lock
            // that a callback takes is held.
            unsafe { sys::rte_vhost_driver_unregister(c_path.as_ptr()) }
        };
        let shared = shared();
        let (_, _) = log::errors_of(|| match shared.listeners.owns_file(path) {
            true => unregister(),
            false => interpose::keeping_files(unregister),
        });
        shared.listeners.end(path);
        // It has closed its connections without a word.
        callbacks::forget(path);
    }
}

/// Removes the files of all sockets, for a process that ends without unregistering them.
pub fn remove_sockets() {
    shared().listeners.remove_files();
}

/// What is offered: an area's fd is only ours to send if answers of our own are.
fn protocol_features() -> u64 {
    let area = if shared().deferral() { 0 } else { protocol::INFLIGHT_SHMFD };
    protocol::PROTOCOL_FEATURES & !area
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Registers the first socket, at which rte_vhost starts its event thread. rte_vhost cannot name that
/// thread under the sandbox, which refuses to write the thread's `comm` file in /proc. But a new
/// thread inherits the name of the thread that starts it.
fn register_first(socket: &Path, account: &Account) -> io::Result<()> {
    thread::scope(|scope| {
        let starter = thread::Builder::new().name(event_thread::NAME.into());
        let registered = starter.spawn_scoped(scope, || register(socket, 0, account))?.join();
        registered.unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}

/// Registers a socket and starts to listen.
fn register(socket: &Path, features: u64, account: &Account) -> io::Result<()> {
    let c_path = c_path(socket)?;
    let (registered, listener) =
        interpose::keeping_listener(|| register_with_rte_vhost(&c_path, features));
    let listener = listener.map(|listener| ForeignFd::new(listener, account));
    registered?;
    let Some(listener) = listener else {
        // SAFETY: a string that outlives the call.
        unsafe { sys::rte_vhost_driver_unregister(c_path.as_ptr()) };
        return Err(io::Error::other("no file descriptor is left for a duplicate of the socket"));
    };
    shared().listeners.add(socket, listener, account.clone());
    Ok(())
}

fn register_with_rte_vhost(path: &CStr, features: u64) -> io::Result<()> {
    let path = path.as_ptr();
    let steps: [(&str, &dyn Fn() -> c_int); 5] = [
        ("register", &|| {
            // SAFETY: a string that outlives the call.
            unsafe { sys::rte_vhost_driver_register(path, 0) }
        }),
        // This also turns off rte_vhost's own network device.
        ("set features of", &|| {
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_set_features(path, features) }
        }),
        ("set protocol features of", &|| {
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_set_protocol_features(path, protocol_features()) }
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
            // SAFETY: as above.
            unsafe { sys::rte_vhost_driver_unregister(path) };
        }
        let said = errors.join("; ");
        return Err(io::Error::other(format!("rte_vhost cannot {what} the socket: {said}")));
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

/// Removes a socket that nobody listens on. Anything else in the way is an error: rte_vhost, and
/// SPDK, would take a live socket away from another process.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is no socket is there",
        ));
    }
    if is_listened_on(path)? {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
    }
    fs::remove_file(path)
}

/// Whether a process listens on the socket at `path`. Does not block if that process is stopped and
/// its backlog is full.
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
