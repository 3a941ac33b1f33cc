//! The session's state machine, driven directly: every message in every state.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::fd::AsFd;
use std::sync::Arc;

use closer::ForeignFd;
use guest_memory::DirtyLog;
use guest_memory::Unmapper;
use guest_memory::testing::{flat_at, memfd};
use guest_memory::{GuestMemory, RegionSpec};
use reactor::EventFd;
use vhost_target::device::Negotiated;
use vhost_target::device_queue::DeviceView;
use vhost_target::notify::{BackendChannel, CallFd};
use vhost_target::session::{Effect, Phase, RingState, Session, Then, Violation};
use virtqueue::inflight::{Area, AreaSpec, Tracker};
use virtqueue::{Layout, QUEUES_MAX, RingAddrs};

const OFFERED: u64 = 0x1_7000_0000;
const LOG_ALL: u64 = 1 << 26;
const PACKED: u64 = 1 << 34;
const USER: u64 = 0x7000_0000;

/// A device that accepts any features and has no config space.
#[derive(Debug)]
struct Plain;

impl Negotiated for Plain {
    fn set_features(&mut self, _: u64) {}
    fn read_config(&self) -> Vec<u8> {
        vec![]
    }
    fn write_config(&mut self, _: u32, _: &[u8]) -> bool {
        false
    }
    fn view(&self) -> Option<DeviceView> {
        None
    }
}

fn session_of(offered: u64) -> Session {
    Session::new(offered, QUEUES_MAX, Box::new(Plain))
}

fn memory(len: u64) -> Arc<GuestMemory> {
    flat_at(len, USER)
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

/// Starts a ring whose gate opens at once.
fn start(session: &mut Session, ring: usize) {
    assert_eq!(session.set_kick(ring, None).unwrap(), [Effect::Gate(ring)]);
    assert!(session.open_gate(ring));
    assert_eq!(session.ring(ring).state, RingState::Opening);
    assert!(session.opened(ring));
}

/// Returns a session with two started rings.
fn running() -> Session {
    let mut session = session_of(OFFERED);
    session.set_features(OFFERED).unwrap();
    session.set_memory(memory(0x10000)).unwrap();
    for ring in 0..2 {
        set_up(&mut session, ring);
        start(&mut session, ring);
    }
    session
}

#[test]
fn start_stop_and_restart() {
    let mut session = session_of(OFFERED);
    assert_eq!(session.phase(), Phase::Negotiating);
    session = running();
    assert_eq!(session.phase(), Phase::Running);
    assert_eq!(session.get_base(0).unwrap(), [Effect::Stop(0)]);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_no_pending_reply(), Err(Violation::ReplyPending)));
    assert_eq!(session.drained(0, 42), [Effect::Reply(0, 42)]);
    assert_eq!(session.phase(), Phase::Running, "each ring stops on its own");
    assert_eq!(session.get_base(1).unwrap(), [Effect::Stop(1)]);
    assert_eq!(session.drained(1, 9), [Effect::Reply(1, 9)]);
    assert_eq!(session.phase(), Phase::Suspended);
    assert_eq!(session.get_base(0).unwrap(), [Effect::Reply(0, 42)], "requested again");
    set_up(&mut session, 0);
    start(&mut session, 0);
    assert_eq!(session.ring(0).base, 7);
    assert_eq!(session.close(), [Effect::Stop(0)]);
    assert_eq!(session.phase(), Phase::Closed);
    assert!(session.undrained());
    assert_eq!(session.drained(0, 8), [], "no reply is pending");
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
fn closing_cancels_a_pending_reply() {
    let mut session = running();
    session.get_base(0).unwrap();
    assert_eq!(session.close(), [Effect::Stop(1)]);
    assert_eq!(session.drained(0, 3), []);
    assert_eq!(session.drained(1, 3), []);
    assert!(!session.undrained());
}

