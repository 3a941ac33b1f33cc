//! The thread of each disk that keeps it connected to its server.
//!
//! When one of the disk's connections is over, the thread ends all of them and connects again,
//! until it succeeds. I/O waits meanwhile, or fails after the disk's reconnect delay. The requests
//! in flight are sent again to the server.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev::{Durability, Error, SharedQueue};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use tracing::{error, info, warn};

use crate::handshake::{self, Export, LIMIT};
use crate::link::Link;
use crate::protocol::{Request, command, transmission};
use crate::queue::{Detached, Offline, Queue};
use crate::resolver::{Resolver, resolve};
use crate::uri::NbdUri;

/// The longest time until the thread looks for connections that are over, and for links to drop.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time for a connection besides the first one of a disk. A server that limits the
/// number of connections may not answer.
const EXTRA_LIMIT: Duration = Duration::from_secs(2);
/// The longest time that the server gets to end the other connections when one is over.
const END_LIMIT: Duration = Duration::from_secs(1);
/// The shortest limit of an attempt to connect.
const ATTEMPT_MIN: Duration = Duration::from_secs(1);
/// The shortest time between two reasons of failed attempts in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// How often the thread of a deleted disk looks, once per interval, whether the kernel still uses
/// the buffers of a connection, before it leaks them.
const RETIRE_TRIES: u32 = 30;

/// What a disk wants of its server.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The disk's name, for the log.
    pub(crate) name: String,
    pub(crate) uri: NbdUri,
    /// The properties of the export when the disk was created. An export with others is refused.
    pub(crate) export: Export,
    /// After this time without a server, I/O fails. `None`: it waits for ever.
    pub(crate) reconnect_delay: Option<Duration>,
    /// The interval of attempts to connect.
    pub(crate) reconnect_interval: Duration,
}

/// Keeps a disk connected until it is dropped.
#[derive(Debug)]
pub(crate) struct Connector(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    wanted: Wanted,
    queues: Arc<[Arc<Queue>]>,
    durability: Arc<Durability>,
    connected: AtomicBool,
    /// No request was on its way when the queues stopped using the connections.
    quiet: AtomicBool,
    /// The disk is deleted: all I/O fails.
    ending: AtomicBool,
    /// Links that no queue uses any more, until the kernel has ended their operations.
    #[expect(clippy::vec_box, reason = "the links are boxed already")]
    retired: Mutex<Vec<Box<Link>>>,
    /// Wakes the thread.
    wake: Arc<OwnedFd>,
}

/// Connects to the server of an export, `max` times at most, if the server allows several
/// connections. May block for some tens of seconds, and as long as the resolver of host names.
///
/// # Errors
/// As [`handshake::connect`], for the first connection.
pub(crate) fn connect(
    name: &str,
    uri: &NbdUri,
    max: usize,
) -> Result<(Vec<OwnedFd>, Export), Error> {
    let error = |source| Error::System { what: uri.to_string(), source };
    let target = resolve(&uri.address).map_err(error)?;
    let connect =
        |limit| handshake::connect(&target, &uri.export, Instant::now() + limit).map_err(error);
    let (first, export) = connect(LIMIT)?;
    let mut sockets = vec![first];
    let max = if export.has(transmission::CAN_MULTI_CONN) { max } else { 1 };
    while sockets.len() < max {
        match connect(EXTRA_LIMIT) {
            Ok((socket, other)) if other == export => sockets.push(socket),
            Ok((_, other)) => return Err(changed(export, other)),
            Err(e) => {
                let count = sockets.len();
                warn!("bdev {name}: the server allows {count} connections only: {e}");
                break;
            }
        }
    }
    Ok((sockets, export))
}

fn changed(before: Export, now: Export) -> Error {
    Error::Invalid(format!("the export has changed: expected {before:?}, found {now:?}"))
}

/// Makes the eventfd that wakes a connector.
pub(crate) fn waker() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
}

