use super::*;

const IOS: usize = 0;
const BYTES: usize = 1;

/// A user that always has I/O of one size to submit.
struct Load {
    slot: UserSlot,
    costs: [u64; LIMITS],
    /// I/Os that were admitted.
    done: u64,
    /// Attempts in each slice, in which it may be more eager than others.
    attempts: u32,
}

impl Load {
    fn new(budgets: &Budgets, number: u32, bytes: u64) -> Self {
        let slot = budgets.add_user(number);
        Self { slot, costs: [1, bytes, bytes, 0], done: 0, attempts: 10_000 }
    }

    fn bytes(&self) -> u64 {
        self.done * self.costs[BYTES]
    }

    /// Submits in slice `now` until it is refused.
    fn submit(&mut self, budgets: &Budgets, now: u64) {
        for _ in 0..self.attempts {
            let admitted = budgets.charge(self.slot, self.costs).or_else(|refused| {
                budgets.renew(self.slot, now).then_some(()).ok_or(refused)?;
                budgets.charge(self.slot, self.costs)
            });
            if admitted.is_err() {
                return;
            }
            self.done += 1;
        }
    }
}

fn limited(rates: [u64; LIMITS]) -> Budgets {
    let budgets = Budgets::new(8);
    budgets.set_rates(rates, 1);
    budgets
}

fn run(budgets: &Budgets, loads: &mut [Load], slices: std::ops::Range<u64>) {
    for now in slices {
        loads.iter_mut().for_each(|load| load.submit(budgets, now));
    }
}

/// Asserts that `value` differs from `expected` by at most one in `part`.
fn assert_near(value: u64, expected: u64, part: u64) {
    assert!(value.abs_diff(expected) <= expected / part + 1, "{value} instead of {expected}");
}

#[test]
fn one_user_gets_the_exact_rate() {
    for rate in [1, 30, 999, 1000, 1500, 2_000, 123_456] {
        let budgets = limited([rate, 0, 0, 0]);
        let mut loads = [Load::new(&budgets, 1, 4096)];
        run(&budgets, &mut loads, 1..10_001);
        assert_near(loads[0].done, rate * 10, 1000);
    }
}

#[test]
fn large_ios_run_into_debt_and_pay_it() {
    // 1 MiB/s: a read of 64 KiB passes every 62.5 slices.
    let budgets = limited([0, 1 << 20, 0, 0]);
    let mut loads = [Load::new(&budgets, 1, 1 << 16)];
    loads[0].submit(&budgets, 1);
    assert_eq!(loads[0].done, 1);
    run(&budgets, &mut loads, 2..63);
    assert_eq!(loads[0].done, 1, "61 slices pay for less than the first");
    run(&budgets, &mut loads, 63..1001);
    assert_near(loads[0].done, 16, 1000);
}

#[test]
fn users_get_equal_shares_however_eager_they_are_and_whatever_their_sizes() {
    for (sizes, rates, of_bytes) in [
        ([4096, 4096, 4096], [2_000, 0, 0, 0], false),
        ([512, 4096, 65536], [2_000, 0, 0, 0], false),
        ([4096, 65536, 1 << 20], [0, 10 << 20, 0, 0], true),
        ([512, 1024, 65536], [0, 0, 100 << 20, 0], true),
        // Fewer I/Os per slice than users.
        ([4096, 4096, 4096], [100, 0, 0, 0], false),
    ] {
        let budgets = limited(rates);
        let mut loads: Vec<_> =
            sizes.iter().zip(1..).map(|(bytes, n)| Load::new(&budgets, n, *bytes)).collect();
        run(&budgets, &mut loads, 1..20_001);
        let amounts: Vec<u64> =
            loads.iter().map(|l| if of_bytes { l.bytes() } else { l.done }).collect();
        let rate = rates.iter().max().unwrap();
        for amount in &amounts {
            assert_near(*amount, rate * 20 / 3, 20);
        }
        assert_near(amounts.iter().sum(), rate * 20, 50);
    }
}

#[test]
fn what_one_user_does_not_want_others_get() {
    let budgets = limited([10_000, 0, 0, 0]);
    let mut loads = [Load::new(&budgets, 1, 512), Load::new(&budgets, 2, 512)];
    loads[0].attempts = 1; // a tenth of the rate
    run(&budgets, &mut loads, 1..10_001);
    assert_near(loads[0].done, 10_000, 100);
    assert_near(loads[1].done, 90_000, 50);
}

