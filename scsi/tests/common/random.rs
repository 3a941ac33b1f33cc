//! Random commands, and what must hold for every answer. The fuzz target of the workspace `fuzz`
//! has the same checks.

use scsi::report::{Provisioning, lba_status};
use scsi::sense::{Key, SENSE_BYTES_MAX};
use scsi::table::{Direction, Found, TABLE, find};
use scsi::{
    Attention, Buffers, Facts, Failure, Fast, Format, LogicalUnit, Nexus, Op, Outcome,
    PARAMETERS_MAX, Plan, Reply, Sense, Status, Step, Transferred, decode, fast,
};

/// Xorshift, seeded.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.u64() >> 11) % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Counts, so that a test can say what it has reached.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    pub(crate) good: u64,
    pub(crate) check: u64,
    pub(crate) other: u64,
    pub(crate) plans: u64,
    pub(crate) fast: u64,
}

/// A unit under random commands. It allocates nothing after it is built.
pub(crate) struct Stage {
    pub(crate) lu: LogicalUnit,
    reply: Reply,
    read_only: bool,
    list: [u8; PARAMETERS_MAX],
    pub(crate) reached: Reached,
}

/// A CDB, its bytes and the number of them that are sent.
pub(crate) type Cdb = ([u8; 32], usize);

impl Stage {
    pub(crate) fn new(facts: Facts) -> Self {
        Self {
            lu: LogicalUnit::new(facts),
            reply: Reply::new(),
            read_only: facts.read_only,
            list: [0; PARAMETERS_MAX],
            reached: Reached::default(),
        }
    }

    /// Random commands and events: one step.
    pub(crate) fn step(&mut self, random: &mut Random) {
        if random.one_in(48) {
            self.event(random);
        }
        let nexus = Nexus(random.below(4));
        let (cdb, len) = random_cdb(random, self.lu.facts().blocks);
        let cdb = &cdb[..len];
        let buffers = random_buffers(random, self.lu.facts().block_bytes);
        self.random_list(random, cdb);
        self.command(nexus, cdb, buffers, random);
    }

    fn event(&mut self, random: &mut Random) {
        let nexus = Nexus(random.below(4));
        match random.below(8) {
            0 => self.lu.reset(),
            1 => self.lu.nexus_lost(nexus),
            2 => self.lu.nexus_reset(nexus),
            3 => self.lu.nexus_removed(nexus),
            4 => self.lu.resized(random.below(1 << 40)),
            5 => self.lu.resized(1000),
            6 => self.lu.tell_all(Attention::LunsChanged),
            _ => assert!(self.lu.attach(nexus, random.one_in(2))),
        }
    }

