//! Unit attentions: who is told what, which commands they end, and that the tables are bounded.

mod common;

use common::{A, B, End, PORT, Unit, cdb, facts, medium};
use scsi::{
    Attention, Buffers, Fast, LogicalUnit, NEXUSES_MAX, Nexus, Reply, Status, Step, decode, fast,
};

const READY: [u8; 6] = [0; 6];
const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 255, 0];

fn report_luns() -> Vec<u8> {
    cdb(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 12)
}

fn told(attention: Attention) -> End {
    End::Check(attention.sense())
}

#[test]
fn a_new_nexus_is_told_of_the_power_on() {
    let mut unit = Unit::new(facts());
    let (new, quiet) = (Nexus(1), Nexus(2));
    assert!(unit.lu.attach(quiet, false));
    unit.good(quiet, &READY, &[]);
    // INQUIRY, REPORT LUNS and REQUEST SENSE are executed; REQUEST SENSE reports it.
    for _ in 0..2 {
        assert!(matches!(unit.send(new, &INQUIRY, &[]), End::Good(_)));
        assert!(matches!(unit.send(new, &report_luns(), &[]), End::Good(_)));
    }
    assert_eq!(unit.send(new, &medium(0x2a, 0, 0, 1), &[0; 512]), told(Attention::PowerOn));
    unit.good(new, &READY, &[]);
    let End::Good(sense) = unit.send(Nexus(3), &[3, 0, 0, 0, 18, 0], &[]) else {
        panic!("REQUEST SENSE fails");
    };
    assert_eq!((sense[2], sense[12]), (6, 0x29));
    unit.good(Nexus(3), &READY, &[]);
}

#[test]
fn each_nexus_is_told_of_a_change_once() {
    let mut unit = Unit::new(facts());
    unit.lu.resized(2000);
    unit.lu.resized(3000);
    unit.lu.tell(B, Attention::CommandsCleared);
    for nexus in [A, B] {
        assert_eq!(unit.send(nexus, &READY, &[]), told(Attention::CapacityChanged));
    }
    unit.good(A, &READY, &[]);
    assert_eq!(unit.send(B, &[0xff; 6], &[]), told(Attention::CommandsCleared));
    assert_eq!(unit.data(&cdb(&[0x25], 10))[..4], [0, 0, 0x0b, 0xb7]);
    assert_eq!(unit.lu.facts().blocks, 3000);
}

#[test]
fn report_luns_ends_its_own_attention() {
    let mut unit = Unit::new(facts());
    unit.lu.tell_all(Attention::LunsChanged);
    unit.lu.tell(A, Attention::ModeChanged);
    assert!(matches!(unit.send(A, &report_luns(), &[]), End::Good(_)));
    assert_eq!(unit.send(A, &READY, &[]), told(Attention::ModeChanged));
    unit.good(A, &READY, &[]);
    assert_eq!(unit.send(B, &READY, &[]), told(Attention::LunsChanged));
}

#[test]
fn a_reset_does_not_hide_what_was_pending() {
    let mut unit = Unit::new(facts());
    unit.lu.resized(2000);
    unit.lu.reset();
    assert_eq!(unit.send(A, &READY, &[]), told(Attention::Reset));
    assert_eq!(unit.send(A, &READY, &[]), told(Attention::CapacityChanged));
    unit.good(A, &READY, &[]);
}

#[test]
fn the_gate_shows_what_is_pending() {
    let mut unit = Unit::new(facts());
    let read = decode(&medium(0x28, 0, 0, 1)).unwrap();
    let buffers = Buffers { data_in: 512, data_out: 0 };
    let is_slow = |unit: &Unit, nexus| {
        let bits = unit.lu.gate(nexus).to_bits();
        fast(&read, unit.lu.facts(), scsi::Gate::from_bits(bits), buffers) == Fast::Slow
    };
    assert!(!is_slow(&unit, A) && is_slow(&unit, Nexus(9)));
    let mut generation = unit.lu.generation();
    let mut changed = |unit: &Unit| {
        std::mem::replace(&mut generation, unit.lu.generation()) != unit.lu.generation()
    };
    unit.lu.tell(A, Attention::NexusLoss);
    assert!(is_slow(&unit, A) && !is_slow(&unit, B) && changed(&unit));
    unit.send(A, &READY, &[]);
    assert!(!is_slow(&unit, A) && changed(&unit));
    unit.send(A, &[0x1b, 0, 0, 0, 0, 0], &[]);
    assert!(is_slow(&unit, A) && is_slow(&unit, B) && changed(&unit));
    unit.send(A, &[0x1b, 0, 0, 0, 1, 0], &[]);
    assert!(!is_slow(&unit, A) && changed(&unit));
    unit.lu.nexus_lost(A);
    assert!(is_slow(&unit, A) && changed(&unit));
    // Most commands change nothing.
    unit.send(B, &READY, &[]);
    unit.send(B, &medium(0x28, 0, 0, 1), &[]);
    unit.send(B, &INQUIRY, &[]);
    assert!(!changed(&unit));
}

#[test]
fn too_many_nexuses_are_busy() {
    let mut lu = LogicalUnit::new(facts());
    let mut reply = Reply::new();
    for number in 0..NEXUSES_MAX as u64 {
        assert!(lu.attach(Nexus(number), false));
    }
    let late = Nexus(1000);
    assert!(!lu.attach(late, false));
    let step = lu.start(late, PORT, &READY, Buffers::default(), &mut reply);
    assert_eq!((step, reply.status(), reply.sense()), (Step::Done, Status::Busy, None));
    lu.nexus_lost(Nexus(5));
    lu.start(late, PORT, &READY, Buffers::default(), &mut reply);
    assert_eq!(reply.sense(), Some(Attention::PowerOn.sense()));
}
