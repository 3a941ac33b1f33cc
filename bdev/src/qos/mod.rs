//! Rate limits of a bdev (SPDK: QoS), as `bdev_set_qos_limit` sets them.
//!
//! All users of a bdev share one budget per limit, which is renewed every millisecond. Quota that
//! is not used is lost, so an idle disk saves up no burst. An I/O is admitted if anything is left,
//! even if it needs more. The excess is a debt, which is subtracted from the following quotas. If
//! several users ask for more than the budget together, each gets an equal share (`budget`).
//!
//! A user is a controller: all its queues share one credit for each limit.

pub(crate) mod budget;

use std::fmt;
use std::sync::OnceLock;
use std::time::Instant;

use self::budget::{Budgets, Charge, LIMITS, UserSlot};
use crate::io::{Io, Op};

/// Bytes in the unit of the operator's bandwidth limits.
const MIB: u64 = 1 << 20;
/// The largest rate that is enforced: 2^50 I/Os per second or 1 PiB/s. Higher rates are reduced to
/// it, so that amounts do not overflow.
const RATE_MAX: u64 = 1 << 50;
/// The number of users with a share of their own. Further ones share one.
const USERS: usize = 256;

/// The limits of a bdev, in the operator's units; 0 means unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Reads and writes per second.
    pub rw_ios_per_sec: u64,
    /// Reads and writes, in MiB per second.
    pub rw_mbytes_per_sec: u64,
    /// Reads, in MiB per second.
    pub r_mbytes_per_sec: u64,
    /// Writes, in MiB per second.
    pub w_mbytes_per_sec: u64,
}

impl RateLimits {
    /// Returns whether there is no limit.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }

    /// The limits in I/Os or bytes per second, in the order in which an I/O is charged.
    fn rates(&self) -> [u64; LIMITS] {
        let bytes = |mib: u64| mib.saturating_mul(MIB).min(RATE_MAX);
        [
            self.rw_ios_per_sec.min(RATE_MAX),
            bytes(self.rw_mbytes_per_sec),
            bytes(self.r_mbytes_per_sec),
            bytes(self.w_mbytes_per_sec),
        ]
    }
}

/// Returns what an I/O costs of each limit: I/Os or bytes. Only reads and writes cost anything.
fn costs(io: &Io) -> [u64; LIMITS] {
    match io.op {
        Op::Read => [1, io.len, io.len, 0],
        Op::Write => [1, io.len, 0, io.len],
        Op::Flush | Op::Unmap | Op::WriteZeroes => [0; LIMITS],
    }
}

/// Identifies the controller that a channel serves. Users of one bdev get equal shares of its
/// limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QosUser(u32);

impl QosUser {
    /// Makes the user with this number, which is unique among those that exist.
    #[must_use]
    pub fn new(number: u32) -> Self {
        Self(number)
    }
}

/// How a channel treats the rate limits of its bdev and of the bdevs below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limiting {
    /// I/O that exceeds a limit is refused with [`crate::Submit::Throttled`].
    Apply(QosUser),
    /// No I/O is refused, because the owner is about to stop. I/O is still charged, and the debt
    /// delays later I/O.
    ChargeOnly,
}

/// The rate limits of one bdev, and the budgets that its users share.
#[derive(Default)]
pub struct Qos {
    /// Present from the first limit on. Without it, limits cost nothing.
    state: OnceLock<State>,
}

struct State {
    limits: std::sync::Mutex<RateLimits>,
    budgets: Budgets,
    /// The beginning of the first slice.
    start: Instant,
}

impl fmt::Debug for Qos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limits().fmt(f)
    }
}

impl Qos {
    /// Returns the limits. Locks: reactors must not call it.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        let lock =
            |state: &State| *state.limits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.state.get().map(lock).unwrap_or_default()
    }

    /// Sets the limits. An open channel applies the first limit of a bdev, and the removal of the
    /// last one, from the next [`crate::Channel::set_limiting`] on. Other changes need no call.
    /// Locks: reactors must not call it.
    pub fn set_limits(&self, limits: RateLimits) {
        if limits.is_unlimited() && self.state.get().is_none() {
            return;
        }
        let state = self.state.get_or_init(|| State {
            limits: std::sync::Mutex::default(),
            budgets: Budgets::new(USERS),
            start: Instant::now(),
        });
        let mut current = state.limits.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *current = limits;
        state.budgets.set_rates(limits.rates(), state.slice());
    }

    /// Returns the budgets if there is a limit.
    pub(crate) fn active(&self) -> Option<Active<'_>> {
        self.state.get().filter(|state| state.budgets.is_limited()).map(Active)
    }

    /// Returns the budgets, also if there is no limit any more.
    pub(crate) fn any(&self) -> Option<Active<'_>> {
        self.state.get().map(Active)
    }
}

impl State {
    /// Returns the number of the current slice, which lasts a millisecond. The first is 1.
    fn slice(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// Budgets that a channel uses. No method locks, allocates or waits.
#[derive(Clone, Copy)]
pub(crate) struct Active<'a>(&'a State);

impl Active<'_> {
    /// Adds a channel of this user.
    pub(crate) fn add(self, user: QosUser) -> UserSlot {
        self.0.budgets.add_user(user.0)
    }

    /// Removes a channel of a user. Its debt remains.
    pub(crate) fn remove(self, slot: UserSlot) {
        self.0.budgets.remove_user(slot);
    }

    /// Charges an I/O if it may pass now.
    #[inline]
    pub(crate) fn admit(self, slot: UserSlot, io: &Io) -> Option<Charge> {
        let (budgets, costs) = (&self.0.budgets, costs(io));
        budgets.charge(slot, costs).ok().or_else(|| {
            let renewed = budgets.renew(slot, self.0.slice());
            renewed.then(|| budgets.charge(slot, costs).ok()).flatten()
        })
    }

    /// Charges an I/O that passes in any case.
    pub(crate) fn charge_anyway(self, slot: UserSlot, io: &Io) -> Charge {
        self.0.budgets.charge_anyway(slot, costs(io))
    }

    /// Returns whether a user has a debt for I/O that passed in any case.
    pub(crate) fn has_forced_debt(self, slot: UserSlot) -> bool {
        self.0.budgets.has_forced_debt(slot)
    }

    /// Reverses the charge for an I/O that the channel did not accept.
    pub(crate) fn give_back(self, slot: UserSlot, charge: Charge) {
        self.0.budgets.give_back(slot, charge);
    }

    /// Ends a user's wait: it does not submit again what was refused.
    pub(crate) fn stop_waiting(self, slot: UserSlot) {
        self.0.budgets.stop_waiting(slot);
    }
}