impl Connector {
    /// Lets each queue use one of the sockets, and starts the thread. `wake` is the eventfd of the
    /// queues.
    pub(crate) fn start(
        wanted: Wanted,
        sockets: Vec<OwnedFd>,
        queues: Arc<[Arc<Queue>]>,
        durability: Arc<Durability>,
        wake: Arc<OwnedFd>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            wanted,
            queues,
            durability,
            connected: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            retired: Mutex::default(),
            wake,
        });
        shared.adopt(&sockets)?;
        let connector = Self(Arc::clone(&shared));
        thread::Builder::new()
            .name("vhost-nbd".into())
            .spawn(move || shared.keep_connected(sockets))?;
        Ok(connector)
    }

    pub(crate) fn uri(&self) -> &NbdUri {
        &self.0.wanted.uri
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.0.connected.load(Ordering::Relaxed)
    }

    /// Ends the connections, and fails all I/O.
    pub(crate) fn end(&self) {
        self.0.ending.store(true, Ordering::Release);
        self.0.disconnect(Offline::Fail);
        // Fails only if the counter is full, after 2^64 calls.
        let _ = rustix::io::write(&*self.0.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Connector {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Lets the queues use these sockets.
    fn adopt(&self, sockets: &[OwnedFd]) -> io::Result<()> {
        let pairs = self.queues.iter().zip(sockets);
        let links: io::Result<Vec<_>> =
            pairs.map(|(queue, socket)| Link::new(socket.as_fd(), queue.call_fd())).collect();
        let links = links?;
        self.durability.server_lost();
        self.quiet.store(true, Ordering::Relaxed);
        self.connected.store(true, Ordering::Relaxed);
        self.queues.iter().zip(links).for_each(|(queue, link)| queue.connect(link));
        // A deletion during this call has disconnected the queues too early.
        if self.is_ending() {
            self.disconnect(Offline::Fail);
        }
        Ok(())
    }

    /// Stops using the connections. Returns why they are over, if a queue knows.
    fn disconnect(&self, offline: Offline) -> Option<String> {
        self.connected.store(false, Ordering::Relaxed);
        let mut reason = None;
        for queue in &*self.queues {
            let Detached { link, broken, quiet } = queue.disconnect(offline);
            if !quiet {
                self.quiet.store(false, Ordering::Relaxed);
            }
            self.retired.lock().unwrap_or_else(PoisonError::into_inner).extend(link);
            reason = reason.or(broken.map(|broken| broken.to_string()));
        }
        // A deletion during this call must not be undone: I/O must fail, not wait.
        if offline == Offline::Wait && self.is_ending() {
            self.disconnect(Offline::Fail);
        }
        reason
    }

    /// Drops the links that the kernel does not use any more. Returns whether none is left. Their
    /// sockets are shut down.
    fn reap(&self) -> bool {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.retain_mut(|link| {
            link.submit();
            while link.poll().is_some() {}
            link.submit();
            link.is_busy()
        });
        retired.is_empty()
    }

    /// The thread's main function.
    fn keep_connected(&self, sockets: Vec<OwnedFd>) {
        let mut sockets = sockets;
        let mut connected = Instant::now();
        let mut resolver = Resolver::default();
        while !self.is_ending() {
            self.reap();
            if !self.wait(&sockets) {
                continue;
            }
            if self.is_ending() {
                break;
            }
            let reason = self.disconnect(Offline::Wait);
            let lost = Instant::now();
            let limit = self.wanted.reconnect_delay.map_or(END_LIMIT, |delay| delay.min(END_LIMIT));
            end_in_order(&sockets, lost + limit);
            let reason = reason.as_deref().unwrap_or("the server has closed a connection");
            warn!("bdev {}: {reason}; connecting again to {}", self.wanted.name, self.wanted.uri);
            // A server may close each connection at once.
            let next = connected + self.wanted.reconnect_interval;
            match self.reconnect(&mut resolver, lost, next) {
                Some(again) => sockets = again,
                None => break,
            }
            connected = Instant::now();
        }
        self.say_goodbye(&sockets);
        end(&sockets);
        for _ in 0..RETIRE_TRIES {
            if self.reap() {
                break;
            }
            self.pause(WATCH_INTERVAL, &[]);
        }
    }

    /// Waits until a connection is over, or the disk is deleted, for an interval at most. Returns
    /// whether a connection is over.
    fn wait(&self, sockets: &[OwnedFd]) -> bool {
        self.pause(WATCH_INTERVAL, sockets) || self.queues.iter().any(|queue| queue.is_broken())
    }

    /// Waits for a time, for the end of the disk, for a queue that is broken, or for these sockets.
    /// Returns whether one of the sockets has ended.
    fn pause(&self, time: Duration, sockets: &[OwnedFd]) -> bool {
        let rdhup = |socket| PollFd::new(socket, PollFlags::RDHUP);
        let mut fds: Vec<_> = sockets.iter().map(rdhup).collect();
        fds.push(PollFd::new(&*self.wake, PollFlags::IN));
        // After an error (a signal), the caller checks everything again.
        let _ = poll(&mut fds, Timespec::try_from(time).ok().as_ref());
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let any = fds[..sockets.len()].iter().any(|fd| fd.revents().intersects(ended));
        drop(fds);
        // Fails if nobody has signalled it.
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        any
    }

    /// Waits for a time, or until the disk is deleted.
    fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now())
            && !left.is_zero()
            && !self.is_ending()
        {
            self.pause(left, &[]);
        }
    }

    /// Connects again, from time `next` on. `None`: the disk was deleted.
    fn reconnect(
        &self,
        resolver: &mut Resolver,
        lost: Instant,
        next: Instant,
    ) -> Option<Vec<OwnedFd>> {
        let Wanted { name, uri, reconnect_delay, reconnect_interval, .. } = &self.wanted;
        let (mut reasons, mut failing, mut next) = (Reasons::default(), false, next);
        while !self.is_ending() {
            // The time until I/O fails, if it will.
            let left = reconnect_delay.filter(|_| !failing);
            let left = left.map(|delay| delay.saturating_sub(lost.elapsed()));
            if left == Some(Duration::ZERO) {
                failing = true;
                self.disconnect(Offline::Fail);
                error!("bdev {name}: no connection to {uri}: I/O fails until there is one");
                continue;
            }
            let wait = next.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                self.rest(left.map_or(wait, |left| left.min(wait)));
                continue;
            }
            // An attempt, which includes resolving a host name, delays the failure of I/O by a
            // second at most.
            let limit = left.map_or(LIMIT, |left| left.clamp(ATTEMPT_MIN, LIMIT));
            match self.try_connect(resolver, limit) {
                Ok(sockets) => {
                    info!("bdev {name}: connected to {uri} again");
                    return Some(sockets);
                }
                Err(e) => {
                    let reason = e.to_string();
                    if reasons.is_news(&reason, Instant::now()) {
                        error!("bdev {name}: cannot connect to {reason}; trying again");
                    }
                }
            }
            self.reap();
            next = Instant::now() + *reconnect_interval;
        }
        None
    }

    /// Makes a connection for each queue, and lets the queues use them.
    fn try_connect(&self, resolver: &mut Resolver, limit: Duration) -> Result<Vec<OwnedFd>, Error> {
        let Wanted { uri, export: wanted, .. } = &self.wanted;
        let count = self.queues.len();
        let deadline = Instant::now() + limit;
        let mut sockets = vec![];
        let what = uri.to_string();
        let target = resolver.resolve(&uri.address, deadline);
        let target = target.map_err(|source| Error::System { what: what.clone(), source })?;
        while sockets.len() < count {
            let connected = handshake::connect(&target, &uri.export, deadline);
            let (socket, export) = connected.map_err(|source| Error::System {
                what: format!("{uri}, connection {} of {count}", sockets.len() + 1),
                source,
            })?;
            if export != *wanted {
                return Err(changed(*wanted, export));
            }
            sockets.push(socket);
        }
        self.adopt(&sockets).map_err(|source| Error::System { what, source })?;
        Ok(sockets)
    }

    /// Tells the server that the connections end, where no request is on its way.
    fn say_goodbye(&self, sockets: &[OwnedFd]) {
        // In the middle of a request, the server would take the bytes for its payload.
        if !self.quiet.load(Ordering::Relaxed) || !self.reap() {
            return;
        }
        let request = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, len: 0 };
        for socket in sockets {
            let _ = send(socket, &request.encode(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

/// The reason of failed attempts to connect that was logged last.
#[derive(Default)]
struct Reasons(Option<(String, Instant)>);

impl Reasons {
    /// Whether to log a reason: it is another one, and the last was logged some time ago.
    fn is_news(&mut self, reason: &str, now: Instant) -> bool {
        if let Some((last, logged)) = &self.0
            && (last == reason || now < *logged + LOG_INTERVAL)
        {
            return false;
        }
        self.0 = Some((reason.to_owned(), now));
        true
    }
}

/// Ends connections. Until the deadline, the server may do the requests that it has received, which
/// will be sent again: done later, they could write old data over new. Discards its replies.
fn end_in_order(sockets: &[OwnedFd], deadline: Instant) {
    for socket in sockets {
        // Fails if the peer has closed the connection.
        let _ = shutdown(socket, Shutdown::Write);
    }
    let mut open: Vec<_> = sockets.iter().collect();
    let mut replies = vec![0; 64 << 10];
    loop {
        open.retain(|socket| match recv(socket, &mut *replies, RecvFlags::DONTWAIT) {
            Ok((n, _)) => n > 0,
            Err(e) => matches!(e, Errno::AGAIN | Errno::INTR),
        });
        let left = deadline.saturating_duration_since(Instant::now());
        if open.is_empty() || left.is_zero() {
            break;
        }
        let mut fds: Vec<_> = open.iter().map(|fd| PollFd::new(*fd, PollFlags::IN)).collect();
        // After an error (a signal), the loop tries again.
        let _ = poll(&mut fds, Timespec::try_from(left).ok().as_ref());
    }
    end(sockets);
}

/// Ends what the kernel does on sockets.
fn end(sockets: &[OwnedFd]) {
    for socket in sockets {
        // Fails if the peer has closed the connection.
        let _ = shutdown(socket, Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_server_may_finish_what_it_has_received() {
        const REPLIES: usize = 1 << 20;
        let far = Instant::now() + Duration::from_secs(60);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (ended, peer) = UnixStream::pair().unwrap();
        drop(peer);
        let sockets = [OwnedFd::from(ended), OwnedFd::from(ours)];
        send(&sockets[1], b"request", SendFlags::empty()).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut requests = vec![];
                theirs.read_to_end(&mut requests).unwrap();
                assert_eq!(requests, b"request");
                theirs.write_all(&vec![1; REPLIES]).unwrap();
                done.store(true, Ordering::Relaxed);
                drop(theirs);
            });
            end_in_order(&sockets, far);
            assert!(done.load(Ordering::Relaxed), "the connection was ended under the server");
        });
    }

    #[test]
    fn a_server_that_goes_on_is_not_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        end_in_order(&[ours.into()], Instant::now() + Duration::from_millis(1));
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        theirs.write_all(&[0]).unwrap_err();
    }

    #[test]
    fn another_reason_is_logged_but_not_often() {
        let start = Instant::now();
        let mut reasons = Reasons::default();
        let mut is_news = |reason, sec| reasons.is_news(reason, start + Duration::from_secs(sec));
        assert!(is_news("refused", 0));
        assert!(!is_news("refused", 1000));
        assert!(is_news("export", 1000));
        assert!(!is_news("refused", 1001) && !is_news("refused", 1009));
        assert!(is_news("refused", 1010));
    }
}
