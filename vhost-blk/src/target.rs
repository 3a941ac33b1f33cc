//! The target: all controllers, connections and reactors, and the lock that binds them.
//!
//! The lock is held for bounded work on memory only: never across a system call that can wait, a
//! transport call, the opening of a device, or the mapping or unmapping of guest memory. Reactors
//! never take it. Whoever waits for something to become true does so on the `changed` hook.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bdev::Bdev;
use qsbr::Domain;
use tracing::{debug, info, warn};

use crate::config::Disk;
use crate::controller::{
    Controller, ControllerId, ControllerInfo, ControllerSpec, SessionInfo, check_name,
};
use crate::memory::GuestMemory;
use crate::notify::{BackendChannel, CallFd, KickFd};
use crate::protocol::{self, ConfigHead, Message};
use crate::queue::{Queue, QueueId, View};
use crate::reactor::{Core, Event, Events, Reactor, ReactorInfo, SteppedReactor};
use crate::reclaim::{Garbage, Reclaim, Unmapper};
use crate::ring::RingAddrs;
use crate::session::{DRAIN_LIMIT_S, Effect, Phase, RingState, Session};
use crate::transport::{ConnId, SharedConnection, Transport, Verdict};

/// When a drain that a front end waits for is worth a line in the log.
const DRAIN_WARN: Duration = Duration::from_secs(3);

/// Why an operation on a controller failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// there is none with this name
    #[error("no controller {0}")]
    NoController(String),
    /// the name is taken
    #[error("controller {0} exists")]
    Exists(String),
    /// the name cannot be a socket's
    #[error("{0:?} cannot be the name of a controller")]
    Name(String),
    /// the path does not fit into a socket address
    #[error("socket path {0} has {1} bytes, a socket address holds 107")]
    SocketPath(PathBuf, usize),
    /// no core, or one without a reactor
    #[error("the cpumask names no core, or one without a reactor")]
    Cpumask,
    /// a coalescing parameter is out of range
    #[error("coalescing parameter out of range")]
    Coalescing,
    /// a virtual machine is connected
    #[error("controller {0} has a connected front end")]
    Busy(String),
    /// the socket cannot be made
    #[error("cannot listen on {0}: {1}")]
    Listen(PathBuf, io::Error),
}

impl Error {
    /// SPDK's errno for it, positive.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoController(_) => libc::ENODEV,
            Self::Exists(_) => libc::EEXIST,
            Self::Cpumask | Self::Coalescing => libc::EINVAL,
            Self::Busy(_) => libc::EBUSY,
            Self::Name(_) | Self::SocketPath(..) | Self::Listen(..) => libc::EIO,
        }
    }
}

/// How far a deletion has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeleteProgress {
    /// Front ends that are connected.
    pub connected: usize,
    /// Connections that are gone but have I/O in flight.
    pub draining: usize,
}

/// All of it.
pub struct Target {
    inner: Mutex<Inner>,
    domain: Arc<Domain>,
    reactors: Vec<Arc<Reactor>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    events: Arc<Events>,
    reclaim: Reclaim,
    unmapper: Unmapper,
    changed: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("reactors", &self.reactors.len()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    controllers: BTreeMap<String, Controller>,
    connections: BTreeMap<ConnId, Connected>,
    /// Which ring of which connection a queue is.
    queues: HashMap<QueueId, (ConnId, usize)>,
    /// What each reactor polls.
    attached: Vec<Vec<Arc<Queue>>>,
    ids: u64,
}

struct Connected {
    controller: ControllerId,
    controller_name: String,
    /// Counts up per controller.
    number: u32,
    vid: i32,
    session: Session,
    /// `None` once the connection is gone.
    conn: Option<SharedConnection>,
    queues: Vec<Option<Attached>>,
    /// Since when the front end has been waiting for its GET_VRING_BASE; warned about or not.
    owed: Option<(Instant, bool)>,
}

struct Attached {
    queue: Arc<Queue>,
    reactor: usize,
}

impl Inner {
    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
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
    /// Starts a reactor on each of `cores`. `changed` is called, on any thread and possibly with
    /// locks held, when something may have changed that somebody waits for.
    ///
    /// # Errors
    /// A core that cannot be used, or no threads or fds.
    pub fn start(cores: &[Core], changed: Arc<dyn Fn() + Send + Sync>) -> io::Result<Arc<Self>> {
        let domain = Domain::new(cores.len());
        let events = Arc::new(Events::new()?);
        let mut reactors = Vec::new();
        let mut threads = Vec::new();
        for core in cores {
            let (reactor, thread) = Reactor::start(*core, &domain, &events)
                .map_err(|e| io::Error::new(e.kind(), format!("core {}: {e}", core.0)))?;
            reactors.push(reactor);
            threads.push(thread);
        }
        Self::with(domain, events, reactors, threads, changed)
    }