#[test]
fn gated_rings_wait() {
    let mut session = session_of(OFFERED);
    session.set_memory(memory(0x10000)).unwrap();
    for ring in 0..3 {
        set_up(&mut session, ring);
        assert_eq!(session.set_kick(ring, None).unwrap(), [Effect::Gate(ring)]);
    }
    assert_eq!(session.phase(), Phase::Starting);
    assert!(session.open_gate(2), "each ring has its own gate");
    assert_eq!(session.phase(), Phase::Starting, "its device is not open");
    assert!(session.opened(2));
    assert_eq!(session.phase(), Phase::Running);
    // A gated ring that is stopped waits as well: earlier I/O still writes to the ring.
    assert_eq!(session.get_base(1).unwrap(), []);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_no_pending_reply(), Err(Violation::ReplyPending)));
    assert_eq!(session.gated().collect::<Vec<_>>(), [0, 1]);
    for ring in 0..2 {
        assert!(session.open_gate(ring));
        assert!(!session.open_gate(ring), "a gate opens once");
        assert!(session.opened(ring));
    }
    assert_eq!(session.ring(1).state, RingState::Draining { then: Then::Reply });
    assert_eq!(
        session.drained(1, 9),
        [Effect::Reply(1, 9)],
        "the position that the reactor has read"
    );
    assert_eq!(session.phase(), Phase::Running);
    set_up(&mut session, 1);
    start(&mut session, 1);
}

#[test]
fn closing_while_gated_leaves_nothing_to_drain() {
    let mut session = session_of(OFFERED);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    session.set_kick(0, None).unwrap();
    assert_eq!(session.close(), []);
    assert!(!session.undrained());
    assert_eq!(session.gated().next(), None);
    assert!(!session.open_gate(0));
}

/// A ring whose device is being opened has nothing in flight.
#[test]
fn messages_that_end_an_opening() {
    let opening = || {
        let mut session = session_of(OFFERED);
        session.set_memory(memory(0x10000)).unwrap();
        set_up(&mut session, 0);
        session.set_kick(0, None).unwrap();
        session.open_gate(0);
        assert!(session.is_opening(0) && !session.undrained());
        assert_eq!(session.started(), 1);
        session
    };
    let mut session = opening();
    assert_eq!(session.close(), []);
    assert!(
        !session.undrained() && !session.opened(0),
        "the ring does not wait for the opening any more"
    );
    let mut session = opening();
    assert_eq!(session.reset_device(), []);
    assert!(!session.is_opening(0));
    assert_eq!(session.set_kick(0, None).unwrap(), [Effect::Gate(0)], "a new start");
    let mut session = opening();
    assert!(matches!(session.set_num(0, 64), Err(Violation::RingRunning(0))));
    assert_eq!(session.set_call(0, None).unwrap(), [], "there is no view to replace");
    assert_eq!(session.set_memory(memory(0x10000)).unwrap().1, []);
    assert_eq!(session.get_base(0).unwrap(), [], "only a reactor may read the ring");
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_no_pending_reply(), Err(Violation::ReplyPending)));
    assert!(session.opened(0) && !session.opened(0));
    assert_eq!(session.ring(0).state, RingState::Draining { then: Then::Reply });
    assert_eq!(session.drained(0, 9), [Effect::Reply(0, 9)]);
    let mut session = opening();
    session.start_failed(0);
    assert_eq!(session.ring(0).state, RingState::Stopped);
}

#[test]
fn a_reset_and_a_restart_while_draining() {
    let mut session = running();
    assert_eq!(session.reset_owner(), [Effect::Stop(0), Effect::Stop(1)]);
    assert!(session.check_no_pending_reply().is_ok(), "no reply is pending");
    session.set_num(0, 64).unwrap();
    session.set_base(0, 0).unwrap();
    session.set_addrs(0, addrs(0)).unwrap();
    assert_eq!(session.set_kick(0, None).unwrap(), [], "the ring still drains");
    assert_eq!(session.ring(0).state, RingState::Draining { then: Then::Restart });
    let (_, effects) = session.set_memory(memory(0x10000)).unwrap();
    assert_eq!(effects, [], "a draining ring keeps its view");
    assert_eq!(session.drained(0, 99), [Effect::Gate(0)]);
    assert!(session.open_gate(0));
    assert!(session.opened(0));
    assert_eq!(session.ring(0).base, 0, "values set since the reset stay");
    assert_eq!(session.drained(1, 5), []);
}

