//! End-to-end tests: the real binary and real clients. One program, because linking one for each file takes minutes.
#![expect(clippy::unwrap_used, reason = "tests")]

mod support;

#[path = "../../../fuzz/src/input.rs"]
#[expect(unreachable_pub, reason = "a part of another crate")]
mod input;
#[path = "../../../fuzz/src/script.rs"]
#[expect(dead_code, unreachable_pub, reason = "a part of another crate, used in part")]
mod script;

mod ceph;
mod ceph_cache;
mod ceph_faults;
mod ceph_gone;
mod ceph_guest;
mod check;
mod crash;
mod crypto;
mod forced_delete;
mod foreign_fds;
mod from_spdk;
mod front_ends;
mod fuzz;
mod gpt;
mod guest;
mod guest_cache;
mod guest_crash;
mod guest_life;
mod guest_lvol;
mod guest_memory;
mod guest_migration;
mod guest_rings;
mod guest_scsi;
mod hostile;
mod io_errors;
mod isolation;
mod lease;
mod lvol;
mod lvol_faults;
mod memory_groups;
mod metrics;
mod nbd;
mod nbd_server;
mod operator;
mod pending;
mod placement;
mod plugin;
mod qos;
mod raid;
mod raid_members;
mod real_disks;
mod real_disks_engines;
mod real_disks_frozen;
mod real_disks_sleep;
mod refusals;
mod round_trip;
mod rpc;
mod rpc_fairness;
mod sandbox;
mod schema;
mod scsi_load;
mod scsi_rpc;
mod scsi_targets;
mod service;
mod sleep;
mod slow_close;
mod start;
mod stats;
mod stopped;
mod top;
mod virtio;
