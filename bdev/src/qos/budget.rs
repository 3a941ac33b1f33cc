//! The budgets of a bdev's limits, shared by reactors without a lock.
//!
//! Time is divided into slices of a millisecond. Each limit has a budget, `spare`, from which any
//! user may take, and each user has a `credit` from which only that user takes. The first user that
//! is refused in a new slice renews the budgets ([`Budgets::renew`]): if one user was refused, all
//! of the slice's quota becomes spare; if several were, it is divided among them, so that a user
//! that asks more often does not get more. A user's debt is paid from its own shares.
//!
//! Amounts are in thousandths of an I/O or byte. In this unit, the quota of a slice has the same
//! number as the rate per second.
//!
//! Amounts are only added to and subtracted from, never stored, so no concurrent change is lost.
//! Admitted I/O exceeds an amount by at most one I/O per reactor that charges it at the same time.
//! The excess is a debt. [`Budgets::charge_anyway`] may add any debt.

use crate::sync::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

/// The number of limits that a bdev has.
pub(crate) const LIMITS: usize = 4;
/// Units in an I/O or byte.
const UNIT: u64 = 1000;
/// The maximum number of slices whose quotas one renewal gives. Several slices pass without a
/// renewal when the reactors sleep or are preempted.
const CATCH_UP: u64 = 100;
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

/// A user's part of the budgets, on a cache line of its own.
#[repr(align(64))]
#[derive(Default)]
struct User {
    /// The user's number in the upper half, and the number of its channels in the lower half. 0 if
    /// the slot is free.
    owner: AtomicU64,
    credit: [AtomicI64; LIMITS],
    /// The slice in which the user was refused first since the last renewal; 0 if it was not.
    refused: [AtomicU64; LIMITS],
}

/// The slot of a user. It is valid until [`Budgets::remove_user`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UserSlot(usize);

