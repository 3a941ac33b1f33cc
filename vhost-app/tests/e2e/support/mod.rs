//! What the tests share.

pub(crate) mod ceph;
pub(crate) mod disks;
pub(crate) mod front_ends;
pub(crate) mod guest;
pub(crate) mod harness;
pub(crate) mod isolation;
pub(crate) mod locks;
pub(crate) mod nbdkit;
pub(crate) mod real_disks;
pub(crate) mod slow_files;
pub(crate) mod storage_daemon;
pub(crate) mod verified_load;
