//! A user's I/O path to a bdev: the module's channel, and the rate limits in front of it.
#![expect(unsafe_code, reason = "forwards I/O to `Channel::submit`")]

use std::sync::Arc;

use crate::contract::{Bdev, Channel, Wait, WakeFds};
use crate::error::Error;
use crate::failure::Failure;
use crate::io::{Completion, Io, Submit, Tag};
use crate::qos::budget::UserSlot;
use crate::qos::{Active, Limiting};
use crate::shortcut::Shortcut;

/// The channel through which a bdev is used. Wrappers use their bases through it as well, so that
/// every bdev's limits apply to all I/O that it gets.
///
/// Limits do not apply before the first [`Channel::set_limiting`].
pub struct BdevChannel {
    channel: Box<dyn Channel>,
    limited: Limited,
    bdev: Arc<dyn Bdev>,
}

/// How the channel treats its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limited {
    /// Limits are not applied.
    No,
    /// Each I/O is charged to this user, or refused.
    Yes(UserSlot),
    /// Each I/O is charged to this user, and none is refused.
    ChargeOnly(UserSlot),
}

impl Limited {
    /// Returns the budgets that I/O is charged to, and the user's slot in them.
    fn budgets(self, bdev: &dyn Bdev) -> Option<(Active<'_>, UserSlot)> {
        match self {
            Self::No => None,
            Self::Yes(slot) | Self::ChargeOnly(slot) => Some((bdev.qos().any()?, slot)),
        }
    }
}

impl BdevChannel {
    /// Opens a bdev for one owner, which will have at most `depth` I/Os outstanding.
    ///
    /// # Errors
    /// As [`Bdev::open`].
    pub fn open(bdev: &Arc<dyn Bdev>, depth: u16) -> Result<Self, Error> {
        Ok(Self::on(Arc::clone(bdev).open(depth)?, bdev))
    }

    /// Puts a bdev's limits in front of a channel.
    pub(crate) fn on(channel: Box<dyn Channel>, bdev: &Arc<dyn Bdev>) -> Self {
        Self { channel, limited: Limited::No, bdev: Arc::clone(bdev) }
    }

    /// Submits an I/O if the limits let it pass.
    ///
    /// # Safety
    /// As [`Channel::submit`].
    #[cold]
    #[inline(never)]
    unsafe fn submit_limited(&mut self, io: Io) -> Submit {
        let Some((budgets, slot)) = self.limited.budgets(&*self.bdev) else {
            // SAFETY: by the caller's promise.
            return unsafe { self.channel.submit(io) };
        };
        let charge = match self.limited {
            Limited::ChargeOnly(_) => budgets.charge_anyway(slot, &io),
            _ => match budgets.admit(slot, &io) {
                Some(charge) => charge,
                // A guest must not evade a limit by stopping its rings again and again: the owner
                // takes no further request before the debt is paid.
                None if budgets.has_forced_debt(slot) => return Submit::Full(io),
                None => return Submit::Throttled(io),
            },
        };
        // SAFETY: by the caller's promise.
        let submit = unsafe { self.channel.submit(io) };
        if let Submit::Full(_) | Submit::Throttled(_) = &submit {
            budgets.give_back(slot, charge);
        }
        submit
    }

    /// Ends the wait for limits: what was refused is not submitted again under the limits.
    fn stop_waiting(&self) {
        if let Some((budgets, slot)) = self.limited.budgets(&*self.bdev) {
            budgets.stop_waiting(slot);
        }
    }

    fn leave_budgets(&mut self) {
        if let Some((budgets, slot)) = self.limited.budgets(&*self.bdev) {
            budgets.remove(slot);
        }
        self.limited = Limited::No;
    }
}

impl Drop for BdevChannel {
    fn drop(&mut self) {
        self.leave_budgets();
    }
}

impl Channel for BdevChannel {
    #[inline]
    unsafe fn submit(&mut self, io: Io) -> Submit {
        if self.limited == Limited::No {
            // SAFETY: by the caller's promise.
            return unsafe { self.channel.submit(io) };
        }
        // SAFETY: by the caller's promise.
        unsafe { self.submit_limited(io) }
    }

    /// Returns [`Shortcut::None`] while limits apply.
    fn shortcut(&self) -> Shortcut {
        if self.limited == Limited::No { self.channel.shortcut() } else { Shortcut::None }
    }

    fn set_limiting(&mut self, limiting: Limiting) {
        self.channel.set_limiting(limiting);
        self.limited = match (limiting, self.limited, self.bdev.qos().active()) {
            (Limiting::Apply(user), Limited::No, Some(budgets)) => Limited::Yes(budgets.add(user)),
            (Limiting::Apply(_), Limited::Yes(slot) | Limited::ChargeOnly(slot), Some(_)) => {
                Limited::Yes(slot)
            }
            (Limiting::Apply(_), _, None) => return self.leave_budgets(),
            (Limiting::ChargeOnly, Limited::Yes(slot), _) => {
                self.stop_waiting();
                Limited::ChargeOnly(slot)
            }
            (Limiting::ChargeOnly, other, _) => other,
        };
    }

    fn wake_fds(&self) -> WakeFds<'_> {
        self.channel.wake_fds()
    }

    fn set_wakes(&mut self, wakes: bool) {
        self.channel.set_wakes(wakes);
    }

    fn wait(&self) -> Wait {
        self.channel.wait()
    }

    fn failure(&mut self, tag: Tag) -> Option<Failure> {
        self.channel.failure(tag)
    }

    #[inline]
    fn kick(&mut self) {
        self.channel.kick();
    }

    #[inline]
    fn poll(&mut self, done: &mut [Completion]) -> usize {
        self.channel.poll(done)
    }

    fn abandon(&mut self) {
        self.stop_waiting();
        self.channel.abandon();
    }
}
