//! Reservations: what each service action does, and which commands conflict.

mod common;

use common::{A, B, End, Unit, cdb, facts, medium};
use scsi::sense::{Code, Key};
use scsi::table::{Access, Kind, TABLE};
use scsi::{Attention, Fast, Nexus, REGISTRATIONS_MAX, Sense, Status, decode, fast};

const C: Nexus = Nexus(0xc);
const CONFLICT: End = End::Status(Status::ReservationConflict);

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const TYPES: [u8; 6] = [1, 3, 5, 6, 7, 8];

impl Unit {
    fn out(&mut self, nexus: Nexus, action: u8, kind: u8, key: u64, new_key: u64) -> End {
        self.out_with(nexus, action, kind, key, new_key, 0)
    }

    fn out_with(
        &mut self,
        nexus: Nexus,
        action: u8,
        kind: u8,
        key: u64,
        new_key: u64,
        flags: u8,
    ) -> End {
        let list = [&key.to_be_bytes()[..], &new_key.to_be_bytes(), &[0; 4], &[flags, 0, 0, 0]];
        let cdb = cdb(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24], 10);
        self.send(nexus, &cdb, &list.concat())
    }

    fn done(&mut self, nexus: Nexus, action: u8, kind: u8, key: u64, new_key: u64) {
        assert_eq!(self.out(nexus, action, kind, key, new_key), End::Good(vec![]));
    }

    fn persistent_in(&mut self, action: u8) -> Vec<u8> {
        self.data(&cdb(&[0x5e, action, 0, 0, 0, 0, 0, 0x10], 10))
    }

    fn keys(&mut self) -> Vec<u64> {
        let data = self.persistent_in(0);
        data[8..]
            .chunks(8)
            .map(|key| u64::from_be_bytes(key.try_into().expect("8 bytes")))
            .collect()
    }

    fn generation(&mut self) -> u32 {
        u32::from_be_bytes(self.persistent_in(0)[..4].try_into().expect("4 bytes"))
    }

    /// The key and the type of the reservation.
    fn held(&mut self) -> Option<(u64, u8)> {
        let data = self.persistent_in(1);
        let key = data.get(8..16)?;
        Some((u64::from_be_bytes(key.try_into().expect("8 bytes")), data[21]))
    }

    fn attention(&mut self, nexus: Nexus) -> Option<Attention> {
        use Attention::{RegistrationsPreempted, ReservationsPreempted, ReservationsReleased};
        let all = [RegistrationsPreempted, ReservationsPreempted, ReservationsReleased];
        match self.send(nexus, &[0; 6], &[]) {
            End::Check(sense) => all.into_iter().find(|one| one.sense() == sense),
            _ => None,
        }
    }

    /// Whether a nexus may read and write, by the gate and by the commands.
    fn access(&mut self, nexus: Nexus) -> (bool, bool) {
        let [read, write] = [medium(0x28, 0, 0, 1), medium(0x2a, 0, 0, 1)].map(|cdb| {
            let data = vec![0; if cdb[0] == 0x2a { 512 } else { 0 }];
            let buffers = scsi::Buffers { data_in: 512, data_out: data.len() as u64 };
            let gate = self.lu.gate(nexus);
            let quick = fast(&decode(&cdb).expect("a command"), self.lu.facts(), gate, buffers);
            let slow = self.send_with(nexus, &cdb, &data, buffers);
            match (quick, slow) {
                (Fast::Io(_), End::Io(_)) => true,
                (Fast::Slow, CONFLICT) => false,
                other => panic!("{other:?}"),
            }
        });
        (read, write)
    }
}

fn three() -> Unit {
    let mut unit = Unit::new(facts());
    assert!(unit.lu.attach(C, false));
    unit
}

