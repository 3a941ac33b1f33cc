//! The thread that speaks with front ends, so that rte_vhost's event thread does not have to.
//!
//! A front end may send half a message and no more, may not read its answers, and may attach
//! anything to its bytes. Here that costs it its own task and nobody else's time: a task per
//! connection reads a message with all of its fds ([`closer::receive`]), and hands it to rte_vhost
//! when it is whole and the one before it has been taken; and it passes on what rte_vhost and the
//! control side answer, in their order. A front end that does not read its answers gets no further
//! message handled. So the event thread spends no time on a front end but the handling of messages.
//!
//! The sockets of front ends are foreign fds: they may hold unread fds, whose last reference would
//! be dropped with theirs.
#![expect(unsafe_code, reason = "system calls on sockets")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;

use closer::{Account, FDS_MAX, ForeignFd};
use spdk_sys as sys;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{LocalSet, spawn_local};
use tracing::{debug, warn};
use vhost_blk::OnStart;
use vhost_blk::protocol::HEADER_BYTES;

use super::callbacks;
use super::connection::{bound_path, send_with_fd};
use super::interpose::Inbox;

/// The longest payload that rte_vhost takes.
const PAYLOAD_MAX: usize = MESSAGE_MAX - HEADER_BYTES;
const MESSAGE_MAX: usize = sys::FDS_OFFSET;

/// Fds that a message may carry: one for each line of a memory table.
const MESSAGE_FDS_MAX: usize = 8;

/// A front end that has connected, as the event thread's callback wants to know it.
#[derive(Debug)]
pub(super) struct Accepted {
    /// The path of the socket that it has connected to.
    pub(super) path: PathBuf,
    /// The front end's socket.
    pub(super) socket: Arc<ForeignFd>,
    /// rte_vhost's end of the pair: what is sent here goes to the front end, after what rte_vhost
    /// has sent before.
    pub(super) answers: OwnedFd,
}

/// A connection for the thread.
struct Link {
    path: PathBuf,
    socket: Arc<ForeignFd>,
    account: Account,
    /// The other end of what rte_vhost has.
    rte_vhost: OwnedFd,
    inbox: Arc<Inbox>,
}

/// Why a connection is ended from this side.
#[derive(Debug, thiserror::Error)]
enum Violation {
    #[error("a message with a payload of {0} bytes, at most {PAYLOAD_MAX} are taken")]
    Payload(usize),
    #[error("more than {MESSAGE_FDS_MAX} fds in a message")]
    Fds,
    #[error("it ended in the middle of a message")]
    Half,
    #[error("cannot receive: {0}")]
    Receive(io::Error),
    #[error("cannot hand a message to rte_vhost: {0}")]
    HandOver(io::Error),
    #[error("cannot pass on an answer: {0}")]
    Answer(io::Error),
}

/// Starts the thread, which calls `on_start` first. Connections go to it through what is returned.
pub(super) fn start(on_start: OnStart) -> io::Result<FrontEnds> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (sender, receiver) = unbounded_channel();
    thread::Builder::new().name("vhost-sockets".into()).spawn(move || {
        on_start();
        LocalSet::new().block_on(&runtime, serve(receiver));
    })?;
    Ok(FrontEnds(sender))
}

/// The way to the thread.
#[derive(Debug)]
pub(super) struct FrontEnds(UnboundedSender<Link>);

async fn serve(mut links: UnboundedReceiver<Link>) {
    while let Some(link) = links.recv().await {
        spawn_local(relay(link));
    }
}

/// Accepts a connection for rte_vhost; says what the callback wants to know, and gives rte_vhost's
/// end of the pair, whose messages' fds are in the inbox. `None`: the front end was refused.
pub(super) fn accept(listener: BorrowedFd<'_>) -> Option<(Accepted, Arc<Inbox>, OwnedFd)> {
    let path = bound_path(listener)?;
    let account = callbacks::shared().account_of(&path);
    let socket = Arc::new(accept_at_any_price(listener, &account)?);
    let connected = if account.is_stuck() {
        Err(format!("{} fds of earlier front ends cannot be closed", account.waiting()))
    } else if !account.has_room(FDS_MAX) {
        Err(format!("its front ends have too many fds: {}", account.open()))
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

/// The pair for rte_vhost, with the task that feeds it.
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
    callbacks::shared().front_ends.0.send(link).map_err(|_| io::ErrorKind::BrokenPipe)?;
    Ok((inbox, answers.into(), theirs.into()))
}

/// Accepts even where the process has no fd left: a connection that stays in the backlog would keep
/// the event thread awake. One fd is kept in reserve for that.
fn accept_at_any_price(listener: BorrowedFd<'_>, account: &Account) -> Option<ForeignFd> {
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

/// Accepts a connection, without waiting for one, to be used without waiting.
pub(super) fn accept4(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let (nobody, none) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: an open fd; nobody wants the peer's address.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), nobody, none, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has both ends of a connection see its end, whatever happens to the fd.
pub(super) fn shut_down(socket: &impl AsRawFd) {
    // SAFETY: an open fd; if it is no connected socket, nothing happens.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Serves one connection until either side has ended it. rte_vhost learns of the end when its
/// socket's other end is closed.
async fn relay(link: Link) {
    let Link { path, socket, account, rte_vhost, inbox } = link;
    let (socket, rte_vhost) = match (watch(socket), watch(rte_vhost)) {
        (Ok(socket), Ok(rte_vhost)) => (socket, rte_vhost),
        (Err(e), _) | (_, Err(e)) => {
            return warn!("{}: refused a front end: {e}", path.display());
        }
    };
    // Held while answers wait for the front end to read.
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
    // What rte_vhost has not taken is closed with the connection.
    inbox.put(Vec::new());
}

fn watch<T: AsRawFd>(socket: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `T` owns one open fd for as long as it lives, and says the same one each time.
    unsafe { AsyncFd::register(socket) }.map_err(|e| e.into_parts().1)
}

/// Passes whole messages to rte_vhost, one at a time. `Ok`: the front end has left, or rte_vhost has
/// ended the connection.
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
        // There is room: rte_vhost has taken everything before.
        match send(rte_vhost, &message[..len]) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent.map_err(Violation::HandOver)?,
        }
        inbox.taken.notified().await;
    }
}

/// Receives one message or answer, with the fds that come along; gives its length. `None`: the stream
/// has ended before.
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

/// Fills `bytes`, and collects the fds that come along. `false`: the stream has ended before.
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

/// Passes answers to the front end. `Ok`: rte_vhost has ended the connection.
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

/// Sends as much as there is room for.
fn send_some(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    const FLAGS: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let (buffer, len) = (bytes.as_ptr().cast(), bytes.len());
    // SAFETY: bytes of ours to an open fd.
    let sent = unsafe { libc::send(socket.as_raw_fd(), buffer, len, FLAGS) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