/// The limit that has refused an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused(usize);

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
        let last = self.users.len() - 1;
        loop {
            let owned = |owner: u64| owner != 0 && owner >> 32 == u64::from(number);
            let is_own = |user: &User| owned(user.owner.load(Ordering::Relaxed));
            let is_free = |user: &User| user.owner.load(Ordering::Relaxed) == 0;
            let users = &self.users[..last];
            let found = users.iter().position(is_own).or_else(|| users.iter().position(is_free));
            let slot = found.unwrap_or(last);
            let owner = &self.users[slot].owner;
            let seen = owner.load(Ordering::Relaxed);
            if slot != last && seen != 0 && !owned(seen) {
                continue; // another user has taken it
            }
            let next = if seen == 0 { u64::from(number) << 32 | 1 } else { seen + 1 };
            // Relaxed: the amounts in the slot are only added to and subtracted from. A failure
            // means that another channel was added or removed.
            if owner.compare_exchange(seen, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                self.users_end.fetch_max(slot + 1, Ordering::Relaxed);
                return UserSlot(slot);
            }
        }
    }

    /// Removes a channel of a user. When the user's last channel is removed, its debt moves to
    /// `spare`, so that closing a channel does not cancel a debt.
    pub(crate) fn remove_user(&self, slot: UserSlot) {
        let user = &self.users[slot.0];
        let only_number = |owner: u64| owner & u64::from(u32::MAX) == 1;
        let mut seen = user.owner.load(Ordering::Relaxed);
        loop {
            let next = if only_number(seen) { 0 } else { seen - 1 };
            // Release, and Acquire: the user's last channel sees what the others have charged.
            let (order, failure) = (Ordering::AcqRel, Ordering::Relaxed);
            match user.owner.compare_exchange(seen, next, order, failure) {
                Ok(_) if next == 0 => break,
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
        for (credit, spare) in user.credit.iter().zip(&self.spare) {
            let left = credit.load(Ordering::Relaxed);
            credit.fetch_sub(left, Ordering::Relaxed);
            spare.fetch_add(left.min(0), Ordering::Relaxed);
        }
    }

    /// Charges an I/O to its user, for each limit that applies.
    ///
    /// # Errors
    /// The first limit with nothing left. Nothing is charged then.
    #[inline]
    pub(crate) fn charge(&self, slot: UserSlot, costs: [u64; LIMITS]) -> Result<(), Refused> {
        let user = &self.users[slot.0];
        let mut taken: [Option<&AtomicI64>; LIMITS] = [None; LIMITS];
        for limit in 0..LIMITS {
            if costs[limit] == 0 || self.rates[limit].load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Relaxed: nothing else depends on the amounts. Another reactor may take from the same
            // amount between the load and the subtraction; the overrun is a debt.
            let has_some = |amount: &&AtomicI64| amount.load(Ordering::Relaxed) > 0;
            let Some(amount) = [&user.credit[limit], &self.spare[limit]].into_iter().find(has_some)
            else {
                for (amount, cost) in taken.into_iter().zip(costs) {
                    let _ = amount.map(|amount| amount.fetch_add(milli(cost), Ordering::Relaxed));
                }
                return Err(Refused(limit));
            };
            amount.fetch_sub(milli(costs[limit]), Ordering::Relaxed);
            taken[limit] = Some(amount);
        }
        Ok(())
    }

    /// Charges an I/O in any case, as a debt if nothing is left.
    pub(crate) fn charge_anyway(&self, slot: UserSlot, costs: [u64; LIMITS]) {
        self.change_credit(slot, costs, |credit, amount| {
            credit.fetch_sub(amount, Ordering::Relaxed);
        });
    }

    /// Reverses a charge.
    pub(crate) fn give_back(&self, slot: UserSlot, costs: [u64; LIMITS]) {
        self.change_credit(slot, costs, |credit, amount| {
            credit.fetch_add(amount, Ordering::Relaxed);
        });
    }

    fn change_credit(
        &self,
        slot: UserSlot,
        costs: [u64; LIMITS],
        change: impl Fn(&AtomicI64, i64),
    ) {
        for (limit, cost) in costs.into_iter().enumerate() {
            if cost > 0 && self.rates[limit].load(Ordering::Relaxed) != 0 {
                change(&self.users[slot.0].credit[limit], milli(cost));
            }
        }
    }

    /// Called after a refusal, in slice `now`: renews the budgets if a new slice has begun. Returns
    /// whether it did. A reactor that finds another one renewing them does not wait for it.
    #[cold]
    pub(crate) fn renew(&self, slot: UserSlot, refused: Refused, now: u64) -> bool {
        let since = &self.users[slot.0].refused[refused.0];
        // Relaxed: a renewal that runs at the same time may clear the mark without reading it. The
        // user sets it again at its next refusal.
        if since.load(Ordering::Relaxed) == 0 {
            since.store(now, Ordering::Relaxed);
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
            (0..LIMITS).for_each(|limit| self.renew_limit(limit, now));
            self.slice.store(now, Ordering::Relaxed);
        }
        // Release: the next reactor that renews the budgets sees the slice.
        self.renewing.store(false, Ordering::Release);
        is_new
    }

    /// Divides the quota of a slice.
    fn renew_limit(&self, limit: usize, now: u64) {
        let quota = self.rates[limit].load(Ordering::Relaxed);
        if quota == 0 {
            return;
        }
        let users = &self.users[..self.users_end.load(Ordering::Relaxed)];
        let (mut waiting, mut debtors, mut since) = (0, 0, now);
        for user in users {
            match user.refused[limit].load(Ordering::Relaxed) {
                0 => debtors += i64::from(user.credit[limit].load(Ordering::Relaxed) < 0),
                first => (waiting, since) = (waiting + 1, since.min(first)),
            }
        }
        // Quotas are given for the slices since the first refusal. The quotas of the slices before
        // it are lost.
        let slices = (now - since).clamp(1, CATCH_UP);
        // A positive spare amount expires. A negative one is subtracted from the new quota.
        let spare = self.spare[limit].load(Ordering::Relaxed);
        self.spare[limit].fetch_sub(spare, Ordering::Relaxed);
        let quota = signed(quota.saturating_mul(slices));
        let mut left = quota.saturating_add(spare.min(0));
        if left > 0 {
            left -= self.pay_debts(limit, users, quota / (waiting + debtors).max(1));
        }
        if left > 0 {
            left = self.give_shares(limit, users, left, waiting, now);
        }
        self.spare[limit].fetch_add(left, Ordering::Relaxed);
        users.iter().for_each(|user| user.refused[limit].store(0, Ordering::Relaxed));
    }

    /// Pays the debts of users that were not refused, each from its own share. Returns the amount
    /// paid.
    fn pay_debts(&self, limit: usize, users: &[User], share: i64) -> i64 {
        let mut sum = 0;
        for user in users {
            let credit = user.credit[limit].load(Ordering::Relaxed);
            if user.refused[limit].load(Ordering::Relaxed) == 0 && credit < 0 {
                let paid = share.min(credit.saturating_neg());
                user.credit[limit].fetch_add(paid, Ordering::Relaxed);
                sum += paid;
            }
        }
        sum
    }

    /// Gives users that were refused equal shares. Returns what is left.
    fn give_shares(
        &self,
        limit: usize,
        users: &[User],
        mut left: i64,
        waiting: i64,
        now: u64,
    ) -> i64 {
        let wants = |user: &&User| user.refused[limit].load(Ordering::Relaxed) != 0;
        if waiting <= 1 {
            // Only this user was refused: its debt is paid first, and the rest becomes spare.
            if let Some(user) = users.iter().find(wants) {
                let debt = user.credit[limit].load(Ordering::Relaxed).min(0).saturating_neg();
                user.credit[limit].fetch_add(debt.min(left), Ordering::Relaxed);
                left -= debt.min(left);
            }
            return left;
        }
        let share = left / waiting;
        // The remainder starts at another user in each slice.
        let first = usize::try_from(now % waiting.unsigned_abs()).unwrap_or(0);
        let remainder = usize::try_from(left % waiting).unwrap_or(0);
        let count = usize::try_from(waiting).unwrap_or(usize::MAX);
        for (n, user) in users.iter().filter(wants).take(count).enumerate() {
            let gets_more = (n + first) % count < remainder;
            let given = share + i64::from(gets_more);
            user.credit[limit].fetch_add(given, Ordering::Relaxed);
            left -= given;
        }
        left
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