/// The reply to GET_VRING_BASE is about the ring that was started last, even while the previous one
/// still drains.
#[test]
fn a_restart_that_is_stopped_while_the_ring_still_drains() {
    for packed in [0, PACKED] {
        let mut session = session_of(OFFERED | PACKED);
        session.set_features(OFFERED).unwrap();
        session.set_memory(memory(0x10000)).unwrap();
        set_up(&mut session, 0);
        start(&mut session, 0);
        assert_eq!(session.reset_owner(), [Effect::Stop(0)]);
        session.set_features(OFFERED | packed).unwrap();
        session.set_base(0, 5).unwrap();
        assert_eq!(session.set_kick(0, None).unwrap(), [], "the ring still drains");
        assert_eq!(session.get_base(0).unwrap(), []);
        assert_eq!(session.phase(), Phase::Quiescing);
        assert_eq!(session.drained(0, 99), [Effect::Gate(0)], "the old position is not reported");
        assert_eq!(session.phase(), Phase::Quiescing);
        assert!(session.open_gate(0));
        assert!(session.opened(0));
        let base = if packed == 0 { 5 } else { 0x5_0005 };
        assert_eq!(session.drained(0, 5), [Effect::Reply(0, base)]);
        assert_eq!(session.phase(), Phase::Suspended);
    }
    let mut session = running();
    session.reset_device();
    session.set_kick(0, None).unwrap();
    session.get_base(0).unwrap();
    assert_eq!(session.close(), [], "the ring was told to stop already");
    assert_eq!(session.drained(0, 99), [], "no reply is pending");
    assert!(session.undrained(), "ring 1");
}

#[test]
fn a_ring_that_was_reset_keeps_its_view_until_it_has_drained() {
    let mut session = running();
    assert_eq!(session.reset_owner(), [Effect::Stop(0), Effect::Stop(1)]);
    session.set_num(0, 64).unwrap();
    assert_eq!(session.get_base(0).unwrap(), [], "the reply waits");
    let (_, effects) = session.set_memory(memory(0x10000)).unwrap();
    assert_eq!(effects, [], "the view of the reset ring stays");
    assert_eq!(session.set_call(0, None).unwrap(), []);
    assert_eq!(session.drained(0, 99), [Effect::Reply(0, 99)]);
    start(&mut session, 0);
    assert_eq!(
        session.set_call(0, None).unwrap(),
        [Effect::Publish(0)],
        "the ring is started again"
    );
}

#[test]
fn parameters_that_cannot_change_while_started() {
    let mut session = running();
    assert!(matches!(session.set_num(0, 64), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_base(0, 0), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_addrs(0, addrs(3)), Err(Violation::RingRunning(0))));
    session.set_addrs(0, addrs(0)).expect("the same addresses again, as QEMU sends");
    assert!(matches!(session.set_features(0), Err(Violation::FeaturesRunning(..))));
    session.set_features(OFFERED).expect("the same features again");
}

#[test]
fn invalid_parameters_are_refused() {
    let mut session = session_of(OFFERED);
    assert!(matches!(session.set_features(1 << 60), Err(Violation::FeaturesNotOffered(_))));
    for ring in [128, 255, usize::MAX] {
        assert!(matches!(session.set_num(ring, 128), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.get_base(ring), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.set_kick(ring, None), Err(Violation::NoSuchRing(_))));
        assert!(matches!(session.set_call(ring, None), Err(Violation::NoSuchRing(_))));
    }
    for num in [0, 32_769, 1 << 16, u32::MAX] {
        assert!(matches!(session.set_num(0, num), Err(Violation::Ring(_))), "{num}");
    }
    assert!(matches!(session.set_kick(0, None), Err(Violation::NotSetUp(0))), "no memory");
    session.set_memory(memory(0x4000)).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::NotSetUp(0))), "no addresses");
    session.set_addrs(0, addrs(0)).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::Ring(_))), "no size");
    session.set_num(0, 100).unwrap();
    assert!(matches!(session.set_kick(0, None), Err(Violation::Ring(_))), "no split ring's size");
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
    let call = CallFd::from_front_end(ForeignFd::alone(fd)).unwrap();
    assert_eq!(session.set_call(0, Some(call)).unwrap(), [Effect::Publish(0)]);
    assert_eq!(session.set_call(1, None).unwrap(), []);
    assert_eq!(session.set_kick(0, None).unwrap(), [Effect::Publish(0)], "kicked again");
    let smaller = session.set_memory(memory(0x2000));
    assert!(matches!(smaller, Err(Violation::Ring(_))), "ring 0 would be gone");
    assert_eq!(session.memory().unwrap().size_bytes(), 0x20000, "the previous memory stays");
}

