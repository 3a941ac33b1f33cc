//! File disks and reactors that sleep: completions by an engine or by a disk's thread wake
//! them, and a disk that hangs keeps no reactor awake and makes no poll iteration long.
#![expect(clippy::cast_possible_truncation, reason = "sizes of small disks")]

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::disks;
use crate::support::harness::{self, Launch, Vhost, wait_until};
use crate::support::real_disks::{
    self, BLOCK, DISK_BYTES, FLAVOURS, Flavour, Guest, Io, Neighbours,
};
use crate::support::slow_files::{Kind, Op, SlowFiles};

/// Reactors that sleep at once, and after a while.
const MODES: [&[&str]; 2] = [&["--interrupt-mode"], &["--reactor-idle-us", "20"]];
const KINDS: [Kind; 3] = [Kind::Direct, Kind::PageCache, Kind::Uncached];

/// The causes that `docs/src/reactors.md` lists.
const CAUSES: [&str; 6] = ["fetch", "complete", "call", "adopt", "stop", "poll_set"];

fn reactors(vhost: &Vhost) -> Vec<Value> {
    let reactors = vhost.ok("vhost_get_reactor_turns", json!({}));
    reactors.as_array().unwrap().clone()
}

fn number(reactor: &Value, field: &str) -> u64 {
    reactor[field].as_u64().unwrap_or_else(|| panic!("{field} in {reactor}"))
}

/// One request at a time and all kinds of them: whatever completes, the reactor sleeps before and
/// has to be woken.
fn completions_wake(vhost: &Vhost, bdev: &str) {
    let mut guest = Guest::on(vhost, bdev);
    let slept = number(&reactors(vhost)[0], "sleeps");
    for _ in 0..10 {
        guest.goes_on();
    }
    assert!(number(&reactors(vhost)[0], "sleeps") > slept, "it sleeps between requests");
    // And many at once.
    for round in 0..50 {
        let begun: Vec<_> = (0..30)
            .flat_map(|n| {
                [
                    guest.begin(Io::Write, 100 + n, round),
                    guest.begin(Io::Flush, 0, 0),
                    guest.begin(Io::Zeroes, 200 + n, 0),
                ]
            })
            .collect();
        guest.wait_for(&begun);
        guest.give_back(begun);
    }
    assert!(guest.read(100).iter().all(|byte| *byte == 49));
    guest.leaves(vhost);
}

#[test]
fn every_completion_wakes_a_reactor_that_sleeps() {
    for args in MODES {
        let vhost = Vhost::start(args);
        for flavour in FLAVOURS {
            let file = vhost.file("disk", DISK_BYTES);
            flavour.create(&vhost, "F", file.as_ref());
            completions_wake(&vhost, "F");
            flavour.delete(&vhost, "F");
        }
        assert_eq!(vhost.stop(), 0);
    }
}

#[test]
fn so_do_threads_that_wait_for_a_file_system() {
    for args in MODES {
        let vhost = Vhost::start(args);
        for kind in KINDS {
            let Some(files) = SlowFiles::mount(&[("disk", kind, DISK_BYTES)]) else { return };
            for flavour in FLAVOURS {
                flavour.create(&vhost, "F", &files.path("disk"));
                completions_wake(&vhost, "F");
                flavour.delete(&vhost, "F");
            }
        }
        assert_eq!(vhost.stop(), 0);
    }
}

/// A reactor sleeps while its disk hangs, and the answer wakes it.
#[test]
fn a_disk_that_hangs_keeps_no_reactor_awake() {
    for flavour in FLAVOURS {
        let vhost = Vhost::start(MODES[0]);
        let files = SlowFiles::mount(&[("disk", Kind::Direct, DISK_BYTES)]);
        let Some(files) = files else { return };
        flavour.create(&vhost, "F", &files.path("disk"));
        let mut neighbours = Neighbours::new(&vhost, flavour);
        let mut guest = Guest::on(&vhost, "F");
        for (io, op) in [
            (Io::Read, Op::Read),
            (Io::Write, Op::Write),
            (Io::Flush, Op::Fsync),
            (Io::Zeroes, Op::Fallocate),
        ] {
            guest.works();
            files.hold("disk", op);
            let begun = guest.begin(io, 1000, 0x21);
            files.wait_for_held("disk", op, 1);
            neighbours.go_on();
            let sleeps = || {
                let reactors = reactors(&vhost);
                (number(&reactors[0], "sleeps"), number(&reactors[0], "turns"))
            };
            // Calls of the operator alone do not wake it.
            wait_until("it stays asleep", || {
                let before = sleeps();
                (0..50).all(|_| sleeps() == before)
            });
            guest.has_nothing();
            files.release("disk", op);
            guest.wait_for(&[begun]);
        }
        guest.leaves(&vhost);
        neighbours.leave(&vhost);
        assert_eq!(vhost.stop(), 0);
    }
}

