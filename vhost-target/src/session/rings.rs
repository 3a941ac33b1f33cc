//! How rings start, stop and drain.

use super::{Effect, Ring, RingState, Session, Then, Violation};

impl Session {
    /// GET_VRING_BASE: stops the ring. [`Effect::Reply`] is the reply, now or when the ring has
    /// drained.
    ///
    /// # Errors
    /// The device has no such ring.
    pub fn get_base(&mut self, ring: usize) -> Result<Vec<Effect>, Violation> {
        let negotiated = (self.features != 0).then(|| self.layout().packed);
        let state = self.ring_mut(ring)?;
        Ok(match state.state {
            RingState::Stopped => {
                // RESET_OWNER has cleared the features, but not the layout that the ring had.
                let packed = negotiated.unwrap_or(state.packed);
                vec![Effect::Reply(ring, answer(packed, state.base))]
            }
            RingState::Gated | RingState::GatedReply => {
                state.state = RingState::GatedReply;
                vec![]
            }
            RingState::Opening | RingState::OpeningReply => {
                state.state = RingState::OpeningReply;
                vec![]
            }
            RingState::Live => {
                state.state = RingState::Draining { then: Then::Reply };
                vec![Effect::Stop(ring)]
            }
            RingState::Draining { then } => {
                let restarts = matches!(then, Then::Restart | Then::RestartReply);
                let then = if restarts { Then::RestartReply } else { Then::Reply };
                state.state = RingState::Draining { then };
                vec![]
            }
        })
    }

    /// RESET_OWNER: stops all rings.
    pub fn reset_owner(&mut self) -> Vec<Effect> {
        let effects = self.stop_all();
        self.features = 0;
        self.device.set_features(0);
        (self.inflight, self.log) = (None, None);
        effects
    }

    /// RESET_DEVICE: as RESET_OWNER, but what was negotiated stays: features, memory, dirty log.
    /// The in-flight area does not stay: it records where rings continued that now start from the
    /// beginning.
    pub fn reset_device(&mut self) -> Vec<Effect> {
        self.stop_all();
        self.inflight = None;
        let mut effects = vec![];
        for (n, ring) in self.rings.iter().enumerate() {
            if matches!(ring.state, RingState::Draining { .. }) {
                effects.push(Effect::Reset(n));
            }
        }
        effects
    }

    /// Delays the reply to a reset until the reset is complete: until all I/O that uses the guest's
    /// memory has ended, including I/O of closed connections (`earlier_io`: there is some). The
    /// reply is [`Effect::Acknowledge`], now or later.
    pub fn await_reset(&mut self, earlier_io: bool) -> Vec<Effect> {
        self.reset_pending = true;
        self.earlier_io = earlier_io;
        self.acknowledge()
    }

    /// Returns whether I/O of a closed connection that may use the guest's memory affects the
    /// session. If so, [`Session::earlier_io_ended`] must be called when it has ended.
    #[must_use]
    pub fn is_affected_by_earlier_io(&self) -> bool {
        self.reset_pending || self.log().is_some()
    }

    /// Handles the end of all I/O of a closed connection that shared this guest's memory. `late`:
    /// some of it ended after the connection was closed. `more`: another closed connection still
    /// has such I/O.
    pub fn earlier_io_ended(&mut self, late: bool, more: bool) -> Vec<Effect> {
        let mut effects = if late { self.mark_all() } else { vec![] };
        self.earlier_io = more;
        effects.extend(self.acknowledge());
        effects
    }

    fn acknowledge(&mut self) -> Vec<Effect> {
        if !self.reset_pending || self.earlier_io || self.undrained() {
            return vec![];
        }
        self.reset_pending = false;
        vec![Effect::Acknowledge]
    }

    /// Handles the end of the connection.
    pub fn close(&mut self) -> Vec<Effect> {
        self.closed = true;
        self.reset_pending = false;
        self.backend_channel = None;
        let effects = self.stop_all();
        (self.inflight, self.log) = (None, None);
        effects
    }

