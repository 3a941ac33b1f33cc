//! JSON-RPC 2.0 on a Unix socket, framed as SPDK frames it; knows no device.
//!
//! A [`Registry`] holds the methods, a [`Server`] offers them on a socket, and
//! [`Registry::call`] runs one in process (for the replay of a configuration file).
//! Everything lives on one thread, inside a `tokio::task::LocalSet`, so a method may use
//! `Rc` and `RefCell` and its future need not be `Send`.
//!
//! ```no_run
//! # use std::rc::Rc;
//! use rpc::{DecodeFailure, Params, Phases, Registry, RpcError, Server};
//! use serde::Deserialize;
//! use serde_json::Value;
//!
//! #[derive(Deserialize)]
//! struct Resize {
//!     name: String,
//!     new_size: u64,
//! }
//!
//! async fn resize(params: Params) -> Result<Value, RpcError> {
//!     let resize: Resize = params.decode(DecodeFailure::INTERNAL)?;
//!     if resize.name.is_empty() || resize.new_size == 0 {
//!         return Err(RpcError::errno(22));
//!     }
//!     Ok(Value::Bool(true))
//! }
//!
//! # async fn start() -> Result<(), rpc::BindError> {
//! let mut registry = Registry::new();
//! registry.register("bdev_null_resize", Phases::Runtime, resize);
//! let server = Server::bind("/var/tmp/spdk.sock", Rc::new(registry))?;
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! The data flows: bytes → `scan` (where does a request end?) → `request` (what does it
//! ask?) → `registry` (who answers?) → `params` and `decode` (with what?) → `answer` (the
//! reply's text). `connection` moves the bytes of one client, `server` the clients.
//!
//! Other tasks share the thread, so neither this crate nor a method may run for long at a time.
//! Work that grows with a request or an answer is done in turns: `batch` runs one member per turn,
//! `answer` encodes a long result piece by piece, and a method that builds one counts its work
//! ([`Params::pace`]). Sockets are closed on other threads (`stream`).

mod answer;
mod batch;
mod connection;
mod decode;
mod error;
mod hang_up;
mod idle;
mod input;
mod link;
mod pace;
mod params;
mod registry;
mod request;
mod scan;
mod server;
mod socket;
mod stream;

pub use answer::ANSWER_MAX;
pub use error::{RpcError, strerror};
pub use input::REQUEST_MAX;
pub use link::OUTSTANDING_MAX;
pub use pace::{Pace, TURN_VALUES};
pub use params::{Client, DecodeFailure, Params};
pub use registry::{Phase, Phases, Registry};
pub use server::{CONNECTIONS_MAX, Server};
pub use socket::BindError;
