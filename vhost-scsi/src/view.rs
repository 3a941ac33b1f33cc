//! What the queues of one front end know of the targets. When this changes, they adopt a new view.

use std::sync::{Arc, Weak};

use vhost_target::device_queue::DeviceView;

use crate::session::{Barrier, Session};
use crate::target::ScsiTarget;
use crate::target::TARGETS_MAX;

/// A target that a view shows.
#[derive(Clone, Debug)]
pub(crate) struct Shown {
    /// A weak reference: requests of other targets in flight keep a view for as long as they take.
    pub(crate) target: Weak<ScsiTarget>,
    /// The bdev, or one that it is built on, has rate limits.
    pub(crate) limited: bool,
}

/// What a queue needs to know in one generation.
#[derive(Clone, Debug)]
pub struct ScsiView(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    targets: [Option<Shown>; TARGETS_MAX],
    session: Arc<Session>,
    barrier: Option<Barrier>,
}

impl ScsiView {
    /// Returns a view as the engine passes it on, without its concrete type.
    pub(crate) fn erased(
        targets: [Option<Shown>; TARGETS_MAX],
        session: &Arc<Session>,
    ) -> DeviceView {
        let inner = Inner { targets, session: Arc::clone(session), barrier: session.barrier() };
        Arc::new(Self(Arc::new(inner)))
    }

    pub(crate) fn targets(&self) -> &[Option<Shown>; TARGETS_MAX] {
        &self.0.targets
    }

    /// Returns the numbers of the targets that it shows, a bit for each.
    pub(crate) fn shown(&self) -> u8 {
        bits(&self.0.targets)
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.0.session
    }

    pub(crate) fn barrier(&self) -> Option<Barrier> {
        self.0.barrier
    }
}

/// Returns a bit for each target.
pub(crate) fn bits(targets: &[Option<Shown>; TARGETS_MAX]) -> u8 {
    let shown = targets.iter().enumerate().filter(|(_, shown)| shown.is_some());
    shown.fold(0, |bits, (n, _)| bits | 1 << n)
}