    /// A target whose `count` reactors make a turn only when they are told to: for simulations,
    /// which want the same order of events for the same seed.
    ///
    /// # Errors
    /// No threads or fds.
    pub fn in_steps(
        count: usize,
        changed: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<(Arc<Self>, Vec<SteppedReactor>)> {
        let domain = Domain::new(count);
        let events = Arc::new(Events::new()?);
        let mut reactors = Vec::new();
        let mut steps = Vec::new();
        for n in 0..count {
            let reactor = Arc::new(Reactor::new(Core(n), &domain)?);
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
        Ok(Arc::new(Self {
            inner: Mutex::new(inner),
            domain,
            reactors,
            threads: Mutex::new(threads),
            events,
            reclaim: Reclaim::start(move || freed())?,
            unmapper: Unmapper::start()?,
            changed,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cores that have a reactor, in the order of `-m`.
    #[must_use]
    pub fn cores(&self) -> Vec<Core> {
        self.reactors.iter().map(|reactor| reactor.core()).collect()
    }

    /// Where reactors' events arrive; when it becomes readable, call [`Target::process_events`].
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    // The operator's side.

    /// Makes a controller and opens its socket. Blocks in `transport`; not for the control thread.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn create_controller(
        &self,
        spec: ControllerSpec,
        transport: &dyn Transport,
    ) -> Result<(), Error> {
        check_name(&spec.name, &spec.socket)?;
        let cores = self.choose_cores(spec.cores.as_deref())?;
        let (name, socket) = (spec.name.clone(), spec.socket.clone());
        let features = {
            let mut inner = self.lock();
            if inner.controllers.contains_key(&name) {
                return Err(Error::Exists(name));
            }
            let controller = Controller::new(ControllerId(inner.id()), spec, cores);
            let features = controller.features;
            inner.controllers.insert(name.clone(), controller);
            features
        };
        if let Err(e) = transport.listen(&socket, features) {
            self.lock().controllers.remove(&name);
            return Err(Error::Listen(socket, e));
        }
        info!("controller {name}: listening on {}", socket.display());
        Ok(())
    }

    fn choose_cores(&self, wanted: Option<&[Core]>) -> Result<Vec<Core>, Error> {
        let mut all = self.cores();
        all.sort_unstable();
        let Some(wanted) = wanted else { return Ok(all) };
        if wanted.is_empty() || wanted.iter().any(|core| !all.contains(core)) {
            return Err(Error::Cpumask);
        }
        Ok(wanted.to_vec())
    }

    /// Begins to delete a controller: it takes no new connection from here on. With `force` its
    /// connections are ended.
    ///
    /// # Errors
    /// There is no such controller.
    pub fn begin_delete(&self, name: &str, force: bool) -> Result<(), Error> {
        let mut inner = self.lock();
        let controller = inner.controller(name)?;
        controller.deleting = true;
        let id = controller.id;
        if force {
            let mine = inner.connections.values().filter(|c| c.controller == id);
            mine.filter_map(|c| c.conn.as_ref()).for_each(|conn| conn.shut_down());
        }
        Ok(())
    }

    /// Whether a deletion of this controller is under way.
    #[must_use]
    pub fn is_deleting(&self, name: &str) -> bool {
        self.lock().controllers.get(name).is_some_and(|c| c.deleting)
    }

    /// Gives a deletion up: the controller takes connections again.
    pub fn cancel_delete(&self, name: &str) {
        if let Ok(controller) = self.lock().controller(name) {
            controller.deleting = false;
        }
    }

    /// How many connections stand in a deletion's way.
    ///
    /// # Errors
    /// There is no such controller (any more).
    pub fn delete_progress(&self, name: &str) -> Result<DeleteProgress, Error> {
        let mut inner = self.lock();
        let id = inner.controller(name)?.id;
        let mine = || inner.connections.values().filter(|c| c.controller == id);
        let connected = mine().filter(|c| c.conn.is_some()).count();
        Ok(DeleteProgress { connected, draining: mine().count() - connected })
    }

    /// Ends a deletion: closes the socket and forgets the controller. Connections that are left
    /// drain in the background. Blocks in `transport`; not for the control thread.
    pub fn finish_delete(&self, name: &str, transport: &dyn Transport) {
        let (id, socket) = match self.lock().controller(name) {
            Ok(controller) => (controller.id, controller.socket.clone()),
            Err(_) => return,
        };
        transport.unlisten(&socket);
        // rte_vhost tells nobody about the connections that it closes then.
        let left: Vec<ConnId> = {
            let inner = self.lock();
            let mine = inner.connections.iter().filter(|(_, c)| c.controller == id);
            mine.map(|(conn, _)| *conn).collect()
        };
        left.into_iter().for_each(|conn| self.closed(conn));
        self.lock().controllers.remove(name);
        info!("controller {name}: deleted");
        (self.changed)();
    }

    /// Sets interrupt coalescing.
    ///
    /// # Errors
    /// No such controller, or a value out of range.
    pub fn set_coalescing(&self, name: &str, delay_us: u32, iops: u32) -> Result<(), Error> {
        if self.lock().controller(name)?.set_coalescing(delay_us, iops) {
            Ok(())
        } else {
            Err(Error::Coalescing)
        }
    }

    /// All controllers, by name.
    #[must_use]
    pub fn controllers(&self) -> Vec<ControllerInfo> {
        let inner = self.lock();
        inner.controllers.values().map(|c| controller_info(&inner, c)).collect()
    }

    /// Connections that are gone but have I/O in flight: their number, I/Os, and bytes of memory.
    #[must_use]
    pub fn quarantine(&self) -> (usize, u64, u64) {
        let inner = self.lock();
        let gone = inner.connections.values().filter(|c| c.conn.is_none()).map(session_info);
        gone.fold((0, 0, 0), |(n, ios, bytes), s| {
            (n + 1, ios + s.inflight, bytes + s.quarantined_bytes)
        })
    }

    /// What the reactors have done.
    #[must_use]
    pub fn reactors(&self) -> Vec<ReactorInfo> {
        let inner = self.lock();
        let with_queues = |(reactor, queues): (&Arc<Reactor>, &Vec<_>)| ReactorInfo {
            queues: queues.len(),
            ..reactor.info()
        };
        self.reactors.iter().zip(&inner.attached).map(with_queues).collect()
    }

    /// Takes a disk out of all controllers that show it: their requests fail from here on, and
    /// the channels are closed once their I/O has completed.
    pub fn remove_bdev(&self, bdev: &Arc<dyn Bdev>) {
        let mut inner = self.lock();
        let mut bereft = Vec::new();
        for controller in inner.controllers.values_mut() {
            if controller.disk.as_ref().is_some_and(|disk| Arc::ptr_eq(&disk.bdev, bdev)) {
                warn!("controller {}: its disk was removed", controller.name);
                controller.disk = None;
                bereft.push(controller.id);
            }
        }
        self.republish(&mut inner, |connected| bereft.contains(&connected.controller));
    }

    /// Tells the guests of a disk that its size has changed.
    pub fn bdev_resized(&self, bdev: &Arc<dyn Bdev>) {
        let inner = self.lock();
        let shows =
            |c: &&Controller| c.disk.as_ref().is_some_and(|disk| Arc::ptr_eq(&disk.bdev, bdev));
        let ids: Vec<_> = inner.controllers.values().filter(shows).map(|c| c.id).collect();
        for connected in inner.connections.values() {
            if ids.contains(&connected.controller)
                && connected.session.phase() == Phase::Running
                && let Some(channel) = connected.session.backend_channel()
            {
                channel.send_nowait(&protocol::config_change());
            }
        }
    }

    fn republish(&self, inner: &mut Inner, which: impl Fn(&Connected) -> bool) {
        let conns = inner.connections.iter().filter(|(_, c)| which(c));
        let effects: Vec<_> =
            conns.map(|(id, c)| (*id, c.session.publish_where(|_| true))).collect();
        for (conn, effects) in effects {
            self.apply(inner, conn, effects, None);
        }
    }

    // The transport's side.

    /// A front end has connected to `socket`. `None` refuses it.
    pub fn connected(&self, socket: &Path, conn: SharedConnection) -> Option<ConnId> {
        let mut inner = self.lock();
        let id = ConnId(inner.id());
        let controllers = &mut inner.controllers;
        let controller = controllers.values_mut().find(|c| c.socket == socket)?;
        if controller.deleting {
            return None;
        }
        let number = controller.sessions_made;
        controller.sessions_made += 1;
        let (name, of, offered) = (controller.name.clone(), controller.id, controller.features);
        let gate_open = !inner.connections.values().any(|c| c.controller == of && c.conn.is_none());
        debug!("controller {name}: front end {number} connected");
        let connected = Connected {
            controller: of,
            controller_name: name,
            number,
            vid: conn.vid(),
            session: Session::new(offered, gate_open),
            conn: Some(conn),
            queues: Vec::new(),
            owed: None,
        };
        inner.connections.insert(id, connected);
        Some(id)
    }

    /// A message has arrived. Called on the transport's thread, in the connection's order.
    pub fn message(
        &self,
        conn: ConnId,
        request: u32,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Verdict {
        let result = Message::parse(request, payload, fds)
            .map_err(|e| e.to_string())
            .and_then(|message| self.handle(conn, message));
        match result {
            Ok(verdict) => verdict,
            Err(reason) => {
                let inner = self.lock();
                let name = inner.connections.get(&conn).map(|c| c.controller_name.as_str());
                warn!("controller {}: connection ended: {reason}", name.unwrap_or("?"));
                Verdict::Reject
            }
        }
    }

    fn handle(&self, conn: ConnId, message: Message) -> Result<Verdict, String> {
        self.check_turn(conn)?;
        // What takes system calls comes before the lock.
        let message = self.prepare(conn, message)?;
        let mut inner = self.lock();
        let controller_config = inner.controller_of(conn).map(Controller::config_space);
        let connected = inner.connections.get_mut(&conn).ok_or("unknown connection")?;
        let session = &mut connected.session;
        let mut verdict = Verdict::Done;
        let mut reply = None;
        let effects = match message {
            Prepared::Memory(memory) => session.set_memory(memory).map(|(_, effects)| effects),
            Prepared::Call(ring, call) => session.set_call(ring, call),
            Prepared::Kick(ring, kick) => session.set_kick(ring, kick),
            Prepared::BackendChannel(channel) => {
                session.set_backend_channel(channel);
                Ok(vec![])
            }
            Prepared::Plain(message) => match message {
                Message::SetFeatures(features) => {
                    verdict = Verdict::Pass;
                    session.set_features(features).map(|()| vec![])
                }
                Message::SetVringNum { ring, num } => session.set_num(ring, num).map(|()| vec![]),
                Message::SetVringBase { ring, base } => {
                    session.set_base(ring, base).map(|()| vec![])
                }
                Message::SetVringAddr { ring, desc, avail, used } => {
                    session.set_addrs(ring, RingAddrs { desc, avail, used }).map(|()| vec![])
                }
                Message::GetVringBase { ring } => {
                    verdict = Verdict::Deferred;
                    session.get_base(ring)
                }
                Message::GetConfig(head) => {
                    let config =
                        controller_config.unwrap_or_else(|| crate::config::config_space(None));
                    verdict = Verdict::Reply(config_reply(&config, head));
                    Ok(vec![])
                }
                Message::ResetOwner => Ok(session.reset_owner()),
                Message::SetVringErr | Message::SetVringEnable | Message::SetConfig => Ok(vec![]),
                Message::SetMemTable(_)
                | Message::SetVringCall { .. }
                | Message::SetVringKick { .. }
                | Message::SetBackendReqFd(_)
                | Message::Negotiation => {
                    verdict = Verdict::Pass;
                    Ok(vec![])
                }
            },
        };
        let effects = effects.map_err(|e| e.to_string())?;
        let starts = self.apply(&mut inner, conn, effects, Some(&mut reply));
        if matches!(verdict, Verdict::Deferred) && reply.is_none() {
            let connected = inner.connections.get_mut(&conn).ok_or("unknown connection")?;
            connected.owed = Some((Instant::now(), false));
        }
        drop(inner);
        self.start_rings(conn, &starts);
        Ok(reply.map_or(verdict, Verdict::Reply))
    }

    /// Turns what a front end hands over into what it has to be.
    fn prepare(&self, conn: ConnId, message: Message) -> Result<Prepared, String> {
        Ok(match message {
            Message::SetMemTable(table) => {
                let before = {
                    let inner = self.lock();
                    inner.connections.get(&conn).and_then(|c| c.session.memory().cloned())
                };
                let memory = GuestMemory::map(table, before.as_deref(), &self.unmapper);
                Prepared::Memory(Arc::new(memory.map_err(|e| e.to_string())?))
            }
            Message::SetVringCall { ring, fd } => {
                let call = fd.map(CallFd::from_front_end).transpose();
                Prepared::Call(ring, call.map_err(|e| e.to_string())?)
            }
            Message::SetVringKick { ring, fd } => {
                let kick = fd.map(KickFd::from_front_end).transpose();
                Prepared::Kick(ring, kick.map_err(|e| e.to_string())?)
            }
            Message::SetBackendReqFd(fd) => {
                let channel = BackendChannel::from_front_end(fd);
                Prepared::BackendChannel(channel.map_err(|e| e.to_string())?)
            }
            message => Prepared::Plain(message),
        })
    }

    fn check_turn(&self, conn: ConnId) -> Result<(), String> {
        let inner = self.lock();
        let connected = inner.connections.get(&conn).ok_or("unknown connection")?;
        connected.session.check_turn().map_err(|e| e.to_string())
    }

    /// The connection is gone. Its I/O completes in the background.
    pub fn closed(&self, conn: ConnId) {
        let mut inner = self.lock();
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        if connected.conn.take().is_none() {
            return;
        }
        debug!("controller {}: front end {} left", connected.controller_name, connected.number);
        connected.owed = None;
        let effects = connected.session.close();
        self.apply(&mut inner, conn, effects, None);
        let opened = self.reap(&mut inner, conn);
        drop(inner);
        self.start_all(opened);
        (self.changed)();
    }

    // The reactors' side.

    /// Takes what the reactors have sent. For the control thread.
    pub fn process_events(&self) {
        self.events.wake().take();
        let mut any = false;
        while let Some(event) = self.events.pop() {
            any = true;
            match event {
                Event::Drained(queue) => self.drained(queue),
                Event::Broken(queue) => self.broken(queue),
                Event::Released(_, channel) => self.reclaim.free(Drop1(channel)),
            }
        }
        if any {
            (self.changed)();
        }
    }

    /// Warns of drains that take long and ends connections whose drain takes too long. To be
    /// called about once a second, on the control thread.
    pub fn tick(&self, now: Instant) {
        let mut inner = self.lock();
        for connected in inner.connections.values_mut() {
            let Some((since, warned)) = &mut connected.owed else { continue };
            let waited = now.saturating_duration_since(*since);
            if waited >= Duration::from_secs(DRAIN_LIMIT_S) {
                warn!(
                    "controller {}: I/O still in flight after {DRAIN_LIMIT_S} s, ending the connection",
                    connected.controller_name
                );
                if let Some(conn) = &connected.conn {
                    conn.shut_down();
                }
                connected.owed = None;
            } else if waited >= DRAIN_WARN && !*warned {
                *warned = true;
                warn!(
                    "controller {}: the front end has been waiting {} s for its I/O to complete",
                    connected.controller_name,
                    waited.as_secs()
                );
            }
        }
    }

    fn drained(&self, queue: QueueId) {
        let mut inner = self.lock();
        let Some((conn, ring)) = inner.queues.remove(&queue) else { return };
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let Some(attached) = connected.queues[ring].take() else { return };
        let Attached { queue, reactor } = attached;
        let effects = connected.session.drained(ring, queue.last_avail());
        inner.attached[reactor].retain(|other| other.id != queue.id);
        self.reactors[reactor].publish(inner.attached[reactor].clone(), &self.reclaim);
        self.reclaim.free(queue);
        let starts = self.apply(&mut inner, conn, effects, None);
        let opened = self.reap(&mut inner, conn);
        drop(inner);
        self.start_rings(conn, &starts);
        self.start_all(opened);
    }

    fn broken(&self, queue: QueueId) {
        let inner = self.lock();
        if let Some((conn, ring)) = inner.queues.get(&queue)
            && let Some(connected) = inner.connections.get(conn)
        {
            warn!(
                "controller {}: the guest broke ring {ring} of front end {}; it is not served until \
                 the guest resets the device",
                connected.controller_name, connected.number
            );
        }
    }

    /// Forgets a connection that is closed and drained, and lets those in that waited for it.
    fn reap(&self, inner: &mut Inner, conn: ConnId) -> Vec<(ConnId, Vec<usize>)> {
        let done = |c: &Connected| c.conn.is_none() && !c.session.undrained();
        if !inner.connections.get(&conn).is_some_and(done) {
            return vec![];
        }
        let Some(gone) = inner.connections.remove(&conn) else { return vec![] };
        let of = gone.controller;
        if inner.connections.values().any(|c| c.controller == of && c.conn.is_none()) {
            return vec![];
        }
        let successors: Vec<ConnId> = inner
            .connections
            .iter()
            .filter(|(_, c)| c.controller == of)
            .map(|(conn, _)| *conn)
            .collect();
        let mut opened = vec![];
        for conn in successors {
            let Some(connected) = inner.connections.get_mut(&conn) else { continue };
            let effects = connected.session.open_gate();
            opened.push((conn, self.apply(inner, conn, effects, None)));
        }
        opened
    }

    // Effects.

    /// Carries out what a session wants, but for the starts, which it returns: they open devices,
    /// and that is done without the lock. A reply goes to `reply` if the front end's message is
    /// being handled right now, otherwise to the connection.
    fn apply(
        &self,
        inner: &mut Inner,
        conn: ConnId,
        effects: Vec<Effect>,
        mut reply: Option<&mut Option<Vec<u8>>>,
    ) -> Vec<usize> {
        let mut starts = vec![];
        for effect in effects {
            match effect {
                Effect::Start(ring) => starts.push(ring),
                Effect::Publish(ring) => self.publish(inner, conn, ring),
                Effect::Stop(ring) => {
                    let connected = inner.connections.get(&conn);
                    let attached = connected.and_then(|c| c.queues.get(ring)?.as_ref());
                    if let Some(attached) = attached {
                        attached.queue.stop();
                    }
                }
                Effect::Reply(ring, base) => {
                    let payload = protocol::vring_base(ring, base);
                    if let Some(reply) = &mut reply {
                        **reply = Some(payload.to_vec());
                        continue;
                    }
                    let Some(connected) = inner.connections.get_mut(&conn) else { continue };
                    connected.owed = None;
                    let message = protocol::reply(protocol::request::GET_VRING_BASE, &payload);
                    if let Some(c) = &connected.conn
                        && c.send(&message).is_err()
                    {
                        c.shut_down();
                    }
                }
            }
        }
        starts
    }

    fn publish(&self, inner: &mut Inner, conn: ConnId, ring: usize) {
        let generation = inner.id();
        let disk = inner.controller_of(conn).and_then(|c| c.disk.clone());
        let Some(connected) = inner.connections.get(&conn) else { return };
        let Some(Some(attached)) = connected.queues.get(ring) else { return };
        if let Some(view) = view_of(&connected.session, ring, generation, disk) {
            self.reclaim.free(attached.queue.publish(view));
        }
    }

    /// Opens the disk for rings and attaches them to reactors.
    fn start_rings(&self, conn: ConnId, rings: &[usize]) {
        for &ring in rings {
            self.start_ring(conn, ring);
        }
    }

    fn start_all(&self, opened: Vec<(ConnId, Vec<usize>)>) {
        opened.into_iter().for_each(|(conn, rings)| self.start_rings(conn, &rings));
    }

    fn start_ring(&self, conn: ConnId, ring: usize) {
        let mut inner = self.lock();
        let (id, generation) = (QueueId(inner.id()), inner.id());
        let plan = inner.controller_of(conn).and_then(|controller| {
            let connected = inner.connections.get(&conn)?;
            let view = view_of(&connected.session, ring, generation, controller.disk.clone())?;
            let base = connected.session.ring(ring).base;
            Some((view, base, Arc::clone(&controller.coalescing)))
        });
        drop(inner);
        let queue = plan
            .map(|(view, base, coalescing)| Queue::new(id, &self.domain, view, base, coalescing));
        let mut inner = self.lock();
        let cores = inner.controller_of(conn).map(|c| c.cores.clone()).unwrap_or_default();
        let reactor = self.least_loaded(&inner, &cores);
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let live = connected.session.ring(ring).state == RingState::Live;
        match queue {
            Some(Ok(queue)) if live => {
                if connected.queues.len() <= ring {
                    connected.queues.resize_with(ring + 1, || None);
                }
                connected.queues[ring] = Some(Attached { queue: Arc::clone(&queue), reactor });
                inner.queues.insert(id, (conn, ring));
                inner.attached[reactor].push(queue);
                self.reactors[reactor].publish(inner.attached[reactor].clone(), &self.reclaim);
                // What changed while the lock was not held reaches the reactor with this view.
                self.publish(&mut inner, conn, ring);
                return;
            }
            Some(Ok(queue)) => self.reclaim.free(queue),
            Some(Err(e)) => {
                warn!("controller {}: cannot open its disk: {e}", connected.controller_name);
                if let Some(conn) = &connected.conn {
                    conn.shut_down();
                }
            }
            None => {}
        }
        // It cannot be served, or was stopped meanwhile: it never had anything in flight.
        let base = connected.session.ring(ring).base;
        let effects = if live {
            connected.session.start_failed(ring);
            vec![]
        } else {
            connected.session.drained(ring, base)
        };
        let starts = self.apply(&mut inner, conn, effects, None);
        let opened = self.reap(&mut inner, conn);
        drop(inner);
        self.start_rings(conn, &starts);
        self.start_all(opened);
    }

    fn least_loaded(&self, inner: &Inner, cores: &[Core]) -> usize {
        let allowed =
            (0..self.reactors.len()).filter(|n| cores.contains(&self.reactors[*n].core()));
        allowed.min_by_key(|n| inner.attached[*n].len()).unwrap_or(0)
    }

    // The end.

    /// Refuses new connections and ends those that are there.
    pub fn begin_shutdown(&self) {
        let mut inner = self.lock();
        for controller in inner.controllers.values_mut() {
            controller.deleting = true;
        }
        inner.connections.values().filter_map(|c| c.conn.as_ref()).for_each(|c| c.shut_down());
    }

    /// Connections that are left, drained or not.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().connections.len()
    }

    /// Stops the reactors and waits for their turns to end, which nothing can hold up.
    pub fn stop_reactors(&self) {
        self.reactors.iter().for_each(|reactor| reactor.shut_down());
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// A message with what it carries checked, mapped, and made ours.
enum Prepared {
    Memory(Arc<GuestMemory>),
    Call(usize, Option<CallFd>),
    Kick(usize, Option<KickFd>),
    BackendChannel(BackendChannel),
    Plain(Message),
}

/// A view of a ring as the session has it now.
fn view_of(
    session: &Session,
    ring: usize,
    generation: u64,
    disk: Option<Arc<Disk>>,
) -> Option<View> {
    let memory = session.memory()?;
    let state = session.ring(ring);
    View::new(
        generation,
        memory,
        state.num,
        state.addrs?,
        session.event_idx(),
        state.call.clone(),
        disk,
    )
    .ok()
}

fn controller_info(inner: &Inner, controller: &Controller) -> ControllerInfo {
    // What is left of a deleted controller of the same name shows here too: it is what the
    // operator has to wait for.
    let mine = |c: &&Connected| c.controller_name == controller.name;
    ControllerInfo {
        name: controller.name.clone(),
        cores: controller.cores.clone(),
        delay_base_us: controller.delay_base_us,
        iops_threshold: controller.iops_threshold,
        socket: controller.socket.clone(),
        read_only: controller.read_only,
        packed_ring: controller.packed_ring,
        bdev: controller.disk.as_ref().map(|disk| disk.bdev.name().to_owned()),
        bdev_configured: controller.bdev_configured.clone(),
        deleting: controller.deleting,
        sessions: inner.connections.values().filter(mine).map(session_info).collect(),
    }
}

fn session_info(connected: &Connected) -> SessionInfo {
    let queues = || connected.queues.iter().flatten().map(|attached| &attached.queue);
    let inflight = queues().map(|queue| u64::from(queue.inflight())).sum();
    let mut quarantined_bytes = queues().map(|queue| queue.quarantined_bytes()).sum();
    if connected.conn.is_none() && inflight > 0 {
        quarantined_bytes += connected.session.memory().map_or(0, |memory| memory.size_bytes());
    }
    let (requests, errors) =
        queues().map(|queue| queue.requests()).fold((0, 0), |(r, e), q| (r + q.0, e + q.1));
    SessionInfo {
        vid: connected.vid,
        id: connected.number,
        phase: connected.session.phase(),
        rings: connected.session.rings().len(),
        inflight,
        quarantined_bytes,
        requests,
        errors,
    }
}

/// GET_CONFIG's payload: its head as the front end sent it, then the contents. QEMU refuses an
/// answer of another size than it asked for.
fn config_reply(config: &[u8], head: ConfigHead) -> Vec<u8> {
    let mut payload = head.bytes().to_vec();
    let n = head.len().min(config.len());
    payload.extend_from_slice(&config[..n]);
    payload.resize(head.bytes().len() + head.len(), 0);
    payload
}

/// Something to be dropped on the reclaim thread.
struct Drop1(crate::queue::ChannelBox);

impl Garbage for Drop1 {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        drop(self.0);
        None
    }
}