#[test]
fn registering() {
    let mut unit = three();
    assert_eq!(unit.out(A, REGISTER, 0, 1, 2), CONFLICT);
    assert_eq!(unit.generation(), 0);
    unit.done(A, REGISTER, 0, 0, 0x11);
    assert_eq!(unit.out(A, REGISTER, 0, 0, 0x12), CONFLICT);
    unit.done(A, REGISTER, 0, 0x11, 0x12);
    unit.done(B, REGISTER_AND_IGNORE, 0, 0xdead, 0x22);
    unit.done(B, REGISTER_AND_IGNORE, 0, 0xdead, 0x23);
    assert_eq!((unit.keys(), unit.generation()), (vec![0x12, 0x23], 4));
    unit.done(B, REGISTER_AND_IGNORE, 0, 0, 0);
    unit.done(A, REGISTER, 0, 0x12, 0);
    unit.done(A, REGISTER, 0, 0, 0);
    assert_eq!((unit.keys(), unit.generation()), (vec![], 7));
    // Scope and type are ignored.
    unit.done(A, REGISTER, 0xff, 0, 1);
}

#[test]
fn unsupported_parameters() {
    let mut unit = three();
    for (flags, bit) in [(1, 0), (4, 2), (8, 3), (13, 3)] {
        for action in [REGISTER, REGISTER_AND_IGNORE] {
            let end = unit.out_with(A, action, 0, 0, 1, flags);
            assert_eq!(end, End::Check(Sense::in_list(20, Some(bit))));
        }
    }
    assert!(unit.keys().is_empty());
    unit.done(A, REGISTER, 0, 0, 1);
    for kind in [0, 2, 4, 9, 15] {
        assert_eq!(unit.out(A, RESERVE, kind, 1, 0), End::Check(Sense::in_cdb(2, Some(3))));
    }
    assert_eq!(unit.out(A, RESERVE, 0x21, 1, 0), End::Check(Sense::in_cdb(2, Some(7))));
    for len in [0, 23, 25, 255] {
        let cdb = cdb(&[0x5f, 0, 0, 0, 0, 0, 0, 0, len], 10);
        let end = unit.send(A, &cdb, &[0; 255]);
        assert_eq!(end, End::Check(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR)));
    }
    let cdb = cdb(&[0x5f, 0, 0, 0, 0, 0, 0, 0, 24], 10);
    let end = unit.send(A, &cdb, &[0; 23]);
    assert_eq!(end, End::Check(Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR)));
}

#[test]
fn registrations_are_bounded() {
    let mut unit = Unit::new(facts());
    for number in 0..REGISTRATIONS_MAX as u64 {
        assert!(unit.lu.attach(Nexus(100 + number), false));
        unit.done(Nexus(100 + number), REGISTER, 0, 0, 7);
    }
    let full = Sense::illegal(Code::INSUFFICIENT_REGISTRATION_RESOURCES);
    assert_eq!(unit.out(A, REGISTER, 0, 0, 7), End::Check(full));
    unit.done(Nexus(100), REGISTER, 0, 7, 8);
    unit.done(Nexus(100), PREEMPT, 1, 8, 7);
    assert_eq!(unit.keys(), [8]);
    unit.done(A, REGISTER, 0, 0, 7);
}

#[test]
fn access_by_type() {
    for kind in TYPES {
        let mut unit = three();
        unit.done(A, REGISTER, 0, 0, 1);
        unit.done(B, REGISTER, 0, 0, 2);
        unit.done(A, RESERVE, kind, 1, 0);
        let all = (true, true);
        let others = (matches!(kind, 1 | 5 | 7), false);
        assert_eq!(unit.access(A), all);
        assert_eq!(unit.access(B), if kind >= 5 { all } else { others });
        assert_eq!(unit.access(C), others);
        let key = if kind >= 7 { 0 } else { 1 };
        assert_eq!(unit.held(), Some((key, kind)));
    }
}

