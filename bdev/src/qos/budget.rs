//! The budgets of a bdev's limits, shared by reactors without a lock.
//!
//! Time is divided into slices of a millisecond. Each limit has a budget, `spare`, from which any
//! user may take, and each user has a `credit` from which only that user takes. What an I/O costs
//! above what is left becomes a negative credit, a debt of its user. The first user that is refused
//! in a new slice renews the budgets ([`Budgets::renew`]): if one user waits, the slice's quota
//! becomes spare; if several wait, it is divided among them, so that a user that asks more often
//! does not get more. A user's debt is paid from its own shares.
//!
//! Amounts are in thousandths of an I/O or byte. In this unit, the quota of a slice has the same
//! number as the rate per second. Amounts are only added to and subtracted from, never stored, so no
//! concurrent change is lost.

use crate::sync::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

/// The number of limits that a bdev has.
pub(crate) const LIMITS: usize = 4;
/// Units in an I/O or byte.
const UNIT: u64 = 1000;
/// The maximum number of slices whose quotas one renewal gives. Several slices pass without a
/// renewal when the reactors sleep or are preempted.
const CATCH_UP: u64 = 100;
/// The maximum credit of a user that waits, in shares of a renewal. More than one, for users whose
/// reactor does not ask in every slice.
const SHARES_MAX: i64 = 16;
/// The user's number in [`User::owner`].
const NUMBER: u64 = !0 << 32;
/// Limits the amount of one I/O, so that sums do not overflow.
const COST_MAX: u64 = 1 << 50;

/// The budgets of one bdev.
pub(crate) struct Budgets {
    /// I/Os or bytes per second; 0 means unlimited.
    rates: [AtomicU64; LIMITS],
    spare: [AtomicI64; LIMITS],
    /// The slice for which the budgets were renewed last.
    slice: AtomicU64,
    /// A reactor is renewing the budgets. Others do not wait for it: they try again later.
    renewing: AtomicBool,
    users: Box<[User]>,
    /// Slots from here on were never used.
    users_end: AtomicUsize,
}

/// A user's part of the budgets, on cache lines of its own.
#[repr(align(64))]
#[derive(Default)]
struct User {
    /// The user's number in the upper half, and the number of its channels in the lower half. 0 if
    /// the slot was never used. A user without channels keeps its slot while it has a debt.
    owner: AtomicU64,
    credit: [AtomicI64; LIMITS],
    /// The slice of the first refusal, or of the last renewal, since the user waits; 0 if it does
    /// not.
    waits_since: AtomicU64,
    /// It has a debt for I/O that was charged without being admitted.
    forced: AtomicBool,
}

/// The slot of a user. It is valid until [`Budgets::remove_user`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UserSlot(usize);

/// A refusal: nothing is left of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// What an I/O was charged, by limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Charge {
    credit: [i64; LIMITS],
    spare: [i64; LIMITS],
}

impl User {
    fn has_debt(&self) -> bool {
        self.credit.iter().any(|credit| credit.load(Ordering::Relaxed) < 0)
    }

    fn waits(&self) -> bool {
        self.waits_since.load(Ordering::Relaxed) != 0
    }

    /// Ends a wait. Relaxed: a renewal at the same time may count the user once more.
    fn stop_waiting(&self) {
        if self.waits() {
            self.waits_since.store(0, Ordering::Relaxed);
        }
    }
}

impl Budgets {
    /// Makes budgets without a limit, for `users` users.
    pub(crate) fn new(users: usize) -> Self {
        Self {
            rates: Default::default(),
            spare: Default::default(),
            slice: AtomicU64::new(0),
            renewing: AtomicBool::new(false),
            users: (0..users).map(|_| User::default()).collect(),
            users_end: AtomicUsize::new(0),
        }
    }

    /// Sets the rates, in I/Os or bytes per second.
    pub(crate) fn set_rates(&self, rates: [u64; LIMITS], slice: u64) {
        for (limit, rate) in rates.into_iter().enumerate() {
            // Relaxed: the rates are independent of each other, and apply from the next renewal on.
            if self.rates[limit].swap(rate, Ordering::Relaxed) != 0 && rate == 0 {
                self.clear(limit);
            }
        }
        if !self.is_limited() {
            self.users.iter().for_each(User::stop_waiting);
        }
        self.slice.fetch_max(slice.saturating_sub(1), Ordering::Relaxed);
    }

