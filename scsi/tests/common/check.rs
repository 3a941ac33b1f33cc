//! What must hold for every answer. The fuzz target `scsi` uses this file, too.

use scsi::report::{Provisioning, lba_status};
use scsi::sense::{Key, SENSE_BYTES_MAX};
use scsi::table::{Direction, Found, find};
use scsi::{
    Buffers, Facts, Failure, Fast, Format, LogicalUnit, Nexus, Op, Outcome, PARAMETERS_MAX, Plan,
    Port, Reply, Sense, Status, Step, Transferred, decode, fast,
};

/// The port through which the commands come.
const PORT: Port = Port { target: 0, relative: 0, group: 0 };

/// Counts, so that a test can say what it has reached.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    pub(crate) good: u64,
    pub(crate) check: u64,
    pub(crate) other: u64,
    pub(crate) plans: u64,
    pub(crate) copies: u64,
    pub(crate) fast: u64,
}

/// A logical unit whose answers are checked. It allocates nothing after it is built.
pub(crate) struct Stage {
    pub(crate) lu: LogicalUnit,
    reply: Reply,
    read_only: bool,
    pub(crate) reached: Reached,
}

impl Stage {
    pub(crate) fn new(facts: Facts) -> Self {
        Self {
            lu: LogicalUnit::new(facts),
            reply: Reply::new(),
            read_only: facts.read_only,
            reached: Reached::default(),
        }
    }

    /// Sends a command, and checks the answer. `list` is its data-out; `failure` is how its I/O
    /// might fail.
    pub(crate) fn command(
        &mut self,
        nexus: Nexus,
        cdb: &[u8],
        buffers: Buffers,
        list: &[u8],
        failure: Failure,
    ) {
        let facts = *self.lu.facts();
        let gate = self.lu.gate(nexus);
        let quick = decode(cdb).map_or(Fast::Slow, |command| fast(&command, &facts, gate, buffers));
        let mut step = self.lu.start(nexus, PORT, cdb, buffers, &mut self.reply);
        if let Step::Parameters { bytes } = step {
            assert!(bytes > 0 && bytes as usize <= PARAMETERS_MAX);
            assert!(u64::from(bytes) <= buffers.data_out);
            let list = &list[..list.len().min(bytes as usize)];
            step = self.lu.with_parameters(nexus, PORT, cdb, list, buffers, &mut self.reply);
        }
        self.check_fast(quick, step);
        match step {
            Step::Parameters { .. } => panic!("parameters are asked for once"),
            Step::Done => self.check_reply(cdb, buffers),
            Step::LbaStatus(query) => {
                assert!(query.lba < facts.blocks && query.extents_max > 0);
                let extents = [(3, Provisioning::Deallocated), (u64::MAX, Provisioning::Mapped)];
                lba_status(&query, extents, buffers, &mut self.reply);
                self.check_reply(cdb, buffers);
            }
            Step::Io(plan) => {
                self.check_plan(&plan, &facts, buffers);
                for result in [Ok(()), Err(failure)] {
                    self.lu.copied(nexus, &plan, result);
                    let outcome = Outcome::of(&plan, &facts, result);
                    check_end(outcome.status, outcome.sense, outcome.transferred, buffers);
                }
            }
        }
    }

    fn check_fast(&mut self, quick: Fast, step: Step) {
        match quick {
            Fast::Slow => return,
            Fast::Io(plan) => match step {
                Step::Io(slow) => assert_eq!(plan, slow),
                _ => assert!(plan.range.blocks == 0 && self.reply.status() == Status::Good),
            },
            Fast::Failed(sense) => assert_eq!(self.reply.sense(), Some(sense)),
        }
        self.reached.fast += 1;
    }

