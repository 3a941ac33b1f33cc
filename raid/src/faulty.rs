//! A member for tests, in memory. It shows these faults: reads fail; changes fail; I/O hangs until
//! it is healed, or until the channel is abandoned; each third change takes some polls. What it
//! stores can be read meanwhile.
#![expect(unsafe_code, reason = "forwards I/O to `Channel::submit`")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bdev::{
    Bdev, BdevChannel, Channel, Completion, Error, Features, Io, Malloc, MallocOptions, Op, Qos,
    Stats, Status, Submit, Wait,
};
use uuid::Uuid;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    Reads,
    Changes,
    Hangs,
}

const FAULTS: [Fault; 4] = [Fault::None, Fault::Reads, Fault::Changes, Fault::Hangs];

pub(crate) struct Faulty {
    pub(crate) stored: Arc<dyn Bdev>,
    fault: AtomicU8,
    stats: Stats,
    qos: Qos,
}

impl Faulty {
    pub(crate) fn new(name: &str, size: u64) -> Arc<Self> {
        let options = MallocOptions {
            name: name.into(),
            num_blocks: size / 512,
            block_size: 512,
            uuid: None,
        };
        let stored = Malloc::create(options).unwrap();
        let fault = AtomicU8::new(0);
        Arc::new(Self { stored, fault, stats: Stats::default(), qos: Qos::default() })
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.fault.store(fault as u8, Ordering::Release);
    }

    pub(crate) fn fault(&self) -> Fault {
        FAULTS[usize::from(self.fault.load(Ordering::Acquire))]
    }
}

impl Bdev for Faulty {
    fn name(&self) -> &str {
        self.stored.name()
    }

    fn product_name(&self) -> &'static str {
        "Faulty"
    }

    fn uuid(&self) -> Uuid {
        self.stored.uuid()
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn num_blocks(&self) -> u64 {
        self.stored.num_blocks()
    }

    fn features(&self) -> Features {
        self.stored.features()
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(&self.stored, depth)?;
        Ok(Box::new(FaultyChannel {
            base,
            of: self,
            held: vec![],
            slow: vec![],
            changes: 0,
            ended: vec![],
            abandoned: false,
        }))
    }
}

struct FaultyChannel {
    base: BdevChannel,
    of: Arc<Faulty>,
    held: Vec<Io>,
    /// Slow changes, with the polls that they still take.
    slow: Vec<(Io, u32)>,
    changes: u32,
    ended: Vec<Completion>,
    abandoned: bool,
}

impl FaultyChannel {
    fn is_slow(&mut self) -> bool {
        self.changes += 1;
        self.changes.is_multiple_of(3)
    }

    /// Does the slow changes whose time has come.
    fn do_slow(&mut self) {
        let due = |(_, left): &mut (Io, u32)| {
            *left -= 1;
            *left == 0 || self.abandoned
        };
        for (io, _) in self.slow.extract_if(.., due) {
            // SAFETY: the I/O has not been reported.
            match unsafe { self.base.submit(io) } {
                Submit::Done(status) => self.ended.push(Completion { tag: io.tag, status }),
                Submit::Queued => {}
                Submit::Full(_) | Submit::Throttled(_) => panic!("a memory disk is never full"),
            }
        }
    }
}

impl Channel for FaultyChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        match self.of.fault() {
            Fault::Hangs if !self.abandoned => {
                self.held.push(io);
                Submit::Queued
            }
            Fault::Reads if io.op == Op::Read => Submit::Done(Status::IoError),
            Fault::Changes if io.op != Op::Read => Submit::Done(Status::IoError),
            Fault::None if matches!(io.op, Op::Write) && !self.abandoned && self.is_slow() => {
                self.slow.push((io, 1 + self.changes % 40));
                Submit::Queued
            }
            // SAFETY: by the caller's promise.
            _ => unsafe { self.base.submit(io) },
        }
    }

    fn wait(&self) -> Wait {
        Wait::Poll
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        if self.of.fault() != Fault::Hangs || self.abandoned {
            for io in std::mem::take(&mut self.held) {
                let status = if self.abandoned {
                    Status::IoError
                } else {
                    // SAFETY: the I/O has not been reported.
                    match unsafe { self.submit(io) } {
                        Submit::Done(status) => status,
                        Submit::Queued => continue,
                        Submit::Full(_) | Submit::Throttled(_) => Status::IoError,
                    }
                };
                self.ended.push(Completion { tag: io.tag, status });
            }
        }
        self.do_slow();
        let own = self.ended.len().min(done.len());
        for (place, completion) in done.iter_mut().zip(self.ended.drain(..own)) {
            *place = completion;
        }
        own + self.base.poll(&mut done[own..])
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        self.base.abandon();
    }
}
