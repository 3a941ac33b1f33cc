//! The front end, and `vhost-perf`, against qemu-storage-daemon, a back end that shares nothing with ours.
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

mod fixture;
mod loads;
mod perf;
mod perf_refusals;
mod queues;
mod session;
