//! The kinds of devices that a guest's queues are served by.

use std::sync::Arc;

use bdev::Bdev;
use vhost_blk::config::Disk;
use vhost_blk::{BlkQueue, BlkView};
use vhost_scsi::{Scsi, Units};
use vhost_target::device::{Device as _, Negotiated};
use vhost_target::device_queue::DeviceView;
use vhost_target::queue::{NewQueue, Queue, TargetQueue};
use vhost_target::{Core, Mode, Target};

/// The first virtqueue of commands of virtio-scsi.
const FIRST_COMMAND_QUEUE: usize = 2;

/// A device over a disk.
pub(crate) enum Device {
    Blk(Arc<Disk>),
    /// The disk is target 0.
    Scsi(Arc<Scsi>, Box<dyn Negotiated>),
}

impl Device {
    pub(crate) fn blk(bdev: &Arc<dyn Bdev>) -> Self {
        Self::Blk(Arc::new(Disk::new(Arc::clone(bdev), false)))
    }

    pub(crate) fn scsi(bdev: &Arc<dyn Bdev>) -> Self {
        let scsi = Scsi::new("bench", &Arc::new(Units::default()));
        // Tells its guests of a new disk; there are none. No reactor runs while something is counted.
        let target = Target::start(&[Core(0)], Mode::Sleep { after_us: 0 }, Arc::new(|| {}));
        let target = target.unwrap();
        scsi.add_target(&target, Some(0), bdev).unwrap();
        target.stop_reactors();
        let negotiated = Arc::clone(&scsi).connect();
        Self::Scsi(scsi, negotiated)
    }

    /// The disk, as queues see it.
    pub(crate) fn view(&self) -> DeviceView {
        match self {
            Self::Blk(disk) => BlkView::erased(disk, false),
            Self::Scsi(_, negotiated) => negotiated.view().unwrap(),
        }
    }

    /// A queue of at most `depth` requests.
    pub(crate) fn queue(&self, depth: u16, new: NewQueue<'_>) -> Arc<dyn TargetQueue> {
        match self {
            Self::Blk(disk) => Queue::new(BlkQueue::open(Some(disk), depth).unwrap(), new).unwrap(),
            Self::Scsi(scsi, negotiated) => {
                let (scsi, key) = (Arc::clone(scsi), negotiated.key());
                let opened = scsi.open_queue(key, FIRST_COMMAND_QUEUE, depth).unwrap();
                opened.start(new).unwrap()
            }
        }
    }
}
