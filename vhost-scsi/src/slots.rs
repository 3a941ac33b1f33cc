//! The places of a controller's targets.

use std::sync::{Arc, Weak};

use bdev::{QosUser, UserCounts};

use crate::job::CHUNK_BYTES;
use crate::session::Session;
use crate::target::{FRONT_ENDS_MAX, ScsiTarget, TARGETS_MAX};
use crate::unit::DEVICES_MAX;

/// A target, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetInfo {
    /// Its number in the controller.
    pub number: u8,
    /// The number of the SCSI device in the process.
    pub device: u16,
    /// The name of its bdev.
    pub bdev: String,
    /// The user whose counters and limits its queues have at the bdev.
    pub user: QosUser,
    /// What its queues have done at the bdev.
    pub counts: UserCounts,
}

/// The reason why a target cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// the number is too large
    #[error("expected a target number from 0 to {}", TARGETS_MAX - 1)]
    Number,
    /// the place is used, or its target is being removed
    #[error("target {0} exists or is being removed")]
    Exists(u8),
    /// all places are used, or there are too many SCSI devices in the process
    #[error("no free target: a controller can have {TARGETS_MAX}, all together {DEVICES_MAX}")]
    NoSpace,
    /// the bdev's blocks are too large
    #[error("bdev {0}: blocks of more than {CHUNK_BYTES} bytes are not supported")]
    Blocks(String),
    /// the bdev was deleted meanwhile
    #[error("bdev {0} was deleted")]
    Removed(String),
    /// the bdev cannot be opened for a queue
    #[error(transparent)]
    Open(#[from] bdev::Error),
}

/// The reason why a target cannot be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemoveError {
    /// the number is too large
    #[error("expected a target number from 0 to {}", TARGETS_MAX - 1)]
    Number,
    /// there is no target, or it is being removed
    #[error("target {0} does not exist or is being removed")]
    Absent(u8),
}

/// What the lock of a device protects.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) slots: [Slot; TARGETS_MAX],
    /// The sessions of connected front ends, and of earlier ones that queues not yet freed still use.
    pub(crate) sessions: Vec<Weak<Session>>,
    /// The key of the next session.
    connected: u64,
    /// The indices in use, a bit for each.
    indices: u32,
    /// What the queues had done for targets that were removed, when those were removed.
    counts_before: UserCounts,
}

/// The place of a target.
#[derive(Debug, Default)]
pub(crate) enum Slot {
    #[default]
    Empty,
    /// The target is being opened for the queues of running guests, and is not shown.
    Opening(Arc<ScsiTarget>),
    Used(Arc<ScsiTarget>),
    /// The target was removed, and queues may still use it.
    Leaving(Weak<ScsiTarget>),
}

impl Slot {
    pub(crate) fn used(&self) -> Option<&Arc<ScsiTarget>> {
        if let Self::Used(target) = self { Some(target) } else { None }
    }

    /// Returns the target that new queues open.
    pub(crate) fn opened(&self) -> Option<&Arc<ScsiTarget>> {
        match self {
            Self::Opening(target) | Self::Used(target) => Some(target),
            Self::Empty | Self::Leaving(_) => None,
        }
    }

    /// Returns the target whose storage I/O may access: also that of one that was removed and still
    /// has I/O in flight.
    pub(crate) fn accessed(&self) -> Option<Arc<ScsiTarget>> {
        match self {
            Self::Leaving(target) => target.upgrade(),
            other => other.opened().cloned(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Opening(_) | Self::Used(_) => false,
            Self::Leaving(target) => target.strong_count() == 0,
        }
    }
}

impl State {
    /// Returns the front ends. To drop the last reference to one may take long: not under a lock.
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions.iter().filter_map(Weak::upgrade).collect()
    }

    /// Adds a front end with the lowest free index. One that has its controller for itself gets the
    /// same index whenever it reconnects after its earlier I/O has ended, and so keeps its
    /// registrations.
    pub(crate) fn connect(&mut self, controller: u64) -> Arc<Session> {
        self.sessions.retain(|session| session.strong_count() > 0);
        let is_free = |n: &u8| self.indices & (1 << n) == 0;
        // The target accepts fewer.
        let index = (0..FRONT_ENDS_MAX).find(is_free).unwrap_or(FRONT_ENDS_MAX - 1);
        let session = Session::new(self.connected, index, controller);
        self.indices |= 1 << index;
        self.connected += 1;
        self.sessions.push(Arc::downgrade(&session));
        session
    }

    /// A front end is gone, and its I/O has ended.
    pub(crate) fn disconnect(&mut self, session: &Session) {
        self.indices &= !(1 << session.index);
    }

    pub(crate) fn free_number(&self, wanted: Option<u8>) -> Result<u8, AddError> {
        match wanted {
            Some(number) => match self.slots.get(usize::from(number)) {
                None => Err(AddError::Number),
                Some(slot) if slot.is_empty() => Ok(number),
                Some(_) => Err(AddError::Exists(number)),
            },
            None => {
                let free = self.slots.iter().position(Slot::is_empty);
                free.and_then(|n| u8::try_from(n).ok()).ok_or(AddError::NoSpace)
            }
        }
    }

    /// Returns what the queues have done for all targets, including those that were removed.
    pub(crate) fn counts(&self) -> UserCounts {
        let mut sum = self.counts_before;
        let used = self.slots.iter().filter_map(Slot::used);
        used.for_each(|target| sum.add(&target.user.counts()));
        sum
    }

    /// Begins to remove a target. Returns false if there is none.
    pub(crate) fn remove(&mut self, number: u8) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(number)) else { return false };
        let Some(target) = slot.opened() else { return false };
        self.counts_before.add(&target.user.counts());
        *slot = Slot::Leaving(Arc::downgrade(target));
        true
    }
}
