//! The state machine of one connection: it takes events and returns effects.
//!
//! It uses no thread, no reactor and no transport, so tests, fuzzers and simulations drive it
//! directly. In vhost-user, each ring starts and stops separately ("Ring states" in the
//! specification), so the state is kept per ring. The state of a session that the operator sees
//! ([`Phase`]) follows from its rings.
//!
//! ```text
//!          SET_VRING_KICK         gate open           device open
//! Stopped ───────────────▶ Gated ───────────▶ Opening ───────────▶ Live ⟲ memory, call fd, log: publish
//!    ▲                       │                   │                  │ GET_VRING_BASE, a reset, close
//!    └───────────────────────┴───────────────────┴───◀── drained ── Draining
//! ```
//!
//! A ring is gated while I/O in flight of a closed connection conflicts with it. The target decides
//! which connections conflict (`control::gate`). Then its device is opened, which may take long. If
//! GET_VRING_BASE stops a ring that is gated or whose device is being opened, the reply is delayed
//! until the ring has been attached to a reactor, which reads the ring's position and stops at
//! once.
//!
//! I/O of a closed connection, and I/O of a ring that was reset, does not mark pages in a dirty log
//! that was set later. When this I/O has ended, all memory is marked. (A migration that begins only
//! then copies all memory anyway.)

mod rings;
mod state;

use std::sync::Arc;

use guest_memory::{DirtyLog, GuestMemory};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtqueue::inflight::Area;
use virtqueue::{Layout, RING_SIZE_MAX, RingAddrs, RingError};

use crate::device::Negotiated;
use crate::device_queue::DeviceView;
use crate::notify::{BackendChannel, CallFd, KickFd};

pub use state::{Effect, Phase, Ring, RingState, Then, Violation};

/// vhost: writes to guest memory are logged, for a migration.
pub const VHOST_F_LOG_ALL: u32 = 26;
/// vhost-user: protocol features can be negotiated.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// Seconds that a front end waits for the reply to GET_VRING_BASE before its connection is closed.
/// The front end loses no data then, as it would with a wrong reply.
pub const DRAIN_LIMIT_S: u64 = 30;

/// The state of a connection.
#[derive(Debug)]
pub struct Session {
    offered: u64,
    features: u64,
    memory: Option<Arc<GuestMemory>>,
    rings: Vec<Ring>,
    backend_channel: Option<BackendChannel>,
    /// The front end does not know the disk's new size yet.
    config_change_pending: bool,
    inflight: Option<Arc<Area>>,
    log: Option<Arc<DirtyLog>>,
    /// What the front end has negotiated with the device.
    device: Box<dyn Negotiated>,
    /// The number of virtqueues of the device.
    queues: u16,
    /// The front end waits for the completion of a reset.
    reset_pending: bool,
    /// It also waits for I/O of closed connections.
    earlier_io: bool,
    closed: bool,
}

impl Session {
    /// Creates the state of a new connection to a device with `queues` virtqueues that offers the
    /// features in `offered`.
    #[must_use]
    pub fn new(offered: u64, queues: u16, device: Box<dyn Negotiated>) -> Self {
        Self {
            offered,
            features: 0,
            memory: None,
            rings: Vec::new(),
            backend_channel: None,
            config_change_pending: false,
            inflight: None,
            log: None,
            device,
            queues,
            reset_pending: false,
            earlier_io: false,
            closed: false,
        }
    }