fn log() -> Arc<DirtyLog> {
    let (fd, unmapper) = (ForeignFd::alone(memfd(4096)), Unmapper::start().unwrap());
    Arc::new(DirtyLog::map(&fd, 0, 4096, &unmapper).unwrap())
}

#[test]
fn only_logging_is_switched_while_running() {
    let mut session = session_of(OFFERED | LOG_ALL);
    session.set_memory(memory(0x10000)).unwrap();
    session.set_features(OFFERED).unwrap();
    for ring in 0..2 {
        set_up(&mut session, ring);
    }
    start(&mut session, 0);
    let (first, second) = (log(), log());
    assert_eq!(session.set_log(Arc::clone(&first)), [], "logging is off");
    assert!(session.log().is_none());
    assert_eq!(session.set_features(OFFERED | LOG_ALL).unwrap(), [Effect::Publish(0)]);
    assert!(Arc::ptr_eq(session.log().unwrap(), &first));
    assert_eq!(session.set_features(OFFERED | LOG_ALL).unwrap(), [], "no change");
    assert_eq!(session.set_log(Arc::clone(&second)), [Effect::Publish(0)]);
    assert!(Arc::ptr_eq(session.log().unwrap(), &second));
    session.get_base(0).unwrap();
    assert_eq!(session.set_log(first), [Effect::Publish(0)], "its I/O still completes");
    assert!(session.set_features(LOG_ALL).is_err(), "more than logging");
    session.drained(0, 7);
    assert_eq!(session.set_features(OFFERED).unwrap(), []);
    assert!(session.log().is_none());
    session.set_features(OFFERED | LOG_ALL).unwrap();
    assert!(session.log().is_some(), "logging is switched on again with the same log");
    session.reset_owner();
    session.set_features(OFFERED | LOG_ALL).unwrap();
    assert!(session.log().is_none(), "a reset of the owner drops the log");
}

/// I/O in flight of a closed connection does not mark pages in a log that was set later.
#[test]
fn all_memory_is_marked_when_earlier_io_has_ended() {
    let with = |features| {
        let mut session = session_of(OFFERED | LOG_ALL);
        session.set_memory(memory(0x10000)).unwrap();
        session.set_features(features).unwrap();
        session.set_log(log());
        session
    };
    let mut session = with(OFFERED | LOG_ALL);
    assert!(session.minds_earlier_io());
    assert_eq!(session.earlier_io_ended(true, true), [Effect::MarkAll]);
    assert_eq!(session.earlier_io_ended(true, false), [Effect::MarkAll]);
    assert_eq!(session.earlier_io_ended(false, false), [], "its own log has all marks");
    let mut session = with(OFFERED);
    assert!(!session.minds_earlier_io());
    assert_eq!(session.earlier_io_ended(true, false), [], "logging is off");
    session.reset_device();
    assert_eq!(session.await_reset(true), []);
    assert!(session.minds_earlier_io());
    let mut session = with(OFFERED | LOG_ALL);
    session.reset_device();
    assert_eq!(session.await_reset(true), []);
    assert_eq!(session.earlier_io_ended(true, true), [Effect::MarkAll], "some I/O is left");
    assert_eq!(session.earlier_io_ended(true, false), [Effect::MarkAll, Effect::Acknowledge]);
}

/// A ring that was reset keeps its view, and the log of that view.
#[test]
fn all_memory_is_marked_when_a_ring_has_drained_that_was_reset() {
    let mut session = session_of(OFFERED | LOG_ALL);
    session.set_memory(memory(0x10000)).unwrap();
    session.set_features(OFFERED).unwrap();
    for ring in 0..4 {
        set_up(&mut session, ring);
        start(&mut session, ring);
    }
    session.reset_owner();
    assert_eq!(session.drained(3, 9), [], "logging is off");
    assert_eq!(session.set_log(log()), []);
    assert_eq!(session.set_features(OFFERED | LOG_ALL).unwrap(), []);
    assert_eq!(session.drained(2, 9), [], "once for all rings");
    session.set_kick(1, None).unwrap();
    assert_eq!(session.drained(1, 9), [Effect::Gate(1)]);
    session.open_gate(1);
    assert!(session.opened(1));
    session.get_base(0).unwrap();
    assert_eq!(session.drained(0, 9), [Effect::MarkAll, Effect::Reply(0, 9)]);
    session.get_base(1).unwrap();
    assert_eq!(session.drained(1, 9), [Effect::Reply(1, 9)], "the ring was started again");
}