/// SPC-4 and SBC-3: every command of the table from a nexus without a
/// registration, under a write exclusive and an exclusive access reservation, and under RESERVE.
#[test]
fn conflicts_by_command() {
    for entry in &TABLE {
        let (write_exclusive, exclusive, reserved) = match (entry.access, entry.kind) {
            (Access::Any | Access::Allow, _) => (true, true, true),
            (Access::Query, _) | (_, Kind::PersistentReserveIn) => (true, true, false),
            (Access::Read, _) => (true, false, false),
            (Access::Write | Access::Start, _) => (false, false, false),
            // Those with rules of their own: this nexus has no registration.
            (Access::Own, Kind::Release) => (false, false, true),
            (Access::Own, _) => {
                (entry.name.starts_with("REGISTER"), entry.name.starts_with("REGISTER"), false)
            }
        };
        let mut command =
            cdb(&[entry.opcode, entry.action.unwrap_or(0)], usize::from(entry.length));
        if entry.kind == Kind::PersistentReserveOut {
            command[8] = 24;
        }
        let persistent = |kind: u8| {
            let mut unit = three();
            unit.done(A, REGISTER, 0, 0, 1);
            unit.done(A, RESERVE, kind, 1, 0);
            unit.send(C, &command, &[0; 24]) != CONFLICT
        };
        assert_eq!(persistent(1), write_exclusive, "{}", entry.name);
        assert_eq!(persistent(5), write_exclusive, "{}", entry.name);
        assert_eq!(persistent(7), write_exclusive, "{}", entry.name);
        assert_eq!(persistent(3), exclusive, "{}", entry.name);
        assert_eq!(persistent(6), exclusive, "{}", entry.name);
        assert_eq!(persistent(8), exclusive, "{}", entry.name);
        let mut unit = three();
        unit.good(A, &[0x16, 0, 0, 0, 0, 0], &[]);
        assert_eq!(unit.send(C, &command, &[0; 24]) != CONFLICT, reserved, "{}", entry.name);
    }
}

/// The rules of the commands that differ from READ and WRITE, by name: SPC-4's table as LIO and
/// FreeBSD's CTL have it. Where CTL is less strict than LIO, it is LIO's rule.
#[test]
fn which_commands_are_allowed() {
    let rule = |name: &str| TABLE.iter().find(|entry| entry.name == name).map(|entry| entry.access);
    for name in ["INQUIRY", "REPORT LUNS", "REQUEST SENSE", "LOG SENSE"] {
        assert_eq!(rule(name), Some(Access::Any), "{name}");
    }
    for name in ["READ CAPACITY(10)", "READ CAPACITY(16)"] {
        assert_eq!(rule(name), Some(Access::Any), "{name}");
    }
    assert_eq!(rule("TEST UNIT READY"), Some(Access::Query));
    for name in [
        "MODE SENSE(6)",
        "MODE SENSE(10)",
        "RECEIVE DIAGNOSTIC RESULTS",
        "REPORT SUPPORTED OPERATION CODES",
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        "GET LBA STATUS",
        "PRE-FETCH(10)",
        "VERIFY(16)",
    ] {
        assert_eq!(rule(name), Some(Access::Read), "{name}");
    }
    for name in ["MODE SELECT(6)", "SEND DIAGNOSTIC", "SYNCHRONIZE CACHE(10)", "UNMAP"] {
        assert_eq!(rule(name), Some(Access::Write), "{name}");
    }
}

#[test]
fn conditional_conflicts() {
    let mut unit = three();
    unit.done(A, REGISTER, 0, 0, 1);
    unit.done(A, RESERVE, 3, 1, 0);
    unit.good(C, &[0x1b, 0, 0, 0, 1, 0], &[]);
    assert_eq!(unit.send(C, &[0x1b, 0, 0, 0, 0, 0], &[]), CONFLICT);
    unit.good(C, &[0x1e, 0, 0, 0, 0, 0], &[]);
    assert_eq!(unit.send(C, &[0x1e, 0, 0, 0, 1, 0], &[]), CONFLICT);
}

