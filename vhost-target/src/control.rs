//! The target: all controllers, connections and reactors, and the lock that protects them.
//!
//! The lock is held for bounded work on memory only: never across a system call that can wait, a
//! call of the transport, the opening of a device, or the mapping or unmapping of guest memory.
//! Reactors never take it. Code that waits for a condition waits for the `changed` hook.

mod connections;
mod deletion;
mod gate;
mod messages;
mod opening;
mod operator;
mod placement;
mod rings;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use closer::Account;
use guest_memory::Unmapper;
use qsbr::Domain;
use reactor::{Core, Mode, OnStart, Reclaim, WakeSource};

use crate::controller::{Controller, ControllerId};
use crate::device::{Granted, StorageUse};
use crate::error::Error;
use crate::notify::KickFd;
use crate::protocol;
use crate::queue::{Event, QueueId, TargetQueue};
use crate::session::{DRAIN_LIMIT_S, Session};
use crate::transport::{ConnId, SharedConnection};
use gate::{Hold, Place};
use opening::Opener;
use placement::Orphan;

/// A reactor of a target, with the target's events.
pub type Reactor = reactor::Reactor<Event>;
/// See [`Reactor`].
pub type SteppedReactor = reactor::SteppedReactor<Event>;
/// See [`Reactor`].
pub type Events = reactor::Events<Event>;

pub use deletion::{DeleteProgress, Deletion};
pub use placement::Moving;

/// The target; see the module's documentation.
pub struct Target {
    inner: Mutex<Inner>,
    domain: Arc<Domain>,
    reactors: Vec<Arc<Reactor>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The reactors have no threads: see [`Target::in_steps`].
    stepped: bool,
    events: Arc<Events>,
    reclaim: Reclaim,
    unmapper: Unmapper,
    changed: Arc<dyn Fn() + Send + Sync>,
    /// The callback for a device's lease that has become held.
    granted: Granted,
    drain_limit_s: AtomicU64,
    opener: Opener,
    /// A reference to this target, for the threads that open devices.
    weak: Weak<Self>,
    /// Held by a thread that moves queues between reactors, until it has finished.
    placing: Mutex<()>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("reactors", &self.reactors.len()).finish_non_exhaustive()
    }
}

/// Without this, the reactors would run forever.
impl Drop for Target {
    fn drop(&mut self) {
        self.stop_reactors();
    }
}

#[derive(Default)]
struct Inner {
    controllers: BTreeMap<String, Controller>,
    connections: BTreeMap<ConnId, Connected>,
    /// The connection and the ring number of each queue.
    queues: HashMap<QueueId, (ConnId, usize)>,
    /// The queues that each reactor polls.
    attached: Vec<Vec<Arc<dyn TargetQueue>>>,
    /// Orphan I/O of queues that were moved.
    orphans: Vec<Orphan>,
    /// By controller name. Includes names of deleted controllers whose fds are not all closed: a
    /// new controller of the same name continues the account.
    accounts: BTreeMap<String, Account>,
    /// The number of controllers created so far.
    controllers_made: u64,
    /// No connection is accepted any more, even if a deletion is cancelled.
    ending: bool,
    ids: u64,
}

struct Connected {
    controller: ControllerId,
    controller_name: String,
    /// The number of connections of the controller before it.
    number: u32,
    vid: i32,
    session: Session,
    /// `None` once the connection is closed.
    conn: Option<SharedConnection>,
    /// It had, or may have had, I/O in flight when its end was reported.
    left_io: bool,
    /// The storage that its guest accesses.
    storage: StorageUse,
    /// Its use of the leases of that storage; `None` while no ring needs them.
    hold: Option<Hold>,
    /// The leases were not held when it began to use them.
    waited_for_lease: bool,
    queues: Vec<Option<Attached>>,
    /// The number of requests that its stopped rings had completed, and how many of them had
    /// failed.
    past_requests: (u64, u64),
    /// The latest start of each ring whose device is being opened.
    opening: HashMap<usize, QueueId>,
    /// The rings in `opening` whose device no thread opens yet.
    to_open: VecDeque<usize>,
    /// Whether a thread is opening devices for this connection.
    opens: bool,
    /// Seconds for which a device has been opening: see [`Target::tick`].
    opening_s: u64,
    /// The reply that the front end waits for.
    pending_reply: Option<PendingReply>,
    /// The controller's. It may outlive the controller.
    unmapper: Unmapper,
}

/// A reply that is sent when I/O has completed.
struct PendingReply {
    /// The request that it replies to.
    request: u32,
    /// Seconds since the request: see [`Target::tick`].
    waited_s: u64,
    /// Whether a warning was logged.
    warned: bool,
}

struct Attached {
    queue: Arc<dyn TargetQueue>,
    /// The reactor whose poll set has it, or will have it when it has been moved.
    reactor: usize,
    /// No poll set has it at present: see [`placement`].
    moving: bool,
    /// The place in memory of the ring that it serves.
    place: Option<Place>,
    /// The wake source of the guest's kicks, if they wake the reactor.
    kicks: Option<WakeSource<KickFd>>,
}

impl Connected {
    /// Notifies the front end of a config change, if that is due. Call this when it may have become
    /// due, and periodically, because a front end that does not read its socket has to be notified
    /// later.
    fn announce_config(&mut self) {
        let due = self.session.config_to_announce();
        if due.is_some_and(|channel| channel.send_nowait(&protocol::config_change())) {
            self.session.config_announced();
        }
    }
}

