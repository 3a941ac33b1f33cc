//! The front ends' side of the target: connections, their messages, and what reactors say of them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::{Attached, Connected, Inner, Target};
use crate::config;
use crate::controller::Controller;
use crate::foreign::ForeignFd;
use crate::memory::GuestMemory;
use crate::notify::{BackendChannel, CallFd, KickFd};
use crate::protocol::{ConfigHead, Message};
use crate::queue::QueueId;
use crate::queue::core::ChannelBox;
use crate::reactor::Event;
use crate::reclaim::Garbage;
use crate::ring::RingAddrs;
use crate::session::Session;
use crate::transport::{ConnId, SharedConnection, Verdict};

/// Connections of one controller, those that still drain included: a VM, its successor in a
/// migration, and a few that died with I/O in flight. rte_vhost has 1,024 for all controllers.
const CONNECTIONS_MAX: usize = 16;

/// When a drain that a front end waits for is worth a line in the log.
const DRAIN_WARN: Duration = Duration::from_secs(3);

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
        let (name, offered) = (controller.name.clone(), controller.features);
        let gate_open = mine().all(|c| c.conn.is_some());
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

    /// A message has arrived. Called on the transport's thread, in the connection's order.
    pub fn message(
        &self,
        conn: ConnId,
        request: u32,
        payload: &[u8],
        fds: Vec<ForeignFd>,
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
                    let config = controller_config.unwrap_or_else(|| config::config_space(None));
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
        let limit = Duration::from_secs(self.drain_limit_s.load(Ordering::Relaxed));
        let mut inner = self.lock();
        self.release_strays(&mut inner);
        for connected in inner.connections.values_mut() {
            let Some((since, warned)) = &mut connected.owed else { continue };
            let waited = now.saturating_duration_since(*since);
            if waited >= limit {
                warn!(
                    "controller {}: I/O still in flight after {} s, ending the connection",
                    connected.controller_name,
                    limit.as_secs()
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
        // If it is on its way to this reactor, the move comes to nothing.
        let Attached { queue, reactor, .. } = attached;
        let effects = connected.session.drained(ring, queue.last_avail());
        inner.attached[reactor].retain(|other| other.id != queue.id);
        self.publish_set(&inner, reactor);
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
    pub(super) fn reap(&self, inner: &mut Inner, conn: ConnId) -> Vec<(ConnId, Vec<usize>)> {
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
}

/// A message with what it carries checked, mapped, and made ours.
enum Prepared {
    Memory(Arc<GuestMemory>),
    Call(usize, Option<CallFd>),
    Kick(usize, Option<KickFd>),
    BackendChannel(BackendChannel),
    Plain(Message),
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
struct Drop1(ChannelBox);

impl Garbage for Drop1 {
    fn try_free(self: Box<Self>) -> Option<Box<dyn Garbage>> {
        drop(self.0);
        None
    }
}
