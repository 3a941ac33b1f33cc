//! The DPDK transport: EAL's start, DPDK's log, and rte_vhost as a
//! [`Transport`](vhost_target::Transport).
//!
//! The modules, in the order in which the process and its messages pass through them:
//!
//! * [`eal`]: starts DPDK; `log`: sends DPDK's log lines to `tracing`.
//! * [`transport`]: the sockets that rte_vhost listens on; `self_test`: tests at start the
//!   undocumented behaviour of rte_vhost that is used; `event_thread`: wakes rte_vhost's event
//!   thread; `listeners`: closes listening sockets; `shared`: the state that these modules share.
//! * `interpose`: overrides the libc functions through which rte_vhost would get a front end's
//!   socket; `front_ends`: reads from and writes to front ends in rte_vhost's place; `socket`: the
//!   system calls.
//! * `callbacks`: rte_vhost's callbacks, which call the target; `connection`: one connection, as
//!   the target uses it.
//!
//! Forbidden dependencies, which `ci/arrows` checks: no other crate depends on `spdk_sys`, so that
//! no other code can call DPDK; and this crate uses no device, no bdev and no JSON.
//!
//! A process has one transport. A program that links this crate uses this crate's `accept`,
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

pub use interpose::OnBound;
pub use transport::DpdkTransport;