#[test]
fn reserving_twice_and_releasing() {
    for kind in TYPES {
        let mut unit = three();
        unit.done(A, REGISTER, 0, 0, 1);
        unit.done(B, REGISTER, 0, 0, 2);
        assert_eq!(unit.out(C, RESERVE, kind, 0, 0), CONFLICT);
        assert_eq!(unit.out(A, RESERVE, kind, 2, 0), CONFLICT);
        unit.done(A, RESERVE, kind, 1, 0);
        unit.done(A, RESERVE, kind, 1, 0);
        let other = if kind == 1 { 3 } else { 1 };
        assert_eq!(unit.out(A, RESERVE, other, 1, 0), CONFLICT);
        let all_hold = kind >= 7;
        assert_eq!(unit.out(B, RESERVE, kind, 2, 0) == End::Good(vec![]), all_hold);
        // A release by a nexus that does not hold it is GOOD, and nothing happens.
        assert_eq!(unit.out(B, RELEASE, kind, 1, 0), CONFLICT);
        if !all_hold {
            unit.done(B, RELEASE, kind, 2, 0);
            assert!(unit.held().is_some());
        }
        let invalid = Sense::illegal(Code::INVALID_RELEASE);
        assert_eq!(unit.out(A, RELEASE, other, 1, 0), End::Check(invalid));
        assert_eq!(unit.out(A, RELEASE, kind | 0x10, 1, 0), End::Check(invalid));
        let generation = unit.generation();
        unit.done(A, RELEASE, kind, 1, 0);
        assert_eq!((unit.held(), unit.generation()), (None, generation));
        let told = (kind >= 5).then_some(Attention::ReservationsReleased);
        assert_eq!((unit.attention(B), unit.attention(C)), (told, None));
        assert_eq!(unit.attention(A), None);
        unit.done(A, RELEASE, kind, 1, 0);
    }
}

#[test]
fn unregistering_ends_the_reservation_of_a_holder() {
    for kind in TYPES {
        let mut unit = three();
        unit.done(A, REGISTER, 0, 0, 1);
        unit.done(B, REGISTER, 0, 0, 2);
        unit.done(A, RESERVE, kind, 1, 0);
        unit.done(A, REGISTER, 0, 1, 0);
        assert_eq!(unit.held().is_some(), kind >= 7);
        let told = matches!(kind, 5 | 6).then_some(Attention::ReservationsReleased);
        assert_eq!(unit.attention(B), told);
        unit.done(B, REGISTER, 0, 2, 0);
        assert_eq!(unit.held(), None);
    }
}

#[test]
fn clearing() {
    let mut unit = three();
    unit.done(A, REGISTER, 0, 0, 1);
    unit.done(B, REGISTER, 0, 0, 2);
    unit.done(A, RESERVE, 3, 1, 0);
    assert_eq!(unit.out(C, CLEAR, 0, 0, 0), CONFLICT);
    unit.done(B, CLEAR, 0, 2, 0);
    assert_eq!(unit.attention(A), Some(Attention::ReservationsPreempted));
    assert_eq!((unit.attention(B), unit.attention(C)), (None, None));
    assert_eq!((unit.held(), unit.keys(), unit.generation()), (None, vec![], 3));
}

#[test]
fn preempting_the_holder() {
    for kind in [1, 3, 5, 6] {
        let mut unit = three();
        for (nexus, key) in [(A, 1), (B, 2), (C, 3)] {
            unit.done(nexus, REGISTER, 0, 0, key);
        }
        unit.done(A, RESERVE, kind, 1, 0);
        unit.done(B, PREEMPT, 1, 2, 1);
        assert!(unit.reply.aborted().is_empty());
        assert_eq!(unit.attention(A), Some(Attention::RegistrationsPreempted));
        let told = (kind != 1).then_some(Attention::ReservationsReleased);
        assert_eq!((unit.attention(C), unit.attention(B)), (told, None));
        assert_eq!((unit.held(), unit.keys()), (Some((2, 1)), vec![2, 3]));
    }
}

