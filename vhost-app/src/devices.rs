//! The devices of controllers, of every kind.
//!
//! The rest of the program does not tell kinds apart, except for the methods that create
//! controllers and change their disks. A further kind needs a case in [`Kind`].

use std::sync::Arc;

use bdev::{Bdev, QosUser, UserCounts};
use serde_json::{Value, json};
use vhost_blk::Blk;
use vhost_scsi::Scsi;
use vhost_target::device::Device;
use vhost_target::{QueueInfo, Target};

/// The one transport of virtio-blk controllers.
pub(crate) const BLK_TRANSPORT: &str = "vhost_user_blk";

/// The first request queue of a virtio-scsi device (virtio 1.2, section 5.6.2).
const SCSI_REQUEST_QUEUE: usize = 2;

/// A device, by its kind.
enum Kind<'d> {
    Blk(&'d Blk),
    Scsi(&'d Scsi),
}

impl<'d> Kind<'d> {
    /// `None` is not expected: this program creates no other kind.
    fn of(device: &'d Arc<dyn Device>) -> Option<Self> {
        Blk::of(device).map(Self::Blk).or_else(|| Scsi::of(device).map(Self::Scsi))
    }
}

/// A disk that a controller shows to its guests.
#[derive(Debug)]
pub(crate) struct Disk {
    /// The number of its target, if the controller has targets.
    pub(crate) target: Option<u8>,
    /// The name of its bdev. A virtio-blk controller keeps that of a bdev that was removed.
    pub(crate) bdev: String,
    /// The user of the bdev, unless the bdev was removed.
    pub(crate) user: Option<QosUser>,
    /// What the controller's queues have done at the bdev.
    pub(crate) counts: UserCounts,
}

/// Returns the disks of a device.
pub(crate) fn disks(device: &Arc<dyn Device>) -> Vec<Disk> {
    match Kind::of(device) {
        Some(Kind::Blk(blk)) => vec![Disk {
            target: None,
            bdev: blk.bdev_configured().to_owned(),
            user: blk.user(),
            counts: blk.counts(),
        }],
        Some(Kind::Scsi(scsi)) => {
            let disk = |target: vhost_scsi::TargetInfo| Disk {
                target: Some(target.number),
                bdev: target.bdev,
                user: Some(target.user),
                counts: target.counts,
            };
            scsi.targets().into_iter().map(disk).collect()
        }
        None => vec![],
    }
}

/// Returns what a device's queues have done, also for disks that were removed.
pub(crate) fn counts(device: &Arc<dyn Device>) -> UserCounts {
    match Kind::of(device) {
        Some(Kind::Blk(blk)) => blk.counts(),
        Some(Kind::Scsi(scsi)) => scsi.counts(),
        None => UserCounts::default(),
    }
}

/// Returns whether a bdev of the device is this one or is built on it.
pub(crate) fn uses(device: &Arc<dyn Device>, bdev: &Arc<dyn Bdev>) -> bool {
    match Kind::of(device) {
        Some(Kind::Blk(blk)) => blk.uses(bdev),
        Some(Kind::Scsi(scsi)) => scsi.uses(bdev),
        None => false,
    }
}

/// Returns the names of the bdevs that queues have open, each with the number of its channels.
pub(crate) fn channels<'q>(
    device: &Arc<dyn Device>,
    queues: impl Iterator<Item = &'q QueueInfo>,
) -> Vec<(String, usize)> {
    let is_scsi = matches!(Kind::of(device), Some(Kind::Scsi(_)));
    let first = if is_scsi { SCSI_REQUEST_QUEUE } else { 0 };
    let count = queues.filter(|queue| queue.ring >= first).count();
    let mut channels: Vec<(String, usize)> = vec![];
    // A bdev that was removed has no user.
    for disk in disks(device).into_iter().filter(|disk| disk.user.is_some() && count > 0) {
        match channels.iter_mut().find(|(bdev, _)| *bdev == disk.bdev) {
            Some((_, channels)) => *channels += count,
            None => channels.push((disk.bdev, count)),
        }
    }
    channels
}

/// Returns `backend_specific` of `vhost_get_controllers`, in SPDK's shape.
pub(crate) fn describe(device: &Arc<dyn Device>) -> Value {
    match Kind::of(device) {
        Some(Kind::Blk(blk)) => json!({
            "block": {
                "readonly": blk.read_only(),
                "bdev": blk.bdev(),
                "transport": BLK_TRANSPORT,
            }
        }),
        Some(Kind::Scsi(scsi)) => {
            let describe = |target: vhost_scsi::TargetInfo| {
                json!({
                    "scsi_dev_num": target.number,
                    "id": target.device,
                    "target_name": target_name(target.number),
                    "luns": [{ "id": 0, "bdev_name": target.bdev }],
                })
            };
            json!({ "scsi": scsi.targets().into_iter().map(describe).collect::<Vec<_>>() })
        }
        None => json!({}),
    }
}

/// Returns SPDK's name of a SCSI target, which the guest sees too.
pub(crate) fn target_name(number: u8) -> String {
    format!("Target {number}")
}

/// Removes a bdev from all controllers that show it. May close channels, so it may take long: not
/// for the control thread.
pub(crate) fn remove_bdev(target: &Target, bdev: &Arc<dyn Bdev>) {
    vhost_blk::remove_bdev(target, bdev);
    vhost_scsi::remove_bdev(target, bdev);
}

/// Tells guests a bdev's new size.
pub(crate) fn bdev_resized(target: &Target, bdev: &Arc<dyn Bdev>) {
    vhost_blk::bdev_resized(target, bdev);
    vhost_scsi::bdev_resized(target, bdev);
}

/// Tells reactors that rate limits of a bdev were set or removed.
pub(crate) fn limits_changed(target: &Target, bdev: &Arc<dyn Bdev>) {
    vhost_blk::limits_changed(target, bdev);
    vhost_scsi::limits_changed(target, bdev);
}

/// Removes the targets of a SCSI controller that is about to be deleted. So I/O that a closed
/// connection has in flight keeps only those bdevs open that it uses. Not for the control thread,
/// as [`remove_bdev`].
pub(crate) fn release(target: &Target, controller: &str) {
    let Some(controller) = target.controller(controller) else { return };
    if let Some(Kind::Scsi(scsi)) = Kind::of(&controller.device) {
        for shown in scsi.targets() {
            // Another call may have removed it since.
            let _ = scsi.remove_target(target, shown.number);
        }
    }
}
