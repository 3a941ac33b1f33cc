//! Every message of the protocol in every state of a connection, as a table: the reply, the effect
//! on the connection, and that all fds and mappings are released.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "protocol/config_space.rs"]
mod config_space;
#[path = "protocol/scene.rs"]
mod scene;
mod wire;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vhost_target::Verdict;
use vhost_target::protocol::request::{
    ADD_MEM_REG, GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS,
    GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_STATUS, GET_VRING_BASE, NET_SET_MTU, REM_MEM_REG,
    RESET_DEVICE, RESET_OWNER, SEND_RARP, SET_BACKEND_REQ_FD, SET_CONFIG, SET_FEATURES,
    SET_INFLIGHT_FD, SET_LOG_BASE, SET_LOG_FD, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES,
    SET_STATUS, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR,
    SET_VRING_KICK, SET_VRING_NUM,
};
use vhost_target::session::Phase;

use guest_memory::testing::memfd;
use scene::{
    Front, Kind, LOG_ALL, NEED_REPLY, RAM_BYTES, STATES, State, World, dup, eventfd, fds, mappings,
    region, table, until,
};

const PACKED: u64 = 1 << 34;

/// A message: its number, its payload, and its fds.
type Sent = (u32, Vec<u8>, Vec<OwnedFd>);

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn number(number: u64) -> Vec<u8> {
    number.to_le_bytes().into()
}

fn add(gpa: u64) -> Vec<u8> {
    [number(0), region(gpa)].concat()
}

fn log(size: u64) -> Vec<u8> {
    [number(size), number(0)].concat()
}

/// Returns the payload of an in-flight area for a ring of 8.
fn area(mmap_size: u64) -> Vec<u8> {
    [number(mmap_size), number(0), vec![1, 0, 8, 0], vec![0; 4]].concat()
}

/// Returns the payload of SET_CONFIG of `wce`.
fn wce(value: u8) -> Vec<u8> {
    [words(&[32, 1, 0]), vec![value]].concat()
}

fn config() -> Vec<u8> {
    [words(&[0, 60, 0]), vec![0; 60]].concat()
}

fn pipe() -> OwnedFd {
    std::io::pipe().unwrap().0.into()
}

fn socket() -> OwnedFd {
    std::os::unix::net::UnixStream::pair().unwrap().0.into()
}

