//! Requests that are laid out once and submitted many times: drivers for measuring.
//!
//! [`Slots`] holds the memory of a queue's requests, all of one size; [`Split`] and [`Packed`] drive
//! a ring with them. Submitting a request writes what has changed and nothing else. For requests of
//! any form there are [`crate::Queue`] and [`crate::PackedQueue`].

mod packed;
mod slots;
mod split;

pub use packed::Packed;
pub use slots::{Head, Slots};
pub use split::{Split, stride};

/// The driver's side of a virtqueue whose requests lie in slots, laid out in advance.
///
/// Nothing here needs a fence but sleeping: if a look at what the device wants (a kick) comes before
/// the device sees what was published, the next look makes that good, and the loop looks again
/// whenever nothing completes.
pub trait Virtqueue {
    /// Puts the slots of requests that the device has given back into `slots`, in the device's order
    /// and as many as fit, and returns how many those are. What the device wrote before is seen.
    /// They may be any numbers: check them.
    fn take(&mut self, slots: &mut [u16]) -> usize;

    /// Whether the device has given back a request that was not taken.
    fn has_completion(&self) -> bool;

    /// Makes the request in `slot` a read or a write. Only while the device does not hold it.
    fn set_kind(&mut self, slot: usize, write: bool);

    /// Makes the requests in `slots`, at least one, available to the device, with all that was
    /// written before.
    fn give(&mut self, slots: &[u16]);

    /// Whether the device wants to be kicked for what was published since it last was. If so, the
    /// caller kicks it.
    fn take_kick(&mut self) -> bool;

    /// Asks the device for a call at the next completion. Whoever sleeps for it has a fence after
    /// this, and then looks once more for completions and kicks.
    fn ask_for_call(&mut self);

    /// Tells the device that nobody waits for its calls.
    fn refuse_calls(&mut self);

    /// Where another device begins that takes over and has nothing else to go by, as SET_VRING_BASE
    /// says it.
    fn base(&self) -> u16;
}
