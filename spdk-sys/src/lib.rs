//! DPDK (EAL, rte_vhost) as Rust sees it: bindgen's output, and no logic.
//!
//! The names are C's. What differs between DPDK releases has one name here, the newer one:
//!
//! | here | 22.11 |
//! |---|---|
//! | [`rte_vhost_backend_config_change`] | `rte_vhost_slave_config_change` |
//! | [`VHOST_USER_PROTOCOL_F_BACKEND_REQ`] | `VHOST_USER_PROTOCOL_F_SLAVE_REQ` |
//! | [`VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD`] | `VHOST_USER_PROTOCOL_F_SLAVE_SEND_FD` |
//!
//! The last member of [`rte_vhost_device_ops`] also differs (`reserved`, from 23.07
//! `guest_notify`), so fill it in with `..unsafe { core::mem::zeroed() }`.
//!
//! # The argument of the extern message handlers
//! `rte_vhost_msg_handle` gets a pointer to `struct vhu_msg_context`, which is in a private header
//! of DPDK:
//!
//! | offset, bytes | what |
//! |---|---|
//! | 0 | the message: `u32` request, `u32` flags, `u32` payload size, payload (packed) |
//! | [`FDS_OFFSET`] | where the message ends at the latest: the fds that came with it |
//!
//! The offset belongs to the headers this was built with; compare [`rte_version_year`] and
//! [`rte_version_month`] with [`RTE_VER_YEAR`] and [`RTE_VER_MONTH`] before relying on it.

#[expect(
    unsafe_code,
    missing_docs,
    non_camel_case_types,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "generated from C headers, whose names and documentation are DPDK's"
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

pub use bindings::*;

#[cfg(not(dpdk_ge_23_03))]
pub use bindings::{
    VHOST_USER_PROTOCOL_F_SLAVE_REQ as VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_SLAVE_SEND_FD as VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD,
    rte_vhost_slave_config_change as rte_vhost_backend_config_change,
};

/// Offset of `fds` in `struct vhu_msg_context`, in bytes; measured with the private header of each
/// release.
pub const FDS_OFFSET: usize = if cfg!(dpdk_ge_25_03) { 1084 } else { 644 };

/// Whether DPDK's archives are part of the program, rather than its shared libraries loaded with
/// it.
pub const LINKED_STATICALLY: bool = cfg!(dpdk_static);
