//! The fuzz targets' code; `targets/` has their libFuzzer entry points.
//!
//! Each module's `run` takes the bytes of one input and panics if an invariant is broken:
//!
//! * [`rings`]: a queue served for a guest that writes anything into its rings.
//! * [`messages`]: a target whose front ends send messages and fds of any kind.
//! * [`inflight`] and [`dirty_log`]: in-flight areas and dirty logs from an untrusted front end.
//! * [`lvstore`]: logical volume stores with forged metadata.
//! * [`scsi`]: the commands of a guest to a SCSI disk.
//! * [`json_rpc`]: the RPC server; [`config_file`]: the reader of `-c`.
//!
//! They share [`input`], [`guest`] (memory with a shadow copy) and [`disk`] (a disk that follows the input).

pub mod config_file;
pub mod dirty_log;
pub mod disk;
pub mod guest;
pub mod inflight;
pub mod input;
pub mod json_rpc;
pub mod lvstore;
pub mod messages;
mod methods;
mod product;
pub mod rings;
pub mod script;
pub mod scsi;
