//! The thread that reads from and writes to front ends in place of rte_vhost's event thread.
//!
//! A front end may send an incomplete message, may not read its answers, and may attach any fds.
//! Here that blocks only its own task: a task per connection reads a whole message with all of its
//! fds ([`closer::receive`]), and passes it to rte_vhost when that has taken the previous one. It
//! also forwards the answers of rte_vhost and of the control side, in order. While a front end does
//! not read its answers, none of its messages is handled. So the event thread spends no time on a
//! front end but for handling its messages.
//!
//! The sockets of front ends are foreign fds: they may hold unread fds, which would be closed with
//! them.
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

/// A new connection, as the event thread's callback needs it.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// The path of the socket that it has connected to.
    pub(crate) path: PathBuf,
    /// The front end's socket.
    pub(crate) socket: Arc<ForeignFd>,
    /// A duplicate of rte_vhost's end of the socket pair: what is sent here goes to the front end,
    /// after what rte_vhost has sent before.
    pub(crate) answers: OwnedFd,
}

/// The fds of the message that is on its way to rte_vhost.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    fds: Mutex<Vec<ForeignFd>>,
    /// rte_vhost has begun to read the message.
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

/// A connection for the thread to serve.
struct Link {
    path: PathBuf,
    socket: Arc<ForeignFd>,
    account: Account,
    /// Our end of the socket pair, whose other end rte_vhost has.
    rte_vhost: OwnedFd,
    inbox: Arc<Inbox>,
}

/// Why we end a connection.
#[derive(Debug, thiserror::Error)]
enum Violation {
    #[error("payload of {0} bytes in a message, the limit is {PAYLOAD_MAX}")]
    Payload(usize),
    #[error("more than {MESSAGE_FDS_MAX} fds in a message")]
    Fds,
    #[error("the stream ended in the middle of a message")]
    Half,
    #[error("cannot receive: {0}")]
    Receive(io::Error),
    #[error("cannot hand a message to rte_vhost: {0}")]
    HandOver(io::Error),
    #[error("cannot pass on an answer: {0}")]
    Answer(io::Error),
}

/// Passes connections to the thread. There is one in the process, as libc's `accept` has no argument
/// of ours.
static LINKS: OnceLock<UnboundedSender<Link>> = OnceLock::new();

/// Starts the thread, which calls `on_start` first.
pub(crate) fn start(on_start: OnStart) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (sender, receiver) = unbounded_channel();
    thread::Builder::new().name("vhost-sockets".into()).spawn(move || {
        on_start();
        LocalSet::new().block_on(&runtime, serve(receiver));
    })?;
    LINKS.set(sender).map_err(|_| io::Error::other("there is a transport already"))
}

async fn serve(mut links: UnboundedReceiver<Link>) {
    while let Some(link) = links.recv().await {
        spawn_local(relay(link));
    }
}

/// Accepts a connection for rte_vhost. Returns what the callback needs, the inbox with the fds of
/// the messages, and rte_vhost's end of the socket pair. `None`: the front end was refused.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> Option<(Accepted, Arc<Inbox>, OwnedFd)> {
    let path = bound_path(listener)?;
    let account = shared().account_of(&path);
    let socket = Arc::new(accept_or_refuse(listener, &account)?);
    let connected = if account.is_stuck() {
        Err(format!(
            "closing the fds of earlier front ends is blocked ({} not closed)",
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
            warn!("{}: refused a front end: {reason}", path.display());
            shut_down(&socket);
            None
        }
    }
}

/// Makes the socket pair for rte_vhost, and starts the task that feeds it.
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

/// Accepts even if the process has no fd left: a connection that stays in the backlog would keep
/// waking the event thread. One fd is reserved for that.
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
            warn!("refused a front end: {e}");
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

/// Serves one connection until either side ends it. rte_vhost sees the end when the other end of
/// its socket is closed.
async fn relay(link: Link) {
    let Link { path, socket, account, rte_vhost, inbox } = link;
    let (socket, rte_vhost) = match (watch(socket), watch(rte_vhost)) {
        (Ok(socket), Ok(rte_vhost)) => (socket, rte_vhost),
        (Err(e), _) | (_, Err(e)) => {
            return warn!("{}: refused a front end: {e}", path.display());
        }
    };
    // Held while an answer is being sent to the front end.
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
    // SAFETY: `T` owns one open fd for as long as it lives, and always returns the same one.
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
        // There is room: rte_vhost has read all earlier messages.
        match send(rte_vhost, &message[..len]) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent.map_err(Violation::HandOver)?,
        }
        inbox.taken.notified().await;
    }
}

/// Receives one message or reply and the fds that come with it, and returns its length. `None`: the
/// stream ended before its first byte.
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

/// Fills `bytes`, and collects the fds that come with them. `false`: the stream ended before the
/// first byte.
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

/// Forwards answers to the front end. `Ok`: rte_vhost has ended the connection.
async fn pass_answers(
    rte_vhost: &AsyncFd<OwnedFd>,
    socket: &AsyncFd<Arc<ForeignFd>>,
    account: &Account,
    answering: &tokio::sync::Mutex<()>,
) -> Result<(), Violation> {
    let mut answer = [0; MESSAGE_MAX];
    loop {
        // One at a time: an fd belongs to the answer that it comes with.
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

/// Sends as much as fits.
fn send_some(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    const FLAGS: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (buffer, len) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: our own bytes, to an open fd.
    let sent = unsafe { libc::send(socket.as_raw_fd(), buffer, len, FLAGS) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