/// A new size of the disk is announced once, in whatever state the front end was.
#[test]
fn a_config_change_is_pending_until_it_is_announced() {
    let channel = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let channel = BackendChannel::from_front_end(ForeignFd::alone(theirs.into())).unwrap();
        (ours, channel)
    };
    let due = |session: &Session| session.config_to_announce().is_some();
    let (_ours, theirs) = channel();
    let mut session = running();
    session.config_changed();
    assert!(!due(&session), "no channel");
    session.set_backend_channel(theirs);
    assert!(due(&session));
    session.config_announced();
    assert!(!due(&session), "announced only once");
    session.get_base(0).unwrap();
    session.config_changed();
    assert!(!due(&session), "the front end waits for a reply");
    session.drained(0, 1);
    assert!(due(&session), "ring 1 runs");
    session.get_base(1).unwrap();
    session.drained(1, 1);
    assert!(!due(&session), "the session is suspended");
    session.set_kick(0, None).unwrap();
    assert_eq!(session.phase(), Phase::Starting);
    assert!(due(&session), "also while a ring is gated");
    session.reset_device();
    assert!(!due(&session));
    start(&mut session, 0);
    assert!(due(&session), "the change was not announced meanwhile");
    session.close();
    assert!(!due(&session));
}

fn area() -> Arc<Area> {
    let (fd, unmapper) = (ForeignFd::alone(memfd(0x10000)), Unmapper::start().unwrap());
    let spec = AreaSpec { mmap_size: 0x10000, mmap_offset: 0, num_queues: 2, queue_size: 128 };
    Arc::new(Area::map(spec, &fd, &unmapper).unwrap())
}

#[test]
fn an_area_stays_until_it_is_replaced() {
    let mut session = running();
    assert!(matches!(session.set_inflight(area()), Err(Violation::AreaRunning)));
    for ring in 0..2 {
        session.get_base(ring).unwrap();
        session.drained(ring, 9);
    }
    session.set_inflight(area()).unwrap();
    start(&mut session, 0);
    session.reset_device();
    session.drained(0, 0);
    assert!(session.inflight().is_none(), "a reset drops the in-flight area");
    session.set_inflight(area()).unwrap();
    session.reset_owner();
    assert!(session.inflight().is_none());
}

#[test]
fn an_area_may_come_before_the_features() {
    for packed in [0, PACKED] {
        let mut session = session_of(OFFERED | PACKED);
        assert!(session.may_be_packed(), "no features were negotiated");
        session.set_inflight(area()).unwrap();
        session.set_features(OFFERED | packed).unwrap();
        assert_eq!(session.may_be_packed(), packed != 0);
        assert!(session.inflight().is_some(), "{packed:#x}");
        session.set_features(OFFERED | packed ^ PACKED).unwrap();
        let area = session.inflight().unwrap();
        assert!(Tracker::split(area, 0, 128, 0).is_some());
        session.set_features(packed ^ PACKED).unwrap();
        assert!(session.inflight().is_some(), "of the same layout");
        session.set_features(packed).unwrap();
        assert!(session.inflight().is_none(), "its contents are of the other layout");
    }
}

#[test]
fn a_packed_ring_has_two_positions() {
    let mut session = session_of(OFFERED | PACKED);
    session.set_features(OFFERED | PACKED).unwrap();
    assert_eq!(session.layout(), Layout { packed: true, event_idx: true });
    session.set_memory(memory(0x10000)).unwrap();
    for base in [0x8000_8000, 0x8000] {
        session.set_base(0, base).unwrap();
        assert_eq!(session.ring(0).base, 0x8000, "{base:#x}");
        assert_eq!(session.get_base(0).unwrap(), [Effect::Reply(0, 0x8000_8000)]);
    }
    session.set_num(0, 100).unwrap();
    session.set_addrs(0, addrs(0)).unwrap();
    session.set_kick(0, None).expect("a packed ring has any size");
    session.open_gate(0);
    assert!(session.opened(0));
    session.get_base(0).unwrap();
    assert_eq!(session.drained(0, 0x0007), [Effect::Reply(0, 0x0007_0007)]);
}

