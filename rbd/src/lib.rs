//! Ceph RBD images as block devices: SPDK's bdev module `rbd`.
//!
//! * `library`: librados and librbd, opened when they are first used.
//! * `cluster`: a connection to a cluster. `clusters`: all of them. `predecessors`: which clients
//!   were processes of this host that have ended.
//! * `image`: an open image.
//! * `worker`: the thread of one disk that calls librbd. `channel`: a reactor's side of the disk.
//! * `disk`: the bdev. `watch`: the task that reacts to changes of its image.
//! * `module`: the RPC methods. `cpus`: their sets of CPUs.
//!
//! No reactor calls librbd. What may wait for a cluster runs on threads of its own, and closing on
//! the closer's threads.
//!
//! Forbidden dependencies: DPDK, rings, and the program that runs the module.

mod library;

mod cluster;
mod clusters;
mod predecessors;

mod image;

mod channel;
mod disk;
mod worker;

mod cpus;
mod module;
mod watch;

pub use cluster::{Cluster, ClusterOptions, ConfigFile};
pub use disk::{RbdDisk, RbdOptions};
pub use image::ImageName;
pub use library::{is_installed, start_loader};
pub use module::RbdModule;
pub use predecessors::DIR as STATE_DIR;
