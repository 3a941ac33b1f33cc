//! The load, and that it finds what it should find.

use std::os::unix::fs::FileExt;

use bench::{Idle, Load, LoadOptions, Summary};
use front_end::{GuestRam, Options, QueueOptions};

use crate::fixture::Daemon;

fn clean(summary: &Summary) {
    let Summary { errors, mismatches, outstanding, .. } = summary;
    assert_eq!((errors, mismatches, outstanding), (&0, &0, &0), "{:?}", summary.first_problem);
}

fn runs(indirect: bool, idle: Idle, queues: u16) {
    let daemon = Daemon::start(queues);
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let wanted = QueueOptions { indirect, ..QueueOptions::default() };
    let queues = front_end.start_new(usize::from(queues), wanted).unwrap();
    let options = LoadOptions { depth: 16, blocks: 8..500, idle, ..LoadOptions::default() };
    let load = Load::start(queues, options).unwrap();
    load.wait_for(2000).unwrap();
    let seen = load.completed();
    assert!(seen >= 2000);
    let (summary, queues) = load.stop().unwrap();
    assert!(summary.completed >= seen);
    clean(&summary);
    // The indices count modulo 65536.
    let stopped = front_end.stop().unwrap();
    let total: u16 = stopped.iter().fold(0, |sum, &base| sum.wrapping_add(base));
    assert_eq!(total, (summary.completed & 0xffff) as u16);
    assert!(queues.iter().all(|queue| queue.in_flight() == 0));
}

#[test]
fn verified_over_one_queue() {
    runs(false, Idle::Sleep, 1);
}

#[test]
fn verified_over_four_queues_with_indirect_tables() {
    runs(true, Idle::Sleep, 4);
}

#[test]
fn verified_and_spinning() {
    runs(false, Idle::Spin, 2);
}

// Not tried here: version 7.2 of the daemon answers GET_VRING_BASE before its requests are done, and
// unmaps memory that they use.
#[test]
fn goes_on_while_call_fds_change() {
    let daemon = Daemon::start(2);
    let ram = GuestRam::new(&[32 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let queues = front_end.start_new(2, QueueOptions::default()).unwrap();
    let load = Load::start(queues, LoadOptions::default()).unwrap();
    for _ in 0..50 {
        front_end.change_call_fd(0).unwrap();
        front_end.change_call_fd(1).unwrap();
        load.wait_for(20).unwrap();
    }
    let (summary, _) = load.stop().unwrap();
    clean(&summary);
}

#[test]
fn a_limit_is_kept_and_each_request_timed() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    let options = LoadOptions { limit: Some(777), latencies: true, ..LoadOptions::default() };
    let (summary, _) = Load::start(queues, options).unwrap().finish().unwrap();
    clean(&summary);
    assert_eq!((summary.completed, summary.latencies_ns.len()), (777, 777));
}

#[test]
fn a_changed_block_is_found() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    // So few blocks that each is soon read.
    let options = LoadOptions { depth: 1, blocks: 0..2, ..LoadOptions::default() };
    let load = Load::start(queues, options).unwrap();
    load.wait_for(20).unwrap();
    let disk = std::fs::File::options().write(true).open(daemon.disk()).unwrap();
    // A write of the load's own may come between this and the next read of the block.
    for _ in 0..200 {
        disk.write_all_at(&[0xff; 8], 4000).unwrap();
        load.wait_for(1).unwrap();
    }
    let (summary, _) = load.stop().unwrap();
    assert!(summary.mismatches > 0);
    assert_eq!(summary.errors, 0);
    assert!(summary.first_problem.unwrap().contains("block 0 should hold version"));
}

#[test]
fn a_load_on_a_dead_back_end_can_be_abandoned() {
    let daemon = Daemon::start(1);
    let ram = GuestRam::new(&[16 << 20]).unwrap();
    let mut front_end = daemon.connect(&ram, Options::default());
    let queues = front_end.start_new(1, QueueOptions::default()).unwrap();
    let load = Load::start(queues, LoadOptions::default()).unwrap();
    load.wait_for(100).unwrap();
    drop(daemon);
    let (summary, queues) = load.abandon().unwrap();
    assert!(summary.completed >= 100 && summary.mismatches == 0);
    assert_eq!(queues[0].in_flight(), summary.outstanding);
    assert!(front_end.stop().is_err(), "nobody answers");
}
