//! rte_vhost's callbacks. They run on its event thread. Each one converts its arguments, calls one
//! method of the target and converts the result.
#![expect(unsafe_code, reason = "called by rte_vhost, with pointers")]

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use spdk_sys as sys;
use tracing::warn;
use vhost_target::protocol::{self, HEADER_BYTES};
use vhost_target::transport::SharedConnection;
use vhost_target::{ConnId, Connection, Verdict};

use crate::connection::{self, DpdkConnection};
use crate::shared::shared;
use crate::{interpose, self_test};

/// Flag in a message's header: the front end wants an acknowledgement (`need_reply`).
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Connections by rte_vhost's connection number (`vid`). The lock is held only briefly.
static CONNECTIONS: LazyLock<Mutex<HashMap<c_int, Entry>>> = LazyLock::new(Mutex::default);

struct Entry {
    /// `None` for connections to the anchor socket.
    id: Option<ConnId>,
    path: PathBuf,
    conn: Arc<DpdkConnection>,
}

fn connections() -> MutexGuard<'static, HashMap<c_int, Entry>> {
    CONNECTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forgets the connections to a socket that was unregistered.
pub(crate) fn forget(path: &Path) {
    connections().retain(|_, entry| entry.path != path);
}

/// A table of C function pointers.
pub(crate) struct Ops<T>(pub(crate) T);

// SAFETY: the table is immutable, and its pointers point to functions.
unsafe impl<T> Sync for Ops<T> {}

pub(crate) static DEVICE_OPS: Ops<sys::rte_vhost_device_ops> = Ops(sys::rte_vhost_device_ops {
    new_device: Some(new_device),
    destroy_device: Some(destroy_device),
    new_connection: Some(new_connection),
    destroy_connection: Some(destroy_connection),
    // SAFETY: an all-zero table is valid: it has no callbacks.
    ..unsafe { std::mem::zeroed() }
});

static EXTERN_OPS: Ops<sys::rte_vhost_user_extern_ops> = Ops(sys::rte_vhost_user_extern_ops {
    pre_msg_handle: Some(pre_msg_handle),
    post_msg_handle: None,
});

/// rte_vhost never calls this, as no ring is configured in it. The refusal keeps rte_vhost from
/// treating a device as running if it ever does.
extern "C" fn new_device(_vid: c_int) -> c_int {
    -1
}

extern "C" fn destroy_device(_vid: c_int) {}

extern "C" fn new_connection(vid: c_int) -> c_int {
    shared().begin_event_thread();
    interpose::forget_received();
    match accept(vid) {
        Some(entry) => {
            connections().insert(vid, entry);
            0
        }
        None => -1,
    }
}

fn accept(vid: c_int) -> Option<Entry> {
    let shared = shared();
    let path = socket_of(vid)?;
    // SAFETY: the table is static, and rte_vhost copies it.
    unsafe {
        sys::rte_vhost_extern_callback_register(vid, &raw const EXTERN_OPS.0, std::ptr::null_mut())
    };
    let conn = match connection::take_accepted(&path, vid) {
        Ok(conn) => Arc::new(conn),
        Err(e) => {
            // A client that connects only to wake the event thread has already closed the
            // connection.
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

/// Returns the path of the socket that a connection was accepted on.
fn socket_of(vid: c_int) -> Option<PathBuf> {
    let mut name = [0; libc::PATH_MAX as usize];
    // SAFETY: the buffer belongs to this function and has the given length; the caller is on the
    // event thread.
    let result = unsafe { sys::rte_vhost_get_ifname(vid, name.as_mut_ptr(), name.len()) };
    if result != 0 {
        return None;
    }
    // SAFETY: rte_vhost has written a NUL-terminated string into the buffer.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    Some(std::ffi::OsStr::from_bytes(name.to_bytes()).into())
}

extern "C" fn destroy_connection(vid: c_int) {
    interpose::forget_received();
    let entry = connections().remove(&vid);
    if let Some(Entry { id, conn, .. }) = entry {
        conn.shut_down();
        if let Some(id) = id {
            shared().target.closed(id);
        }
    }
}

extern "C" fn pre_msg_handle(vid: c_int, message: *mut c_void) -> sys::rte_vhost_msg_result {
    let found = connections().get(&vid).map(|e| (e.id, Arc::clone(&e.conn)));
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
        // SAFETY: the offsets lie inside the struct, and this handler is its only user while it
        // runs.
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
            // rte_vhost has no public way to send an fd of the application with a reply.
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
        // A front end that also asks for an acknowledgement would otherwise get two replies.
        self.set_word(4, self.word(4) & !FLAG_NEED_REPLY);
        sys::RTE_VHOST_MSG_RESULT_OK
    }

    fn reply(&mut self, payload: &[u8]) -> sys::rte_vhost_msg_result {
        assert!(
            payload.len() <= sys::FDS_OFFSET - HEADER_BYTES,
            "a reply of the target fits in rte_vhost's message buffer"
        );
        let size = payload.len().try_into().expect("the message buffer is far smaller than 4 GiB");
        self.set_word(8, size);
        let to = self.0.wrapping_add(HEADER_BYTES);
        // SAFETY: the payload lies between the header and the fds, and the length was checked.
        unsafe { to.copy_from_nonoverlapping(payload.as_ptr(), payload.len()) };
        sys::RTE_VHOST_MSG_RESULT_REPLY
    }

    fn reject(&self, conn: &DpdkConnection) -> sys::rte_vhost_msg_result {
        // If the front end asked for an acknowledgement, an error result alone does not end the
        // connection.
        conn.shut_down();
        sys::RTE_VHOST_MSG_RESULT_ERR
    }
}