/// RESET_OWNER clears the features, which determine the format of the position.
#[test]
fn a_packed_ring_that_was_reset_has_two_positions() {
    let started = || {
        let mut session = session_of(OFFERED | PACKED);
        session.set_features(OFFERED | PACKED).unwrap();
        session.set_memory(memory(0x10000)).unwrap();
        set_up(&mut session, 0);
        start(&mut session, 0);
        session
    };
    let mut session = started();
    session.get_base(0).unwrap();
    session.drained(0, 0x8009);
    session.reset_owner();
    assert_eq!(session.get_base(0).unwrap(), [Effect::Reply(0, 0x8009_8009)], "requested again");
    let mut session = started();
    session.reset_owner();
    assert_eq!(session.get_base(0).unwrap(), []);
    assert_eq!(session.drained(0, 0x8009), [Effect::Reply(0, 0x8009_8009)]);
    // The front end may have negotiated other features by then.
    let mut session = started();
    session.reset_owner();
    session.set_features(OFFERED).unwrap();
    session.set_kick(0, None).unwrap();
    session.get_base(0).unwrap();
    assert_eq!(session.drained(0, 0x8009), [Effect::Gate(0)]);
    session.open_gate(0);
    assert!(session.opened(0));
    assert_eq!(session.drained(0, 9), [Effect::Reply(0, 9)], "the ring was a split ring");
}

#[test]
fn a_reset_is_acknowledged_when_all_rings_have_drained() {
    let mut session = running();
    session.reset_owner();
    assert_eq!(session.reset_device(), [Effect::Reset(0), Effect::Reset(1)], "a second reset");
    assert_eq!(session.await_reset(false), []);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert!(matches!(session.check_no_pending_reply(), Err(Violation::ReplyPending)));
    assert_eq!(session.drained(1, 9), []);
    assert_eq!(session.drained(0, 9), [Effect::Acknowledge]);
    assert_eq!(session.drained(0, 9), [], "the reset is acknowledged once");
    assert_eq!(session.phase(), Phase::Suspended);
    assert_eq!(session.reset_device(), [], "nothing runs");
    assert_eq!(session.await_reset(false), [Effect::Acknowledge]);
    // A reset without NEED_REPLY is not acknowledged.
    set_up(&mut session, 0);
    start(&mut session, 0);
    assert_eq!(session.reset_device(), [Effect::Reset(0)]);
    assert!(session.check_no_pending_reply().is_ok());
    assert_eq!(session.drained(0, 9), []);
    // A connection that is closed meanwhile gets no reply.
    start(&mut session, 0);
    session.reset_device();
    session.await_reset(false);
    session.close();
    assert_eq!(session.phase(), Phase::Closed);
    assert_eq!(session.drained(0, 9), []);
}

/// I/O in flight of an earlier connection may use this guest's memory.
#[test]
fn a_reset_waits_for_earlier_io() {
    let mut session = session_of(OFFERED);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    session.set_kick(0, None).unwrap();
    assert_eq!(session.reset_device(), []);
    assert_eq!(session.await_reset(true), []);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert_eq!(session.earlier_io_ended(true, false), [Effect::Acknowledge]);
    assert_eq!(session.phase(), Phase::Suspended);
}

#[test]
fn memory_may_be_removed_when_no_started_ring_is_in_it() {
    let mut session = running();
    let no_memory = || {
        let spec = RegionSpec { gpa: 0, size: 0x10000, user_addr: USER, offset: 0 };
        Arc::new(memory(0x10000).without_region(spec).unwrap())
    };
    assert!(
        session.set_memory(no_memory()).is_err(),
        "two started rings are in the previous memory"
    );
    assert_eq!(session.reset_device(), [Effect::Reset(0), Effect::Reset(1)]);
    session.set_memory(no_memory()).expect("reset rings keep their views");
    assert!(
        matches!(session.set_kick(0, None), Err(Violation::Ring(_))),
        "the ring is not in memory"
    );
    assert_eq!(session.features(), OFFERED, "RESET_DEVICE keeps the features");
}
