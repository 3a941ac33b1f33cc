//! A target of a controller. It has one logical unit, LUN 0.

use std::sync::Arc;

use bdev::Bdev;
use scsi::{Nexus, Port};
use served_bdev::User;

use crate::unit::{DeviceNumber, Unit};

/// Targets of a controller: SPDK's number.
pub const TARGETS_MAX: usize = 8;

/// Front ends of a controller, including those that still have I/O in flight: more than the target
/// accepts.
pub(crate) const FRONT_ENDS_MAX: u8 = 32;

/// Returns the nexus of a front end of a controller, by its index, and one of the controller's
/// targets. A disk with two targets has two nexuses with each front end, as paths of multipath I/O.
pub(crate) fn nexus(controller: u64, front_end: u8, target: u8) -> Nexus {
    Nexus(controller << 16 | u64::from(front_end) << 8 | u64::from(target))
}

/// A target. It is dropped when no queue has its bdev open any more.
#[derive(Debug)]
pub(crate) struct ScsiTarget {
    /// The number of its controller, never reused.
    controller: u64,
    pub(crate) number: u8,
    pub(crate) device: DeviceNumber,
    pub(crate) unit: Arc<Unit>,
    /// The target's rate limits and counters at the bdev.
    pub(crate) user: User,
    pub(crate) port: Port,
}

/// Its nexuses are lost: what they have reserved with RESERVE is free. Registrations stay, as the
/// target may be added again.
impl Drop for ScsiTarget {
    fn drop(&mut self) {
        let mut state = self.unit.lock();
        for front_end in 0..FRONT_ENDS_MAX {
            let nexus = nexus(self.controller, front_end, self.number);
            state.logical_unit.nexus_lost(nexus);
        }
    }
}

impl ScsiTarget {
    pub(crate) fn new(
        controller: u64,
        number: u8,
        device: DeviceNumber,
        unit: Arc<Unit>,
    ) -> Arc<Self> {
        let port = Port { target: number, relative: 0, group: device.number };
        let user = User::new(Arc::clone(unit.bdev()));
        Arc::new(Self { controller, number, device, unit, user, port })
    }

    /// Returns its bdev.
    pub(crate) fn bdev(&self) -> &Arc<dyn Bdev> {
        self.unit.bdev()
    }
}
