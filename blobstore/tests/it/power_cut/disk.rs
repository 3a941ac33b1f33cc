//! A disk with a volatile cache whose power can be cut at each write.
//!
//! A cut may lose any subset of the blocks that were written since the last flush. Blocks of 512
//! bytes are whole, as are the pages of 4096 bytes in the metadata region; the order of writes to
//! one block is kept. After an unmap, blocks read as zeroes, or, on a disk that does not promise
//! it, as garbage. Reads never fail.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;

use blobstore::{Device, DeviceError, Properties};

use super::random::Random;

pub(crate) const GARBAGE: u8 = 0xdb;

/// A handle of the disk: a future may own one.
#[derive(Clone)]
pub(crate) struct Disk(Rc<State>);

struct State {
    /// What reads return.
    visible: RefCell<Vec<u8>>,
    /// What has been flushed.
    durable: RefCell<Vec<u8>>,
    /// Writes since the last flush.
    cached: RefCell<Vec<(usize, Vec<u8>)>>,
    /// Requests until the cut.
    left: Cell<u64>,
    properties: Properties,
    /// The end of the region whose pages are written whole.
    metadata: Cell<usize>,
}

impl Disk {
    pub(crate) fn new(size: usize, unmap: bool, unmap_zeroes: bool) -> Self {
        let properties = Properties { size: size as u64, block_size: 512, unmap, unmap_zeroes };
        Self::with(vec![GARBAGE; size], properties, 0)
    }

    fn with(bytes: Vec<u8>, properties: Properties, metadata: usize) -> Self {
        Self(Rc::new(State {
            visible: RefCell::new(bytes.clone()),
            durable: RefCell::new(bytes),
            cached: RefCell::default(),
            left: Cell::new(u64::MAX),
            properties,
            metadata: Cell::new(metadata),
        }))
    }

    pub(crate) fn set_metadata(&self, end: u64) {
        self.0.metadata.set(usize::try_from(end).unwrap());
    }

    /// The power is cut at the `requests`-th write or flush from now on: it and all later ones do
    /// not complete.
    pub(crate) fn cut_after(&self, requests: u64) {
        self.0.left.set(requests);
    }

    /// What is left on the disk when the power is back.
    pub(crate) fn power_up(&self, random: &mut Random) -> Self {
        let mut bytes = self.0.durable.borrow().clone();
        let mode = random.below(5);
        let cached = self.0.cached.borrow();
        for (number, (offset, data)) in cached.iter().enumerate() {
            let whole_write = random.chance(50);
            let grain = if *offset < self.0.metadata.get() { 4096 } else { 512 };
            for (at, part) in data.chunks(grain).enumerate() {
                let kept = match mode {
                    0 => false,
                    1 => true,
                    2 => whole_write,
                    3 => number + 1 == cached.len(),
                    _ => random.chance(50),
                };
                if kept {
                    let start = offset + at * grain;
                    bytes[start..start + part.len()].copy_from_slice(part);
                }
            }
        }
        Self::with(bytes, self.0.properties, self.0.metadata.get())
    }

    async fn change(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        let start = usize::try_from(offset).unwrap();
        assert!(start + data.len() <= self.0.visible.borrow().len(), "beyond the end");
        let cut = !self.count();
        self.0.visible.borrow_mut()[start..start + data.len()].copy_from_slice(&data);
        self.0.cached.borrow_mut().push((start, data));
        if cut {
            pending::<()>().await;
        }
        Ok(())
    }

    /// Whether a request completes.
    fn count(&self) -> bool {
        self.0.left.set(self.0.left.get().saturating_sub(1));
        self.0.left.get() > 0
    }
}

impl Device for Disk {
    fn properties(&self) -> Properties {
        self.0.properties
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let start = usize::try_from(offset).unwrap();
        Ok(self.0.visible.borrow()[start..start + len].to_vec())
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        self.change(offset, data).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        if !self.count() {
            pending::<()>().await;
        }
        let mut durable = self.0.durable.borrow_mut();
        for (start, data) in self.0.cached.borrow_mut().drain(..) {
            durable[start..start + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.change(offset, vec![0; usize::try_from(len).unwrap()]).await
    }

    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        assert!(self.0.properties.unmap, "the disk has no unmap");
        let left = if self.0.properties.unmap_zeroes { 0 } else { GARBAGE };
        self.change(offset, vec![left; usize::try_from(len).unwrap()]).await
    }
}