    /// Handles a ring that was told to stop and has nothing in flight any more. Its position is
    /// `base`.
    pub fn drained(&mut self, ring: usize, base: u16) -> Vec<Effect> {
        // For rings that drain after a reset, memory is marked once, when the last of them has
        // drained. The front end has to wait for that one anyway before it copies all memory.
        let last = !self.rings.iter().enumerate().any(|(n, other)| n != ring && other.was_reset);
        let mark_all = if last { self.mark_all() } else { vec![] };
        let layout = self.layout();
        let state = &mut self.rings[ring];
        let RingState::Draining { then } = state.state else { return vec![] };
        state.state = RingState::Stopped;
        if matches!(then, Then::Restart | Then::RestartReply) {
            state.packed = layout.packed;
        }
        let mut effects = if state.was_reset { mark_all } else { vec![] };
        state.was_reset = false;
        match then {
            // The parameters that the front end has set since the reset stay.
            Then::Stop => effects.extend(self.acknowledge()),
            Then::Reply => {
                state.base = base;
                effects.push(Effect::Reply(ring, answer(state.packed, base)));
            }
            Then::Restart => {
                state.state = RingState::Gated;
                effects.push(Effect::Gate(ring));
            }
            Then::RestartReply => {
                state.state = RingState::GatedReply;
                effects.push(Effect::Gate(ring));
            }
        }
        effects
    }

    /// Returns whether the device is being opened for a ring.
    #[must_use]
    pub fn is_opening(&self, ring: usize) -> bool {
        let state = self.rings.get(ring).map(|ring| ring.state);
        matches!(state, Some(RingState::Opening | RingState::OpeningReply))
    }

    /// Handles the opening of a ring's device. Returns whether the ring waits for that.
    pub fn opened(&mut self, ring: usize) -> bool {
        let Some(state) = self.rings.get_mut(ring).map(|ring| &mut ring.state) else {
            return false;
        };
        *state = match state {
            RingState::Opening => RingState::Live,
            RingState::OpeningReply => RingState::Draining { then: Then::Reply },
            _ => return false,
        };
        true
    }

    /// Handles a ring that could not be attached.
    pub fn start_failed(&mut self, ring: usize) {
        self.rings[ring].state = RingState::Stopped;
    }

    /// Opens the gate of a ring: no conflicting I/O is left. Returns `false` if the ring is not
    /// gated.
    ///
    /// The caller then opens the device for the ring and calls [`opened`](Self::opened). Then it
    /// attaches the ring to a reactor, and stops it at once if the ring is not live. If this fails,
    /// it calls [`start_failed`](Self::start_failed).
    pub fn open_gate(&mut self, ring: usize) -> bool {
        let state = &mut self.rings[ring].state;
        *state = match state {
            RingState::Gated => RingState::Opening,
            // Only a reactor can read how far the earlier I/O has advanced the ring.
            RingState::GatedReply => RingState::OpeningReply,
            _ => return false,
        };
        true
    }

    /// Returns the rings that wait for [`Session::open_gate`].
    pub fn gated(&self) -> impl Iterator<Item = usize> {
        let rings = self.rings.iter().enumerate();
        let waits = |ring: &Ring| matches!(ring.state, RingState::Gated | RingState::GatedReply);
        rings.filter(move |(_, ring)| waits(ring)).map(|(n, _)| n)
    }

    fn mark_all(&self) -> Vec<Effect> {
        self.log().map(|_| Effect::MarkAll).into_iter().collect()
    }

    fn stop_all(&mut self) -> Vec<Effect> {
        let mut effects = vec![];
        for (n, ring) in self.rings.iter_mut().enumerate() {
            match ring.state {
                RingState::Stopped => {}
                RingState::Gated
                | RingState::GatedReply
                | RingState::Opening
                | RingState::OpeningReply => ring.state = RingState::Stopped,
                RingState::Draining { .. } => {
                    ring.state = RingState::Draining { then: Then::Stop };
                    ring.was_reset = true;
                }
                RingState::Live => {
                    ring.state = RingState::Draining { then: Then::Stop };
                    ring.was_reset = true;
                    effects.push(Effect::Stop(n));
                }
            }
        }
        effects
    }

    /// Returns [`Effect::Publish`] for the rings that reactors serve and for which `which` is true,
    /// except for those that drain after a reset.
    pub fn publish_where(&self, which: impl Fn(usize) -> bool) -> Vec<Effect> {
        let rings = self.rings.iter().enumerate();
        rings
            .filter(|(n, ring)| ring.is_wanted() && which(*n))
            .map(|(n, _)| Effect::Publish(n))
            .collect()
    }
}

/// Returns the payload of the reply to GET_VRING_BASE for a ring at position `base` with nothing in
/// flight ("Vring state description" in the specification). For a packed ring, it has the positions
/// of both the available and the used ring.
fn answer(packed: bool, base: u16) -> u32 {
    let base = u32::from(base);
    if packed { base << 16 | base } else { base }
}
