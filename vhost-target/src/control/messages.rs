//! Handles the messages of front ends: checks them, maps memory, passes them to the session, and
//! replies.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use closer::ForeignFd;
use guest_memory::{DirtyLog, FileError, GuestMemory, SLOTS_MAX, Unmapper};
use reactor::active_time;
use tracing::warn;
use virtqueue::inflight::{Area, AreaSpec};
use virtqueue::{QUEUES_MAX, RingAddrs};

use super::{Connected, Inner, PendingReply, Target};
use crate::notify::{BackendChannel, CallFd, KickFd};
use crate::protocol::{self, ConfigHead, Message, ParseError};
use crate::session::{Effect, Violation};
use crate::transport::{ConnId, Verdict};

/// Memory regions that all connections of one controller may have together, where they are added
/// one by one: those of a VM and of its successor in a migration.
const SLOTS_OF_CONTROLLER_MAX: usize = 2 * SLOTS_MAX;

/// Rings that all connections of one controller may have started together: those of a VM and of its
/// successor in a migration. Each needs half a MiB and some fds.
const RINGS_OF_CONTROLLER_MAX: usize = 2 * QUEUES_MAX as usize;

/// Size limit of a dirty log in bytes: enough for 32 TiB of guest-physical addresses, including
/// holes.
const LOG_BYTES_MAX: u64 = 1 << 30;

/// The time limit for the reactors to apply a change that a front end relies on, and the interval
/// of the checks. Reactors never wait, so this takes some microseconds unless the system gives them
/// no CPU time. All other front ends wait meanwhile.
const SETTLE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_micros(20));

/// The reason why a message is refused. The connection is then closed.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error(transparent)]
    Memory(#[from] guest_memory::Error),
    #[error("dirty log: {0}")]
    Log(#[from] FileError),
    #[error(transparent)]
    Area(#[from] virtqueue::inflight::Error),
    #[error(transparent)]
    Fd(#[from] closer::Error),
    /// the connection is closed, or the transport has no such connection
    #[error("the connection is closed or unknown")]
    UnknownConnection,
    /// REM_MEM_REG before any memory was added
    #[error("REM_MEM_REG without any memory region")]
    NoMemory,
    #[error("the dirty log is too large: {0} bytes, the limit is {LOG_BYTES_MAX}")]
    LogSize(u64),
    #[error(
        "too many memory regions of the controller: {0}, the limit is {SLOTS_OF_CONTROLLER_MAX}"
    )]
    Slots(usize),
    #[error(
        "too many started rings of the controller: {0}, the limit is {RINGS_OF_CONTROLLER_MAX}"
    )]
    Rings(usize),
    #[error("timed out waiting for the reactors to apply the message")]
    NotSettled,
}

/// Whether the reply to a message has to wait until every reactor has applied the change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settles {
    No,
    /// Without waiting, guests get errors for requests that they submit right after the reply.
    Should,
    /// Without waiting, data is lost.
    Must,
}

/// The result of a message.
struct Handled {
    effects: Vec<Effect>,
    verdict: Verdict,
    settles: Settles,
}

impl Handled {
    fn done(effects: Vec<Effect>) -> Self {
        Self { effects, verdict: Verdict::Done, settles: Settles::No }
    }

    fn nothing() -> Self {
        Self::done(vec![])
    }

    fn replying(self, verdict: Verdict) -> Self {
        Self { verdict, ..self }
    }

    fn settling(self, settles: Settles) -> Self {
        Self { settles, ..self }
    }
}

