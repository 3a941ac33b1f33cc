//! A disk in memory that does what the plans of its logical unit say.

use scsi::report::{Provisioning, lba_status};
use scsi::{
    Attention, Buffers, Facts, Failure, Fast, Format, LogicalUnit, Nexus, Op, Outcome, Plan, Port,
    Range, Reply, Sense, Status, Step, Transferred, decode, fast,
};

/// How a command ended.
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) sense: Option<Sense>,
    pub(crate) format: Format,
    pub(crate) transferred: Transferred,
    pub(crate) data_in: Vec<u8>,
}

/// A number of a disk that is in memory.
fn small(number: u64) -> usize {
    usize::try_from(number).expect("a small disk")
}

/// A logical unit with its blocks.
pub(crate) struct Disk {
    pub(crate) lu: LogicalUnit,
    facts: Facts,
    data: Vec<u8>,
    mapped: Vec<bool>,
    reply: Reply,
}

impl Disk {
    pub(crate) fn new(facts: Facts) -> Self {
        let [blocks, block_bytes] = [facts.blocks, facts.block_bytes.into()].map(small);
        Self {
            lu: LogicalUnit::new(facts),
            facts,
            data: vec![0; blocks * block_bytes],
            mapped: vec![false; blocks],
            reply: Reply::new(),
        }
    }

    /// Executes a command, as a device does: READ and WRITE on the fast path.
    pub(crate) fn command(
        &mut self,
        nexus: Nexus,
        port: Port,
        cdb: &[u8],
        data_out: &[u8],
        data_in_bytes: u64,
    ) -> Answer {
        let buffers = Buffers { data_in: data_in_bytes, data_out: data_out.len() as u64 };
        let gate = self.lu.gate(nexus);
        let quick = decode(cdb).map_or(Fast::Slow, |c| fast(&c, &self.facts, gate, buffers));
        let ended = |outcome: Outcome, format: Format, data_in: Vec<u8>| {
            let Outcome { status, sense, transferred } = outcome;
            Answer { status, sense, format, transferred, data_in }
        };
        let step = match quick {
            Fast::Io(plan) => Step::Io(plan),
            Fast::Failed(sense) => {
                let outcome = Outcome::failed(sense, buffers.longest());
                return ended(outcome, gate.format(), Vec::new());
            }
            Fast::Slow => self.start(nexus, port, cdb, data_out, buffers),
        };
        let format = self.lu.gate(nexus).format();
        match step {
            Step::Io(plan) => {
                let mut data_in = Vec::new();
                let result = self.run(&plan, data_out, &mut data_in);
                self.lu.copied(nexus, &plan, result);
                ended(Outcome::of(&plan, &self.facts, result), format, data_in)
            }
            Step::LbaStatus(query) => {
                let range = Range { lba: query.lba, blocks: query.blocks };
                let extents = self.extents(range, query.extents_max);
                lba_status(&query, extents, buffers, &mut self.reply);
                self.answer()
            }
            _ => self.answer(),
        }
    }

    fn start(
        &mut self,
        nexus: Nexus,
        port: Port,
        cdb: &[u8],
        data_out: &[u8],
        buffers: Buffers,
    ) -> Step {
        let step = self.lu.start(nexus, port, cdb, buffers, &mut self.reply);
        let Step::Parameters { bytes } = step else { return step };
        let list = &data_out[..small(bytes.into())];
        self.lu.with_parameters(nexus, port, cdb, list, buffers, &mut self.reply)
    }

    fn answer(&self) -> Answer {
        Answer {
            status: self.reply.status(),
            sense: self.reply.sense(),
            format: self.reply.format(),
            transferred: self.reply.transferred(),
            data_in: self.reply.data().to_vec(),
        }
    }

    /// The places of a range in `mapped`, and its bytes in `data`.
    fn places(&self, range: Range) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let [first, blocks, bytes] =
            [range.lba, range.blocks, self.facts.block_bytes.into()].map(small);
        (first..first + blocks, first * bytes..(first + blocks) * bytes)
    }

    /// The first extents of a range. The last may be too short if they are more than `max`.
    fn extents(&self, range: Range, max: usize) -> Vec<(u64, Provisioning)> {
        let mut extents: Vec<(u64, Provisioning)> = Vec::new();
        for mapped in &self.mapped[self.places(range).0] {
            let state = if *mapped { Provisioning::Mapped } else { Provisioning::Deallocated };
            match extents.last_mut() {
                Some((blocks, last)) if *last == state => *blocks += 1,
                _ => extents.push((1, state)),
            }
            if extents.len() > max {
                break;
            }
        }
        extents
    }

    /// Does a plan.
    fn run(&mut self, plan: &Plan, out: &[u8], data_in: &mut Vec<u8>) -> Result<(), Failure> {
        let (places, bytes) = self.places(plan.range);
        let block_bytes = small(self.facts.block_bytes.into());
        let blocks = &mut self.data[bytes.clone()];
        // VERIFY may have the data of one block for all blocks.
        let same = |blocks: &[u8], data: &[u8]| {
            let Some(part) = blocks.chunks(data.len()).find(|part| *part != data) else {
                return Ok(());
            };
            let differs = part.iter().zip(data).position(|(one, two)| one != two);
            Err(Failure::Miscompare(differs.expect("they differ") as u64))
        };
        match plan.op {
            Op::Read => data_in.extend_from_slice(blocks),
            Op::Write | Op::WriteAndVerify { .. } => blocks.copy_from_slice(&out[..bytes.len()]),
            Op::Verify | Op::Flush => {}
            Op::VerifyData => same(blocks, &out[..bytes.len()])?,
            Op::VerifyPattern => same(blocks, &out[..block_bytes])?,
            Op::WriteSame { .. } => {
                blocks.chunks_mut(block_bytes).for_each(|b| b.copy_from_slice(&out[..block_bytes]));
            }
            Op::WriteZeroes { .. } => blocks.fill(0),
            Op::Unmap => {
                for range in self.reply.ranges().to_vec() {
                    let (places, _) = self.places(range);
                    self.mapped[places].fill(false);
                }
            }
            Op::OrWrite => blocks.iter_mut().zip(out).for_each(|(to, from)| *to |= from),
            Op::Copy { from, .. } => {
                let (_, from) = self.places(Range { lba: from, ..plan.range });
                self.data.copy_within(from, bytes.start);
            }
            Op::CompareAndWrite => {
                let (old, new) = out.split_at(bytes.len());
                same(blocks, old)?;
                blocks.copy_from_slice(new);
            }
        }
        if !matches!(plan.op, Op::Read | Op::Verify | Op::VerifyData | Op::VerifyPattern) {
            self.mapped[places].fill(true);
        }
        Ok(())
    }

    /// A task management function ends nothing here, since no command waits.
    pub(crate) fn reset(&mut self) {
        self.lu.reset();
    }

    pub(crate) fn nexus_lost(&mut self, nexus: Nexus) {
        self.lu.nexus_lost(nexus);
    }

    pub(crate) fn attach(&mut self, nexus: Nexus) {
        assert!(self.lu.attach(nexus, false));
        self.lu.tell(nexus, Attention::PowerOn);
    }
}
