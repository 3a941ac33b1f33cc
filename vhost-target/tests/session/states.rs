//! Starts, stops and resets of rings: every message in every state.

use vhost_target::session::{Effect, Phase, RingState, Then, Violation};
use virtqueue::Layout;

use super::scene::{OFFERED, Offered, PACKED, addrs, memory, running, session_of, set_up, start};

pub(crate) fn start_stop_and_restart<D: Offered>() {
    let mut session = session_of::<D>(OFFERED);
    assert_eq!(session.phase(), Phase::Negotiating);
    session = running::<D>();
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

pub(crate) fn a_drain_that_is_reported_twice_answers_once<D: Offered>() {
    let mut session = running::<D>();
    session.get_base(0).unwrap();
    assert_eq!(session.drained(0, 1), [Effect::Reply(0, 1)]);
    assert_eq!(session.drained(0, 2), []);
    assert_eq!(session.ring(0).base, 1);
}

pub(crate) fn closing_cancels_a_pending_reply<D: Offered>() {
    let mut session = running::<D>();
    session.get_base(0).unwrap();
    assert_eq!(session.close(), [Effect::Stop(1)]);
    assert_eq!(session.drained(0, 3), []);
    assert_eq!(session.drained(1, 3), []);
    assert!(!session.undrained());
}

pub(crate) fn gated_rings_wait<D: Offered>() {
    let mut session = session_of::<D>(OFFERED);
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

pub(crate) fn closing_while_gated_leaves_nothing_to_drain<D: Offered>() {
    let mut session = session_of::<D>(OFFERED);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    session.set_kick(0, None).unwrap();
    assert_eq!(session.close(), []);
    assert!(!session.undrained());
    assert_eq!(session.gated().next(), None);
    assert!(!session.open_gate(0));
}

/// A ring whose device is being opened has nothing in flight.
pub(crate) fn messages_that_end_an_opening<D: Offered>() {
    let opening = || {
        let mut session = session_of::<D>(OFFERED);
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

pub(crate) fn a_reset_and_a_restart_while_draining<D: Offered>() {
    let mut session = running::<D>();
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
pub(crate) fn a_restart_that_is_stopped_while_the_ring_still_drains<D: Offered>() {
    for packed in [0, PACKED] {
        let mut session = session_of::<D>(OFFERED | PACKED);
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
    let mut session = running::<D>();
    session.reset_device();
    session.set_kick(0, None).unwrap();
    session.get_base(0).unwrap();
    assert_eq!(session.close(), [], "the ring was told to stop already");
    assert_eq!(session.drained(0, 99), [], "no reply is pending");
    assert!(session.undrained(), "ring 1");
}

pub(crate) fn a_ring_that_was_reset_keeps_its_view_until_it_has_drained<D: Offered>() {
    let mut session = running::<D>();
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

pub(crate) fn a_packed_ring_has_two_positions<D: Offered>() {
    let mut session = session_of::<D>(OFFERED | PACKED);
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
pub(crate) fn a_packed_ring_that_was_reset_has_two_positions<D: Offered>() {
    let started = || {
        let mut session = session_of::<D>(OFFERED | PACKED);
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

pub(crate) fn a_reset_is_acknowledged_when_all_rings_have_drained<D: Offered>() {
    let mut session = running::<D>();
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
pub(crate) fn a_reset_waits_for_earlier_io<D: Offered>() {
    let mut session = session_of::<D>(OFFERED);
    session.set_memory(memory(0x10000)).unwrap();
    set_up(&mut session, 0);
    session.set_kick(0, None).unwrap();
    assert_eq!(session.reset_device(), []);
    assert_eq!(session.await_reset(true), []);
    assert_eq!(session.phase(), Phase::Quiescing);
    assert_eq!(session.earlier_io_ended(true, false), [Effect::Acknowledge]);
    assert_eq!(session.phase(), Phase::Suspended);
}