/// A queue is moved with a request in flight that hangs: the reactor that has the queue then is
/// told of its end.
#[test]
fn a_queue_moves_while_its_request_hangs() {
    for args in [&[][..], MODES[0], MODES[1]] {
        for flavour in FLAVOURS {
            let vhost = Launch::new().mask(harness::two_cores()).args(args).start();
            let files = SlowFiles::mount(&[("disk", Kind::Direct, DISK_BYTES)]);
            let Some(files) = files else { return };
            flavour.create(&vhost, "F", &files.path("disk"));
            let mut guest = Guest::on(&vhost, "F");
            for (io, op) in [(Io::Read, Op::Read), (Io::Write, Op::Write), (Io::Flush, Op::Fsync)] {
                files.hold("disk", op);
                let begun = guest.begin(io, 1000, 0x42);
                files.wait_for_held("disk", op, 1);
                for core in [0, 1, 0, 1, 1] {
                    let to = json!({"ctrlr": guest.controller(), "queue": 0, "core": core});
                    assert_eq!(vhost.ok("vhost_move_queue", to), json!(true));
                    let queue = disks::sessions(&vhost, guest.controller())[0]["queues"][0].clone();
                    assert_eq!((&queue["core"], &queue["inflight"]), (&json!(core), &json!(1)));
                }
                guest.has_nothing();
                files.release("disk", op);
                guest.wait_for(&[begun]);
                guest.goes_on();
            }
            let at = (1000 * BLOCK) as usize;
            assert!(files.contents("disk")[at..at + BLOCK as usize].iter().all(|b| *b == 0x42));
            guest.leaves(&vhost);
            assert_eq!(vhost.stop(), 0);
        }
    }
}

/// The same under load, with threads that do all I/O.
#[test]
fn queues_move_under_load() {
    for args in [&[][..], MODES[0], MODES[1]] {
        let vhost = Launch::new().mask(harness::two_cores()).args(args).start();
        for kind in KINDS {
            let Some(files) = SlowFiles::mount(&[("disk", kind, DISK_BYTES)]) else { return };
            Flavour::Aio.create(&vhost, "F", &files.path("disk"));
            real_disks::queues_move(&vhost, "F", 100);
            Flavour::Aio.delete(&vhost, "F");
        }
        assert_eq!(vhost.stop(), 0);
    }
}

/// While a disk hangs, its reactor continues to poll. It reports the causes of its longest poll
/// iteration.
#[test]
fn poll_iterations_continue_while_a_disk_hangs() {
    for flavour in FLAVOURS {
        let vhost = Vhost::start(&[]);
        let files = SlowFiles::mount(&[("disk", Kind::Direct, DISK_BYTES)]);
        let Some(files) = files else { return };
        flavour.create(&vhost, "F", &files.path("disk"));
        let mut guest = Guest::on(&vhost, "F");
        for (io, op) in [(Io::Read, Op::Read), (Io::Write, Op::Write), (Io::Flush, Op::Fsync)] {
            vhost.ok("vhost_get_reactor_turns", json!({"reset": true}));
            files.hold("disk", op);
            let begun = guest.begin(io, 1000, 0x21);
            files.wait_for_held("disk", op, 1);
            let before = number(&reactors(&vhost)[0], "turns");
            wait_until("a thousand poll iterations", || {
                number(&reactors(&vhost)[0], "turns") > before + 1000
            });
            assert_eq!(files.held("disk", op), 1);
            guest.has_nothing();
            let during = reactors(&vhost);
            files.release("disk", op);
            guest.wait_for(&[begun]);
            for reactor in during.iter().chain(&reactors(&vhost)) {
                assert!(
                    reactor["longest_turn_us"].as_f64().is_some_and(|us| us > 0.0),
                    "{reactor}"
                );
                let causes = reactor["causes"].as_array().unwrap();
                let names: BTreeSet<_> = causes.iter().map(|c| c.as_str().unwrap()).collect();
                assert!(names.iter().all(|name| CAUSES.contains(name)), "{reactor}");
            }
        }
        guest.leaves(&vhost);
        assert_eq!(vhost.stop(), 0);
    }
}