    /// Clears the amounts of a limit that was removed, so that a later limit starts from zero.
    fn clear(&self, limit: usize) {
        let users = self.users.iter().map(|user| &user.credit[limit]);
        for amount in users.chain([&self.spare[limit]]) {
            amount.fetch_sub(amount.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Returns whether there is a limit.
    #[inline]
    pub(crate) fn is_limited(&self) -> bool {
        self.rates.iter().any(|rate| rate.load(Ordering::Relaxed) != 0)
    }

    /// Adds a channel of a user. Returns the user's slot; the last slot is shared by all users that
    /// find no other.
    pub(crate) fn add_user(&self, number: u32) -> UserSlot {
        let number = u64::from(number) << 32;
        let is_own = |owner: u64| owner != 0 && owner & NUMBER == number;
        let last = self.users.len() - 1;
        loop {
            let owner_of = |user: &User| user.owner.load(Ordering::Relaxed);
            let is_free = |user: &User| owner_of(user) & !NUMBER == 0 && !user.has_debt();
            let users = &self.users[..last];
            let own = users.iter().position(|user| is_own(owner_of(user)));
            let slot = own.or_else(|| users.iter().position(is_free)).unwrap_or(last);
            let owner = &self.users[slot].owner;
            let seen = owner.load(Ordering::Relaxed);
            let is_used = seen & !NUMBER != 0;
            if slot != last && is_used && !is_own(seen) {
                continue; // another user has taken it
            }
            let next = if is_used { seen + 1 } else { number | 1 };
            // Acquire: pairs with the Release in `remove_user`. A failure means that another
            // channel was added or removed.
            let (order, failure) = (Ordering::Acquire, Ordering::Relaxed);
            if owner.compare_exchange(seen, next, order, failure).is_ok() {
                self.users_end.fetch_max(slot + 1, Ordering::Relaxed);
                return UserSlot(slot);
            }
        }
    }

    /// Removes a channel of a user. A user without channels loses its credit and keeps its debt,
    /// so that closing a channel does not cancel a debt.
    pub(crate) fn remove_user(&self, slot: UserSlot) {
        let user = &self.users[slot.0];
        // Release, and Acquire: the user's last channel sees what the others have charged.
        if user.owner.fetch_sub(1, Ordering::AcqRel) & !NUMBER > 1 {
            return;
        }
        user.stop_waiting();
        for credit in &user.credit {
            credit.fetch_sub(credit.load(Ordering::Relaxed).max(0), Ordering::Relaxed);
        }
    }

    /// Ends a user's wait: it does not ask again.
    pub(crate) fn stop_waiting(&self, slot: UserSlot) {
        self.users[slot.0].stop_waiting();
    }

    /// Charges an I/O to its user, for each limit that applies.
    ///
    /// # Errors
    /// Nothing is left of a limit. Nothing is charged then.
    #[inline]
    pub(crate) fn charge(&self, slot: UserSlot, costs: [u64; LIMITS]) -> Result<Charge, Refused> {
        let user = &self.users[slot.0];
        let mut charge = Charge::default();
        for (limit, cost) in costs.into_iter().enumerate() {
            if cost == 0 || self.rates[limit].load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Relaxed: nothing else depends on the amounts. Another channel of the user may take from
            // the credit between the load and the subtraction; the excess is a debt.
            let credit = user.credit[limit].load(Ordering::Relaxed);
            let cost = milli(cost);
            let spare = match credit {
                0 => self.take_spare(limit, cost),
                _ => 0,
            };
            if spare == 0 && credit <= 0 {
                self.give_back(slot, charge);
                return Err(Refused);
            }
            if spare < cost {
                user.credit[limit].fetch_sub(cost - spare, Ordering::Relaxed);
            }
            (charge.spare[limit], charge.credit[limit]) = (spare, cost - spare);
        }
        user.stop_waiting();
        if user.forced.load(Ordering::Relaxed) {
            user.forced.store(false, Ordering::Relaxed); // it is paid
        }
        Ok(charge)
    }

    /// Takes up to `cost` of what all users share. Returns the amount. `spare` is never negative.
    #[inline]
    fn take_spare(&self, limit: usize, cost: i64) -> i64 {
        let (order, failure) = (Ordering::Relaxed, Ordering::Relaxed);
        let take = |spare: i64| (spare > 0).then(|| (spare - cost).max(0));
        // Repeated only if another reactor has changed the amount meanwhile.
        let had = self.spare[limit].fetch_update(order, failure, take);
        had.map_or(0, |had| had.min(cost))
    }

    /// Charges an I/O in any case, as a debt if nothing is left.
    pub(crate) fn charge_anyway(&self, slot: UserSlot, costs: [u64; LIMITS]) -> Charge {
        let user = &self.users[slot.0];
        let mut charge = Charge::default();
        for (limit, cost) in costs.into_iter().enumerate() {
            if cost > 0 && self.rates[limit].load(Ordering::Relaxed) != 0 {
                charge.credit[limit] = milli(cost);
                user.credit[limit].fetch_sub(milli(cost), Ordering::Relaxed);
            }
        }
        user.forced.store(true, Ordering::Relaxed);
        charge
    }

    /// Returns whether a user still has a debt after [`Budgets::charge_anyway`].
    pub(crate) fn has_forced_debt(&self, slot: UserSlot) -> bool {
        self.users[slot.0].forced.load(Ordering::Relaxed)
    }

    /// Reverses a charge.
    pub(crate) fn give_back(&self, slot: UserSlot, charge: Charge) {
        for limit in 0..LIMITS {
            for (amount, taken) in [
                (&self.users[slot.0].credit[limit], charge.credit[limit]),
                (&self.spare[limit], charge.spare[limit]),
            ] {
                if taken > 0 {
                    amount.fetch_add(taken, Ordering::Relaxed);
                }
            }
        }
    }

    /// Called after a refusal, in slice `now`: renews the budgets if a new slice has begun. Returns
    /// whether it did. A reactor that finds another one renewing them does not wait for it.
    #[cold]
    pub(crate) fn renew(&self, slot: UserSlot, now: u64) -> bool {
        let user = &self.users[slot.0];
        if !user.waits() {
            user.waits_since.store(now, Ordering::Relaxed);
        }
        let begin = || {
            let (acquire, relaxed) = (Ordering::Acquire, Ordering::Relaxed);
            // Acquire: pairs with the Release store of `renewing`.
            self.renewing.compare_exchange(false, true, acquire, relaxed).is_ok()
        };
        if now <= self.slice.load(Ordering::Relaxed) || !begin() {
            return false;
        }
        let is_new = now > self.slice.load(Ordering::Relaxed);
        if is_new {
            self.renew_all(now);
            self.slice.store(now, Ordering::Relaxed);
        }
        // Release: the next reactor that renews the budgets sees the slice.
        self.renewing.store(false, Ordering::Release);
        is_new
    }

    /// Divides the quotas of the slices up to `now`.
    fn renew_all(&self, now: u64) {
        let users = &self.users[..self.users_end.load(Ordering::Relaxed)];
        let (mut waiting, mut first) = (0, now);
        for user in users {
            let since = user.waits_since.load(Ordering::Relaxed);
            if since == 0 {
                continue;
            }
            (waiting, first) = (waiting + 1, first.min(since));
            // Fails if the user stops waiting at the same time.
            let (order, failure) = (Ordering::Relaxed, Ordering::Relaxed);
            let _ = user.waits_since.compare_exchange(since, now, order, failure);
        }
        // The quotas of slices in which nobody waited are lost.
        let slices = (now - first).clamp(1, CATCH_UP);
        for limit in 0..LIMITS {
            let quota = self.rates[limit].load(Ordering::Relaxed);
            if quota > 0 {
                self.renew_limit(limit, users, signed(quota.saturating_mul(slices)), waiting, now);
            }
        }
    }

    fn renew_limit(&self, limit: usize, users: &[User], quota: i64, waiting: i64, now: u64) {
        // What is left of the last slice is lost.
        let expired = self.spare[limit].load(Ordering::Relaxed);
        self.spare[limit].fetch_sub(expired, Ordering::Relaxed);
        let credit_of = |user: &User| user.credit[limit].load(Ordering::Relaxed);
        let debtors = users.iter().filter(|user| !user.waits() && credit_of(user) < 0).count();
        let share = quota / (waiting + i64::try_from(debtors).unwrap_or(i64::MAX)).max(1);
        let mut left = quota;
        for user in users.iter().filter(|user| !user.waits()) {
            // A debt is paid from the user's share. A credit above a share expires.
            let change =
                credit_of(user).saturating_neg().clamp(0, share) - (credit_of(user) - share).max(0);
            if change != 0 {
                user.credit[limit].fetch_add(change, Ordering::Relaxed);
                left -= change.max(0);
            }
        }
        left -= self.give_shares(limit, users, left.max(0), waiting, now);
        self.spare[limit].fetch_add(left, Ordering::Relaxed);
    }

    /// Gives users that wait equal shares. Returns what was given.
    fn give_shares(&self, limit: usize, users: &[User], of: i64, waiting: i64, now: u64) -> i64 {
        let share = of / waiting.max(1);
        // The remainder starts at another user in each slice.
        let count = usize::try_from(waiting.max(1)).unwrap_or(usize::MAX);
        let first = usize::try_from(now % waiting.max(1).unsigned_abs()).unwrap_or(0);
        let remainder = usize::try_from(of % waiting.max(1)).unwrap_or(0);
        let mut sum = 0;
        for (n, user) in users.iter().filter(|user| user.waits()).take(count).enumerate() {
            let credit = user.credit[limit].load(Ordering::Relaxed);
            let share = share + i64::from((n + first) % count < remainder);
            let room = if waiting == 1 {
                // Nobody competes with it: its debt is paid, and the rest is for everybody.
                credit.min(0).saturating_neg()
            } else {
                (share.saturating_mul(SHARES_MAX) - credit).max(0)
            };
            user.credit[limit].fetch_add(share.min(room), Ordering::Relaxed);
            sum += share.min(room);
        }
        sum
    }
}

/// Converts I/Os or bytes to amounts.
#[inline]
fn milli(cost: u64) -> i64 {
    signed(cost.min(COST_MAX) * UNIT)
}

#[inline]
fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
