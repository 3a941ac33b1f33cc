//! Block devices on several others: raid0, raid1, concat and raid5f, in SPDK's format.
//!
//! A [`Level`] says how an array ([`RaidDisk`]) stores its data on its members; the `layout` says
//! where each byte is, and the `superblock` records it on every member. The members and their states
//! are in the `array`, which all channels share. A channel (`channel`) has a lane (`array::lane`): the
//! I/Os of its owner, and their parts at the members. A redundant array has a thread (`maintenance`) that
//! removes members which fail, adds new ones and rebuilds them (by `member_channel`s), and writes superblocks (`metadata`).
//! It takes each lane for a moment to change it. The module ([`RaidModule`]) has the RPC methods, and
//! assembles arrays from the superblocks of new bdevs.
//!
//! Forbidden dependencies: an async runtime, the virtqueues, and the target.

mod level;

mod layout;
mod superblock;

mod array;

mod channel;
mod disk;

mod maintenance;
mod member_channel;
mod metadata;

mod module;

#[cfg(test)]
mod faulty;
#[cfg(test)]
mod hanging;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod simulation;

pub use disk::{OptionalMember, RaidDisk, RaidOptions};
pub use layout::Extent;
pub use level::Level;
pub use maintenance::Pace;
pub use module::RaidModule;