#[test]
fn preempting_registrations() {
    let mut unit = three();
    for (nexus, key) in [(A, 1), (B, 2), (C, 2)] {
        unit.done(nexus, REGISTER, 0, 0, key);
    }
    assert_eq!(unit.out(A, PREEMPT, 1, 1, 9), CONFLICT);
    assert_eq!(unit.out(A, PREEMPT, 1, 1, 0), End::Check(Sense::in_list(8, None)));
    unit.done(A, RESERVE, 3, 1, 0);
    // The scope and the type do not count.
    unit.done(A, PREEMPT_AND_ABORT, 0xff, 1, 2);
    assert_eq!(unit.reply.aborted(), [B.0, C.0]);
    assert_eq!(unit.attention(B), Some(Attention::RegistrationsPreempted));
    assert_eq!((unit.held(), unit.keys()), (Some((1, 3)), vec![1]));
    // The holder takes its own reservation over, with another type.
    unit.done(A, PREEMPT, 5, 1, 1);
    assert_eq!((unit.held(), unit.keys()), (Some((1, 5)), vec![1]));
    assert_eq!(unit.out(A, PREEMPT, 2, 1, 1), End::Check(Sense::in_cdb(2, Some(3))));
    assert_eq!(unit.out(A, PREEMPT, 0x15, 1, 1), End::Check(Sense::in_cdb(2, Some(7))));
}

#[test]
fn preempting_all_registrants() {
    for kind in [7, 8] {
        let mut unit = three();
        for (nexus, key) in [(A, 1), (B, 2), (C, 3)] {
            unit.done(nexus, REGISTER, 0, 0, key);
        }
        unit.done(A, RESERVE, kind, 1, 0);
        unit.done(B, PREEMPT, kind, 2, 3);
        assert_eq!((unit.held(), unit.keys()), (Some((0, kind)), vec![1, 2]));
        assert_eq!(unit.attention(C), Some(Attention::RegistrationsPreempted));
        unit.done(B, PREEMPT, 6, 2, 0);
        assert_eq!(unit.attention(A), Some(Attention::RegistrationsPreempted));
        assert_eq!((unit.held(), unit.keys()), (Some((2, 6)), vec![2]));
        assert_eq!((unit.attention(B), unit.attention(C)), (None, None));
    }
}

