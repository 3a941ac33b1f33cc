//! The front ends' side of the target: connections, their messages, and what reactors say of them.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tracing::{debug, warn};

use super::gate::Bytes;
use super::{Attached, Connected, Inner, Owed, Target};
use crate::config::{self, QUEUES_MAX};
use crate::dirty_log::DirtyLog;
use crate::inflight::{Area, AreaSpec};
use crate::lived;
use crate::memory::{GuestMemory, SLOTS_MAX};
use crate::notify::{BackendChannel, CallFd, KickFd};
use crate::protocol::{self, ConfigHead, Message};
use crate::queue::QueueId;
use crate::queue::core::ChannelBox;
use crate::reactor::Event;
use crate::reclaim::{Garbage, Unmapper};
use crate::ring::RingAddrs;
use crate::session::{Effect, Session};
use crate::transport::{ConnId, SharedConnection, Verdict};
use closer::ForeignFd;

/// Connections of one controller, those that still drain included: a VM, its successor in a
/// migration, and a few that died with I/O in flight. rte_vhost has 1,024 for all controllers.
const CONNECTIONS_MAX: usize = 16;

/// Memory regions that the connections of one controller may have together, where they come one by
/// one: a VM's and its successor's in a migration.
const SLOTS_OF_CONTROLLER_MAX: usize = 2 * SLOTS_MAX;

/// Rings that the connections of one controller may have started together: a VM's and its
/// successor's in a migration. Each costs half a MiB and some fds.
const RINGS_OF_CONTROLLER_MAX: usize = 2 * QUEUES_MAX as usize;

/// Bytes of a dirty log: enough for 32 TiB of guest-physical addresses, holes included.
const LOG_BYTES_MAX: u64 = 1 << 30;

/// How long a change that a front end relies on may take until every reactor goes by it, and how
/// often that is looked at. Reactors wait for nobody, so only a system that gives them no time makes
/// it more than some microseconds; meanwhile all other front ends wait.
const SETTLE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_micros(20));

/// Whether the answer to a message has to wait until every reactor goes by what it has changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settles {
    No,
    /// Guests see an error for what they do in between.
    Should,
    /// Data would be lost.
    Must,
}

/// When a drain that a front end waits for is worth a line in the log.
const DRAIN_WARN_S: u64 = 3;

impl Target {
    /// A front end has connected to `socket`. `None` refuses it.
    pub fn connected(&self, socket: &Path, conn: SharedConnection) -> Option<ConnId> {
        // A VM that comes back may be seen before its end was: its I/O comes first all the same.
        self.gone_unreported(socket).into_iter().for_each(|conn| self.closed(conn));
        let mut inner = self.lock();
        let id = ConnId(inner.id());
        let Inner { controllers, connections, ending, .. } = &mut *inner;
        let controller = controllers.values_mut().find(|c| c.socket == socket)?;
        if controller.deleting || *ending {
            return None;
        }
        let of = controller.id;
        let mine = || connections.values().filter(|c| c.controller == of);
        let connected = mine().count();
        if connected >= CONNECTIONS_MAX {
            warn!("controller {}: refused front end {connected}: too many", controller.name);
            return None;
        }
        let number = controller.sessions_made;
        controller.sessions_made += 1;
        let name = controller.name.clone();
        let mut session = Session::new(controller.features);
        if controller.write_through {
            session.set_write_cache(false);
        }
        if controller.resized {
            session.config_changed();
        }
        let unmapper = controller.unmapper.clone();
        debug!("controller {name}: front end {number} connected");
        let connected = Connected {
            controller: of,
            controller_name: name,
            number,
            vid: conn.vid(),
            session,
            conn: Some(conn),
            left_io: false,
            bytes: Bytes::of(controller.disk.as_ref()),
            hold: None,
            waited: false,
            queues: Vec::new(),
            owed: None,
            unmapper,
        };
        inner.connections.insert(id, connected);
        Some(id)
    }

    /// Connections to `socket` whose front ends have gone, which nobody has said yet.
    fn gone_unreported(&self, socket: &Path) -> Vec<ConnId> {
        let inner = self.lock();
        let gone = |(id, c): (&ConnId, &Connected)| {
            let controller = inner.controllers.get(&c.controller_name)?;
            let here = controller.id == c.controller && controller.socket == socket;
            (here && c.conn.as_ref().is_some_and(|conn| conn.hung_up())).then_some(*id)
        };
        inner.connections.iter().filter_map(gone).collect()
    }

