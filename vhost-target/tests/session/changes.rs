//! Parameters, memory, the dirty log, the in-flight area and the config space.

use std::os::fd::AsFd;
use std::sync::Arc;

use closer::ForeignFd;
use guest_memory::testing::memfd;
use guest_memory::{DirtyLog, RegionSpec, Unmapper};
use reactor::EventFd;
use vhost_target::notify::{BackendChannel, CallFd};
use vhost_target::session::{Effect, Phase, Session, Violation};
use virtqueue::QUEUES_MAX;
use virtqueue::inflight::{Area, AreaSpec, Tracker};

use super::scene::{
    LOG_ALL, OFFERED, Offered, PACKED, USER, addrs, memory, running, session_of, set_up, start,
};

pub(crate) fn parameters_that_cannot_change_while_started<D: Offered>() {
    let mut session = running::<D>();
    assert!(matches!(session.set_num(0, 64), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_base(0, 0), Err(Violation::RingRunning(0))));
    assert!(matches!(session.set_addrs(0, addrs(3)), Err(Violation::RingRunning(0))));
    session.set_addrs(0, addrs(0)).expect("the same addresses again, as QEMU sends");
    assert!(matches!(session.set_features(0), Err(Violation::FeaturesRunning(..))));
    session.set_features(OFFERED).expect("the same features again");
}

pub(crate) fn invalid_parameters_are_refused<D: Offered>() {
    let mut session = session_of::<D>(OFFERED);
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

pub(crate) fn memory_and_call_changes_reach_running_rings_only<D: Offered>() {
    let mut session = running::<D>();
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

pub(crate) fn only_logging_is_switched_while_running<D: Offered>() {
    let mut session = session_of::<D>(OFFERED | LOG_ALL);
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
pub(crate) fn all_memory_is_marked_when_earlier_io_has_ended<D: Offered>() {
    let with = |features| {
        let mut session = session_of::<D>(OFFERED | LOG_ALL);
        session.set_memory(memory(0x10000)).unwrap();
        session.set_features(features).unwrap();
        session.set_log(log());
        session
    };
    let mut session = with(OFFERED | LOG_ALL);
    assert!(session.is_affected_by_earlier_io());
    assert_eq!(session.earlier_io_ended(true, true), [Effect::MarkAll]);
    assert_eq!(session.earlier_io_ended(true, false), [Effect::MarkAll]);
    assert_eq!(session.earlier_io_ended(false, false), [], "its own log has all marks");
    let mut session = with(OFFERED);
    assert!(!session.is_affected_by_earlier_io());
    assert_eq!(session.earlier_io_ended(true, false), [], "logging is off");
    session.reset_device();
    assert_eq!(session.await_reset(true), []);
    assert!(session.is_affected_by_earlier_io());
    let mut session = with(OFFERED | LOG_ALL);
    session.reset_device();
    assert_eq!(session.await_reset(true), []);
    assert_eq!(session.earlier_io_ended(true, true), [Effect::MarkAll], "some I/O is left");
    assert_eq!(session.earlier_io_ended(true, false), [Effect::MarkAll, Effect::Acknowledge]);
}

/// A ring that was reset keeps its view, and the log of that view.
pub(crate) fn all_memory_is_marked_when_a_ring_has_drained_that_was_reset<D: Offered>() {
    let mut session = session_of::<D>(OFFERED | LOG_ALL);
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
pub(crate) fn a_config_change_is_pending_until_it_is_announced<D: Offered>() {
    let channel = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let channel = BackendChannel::from_front_end(ForeignFd::alone(theirs.into())).unwrap();
        (ours, channel)
    };
    let due = |session: &Session| session.config_to_announce().is_some();
    let (_ours, theirs) = channel();
    let mut session = running::<D>();
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

pub(crate) fn an_area_stays_until_it_is_replaced<D: Offered>() {
    let mut session = running::<D>();
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

pub(crate) fn an_area_may_come_before_the_features<D: Offered>() {
    for packed in [0, PACKED] {
        let mut session = session_of::<D>(OFFERED | PACKED);
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

pub(crate) fn memory_may_be_removed_when_no_started_ring_is_in_it<D: Offered>() {
    let mut session = running::<D>();
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

/// The session shows the device's config space. If a write to it changes the device, running rings
/// get new views.
pub(crate) fn a_write_to_the_config_space_reaches_running_rings<D: Offered>() {
    let offered = OFFERED | D::FEATURES;
    let device = D::create();
    let features = device.features();
    assert_eq!(features & offered, offered, "the device offers what the tests negotiate");
    let mut session = Session::new(features | PACKED, QUEUES_MAX, device.connect());
    session.set_memory(memory(0x10000)).unwrap();
    session.set_features(offered).unwrap();
    for ring in 0..2 {
        set_up(&mut session, ring);
    }
    start(&mut session, 1);
    assert!(session.device_view().is_some());
    let before = session.config();
    assert_eq!(before.len(), D::CONFIG_BYTES);
    let (offset, contents, changes) = D::CHANGE;
    let effects = if changes { vec![Effect::Publish(1)] } else { vec![] };
    assert_eq!(session.write_config(offset, contents), effects);
    assert_eq!(session.config() != before, changes);
    assert_eq!(session.write_config(offset, contents), [], "no change");
    // Beyond the end.
    assert_eq!(session.write_config(4096, contents), []);
    assert!(session.device_view().is_some());
}
