//! The front end against qemu-storage-daemon, a back end that shares nothing with ours.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod fixture;
mod loads;
mod queues;
mod session;
