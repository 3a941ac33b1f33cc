//! The DPDK transport: EAL's start, DPDK's log, and rte_vhost as a
//! [`Transport`](vhost_target::Transport).
//!
//! Modules in the order in which the process and its messages pass them:
//!
//! * [`eal`]: starts DPDK; `log`: takes DPDK's log lines into `tracing`.
//! * [`transport`]: the sockets that rte_vhost listens on; `self_test`: tries at start what
//!   rte_vhost allows but does not document; `event_thread`: rte_vhost's thread, to wake it;
//!   `listeners`: the end of listening sockets; `shared`: what all of these know.
//! * `interpose`: replaces the libc functions through which rte_vhost would get a front end's
//!   socket; `front_ends`: reads from and writes to front ends instead; `socket`: the system calls.
//! * `callbacks`: rte_vhost's callbacks, which call the target; `connection`: one connection, as
//!   the target uses it.
//!
//! Forbidden dependencies, which `ci/arrows` checks: no other crate depends on `spdk_sys`, so that
//! no other code can call DPDK; and this crate uses no device, no bdev and no JSON.
//!
//! A program has one transport, and every program that links this crate has its `accept`,
//! `recvmsg`, `listen` and `unlink` in place of libc's (see `interpose`).

mod callbacks;
mod connection;
pub mod eal;
mod event_thread;
mod front_ends;
mod interpose;
mod listeners;
mod log;
mod self_test;
mod shared;
mod socket;
pub mod transport;

pub use transport::DpdkTransport;
