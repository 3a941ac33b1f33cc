//! rte_vhost's callbacks, on its event thread: they convert, call one method, and convert back.
#![expect(unsafe_code, reason = "called by rte_vhost, with pointers")]

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use closer::Account;
use spdk_sys as sys;
use tracing::warn;
use vhost_target::protocol::{self, HEADER_BYTES};
use vhost_target::transport::SharedConnection;
use vhost_target::{ConnId, Connection, OnStart, Target, Verdict};

use crate::connection::{self, DpdkConnection};
use crate::front_ends::{self, FrontEnds};
use crate::listeners::Listeners;
use crate::{interpose, self_test};

/// Set in a message's flags: the front end wants an acknowledgement.
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// rte_vhost's callbacks have no argument of ours, so there is one transport in the process.
static SHARED: OnceLock<Shared> = OnceLock::new();

pub(crate) struct Shared {
    target: Arc<Target>,
    anchor: PathBuf,
    /// For the anchor's connections.
    anchor_account: Account,
    pub(crate) front_ends: FrontEnds,
    pub(crate) listeners: Listeners,
    /// Connections by rte_vhost's number. Held for moments only.
    connections: Mutex<HashMap<c_int, Entry>>,
    /// Whether answers to GET_VRING_BASE can be deferred.
    deferral: AtomicBool,
    /// Whether front ends' fds come to us and not to rte_vhost.
    fds_arrive: AtomicBool,
    /// Called on the event thread before its first message.
    on_event_thread: OnStart,
    begun: Once,
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

    /// Forgets the connections of a socket that was unregistered.
    pub(crate) fn forget(&self, path: &Path) {
        self.connections().retain(|_, entry| entry.path != path);
    }

    /// The account that owns the fds of front ends that connect to `path`.
    pub(crate) fn account_of(&self, path: &Path) -> Account {
        if path == self.anchor {
            return self.anchor_account.clone();
        }
        // The controller is gone: an account of its own.
        let account = self.target.account(path);
        account.unwrap_or_else(|| Account::new(path.display().to_string()))
    }

    pub(crate) fn deferral(&self) -> bool {
        self.deferral.load(Ordering::Relaxed)
    }

    pub(crate) fn set_deferral(&self, works: bool) {
        self.deferral.store(works, Ordering::Relaxed);
    }

    pub(crate) fn fds_arrive(&self) -> bool {
        self.fds_arrive.load(Ordering::Relaxed)
    }

    pub(crate) fn set_fds_arrive(&self, arrive: bool) {
        self.fds_arrive.store(arrive, Ordering::Relaxed);
    }
}

/// Makes the callbacks call `target`. The threads that serve front ends call `on_thread` when they
/// start.
pub(crate) fn begin(target: &Arc<Target>, anchor: &Path, on_thread: OnStart) -> io::Result<()> {
    let shared = Shared {
        target: Arc::clone(target),
        anchor: anchor.to_owned(),
        anchor_account: Account::new("the start-up self-test"),
        front_ends: front_ends::start(Arc::clone(&on_thread))?,
        listeners: Listeners::default(),
        connections: Mutex::default(),
        deferral: AtomicBool::new(true),
        fds_arrive: AtomicBool::new(false),
        on_event_thread: on_thread,
        begun: Once::new(),
    };
    SHARED.set(shared).map_err(|_| io::Error::other("there is a transport already"))
}

/// What the callbacks know.
pub(crate) fn shared() -> &'static Shared {
    SHARED.get().expect("callbacks and methods come after `begin`")
}

/// A table of C function pointers.
pub(crate) struct Ops<T>(pub(crate) T);

// SAFETY: immutable, and its pointers are to functions.
unsafe impl<T> Sync for Ops<T> {}

