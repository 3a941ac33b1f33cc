//! `vhost` is killed again and again under load, and the guest loses nothing: `ci/crash-loop` does
//! more of the same.

use bench::crash::{self, Device, Plan, Toll};
use front_end::RingLayout;

use crate::support::harness;

/// A kill takes some 0.17 s, most of which is the start of the next process.
fn killed(kills: u64, device: Device, rings: RingLayout, args: &[&str]) -> Toll {
    let mut plan = Plan::new(env!("CARGO_BIN_EXE_vhost").into());
    plan.core = usize::from(harness::core_mask() == "0x2");
    (plan.kills, plan.device, plan.rings) = (kills, device, rings);
    plan.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    if std::env::var("VHOST_HUGEPAGES").is_ok_and(|v| v == "0") {
        plan.args.extend(["--no-huge", "-s", "256"].map(str::to_owned));
    }
    let toll = crash::run(&plan).unwrap();
    assert!(toll.is_good(), "{toll}");
    assert_eq!(toll.kills, kills);
    println!("{toll}");
    toll
}

#[test]
fn split_rings_survive_kills() {
    killed(50, Device::Blk, RingLayout::Split, &[]);
}

#[test]
fn packed_rings_survive_kills() {
    killed(50, Device::Blk, RingLayout::Packed, &[]);
}

#[test]
fn reactors_that_sleep_lose_no_kick_over_a_kill() {
    killed(50, Device::Blk, RingLayout::Split, &["--interrupt-mode"]);
}

/// The nexus of each process is a new one, so at most one command in each gets a unit attention.
fn scsi_commands_survive_kills(rings: RingLayout) {
    let toll = killed(50, Device::Scsi { target: 5 }, rings, &[]);
    assert!((1..=toll.kills + 1).contains(&toll.attentions), "{toll}");
}

#[test]
fn scsi_commands_in_split_rings_survive_kills() {
    scsi_commands_survive_kills(RingLayout::Split);
}

#[test]
fn scsi_commands_in_packed_rings_survive_kills() {
    scsi_commands_survive_kills(RingLayout::Packed);
}
