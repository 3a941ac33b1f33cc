//! `vhost` is killed again and again under load, and the guest loses nothing: `ci/crash-loop` does
//! more of the same.
#![expect(clippy::unwrap_used, reason = "tests")]

mod harness;

use bench::crash::{self, Plan};
use front_end::RingLayout;

/// A kill takes some 0.17 s, most of which is the start of the next process.
fn killed_200_times(rings: RingLayout, args: &[&str]) {
    let mut plan = Plan::new(env!("CARGO_BIN_EXE_vhost").into());
    plan.core = usize::from(harness::core_mask() == "0x2");
    plan.rings = rings;
    plan.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    if std::env::var("VHOST_HUGEPAGES").is_ok_and(|v| v == "0") {
        plan.args.extend(["--no-huge", "-s", "256"].map(str::to_owned));
    }
    let toll = crash::run(&plan).unwrap();
    assert!(toll.is_good(), "{toll}");
    assert_eq!(toll.kills, 200);
    println!("{toll}");
}

#[test]
fn split_rings_survive_kills() {
    killed_200_times(RingLayout::Split, &[]);
}

#[test]
fn packed_rings_survive_kills() {
    killed_200_times(RingLayout::Packed, &[]);
}

#[test]
fn reactors_that_sleep_lose_no_kick_over_a_kill() {
    killed_200_times(RingLayout::Split, &["--interrupt-mode"]);
}
