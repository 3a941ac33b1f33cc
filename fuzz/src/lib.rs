//! What the fuzz targets do with an input; `targets/` are their entries for libFuzzer.
//!
//! Each module's `run` takes the bytes of one input and panics if what it tries breaks a promise:
//!
//! * [`rings`]: a queue served for a guest that writes into its rings whatever it likes.
//! * [`messages`]: a target whose front ends send messages and fds of any kind.
//! * [`inflight`]: in-flight areas, and [`dirty_log`]: dirty logs, made by a stranger.
//! * [`json_rpc`]: the RPC server; [`config_file`]: what `-c` reads.
//!
//! They share [`input`], [`guest`] (memory with a shadow) and [`disk`] (a disk that does what the
//! input says).

pub mod config_file;
pub mod dirty_log;
pub mod disk;
pub mod guest;
pub mod inflight;
pub mod input;
pub mod json_rpc;
pub mod messages;
mod methods;
mod product;
pub mod rings;
pub mod script;
