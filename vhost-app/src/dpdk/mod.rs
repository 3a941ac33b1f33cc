//! DPDK behind safe functions: its log, its start, and rte_vhost as a transport.

mod callbacks;
mod connection;
pub(crate) mod eal;
mod front_ends;
mod interpose;
mod listeners;
pub(crate) mod log;
mod self_test;
pub(crate) mod transport;
