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
#![expect(unsafe_code, reason = "calls rte_vhost, and is called by it")]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use spdk_sys as sys;
use tracing::warn;
use vhost_blk::protocol::{self, HEADER_BYTES};
use vhost_blk::session::DRAIN_LIMIT_S;
use vhost_blk::transport::SharedConnection;
use vhost_blk::{ConnId, Connection, Target, Transport, Verdict};

use super::{log, received};

/// How long a front end may take over the rest of a message, or over reading ours. QEMU sends
/// header and payload in one call, and an idle front end is waited for in poll, not in recvmsg.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(2);

/// Set in a message's flags: the front end wants an acknowledgement.
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Whether the event thread uses poll() on a list that it reads anew only when it wakes, rather
/// than epoll.
const POLLS: bool = sys::RTE_VER_YEAR < 24 || (sys::RTE_VER_YEAR == 24 && sys::RTE_VER_MONTH < 7);

/// What the self-test answers with: no ring ever stands at this index by itself.
const SELF_TEST_BASE: u16 = 0x5a5a;

/// rte_vhost's callbacks have no argument of ours, so there is one transport in the process.
static SHARED: OnceLock<Shared> = OnceLock::new();

struct Shared {
    target: Arc<Target>,
    anchor: PathBuf,
    /// Connections by rte_vhost's number. Held for moments only.
    connections: Mutex<HashMap<c_int, Entry>>,
    /// Whether answers to GET_VRING_BASE can be deferred.
    deferral: AtomicBool,
    /// Whether front ends' fds come to us and not to rte_vhost.
    fds_arrive: AtomicBool,
}

struct Entry {
    /// `None` for the anchor's connections.
    id: Option<ConnId>,
    path: PathBuf,
    conn: Arc<DpdkConnection>,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<c_int, Entry>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transport. There is one in a process.
#[derive(Debug)]
pub(crate) struct DpdkTransport {
    anchor: PathBuf,
}

impl DpdkTransport {
    /// Opens the anchor and tries what answers rte_vhost lets us give. EAL must be up.
    ///
    /// # Errors
    /// No private directory can be made, or rte_vhost refuses the anchor.
    pub(crate) fn start(target: &Arc<Target>) -> io::Result<Self> {
        let dir = std::env::temp_dir().join(format!("vhost-{}", std::process::id()));
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            // Left by a process that had our number: ours to replace only if it is ours.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_dir_all(&dir)?;
                fs::DirBuilder::new().mode(0o700).create(&dir)?;
            }
            result => result?,
        }
        let anchor = dir.join("anchor");
        let shared = Shared {
            target: Arc::clone(target),
            anchor: anchor.clone(),
            connections: Mutex::default(),
            deferral: AtomicBool::new(true),
            fds_arrive: AtomicBool::new(false),
        };
        if SHARED.set(shared).is_err() {
            return Err(io::Error::other("there is a transport already"));
        }
        let transport = Self { anchor };
        register(&transport.anchor, 0)?;
        let deferral = match transport.self_test() {
            Ok(()) => true,
            Err(e) => {
                warn!(
                    "rte_vhost sends answers of its own ({e}): stopping a ring with I/O in \
                       flight holds up other VMs' control messages for up to {DRAIN_LIMIT_S} s"
                );
                false
            }
        };
        shared_state().deferral.store(deferral, Ordering::Relaxed);
        if !shared_state().fds_arrive.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "front ends' fds do not arrive: rte_vhost does not call this program's recvmsg",
            ));
        }
        Ok(transport)
    }

    /// Sends GET_VRING_BASE, with an fd, to the anchor and expects our deferred answer, once, and
    /// the connection alive after it.
    fn self_test(&self) -> io::Result<()> {
        let mut client = UnixStream::connect(&self.anchor)?;
        let message = |request: u32, payload: &[u8]| {
            let header = [request, 1, payload.len() as u32].map(u32::to_le_bytes).concat();
            [header.as_slice(), payload].concat()
        };
        let with_fd = message(protocol::request::GET_VRING_BASE, &[0; 8]);
        send_with_fd(&client, &with_fd)?;
        if read_answer(&mut client)? != *deferred_self_test_answer() {
            return Err(io::Error::other("not our answer"));
        }
        client.write_all(&message(protocol::request::GET_FEATURES, &[]))?;
        let request = read_answer(&mut client)?;
        let request = u32::from_le_bytes(std::array::from_fn(|i| request[i]));
        if request != protocol::request::GET_FEATURES {
            return Err(io::Error::other("a second answer"));
        }
        Ok(())
    }

    /// Removes what [`DpdkTransport::start`] has put into the file system. The anchor itself stays
    /// registered, as rte_vhost's event thread may not end while the process lives.
    pub(crate) fn clean_up(&self) {
        if let Some(dir) = self.anchor.parent() {
            let _ = fs::remove_dir_all(dir);
        }
    }

    /// Makes the event thread of releases that use poll() look at its list of sockets again.
    fn wake_event_thread(&self) {
        if POLLS {
            drop(UnixStream::connect(&self.anchor));
        }
    }
}