    /// Returns the phase of the session.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let any = |state: fn(&RingState) -> bool| self.rings.iter().any(|r| state(&r.state));
        if self.closed {
            Phase::Closed
        } else if self.reset_pending
            || any(|s| {
                use RingState::{Draining, GatedReply, OpeningReply};
                let pending = matches!(s, Draining { then: Then::Reply | Then::RestartReply });
                pending || matches!(s, GatedReply | OpeningReply)
            })
        {
            Phase::Quiescing
        } else if any(|s| *s == RingState::Live) {
            Phase::Running
        } else if any(|s| matches!(s, RingState::Gated | RingState::Opening)) {
            Phase::Starting
        } else if self.rings.iter().any(|ring| ring.was_started) {
            Phase::Suspended
        } else {
            Phase::Negotiating
        }
    }

    /// Returns the rings that the front end has set up at least in part.
    #[must_use]
    pub fn rings(&self) -> &[Ring] {
        &self.rings
    }

    /// Returns a ring. It must be one that an effect has named.
    #[must_use]
    pub fn ring(&self, ring: usize) -> &Ring {
        &self.rings[ring]
    }

    /// Returns the guest's memory, if the front end has set it up.
    #[must_use]
    pub fn memory(&self) -> Option<&Arc<GuestMemory>> {
        self.memory.as_ref()
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Returns what was negotiated about rings.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout {
            packed: self.negotiated(VIRTIO_F_RING_PACKED),
            event_idx: self.negotiated(VIRTIO_RING_F_EVENT_IDX),
        }
    }

    /// Returns whether rings are packed, or may become packed because no features were negotiated
    /// yet.
    #[must_use]
    pub fn may_be_packed(&self) -> bool {
        let features = if self.features == 0 { self.offered } else { self.features };
        features & (1 << VIRTIO_F_RING_PACKED) != 0
    }

    /// Returns the in-flight area, if the front end has set one.
    #[must_use]
    pub fn inflight(&self) -> Option<&Arc<Area>> {
        self.inflight.as_ref()
    }

    /// Returns the dirty log, if logging is switched on.
    #[must_use]
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.negotiated(VHOST_F_LOG_ALL))
    }

    /// Returns the device's configuration space.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        self.device.read_config()
    }

    /// Returns what queues need to know of the device; see [`Negotiated::view`].
    #[must_use]
    pub fn device_view(&self) -> Option<DeviceView> {
        self.device.view()
    }

    /// Returns what identifies the front end to the device; see [`Negotiated::key`].
    #[must_use]
    pub fn device_key(&self) -> u64 {
        self.device.key()
    }

    /// Returns the features that the front end has accepted.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Records that the config space has changed. A notification of the front end is pending until
    /// [`Session::config_announced`].
    pub fn config_changed(&mut self) {
        self.config_change_pending = true;
    }

    /// Returns the channel on which to notify the front end of a config change now, if one is
    /// pending. A front end may ignore the message while no ring is started, or while it stops one
    /// (QEMU does).
    #[must_use]
    pub fn config_to_announce(&self) -> Option<&BackendChannel> {
        let is_read =
            self.config_change_pending && matches!(self.phase(), Phase::Starting | Phase::Running);
        self.backend_channel.as_ref().filter(|_| is_read)
    }

    /// Records that the front end was notified.
    pub fn config_announced(&mut self) {
        self.config_change_pending = false;
    }

    /// Sets the channel for messages that the target starts.
    pub fn set_backend_channel(&mut self, channel: BackendChannel) {
        self.backend_channel = Some(channel);
    }

    /// Returns the number of rings that were started and have not stopped.
    #[must_use]
    pub fn started(&self) -> usize {
        self.rings.iter().filter(|ring| ring.state != RingState::Stopped).count()
    }

    /// Returns whether starting the ring would increase [`Session::started`].
    #[must_use]
    pub fn is_stopped(&self, ring: usize) -> bool {
        self.rings.get(ring).is_none_or(|ring| ring.state == RingState::Stopped)
    }

    /// Returns whether a reactor owns one of the rings.
    #[must_use]
    pub fn undrained(&self) -> bool {
        self.rings.iter().any(|r| matches!(r.state, RingState::Live | RingState::Draining { .. }))
    }

    /// Checks that no reply is pending. To be called before any other method that handles a
    /// message.
    ///
    /// # Errors
    /// The front end has sent a message while a reply is pending.
    pub fn check_no_pending_reply(&self) -> Result<(), Violation> {
        if self.phase() == Phase::Quiescing { Err(Violation::ReplyPending) } else { Ok(()) }
    }

    fn ring_mut(&mut self, ring: usize) -> Result<&mut Ring, Violation> {
        if ring >= usize::from(self.queues) {
            return Err(Violation::NoSuchRing(ring));
        }
        if ring >= self.rings.len() {
            self.rings.resize_with(ring + 1, Ring::default);
        }
        Ok(&mut self.rings[ring])
    }

    fn stopped_ring_mut(&mut self, ring: usize) -> Result<&mut Ring, Violation> {
        let state = self.ring_mut(ring)?;
        if state.running() { Err(Violation::RingRunning(ring)) } else { Ok(state) }
    }

    /// SET_FEATURES. While a ring is started, only logging can be switched.
    ///
    /// # Errors
    /// Features were not offered, or other features change while a ring is started.
    pub fn set_features(&mut self, features: u64) -> Result<Vec<Effect>, Violation> {
        if features & !self.offered != 0 {
            return Err(Violation::FeaturesNotOffered(features & !self.offered));
        }
        let changed = features ^ self.features;
        let by_driver = changed & !(1 << VHOST_F_LOG_ALL) != 0;
        if by_driver && self.rings.iter().any(Ring::running) {
            return Err(Violation::FeaturesRunning(self.features, features));
        }
        if changed & (1 << VIRTIO_F_RING_PACKED) != 0 {
            // What rings of the other layout have recorded there is invalid for these rings.
            self.inflight.take_if(|area| area.was_used());
        }
        self.features = features;
        if by_driver {
            self.device.set_features(features);
        }
        Ok(self.publish_where(|_| changed != 0))
    }

    /// SET_LOG_BASE. Has an effect while LOG_ALL is negotiated.
    pub fn set_log(&mut self, log: Arc<DirtyLog>) -> Vec<Effect> {
        self.log = Some(log);
        let on = self.negotiated(VHOST_F_LOG_ALL);
        self.publish_where(|_| on)
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// A ring is started.
    pub fn set_inflight(&mut self, area: Arc<Area>) -> Result<(), Violation> {
        if self.rings.iter().any(Ring::running) {
            return Err(Violation::AreaRunning);
        }
        self.inflight = Some(area);
        Ok(())
    }

    /// SET_CONFIG.
    pub fn write_config(&mut self, offset: u32, contents: &[u8]) -> Vec<Effect> {
        let changed = self.device.write_config(offset, contents);
        self.publish_where(|_| changed)
    }

    /// SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG. Stops nothing: live rings get a view of the new
    /// memory. Returns the previous memory, which may be the last reference to it.
    ///
    /// # Errors
    /// A started ring is not in the new memory.
    pub fn set_memory(
        &mut self,
        memory: Arc<GuestMemory>,
    ) -> Result<(Option<Arc<GuestMemory>>, Vec<Effect>), Violation> {
        for ring in self.rings.iter().filter(|ring| ring.has_parameters_in_use()) {
            if let Some(addrs) = ring.addrs {
                virtqueue::check(&memory, ring.num, addrs, self.layout())?;
            }
        }
        let before = self.memory.replace(memory);
        Ok((before, self.publish_where(|_| true)))
    }

    /// SET_VRING_NUM. The start checks whether the size is valid for the ring's layout.
    ///
    /// # Errors
    /// The ring is started, or the size is invalid for every layout.
    pub fn set_num(&mut self, ring: usize, num: u32) -> Result<(), Violation> {
        let state = self.stopped_ring_mut(ring)?;
        let size = u16::try_from(num).ok().filter(|n| (1..=RING_SIZE_MAX).contains(n));
        state.num = size.ok_or(RingError::Size(num))?;
        Ok(())
    }

    /// SET_VRING_BASE. A packed ring has two positions, and that of the used ring is in the upper
    /// half. Both are equal for a ring that was stopped, because it has nothing in flight. (If
    /// rte_vhost served the ring before, the upper half is zero.)
    ///
    /// # Errors
    /// The ring is started.
    pub fn set_base(&mut self, ring: usize, base: u32) -> Result<(), Violation> {
        self.stopped_ring_mut(ring)?.base = (base & 0xffff) as u16;
        Ok(())
    }

    /// SET_VRING_ADDR, in the front end's address space. For a started ring, only the same
    /// addresses are accepted (QEMU sends them again to switch logging).
    ///
    /// # Errors
    /// The ring is started, and the addresses differ.
    pub fn set_addrs(&mut self, ring: usize, addrs: RingAddrs) -> Result<(), Violation> {
        let state = self.ring_mut(ring)?;
        if state.running() && state.user != Some(addrs) {
            return Err(Violation::RingRunning(ring));
        }
        state.user = Some(addrs);
        Ok(())
    }

    /// SET_VRING_CALL.
    ///
    /// # Errors
    /// The device has no such ring.
    pub fn set_call(
        &mut self,
        ring: usize,
        call: Option<CallFd>,
    ) -> Result<Vec<Effect>, Violation> {
        self.ring_mut(ring)?.call = call.map(Arc::new);
        Ok(self.publish_where(|n| n == ring))
    }

    /// SET_VRING_KICK: starts the ring.
    ///
    /// # Errors
    /// The ring is not set up, or its size or addresses are invalid.
    pub fn set_kick(
        &mut self,
        ring: usize,
        kick: Option<KickFd>,
    ) -> Result<Vec<Effect>, Violation> {
        let memory = self.memory.clone();
        let layout = self.layout();
        let state = self.ring_mut(ring)?;
        state.kick = kick.map(Arc::new);
        if state.running() {
            return Ok(self.publish_where(|n| n == ring));
        }
        let (Some(memory), Some(user)) = (memory, state.user) else {
            return Err(Violation::NotSetUp(ring));
        };
        let gpa = |user| memory.gpa_of_user(user).ok_or(RingError::Address(user));
        let addrs =
            RingAddrs { desc: gpa(user.desc)?, avail: gpa(user.avail)?, used: gpa(user.used)? };
        virtqueue::check(&memory, state.num, addrs, layout)?;
        state.addrs = Some(addrs);
        state.was_started = true;
        if matches!(state.state, RingState::Draining { .. }) {
            state.state = RingState::Draining { then: Then::Restart };
            return Ok(vec![]);
        }
        state.packed = layout.packed;
        state.state = RingState::Gated;
        Ok(vec![Effect::Gate(ring)])
    }
}
