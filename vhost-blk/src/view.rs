//! What a queue needs to know of its disk. When this changes, the queue adopts a new view.

use std::sync::Arc;

use served_bdev::is_limited;
use vhost_target::device_queue::DeviceView;

use crate::config::Disk;
use crate::request::Limits;

/// What a queue needs to know of the disk in one generation.
#[derive(Clone, Debug)]
pub struct BlkView {
    /// The disk.
    pub(crate) disk: Arc<Disk>,
    /// The disk's size, block size and features when the view was created, against which requests
    /// are checked. A disk that grows gets a new view.
    pub(crate) limits: Limits,
    /// Whether writes have to be durable when they are answered.
    pub(crate) write_through: bool,
    /// The bdev, or one that it is built on, has rate limits.
    pub(crate) limited: bool,
}

impl BlkView {
    /// Returns a view of the disk as it is now, without its type.
    #[must_use]
    pub fn erased(disk: &Arc<Disk>, write_through: bool) -> DeviceView {
        let (disk, limits, limited) = (Arc::clone(disk), disk.limits(), is_limited(&*disk.bdev));
        Arc::new(Self { disk, limits, write_through, limited })
    }
}
