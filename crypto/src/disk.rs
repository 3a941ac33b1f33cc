//! A bdev whose data is encrypted on another bdev.

use std::sync::Arc;

use bdev::{Bdev, BdevChannel, Channel, Error, Features, Qos, Stats, Topology, derived_uuid};
use uuid::{Uuid, uuid};

use crate::channel::{CryptoChannel, PIECE};
use crate::keys::Key;

/// SPDK's namespace for the UUIDs of crypto bdevs.
const NAMESPACE: Uuid = uuid!("078e3cf7-f4b4-4545-b2c3-d40045a64ae2");

/// The parameters of [`CryptoDisk::create`].
pub struct CryptoOptions {
    /// The bdev's name.
    pub name: String,
    /// The bdev that stores the encrypted data.
    pub base: Arc<dyn Bdev>,
    /// Encrypts the data.
    pub key: Arc<Key>,
    /// Without a UUID, the UUID is derived from the base's.
    pub uuid: Option<Uuid>,
}

/// A bdev whose data is encrypted on another bdev.
pub struct CryptoDisk {
    name: String,
    uuid: Uuid,
    base: Arc<dyn Bdev>,
    key: Arc<Key>,
    stats: Stats,
    qos: Qos,
}

impl CryptoDisk {
    /// Makes a disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the name is empty, or the blocks of the base are longer than 64 KiB.
    pub fn create(options: CryptoOptions) -> Result<Arc<Self>, Error> {
        let CryptoOptions { name, base, key, uuid } = options;
        if name.is_empty() {
            return Err(Error::Invalid("the name is empty".into()));
        }
        let block_size = base.block_size();
        if usize::try_from(block_size).is_ok_and(|size| size > PIECE) {
            let text = format!("{name}: the base has blocks of {block_size} bytes; limit 65536");
            return Err(Error::Invalid(text));
        }
        let uuid = uuid.unwrap_or_else(|| derived_uuid(NAMESPACE, &*base, &[]));
        let (stats, qos) = (Stats::default(), Qos::default());
        Ok(Arc::new(Self { name, uuid, base, key, stats, qos }))
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    pub(crate) fn base(&self) -> &Arc<dyn Bdev> {
        &self.base
    }
}

impl Bdev for CryptoDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "crypto"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.base.block_size()
    }

    fn num_blocks(&self) -> u64 {
        self.base.num_blocks()
    }

    fn features(&self) -> Features {
        let base = self.base.features();
        // Zeroes are encrypted and written, as zeroes of the base read as noise here. The data goes
        // through aligned buffers.
        Features { write_zeroes: !base.read_only, any_alignment: true, ..base }
    }

    fn topology(&self) -> Topology {
        self.base.topology()
    }

    fn bases(&self) -> Vec<Arc<dyn Bdev>> {
        vec![Arc::clone(&self.base)]
    }

    fn base_offset(&self) -> Option<u64> {
        Some(0)
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let base = BdevChannel::open(&self.base, CryptoChannel::base_depth(depth)?)?;
        let key = Arc::clone(&self.key);
        Ok(Box::new(CryptoChannel::new(self, key, base, depth)))
    }
}
