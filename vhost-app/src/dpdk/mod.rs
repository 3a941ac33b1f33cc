//! DPDK behind safe functions: its log, its start, and rte_vhost as a transport.

pub(crate) mod eal;
pub(crate) mod log;
mod received;
pub(crate) mod transport;