impl Target {
    /// Handles a message. `need_reply`: the front end waits for an acknowledgement if there is no
    /// other reply. Called on the transport's thread, in the order of the connection's messages.
    pub fn message(
        &self,
        conn: ConnId,
        request: u32,
        need_reply: bool,
        payload: &[u8],
        fds: Vec<ForeignFd>,
    ) -> Verdict {
        let result = Message::parse(request, payload, fds)
            .map_err(Refusal::from)
            .and_then(|message| self.handle(conn, request, need_reply, message));
        match result {
            Ok(verdict) => verdict,
            Err(reason) => {
                let inner = self.lock();
                let name = inner.connections.get(&conn).map(|c| c.controller_name.as_str());
                warn!("controller {}: closing the connection: {reason}", name.unwrap_or("?"));
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
    ) -> Result<Verdict, Refusal> {
        // Work that makes system calls comes before the lock is taken.
        let message = self.prepare(conn, message)?;
        let mut inner = self.lock();
        let earlier_io = message.is_reset() && Self::has_earlier_io(&inner, conn);
        if let Prepared::Kick(ring, _) = &message {
            check_rings(&inner, conn, *ring)?;
        }
        let connected = inner.connections.get_mut(&conn).ok_or(Refusal::UnknownConnection)?;
        let handled = match message {
            Prepared::Plain(Message::ResetOwner) => {
                let effects = connected.session.reset_owner();
                connected.await_reset(effects, need_reply, earlier_io)
            }
            Prepared::Plain(Message::ResetDevice) => {
                let effects = connected.session.reset_device();
                connected.await_reset(effects, need_reply, earlier_io)
            }
            Prepared::Plain(message) => connected.handle(message)?,
            prepared => connected.adopt(prepared)?,
        };
        let Handled { effects, verdict, settles } = handled;
        let changes = effects.iter().any(|effect| matches!(effect, Effect::Publish(_)));
        let mut reply = None;
        let starts = self.apply(&mut inner, conn, effects, Some(&mut reply));
        let connected = inner.connections.get_mut(&conn).ok_or(Refusal::UnknownConnection)?;
        connected.announce_config();
        if matches!(verdict, Verdict::Deferred) && reply.is_none() {
            connected.pending_reply = Some(PendingReply { request, waited_s: 0, warned: false });
        }
        drop(inner);
        self.open(starts);
        if changes && settles != Settles::No && !self.settle() && settles == Settles::Must {
            return Err(Refusal::NotSettled);
        }
        Ok(reply.map_or(verdict, Verdict::Reply))
    }

    /// Waits until every reactor uses the views that have been published, because the front end
    /// relies on the change from the reply on. A migration must miss no write, a guest must be able
    /// to rely on durable writes, and a request may use new memory, or must not use removed memory.
    /// Returns false if a reactor takes too long.
    pub(super) fn settle(&self) -> bool {
        // Waiting would be a deadlock: the same thread steps the reactors.
        let limit = if self.stepped { Duration::ZERO } else { SETTLE.0 };
        let (epoch, mut waited) = (self.domain.advance(), Duration::ZERO);
        while !self.domain.passed(epoch) {
            if waited >= limit {
                return false;
            }
            waited += active_time::sleep(SETTLE.1);
        }
        true
    }

    /// Converts what a front end sent into what the session needs. Maps memory without holding the
    /// lock.
    fn prepare(&self, conn: ConnId, message: Message) -> Result<Prepared, Refusal> {
        let Facts { memory: before, unmapper, may_be_packed, slots } = self.facts(conn)?;
        Ok(match message {
            Message::SetMemTable(table) => {
                let memory = GuestMemory::map(table, before.as_deref(), &unmapper)?;
                Prepared::Memory(Arc::new(memory))
            }
            Message::AddMemReg(..) if slots >= SLOTS_OF_CONTROLLER_MAX => {
                return Err(Refusal::Slots(slots));
            }
            Message::AddMemReg(spec, fd) => {
                let memory = GuestMemory::with_region(before.as_deref(), spec, &fd, &unmapper)?;
                Prepared::Memory(Arc::new(memory))
            }
            Message::RemMemReg(spec) => {
                let memory = before.ok_or(Refusal::NoMemory)?.without_region(spec)?;
                Prepared::Memory(Arc::new(memory))
            }
            Message::SetLogBase { size, .. } if size > LOG_BYTES_MAX => {
                return Err(Refusal::LogSize(size));
            }
            Message::SetLogBase { size, offset, fd } => {
                // QEMU waits for a reply and ignores its payload. rust-vmm's front end checks for
                // this payload.
                let answer = [size, offset].map(u64::to_le_bytes).concat();
                Prepared::Log(Arc::new(DirtyLog::map(&fd, offset, size, &unmapper)?), answer)
            }
            Message::GetInflightFd(AreaSpec { num_queues, queue_size, .. }) => {
                let (spec, fd) = Area::create(num_queues, queue_size, may_be_packed)?;
                Prepared::NewArea(spec, fd)
            }
            Message::SetInflightFd(spec, fd) => {
                Prepared::Area(Arc::new(Area::map(spec, &fd, &unmapper)?))
            }
            Message::SetVringCall { ring, fd } => {
                let call = fd.map(CallFd::from_front_end).transpose()?;
                if let Some(call) = &call
                    && self.is_started(conn, ring)
                {
                    call.arm();
                }
                Prepared::Call(ring, call)
            }
            Message::SetVringKick { ring, fd } => {
                Prepared::Kick(ring, fd.map(KickFd::from_front_end).transpose()?)
            }
            Message::SetBackendReqFd(fd) => {
                Prepared::BackendChannel(BackendChannel::from_front_end(fd)?)
            }
            message => Prepared::Plain(message),
        })
    }

    /// Returns what the preparation of a message needs to know of a connection, taken under the
    /// lock at once.
    ///
    /// # Errors
    /// The connection is closed, or its front end has sent a message before a pending reply.
    fn facts(&self, conn: ConnId) -> Result<Facts, Refusal> {
        let inner = self.lock();
        let connected = inner.connections.get(&conn).filter(|c| c.conn.is_some());
        let connected = connected.ok_or(Refusal::UnknownConnection)?;
        connected.session.check_no_pending_reply()?;
        let of_controller =
            inner.connections.values().filter(|c| c.controller == connected.controller);
        Ok(Facts {
            memory: connected.session.memory().cloned(),
            unmapper: connected.unmapper.clone(),
            may_be_packed: connected.session.may_be_packed(),
            slots: of_controller.filter_map(|c| Some(c.session.memory()?.regions())).sum(),
        })
    }

    fn is_started(&self, conn: ConnId, ring: usize) -> bool {
        let inner = self.lock();
        inner.connections.get(&conn).is_some_and(|c| !c.session.is_stopped(ring))
    }
}

/// See [`Target::facts`].
struct Facts {
    /// The memory that the front end has set up.
    memory: Option<Arc<GuestMemory>>,
    /// Counts its mappings.
    unmapper: Unmapper,
    may_be_packed: bool,
    /// Memory regions in all connections of the controller.
    slots: usize,
}

/// Fails if the controller's connections have started as many rings as the limit allows.
fn check_rings(inner: &Inner, conn: ConnId, ring: usize) -> Result<(), Refusal> {
    let connected = inner.connections.get(&conn).ok_or(Refusal::UnknownConnection)?;
    if !connected.session.is_stopped(ring) {
        return Ok(());
    }
    let of_controller = inner.connections.values().filter(|c| c.controller == connected.controller);
    let started: usize = of_controller.map(|c| c.session.started()).sum();
    if started < RINGS_OF_CONTROLLER_MAX { Ok(()) } else { Err(Refusal::Rings(started)) }
}

/// A message whose fds and files were checked, mapped, and taken over.
enum Prepared {
    Memory(Arc<GuestMemory>),
    Call(usize, Option<CallFd>),
    Kick(usize, Option<KickFd>),
    BackendChannel(BackendChannel),
    /// With the payload of the reply.
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

impl Connected {
    /// Handles a message with fds or files.
    fn adopt(&mut self, prepared: Prepared) -> Result<Handled, Violation> {
        let session = &mut self.session;
        Ok(match prepared {
            Prepared::Memory(memory) => {
                let (_, effects) = session.set_memory(memory)?;
                Handled::done(effects).settling(Settles::Should)
            }
            Prepared::Call(ring, call) => Handled::done(session.set_call(ring, call)?),
            Prepared::Kick(ring, kick) => Handled::done(session.set_kick(ring, kick)?),
            Prepared::BackendChannel(channel) => {
                session.set_backend_channel(channel);
                Handled::nothing()
            }
            Prepared::Log(log, answer) => Handled::done(session.set_log(log))
                .replying(Verdict::Reply(answer))
                .settling(Settles::Must),
            Prepared::Area(area) => {
                session.set_inflight(area)?;
                Handled::nothing()
            }
            Prepared::NewArea(spec, fd) => Handled::nothing()
                .replying(Verdict::ReplyWithFd(protocol::inflight(spec).into(), fd)),
            Prepared::Plain(message) => self.handle(message)?,
        })
    }

    /// Handles a message without fds, except for resets.
    fn handle(&mut self, message: Message) -> Result<Handled, Violation> {
        let session = &mut self.session;
        Ok(match message {
            Message::SetFeatures(features) => self.set_features(features)?,
            Message::SetVringNum { ring, num } => {
                session.set_num(ring, num)?;
                Handled::nothing()
            }
            Message::SetVringBase { ring, base } => {
                session.set_base(ring, base)?;
                Handled::nothing()
            }
            Message::SetVringAddr { ring, desc, avail, used } => {
                session.set_addrs(ring, RingAddrs { desc, avail, used })?;
                Handled::nothing()
            }
            Message::GetVringBase { ring } => {
                Handled::done(session.get_base(ring)?).replying(Verdict::Deferred)
            }
            Message::GetConfig(head) => {
                Handled::nothing().replying(Verdict::Reply(config_reply(&session.config(), head)))
            }
            Message::SetConfig { offset, contents } => {
                Handled::done(session.write_config(offset, &contents)).settling(Settles::Must)
            }
            Message::GetMaxMemSlots => {
                let slots = (SLOTS_MAX as u64).to_le_bytes();
                Handled::nothing().replying(Verdict::Reply(slots.into()))
            }
            Message::Negotiation => Handled::nothing().replying(Verdict::Pass),
            // `prepare` has converted the others.
            _ => Handled::nothing(),
        })
    }

    fn set_features(&mut self, features: u64) -> Result<Handled, Violation> {
        let had_area = self.session.inflight().is_some();
        let effects = self.session.set_features(features)?;
        if had_area && self.session.inflight().is_none() {
            warn!(
                "controller {}: ignoring the in-flight area: it is of the other ring layout",
                self.controller_name
            );
        }
        Ok(Handled::done(effects).replying(Verdict::Pass).settling(Settles::Must))
    }

    /// Handles the reply to the reset that has caused `effects`. `earlier_io`: I/O of closed
    /// connections may still use the guest's memory.
    fn await_reset(
        &mut self,
        mut effects: Vec<Effect>,
        need_reply: bool,
        earlier_io: bool,
    ) -> Handled {
        if !need_reply {
            return Handled::done(effects);
        }
        effects.extend(self.session.await_reset(earlier_io));
        Handled::done(effects).replying(Verdict::Deferred)
    }
}

/// Returns the payload of the reply to GET_CONFIG: the header as the front end sent it, then the
/// contents, with zeroes beyond the config space. QEMU refuses a reply of another size than it
/// requested.
fn config_reply(config: &[u8], head: ConfigHead) -> Vec<u8> {
    let mut payload = head.bytes().to_vec();
    let contents = config.iter().skip(head.offset()).copied().chain(std::iter::repeat(0));
    payload.extend(contents.take(head.len()));
    payload
}