#[test]
fn reports() {
    let mut unit = three();
    assert_eq!(unit.persistent_in(2), [0, 8, 0x10, 0x80, 0xea, 1, 0, 0]);
    assert_eq!(unit.persistent_in(1), [0; 8]);
    unit.done(A, REGISTER, 0, 0, 0x0102_0304_0506_0708);
    unit.port.relative = 0x102;
    unit.done(B, REGISTER, 0, 0, 9);
    unit.port.relative = 0;
    unit.done(B, RESERVE, 5, 9, 0);
    // ADDITIONAL LENGTH counts all keys.
    let cut = unit.data(&cdb(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 8], 10));
    assert_eq!(cut, [0, 0, 0, 2, 0, 0, 0, 16]);
    let held = [0, 0, 0, 2, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 5, 0, 0];
    assert_eq!(unit.persistent_in(1), held);
    let status = unit.persistent_in(3);
    assert_eq!(status[..8], [0, 0, 0, 2, 0, 0, 0, 96]);
    let (first, second) = status[8..].split_at(48);
    assert_eq!(
        first[..24],
        [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24]
    );
    assert_eq!(
        first[24..],
        [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xa, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    // The port is that of the registration.
    assert_eq!(second[12..20], [1, 5, 0, 0, 0, 0, 1, 2]);
    let end = unit.send(A, &cdb(&[0x5e, 4], 10), &[]);
    assert_eq!(end, End::Check(Sense::in_cdb(1, Some(4))));
}

#[test]
fn reserve_and_release() {
    let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
    let mut unit = three();
    unit.good(A, &release, &[]);
    unit.good(A, &reserve, &[]);
    unit.good(A, &reserve, &[]);
    assert_eq!(unit.access(A), (true, true));
    assert_eq!(unit.access(B), (false, false));
    assert_eq!(unit.send(B, &reserve, &[]), CONFLICT);
    unit.good(B, &release, &[]);
    assert_eq!(unit.send(B, &[0; 6], &[]), CONFLICT);
    // PERSISTENT RESERVE IN and OUT conflict for everyone.
    assert_eq!(unit.out(A, REGISTER, 0, 0, 1), CONFLICT);
    assert_eq!(unit.send(A, &cdb(&[0x5e, 0, 0, 0, 0, 0, 0, 1], 10), &[]), CONFLICT);
    unit.good(A, &release, &[]);
    unit.good(B, &cdb(&[0x56], 10), &[]);
    assert_eq!(unit.access(A), (false, false));
    unit.good(B, &cdb(&[0x57], 10), &[]);
    assert_eq!(unit.access(A), (true, true));
    // Third parties and extents are obsolete.
    assert!(matches!(unit.send(A, &[0x16, 0x10, 0, 0, 0, 0], &[]), End::Check(_)));
}

#[test]
fn reserve_beside_persistent_reservations() {
    let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
    let mut unit = three();
    unit.done(A, REGISTER, 0, 0, 1);
    unit.done(B, REGISTER, 0, 0, 2);
    for nexus in [A, B, C] {
        assert_eq!(unit.send(nexus, &reserve, &[]), CONFLICT);
    }
    for kind in TYPES {
        unit.done(A, RESERVE, kind, 1, 0);
        for cdb in [&reserve, &release] {
            // CRH: those who have access get GOOD, and nothing changes.
            unit.good(A, cdb, &[]);
            let end = unit.send(B, cdb, &[]);
            assert_eq!(end, if kind >= 5 { End::Good(vec![]) } else { CONFLICT });
            assert_eq!(unit.send(C, cdb, &[]), CONFLICT);
        }
        unit.done(A, RELEASE, kind, 1, 0);
        unit.attention(B);
    }
    unit.done(A, CLEAR, 0, 1, 0);
    unit.attention(B);
    unit.good(C, &reserve, &[]);
}

#[test]
fn what_ends_a_reservation() {
    let reserve = [0x16, 0, 0, 0, 0, 0];
    for end in 0..3 {
        let mut unit = three();
        unit.good(A, &reserve, &[]);
        match end {
            0 => unit.lu.reset(),
            1 => unit.lu.nexus_lost(A),
            _ => unit.lu.nexus_reset(A),
        }
        let told = unit.send(A, &[0; 6], &[]);
        let expected = [Attention::Reset, Attention::PowerOn, Attention::NexusLoss][end].sense();
        assert_eq!(told, End::Check(expected));
        let told = unit.send(B, &[0; 6], &[]);
        assert_eq!(told == End::Good(vec![]), end != 0);
        assert_eq!(unit.access(B), (true, true));
    }
    // Another nexus' loss ends nothing, and neither ends a persistent reservation.
    let mut unit = three();
    unit.good(A, &reserve, &[]);
    unit.lu.nexus_lost(B);
    assert_eq!(unit.access(C), (false, false));
    let mut unit = three();
    unit.done(A, REGISTER, 0, 0, 1);
    unit.done(A, RESERVE, 3, 1, 0);
    unit.lu.reset();
    unit.lu.nexus_lost(A);
    unit.send(C, &[0; 6], &[]);
    assert_eq!(unit.access(C), (false, false));
    unit.lu.nexus_removed(A);
    assert_eq!(unit.access(C), (true, true));
    unit.send(A, &[0; 6], &[]);
    assert_eq!(unit.keys(), []);
}

#[test]
fn attentions_come_before_conflicts_and_those_before_other_errors() {
    let mut unit = three();
    unit.done(A, REGISTER, 0, 0, 1);
    unit.done(A, RESERVE, 3, 1, 0);
    unit.lu.resized(5000);
    let bad_read = [0x28, 0xe0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(unit.send(C, &bad_read, &[]), End::Check(Attention::CapacityChanged.sense()));
    assert_eq!(unit.send(C, &bad_read, &[]), CONFLICT);
    assert!(matches!(
        unit.send(A, &[0xff; 10], &[]),
        End::Check(Sense { key: Key::UnitAttention, .. })
    ));
    assert!(matches!(
        unit.send(A, &bad_read, &[]),
        End::Check(Sense { key: Key::IllegalRequest, .. })
    ));
}
