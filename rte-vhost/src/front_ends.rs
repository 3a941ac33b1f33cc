//! The thread that reads from and writes to front ends in place of rte_vhost's event thread.
//!
//! A front end may send an incomplete message, may not read its replies, and may attach any fds.
//! Here that blocks only the connection's own task. The task reads a whole message with all of its
//! fds ([`closer::receive`]), and passes it to rte_vhost when rte_vhost has read the previous one.
//! It also forwards the replies of rte_vhost and of the control side, in order. While a front end
//! does not read its replies, none of its messages is handled. So the event thread spends time on a
//! front end only to handle complete messages.
//!
//! The sockets of front ends are foreign fds: they may hold unread fds, which the last close of the
//! socket also closes.
#![expect(unsafe_code, reason = "system calls on sockets")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::thread;

use closer::{Account, FDS_MAX, ForeignFd};
use spdk_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{LocalSet, spawn_local};
use tracing::{debug, warn};
use vhost_target::OnStart;
use vhost_target::protocol::HEADER_BYTES;

use crate::shared::shared;
use crate::socket::{accept4, bound_path, send_with_fd, shut_down};

/// The longest payload that rte_vhost accepts.
const PAYLOAD_MAX: usize = MESSAGE_MAX - HEADER_BYTES;
const MESSAGE_MAX: usize = sys::FDS_OFFSET;

/// Fds that a message may carry: one for each region of a memory table.
const MESSAGE_FDS_MAX: usize = 8;

/// A new connection, for the event thread's callback.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// The path of the socket that the front end has connected to.
    pub(crate) path: PathBuf,
    /// The front end's socket.
    pub(crate) socket: Arc<ForeignFd>,
    /// A duplicate of rte_vhost's end of the socket pair: a message sent here goes to the front
    /// end, after the messages that rte_vhost has sent before.
    pub(crate) answers: OwnedFd,
}

/// The fds of the message that is being passed to rte_vhost.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    fds: Mutex<Vec<ForeignFd>>,
    /// Set when rte_vhost begins to read the message.
    pub(crate) taken: Notify,
}

impl Inbox {
    /// Stores the fds of the message that is sent next.
    pub(crate) fn put(&self, fds: Vec<ForeignFd>) {
        *self.fds.lock().unwrap_or_else(PoisonError::into_inner) = fds;
    }