/// Sends `bytes` with the client's own fd as something to send.
fn send_with_fd(client: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    /// A control message with one fd, aligned as its header.
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        fd: c_int,
    }
    let header = libc::cmsghdr {
        cmsg_len: size_of::<libc::cmsghdr>() + size_of::<c_int>(),
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    let mut control = Control { header, fd: client.as_raw_fd() };
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: the message names memory of ours, which it only reads.
    let sent = unsafe { libc::sendmsg(client.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Reads an answer of the self-test: a header and eight bytes.
///
/// The event thread of releases that use poll() does not notice its first listener before a second
/// has passed, unless its poll is interrupted. There is no VM yet that this could disturb.
fn read_answer(client: &mut UnixStream) -> io::Result<[u8; HEADER_BYTES + 8]> {
    const NUDGE_EVERY: Duration = Duration::from_millis(1);
    client.set_read_timeout(Some(NUDGE_EVERY))?;
    let mut answer = [0; HEADER_BYTES + 8];
    let mut got = 0;
    let deadline = Instant::now() + SOCKET_TIMEOUT;
    while got < answer.len() {
        match client.read(&mut answer[got..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                if POLLS {
                    interrupt_event_thread();
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(answer)
}

/// Interrupts the event thread's system call by a signal that does nothing.
fn interrupt_event_thread() {
    extern "C" fn nothing(_signal: c_int) {}
    // SAFETY: the handler does nothing, and nobody else uses this signal.
    unsafe { libc::signal(libc::SIGURG, nothing as *const () as libc::sighandler_t) };
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let tid = task.file_name().to_str().and_then(|name| name.parse::<c_int>().ok());
        if let (true, Some(tid)) =
            (name.starts_with("vhost-events") || name.starts_with("dpdk-vhost-evt"), tid)
        {
            // SAFETY: a thread of this process, which never ends.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGURG) };
        }
    }
}

impl Transport for DpdkTransport {
    fn listen(&self, path: &Path, features: u64) -> io::Result<()> {
        remove_stale_socket(path)?;
        register(path, features)?;
        self.wake_event_thread();
        Ok(())
    }

    fn unlisten(&self, path: &Path) {
        let Ok(c_path) = c_path(path) else { return };
        // SAFETY: a string that outlives the call; this is not the event thread, and no lock that
        // a callback takes is held.
        let (_, _) =
            log::errors_of(|| unsafe { sys::rte_vhost_driver_unregister(c_path.as_ptr()) });
        // It has closed its connections without a word.
        shared_state().connections().retain(|_, entry| entry.path != path);
    }
}

fn shared_state() -> &'static Shared {
    SHARED.get().expect("callbacks and methods come after `start`")
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Registers a socket and starts to listen.
fn register(path: &Path, features: u64) -> io::Result<()> {
    let c_path = c_path(path)?;
    let path = c_path.as_ptr();
    let steps: [(&str, &dyn Fn() -> c_int); 5] = [
        // SAFETY (of each step): a string that outlives the call.
        ("register", &|| unsafe { sys::rte_vhost_driver_register(path, 0) }),
        // This also turns off rte_vhost's own network device.
        ("set features of", &|| unsafe { sys::rte_vhost_driver_set_features(path, features) }),
        ("set protocol features of", &|| unsafe {
            sys::rte_vhost_driver_set_protocol_features(path, protocol::PROTOCOL_FEATURES)
        }),
        ("set callbacks of", &|| unsafe {
            sys::rte_vhost_driver_callback_register(path, &raw const DEVICE_OPS.0)
        }),
        ("listen on", &|| unsafe { sys::rte_vhost_driver_start(path) }),
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
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
        Err(_) => fs::remove_file(path),
    }
}

/// A connection's other half: our duplicate of rte_vhost's fd.
#[derive(Debug)]
struct DpdkConnection {
    vid: c_int,
    fd: OwnedFd,
    /// Socket inode: tells this connection's fds from others'.
    inode: u64,
    /// Where deferral does not work: the answer for the handler that waits for it.
    answer: Mutex<Option<Vec<u8>>>,
    answered: Condvar,
}

impl DpdkConnection {
    /// Waits for the answer that the control side would otherwise send itself.
    fn wait_for_answer(&self) -> Option<Vec<u8>> {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = Duration::from_secs(DRAIN_LIMIT_S + 1);
        let waited = self.answered.wait_timeout_while(answer, limit, |answer| answer.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.take().filter(|a| !a.is_empty())
    }

    fn give_answer(&self, answer: Vec<u8>) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        self.answered.notify_all();
    }
}

impl Connection for DpdkConnection {
    fn vid(&self) -> i32 {
        self.vid
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        if !shared_state().deferral.load(Ordering::Relaxed) {
            self.give_answer(message[HEADER_BYTES..].to_vec());
            return Ok(());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (buffer, len) = (message.as_ptr().cast(), message.len());
        // SAFETY: bytes of ours to a socket that we own.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), buffer, len, flags) };
        match usize::try_from(sent) {
            Ok(n) if n == len => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn shut_down(&self) {
        // SAFETY: a socket that we own. rte_vhost sees the end of the stream.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
        self.give_answer(Vec::new());
    }
}

impl Drop for DpdkConnection {
    fn drop(&mut self) {
        // rte_vhost has closed its fd or is about to; the peer shall see the end either way.
        // SAFETY: a socket that we own.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// Finds the fd of the connection that is being accepted on `path`: the one socket bound to the
/// path that has a peer and is not known yet. Duplicates it.
fn find_connection(path: &Path, vid: c_int) -> io::Result<DpdkConnection> {
    let known: Vec<u64> =
        shared_state().connections().values().map(|entry| entry.conn.inode).collect();
    for entry in fs::read_dir("/proc/self/fd")? {
        let Some(fd) = entry?.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()) else {
            continue;
        };
        if bound_path(fd).as_deref() != Some(path) || !has_peer(fd) {
            continue;
        }
        // SAFETY: the fd is open: rte_vhost closes connections on this very thread only, and the
        // control side drops its duplicates, whose inodes are known, as it likes.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        let file = fs::File::from(fd);
        let inode = file.metadata()?.ino();
        if !known.contains(&inode) {
            let conn = DpdkConnection {
                vid,
                fd: file.into(),
                inode,
                answer: Mutex::default(),
                answered: Condvar::new(),
            };
            set_timeouts(&conn.fd)?;
            return Ok(conn);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the connection's fd was not found"))
}

/// The path that a Unix socket is bound to.
fn bound_path(fd: RawFd) -> Option<PathBuf> {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&addr) as libc::socklen_t;
    // SAFETY: the buffer is ours and as long as it says. The fd may be anything.
    let result = unsafe { libc::getsockname(fd, (&raw mut addr).cast(), &raw mut len) };
    if result != 0 || c_int::from(addr.sun_family) != libc::AF_UNIX {
        return None;
    }
    let bytes: Vec<u8> =
        addr.sun_path.iter().map(|c| c.cast_unsigned()).take_while(|c| *c != 0).collect();
    (!bytes.is_empty()).then(|| std::ffi::OsStr::from_bytes(&bytes).into())
}

fn has_peer(fd: RawFd) -> bool {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&addr) as libc::socklen_t;
    // SAFETY: the buffer is ours and as long as it says.
    unsafe { libc::getpeername(fd, (&raw mut addr).cast(), &raw mut len) == 0 }
}

/// Bounds how long the event thread can be held in the middle of a message.
fn set_timeouts(fd: &OwnedFd) -> io::Result<()> {
    let time = libc::timeval { tv_sec: SOCKET_TIMEOUT.as_secs() as libc::time_t, tv_usec: 0 };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let (value, len) = ((&raw const time).cast(), size_of_val(&time) as libc::socklen_t);
        // SAFETY: the value is ours and as long as it says.
        let result =
            unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, len) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn deferred_self_test_answer() -> &'static [u8; HEADER_BYTES + 8] {
    static ANSWER: OnceLock<[u8; HEADER_BYTES + 8]> = OnceLock::new();
    ANSWER.get_or_init(|| {
        let payload = protocol::vring_base(0, SELF_TEST_BASE);
        let answer = protocol::reply(protocol::request::GET_VRING_BASE, &payload);
        answer.try_into().expect("a header and eight bytes")
    })
}

// The callbacks, on the event thread. They convert, call one method, and convert back.

/// A table of C function pointers.
struct Ops<T>(T);

// SAFETY: immutable, and its pointers are to functions.
unsafe impl<T> Sync for Ops<T> {}

static DEVICE_OPS: Ops<sys::rte_vhost_device_ops> = Ops(sys::rte_vhost_device_ops {
    new_device: Some(new_device),
    destroy_device: Some(destroy_device),
    new_connection: Some(new_connection),
    destroy_connection: Some(destroy_connection),
    // SAFETY: all zeroes is no callback.
    ..unsafe { std::mem::zeroed() }
});

static EXTERN_OPS: Ops<sys::rte_vhost_user_extern_ops> = Ops(sys::rte_vhost_user_extern_ops {
    pre_msg_handle: Some(pre_msg_handle),
    post_msg_handle: None,
});

/// Never happens, as rte_vhost sees no ring; refusing keeps it from ever thinking that it runs.
extern "C" fn new_device(_vid: c_int) -> c_int {
    -1
}

extern "C" fn destroy_device(_vid: c_int) {}

extern "C" fn new_connection(vid: c_int) -> c_int {
    received::begin();
    match accept(vid) {
        Some(entry) => {
            shared_state().connections().insert(vid, entry);
            0
        }
        None => -1,
    }
}

fn accept(vid: c_int) -> Option<Entry> {
    let shared = shared_state();
    let path = socket_of(vid)?;
    // SAFETY: the table is static; rte_vhost copies it.
    unsafe {
        sys::rte_vhost_extern_callback_register(vid, &raw const EXTERN_OPS.0, std::ptr::null_mut())
    };
    let conn = match find_connection(&path, vid) {
        Ok(conn) => Arc::new(conn),
        Err(e) => {
            // Whoever only wakes us is gone already.
            if path != shared.anchor {
                warn!("{}: connection refused: {e}", path.display());
            }
            return None;
        }
    };
    let id = if path == shared.anchor {
        None
    } else {
        Some(shared.target.connected(&path, Arc::clone(&conn) as SharedConnection)?)
    };
    Some(Entry { id, path, conn })
}

/// The socket that a connection came in on.
fn socket_of(vid: c_int) -> Option<PathBuf> {
    let mut name = [0; libc::PATH_MAX as usize];
    // SAFETY: the buffer is ours and as long as it says; called on the event thread.
    let result = unsafe { sys::rte_vhost_get_ifname(vid, name.as_mut_ptr(), name.len()) };
    if result != 0 {
        return None;
    }
    // SAFETY: rte_vhost has put a string there, with its final zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    Some(std::ffi::OsStr::from_bytes(name.to_bytes()).into())
}

extern "C" fn destroy_connection(vid: c_int) {
    received::begin();
    let entry = shared_state().connections().remove(&vid);
    if let Some(Entry { id: Some(id), .. }) = entry {
        shared_state().target.closed(id);
    }
}

extern "C" fn pre_msg_handle(vid: c_int, message: *mut c_void) -> sys::rte_vhost_msg_result {
    let found = shared_state().connections().get(&vid).map(|e| (e.id, Arc::clone(&e.conn)));
    let Some((id, conn)) = found else { return sys::RTE_VHOST_MSG_RESULT_ERR };
    let mut message = Context(message.cast());
    let request = message.word(0);
    if protocol::is_negotiation(request) && id.is_none() {
        return sys::RTE_VHOST_MSG_RESULT_NOT_HANDLED;
    }
    let verdict = match id {
        Some(id) => {
            let fds = received::take();
            shared_state().target.message(id, request, message.payload(), fds)
        }
        None => answer_anchor(request, &received::take(), &conn),
    };
    message.answer(verdict, &conn)
}

/// The self-test's side of the event thread.
fn answer_anchor(request: u32, fds: &[OwnedFd], conn: &Arc<DpdkConnection>) -> Verdict {
    if request != protocol::request::GET_VRING_BASE {
        return Verdict::Reject;
    }
    shared_state().fds_arrive.store(fds.len() == 1, Ordering::Relaxed);
    let conn = Arc::clone(conn);
    let answer = move || conn.send(deferred_self_test_answer());
    match std::thread::Builder::new().name("vhost-selftest".into()).spawn(answer) {
        Ok(_) => Verdict::Deferred,
        Err(_) => Verdict::Reject,
    }
}

/// rte_vhost's `struct vhu_msg_context`; see `spdk_sys` for its layout.
struct Context(*mut u8);

impl Context {
    fn word(&self, offset: usize) -> u32 {
        // SAFETY: offsets given lie inside the struct, which is ours while the handler runs.
        unsafe { self.0.add(offset).cast::<u32>().read_unaligned() }
    }

    fn set_word(&mut self, offset: usize, value: u32) {
        // SAFETY: as in `word`.
        unsafe { self.0.add(offset).cast::<u32>().write_unaligned(value) };
    }

    fn payload(&self) -> &[u8] {
        let len = (self.word(8) as usize).min(sys::FDS_OFFSET - HEADER_BYTES);
        // SAFETY: the payload lies between the header and the fds.
        unsafe { std::slice::from_raw_parts(self.0.add(HEADER_BYTES), len) }
    }

    fn answer(&mut self, verdict: Verdict, conn: &DpdkConnection) -> sys::rte_vhost_msg_result {
        match verdict {
            Verdict::Pass => sys::RTE_VHOST_MSG_RESULT_NOT_HANDLED,
            Verdict::Done => sys::RTE_VHOST_MSG_RESULT_OK,
            Verdict::Reply(payload) => self.reply(&payload),
            Verdict::Deferred if shared_state().deferral.load(Ordering::Relaxed) => {
                // A front end that wants an acknowledgement as well would get two answers.
                self.set_word(4, self.word(4) & !FLAG_NEED_REPLY);
                sys::RTE_VHOST_MSG_RESULT_OK
            }
            Verdict::Deferred => match conn.wait_for_answer() {
                Some(payload) => self.reply(&payload),
                None => self.reject(conn),
            },
            Verdict::Reject => self.reject(conn),
        }
    }

    fn reply(&mut self, payload: &[u8]) -> sys::rte_vhost_msg_result {
        assert!(payload.len() <= sys::FDS_OFFSET - HEADER_BYTES, "our own answers fit");
        self.set_word(8, payload.len() as u32);
        // SAFETY: the payload lies between the header and the fds, and the length was checked.
        unsafe {
            std::ptr::copy_nonoverlapping(
                payload.as_ptr(),
                self.0.add(HEADER_BYTES),
                payload.len(),
            );
        }
        sys::RTE_VHOST_MSG_RESULT_REPLY
    }

    fn reject(&self, conn: &DpdkConnection) -> sys::rte_vhost_msg_result {
        // Where the front end wants an acknowledgement, an error alone would not end it.
        conn.shut_down();
        sys::RTE_VHOST_MSG_RESULT_ERR
    }
}