#[test]
fn a_user_below_the_limit_is_never_refused_when_it_is_alone() {
    let budgets = limited([10_000, 0, 0, 0]);
    let mut load = Load::new(&budgets, 1, 512);
    load.attempts = 9;
    run(&budgets, std::slice::from_mut(&mut load), 1..1001);
    assert_eq!(load.done, 9_000);
}

#[test]
fn unused_quota_is_lost() {
    let budgets = limited([10_000, 0, 0, 0]);
    let mut load = Load::new(&budgets, 1, 512);
    load.attempts = 3;
    load.submit(&budgets, 1);
    load.attempts = 100;
    load.submit(&budgets, 5_000);
    assert_eq!(load.done, 3 + 7 + 10, "what was left, and the quota of one slice");
}

#[test]
fn slices_are_made_up_for_when_somebody_waited_in_them() {
    let budgets = limited([10_000, 0, 0, 0]);
    let mut load = Load::new(&budgets, 1, 512);
    load.submit(&budgets, 1);
    load.submit(&budgets, 4);
    assert_eq!(load.done, 40, "refused in slice 1, so slices 2, 3 and 4 count");
    load.submit(&budgets, 1_000_000);
    assert_eq!(load.done, 40 + 10 * CATCH_UP);
}

#[test]
fn a_refused_io_is_charged_for_no_limit() {
    let budgets = limited([1_000_000, 1000, 0, 0]);
    let mut load = Load::new(&budgets, 1, 4096);
    run(&budgets, std::slice::from_mut(&mut load), 1..3);
    assert_eq!(load.done, 1);
    let ios = |budgets: &Budgets| {
        let credit = budgets.users[load.slot.0].credit[IOS].load(Ordering::Relaxed);
        credit + budgets.spare[IOS].load(Ordering::Relaxed)
    };
    let before = ios(&budgets);
    assert_eq!(budgets.charge(load.slot, load.costs), Err(Refused));
    assert_eq!(ios(&budgets), before);
}

/// A user's debt outlives its channels and is paid from its own share.
#[test]
fn a_debt_outlives_the_user_s_channels() {
    let budgets = limited([1_000, 0, 0, 0]);
    let slot = budgets.add_user(1);
    for _ in 0..100 {
        budgets.charge_anyway(slot, [1, 0, 0, 0]);
    }
    budgets.remove_user(slot);
    let mut loads = [Load::new(&budgets, 2, 512), Load::new(&budgets, 1, 512)];
    assert_eq!((loads[0].slot.0, loads[1].slot), (1, slot), "the slot is not free");
    assert!(budgets.has_forced_debt(slot) && !budgets.has_forced_debt(loads[0].slot));
    run(&budgets, &mut loads, 1..201);
    assert_eq!(loads[1].done, 0, "200 half slices pay for the 100 I/Os");
    assert_near(loads[0].done, 100, 20);
    run(&budgets, &mut loads, 201..221);
    assert_near(loads[1].done, 10, 5);
    assert!(!budgets.has_forced_debt(slot));
}

/// A user that ran into debt and does not want anything now pays from its share.
#[test]
fn a_debtor_pays_and_others_do_not_wait_for_it() {
    let budgets = limited([0, 1 << 20, 0, 0]);
    let debtor = budgets.add_user(1);
    budgets.charge_anyway(debtor, [1, 1 << 20, 0, 0]);
    let mut load = Load::new(&budgets, 2, 512);
    run(&budgets, std::slice::from_mut(&mut load), 1..2_001);
    assert_near(load.bytes(), 1 << 20, 50);
    assert!(budgets.users[debtor.0].credit[BYTES].load(Ordering::Relaxed) >= 0);
}

#[test]
fn channels_of_one_user_share_a_slot_and_the_last_slot_is_everybody_s() {
    let budgets = limited([1_000, 0, 0, 0]);
    let budgets = Budgets { users: (0..3).map(|_| User::default()).collect(), ..budgets };
    let slots = [7, 8, 7, 9, 10].map(|number| budgets.add_user(number));
    assert_eq!(slots.map(|slot| slot.0), [0, 1, 0, 2, 2]);
    budgets.remove_user(slots[0]);
    assert_eq!(budgets.add_user(11), UserSlot(2), "user 7 has another channel");
    budgets.remove_user(slots[2]);
    assert_eq!(budgets.add_user(11), UserSlot(0));
    budgets.charge_anyway(slots[1], [1, 0, 0, 0]);
    budgets.remove_user(slots[1]);
    assert_eq!(budgets.add_user(12), UserSlot(2), "user 8 has a debt");
    assert_eq!(budgets.add_user(8), slots[1]);
}