    fn check_reply(&mut self, cdb: &[u8], buffers: Buffers) {
        let reply = &self.reply;
        check_end(reply.status(), reply.sense(), reply.transferred(), buffers);
        match reply.status() {
            Status::Good => self.reached.good += 1,
            Status::CheckCondition => self.reached.check += 1,
            _ => self.reached.other += 1,
        }
        let len = reply.data().len() as u64;
        if reply.status() != Status::Good {
            assert_eq!(len, 0);
            return;
        }
        assert!(len <= buffers.data_in && len <= allocation(cdb), "{cdb:x?}");
        let Found::Entry(entry) = find(cdb[0], cdb.get(1).map_or(0, |byte| *byte)) else {
            panic!("GOOD for an unknown command: {cdb:x?}");
        };
        assert!(entry.direction == Direction::In || len == 0);
        assert!(len == 0 || reply.transferred().bytes == len);
    }

    fn check_plan(&mut self, plan: &Plan, facts: &Facts, buffers: Buffers) {
        self.reached.plans += 1;
        let end = plan.range.lba.checked_add(plan.range.blocks).expect("no overflow");
        assert!(end <= facts.blocks, "{plan:?}");
        assert!(self.reply.sense().is_none());
        let buffer = if plan.op == Op::Read { buffers.data_in } else { buffers.data_out };
        assert!(plan.transfer_bytes() <= buffer, "{plan:?}");
        let reads = matches!(plan.op, Op::Read | Op::Verify | Op::VerifyData | Op::VerifyPattern);
        assert!(reads || plan.op == Op::Flush || !self.read_only, "{plan:?}");
        assert_eq!(plan.op == Op::Unmap, !self.reply.ranges().is_empty());
        assert_eq!(plan.exclusive, matches!(plan.op, Op::CompareAndWrite | Op::OrWrite));
        if let Op::Copy { from, .. } = plan.op {
            self.reached.copies += 1;
            assert!(from + plan.range.blocks <= facts.blocks, "{plan:?}");
        }
        for range in self.reply.ranges() {
            assert!(range.blocks > 0 && range.lba + range.blocks <= facts.blocks);
        }
        if matches!(plan.op, Op::Read | Op::Write | Op::OrWrite | Op::WriteAndVerify { .. }) {
            let bytes = plan.range.blocks * u64::from(facts.block_bytes);
            assert_eq!(plan.transfer_bytes(), bytes);
        }
    }
}

/// Any end of a command: sense data if and only if the status says so, and of a known key.
fn check_end(status: Status, sense: Option<Sense>, transferred: Transferred, buffers: Buffers) {
    assert_eq!(status == Status::CheckCondition, sense.is_some(), "{status:?} {sense:?}");
    let longest = buffers.data_in.max(buffers.data_out);
    assert!(transferred.bytes <= longest);
    assert!(u64::from(transferred.residual) <= longest - transferred.bytes);
    let Some(sense) = sense else { return };
    assert_ne!(sense.key, Key::NoSense, "an error that a guest may take for none");
    let mut bytes = [0xff; 252];
    let len = sense.encode(Format::Fixed, &mut bytes);
    assert_eq!((len, bytes[0] & 0x7f, bytes[7]), (18, 0x70, 10));
    assert_eq!((bytes[2], bytes[12]), (sense.key as u8, sense.code.0));
    let len = sense.encode(Format::Descriptor, &mut bytes);
    assert!(len <= SENSE_BYTES_MAX && bytes[0] == 0x72 && usize::from(bytes[7]) + 8 == len);
}

/// The most data-in that a CDB allows, without the crate's decoder.
fn allocation(cdb: &[u8]) -> u64 {
    let at = |bytes: std::ops::Range<usize>| {
        cdb[bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    match cdb[0] {
        0x03 | 0x1a => at(4..5),
        0x12 | 0x1c => at(3..5),
        0x37 | 0x4d | 0x5a | 0x5e => at(7..9),
        0xa0 | 0xa3 | 0xb7 => at(6..10),
        0x84 | 0x9e => at(10..14),
        0x25 => 8,
        _ => 0,
    }
}