    /// Takes the fds of the message that rte_vhost reads.
    pub(crate) fn take(&self) -> Vec<ForeignFd> {
        std::mem::take(&mut *self.fds.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A connection that the thread serves.
struct Link {
    path: PathBuf,
    socket: Arc<ForeignFd>,
    account: Account,
    /// This end of the socket pair; rte_vhost has the other end.
    rte_vhost: OwnedFd,
    inbox: Arc<Inbox>,
}

/// The reason for ending a connection.
#[derive(Debug, thiserror::Error)]
enum Violation {
    #[error("message payload is too long: {0} bytes, the limit is {PAYLOAD_MAX}")]
    Payload(usize),
    #[error("message carries too many fds: the limit is {MESSAGE_FDS_MAX}")]
    Fds,
    #[error("the front end closed the connection in the middle of a message")]
    Half,
    #[error("cannot receive a message: {0}")]
    Receive(io::Error),
    #[error("cannot pass a message to rte_vhost: {0}")]
    HandOver(io::Error),
    #[error("cannot forward a reply: {0}")]
    Answer(io::Error),
}

/// Passes connections to the thread. A process has one thread, as libc's `accept` takes no further
/// argument.
static LINKS: OnceLock<UnboundedSender<Link>> = OnceLock::new();

/// Starts the thread, which calls `on_start` first.
pub(crate) fn start(on_start: OnStart) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (sender, receiver) = unbounded_channel();
    thread::Builder::new().name("vhost-sockets".into()).spawn(move || {
        on_start();
        LocalSet::new().block_on(&runtime, serve(receiver));
    })?;
    LINKS
        .set(sender)
        .map_err(|_| io::Error::other("a process can have only one rte_vhost transport"))
}

async fn serve(mut links: UnboundedReceiver<Link>) {
    while let Some(link) = links.recv().await {
        spawn_local(relay(link));
    }
}

/// Accepts a connection for rte_vhost. Returns the data for the callback, the inbox with the fds of
/// the messages, and rte_vhost's end of the socket pair. Returns `None` if the connection was
/// refused.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> Option<(Accepted, Arc<Inbox>, OwnedFd)> {
    let path = bound_path(listener)?;
    let account = shared().account_of(&path);
    let socket = Arc::new(accept_or_refuse(listener, &account)?);
    let connected = if account.is_stuck() {
        Err(format!(
            "closing fds of earlier front ends is blocked: {} are not closed",
            account.waiting()
        ))
    } else if !account.has_room(FDS_MAX) {
        Err(format!("too many open fds from front ends: {}", account.open()))
    } else {
        connect(&path, &socket, account).map_err(|e| e.to_string())
    };
    match connected {
        Ok((inbox, answers, theirs)) => Some((Accepted { path, socket, answers }, inbox, theirs)),
        Err(reason) => {
            warn!("{}: refused a connection: {reason}", path.display());
            shut_down(&socket);
            None
        }
    }
}

/// Makes the socket pair for rte_vhost, and starts the task that serves it.
fn connect(
    path: &std::path::Path,
    socket: &Arc<ForeignFd>,
    account: Account,
) -> io::Result<(Arc<Inbox>, OwnedFd, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let (socket, answers) = (Arc::clone(socket), theirs.try_clone()?);
    let inbox = Arc::<Inbox>::default();
    let (path, rte_vhost) = (path.to_owned(), ours.into());
    let link = Link { path, socket, account, rte_vhost, inbox: Arc::clone(&inbox) };
    let links = LINKS.get().expect("connections come after `start`");
    links.send(link).map_err(|_| io::ErrorKind::BrokenPipe)?;
    Ok((inbox, answers.into(), theirs.into()))
}

/// Accepts a connection. If the process has no free fd, uses a reserved one to accept and close it:
/// a connection that stays in the backlog would keep waking the event thread.
fn accept_or_refuse(listener: BorrowedFd<'_>, account: &Account) -> Option<ForeignFd> {
    static RESERVE: LazyLock<Mutex<Option<OwnedFd>>> = LazyLock::new(|| Mutex::new(reserve()));
    let mut spare = RESERVE.lock().unwrap_or_else(PoisonError::into_inner);
    match accept4(listener) {
        Ok(fd) => {
            if spare.is_none() {
                *spare = reserve();
            }
            Some(ForeignFd::new(fd, account))
        }
        Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            warn!("refused a connection: {e}");
            *spare = None;
            let socket = ForeignFd::new(accept4(listener).ok()?, account);
            shut_down(&socket);
            None
        }
        Err(_) => None,
    }
}

fn reserve() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

/// Serves one connection until either side ends it. rte_vhost detects the end when the other end of
/// its socket is closed.
async fn relay(link: Link) {
    let Link { path, socket, account, rte_vhost, inbox } = link;
    let (socket, rte_vhost) = match (watch(socket), watch(rte_vhost)) {
        (Ok(socket), Ok(rte_vhost)) => (socket, rte_vhost),
        (Err(e), _) | (_, Err(e)) => {
            return warn!("{}: refused a connection: {e}", path.display());
        }
    };
    // Locked while a reply is sent to the front end.
    let answering = tokio::sync::Mutex::new(());
    let ended = tokio::select! {
        ended = pass_messages(&socket, &rte_vhost, &inbox, &account, &answering) => ended,
        answered = pass_answers(&rte_vhost, &socket, &account, &answering) => {
            if let Err(e) = answered {
                debug!("{}: connection ended: {e}", path.display());
            }
            Ok(())
        }
    };
    if let Err(violation) = ended {
        warn!("{}: connection ended: {violation}", path.display());
    }
    shut_down(&socket);
    // Fds that rte_vhost has not taken are dropped with the connection.
    inbox.put(Vec::new());
}

fn watch<T: AsRawFd>(socket: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `T` owns one open fd for its whole life, and always returns the same fd.
    unsafe { AsyncFd::register(socket) }.map_err(|e| e.into_parts().1)
}

