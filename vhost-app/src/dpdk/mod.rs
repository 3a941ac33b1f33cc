//! DPDK behind safe functions: its log, its start, and rte_vhost as a transport.

mod callbacks;
mod connection;
pub(crate) mod eal;
pub(crate) mod log;
mod received;
mod self_test;
pub(crate) mod transport;