impl Inner {
    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    /// Returns the account of the controller with this name.
    fn account(&mut self, name: &str) -> Account {
        let controllers = &self.controllers;
        self.accounts.retain(|name, account| {
            controllers.contains_key(name) || account.open() > 0 || account.waiting() > 0
        });
        let account = self.accounts.entry(name.to_owned());
        account.or_insert_with(|| Account::new(format!("controller {name}"))).clone()
    }

    fn controller(&mut self, name: &str) -> Result<&mut Controller, Error> {
        self.controllers.get_mut(name).ok_or_else(|| Error::NoController(name.into()))
    }

    fn controller_of(&self, conn: ConnId) -> Option<&Controller> {
        let connected = self.connections.get(&conn)?;
        let controller = self.controllers.get(&connected.controller_name)?;
        (controller.id == connected.controller).then_some(controller)
    }
}

impl Target {
    /// Starts a reactor on each of `cores`. `changed` is called when a condition that a caller
    /// waits for may have changed, on any thread and possibly with locks held.
    ///
    /// # Errors
    /// A core cannot be used, or the system has no threads or fds left.
    pub fn start(
        cores: &[Core],
        mode: Mode,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Arc<Self>> {
        Self::start_with(cores, mode, changed, Arc::new(|| {}))
    }

    /// As [`Target::start`]. Each reactor's thread calls `on_start` before its first poll
    /// iteration.
    ///
    /// # Errors
    /// As [`Target::start`].
    pub fn start_with(
        cores: &[Core],
        mode: Mode,
        changed: Arc<dyn Fn() + Send + Sync>,
        on_start: OnStart,
    ) -> io::Result<Arc<Self>> {
        let domain = Domain::new(cores.len());
        let events = Arc::new(Events::new()?);
        let mut reactors = Vec::new();
        let mut threads = Vec::new();
        for core in cores {
            let started = Reactor::start(*core, &domain, &events, mode, Arc::clone(&on_start));
            let (reactor, thread) = started.map_err(|e| {
                let what = "does not exist or may not be used by this process";
                io::Error::new(e.kind(), format!("core {} {what}: {e}", core.0))
            })?;
            reactors.push(reactor);
            threads.push(thread);
        }
        Self::with(domain, events, reactors, threads, changed)
    }

    /// Creates a target whose `count` reactors perform poll iterations only when they are told to.
    /// For simulations, which need the same order of events for the same seed.
    ///
    /// # Errors
    /// The system has no threads or fds left.
    pub fn in_steps(
        count: usize,
        mode: Mode,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<(Arc<Self>, Vec<SteppedReactor>)> {
        let domain = Domain::new(count);
        let events = Arc::new(Events::new()?);
        let mut reactors = Vec::new();
        let mut steps = Vec::new();
        for n in 0..count {
            let reactor = Arc::new(Reactor::new(Core(n), &domain, mode)?);
            steps.push(SteppedReactor::new(&reactor, &domain, &events)?);
            reactors.push(reactor);
        }
        Ok((Self::with(domain, events, reactors, Vec::new(), changed)?, steps))
    }

    fn with(
        domain: Arc<Domain>,
        events: Arc<Events>,
        reactors: Vec<Arc<Reactor>>,
        threads: Vec<JoinHandle<()>>,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Arc<Self>> {
        let attached = reactors.iter().map(|_| Vec::new()).collect();
        let inner = Inner { attached, ..Inner::default() };
        let freed = Arc::clone(&changed);
        let (reclaim, unmapper) = (Reclaim::start(move || freed())?, Unmapper::start()?);
        let opener = Opener::start()?;
        Ok(Arc::new_cyclic(|target: &Weak<Self>| Self {
            inner: Mutex::new(inner),
            domain,
            reactors,
            stepped: threads.is_empty(),
            threads: Mutex::new(threads),
            events,
            reclaim,
            unmapper,
            changed,
            granted: {
                let target = Weak::clone(target);
                Arc::new(move || target.upgrade().iter().for_each(|t| t.leases_granted()))
            },
            drain_limit_s: AtomicU64::new(DRAIN_LIMIT_S),
            opener,
            weak: Weak::clone(target),
            placing: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how long a front end that stops a ring waits for the ring's I/O, in whole seconds. The
    /// default is [`DRAIN_LIMIT_S`].
    pub fn set_drain_limit(&self, limit: Duration) {
        self.drain_limit_s.store(limit.as_secs(), Ordering::Relaxed);
    }

    /// Returns the cores that have a reactor, in the order of `-m`.
    #[must_use]
    pub fn cores(&self) -> Vec<Core> {
        self.reactors.iter().map(|reactor| reactor.core()).collect()
    }

    /// Returns the event queue of the reactors. When it becomes readable, call
    /// [`Target::process_events`].
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Refuses new connections and closes the existing ones.
    pub fn begin_shutdown(&self) {
        let mut inner = self.lock();
        inner.ending = true;
        inner.connections.values().filter_map(|c| c.conn.as_ref()).for_each(|c| c.shut_down());
    }

    /// Returns the account that owns the fds of front ends on this socket.
    #[must_use]
    pub fn account(&self, socket: &Path) -> Option<Account> {
        let inner = self.lock();
        let controller = inner.controllers.values().find(|c| c.socket == socket)?;
        Some(controller.account.clone())
    }

    /// Returns the number of connections, including closed ones that have not drained.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().connections.len()
    }

    /// Stops the reactors and waits for the end of their poll iterations, which nothing can delay.
    pub fn stop_reactors(&self) {
        self.reactors.iter().for_each(|reactor| reactor.shut_down());
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
    }
}