pub(crate) static DEVICE_OPS: Ops<sys::rte_vhost_device_ops> = Ops(sys::rte_vhost_device_ops {
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
    shared().begun.call_once(|| (shared().on_event_thread)());
    interpose::forget_received();
    match accept(vid) {
        Some(entry) => {
            shared().connections().insert(vid, entry);
            0
        }
        None => -1,
    }
}

fn accept(vid: c_int) -> Option<Entry> {
    let shared = shared();
    let path = socket_of(vid)?;
    // SAFETY: the table is static; rte_vhost copies it.
    unsafe {
        sys::rte_vhost_extern_callback_register(vid, &raw const EXTERN_OPS.0, std::ptr::null_mut())
    };
    let conn = match connection::take_accepted(&path, vid) {
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
    interpose::forget_received();
    let entry = shared().connections().remove(&vid);
    if let Some(Entry { id, conn, .. }) = entry {
        conn.shut_down();
        if let Some(id) = id {
            shared().target.closed(id);
        }
    }
}

extern "C" fn pre_msg_handle(vid: c_int, message: *mut c_void) -> sys::rte_vhost_msg_result {
    let found = shared().connections().get(&vid).map(|e| (e.id, Arc::clone(&e.conn)));
    let Some((id, conn)) = found else { return sys::RTE_VHOST_MSG_RESULT_ERR };
    let mut message = Context(message.cast());
    let request = message.word(0);
    if protocol::is_negotiation(request) && id.is_none() {
        return sys::RTE_VHOST_MSG_RESULT_NOT_HANDLED;
    }
    let need_reply = message.word(4) & FLAG_NEED_REPLY != 0;
    let (payload, target) = (message.payload(), &shared().target);
    let verdict = match id {
        Some(id) => target.message(id, request, need_reply, payload, interpose::received()),
        None => self_test::answer(request, &interpose::received(), &conn),
    };
    message.answer(verdict, &conn)
}

/// rte_vhost's `struct vhu_msg_context`; see `spdk_sys` for its layout.
struct Context(*mut u8);

impl Context {
    fn word(&self, offset: usize) -> u32 {
        // SAFETY: offsets given lie inside the struct, which is ours while the handler runs.
        unsafe { self.0.wrapping_add(offset).cast::<u32>().read_unaligned() }
    }

    fn set_word(&mut self, offset: usize, value: u32) {
        // SAFETY: as in `word`.
        unsafe { self.0.wrapping_add(offset).cast::<u32>().write_unaligned(value) };
    }

    fn payload(&self) -> &[u8] {
        let len = (self.word(8) as usize).min(sys::FDS_OFFSET - HEADER_BYTES);
        // SAFETY: the payload lies between the header and the fds.
        unsafe { std::slice::from_raw_parts(self.0.wrapping_add(HEADER_BYTES), len) }
    }

    fn answer(&mut self, verdict: Verdict, conn: &DpdkConnection) -> sys::rte_vhost_msg_result {
        match verdict {
            Verdict::Pass => sys::RTE_VHOST_MSG_RESULT_NOT_HANDLED,
            Verdict::Done => sys::RTE_VHOST_MSG_RESULT_OK,
            Verdict::Reply(payload) => self.reply(&payload),
            // rte_vhost would send an fd of ours only out of its private structures.
            Verdict::ReplyWithFd(payload, fd) => {
                let message = protocol::reply(self.word(0), &payload);
                if !shared().deferral() || conn.send_with_fd(&message, &fd).is_err() {
                    return self.reject(conn);
                }
                self.answered_by_us()
            }
            Verdict::Deferred if shared().deferral() => self.answered_by_us(),
            Verdict::Deferred => match conn.wait_for_answer() {
                Some(payload) => self.reply(&payload),
                None => self.reject(conn),
            },
            Verdict::Reject => self.reject(conn),
        }
    }

    fn answered_by_us(&mut self) -> sys::rte_vhost_msg_result {
        // A front end that wants an acknowledgement as well would get two answers.
        self.set_word(4, self.word(4) & !FLAG_NEED_REPLY);
        sys::RTE_VHOST_MSG_RESULT_OK
    }

    fn reply(&mut self, payload: &[u8]) -> sys::rte_vhost_msg_result {
        assert!(payload.len() <= sys::FDS_OFFSET - HEADER_BYTES, "our own answers fit");
        self.set_word(8, payload.len() as u32);
        let to = self.0.wrapping_add(HEADER_BYTES);
        // SAFETY: the payload lies between the header and the fds, and the length was checked.
        unsafe { to.copy_from_nonoverlapping(payload.as_ptr(), payload.len()) };
        sys::RTE_VHOST_MSG_RESULT_REPLY
    }

    fn reject(&self, conn: &DpdkConnection) -> sys::rte_vhost_msg_result {
        // Where the front end wants an acknowledgement, an error alone would not end it.
        conn.shut_down();
        sys::RTE_VHOST_MSG_RESULT_ERR
    }
}
