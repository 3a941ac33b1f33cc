//! Namespaces of the kernel's NVMe driver as block devices: SPDK's bdev module `nvme`.
//!
//! * `target`: which controller an RPC means. `sysfs`: what the kernel knows of controllers and
//!   namespaces. `users`: who uses a block device. `fabrics`: connections over TCP.
//! * `identity`: what a controller says of itself, and its health.
//! * `controller`: the attached controllers.
//! * `open`: from a namespace to a bdev. `entry`: how it is shown.
//! * `state`: what the methods share.
//! * `attach`, `detach`, `hotplug`: what changes them. `module`: the RPC methods.
//!
//! The data path is that of a file disk on the namespace's block device. What may wait for a
//! controller runs on threads of its own.
//!
//! Forbidden dependencies: DPDK, rings, and the program that runs the module.

mod target;

mod sysfs;
mod users;

mod fabrics;
mod identity;

mod controller;

mod entry;
mod open;
mod state;

mod attach;
mod detach;
mod hotplug;

mod module;

pub use module::NvmeModule;
