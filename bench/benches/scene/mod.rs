//! What the benches set up and set in motion: every use of the target's inner interfaces is here.
//!
//! [`disks`] to serve from, and [`devices`] that show them; a [`guest`] with its queues; a [`stage`] on which a reactor without a
//! thread serves them; and parts of that way alone: [`rings`], a disk's [`channel`], and what a
//! [`reader`] of published values does.

pub(crate) mod channel;
pub(crate) mod devices;
pub(crate) mod disks;
pub(crate) mod guest;
pub(crate) mod reader;
pub(crate) mod rings;
pub(crate) mod stage;
