//! The session's state machine, driven directly: every message in every state.
#![expect(clippy::unwrap_used, reason = "tests")]

mod guest;

use std::os::fd::AsFd;
use std::sync::Arc;

use vhost_blk::foreign::ForeignFd;
use vhost_blk::memory::GuestMemory;
use vhost_blk::notify::{CallFd, EventFd};
use vhost_blk::ring::RingAddrs;
use vhost_blk::session::{Effect, Phase, RingState, Session, Then, Violation};

const OFFERED: u64 = 0x1_7000_0000;
const USER: u64 = 0x7000_0000;

fn memory(len: u64) -> Arc<GuestMemory> {
    guest::memory(len, USER)
}

fn addrs(ring: u64) -> RingAddrs {
    let base = USER + 0x4000 * ring;
    RingAddrs { desc: base, avail: base + 0x1000, used: base + 0x2000 }
}

fn set_up(session: &mut Session, ring: usize) {
    session.set_num(ring, 128).unwrap();
    session.set_base(ring, 7).unwrap();
    session.set_addrs(ring, addrs(ring as u64)).unwrap();
}

/// A session with two rings, started.
fn running() -> Session {
    let mut session = Session::new(OFFERED, true);
    session.set_features(OFFERED).unwrap();
    session.set_memory(memory(0x10000)).unwrap();
    for ring in 0..2 {
        set_up(&mut session, ring);
        assert_eq!(session.set_kick(ring, None).unwrap(), [Effect::Start(ring)]);
    }
    session
}

#[test]
fn a_life() {
    let mut session = Session::new(OFFERED, true);
    assert_eq!(session.phase(), Phase::Negotiating);
    session = running();
    assert_eq!(session.phase(), Phase::Running);
    assert_eq!(session.get_base(0).unwrap(), [Effect::Stop(0)]);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_turn(), Err(Violation::OutOfTurn)));
    assert_eq!(session.drained(0, 42), [Effect::Reply(0, 42)]);
    assert_eq!(session.phase(), Phase::Running, "each ring stops on its own");
    assert_eq!(session.get_base(1).unwrap(), [Effect::Stop(1)]);
    assert_eq!(session.drained(1, 9), [Effect::Reply(1, 9)]);
    assert_eq!(session.phase(), Phase::Suspended);
    assert_eq!(session.get_base(0).unwrap(), [Effect::Reply(0, 42)], "asked again");
    set_up(&mut session, 0);
    assert_eq!(session.set_kick(0, None).unwrap(), [Effect::Start(0)]);
    assert_eq!(session.ring(0).base, 7);
    assert_eq!(session.close(), [Effect::Stop(0)]);
    assert_eq!(session.phase(), Phase::Closed);
    assert!(session.undrained());
    assert_eq!(session.drained(0, 8), [], "nobody is owed an answer");
    assert!(!session.undrained());
}

#[test]
fn a_drain_that_is_reported_twice_answers_once() {
    let mut session = running();
    session.get_base(0).unwrap();
    assert_eq!(session.drained(0, 1), [Effect::Reply(0, 1)]);
    assert_eq!(session.drained(0, 2), []);
    assert_eq!(session.ring(0).base, 1);
}

#[test]
fn closing_while_an_answer_is_owed_cancels_the_answer() {
    let mut session = running();
    session.get_base(0).unwrap();
    assert_eq!(session.close(), [Effect::Stop(1)]);
    assert_eq!(session.drained(0, 3), []);
    assert_eq!(session.drained(1, 3), []);
    assert!(!session.undrained());
}

#[test]
fn rings_wait_at_the_gate() {
    let mut session = Session::new(OFFERED, false);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    set_up(&mut session, 1);
    assert_eq!(session.set_kick(0, None).unwrap(), []);
    assert_eq!(session.set_kick(1, None).unwrap(), []);
    assert_eq!(session.phase(), Phase::Starting);
    // A front end that gives up while it waits has to wait too: the ring is still written to.
    assert_eq!(session.get_base(1).unwrap(), []);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_turn(), Err(Violation::OutOfTurn)));
    assert_eq!(session.open_gate(), [Effect::Start(0), Effect::Start(1)]);
    assert_eq!(session.ring(1).state, RingState::Draining { then: Then::Reply });
    assert_eq!(session.drained(1, 9), [Effect::Reply(1, 9)], "what the reactor has found");
    assert_eq!(session.open_gate(), [], "a gate opens once");
    assert_eq!(session.phase(), Phase::Running);
    set_up(&mut session, 1);
    assert_eq!(session.set_kick(1, None).unwrap(), [Effect::Start(1)]);
}

