//! Requests that are laid out once and submitted many times, for measurements.
//!
//! [`Slots`] holds the memory of a queue's requests, all of one size, for the kind of device that
//! [`Form`] names: [`Blk`] or [`Scsi`]. [`Split`] and [`Packed`] drive a ring with them. Submitting a
//! request writes only the fields that have changed. For any other requests, use [`crate::Queue`],
//! [`crate::PackedQueue`] and [`crate::scsi`].

mod blk;
mod form;
mod packed;
mod scsi;
mod slots;
mod split;

pub use blk::{Blk, BlkHead};
pub use form::{Form, Head, Place};
pub use packed::Packed;
pub use scsi::{Scsi, ScsiHead, ScsiStatus};
pub use slots::Slots;
pub use split::{Split, stride};

/// The header and answer of a request of queue `V`.
pub type HeadOf<'a, V> = <<V as Virtqueue>::Form as Form>::Head<'a>;

/// The driver's side of a virtqueue whose requests are laid out in advance, in slots.
///
/// Only sleeping needs a fence. If the check for a wanted kick comes before the device sees the
/// published requests, the next check corrects it, and the loop checks again whenever no request
/// completes.
pub trait Virtqueue {
    /// The form of its requests.
    type Form: Form;

    /// Stores the slots of requests that the device has used in `slots`, in the device's order and
    /// as many as fit, and returns their number. The data that the device wrote before is visible.
    /// The values are not validated: the caller must check them.
    fn take(&mut self, slots: &mut [u16]) -> usize;

    /// Returns whether the device has used a request that was not taken.
    fn has_completion(&self) -> bool;

    /// Makes the request in `slot` a read or a write. Only while the device does not hold it.
    fn set_kind(&mut self, slot: usize, write: bool);

    /// Makes the requests in `slots`, at least one, available to the device, with all data that was
    /// written before.
    fn give(&mut self, slots: &[u16]);

    /// Returns whether the device wants a kick for the requests published since the last kick. If
    /// so, the caller kicks it.
    fn take_kick(&mut self) -> bool;

    /// Asks the device for a call at the next completion. A caller that sleeps for it issues a
    /// fence after this, and then checks once more for completions and kicks.
    fn ask_for_call(&mut self);

    /// Tells the device that it need not call.
    fn refuse_calls(&mut self);

    /// Returns the position, in SET_VRING_BASE's format, from which another device must continue
    /// that has no other source for it.
    fn base(&self) -> u16;
}
