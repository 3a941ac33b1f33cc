//! Other people's front ends behind one face, so that the test of a feature is written once.

mod blkio;
mod rust_vmm;
mod virtio_driver;

use std::path::Path;
use std::sync::Arc;

use front_end::{GuestRam, RingLayout, Segment};

pub(crate) use self::blkio::Blkio;
pub(crate) use self::rust_vmm::RustVmm;
pub(crate) use self::virtio_driver::VirtioDriver;

/// Descriptors in every ring.
pub(crate) const RING_SIZE: u16 = 256;

/// What a front end is to start with.
#[derive(Clone, Copy)]
pub(crate) struct Setup<'a> {
    pub(crate) socket: &'a Path,
    /// Memory for requests' data.
    pub(crate) ram: &'a Arc<GuestRam>,
    pub(crate) rings: RingLayout,
    pub(crate) queues: usize,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    /// Give memory in slots. Front ends that know no other way always do.
    pub(crate) slots: bool,
    /// Use an in-flight area.
    pub(crate) inflight: bool,
}

/// What to do with the disk.
#[derive(Clone, Copy)]
pub(crate) enum Io<'a> {
    Read {
        sector: u64,
        data: &'a [Segment],
    },
    Write {
        sector: u64,
        data: &'a [Segment],
    },
    Flush,
    Discard {
        sector: u64,
        sectors: u32,
    },
    WriteZeroes {
        sector: u64,
        sectors: u32,
        unmap: bool,
    },
    /// Only where [`Messages`] is.
    Id {
        data: &'a [Segment],
    },
}

/// A request that has come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Done {
    /// What it was submitted with.
    pub(crate) tag: usize,
    pub(crate) ok: bool,
}

/// A front end whose queues run.
pub(crate) trait FrontEnd: Sized {
    /// Its columns in the matrix.
    const NAME: &'static str;

    /// Connects and starts; fails the test if the back end lacks what `setup` wants.
    fn start(setup: Setup<'_>) -> Self;

    /// What the configuration space says: the disk's bytes and the device's queues.
    fn config(&mut self) -> (u64, u64);

    /// Lets requests use `ram`, one region. Queues run.
    fn add_memory(&mut self, ram: &Arc<GuestRam>);

    /// Takes it away again from the back end, though not from this process.
    fn remove_memory(&mut self, ram: &Arc<GuestRam>);

    /// Hands a request to the device, and kicks if the device wants that.
    fn submit(&mut self, queue: usize, io: Io<'_>, tag: usize);

    /// The next request that has come back. Sleeps until the device calls.
    fn wait(&mut self, queue: usize) -> Done;
}

/// A front end that lets its user say any message.
pub(crate) trait Messages: FrontEnd {
    fn front_end(&mut self) -> &mut front_end::FrontEnd;

    /// Requests that the device holds.
    fn in_flight(&self, queue: usize) -> usize;
}
