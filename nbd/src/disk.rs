//! An export of an NBD server as a bdev.

use std::sync::Arc;
use std::time::Duration;

use bdev::{
    BLOCK_SIZE_MIN, Bdev, Channel, Durability, Error, Features, Qos, QueueChannel, Stats, Topology,
    checked_size,
};
use uuid::Uuid;

use crate::connector::{Connector, Wanted, connect, waker};
use crate::handshake::Export;
use crate::protocol::transmission::{READ_ONLY, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES};
use crate::queue::Queue;
use crate::uri::NbdUri;

/// The most connections of a disk. Each takes 512 KiB of memory.
pub const CONNECTIONS_MAX: u32 = 16;

/// A disk that an NBD server serves.
///
/// Data goes through staging buffers, so that neither the server nor the kernel accesses a guest's
/// memory when an I/O was given up.
#[derive(Debug)]
pub struct NbdDisk {
    name: String,
    uuid: Uuid,
    block_size: u32,
    num_blocks: u64,
    features: Features,
    topology: Topology,
    queues: Arc<[Arc<Queue>]>,
    connector: Connector,
    stats: Stats,
    qos: Qos,
}

/// The options of [`NbdDisk::connect`].
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The bdev's name; not empty.
    pub name: String,
    /// The export.
    pub uri: NbdUri,
    /// The bytes in a block: a power of two, 512 or more, and not less than the server's minimum
    /// block size. `None`: the smallest possible.
    pub block_size: Option<u32>,
    /// Writes are refused, also if the server allows them.
    pub readonly: bool,
    /// The bdev's UUID. `None`: derived from URI and name.
    pub uuid: Option<Uuid>,
    /// After this time without a server, I/O fails until there is one. `None`: it waits for ever.
    pub reconnect_delay: Option<Duration>,
    /// The interval of attempts to connect to a server that is away.
    pub reconnect_interval: Duration,
    /// The number of connections, from 1 to [`CONNECTIONS_MAX`], if the server allows as many.
    /// Channels share them.
    pub connections: u32,
}

impl NbdOptions {
    /// # Errors
    /// [`Error::Invalid`] if a number is out of range, or the name is empty.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { name, block_size, connections, .. } = self;
        checked_size(name, 1, block_size.unwrap_or(BLOCK_SIZE_MIN))?;
        if !(1..=CONNECTIONS_MAX).contains(connections) {
            return Err(Error::Invalid(format!(
                "{name}: invalid number of connections {connections}: expected 1 to \
                 {CONNECTIONS_MAX}"
            )));
        }
        Ok(())
    }
}

/// Namespace of the UUIDs, which are derived from a bdev's URI and name.
const NAMESPACE: Uuid = Uuid::from_u128(0x5b1d_2c8e_6f37_4a55_8a0e_90d1_47c2_be63);

impl NbdDisk {
    /// Connects to a server. May block for some tens of seconds, or as long as the resolver of host
    /// names.
    ///
    /// # Errors
    /// The errno of `connect` if no server listens; ENOENT if it has no such export; ETIMEDOUT; EIO
    /// if it violates the protocol; [`Error::Invalid`] if an option or a property of the export is
    /// out of range.
    pub fn connect(options: NbdOptions) -> Result<Arc<Self>, Error> {
        options.check()?;
        let NbdOptions { name, uri, readonly, uuid, connections, .. } = options;
        let NbdOptions { reconnect_delay, reconnect_interval, .. } = options;
        let (sockets, export) = connect(&name, &uri, connections as usize)?;
        let block_size = options.block_size.unwrap_or(export.min_block.max(BLOCK_SIZE_MIN));
        if block_size < export.min_block || block_size > export.payload_max {
            return Err(Error::Invalid(format!(
                "{name}: invalid block size {block_size}: the server allows I/Os of {} to {} bytes",
                export.min_block, export.payload_max
            )));
        }
        let num_blocks = export.size / u64::from(block_size);
        checked_size(&name, num_blocks, block_size)?;
        let text = format!("{uri}\0{name}");
        let what = |source| Error::System { what: name.clone(), source };
        let durability = Arc::new(Durability::default());
        let wake = waker().map_err(what)?;
        let payload_max = export.payload_max - export.payload_max % block_size;
        let queues: Result<Vec<_>, _> = sockets
            .iter()
            .map(|_| Queue::new(payload_max, &durability, &wake).map(Arc::new))
            .collect();
        let queues: Arc<[Arc<Queue>]> = queues.map_err(what)?.into();
        let wanted =
            Wanted { name: name.clone(), uri, export, reconnect_delay, reconnect_interval };
        let connector = Connector::start(wanted, sockets, Arc::clone(&queues), durability, wake);
        Ok(Arc::new(Self {
            connector: connector.map_err(what)?,
            uuid: uuid.unwrap_or_else(|| Uuid::new_v5(&NAMESPACE, text.as_bytes())),
            name,
            block_size,
            num_blocks,
            features: features(export, readonly),
            topology: topology(export, block_size),
            queues,
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }

    /// The address of the export.
    #[must_use]
    pub fn uri(&self) -> &NbdUri {
        self.connector.uri()
    }

    /// Returns whether the server is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connector.is_connected()
    }

    /// The number of connections that the disk uses.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.queues.len()
    }

    /// Fails all I/O, also the I/O under way. Called when the disk is being deleted.
    pub(crate) fn end(&self) {
        self.connector.end();
    }
}

fn features(export: Export, readonly: bool) -> Features {
    let read_only = readonly || export.has(READ_ONLY);
    Features {
        read_only,
        flush: export.has(SEND_FLUSH),
        unmap: export.has(SEND_TRIM) && !read_only,
        write_zeroes: export.has(SEND_WRITE_ZEROES) && !read_only,
        reset: true,
        any_alignment: true,
    }
}

fn topology(export: Export, block_size: u32) -> Topology {
    Topology { optimal_io_blocks: export.preferred_block / block_size, ..Topology::default() }
}

impl Bdev for NbdDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "NBD Disk"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.num_blocks
    }

    fn features(&self) -> Features {
        self.features
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let what = format!("{}: cannot open an I/O path", self.name);
        let least_used = self.queues.iter().min_by_key(|queue| queue.channels());
        let Some(queue) = least_used.map(Arc::clone) else {
            return Err(Error::NoDevice(what));
        };
        match QueueChannel::open(self, queue, depth) {
            Ok(channel) => Ok(Box::new(channel)),
            Err(source) => Err(Error::System { what, source }),
        }
    }
}
