//! A server's disk as a bdev.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bdev::{Bdev, Channel, Durability, Error, Features, Qos, QueueChannel, Stats, checked_size};
use uuid::Uuid;

use crate::connection::{Connection, Served};
use crate::memory::{CHUNK, Layout};
use crate::queue::Queue;
use crate::session::{Properties, Session};
use crate::size::Size;

/// A disk that another vhost-user-blk server serves.
///
/// Data goes through bounce buffers that are shared with the server, so that it can access no
/// memory of a guest.
#[derive(Debug)]
pub struct VirtioDisk {
    name: String,
    uuid: Uuid,
    block_size: u32,
    size: Arc<Size>,
    features: Features,
    queues: Arc<[Arc<Queue>]>,
    /// The queue of the next channel.
    next: AtomicUsize,
    connection: Connection,
    stats: Stats,
    qos: Qos,
}

/// The options of [`VirtioDisk::connect`].
#[derive(Clone, Debug)]
pub struct VirtioOptions {
    /// The bdev's name; not empty.
    pub name: String,
    /// The server's socket.
    pub socket: PathBuf,
    /// The number of queues to use, if the server has as many; not 0. Channels share them.
    pub queues: u16,
    /// The number of entries of each queue: a power of two from 4 to 32768.
    pub queue_size: u16,
}

impl VirtioOptions {
    /// # Errors
    /// [`Error::Invalid`] if a number is out of range, or the name is empty.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { name, queues, queue_size, .. } = self;
        checked_size(name, 1, 512)?;
        if *queues == 0 || !queue_size.is_power_of_two() || !(4..=32768).contains(queue_size) {
            return Err(Error::Invalid(format!(
                "{name}: invalid vq_count {queues} or vq_size {queue_size}: expected at least one \
                 queue, and a power of two from 4 to 32768 as the size"
            )));
        }
        Ok(())
    }
}

/// Namespace of the UUIDs, which are derived from a bdev's socket and name.
const NAMESPACE: Uuid = Uuid::from_u128(0x0a2c_7d1e_55b7_4c0a_9b5c_3b9d_6f0e_81d4);

impl VirtioDisk {
    /// Connects to a server. May block for some tens of seconds.
    ///
    /// # Errors
    /// ENOENT or ECONNREFUSED if no server listens; EIO if it violates the protocol or lacks a
    /// feature; [`Error::Invalid`] if an option or a property of its disk is out of range.
    pub fn connect(options: VirtioOptions) -> Result<Arc<Self>, Error> {
        options.check()?;
        let VirtioOptions { name, socket, queues, queue_size } = options;
        let session = Session::connect(&socket)?;
        let Properties { size, block_size, limits, .. } = session.properties;
        if block_size as usize > CHUNK {
            let text = format!("{name}: the server's block size {block_size} is above {CHUNK}");
            return Err(Error::Invalid(text));
        }
        let num_blocks = size.checked_div(block_size.into()).unwrap_or(0);
        checked_size(&name, num_blocks, block_size)?;
        let layout = Layout::new(queue_size);
        let what = |source| Error::System { what: name.clone(), source };
        let durability = Arc::new(Durability::default());
        let made: Result<Vec<_>, _> = (0..queues.min(session.queues))
            .map(|_| Queue::new(layout.slots, limits, &durability).map(Arc::new))
            .collect();
        let queues: Arc<[Arc<Queue>]> = made.map_err(what)?.into();
        let features = features(session.properties);
        let text = format!("{}\0{name}", socket.display());
        let disk = Served { size: Arc::new(Size::new(num_blocks, block_size)), queues, durability };
        let (size, queues) = (Arc::clone(&disk.size), Arc::clone(&disk.queues));
        let connection = Connection::start(&name, socket, session, layout, disk).map_err(what)?;
        Ok(Arc::new(Self {
            uuid: Uuid::new_v5(&NAMESPACE, text.as_bytes()),
            name,
            block_size,
            size,
            features,
            queues,
            next: AtomicUsize::new(0),
            connection,
            stats: Stats::default(),
            qos: Qos::default(),
        }))
    }

    /// The server's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        self.connection.socket()
    }

    /// Returns whether the server is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.is_connected()
    }

    /// Its size, which may grow.
    pub(crate) fn size(&self) -> &Arc<Size> {
        &self.size
    }

    /// Fails all I/O, also the I/O under way. Called when the disk is being deleted.
    pub(crate) fn end(&self) {
        self.connection.end();
    }
}

fn features(properties: Properties) -> Features {
    let Properties { read_only, flush, discard, write_zeroes, .. } = properties;
    Features {
        read_only,
        flush,
        unmap: discard && !read_only,
        write_zeroes: write_zeroes && !read_only,
        reset: true,
        any_alignment: true,
    }
}

impl Bdev for VirtioDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn product_name(&self) -> &'static str {
        "VirtioBlk Disk"
    }

    fn uuid(&self) -> Uuid {
        self.uuid
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn num_blocks(&self) -> u64 {
        self.size.blocks()
    }

    fn features(&self) -> Features {
        self.features
    }

    fn stats(&self) -> &Stats {
        &self.stats
    }

    fn qos(&self) -> &Qos {
        &self.qos
    }

    fn open(self: Arc<Self>, depth: u16) -> Result<Box<dyn Channel>, Error> {
        let what = format!("{}: cannot open an I/O path", self.name);
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.queues.len();
        let queue = Arc::clone(&self.queues[number]);
        match QueueChannel::open(self, queue, depth) {
            Ok(channel) => Ok(Box::new(channel)),
            Err(source) => Err(Error::System { what, source }),
        }
    }
}
