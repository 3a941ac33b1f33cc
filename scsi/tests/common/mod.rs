//! A logical unit in a test's hand: commands with buffers, and short names for what they answer.
#![allow(dead_code, reason = "each test file uses a part of it")]

use scsi::sense::{Code, Key};
use scsi::{
    Buffers, Facts, Identity, LogicalUnit, Nexus, Plan, Port, Reply, Sense, Status, Step, Unmap,
};

/// The port through which the commands of tests come.
pub(crate) const PORT: Port = Port { target: 0, relative: 0, group: 0 };
/// The nexus of tests that need one.
pub(crate) const A: Nexus = Nexus(0xa);
/// Another.
pub(crate) const B: Nexus = Nexus(0xb);

/// The disk of most tests: "Malloc0" of 1,000 blocks of 512 bytes, with unmap and a write cache.
pub(crate) fn facts() -> Facts {
    let mut facts = Facts::new(512, 1000, Identity::of("Malloc disk", "Malloc0"));
    facts.unmap = Some(Unmap { blocks_max: 100, descriptors_max: 4, ..facts.default_unmap() });
    facts.write_cache = true;
    facts.write_same_blocks_max = 2000;
    facts.transfer_blocks_max = 500;
    facts.compare_blocks_max = 8;
    facts
}

/// A logical unit, and a place for its answers.
pub(crate) struct Unit {
    /// The logical unit.
    pub(crate) lu: LogicalUnit,
    /// The port through which commands come.
    pub(crate) port: Port,
    /// The last answer.
    pub(crate) reply: Reply,
}

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// GOOD, with data-in.
    Good(Vec<u8>),
    /// Block I/O.
    Io(Plan),
    /// CHECK CONDITION.
    Check(Sense),
    /// Another status.
    Status(Status),
}

impl Unit {
    /// The unit of these facts, with both nexuses attached and nothing pending.
    pub(crate) fn new(facts: Facts) -> Self {
        let mut lu = LogicalUnit::new(facts);
        assert!(lu.attach(A, false) && lu.attach(B, false));
        Self { lu, port: PORT, reply: Reply::new() }
    }

    /// A command with data-out, and a data-in buffer of 64 KiB if there is no data-out.
    pub(crate) fn send(&mut self, nexus: Nexus, cdb: &[u8], data_out: &[u8]) -> End {
        let data_in = if data_out.is_empty() { 65536 } else { 0 };
        self.send_with(nexus, cdb, data_out, Buffers { data_in, data_out: data_out.len() as u64 })
    }

    /// A command with buffers of these lengths.
    pub(crate) fn send_with(
        &mut self,
        nexus: Nexus,
        cdb: &[u8],
        data_out: &[u8],
        buffers: Buffers,
    ) -> End {
        let mut step = self.lu.start(nexus, self.port, cdb, buffers, &mut self.reply);
        if let Step::Parameters { bytes } = step {
            let list = &data_out[..bytes as usize];
            step = self.lu.with_parameters(nexus, self.port, cdb, list, buffers, &mut self.reply);
        }
        match step {
            Step::Parameters { .. } => panic!("parameters are asked for once"),
            Step::Io(plan) => End::Io(plan),
            Step::LbaStatus(query) => {
                scsi::report::lba_status(&query, [], buffers, &mut self.reply);
                End::Good(self.reply.data().to_vec())
            }
            Step::Done => match (self.reply.status(), self.reply.sense()) {
                (Status::Good, None) => End::Good(self.reply.data().to_vec()),
                (Status::CheckCondition, Some(sense)) => End::Check(sense),
                (status, None) => End::Status(status),
                other => panic!("{other:?}"),
            },
        }
    }

    /// The data-in of a command that succeeds.
    pub(crate) fn data(&mut self, cdb: &[u8]) -> Vec<u8> {
        match self.send(A, cdb, &[]) {
            End::Good(data) => data,
            other => panic!("{cdb:x?}: {other:x?}"),
        }
    }

    /// The plan of a command.
    pub(crate) fn plan(&mut self, cdb: &[u8], data_out: &[u8]) -> Plan {
        match self.send(A, cdb, data_out) {
            End::Io(plan) => plan,
            other => panic!("{cdb:x?}: {other:x?}"),
        }
    }

    /// The sense data of a command that fails: key, code, qualifier.
    pub(crate) fn error(&mut self, cdb: &[u8], data_out: &[u8]) -> (Key, u8, u8) {
        match self.send(A, cdb, data_out) {
            End::Check(Sense { key, code: Code(code, qualifier), .. }) => (key, code, qualifier),
            other => panic!("{cdb:x?}: {other:x?}"),
        }
    }

    /// A command that succeeds without data.
    pub(crate) fn good(&mut self, nexus: Nexus, cdb: &[u8], data_out: &[u8]) {
        assert_eq!(self.send(nexus, cdb, data_out), End::Good(vec![]), "{cdb:x?}");
    }
}

/// ILLEGAL REQUEST, INVALID FIELD IN CDB.
pub(crate) const INVALID_FIELD: (Key, u8, u8) = (Key::IllegalRequest, 0x24, 0);
/// ILLEGAL REQUEST, INVALID COMMAND OPERATION CODE.
pub(crate) const INVALID_OPCODE: (Key, u8, u8) = (Key::IllegalRequest, 0x20, 0);
/// ILLEGAL REQUEST, LOGICAL BLOCK ADDRESS OUT OF RANGE.
pub(crate) const OUT_OF_RANGE: (Key, u8, u8) = (Key::IllegalRequest, 0x21, 0);
/// ILLEGAL REQUEST, INVALID FIELD IN PARAMETER LIST.
pub(crate) const INVALID_LIST: (Key, u8, u8) = (Key::IllegalRequest, 0x26, 0);
/// ILLEGAL REQUEST, PARAMETER LIST LENGTH ERROR.
pub(crate) const LIST_LENGTH: (Key, u8, u8) = (Key::IllegalRequest, 0x1a, 0);
/// DATA PROTECT, WRITE PROTECTED.
pub(crate) const PROTECTED: (Key, u8, u8) = (Key::DataProtect, 0x27, 0);

/// A CDB of `len` bytes that begins with `head`.
pub(crate) fn cdb(head: &[u8], len: usize) -> Vec<u8> {
    let mut cdb = head.to_vec();
    cdb.resize(len, 0);
    cdb
}

/// A CDB of medium access: its length follows its operation code.
pub(crate) fn medium(opcode: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    let (lba8, lba4, count) = (lba.to_be_bytes(), &lba.to_be_bytes()[4..], blocks.to_be_bytes());
    let parts: [&[u8]; 5] = match opcode >> 5 {
        0 => [&[opcode], &lba8[5..], &count[3..], &[0], &[]],
        1 | 2 => [&[opcode, flags], lba4, &[0], &count[2..], &[0]],
        5 => [&[opcode, flags], lba4, &count, &[0, 0], &[]],
        _ => [&[opcode, flags], &lba8, &count, &[0, 0], &[]],
    };
    parts.concat()
}
