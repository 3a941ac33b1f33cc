//! The external snapshots of a store's volumes.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bdev::{Bdev, Error, Request, Rights, ThreadChannel};
use blobstore::DeviceError;

/// The bdevs that volumes read what they do not have from, by the id in the volumes' metadata.
///
/// A read may take as long as the bdev likes. So what an operation on the store will read is read
/// before, without the store's lock: see [`Externals::prefetch`].
#[derive(Default)]
pub(crate) struct Externals {
    state: Mutex<State>,
    /// A channel is free again.
    freed: Condvar,
}

#[derive(Default)]
struct State {
    bdevs: HashMap<Vec<u8>, External>,
    /// What was read before, by id and offset.
    prefetched: HashMap<(Vec<u8>, u64), Vec<u8>>,
}

struct External {
    bdev: Arc<dyn Bdev>,
    /// `None`: a thread uses it.
    channel: Option<ThreadChannel>,
}

impl Externals {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a bdev. Blocks.
    ///
    /// # Errors
    /// As [`Bdev::open`].
    pub(crate) fn add(&self, id: Vec<u8>, bdev: &Arc<dyn Bdev>) -> Result<(), Error> {
        let channel = Some(ThreadChannel::open(bdev, 1, Rights::Read)?);
        let before = self.lock().bdevs.insert(id, External { bdev: Arc::clone(bdev), channel });
        drop(before);
        Ok(())
    }

    /// Removes the bdevs that `which` selects. One that a thread reads is let go of when the read
    /// has ended.
    pub(crate) fn remove(&self, which: impl Fn(&Arc<dyn Bdev>) -> bool) {
        let gone: Vec<_> =
            self.lock().bdevs.extract_if(|_, external| which(&external.bdev)).collect();
        drop(gone);
    }

    /// Returns whether it has this bdev.
    pub(crate) fn has(&self, bdev: &Arc<dyn Bdev>) -> bool {
        self.lock().bdevs.values().any(|external| Arc::ptr_eq(&external.bdev, bdev))
    }

    /// Reads; zeroes beyond the end. Blocks.
    pub(crate) fn read(&self, id: &[u8], offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let none = DeviceError { errno: libc::ENODEV };
        let mut state = self.lock();
        let end = offset.saturating_add(len as u64);
        let known = state.prefetched.iter().find(|((of, start), data)| {
            of == id && *start <= offset && end <= start.saturating_add(data.len() as u64)
        });
        if let Some(((_, start), data)) = known {
            let at = usize::try_from(offset - start).map_err(|_| none)?;
            return Ok(data[at..at + len].to_vec());
        }
        let (bdev, mut channel) = loop {
            let external = state.bdevs.get_mut(id).ok_or(none)?;
            if let Some(channel) = external.channel.take() {
                break (Arc::clone(&external.bdev), channel);
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let data = read(&*bdev, &mut channel, offset, len);
        let mut state = self.lock();
        let external = state.bdevs.get_mut(id);
        // Otherwise it was removed meanwhile, or replaced.
        if let Some(external) = external.filter(|external| Arc::ptr_eq(&external.bdev, &bdev)) {
            external.channel = Some(channel);
        }
        drop(state);
        self.freed.notify_all();
        data
    }

    /// Reads, and keeps the data for later reads within the range, until
    /// [`Externals::forget`]. Blocks.
    pub(crate) fn prefetch(&self, id: &[u8], offset: u64, len: usize) -> Result<(), DeviceError> {
        let data = self.read(id, offset, len)?;
        self.lock().prefetched.insert((id.to_vec(), offset), data);
        Ok(())
    }

    /// Forgets what was read before at this offset.
    pub(crate) fn forget(&self, id: &[u8], offset: u64) {
        self.lock().prefetched.remove(&(id.to_vec(), offset));
    }
}

fn read(
    bdev: &dyn Bdev,
    channel: &mut ThreadChannel,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, DeviceError> {
    let invalid = DeviceError { errno: libc::EINVAL };
    let mut data = vec![0; len];
    let size = bdev.size_bytes();
    let there = size.saturating_sub(offset).min(len as u64);
    if there == 0 {
        return Ok(data);
    }
    // Whole blocks, which may be larger than those of the store.
    let block = u64::from(bdev.block_size());
    let start = offset - offset % block;
    let wanted = (offset + there).next_multiple_of(block).min(size) - start;
    let bytes = usize::try_from(wanted).map_err(|_| invalid)?;
    let read = channel.run(Request::read(start, bytes)).map_err(|errno| DeviceError { errno })?;
    let skipped = usize::try_from(offset - start).map_err(|_| invalid)?;
    let from = read.bytes().get(skipped..).unwrap_or_default();
    let n = from.len().min(usize::try_from(there).unwrap_or(len));
    data[..n].copy_from_slice(&from[..n]);
    Ok(data)
}
