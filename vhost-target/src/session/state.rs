//! The types of the state machine: the states of a session and of its rings, the effects of events,
//! and the reasons for refusing messages.

use std::sync::Arc;

use virtqueue::{RingAddrs, RingError};

#[cfg(doc)]
use super::Session;
use crate::notify::{CallFd, KickFd};

/// The phase of a session as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No ring was started yet.
    Negotiating,
    /// Rings were started and wait for I/O of a closed connection.
    Starting,
    /// At least one ring is served.
    Running,
    /// The front end waits for its I/O to complete.
    Quiescing,
    /// All rings were stopped by the front end.
    Suspended,
    /// The connection is closed.
    Closed,
}

impl Phase {
    /// Returns the phase in lower case, for the operator.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Negotiating => "negotiating",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Quiescing => "quiescing",
            Self::Suspended => "suspended",
            Self::Closed => "closed",
        }
    }
}

/// The state of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingState {
    /// Not served.
    #[default]
    Stopped,
    /// Started by the front end, and waiting for the gate to open.
    Gated,
    /// Stopped by the front end while it was gated. The reply to GET_VRING_BASE has to wait too,
    /// because the earlier connection's I/O still completes in this ring.
    GatedReply,
    /// Its device is being opened.
    Opening,
    /// As [`RingState::Opening`], and stopped by the front end. Only a reactor may read the ring's
    /// position.
    OpeningReply,
    /// Served by a reactor.
    Live,
    /// Told to stop, with I/O in flight.
    Draining {
        /// What follows when it has drained.
        then: Then,
    },
}

/// What follows a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing: the connection was closed or reset.
    Stop,
    /// The reply to GET_VRING_BASE, for which the front end waits.
    Reply,
    /// A start: the front end has reset the ring and started it again meanwhile.
    Restart,
    /// As [`Then::Restart`], and the front end has stopped the ring again. The reply to
    /// GET_VRING_BASE is about the new ring, not about the one that drains.
    RestartReply,
}

/// An action that a session requests. Rings are given by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Check the gate for the ring. Call [`Session::open_gate`] when no conflicting I/O is left.
    Gate(usize),
    /// Give the ring's reactor a new view from [`Session::ring`].
    Publish(usize),
    /// Stop the ring. Call [`Session::drained`] when it has drained.
    Stop(usize),
    /// As [`Effect::Stop`]. Requests of an earlier process that were not resubmitted yet are
    /// dropped: the guest has reset its device.
    Reset(usize),
    /// Mark all of the guest's memory in its dirty log: I/O that did not mark pages there has
    /// ended.
    MarkAll,
    /// Reply to GET_VRING_BASE for the ring with this number.
    Reply(usize, u32),
    /// Reply to the reset that [`Session::await_reset`] was called for.
    Acknowledge,
}

/// The reason why a message is refused. The connection is then closed.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// the device has no ring with this number
    #[error("ring {0} does not exist")]
    NoSuchRing(usize),
    /// a message while a reply is pending: the protocol is synchronous
    #[error("the front end sent a message before the reply to the previous one")]
    ReplyPending,
    /// the parameters of a started ring cannot change
    #[error("the parameters of ring {0} cannot change while it is started")]
    RingRunning(usize),
    /// features cannot change while a ring is started, LOG_ALL excepted
    #[error("features changed from {0:#x} to {1:#x} while a ring is started")]
    FeaturesRunning(u64, u64),
    /// the in-flight area cannot change while a ring is started
    #[error("SET_INFLIGHT_FD while a ring is started")]
    AreaRunning,
    /// features that were not offered
    #[error("features {0:#x} were not offered")]
    FeaturesNotOffered(u64),
    /// a ring was started without memory or addresses
    #[error("ring {0} was started before it was set up")]
    NotSetUp(usize),
    /// the ring's size or addresses are invalid
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// A ring as the front end has set it up.
#[derive(Debug, Default)]
pub struct Ring {
    /// Its state.
    pub state: RingState,
    /// Number of descriptors.
    pub num: u16,
    /// The position at which it starts, or has stopped ([`virtqueue::Ring`] explains positions).
    pub base: u16,
    /// The addresses of its parts, in the front end's address space.
    pub(super) user: Option<RingAddrs>,
    /// The guest-physical addresses of its parts. Set when it is started.
    pub addrs: Option<RingAddrs>,
    /// Where the guest is notified of completions.
    pub call: Option<Arc<CallFd>>,
    /// The eventfd of the guest's kicks.
    pub kick: Option<Arc<KickFd>>,
    /// It was started at some time.
    pub(super) was_started: bool,
    /// It drains after a reset, with the view that it has. Its parameters may be new.
    pub(super) was_reset: bool,
    /// It was last started as a packed ring.
    pub(super) packed: bool,
}

impl Ring {
    /// Returns whether its parameters are in use. (The parameters of a ring that drains after a
    /// reset are not, because its reactor has a view of its own.)
    pub(super) fn running(&self) -> bool {
        !matches!(self.state, RingState::Stopped | RingState::Draining { then: Then::Stop })
    }

    /// Returns whether a reactor has to serve it, or to read its position for a pending reply,
    /// according to the front end's latest messages.
    pub(crate) fn is_wanted(&self) -> bool {
        let wanted =
            matches!(self.state, RingState::Live | RingState::Draining { then: Then::Reply });
        wanted && !self.was_reset
    }

    /// Returns whether a reactor serves it, or will serve it, with its current parameters.
    pub(super) fn has_parameters_in_use(&self) -> bool {
        let own_view = self.was_reset && self.state == RingState::Draining { then: Then::Reply };
        self.running() && !own_view
    }
}