#[test]
fn a_limit_that_is_removed_leaves_no_debt() {
    let budgets = limited([1_000, 0, 0, 0]);
    let mut load = Load::new(&budgets, 1, 512);
    for _ in 0..1000 {
        budgets.charge_anyway(load.slot, load.costs);
    }
    budgets.set_rates([0; LIMITS], 2);
    assert!(!budgets.is_limited());
    load.submit(&budgets, 2);
    assert_eq!(load.done, u64::from(load.attempts));
    budgets.set_rates([1_000, 0, 0, 0], 3);
    load.submit(&budgets, 3);
    assert_eq!(load.done, u64::from(load.attempts) + 1);
}

/// A light user beside one that sends a huge read now and then.
#[test]
fn a_huge_io_is_the_debt_of_its_user_only() {
    let budgets = limited([0, 100 << 20, 0, 0]);
    let (mut light, mut huge) = (Load::new(&budgets, 1, 4096), Load::new(&budgets, 2, 1 << 30));
    (light.attempts, huge.attempts) = (2, 1); // 8 MiB/s of 100 MiB/s
    let (mut longest, mut without) = (0, 0);
    for now in 1..60_001 {
        let before = light.done;
        light.submit(&budgets, now);
        without = if light.done == before { without + 1 } else { 0 };
        longest = longest.max(without);
        if huge.done <= now / 10_500 {
            huge.submit(&budgets, now);
        }
    }
    assert!(huge.done > 3 && longest <= 2, "{} huge I/Os, {longest} slices without any", huge.done);
}

/// A user that stops and starts its rings all the time cannot take what others want.
#[test]
fn forced_io_is_the_debt_of_its_user_only() {
    let budgets = limited([1_000, 0, 0, 0]);
    let mut other = Load::new(&budgets, 9, 512);
    for now in 1..10_001 {
        if now % 10 == 0 {
            let slot = budgets.add_user(1);
            for _ in 0..256 {
                budgets.charge_anyway(slot, [1, 0, 0, 0]);
            }
            budgets.remove_user(slot);
        }
        other.submit(&budgets, now);
    }
    assert!(other.done >= 4_900, "{}", other.done);
}

#[test]
fn a_charge_is_given_back_to_where_it_came_from() {
    let budgets = limited([0, 10 << 20, 0, 0]);
    let (slot, costs) = (budgets.add_user(1), [1, 1 << 30, 1 << 30, 0]);
    assert_eq!(budgets.charge(slot, costs), Err(Refused));
    assert!(budgets.renew(slot, 1));
    let amounts = || {
        let credit = &budgets.users[slot.0].credit[BYTES];
        (budgets.spare[BYTES].load(Ordering::Relaxed), credit.load(Ordering::Relaxed))
    };
    let before = amounts();
    let charge = budgets.charge(slot, costs).unwrap();
    assert_ne!(amounts(), before);
    budgets.give_back(slot, charge);
    assert_eq!(amounts(), before);
}

#[test]
fn a_user_that_asks_less_often_gets_the_same() {
    for every in [1, 2, 3, 5] {
        let budgets = limited([10_000, 0, 0, 0]);
        let [mut often, mut seldom] = [1, 2].map(|user| Load::new(&budgets, user, 512));
        for now in 1..10_001 {
            often.submit(&budgets, now);
            if now % every == 0 {
                seldom.submit(&budgets, now);
            }
        }
        assert_near(often.done, 50_000, 20);
        assert_near(seldom.done, 50_000, 20);
    }
}

#[test]
fn skipped_slices_count_for_all_limits() {
    for step in [1, 2, 3, 5] {
        let budgets = limited([10_000, 4096 * 10_000, 0, 0]);
        let mut load = Load::new(&budgets, 1, 4096);
        (1..10_001).step_by(step).for_each(|now| load.submit(&budgets, now));
        assert_near(load.done, 100_000, 100);
    }
}

#[test]
fn a_wait_that_ended_claims_no_slices() {
    let restarts: [fn(&Budgets, UserSlot); 3] = [
        |budgets, _| {
            budgets.set_rates([0; LIMITS], 2);
            budgets.set_rates([10_000, 0, 0, 0], 1_000_000);
        },
        |budgets, slot| budgets.remove_user(slot),
        |budgets, slot| budgets.stop_waiting(slot),
    ];
    for restart in restarts {
        let budgets = limited([10_000, 0, 0, 0]);
        let mut first = Load::new(&budgets, 1, 512);
        first.submit(&budgets, 1);
        restart(&budgets, first.slot);
        let mut load = Load::new(&budgets, 2, 512);
        load.submit(&budgets, 1_000_000);
        assert_eq!(load.done, 10);
    }
}
