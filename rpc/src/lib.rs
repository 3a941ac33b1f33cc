//! JSON-RPC 2.0 on a Unix socket, with SPDK's framing. This crate knows no device.
//!
//! A [`Registry`] holds the methods, a [`Server`] serves them on a socket, and [`Registry::call`]
//! calls one from within the process (for the entries of a configuration file). All run on one
//! thread, inside a `tokio::task::LocalSet`, so a method may use `Rc` and `RefCell`, and its future
//! need not be `Send`.
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
//! The data flow: `scan` finds the end of a request in the received bytes, `request` parses it,
//! `registry` finds the method, `params` and `decode` decode its parameters, and `answer` encodes
//! the answer. `connection` receives and sends the bytes of one client; `server` accepts clients.
//!
//! Other tasks share the thread, so neither this crate nor a method may run for long without a
//! yield. Work that grows with a request or an answer runs in time slices: `batch` yields after
//! each member, `answer` encodes a long result piece by piece, and a method that builds one counts
//! its work ([`Params::pace`]). Other threads close the sockets (`stream`).

mod answer;
mod batch;
mod client;
mod connection;
mod decode;
mod error;
mod hang_up;
mod idle;
mod input;
mod link;
mod load;
mod member;
mod mode;
mod pace;
mod params;
mod phase;
mod registry;
mod request;
mod scan;
mod server;
mod socket;
mod stream;

pub use answer::ANSWER_MAX;
pub use client::Client;
pub use error::{RpcError, strerror};
pub use input::REQUEST_MAX;
pub use link::OUTSTANDING_MAX;
pub use pace::{Pace, SLICE_VALUES};
pub use params::{DecodeFailure, Params};
pub use phase::{Phase, Phases};
pub use registry::Registry;
pub use server::{CONNECTIONS_MAX, Server};
pub use socket::BindError;