/// Passes whole messages to rte_vhost, one at a time. `Ok`: the front end has disconnected, or
/// rte_vhost has ended the connection.
async fn pass_messages(
    socket: &AsyncFd<Arc<ForeignFd>>,
    rte_vhost: &AsyncFd<OwnedFd>,
    inbox: &Inbox,
    account: &Account,
    answering: &tokio::sync::Mutex<()>,
) -> Result<(), Violation> {
    let mut message = [0; MESSAGE_MAX];
    loop {
        let mut fds = Vec::new();
        let Some(len) = receive_message(socket, &mut message, &mut fds, account).await? else {
            return Ok(());
        };
        drop(answering.lock().await);
        inbox.put(fds);
        // The send fits: rte_vhost has read all earlier messages.
        match send(rte_vhost, &message[..len]) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent.map_err(Violation::HandOver)?,
        }
        inbox.taken.notified().await;
    }
}

/// Receives one message or reply with its fds, and returns its length. Returns `None` if the stream
/// ends before its first byte.
async fn receive_message(
    socket: &AsyncFd<impl AsFd + AsRawFd>,
    message: &mut [u8; MESSAGE_MAX],
    fds: &mut Vec<ForeignFd>,
    account: &Account,
) -> Result<Option<usize>, Violation> {
    if !receive_all(socket, &mut message[..HEADER_BYTES], fds, account).await? {
        return Ok(None);
    }
    let len = u32::from_le_bytes(std::array::from_fn(|n| message[8 + n])) as usize;
    let payload = message[HEADER_BYTES..].get_mut(..len).ok_or(Violation::Payload(len))?;
    if !receive_all(socket, payload, fds, account).await? {
        return Err(Violation::Half);
    }
    Ok(Some(HEADER_BYTES + len))
}

/// Fills `bytes`, and collects the fds that come with them. Returns `false` if the stream ends
/// before the first byte.
async fn receive_all(
    socket: &AsyncFd<impl AsFd + AsRawFd>,
    bytes: &mut [u8],
    fds: &mut Vec<ForeignFd>,
    account: &Account,
) -> Result<bool, Violation> {
    let mut got = 0;
    while got < bytes.len() {
        let mut ready = socket.readable().await.map_err(Violation::Receive)?;
        let rest = &mut bytes[got..];
        let received = ready.try_io(|socket| closer::receive(socket.as_fd(), rest, 0, account));
        match received {
            Err(_would_block) => {}
            Ok(Ok((0, _))) if got == 0 => return Ok(false),
            Ok(Ok((0, _))) => return Err(Violation::Half),
            Ok(Ok((count, more))) => {
                got += count;
                fds.extend(more);
                if fds.len() > MESSAGE_FDS_MAX {
                    return Err(Violation::Fds);
                }
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Ok(Err(e)) => return Err(Violation::Receive(e)),
        }
    }
    Ok(true)
}

/// Forwards replies to the front end. `Ok`: rte_vhost has ended the connection.
async fn pass_answers(
    rte_vhost: &AsyncFd<OwnedFd>,
    socket: &AsyncFd<Arc<ForeignFd>>,
    account: &Account,
    answering: &tokio::sync::Mutex<()>,
) -> Result<(), Violation> {
    let mut answer = [0; MESSAGE_MAX];
    loop {
        // One reply at a time: an fd belongs to the reply that it comes with.
        let mut fds = Vec::new();
        let Some(len) = receive_message(rte_vhost, &mut answer, &mut fds, account).await? else {
            return Ok(());
        };
        let _answering = answering.lock().await;
        let mut fd = fds.into_iter().next();
        let mut sent = 0;
        while sent < len {
            let mut ready = socket.writable().await.map_err(Violation::Answer)?;
            let rest = &answer[sent..len];
            let written = ready.try_io(|socket| match &fd {
                Some(fd) => send_with_fd(socket.as_fd(), rest, fd.as_fd(), libc::MSG_NOSIGNAL)
                    .map(|()| rest.len()),
                None => send_some(socket, rest),
            });
            if let Ok(written) = written {
                sent += written.map_err(Violation::Answer)?;
                fd = None;
            }
        }
    }
}

fn send(rte_vhost: &AsyncFd<OwnedFd>, message: &[u8]) -> io::Result<()> {
    match send_some(rte_vhost, message)? {
        sent if sent == message.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Sends as many bytes as fit.
fn send_some(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    const FLAGS: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (buffer, len) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: `send` only reads the given bytes, and the fd is open.
    let sent = unsafe { libc::send(socket.as_raw_fd(), buffer, len, FLAGS) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