    /// Bytes of a parameter list that is often almost right.
    fn random_list(&mut self, random: &mut Random, cdb: &[u8]) {
        let list = &mut self.list;
        for chunk in list[..256].chunks_mut(8) {
            let bytes = if random.one_in(2) { 0 } else { random.u64() }.to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        match cdb.first() {
            Some(0x42) => {
                list[2] = 0;
                list[3] = u8::try_from(random.below(80)).unwrap_or(0);
                for descriptor in 0..5 {
                    let at = 8 + 16 * descriptor;
                    list[at..at + 12].fill(0);
                    list[at + 6] = u8::try_from(random.below(5)).unwrap_or(0);
                    list[at + 11] = u8::try_from(random.below(256)).unwrap_or(0);
                }
            }
            Some(0x5f) => {
                list[..24].fill(0);
                list[7] = u8::try_from(random.below(4)).unwrap_or(0);
                list[15] = u8::try_from(random.below(4)).unwrap_or(0);
                list[20] = if random.one_in(8) { 1 } else { 0 };
            }
            Some(0x15) if random.one_in(2) => {
                list[..16].copy_from_slice(&[0, 0, 0, 0, 10, 10, 0, 16, 0, 64, 0, 0, 0, 0, 0, 0]);
                list[4] = 0x0a;
                list[6] = if random.one_in(2) { 4 } else { 0 };
                list[7] = 0x10;
                list[8] = if random.one_in(4) { 8 } else { 0 };
            }
            _ => {}
        }
    }

    /// Sends a command, and checks the answer.
    pub(crate) fn command(
        &mut self,
        nexus: Nexus,
        cdb: &[u8],
        buffers: Buffers,
        random: &mut Random,
    ) {
        let facts = *self.lu.facts();
        let gate = self.lu.gate(nexus);
        let quick = decode(cdb).map_or(Fast::Slow, |command| fast(&command, &facts, gate, buffers));
        let mut step = self.lu.start(nexus, cdb, buffers, &mut self.reply);
        if let Step::Parameters { bytes } = step {
            assert!(bytes > 0 && bytes as usize <= PARAMETERS_MAX);
            assert!(u64::from(bytes) <= buffers.data_out);
            let list = &self.list[..bytes as usize];
            step = self.lu.with_parameters(nexus, cdb, list, buffers, &mut self.reply);
        }
        self.check_fast(quick, step);
        match step {
            Step::Parameters { .. } => panic!("parameters are asked for once"),
            Step::Done => self.check_reply(cdb, buffers),
            Step::LbaStatus(query) => {
                assert!(query.lba < facts.blocks && query.extents_max > 0);
                let extents = [(random.below(9), Provisioning::Deallocated); 3];
                lba_status(&query, extents, buffers, &mut self.reply);
                self.check_reply(cdb, buffers);
            }
            Step::Io(plan) => {
                self.check_plan(&plan, &facts, buffers);
                let failure = random_failure(random);
                for result in [Ok(()), Err(failure)] {
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
        assert_eq!(plan.exclusive, plan.op == Op::CompareAndWrite);
        for range in self.reply.ranges() {
            assert!(range.blocks > 0 && range.lba + range.blocks <= facts.blocks);
        }
        if matches!(plan.op, Op::Read | Op::Write | Op::WriteAndVerify { .. }) {
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
        0x4d | 0x5a | 0x5e => at(7..9),
        0xa0 | 0xa3 => at(6..10),
        0x9e => at(10..14),
        0x25 => 8,
        _ => 0,
    }
}

fn random_buffers(random: &mut Random, block: u32) -> Buffers {
    let len = match random.below(8) {
        0 => 0,
        1 => random.below(64),
        2 => u64::from(block),
        3 => 2 * u64::from(block),
        4 => u64::MAX >> random.below(64),
        _ => u64::from(block) * random.below(300),
    };
    match random.below(8) {
        0 => Buffers { data_in: len, data_out: random.below(1 << 20) },
        1..=3 => Buffers { data_in: len, data_out: 0 },
        _ => Buffers { data_in: 0, data_out: len },
    }
}

fn random_failure(random: &mut Random) -> Failure {
    match random.below(11) {
        0 => Failure::Medium(Some(random.u64())),
        1 => Failure::Medium(None),
        2 => Failure::Miscompare(random.u64()),
        3 => Failure::NoSpace,
        4 => Failure::ReadOnly,
        5 => Failure::OutOfRange,
        6 => Failure::Unsupported,
        7 => Failure::Busy,
        8 => Failure::Aborted,
        9 => Failure::Reservation,
        _ => Failure::Device,
    }
}

/// Mostly a command of the table, with bits that mean something, and an LBA near the disk.
fn random_cdb(random: &mut Random, blocks: u64) -> Cdb {
    let mut cdb = [0; 32];
    for chunk in cdb.chunks_mut(8) {
        chunk.copy_from_slice(&random.u64().to_le_bytes());
    }
    let len = if random.one_in(64) { usize::try_from(random.below(33)).unwrap_or(0) } else { 32 };
    if random.one_in(16) {
        return (cdb, len);
    }
    let place = random.below(TABLE.len() as u64);
    let entry = &TABLE[usize::try_from(place).unwrap_or(0)];
    let usage = entry.usage(&crate::common::facts());
    for (byte, mask) in cdb.iter_mut().zip(usage).take(usize::from(entry.length)) {
        *byte &= mask;
        // Small numbers are more often valid.
        if random.one_in(3) {
            *byte &= u8::try_from(random.below(16)).unwrap_or(0);
        }
    }
    cdb[0] = entry.opcode;
    cdb[1] = cdb[1] & !0x1f & usage[1] | entry.action.unwrap_or(cdb[1] & 0x1f);
    if entry.opcode == 0x5f {
        cdb[5..9].copy_from_slice(&[0, 0, 0, 24]);
    }
    let lba = random.below(blocks + 2).to_be_bytes();
    match usage {
        [_, _, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, ..] if entry.length == 16 => {
            cdb[2..10].copy_from_slice(&lba);
            cdb[10..13].fill(0);
        }
        [_, _, 0xff, 0xff, 0xff, 0xff, ..] if entry.length > 6 => {
            cdb[2..6].copy_from_slice(&lba[4..]);
            if entry.length == 12 {
                cdb[6..8].fill(0);
            } else {
                cdb[7] = 0;
            }
        }
        _ => {}
    }
    if random.one_in(16) {
        let bit = usize::try_from(random.below(128)).unwrap_or(0);
        cdb[bit / 8] ^= 1 << (bit % 8);
    }
    (cdb, len)
}