#[test]
fn closing_at_the_gate_leaves_nothing_to_drain() {
    let mut session = Session::new(OFFERED, false);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    session.set_kick(0, None).unwrap();
    assert_eq!(session.close(), []);
    assert!(!session.undrained());
    assert_eq!(session.open_gate(), []);
}

#[test]
fn a_reset_and_a_restart_while_draining() {
    let mut session = running();
    assert_eq!(session.reset_owner(), [Effect::Stop(0), Effect::Stop(1)]);
    assert!(session.check_turn().is_ok(), "no answer is owed");
    session.set_num(0, 64).unwrap();
    session.set_base(0, 0).unwrap();
    session.set_addrs(0, addrs(0)).unwrap();
    assert_eq!(session.set_kick(0, None).unwrap(), [], "the ring still drains");
    assert_eq!(session.ring(0).state, RingState::Draining { then: Then::Restart });
    let (_, effects) = session.set_memory(memory(0x10000)).unwrap();
    assert_eq!(effects, [], "a ring that drains keeps the view that it has");
    assert_eq!(session.drained(0, 99), [Effect::Start(0)]);
    assert_eq!(session.ring(0).base, 0, "what was set since the reset stays");
    assert_eq!(session.drained(1, 5), []);
}

#[test]
fn what_cannot_change_while_running() {
    let mut session = running();
    assert!(matches!(session.set_num(0, 64), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_base(0, 0), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_addrs(0, addrs(3)), Err(Violation::RingRunning(0))));
    session.set_addrs(0, addrs(0)).expect("the same addresses again, as QEMU sends");
    assert!(matches!(session.set_features(0), Err(Violation::FeaturesRunning(..))));
    session.set_features(OFFERED).expect("the same features again");
}

#[test]
fn what_is_never_taken() {
    let mut session = Session::new(OFFERED, true);
    assert!(matches!(session.set_features(1 << 60), Err(Violation::FeaturesNotOffered(_))));
    for ring in [128, 255, usize::MAX] {
        assert!(matches!(session.set_num(ring, 128), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.get_base(ring), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.set_kick(ring, None), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.set_call(ring, None), Err(Violation::NoSuchRing(_))));
    }
    for num in [0, 3, 0x1_0000, 1 << 16, u32::MAX] {
        assert!(matches!(session.set_num(0, num), Err(Violation::Ring(_))), "{num}");
    }
    assert!(matches!(session.set_kick(0, None), Err(Violation::NotSetUp(0))), "no memory");
    session.set_memory(memory(0x4000)).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::NotSetUp(0))), "no addresses");
    session.set_addrs(0, addrs(0)).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::Ring(_))), "no size");
    session.set_num(0, 128).unwrap();
    session.set_addrs(0, addrs(1)).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::Ring(_))), "not in memory");
    assert!(!session.undrained());
}

#[test]
fn memory_and_call_changes_reach_running_rings_only() {
    let mut session = running();
    session.get_base(1).unwrap();
    session.drained(1, 7);
    let (before, effects) = session.set_memory(memory(0x20000)).unwrap();
    assert!(before.is_some());
    assert_eq!(effects, [Effect::Publish(0)]);
    let fd = EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap();
    let call = CallFd::from_front_end(ForeignFd::new(fd)).unwrap();
    assert_eq!(session.set_call(0, Some(call)).unwrap(), [Effect::Publish(0)]);
    assert_eq!(session.set_call(1, None).unwrap(), []);
    assert_eq!(session.set_kick(0, None).unwrap(), [Effect::Publish(0)], "kicked again");
    let smaller = session.set_memory(memory(0x2000));
    assert!(matches!(smaller, Err(Violation::Ring(_))), "ring 0 would be gone");
    assert_eq!(session.memory().unwrap().size_bytes(), 0x20000, "the old one stays");
}
