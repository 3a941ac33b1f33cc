//! Random commands and events.

use scsi::table::TABLE;
use scsi::{Attention, Buffers, Facts, Failure, Nexus, PARAMETERS_MAX};

use crate::check::Stage;

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

/// A logical unit under random commands, with a parameter list for them.
pub(crate) struct Guests {
    pub(crate) stage: Stage,
    list: [u8; PARAMETERS_MAX],
}

/// A CDB, its bytes and the number of them that are sent.
pub(crate) type Cdb = ([u8; 32], usize);

impl Guests {
    pub(crate) fn new(facts: Facts) -> Self {
        Self { stage: Stage::new(facts), list: [0; PARAMETERS_MAX] }
    }

    /// Random commands and events: one step.
    pub(crate) fn step(&mut self, random: &mut Random) {
        if random.one_in(48) {
            self.event(random);
        }
        let nexus = Nexus(random.below(4));
        let (cdb, len) = random_cdb(random, self.stage.lu.facts().blocks);
        let cdb = &cdb[..len];
        let buffers = random_buffers(random, self.stage.lu.facts().block_bytes);
        self.random_list(random, cdb);
        let failure = random_failure(random);
        self.stage.command(nexus, cdb, buffers, &self.list, failure);
    }

    fn event(&mut self, random: &mut Random) {
        let nexus = Nexus(random.below(4));
        match random.below(8) {
            0 => self.stage.lu.reset(),
            1 => self.stage.lu.nexus_lost(nexus),
            2 => self.stage.lu.nexus_reset(nexus),
            3 => self.stage.lu.nexus_removed(nexus),
            4 => self.stage.lu.resized(random.below(1 << 40)),
            5 => self.stage.lu.resized(1000),
            6 => self.stage.lu.tell_all(Attention::LunsChanged),
            _ => assert!(self.stage.lu.attach(nexus, random.one_in(2))),
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
            Some(0x83) => {
                list[..76].fill(0);
                list[0] = u8::try_from(random.below(3)).unwrap_or(0);
                list[1] = if random.one_in(8) { 0x18 } else { 0 };
                (list[3], list[11]) = (32, 28);
                list[16] = 0xe4;
                (list[20], list[21], list[23]) = (1, 3, 8);
                list[24..32].copy_from_slice(&crate::common::facts().identity.naa.to_be_bytes());
                (list[48], list[51]) = (2, 0x18);
                list[59] = u8::try_from(random.below(256)).unwrap_or(0);
                list[66] = u8::try_from(random.below(4)).unwrap_or(0);
                list[67] = u8::try_from(random.below(256)).unwrap_or(0);
                list[75] = u8::try_from(random.below(256)).unwrap_or(0);
                if random.one_in(4) {
                    let byte = usize::try_from(random.below(76)).unwrap_or(0);
                    list[byte] ^= 1 << random.below(8);
                }
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

pub(crate) fn random_failure(random: &mut Random) -> Failure {
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
    if entry.opcode == 0x83 {
        cdb[10..14].copy_from_slice(&[0, 0, 0, 76]);
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
