//! A device in memory, whose requests complete at once, and what tests do with stores on it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;

use blobstore::check::{Severity, check};
use blobstore::{BlobId, Device, DeviceError, Place, Properties, Store};
use futures_util::FutureExt;
use sha2::{Digest, Sha256};

/// The device. Counts what changes it; never fails, except where a request exceeds it.
#[derive(Clone)]
pub(crate) struct Memory {
    pub(crate) bytes: RefCell<Vec<u8>>,
    pub(crate) properties: Properties,
    pub(crate) external: HashMap<Vec<u8>, Vec<u8>>,
    pub(crate) writes: Cell<u64>,
    /// Whether unmapped blocks keep their content, as on a device without unmap.
    pub(crate) keeps: bool,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>, block_size: u32) -> Self {
        let size = bytes.len() as u64;
        let properties = Properties { size, block_size, unmap: true, unmap_zeroes: true };
        let (external, writes) = (HashMap::new(), Cell::new(0));
        Self { bytes: RefCell::new(bytes), properties, external, writes, keeps: false }
    }

    /// A device that cannot unmap and is full of old data.
    pub(crate) fn dirty(size: usize, block_size: u32) -> Self {
        let mut memory = Self::new(vec![0xdb; size], block_size);
        (memory.properties.unmap, memory.properties.unmap_zeroes, memory.keeps) =
            (false, false, true);
        memory
    }

    fn change(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, DeviceError> {
        self.writes.set(self.writes.get() + 1);
        self.range(offset, len)
    }

    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, DeviceError> {
        let block = u64::from(self.properties.block_size);
        assert!(
            offset.is_multiple_of(block) && len.is_multiple_of(block),
            "{offset} + {len}: not aligned"
        );
        let end = offset.checked_add(len).filter(|end| *end <= self.properties.size);
        let end = end.ok_or(DeviceError { errno: 5 })?;
        Ok(usize::try_from(offset).unwrap()..usize::try_from(end).unwrap())
    }
}

impl Device for Memory {
    fn properties(&self) -> Properties {
        self.properties
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, DeviceError> {
        let range = self.range(offset, len as u64)?;
        Ok(self.bytes.borrow()[range].to_vec())
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), DeviceError> {
        let range = self.change(offset, data.len() as u64)?;
        self.bytes.borrow_mut()[range].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let range = self.change(offset, len)?;
        self.bytes.borrow_mut()[range].fill(0);
        Ok(())
    }

    async fn unmap(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        assert!(self.properties.unmap, "the device has no unmap");
        let range = self.change(offset, len)?;
        if !self.keeps {
            self.bytes.borrow_mut()[range].fill(0);
        }
        Ok(())
    }

    async fn read_external(
        &self,
        id: &[u8],
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, DeviceError> {
        let content = self.external.get(id).ok_or(DeviceError { errno: 19 })?;
        let start = usize::try_from(offset).unwrap().min(content.len());
        let mut bytes = content[start..(start + len).min(content.len())].to_vec();
        bytes.resize(len, 0);
        Ok(bytes)
    }
}

/// The result of a future that does not wait.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("the device completes at once")
}

/// The content of one cluster of a blob.
pub(crate) fn cluster<D: Device>(store: &Store<D>, id: BlobId, index: u64) -> Vec<u8> {
    let size = usize::try_from(store.cluster_size()).unwrap();
    match store.resolve(id, index).unwrap() {
        Place::Own(n) | Place::Inherited(n) => {
            now(store.device().read(store.offset(n), size)).unwrap()
        }
        Place::External => {
            let external = store.external(id).unwrap().unwrap();
            now(store.device().read_external(&external, index * size as u64, size)).unwrap()
        }
        Place::Zeroes => vec![0; size],
    }
}

/// The SHA-256 of the whole content of a blob.
pub(crate) fn hash<D: Device>(store: &Store<D>, id: BlobId) -> String {
    let size = usize::try_from(store.cluster_size()).unwrap();
    let (mut hash, zeroes) = (Sha256::new(), vec![0; size]);
    let places = store.places(id).unwrap();
    for (index, place) in (0..).zip(&places.table) {
        assert_eq!(Place::decode(*place), store.resolve(id, index).unwrap());
        match Place::decode(*place) {
            Place::Zeroes => hash.update(&zeroes),
            _ => hash.update(cluster(store, id, index)),
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes to a part of a cluster, as a guest would: the cluster is allocated if need be.
pub(crate) fn write<D: Device>(
    store: &mut Store<D>,
    id: BlobId,
    index: u64,
    at: u64,
    data: Vec<u8>,
) {
    let cluster = match store.resolve(id, index).unwrap() {
        Place::Own(cluster) => cluster,
        _ => now(store.allocate(id, &[index])).unwrap()[0],
    };
    now(store.device().write(store.offset(cluster) + at, data)).unwrap();
}

/// What is wrong with a store.
pub(crate) fn findings<D: Device>(device: &D) -> Vec<String> {
    let found = now(check(device)).unwrap();
    let bad = found.into_iter().filter(|finding| finding.severity > Severity::Note);
    bad.map(|finding| finding.to_string()).collect()
}

/// The directory with the images that SPDK has written.
pub(crate) fn images() -> PathBuf {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/reference/images");
    let path = PathBuf::from(std::env::var("VHOST_IMAGES").unwrap_or_else(|_| path.to_owned()));
    assert!(path.is_dir(), "no images of SPDK's in {path:?}: set VHOST_IMAGES to their directory");
    path
}

/// An unpacked image.
pub(crate) fn image(file: &str) -> Vec<u8> {
    let packed = std::fs::File::open(images().join(file)).unwrap();
    let mut reader = ruzstd::decoding::StreamingDecoder::new(packed).unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
    bytes
}

/// What is known of the images.
pub(crate) fn truth() -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(images().join("truth.json")).unwrap()).unwrap()
}
