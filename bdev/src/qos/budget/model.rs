//! Model checks: reactors that charge, renew and remove users at the same time never get more than
//! the slices' quotas, and lose no debt.

use loom::sync::Arc;
use loom::thread;

use super::*;

const IO: [u64; LIMITS] = [1, 0, 0, 0];
/// Amount of one I/O.
const ONE: i64 = 1000;

/// Budgets with a quota of half an I/O per slice.
fn budgets() -> Arc<Budgets> {
    let budgets = Budgets::new(3);
    budgets.set_rates([500, 0, 0, 0], 1);
    Arc::new(budgets)
}

/// Submits an I/O in slice `now`. Returns the number of I/Os that were admitted.
fn submit(budgets: &Budgets, slot: UserSlot, now: u64) -> i64 {
    let admitted = budgets.charge(slot, IO).is_ok()
        || budgets.renew(slot, now) && budgets.charge(slot, IO).is_ok();
    i64::from(admitted)
}

/// Returns the sum of all credits and the spare amount.
fn left(budgets: &Budgets) -> i64 {
    let credits = budgets.users.iter().map(|user| user.credit[0].load(Ordering::Relaxed));
    credits.sum::<i64>() + budgets.spare[0].load(Ordering::Relaxed)
}

/// Asserts that users got no more than the quotas of `slices` slices. Less is allowed: unused quota
/// is lost.
fn assert_conserved(budgets: &Budgets, slices: i64, admitted: i64) {
    let (given, accounted) = (slices * ONE / 2, admitted * ONE + left(budgets));
    assert!(accounted <= given, "{accounted} of {given}");
    assert!(!budgets.renewing.load(Ordering::Relaxed));
}

#[test]
fn a_slice_s_quota_is_given_once() {
    loom::model(|| {
        let budgets = budgets();
        let users = [1, 2].map(|user| budgets.add_user(user));
        let other = thread::spawn({
            let budgets = Arc::clone(&budgets);
            move || submit(&budgets, users[1], 1)
        });
        let own = submit(&budgets, users[0], 1);
        let admitted = own + other.join().unwrap();
        assert_conserved(&budgets, 1, admitted);
        // A reactor that was refused is served in the next slice.
        let admitted = admitted + submit(&budgets, users[0], 2);
        assert_conserved(&budgets, 2, admitted);
    });
}

#[test]
fn slices_that_reactors_see_in_any_order_are_given_once() {
    loom::model(|| {
        let budgets = budgets();
        let users = [1, 2].map(|user| budgets.add_user(user));
        let other = thread::spawn({
            let budgets = Arc::clone(&budgets);
            move || submit(&budgets, users[1], 2)
        });
        let own = submit(&budgets, users[0], 1);
        assert_conserved(&budgets, 2, own + other.join().unwrap());
    });
}

/// A user without channels keeps what it owes, and loses what it has.
#[test]
fn a_debt_stays_with_its_user() {
    loom::model(|| {
        let budgets = budgets();
        let user = budgets.add_user(1);
        assert_eq!(budgets.add_user(1), user);
        let leave = move |budgets: &Budgets| {
            budgets.charge_anyway(user, IO);
            budgets.remove_user(user);
        };
        let other = thread::spawn({
            let budgets = Arc::clone(&budgets);
            move || leave(&budgets)
        });
        leave(&budgets);
        other.join().unwrap();
        assert_eq!(left(&budgets), -2 * ONE);
        assert_eq!(budgets.add_user(2), UserSlot(1), "the slot is not free");
        assert_eq!(budgets.add_user(1), user);
    });
}

#[test]
fn users_that_come_at_the_same_time_get_slots_of_their_own() {
    loom::model(|| {
        let budgets = budgets();
        let other = thread::spawn({
            let budgets = Arc::clone(&budgets);
            move || [2, 2].map(|user| budgets.add_user(user))
        });
        let own = budgets.add_user(1);
        let others = other.join().unwrap();
        assert_eq!(others[0], others[1]);
        assert_ne!(own, others[0]);
        assert_eq!(budgets.users[others[0].0].owner.load(Ordering::Relaxed), 2 << 32 | 2);
    });
}