    /// A message has arrived. `need_reply`: the front end waits for an acknowledgement if there is
    /// no other answer. Called on the transport's thread, in the connection's order.
    pub fn message(
        &self,
        conn: ConnId,
        request: u32,
        need_reply: bool,
        payload: &[u8],
        fds: Vec<ForeignFd>,
    ) -> Verdict {
        let result = Message::parse(request, payload, fds)
            .map_err(|e| e.to_string())
            .and_then(|message| self.handle(conn, request, need_reply, message));
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

    fn handle(
        &self,
        conn: ConnId,
        request: u32,
        need_reply: bool,
        message: Message,
    ) -> Result<Verdict, String> {
        self.check_turn(conn)?;
        // What takes system calls comes before the lock.
        let message = self.prepare(conn, message)?;
        let mut inner = self.lock();
        let earlier_io = message.is_reset() && Self::has_earlier_io(&inner, conn);
        if let Prepared::Kick(ring, _) = &message {
            check_rings(&inner, conn, *ring)?;
        }
        let mut verdict = Verdict::Done;
        let (mut reply, mut settles) = (None, Settles::No);
        let Inner { controllers, connections, .. } = &mut *inner;
        let connected = connections.get_mut(&conn).ok_or("unknown connection")?;
        let controller = controllers.get_mut(&connected.controller_name);
        let controller = controller.filter(|c| c.id == connected.controller);
        let session = &mut connected.session;
        let effects = match message {
            Prepared::Memory(memory) => {
                settles = Settles::Should;
                session.set_memory(memory).map(|(_, effects)| effects)
            }
            Prepared::Call(ring, call) => session.set_call(ring, call),
            Prepared::Kick(ring, kick) => session.set_kick(ring, kick),
            Prepared::BackendChannel(channel) => {
                session.set_backend_channel(channel);
                Ok(vec![])
            }
            Prepared::Log(log, answer) => {
                (verdict, settles) = (Verdict::Reply(answer), Settles::Must);
                Ok(session.set_log(log))
            }
            Prepared::Area(area) => session.set_inflight(area).map(|()| vec![]),
            Prepared::NewArea(spec, fd) => {
                verdict = Verdict::ReplyWithFd(protocol::inflight(spec).into(), fd);
                Ok(vec![])
            }
            Prepared::Plain(message) => match message {
                Message::SetFeatures(features) => {
                    (verdict, settles) = (Verdict::Pass, Settles::Must);
                    let area = session.inflight().is_some();
                    let effects = session.set_features(features);
                    if area && session.inflight().is_none() {
                        warn!(
                            "controller {}: the in-flight area is of rings of another layout and \
                             not used any more",
                            connected.controller_name
                        );
                    }
                    effects
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
                    let write_cache = session.write_cache();
                    let config = match controller {
                        Some(controller) => controller.config_space(write_cache),
                        None => config::config_space(None, write_cache),
                    };
                    verdict = Verdict::Reply(config_reply(&config, head));
                    Ok(vec![])
                }
                Message::SetConfig { offset, contents } => {
                    settles = Settles::Must;
                    let written = config::written_write_cache(offset, &contents);
                    if let (Some(false), Some(controller)) = (written, controller) {
                        controller.write_through = true;
                    }
                    Ok(written.map_or_else(Vec::new, |on| session.set_write_cache(on)))
                }
                Message::GetMaxMemSlots => {
                    verdict = Verdict::Reply((SLOTS_MAX as u64).to_le_bytes().into());
                    Ok(vec![])
                }
                Message::ResetOwner | Message::ResetDevice => {
                    let mut effects = match message {
                        Message::ResetOwner => session.reset_owner(),
                        _ => session.reset_device(),
                    };
                    if need_reply {
                        verdict = Verdict::Deferred;
                        effects.extend(session.await_reset(earlier_io));
                    }
                    Ok(effects)
                }
                Message::Negotiation => {
                    verdict = Verdict::Pass;
                    Ok(vec![])
                }
                // `prepare` has made something else of the others.
                _ => Ok(vec![]),
            },
        };
        let effects = effects.map_err(|e| e.to_string())?;
        if !effects.iter().any(|effect| matches!(effect, Effect::Publish(_))) {
            settles = Settles::No;
        }
        let starts = self.apply(&mut inner, conn, effects, Some(&mut reply));
        if let Some(connected) = inner.connections.get_mut(&conn) {
            connected.announce_config();
        }
        if matches!(verdict, Verdict::Deferred) && reply.is_none() {
            let connected = inner.connections.get_mut(&conn).ok_or("unknown connection")?;
            connected.owed = Some(Owed { request, waited_s: 0, warned: false });
        }
        drop(inner);
        self.start_rings(conn, &starts);
        if settles != Settles::No && !self.settle() && settles == Settles::Must {
            return Err("timed out waiting for the reactors to apply a change".into());
        }
        Ok(reply.map_or(verdict, Verdict::Reply))
    }

    /// Waits until every reactor goes by the views that have been published: what the front end will
    /// take for done then is. A migration must miss no write, a guest that wants its writes durable
    /// relies on it from the answer on, and a request may use new memory, or none that is gone.
    /// `false` if a reactor takes too long.
    pub(super) fn settle(&self) -> bool {
        // Whoever steps reactors would wait for itself.
        let limit = if self.stepped { Duration::ZERO } else { SETTLE.0 };
        let (epoch, mut waited) = (self.domain.advance(), Duration::ZERO);
        while !self.domain.passed(epoch) {
            if waited >= limit {
                return false;
            }
            waited += lived::sleep(SETTLE.1);
        }
        true
    }

    fn is_started(&self, conn: ConnId, ring: usize) -> bool {
        let inner = self.lock();
        inner.connections.get(&conn).is_some_and(|c| !c.session.is_stopped(ring))
    }

    /// Turns what a front end hands over into what it has to be.
    fn prepare(&self, conn: ConnId, message: Message) -> Result<Prepared, String> {
        let prepared = match message {
            Message::SetMemTable(table) => {
                let (before, unmapper) = self.mapped(conn)?;
                GuestMemory::map(table, before.as_deref(), &unmapper)
                    .map(|memory| Prepared::Memory(Arc::new(memory)))
                    .map_err(|e| e.to_string())
            }
            Message::AddMemReg(spec, fd) => {
                self.check_slots(conn)?;
                let (before, unmapper) = self.mapped(conn)?;
                GuestMemory::with_region(before.as_deref(), spec, &fd, &unmapper)
                    .map(|memory| Prepared::Memory(Arc::new(memory)))
                    .map_err(|e| e.to_string())
            }
            Message::RemMemReg(spec) => {
                let (before, _) = self.mapped(conn)?;
                before
                    .ok_or("no memory to remove a region from")?
                    .without_region(spec)
                    .map(|memory| Prepared::Memory(Arc::new(memory)))
                    .map_err(|e| e.to_string())
            }
            Message::SetLogBase { size, offset, fd } => {
                if size > LOG_BYTES_MAX {
                    return Err(format!("a dirty log of {size} bytes, at most {LOG_BYTES_MAX}"));
                }
                // QEMU waits for an answer, whatever is in it; rust-vmm's front end for this one.
                let answer = [size, offset].map(u64::to_le_bytes).concat();
                DirtyLog::map(&fd, offset, size, &self.mapped(conn)?.1)
                    .map(|log| Prepared::Log(Arc::new(log), answer))
                    .map_err(|e| e.to_string())
            }
            Message::GetInflightFd(spec) => {
                Area::create(spec.num_queues, spec.queue_size, self.may_be_packed(conn)?)
                    .map(|(spec, fd)| Prepared::NewArea(spec, fd))
                    .map_err(|e| e.to_string())
            }
            Message::SetInflightFd(spec, fd) => Area::map(spec, &fd, &self.mapped(conn)?.1)
                .map(|area| Prepared::Area(Arc::new(area)))
                .map_err(|e| e.to_string()),
            Message::SetVringCall { ring, fd } => {
                let call = fd.map(CallFd::from_front_end).transpose();
                if let Ok(Some(call)) = &call
                    && self.is_started(conn, ring)
                {
                    call.arm();
                }
                call.map(|call| Prepared::Call(ring, call)).map_err(|e| e.to_string())
            }
            Message::SetVringKick { ring, fd } => fd
                .map(KickFd::from_front_end)
                .transpose()
                .map(|kick| Prepared::Kick(ring, kick))
                .map_err(|e| e.to_string()),
            Message::SetBackendReqFd(fd) => BackendChannel::from_front_end(fd)
                .map(Prepared::BackendChannel)
                .map_err(|e| e.to_string()),
            message => Ok(Prepared::Plain(message)),
        }?;
        Ok(prepared)
    }

    /// The memory that a front end has given, and what counts its mappings.
    fn mapped(&self, conn: ConnId) -> Result<(Option<Arc<GuestMemory>>, Unmapper), String> {
        let inner = self.lock();
        let connected = inner.connections.get(&conn).ok_or("unknown connection")?;
        Ok((connected.session.memory().cloned(), connected.unmapper.clone()))
    }

    fn may_be_packed(&self, conn: ConnId) -> Result<bool, String> {
        let inner = self.lock();
        let connected = inner.connections.get(&conn).ok_or("unknown connection")?;
        Ok(connected.session.may_be_packed())
    }

    /// Whether one more memory region leaves room for other controllers.
    fn check_slots(&self, conn: ConnId) -> Result<(), String> {
        let inner = self.lock();
        let of = inner.connections.get(&conn).ok_or("unknown connection")?.controller;
        let mine = inner.connections.values().filter(|c| c.controller == of);
        let slots: usize = mine.filter_map(|c| Some(c.session.memory()?.regions())).sum();
        if slots < SLOTS_OF_CONTROLLER_MAX {
            Ok(())
        } else {
            Err(format!("{slots} memory regions in all connections of the controller"))
        }
    }

    fn check_turn(&self, conn: ConnId) -> Result<(), String> {
        let inner = self.lock();
        let connected = inner.connections.get(&conn).filter(|c| c.conn.is_some());
        connected.ok_or("unknown connection")?.session.check_turn().map_err(|e| e.to_string())
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
        connected.left_io = connected.session.undrained();
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

    /// Counts a second of running time. Warns of drains that take long, and ends connections whose
    /// drain takes too long. For the control thread.
    ///
    /// Must not be called for time in which the process was stopped or its control group frozen:
    /// the reactors did not run then.
    pub fn tick(&self) {
        // Completed drains must not be reported as late below.
        self.process_events();
        let limit_s = self.drain_limit_s.load(Ordering::Relaxed);
        let mut inner = self.lock();
        self.release_strays(&mut inner);
        for connected in inner.connections.values_mut() {
            connected.announce_config();
            let Some(Owed { waited_s, warned, .. }) = &mut connected.owed else { continue };
            // The first second was not a whole one.
            let whole_s = *waited_s;
            *waited_s += 1;
            if whole_s >= limit_s {
                warn!(
                    "controller {}: I/O still in flight after {limit_s} s, ending the connection",
                    connected.controller_name,
                );
                if let Some(conn) = &connected.conn {
                    conn.shut_down();
                }
                connected.owed = None;
            } else if whole_s >= DRAIN_WARN_S && !*warned {
                *warned = true;
                warn!(
                    "controller {}: the front end has been waiting {whole_s} s for its I/O to complete",
                    connected.controller_name,
                );
            }
        }
    }

    fn drained(&self, queue: QueueId) {
        let mut inner = self.lock();
        let Some((conn, ring)) = inner.queues.remove(&queue) else { return };
        let Some(connected) = inner.connections.get_mut(&conn) else { return };
        let Some(attached) = connected.queues[ring].take() else { return };
        // If it is on its way to this reactor, the move comes to nothing.
        let Attached { queue, reactor, .. } = attached;
        let effects = connected.session.drained(ring, queue.last_avail());
        inner.attached[reactor].retain(|other| other.id != queue.id);
        self.publish_set(&inner, reactor);
        self.reclaim.free(queue);
        let starts = self.apply(&mut inner, conn, effects, None);
        if let Some(connected) = inner.connections.get_mut(&conn) {
            connected.announce_config();
        }
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
}

/// Fails if the controller's connections have as many started rings as they may have.
fn check_rings(inner: &Inner, conn: ConnId, ring: usize) -> Result<(), String> {
    let connected = inner.connections.get(&conn).ok_or("unknown connection")?;
    if !connected.session.is_stopped(ring) {
        return Ok(());
    }
    let mine = inner.connections.values().filter(|c| c.controller == connected.controller);
    let started: usize = mine.map(|c| c.session.started()).sum();
    if started < RINGS_OF_CONTROLLER_MAX {
        Ok(())
    } else {
        Err(format!("too many started rings in all connections of the controller: {started}"))
    }
}

/// A message with what it carries checked, mapped, and made ours.
enum Prepared {
    Memory(Arc<GuestMemory>),
    Call(usize, Option<CallFd>),
    Kick(usize, Option<KickFd>),
    BackendChannel(BackendChannel),
    /// And the answer.
    Log(Arc<DirtyLog>, Vec<u8>),
    Area(Arc<Area>),
    NewArea(AreaSpec, OwnedFd),
    Plain(Message),
}

impl Prepared {
    fn is_reset(&self) -> bool {
        matches!(self, Self::Plain(Message::ResetOwner | Message::ResetDevice))
    }
}

/// The payload of the answer to GET_CONFIG: the header as the front end sent it, then the contents,
/// with zeroes beyond the config space. QEMU refuses an answer of another size than it requested.
fn config_reply(config: &[u8], head: ConfigHead) -> Vec<u8> {
    let mut payload = head.bytes().to_vec();
    let contents = config.iter().skip(head.offset()).copied().chain(std::iter::repeat(0));
    payload.extend(contents.take(head.len()));
    payload
}

/// Something to be dropped on the reclaim thread.
struct Drop1(ChannelBox);

impl Garbage for Drop1 {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        drop(self.0);
        None
    }
}
