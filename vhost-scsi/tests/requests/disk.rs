//! A disk without contents, whose I/O completes at once or when the test says so.
//!
//! Faults that it may show: those of [`State`].
#![expect(unsafe_code, reason = "a channel gets addresses")]

use std::sync::{Arc, Mutex, MutexGuard};

use bdev::{Bdev, Channel, Completion, Features, Io, Op, Qos, Stats, Status, Submit, Tag, Wait};

use crate::suites::device::{State, Submitted};

/// A submitted I/O: operation, offset, length.
pub(crate) type Record = (Op, u64, u64);

/// The disk.
#[derive(Debug, Default)]
pub(crate) struct Manual {
    state: Arc<Mutex<State<Record>>>,
    stats: Stats,
    qos: Qos,
}

impl Manual {
    pub(crate) fn state(&self) -> MutexGuard<'_, State<Record>> {
        self.state.lock().unwrap()
    }
}

impl Bdev for Manual {
    fn name(&self) -> &str {
        "Manual"
    }
    fn product_name(&self) -> &'static str {
        "Manual disk"
    }
    fn uuid(&self) -> uuid::Uuid {
        uuid::Uuid::nil()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn num_blocks(&self) -> u64 {
        8192
    }
    fn features(&self) -> Features {
        Features { flush: true, ..Features::default() }
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn qos(&self) -> &Qos {
        &self.qos
    }
    fn open(self: Arc<Self>, _depth: u16) -> Result<Box<dyn Channel>, bdev::Error> {
        Ok(Box::new(ManualChannel(Arc::clone(&self.state))))
    }
}

struct ManualChannel(Arc<Mutex<State<Record>>>);

fn status(ok: bool) -> Status {
    if ok { Status::Ok } else { Status::IoError }
}

impl Channel for ManualChannel {
    unsafe fn submit(&mut self, io: Io) -> Submit {
        match self.0.lock().unwrap().submit(io.tag.0, (io.op, io.offset, io.len)) {
            Submitted::Full => Submit::Full(io),
            Submitted::Pending => Submit::Queued,
            Submitted::Ended(ok) => Submit::Done(status(ok)),
        }
    }

    /// The test wakes the reactor.
    fn wait(&self) -> Wait {
        self.0.lock().unwrap().at_wait.run();
        Wait::Event
    }

    fn poll(&mut self, done: &mut [Completion]) -> usize {
        let mut state = self.0.lock().unwrap();
        let ended = state.poll(done.len()).zip(done);
        ended.map(|((tag, ok), to)| *to = Completion { tag: Tag(tag), status: status(ok) }).count()
    }
}