/// The result of each message, in the order of [`STATES`].
///
/// `ok`: done, and acknowledged if the front end wants that. `pass`: left to the transport. `re`: a
/// reply. `fd`: a reply with an fd. `later`: the reply is sent later. `no`: the connection is
/// closed. After it comes the phase of the connection, if it has changed.
#[rustfmt::skip]
fn messages(front: &Front<'_>) -> Vec<(&'static str, Sent, [&'static str; 7])> {
    let ram = || dup(&front.ram);
    let ring = front.ring();
    let none = Vec::new;
    let plain = |request, payload| (request, payload, vec![]);
    let features = |features: u64| plain(SET_FEATURES, number(features));
    vec![
        //                                                                                         New     Ready   Gated   Live    Draining Suspended Closed
        // Negotiation.
        ("features?",               plain(GET_FEATURES, none()),                                  ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("an owner",                plain(SET_OWNER, none()),                                     ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("protocol features?",      plain(GET_PROTOCOL_FEATURES, none()),                         ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("protocol features",       plain(SET_PROTOCOL_FEATURES, number(0)),                      ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("how many queues?",        plain(GET_QUEUE_NUM, none()),                                 ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("the same features",       features(front.features()),                                           ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("other features",          features(1 << 32),                                            ["pass", "pass", "no",   "no",   "no", "pass", "no"]),
        ("logging",                 features(front.features() | LOG_ALL),                                 ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("features not offered",    features(1 << 33),                                            ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("half the features",       plain(SET_FEATURES, vec![0; 4]),                              ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        // Memory.
        ("the same memory",         (SET_MEM_TABLE, table(&[0]), vec![ram()]),                    ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("more memory",             (SET_MEM_TABLE, table(&[0, 0x10_0000]), vec![ram(), ram()]),  ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("memory without the ring", (SET_MEM_TABLE, table(&[0x10_0000]), vec![ram()]),            ["ok",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("memory without an fd",    (SET_MEM_TABLE, table(&[0, 0x10_0000]), vec![ram()]),         ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a pipe as memory",        (SET_MEM_TABLE, table(&[0]), vec![pipe()]),                   ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("how many slots?",         plain(GET_MAX_MEM_SLOTS, none()),                             ["re",   "re",   "re",   "re",   "no", "re",   "no"]),
        ("a region more",           (ADD_MEM_REG, add(0x10_0000), vec![ram()]),                   ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("an overlapping region",     (ADD_MEM_REG, add(0), vec![ram()]),                           ["ok",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a region without an fd",  (ADD_MEM_REG, add(0x10_0000), vec![]),                        ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a region of a short file",(ADD_MEM_REG, add(0x10_0000), vec![memfd(RAM_BYTES - 1)]),    ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("the ring's region gone",  plain(REM_MEM_REG, add(0)),                                   ["no",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("… and an fd with that",   (REM_MEM_REG, add(0), vec![ram()]),                           ["no",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("… and two",               (REM_MEM_REG, add(0), vec![ram(), ram()]),                    ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an unknown region gone", plain(REM_MEM_REG, add(0x10_0000)),                      ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        // Migration, and recovery.
        ("a log",                   (SET_LOG_BASE, log(8), vec![memfd(8)]),                       ["re",   "re",   "re",   "re",   "no", "re",   "no"]),
        ("a log of a short file",   (SET_LOG_BASE, log(9), vec![memfd(8)]),                       ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a log of no bytes",       (SET_LOG_BASE, log(0), vec![memfd(8)]),                       ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a log without a file",    plain(SET_LOG_BASE, number(0x7000)),                          ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a log's eventfd",         (SET_LOG_FD, none(), vec![eventfd()]),                        ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("an area?",                plain(GET_INFLIGHT_FD, area(0)),                              ["fd",   "fd",   "fd",   "fd",   "no", "fd",   "no"]),
        ("an area",                 (SET_INFLIGHT_FD, area(0x1000), vec![memfd(0x1000)]),         ["ok",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("an area of a short file", (SET_INFLIGHT_FD, area(0x1000), vec![memfd(64)]),             ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an area with no room",    (SET_INFLIGHT_FD, area(64), vec![memfd(0x1000)]),             ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        // The ring.
        ("a size",                  plain(SET_VRING_NUM, words(&[ring, 4])),                         ["ok",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("no size",                 plain(SET_VRING_NUM, words(&[ring, 0])),                         ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("too large a size",        plain(SET_VRING_NUM, words(&[ring, 32769])),                     ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a size of ring 128",      plain(SET_VRING_NUM, words(&[128, 8])),                       ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("the same addresses",      plain(SET_VRING_ADDR, front.addrs(0)),                              ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("other addresses",         plain(SET_VRING_ADDR, front.addrs(0x100)),                          ["ok",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("a base",                  plain(SET_VRING_BASE, words(&[ring, 7])),                        ["ok",   "ok",   "no",   "no",   "no", "ok",   "no"]),
        ("a call fd",               (SET_VRING_CALL, number(ring.into()), vec![eventfd()]),                 ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("no call fd",              plain(SET_VRING_CALL, number(0x100 + u64::from(ring))),                         ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("a pipe as call fd",       (SET_VRING_CALL, number(ring.into()), vec![pipe()]),                    ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an error fd",             (SET_VRING_ERR, number(ring.into()), vec![eventfd()]),                  ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("a kick fd",               (SET_VRING_KICK, number(ring.into()), vec![eventfd()]),                 ["no",   "ok running", "ok", "ok", "no", "ok running", "no"]),
        ("a socket as kick fd",     (SET_VRING_KICK, number(ring.into()), vec![socket()]),                  ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("enabled",                 plain(SET_VRING_ENABLE, words(&[ring, 1])),                      ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("stop",                    plain(GET_VRING_BASE, words(&[ring, 0])),                        ["re",   "re",   "later quiescing", "later quiescing", "no", "re", "no"]),
        ("stop ring 128",           plain(GET_VRING_BASE, words(&[128, 0])),                      ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        // The device.
        ("config?",                 plain(GET_CONFIG, config()),                                  ["re",   "re",   "re",   "re",   "no", "re",   "no"]),
        ("a cache",                 plain(SET_CONFIG, wce(1)),                                    ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("no cache",                plain(SET_CONFIG, wce(0)),                                    ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("a cache that is a 2",     plain(SET_CONFIG, wce(2)),                                    ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("half a config",           plain(SET_CONFIG, words(&[0, 60, 0])),                        ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("a channel",               (SET_BACKEND_REQ_FD, none(), vec![socket()]),                 ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("an eventfd as channel",   (SET_BACKEND_REQ_FD, none(), vec![eventfd()]),                ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("status?",                 plain(GET_STATUS, none()),                                    ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("status DRIVER_OK",        plain(SET_STATUS, number(15)),                                ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("status 0",                plain(SET_STATUS, number(0)),                                 ["pass", "pass", "pass", "pass", "no", "pass", "no"]),
        ("reset",                   plain(RESET_DEVICE, none()),                                  ["ok",   "ok",   "ok suspended", "ok suspended", "no", "ok", "no"]),
        ("no owner",                plain(RESET_OWNER, none()),                                   ["ok",   "ok",   "ok suspended", "ok suspended", "no", "ok", "no"]),
        ("reset, and say so",       plain(RESET_DEVICE | NEED_REPLY, none()),                     ["re",   "re",   "later quiescing", "later quiescing", "no", "re", "no"]),
        ("no owner, and say so",    plain(RESET_OWNER | NEED_REPLY, none()),                      ["re",   "re",   "later quiescing", "later quiescing", "no", "re", "no"]),
        // Messages for other devices.
        ("RARP",                    plain(SEND_RARP, number(0)),                                  ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("an MTU",                  plain(NET_SET_MTU, number(1500)),                             ["ok",   "ok",   "ok",   "ok",   "no", "ok",   "no"]),
        ("a crypto session",        plain(26, vec![0; 96]),                                       ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an IOTLB entry",          plain(22, vec![0; 40]),                                       ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("postcopy",                plain(28, none()),                                            ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an in-band kick",         plain(35, words(&[ring, 0])),                                    ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
        ("an unknown request",    (4242, vec![7; 64], vec![ram(), pipe()]),                     ["no",   "no",   "no",   "no",   "no", "no",   "no"]),
    ]
}

fn name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Done => "ok",
        Verdict::Pass => "pass",
        Verdict::Reply(_) => "re",
        Verdict::ReplyWithFd(..) => "fd",
        Verdict::Deferred => "later",
        Verdict::Reject => "no",
    }
}

/// Returns the number of rows of the table.
fn rows(world: &World) -> usize {
    let front = world.front(State::New);
    let rows = messages(&front).len();
    front.end();
    rows
}

/// Makes the tests of this file run one at a time, because they count the fds of the process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn every_message_in_every_state_of_a_block_device() {
    every_message_in_every_state(Kind::Block);
}

#[test]
fn every_message_in_every_state_of_a_scsi_device() {
    every_message_in_every_state(Kind::Scsi);
}

fn every_message_in_every_state(kind: Kind) {
    let _alone = alone();
    let world = World::new(kind);
    let mut wrong = vec![];
    for row in 0..rows(&world) {
        for (column, state) in STATES.into_iter().enumerate() {
            let front = world.front(state);
            let (what, (request, payload, fds), expected) = messages(&front).swap_remove(row);
            let verdict = front.send(request, payload, fds);
            let got = name(&verdict);
            drop(verdict);
            if expected[column].ends_with("running") {
                // Its device is opened on another thread.
                until(|| front.phase() == Phase::Running);
            }
            let phase = front.phase();
            let got = match phase == state.phase() {
                true => got.to_owned(),
                false => format!("{got} {}", phase.as_str()),
            };
            if got != expected[column] {
                wrong.push(format!("{what}, {state:?}: {got}, not {}", expected[column]));
            }
            if got == "later quiescing" {
                let (answer, request) = (front.answer(), request & !NEED_REPLY);
                // Of a ring, its number and position; of a reset, 0.
                let stop = request == GET_VRING_BASE;
                let first = if stop { front.ring() } else { 0 };
                assert_eq!(answer[..16], words(&[request, 5, 8, first]), "{what}, {state:?}");
                assert!(stop || answer[16..] == [0; 4], "{what}, {state:?}");
            }
            // Checks the numbers of fds and mappings.
            front.end();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn reply(verdict: Verdict) -> Vec<u8> {
    let Verdict::Reply(payload) = verdict else { panic!("{verdict:?}") };
    payload
}

#[test]
fn payloads_of_replies() {
    let _alone = alone();
    let world = World::new(Kind::Block);
    let front = world.front(State::Suspended);
    let ask = |request, payload| front.send(request, payload, vec![]);
    let base = reply(ask(GET_VRING_BASE, words(&[0, 0])));
    assert_eq!(base, words(&[0, 1]), "the position at which the ring stopped");
    assert_eq!(reply(ask(GET_MAX_MEM_SLOTS, vec![])), number(509));
    let log_payload = log(8);
    let answer = reply(front.send(SET_LOG_BASE, log_payload.clone(), vec![memfd(8)]));
    assert_eq!(answer, log_payload, "rust-vmm's front end accepts no other reply");
    let Verdict::ReplyWithFd(payload, fd) = ask(GET_INFLIGHT_FD, area(0)) else { panic!() };
    assert_eq!(payload.len(), 24);
    assert_eq!(payload[8..20], area(0)[8..20], "offset 0, and the requested counts");
    let size = u64::from_le_bytes(*payload.first_chunk().unwrap());
    assert!(File::from(fd).metadata().unwrap().len() >= size && size > 0);
    front.end();
}

#[test]
fn the_guest_switches_the_cache() {
    let _alone = alone();
    let world = World::new(Kind::Block);
    let shown = |front: &Front<'_>| {
        let payload = reply(front.send(GET_CONFIG, config(), vec![]));
        assert_eq!(
            payload[12 + 34..12 + 36],
            [128, 0],
            "the number of queues in the reply to GET_QUEUE_NUM"
        );
        payload[12 + 32]
    };
    let front = world.front(State::Live);
    assert_eq!(shown(&front), 1);
    for (payload, expected) in [
        (wce(2), 1),
        (wce(0), 0),
        ([words(&[0, 8, 0]), vec![1; 8]].concat(), 0),
        ([words(&[30, 4, 0]), vec![9, 9, 1, 9]].concat(), 1),
        ([words(&[33, 1, 0]), vec![0]].concat(), 1),
        (wce(0), 0),
    ] {
        assert!(matches!(front.send(SET_CONFIG, payload, vec![]), Verdict::Done));
        assert_eq!(shown(&front), expected);
    }
    // The guest does not know that the connection is new. The target cannot tell whether it is the
    // same guest.
    let other = world.front(State::New);
    assert_eq!(shown(&other), 0);
    other.tell(SET_CONFIG, wce(1), vec![]);
    assert_eq!((shown(&other), shown(&front)), (1, 0), "each session has its own setting");
    front.leave();
    let front = world.front(State::New);
    assert_eq!((shown(&other), shown(&front)), (1, 0), "the setting that the guest has read");
    front.leave();
    other.end();
}

/// What a killed process has left in flight is not resubmitted for a guest that has reset its
/// device.
#[test]
fn a_device_reset_drops_requests_to_resubmit() {
    let _alone = alone();
    let world = World::in_steps();
    let front = world.front(State::Ready);
    front.offer_io();
    // Version 1, of 8 descriptors; descriptor 0 is in flight.
    let area_file = File::from(memfd(0x1000));
    area_file.write_all_at(&[1, 0, 8, 0], 8).unwrap();
    area_file.write_all_at(&[1], 16).unwrap();
    front.tell(SET_INFLIGHT_FD, area(0x1000), vec![area_file.into()]);
    front.start();
    let verdict = front.send(RESET_DEVICE | NEED_REPLY, vec![], vec![]);
    assert!(matches!(verdict, Verdict::Deferred));
    assert_eq!(front.sent(), [[0; 0]; 0]);
    for _ in 0..2 {
        world.step();
        world.target.process_events();
    }
    // If it had been resubmitted, the disk would have it.
    assert_eq!(front.sent(), [words(&[RESET_DEVICE, 5, 8, 0, 0])]);
}

#[test]
fn requested_areas_use_no_memory() {
    let _alone = alone();
    let world = World::new(Kind::Block);
    let front = world.front(State::New);
    for features in [None, Some(0), Some(PACKED)] {
        if let Some(packed) = features {
            front.tell(SET_FEATURES, number(front.features() | packed), vec![]);
        }
        let before = (fds(), mappings());
        // The largest area, which the front end keeps.
        let payload = [number(0), number(0), vec![16, 0, 0, 128], vec![0; 4]].concat();
        let areas: Vec<File> = (0..64)
            .map(|_| match front.send(GET_INFLIGHT_FD, payload.clone(), vec![]) {
                Verdict::ReplyWithFd(_, fd) => fd.into(),
                verdict => panic!("{verdict:?}"),
            })
            .collect();
        assert_eq!((fds(), mappings()), (before.0 + areas.len(), before.1));
        assert!(areas.iter().all(|area| area.metadata().unwrap().blocks() == 0), "{features:?}");
        drop(areas);
        assert_eq!((fds(), mappings()), before);
    }
    front.end();
}

/// I/O that was submitted under each table hangs and keeps the table mapped.
#[test]
fn mappings_kept_by_io_are_bounded() {
    let _alone = alone();
    let world = World::new(Kind::Block);
    let front = world.front(State::New);
    front.set_up();
    front.tell(SET_VRING_NUM, words(&[0, 256]), vec![]);
    // Without a kick fd, so that the ring is polled.
    front.tell(SET_VRING_KICK, number(0x100), vec![]);
    let mut most = 0;
    let refused = (1..=250_u64).find(|&n| {
        let others = (1..8).map(|k| 0x10_0000 * (8 * n + k));
        let gpas: Vec<u64> = [0].into_iter().chain(others).collect();
        let fds = gpas.iter().map(|_| dup(&front.ram)).collect();
        if matches!(front.send(SET_MEM_TABLE, table(&gpas), fds), Verdict::Reject) {
            return true;
        }
        front.offer_io();
        front.wait_for_io(n);
        most = most.max(mappings());
        false
    });
    assert!(refused.is_some_and(|n| n > 1018 / 7), "table {refused:?}");
    assert!(most <= 1527, "{most}");
    let another = world.front(State::New);
    assert!(matches!(another.send(ADD_MEM_REG, add(0), vec![dup(&another.ram)]), Verdict::Reject));
    another.leave();
    front.end();
}

#[test]
fn memory_slots_are_bounded() {
    let _alone = alone();
    let world = World::new(Kind::Block);
    let front = world.front(State::Live);
    let at = |n: u64| add(0x10_0000 * n);
    let send = |front: &Front<'_>, n| front.send(ADD_MEM_REG, at(n), vec![dup(&front.ram)]);
    for n in 1..509 {
        assert!(matches!(send(&front, n), Verdict::Done), "{n}");
    }
    assert!(matches!(send(&front, 509), Verdict::Reject), "the 510th");
    for n in (1..509).rev() {
        assert!(matches!(front.send(REM_MEM_REG, at(n), vec![]), Verdict::Done), "{n}");
    }
    front.end();
}

/// The reply to a message waits until the change is in effect. The only reactor performs no poll
/// iteration after its first, so the change never takes effect.
#[test]
fn a_change_that_no_reactor_applies_is_refused() {
    let _alone = alone();
    for request in [SET_FEATURES, SET_CONFIG] {
        let world = World::in_steps();
        let front = world.front(State::Ready);
        front.start();
        world.step();
        let payload = match request {
            SET_FEATURES => number(front.features() | LOG_ALL),
            _ => wce(0),
        };
        assert!(matches!(front.send(request, payload, vec![]), Verdict::Reject));
    }
}
